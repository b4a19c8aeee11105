"""The stages that a run goes through, and what part of its time each is expected to take, for the progress bar."""

from __future__ import annotations

from config.schema import PreprocessConfig

NEAR = {"signatures": 0.1, "buckets": 0.1, "clusters": 0.01}
LINES = {"lines": 0.1, "repeated-lines": 0.05}


def stage_shares(settings: PreprocessConfig, merged: bool) -> dict[str, float]:
    """The names of the stages that these settings need, in their order, and the weight of each.

    `merged` says whether the files of the first stage are many enough to be merged.
    """
    merge = {"merge": 0.05} if merged else {}
    near = NEAR if settings.near_deduplication.enabled else {}
    lines = LINES if settings.line_deduplication.unit != "off" else {}
    survivors = {"survivors": 0.03} if near or lines else {}
    return {"clean": 0.3, **merge, **near, **lines, **survivors, "tokenize": 0.6, "write": 0.1}
