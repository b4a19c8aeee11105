"""From a stream of tokens to a stream of text: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from data.tokenization import Tokenizer

FinishReason = Literal["stop", "length", "error"]


class Detokenizer:
    """Text of tokens as they come: whole characters, each as soon as its last byte is there.

    Bytes that can be no character become U+FFFD, as `Tokenizer.decode` gives them. Special tokens have no text. Where
    the tokens are a text of their own, and not the rest of one, a first space goes as the tokenizer has it.
    """

    def __init__(self, tokenizer: Tokenizer, own_text: bool = False) -> None:
        self._tokenizer = tokenizer
        self._decoder = getincrementaldecoder("utf-8")(errors="replace")
        self._dropping = own_text and tokenizer.drops_first_space

    def push(self, token: int) -> str:
        """Add one token; return the text that is certain now, maybe nothing."""
        text = self._decoder.decode(self._tokenizer.decode_bytes([token], skip_special_tokens=True))
        if self._dropping and text:
            self._dropping = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """The rest, when no more tokens come: U+FFFD for a character that was not finished."""
        return self._decoder.decode(b"", final=True)

    def copy(self) -> Detokenizer:
        """Another one that has come as far."""
        other = Detokenizer(self._tokenizer)
        other._decoder.setstate(self._decoder.getstate())
        other._dropping = self._dropping
        return other


class StopStrings:
    """Lets text through up to the first stop string, and holds back what may turn out to be the start of one.

    The stop string whose last character comes first ends the text; of several that end together, the longest does. So
    the outcome does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add a piece; return the text that may be shown, and set `stopped` once a stop string is complete."""
        if self.stopped:
            return ""
        self._held += text
        ends = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            shown, self._held = self._held[: min(ends)[1]], ""
            return shown
        safe = len(self._held) - self._longest_beginning()
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        shown, self._held = self._held, ""
        return shown

    def copy(self) -> StopStrings:
        """Another one that has come as far."""
        other = StopStrings(self._stops)
        other._held, other.stopped = self._held, self.stopped
        return other

    def _longest_beginning(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            ending = self._held[-length:]
            if any(stop.startswith(ending) for stop in self._stops):
                return length
        return 0


class Writing:
    """A text that grows by tokens, up to one of `stop_tokens`, a text of `stops`, or where it must end.

    `own_text` as in `Detokenizer`.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], stop_tokens: Iterable[int], own_text: bool = False
    ) -> None:
        self._detokenizer, self._stops = Detokenizer(tokenizer, own_text), StopStrings(stops)
        self._stop_tokens = frozenset(stop_tokens)

    def push(self, token: int, complete: bool, full: bool) -> tuple[str, FinishReason | None]:
        """Add a token; returns the text that it makes certain, and how the text ended, if it did.

        `complete`: its form lets nothing follow; `full`: there is no room for more.
        """
        stops, last = self._stops, token in self._stop_tokens
        text = "" if last else stops.push(self._detokenizer.push(token))
        finish: FinishReason | None = "stop" if last or complete else "length" if full else None
        if finish is not None and not stops.stopped:
            text += stops.push(self._detokenizer.flush())
            text += stops.flush()
        return text, "stop" if stops.stopped else finish

    def copy(self) -> Writing:
        """Another one that has come as far."""
        other = object.__new__(Writing)
        other._detokenizer, other._stops = self._detokenizer.copy(), self._stops.copy()
        other._stop_tokens = self._stop_tokens
        return other
