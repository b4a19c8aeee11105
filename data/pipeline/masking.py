"""Masking e-mail and IP addresses, by the patterns and with the replacements of datatrove's PIIFormatter.

It takes the next replacement for each address that it finds, document after document; here every document starts with
the first, so that a text is masked the same wherever it stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import cycle

LONGEST = 256  # characters before and after the @ of an address; looking further takes time quadratic in the text
LOCAL = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]")  # before the @


def mask_emails(text: str) -> str:
    """`text` with every e-mail address replaced."""
    at = text.find("@")
    if at < 0:
        return text
    pattern, words = _emails()
    replacements = cycle(words)
    parts: list[str] = []
    done = 0
    while at >= 0:
        first = at
        while first > max(done, at - LONGEST) and LOCAL.match(text, first - 1):
            first -= 1
        match = pattern.search(text, first, at + 1 + LONGEST) if first < at else None
        if match and match.start() < at:
            parts += [text[done : match.start()], next(replacements)]
            done = match.end()
        at = text.find("@", max(at + 1, done))
    return "".join([*parts, text[done:]])


def mask_ips(text: str) -> str:
    """`text` with every public IPv4 address replaced; private, reserved and impossible ones stay."""
    if text.count(".") < 3:
        return text
    pattern, words, is_public = _ips()
    replacements = cycle(words)
    return pattern.sub(lambda match: next(replacements) if is_public(match.group()) else match.group(), text)


@lru_cache(maxsize=1)
def _emails() -> tuple[re.Pattern[str], tuple[str, ...]]:
    from datatrove.pipeline.formatters.pii import PIIFormatter

    replacer = PIIFormatter().emails_replacer
    return replacer.regex, replacer.replacements


@lru_cache(maxsize=1)
def _ips() -> tuple[re.Pattern[str], tuple[str, ...], Callable[[str], bool]]:
    from datatrove.pipeline.formatters.pii import PIIFormatter

    replacer = PIIFormatter().ip_replacer
    return replacer.regex, replacer.replacements, replacer.validator
