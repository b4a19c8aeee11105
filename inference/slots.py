"""The rows of a KV cache: which text has which, what of it is computed, and what the next step computes.

A text that begins, or whose window has moved, is *filled*: its tokens go through the model `BLOCK` at a time, and all
texts together get no more than `FILLED_PER_STEP` tokens of a step, or a block more than that, first come, first served;
so those that are being written go on meanwhile. What a row holds is not computed again for a text that begins in the
same way, such as a second sample of one prompt or the next turn of a conversation.

A model sees at most `context_length` tokens. When a text grows past that, its oldest tokens are dropped, half a context
at a time, and the rest is filled anew. Where the window begins depends on the length alone, so a long prompt
is cut just as a text that became too long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from inference.runners import BLOCK, Chunk, make_runner
from model.cache import KVCache
from model.transformer import Transformer

FILLED_PER_STEP = 256
WORTH_WAITING = 32  # tokens in common with a text that is being filled, if it is not the same


@dataclass(slots=True, eq=False)
class Slot:
    """A row and its text `ids`, which its owner lets grow; the first `done` tokens of the window are in the cache.

    The first `large` of them went through the model as whole blocks, whose last bits are not those of the kernels.
    `guesses` are tokens that may follow. Where the text is through but for its last token, the next step runs them
    along, as far as the window has room, and leaves those here that it ran.
    """

    row: int
    ids: list[int]
    start: int = 0
    done: int = 0
    large: int = 0
    guesses: list[int] = field(default_factory=list)

    @property
    def window(self) -> list[int]:
        """The tokens that the model sees."""
        return self.ids[self.start :]

    def append(self, token: int) -> bool:
        """Let the text grow; returns whether the token is the next of the guesses, so that it is through already."""
        self.ids.append(token)
        if not self.guesses or self.guesses[0] != token:
            self.guesses = []
            return False
        self.done, self.guesses = self.done + 1, self.guesses[1:]
        return True


@dataclass(slots=True)
class _Left:
    """What the last text of a free row has left there."""

    tokens: list[int] = field(default_factory=list)
    large: int = 0


class Slots:
    """`rows` rows for texts of `model`; with `compiled`, torch.compile makes its steps.

    `computed` counts the tokens that went through it.
    """

    def __init__(self, model: Transformer, rows: int, compiled: bool = False) -> None:
        weight = model.token_embedding.weight
        self._context = model.config.context_length
        self._cache = KVCache(model.config, rows, device=weight.device, dtype=weight.dtype)
        self._runner = make_runner(model, self._cache, compiled)
        self.rows = rows
        self._taken: list[Slot] = []
        self._free = {row: _Left() for row in range(rows)}  # the longest free first
        self.computed = 0

    @property
    def free(self) -> int:
        """How many rows can be taken."""
        return len(self._free)

    @property
    def token_cost(self) -> float:
        """What a further token adds to the time of a step; see `Runner`."""
        return self._runner.token_cost

    def take(self, ids: list[int]) -> Slot:
        """A row for a text of at least one token: the free one that holds most of its beginning."""
        window = ids[window_start(len(ids), self._context) :]
        row = max(self._free, key=lambda row: _usable(window, self._free[row].tokens, self._free[row].large))
        left = self._free.pop(row)
        slot = Slot(row, ids, window_start(len(ids), self._context))
        slot.done, slot.large = _usable(window, left.tokens, left.large), len(window) // BLOCK * BLOCK
        self._taken.append(slot)
        return slot

    def fork(self, slot: Slot) -> Slot:
        """A further row with the text of `slot`: the free one that holds most of it, and only the rest is copied."""
        window = slot.window[: slot.done]

        def held(row: int) -> int:
            left = self._free[row]
            return _common(window, left.tokens) if left.large == slot.large else 0

        row = max(self._free, key=held)
        self._cache.copy_row(slot.row, row, slot.done, held(row))
        del self._free[row]
        other = Slot(row, list(slot.ids), slot.start, slot.done, slot.large)
        self._taken.append(other)
        return other

    def leave(self, slot: Slot) -> None:
        """Give a row back; what it holds may serve another text."""
        self._taken.remove(slot)
        self._free[slot.row] = _Left(slot.window[: slot.done], min(slot.large, slot.done))

    def step(self) -> tuple[list[Slot], Tensor | None]:
        """Run what is due; returns the slots all of whose tokens are through, and the logits after these.

        There is a row of logits for each slot, and for each of its guesses that were run one more, in their order:
        `(slots + guesses, vocab_size)`. They may be overwritten by the next step.
        """
        chunks: list[tuple[Slot, Chunk]] = []
        filled = 0
        for slot in self._taken:
            self._slide(slot)
            count = len(slot.ids) - slot.start - slot.done
            room = self._context - (len(slot.ids) - slot.start)
            slot.guesses = slot.guesses[:room] if count == 1 else []
            if count > 1:
                if filled >= FILLED_PER_STEP or self._waits(slot):
                    continue
                self._borrow(slot)
                count = len(slot.ids) - slot.start - slot.done
                count = BLOCK if slot.done < slot.large else min(count, FILLED_PER_STEP)
                filled += count
            assert count >= 1, "a row is left nothing to compute"
            begin = slot.start + slot.done
            tokens = slot.ids[begin : begin + count] + slot.guesses
            chunks.append((slot, Chunk(slot.row, slot.done, tokens, 1 + len(slot.guesses))))
        if not chunks:
            return [], None
        logits = self._runner.run([chunk for _, chunk in chunks])
        ready: list[Slot] = []
        rows: list[int] = []
        count = 0
        for slot, chunk in chunks:
            slot.done += len(chunk.tokens) - len(slot.guesses)
            self.computed += len(chunk.tokens)
            if slot.start + slot.done == len(slot.ids):
                ready.append(slot)
                rows += range(count, count + chunk.wanted)
            count += chunk.wanted
        return ready, logits if len(rows) == count else logits[rows]

    def _slide(self, slot: Slot) -> None:
        start = window_start(len(slot.ids), self._context)
        if start != slot.start:
            slot.start, slot.done, slot.large = start, 0, (len(slot.ids) - start) // BLOCK * BLOCK

    def _waits(self, slot: Slot) -> bool:
        """Whether an earlier text is being filled with much of what this one needs."""
        window = slot.window
        for other in self._taken:
            if other is slot:
                return False
            if len(other.ids) - other.start - other.done <= 1:
                continue
            shared = _usable(window, other.window, other.large)
            alike = shared >= WORTH_WAITING or window == other.window
            if alike and shared > max(other.done, slot.done):
                return True
        return False

    def _borrow(self, slot: Slot) -> None:
        """Copy what another row holds of the text's beginning, if that is more than its own."""
        window = slot.window
        held = [(other.row, other.window[: other.done], other.large) for other in self._taken if other is not slot]
        held += [(row, left.tokens, left.large) for row, left in self._free.items()]
        row, most = slot.row, slot.done
        for other, tokens, large in held:
            usable = _usable(window, tokens, large)
            if usable > most:
                row, most = other, usable
        if row != slot.row:
            self._cache.copy_row(row, slot.row, most)
            slot.done = most


def window_start(length: int, context: int) -> int:
    """Index of the first token of a text that the model sees: 0, and from the limit on jumping by half a context."""
    jump = max(1, context // 2)
    return max(0, -(-(length - context) // jump) * jump)


def _common(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens both begin with; comparing slices is much quicker than token by token."""
    low, high = 0, min(len(tokens), len(others))
    while low < high:
        middle = (low + high + 1) // 2
        if tokens[low:middle] == others[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _usable(window: Sequence[int], tokens: Sequence[int], large: int) -> int:
    """How many of the first tokens of `window` need not be computed, given those of another row; all but one at most.

    They must have been computed as they would be for this window alone: in blocks where it would be in blocks.
    """
    own = len(window) // BLOCK * BLOCK
    limit = min(len(window) - 1, len(tokens))
    if own != large:
        limit = min(limit, own, large)
    common = min(limit, _common(window, tokens))
    return common if common >= own else common // BLOCK * BLOCK
