"""Two answers to one prompt, of which people (or a judge) preferred one: the examples of DPO.

The forms in which the field's sets have them:

    {"prompt": "...", "chosen": "...", "rejected": "..."}
    {"chosen": "...", "rejected": "..."}                          the prompt is what both begin with
    {"prompt": [...], "chosen": [...], "rejected": [...]}         messages; the answers go on where the prompt ends
    {"chosen": [...], "rejected": [...]}                          whole conversations, which begin with the prompt
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from typing import Any

import orjson

from data.examples.checks import Messages, Unusable, messages_in, text_in


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A prompt and two ways to go on with it, all three texts or all three messages. The prompt is never trained."""

    location: str
    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages

    @property
    def given(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else orjson.dumps(self.prompt).decode()

    @property
    def sides(self) -> tuple[str | Messages, str | Messages]:
        """The chosen answer and the rejected one."""
        return self.chosen, self.rejected


def preference(location: str, record: Mapping[str, Any]) -> PreferenceExample:
    """The pair in a record with "chosen" and "rejected".

    A prompt in text beside answers in messages is theirs already, or else what the user said; answers in text to a
    prompt in messages are what the assistant says. Raises `Unusable` with the reason.
    """
    chosen, rejected = _field(record, "chosen"), _field(record, "rejected")
    if isinstance(chosen, str) is not isinstance(rejected, str):
        raise Unusable('of "chosen" and "rejected" one is a string and the other a list of messages')
    if chosen == rejected:
        raise Unusable('"chosen" and "rejected" are the same, so neither can be preferred')
    prompt = _field(record, "prompt") if record.get("prompt") is not None else None
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, tuple):
            return _conversation(location, prompt, _said(chosen), _said(rejected))
        if prompt is None:
            prompt, chosen, rejected = _split(chosen, rejected)
        return PreferenceExample(location, prompt, chosen, rejected)
    assert isinstance(chosen, tuple) and isinstance(rejected, tuple)
    if not isinstance(prompt, tuple):
        shared = chosen[: _shared(chosen, rejected)]
        prompt = shared if shared or prompt is None else ({"role": "user", "content": prompt},)
    return _conversation(location, prompt, chosen, rejected)


def _field(record: Mapping[str, Any], key: str) -> str | Messages:
    return messages_in(record, key) if isinstance(record[key], list) else text_in(record, key)


def _said(answer: str) -> Messages:
    return ({"role": "assistant", "content": answer},)


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The number of items that both begin with, so that each goes on with at least one."""
    alike = sum(1 for _ in takewhile(bool, map(eq, one, other)))
    return min(alike, len(one) - 1, len(other) - 1)


def _split(chosen: str, rejected: str) -> tuple[str, str, str]:
    """What both begin with, up to the end of a word, and how each goes on."""
    one, other = (re.findall(r"\s*\S+|\s+$", text) for text in (chosen, rejected))
    prompt = "".join(one[: _shared(one, other)])
    if not prompt:
        raise Unusable('has no "prompt", and "chosen" and "rejected" do not begin alike')
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _conversation(location: str, prompt: Messages, chosen: Messages, rejected: Messages) -> PreferenceExample:
    """The pair after `prompt`, which the answers may repeat."""
    if not prompt:
        raise Unusable('has no "prompt", and "chosen" and "rejected" do not begin with the same messages')
    size = len(prompt)
    if chosen[:size] == prompt == rejected[:size]:
        chosen, rejected = chosen[size:], rejected[size:]
    sides: Sequence[tuple[str, Messages]] = (("chosen", chosen), ("rejected", rejected))
    for key, side in sides:
        if all(message["role"] != "assistant" for message in side):
            raise Unusable(f'"{key}" has no assistant message after the prompt, so there is nothing to train on')
        if side[0]["role"] == "system":
            raise Unusable(f'"{key}" begins with a system message; only the first of a conversation may be one')
    return PreferenceExample(location, prompt, chosen, rejected)
