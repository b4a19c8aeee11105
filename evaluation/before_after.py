"""Held-out prompts answered before and after fine-tuning: which ones, and what the answers come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

BEFORE_AFTER = "before_after.json"


def spread(total: int, most: int) -> list[int]:
    """At most `most` of the numbers below `total`, evenly spread."""
    count = min(total, most)
    return [(2 * place + 1) * total // (2 * count) for place in range(count)]


def summary(cases: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """What the answers come to, as (label, before, after)."""

    def of_all(value: Callable[[dict[str, Any], dict[str, Any]], Any]) -> list[Any]:
        return [sum(value(case, case[when]) for case in cases) for when in ("before", "after")]

    count = len(cases)
    losses = [loss / count for loss in of_all(lambda case, said: said["loss"])]
    same = of_all(lambda case, said: said["text"] == case["reference"])
    ended = of_all(lambda case, said: said["ended"])
    return [
        ("mean loss of the example's answer, nats per token", f"{losses[0]:.3f}", f"{losses[1]:.3f}"),
        ("answers that are the example's word for word", f"{same[0]} of {count}", f"{same[1]} of {count}"),
        ("answers that the model ended itself", f"{ended[0]} of {count}", f"{ended[1]} of {count}"),
    ]
