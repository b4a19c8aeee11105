"""Learning the merges of byte-level BPE (Sennrich et al., 2016) from counted words.

The merges are, one for one, those of the trainer of Hugging Face's `tokenizers`: the most frequent pair first, among
equally frequent ones that with the lowest ids, until the vocabulary is full or no pair occurs twice. As there, a pair
whose token exists already (`ab` + `c` after `a` + `bc`) becomes that token; the vocabulary does not grow then.

A heap holds every pair with the words that it occurs in. A merge changes just these words and enters the pairs that it
makes; an entry whose count has changed meanwhile is put back with the right one when it comes up.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.compiled import kernel
from data.tokenization.words import Words

MIN_FREQUENCY = 2
BYTE_PAIRS = 1 << 16


class Symbols(NamedTuple):
    """The words after the merges so far: word `i` has the ids `ids[starts[i] : starts[i] + lengths[i]]`."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    counts: NDArray[np.int64]


class Pairs(NamedTuple):
    """All pairs met so far, numbered. A pair's key is its left id times 2^32, plus its right one."""

    slots: NDArray[np.int32]
    """Hash table of the numbers, -1 where empty; its size is a power of two, at least twice that of the others."""
    keys: NDArray[np.int64]
    counts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    """Words in which the current merge made the pair."""
    last: NDArray[np.int64]
    """The last of them, or -1."""


class Made(NamedTuple):
    """Pairs that the current merge made, each with a word that now has it."""

    pairs: NDArray[np.int32]
    words: NDArray[np.int32]


def learn_merges(
    words: Words, byte_ids: NDArray[np.int32], tokens: list[bytes], vocab_size: int
) -> list[tuple[bytes, bytes]]:
    """Merges in the order in which they are learnt; appends the new tokens to `tokens`, in the order of their ids.

    Args:
        words: the different words and how often each occurs.
        byte_ids: the id of each byte, (256,) int32.
        tokens: what the ids stand for that there are already.
        vocab_size: number of ids to stop at.
    """
    starts = np.concatenate([np.zeros(1, np.int64), words.ends[:-1]])
    symbols = Symbols(byte_ids[words.data], starts, words.ends - starts, words.counts)
    pairs, made = _room(len(symbols.ids))
    met, number = count_pairs(symbols, pairs, made)
    queue = _Queue()
    known = {token: index for index, token in enumerate(tokens)}
    merges = []
    queue.enter(pairs, made, number)
    while len(known) < vocab_size:
        following = queue.pop(pairs)
        if following is None:
            break
        key, occurrences = following
        left, right = key >> 32, key & 0xFFFFFFFF
        token = tokens[left] + tokens[right]
        merges.append((tokens[left], tokens[right]))
        index = known.setdefault(token, len(tokens))
        if index == len(tokens):
            tokens.append(token)
        # Every pair that is new has the new token on one side, and a word has no more pairs than ids.
        if met + 2 * len(tokens) > len(pairs.keys):
            pairs = _larger(pairs, met, 2 * len(tokens))
        if (most := int(symbols.lengths[occurrences].sum())) > len(made.pairs):
            made = Made(np.empty(2 * most, np.int32), np.empty(2 * most, np.int32))
        met, number = merge(symbols, occurrences, left, right, index, pairs, met, made)
        queue.enter(pairs, made, number)
    return merges


class _Queue:
    """Pairs with the words that they were made in, the next one to be merged first."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, int, NDArray[np.int32]]] = []
        self._rare: dict[int, list[tuple[NDArray[np.int32], int, int]]] = {}
        """Entries that nobody will ask for, as most are, unless their pair is made again."""
        self._entered = 0

    def enter(self, pairs: Pairs, made: Made, number: int) -> None:
        """Enter the first `number` of `made`, pair by pair, with the words of each."""
        different, bounds, words = by_pair(pairs, made, number)
        counts, keys = pairs.counts[different].tolist(), pairs.keys[different].tolist()
        ends, rare = bounds.tolist(), self._rare
        for pair, count, key, start, end in zip(different.tolist(), counts, keys, ends, ends[1:]):
            if count < MIN_FREQUENCY:
                if pair in rare:
                    rare[pair].append((words, start, end))
                else:
                    rare[pair] = [(words, start, end)]
                continue
            if pair in rare:
                for others, first, last in rare.pop(pair):
                    self._push(count, key, pair, others[first:last])
            self._push(count, key, pair, words[start:end])

    def pop(self, pairs: Pairs) -> tuple[int, NDArray[np.int32]] | None:
        """The key of the most frequent pair, with the words of its entry; None where no pair is frequent enough."""
        while self._heap:
            entered, key, _, pair, occurrences = heapq.heappop(self._heap)
            count = int(pairs.counts[pair])
            if -entered == count:
                return key, occurrences
            if count >= MIN_FREQUENCY:
                self._push(count, key, pair, occurrences)
            elif count > 0:
                self._rare.setdefault(pair, []).append((occurrences, 0, len(occurrences)))
        return None

    def _push(self, count: int, key: int, pair: int, occurrences: NDArray[np.int32]) -> None:
        self._entered += 1
        heapq.heappush(self._heap, (-count, key, self._entered, pair, occurrences))


def _room(made: int) -> tuple[Pairs, Made]:
    """No pairs, with room for all pairs of bytes, and for `made` entries."""
    slots = np.full(4 * BYTE_PAIRS, -1, np.int32)
    columns = [np.empty(BYTE_PAIRS, np.int64) for _ in range(4)]
    return Pairs(slots, *columns), Made(np.empty(made, np.int32), np.empty(made, np.int32))


def _larger(pairs: Pairs, met: int, more: int) -> Pairs:
    """The same pairs, with room for twice as many and `more`."""
    room = 1 << (2 * met + more).bit_length()
    columns = [np.empty(room, np.int64) for _ in range(4)]
    for column, values in zip(columns, pairs[1:]):
        column[:met] = values[:met]
    larger = Pairs(np.full(4 * room, -1, np.int32), *columns)
    fill_slots(larger, met)
    return larger


@kernel
def count_pairs(symbols: Symbols, pairs: Pairs, made: Made) -> tuple[int, int]:
    """Enter the pairs of all words as if they had just been made; how many pairs there are, and entries in `made`."""
    met = number = 0
    for word in range(len(symbols.counts)):
        start, count = symbols.starts[word], symbols.counts[word]
        for at in range(start, start + symbols.lengths[word] - 1):
            met, number = _change(symbols.ids[at], symbols.ids[at + 1], count, word, pairs, met, made, number)
    return met, number


@kernel
def merge(
    symbols: Symbols,
    occurrences: NDArray[np.int32],
    left: int,
    right: int,
    both: int,
    pairs: Pairs,
    met: int,
    made: Made,
) -> tuple[int, int]:
    """Put `both` for `left`, `right` in the words `occurrences`; how many pairs are met now, and entries in `made`."""
    number = 0
    ids = symbols.ids
    for word in occurrences:
        start, count = symbols.starts[word], symbols.counts[word]
        end = start + symbols.lengths[word]
        at = free = start
        while at < end:
            if ids[at] == left and at + 1 < end and ids[at + 1] == right:
                if free > start:
                    met, number = _change(ids[free - 1], left, -count, word, pairs, met, made, number)
                    met, number = _change(ids[free - 1], both, count, word, pairs, met, made, number)
                ids[free] = both
                at += 2
                if at < end:
                    met, number = _change(right, ids[at], -count, word, pairs, met, made, number)
                    met, number = _change(both, ids[at], count, word, pairs, met, made, number)
            else:
                ids[free] = ids[at]
                at += 1
            free += 1
        symbols.lengths[word] = free - start
    return met, number


@kernel
def _change(
    left: int, right: int, count: int, word: int, pairs: Pairs, met: int, made: Made, number: int
) -> tuple[int, int]:
    """Count a pair `count` times more in `word`, and note it in `made` if that is more and not less."""
    pair, met = _number(int(np.int64(left) << 32 | np.int64(right)), pairs, met)
    pairs.counts[pair] += count
    if count > 0 and pairs.last[pair] != word:
        made.pairs[number], made.words[number] = pair, word
        pairs.sizes[pair] += 1
        pairs.last[pair] = word
        number += 1
    return met, number


@kernel
def _number(key: int, pairs: Pairs, met: int) -> tuple[int, int]:
    """The number of a pair, a new one if it was not met before; and how many were met by now."""
    slot = _slot(key, pairs.slots, pairs.keys)
    if pairs.slots[slot] < 0:
        pairs.slots[slot] = met
        pairs.keys[met] = key
        pairs.counts[met] = pairs.sizes[met] = 0
        pairs.last[met] = -1
        met += 1
    return int(pairs.slots[slot]), met


@kernel
def _slot(key: int, slots: NDArray[np.int32], keys: NDArray[np.int64]) -> int:
    """Where `key` stands or is to stand; Fibonacci hashing, linear probing."""
    mask = len(slots) - 1
    slot = int((np.uint64(key) * np.uint64(11400714819323198485)) >> np.uint64(20)) & mask
    while slots[slot] >= 0 and keys[slots[slot]] != key:
        slot = (slot + 1) & mask
    return slot


@kernel
def fill_slots(pairs: Pairs, met: int) -> None:
    """Enter the first `met` pairs into an empty hash table."""
    for pair in range(met):
        pairs.slots[_slot(pairs.keys[pair], pairs.slots, pairs.keys)] = pair


@kernel
def by_pair(pairs: Pairs, made: Made, number: int) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]:
    """The different pairs of `made`, the bounds of each one's words, and these words; ready for the next merge."""
    different = np.empty(number, np.int32)
    bounds = np.zeros(number + 1, np.int64)
    found = 0
    for entry in range(number):
        pair = made.pairs[entry]
        if pairs.last[pair] >= 0:
            pairs.last[pair] = -1
            different[found] = pair
            bounds[found + 1] = bounds[found] + pairs.sizes[pair]
            pairs.sizes[pair] = bounds[found]
            found += 1
    words = np.empty(number, np.int32)
    for entry in range(number):
        pair = made.pairs[entry]
        words[pairs.sizes[pair]] = made.words[entry]
        pairs.sizes[pair] += 1
    for pair in different[:found]:
        pairs.sizes[pair] = 0
    return different[:found], bounds[: found + 1], words
