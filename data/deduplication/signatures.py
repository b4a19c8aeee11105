"""MinHash signatures (Broder, 1997): a few numbers per document that agree as often as their sets of n-grams overlap.

The set of a document are the hashes of its runs of n words; of a shorter document, its words as one run. Each of
`num_buckets * hashes_per_bucket` permutations, x -> a x + b modulo 2^64 with odd a over hashes that are already
uniform, contributes the smallest value of the set: two documents agree in it with the probability of their Jaccard
similarity s. So at least one of b buckets of r hashes agrees with probability 1 - (1 - s^r)^b.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from config.deduplication import NearDeduplicationConfig
from data.compiled import kernel
from data.deduplication.words import folding, hash_grams, hash_words, mix
from data.texts import Texts, texts_of

SEED = 1
HASH_BITS = {64: 61, 32: 32}  # datatrove's bucket stage takes 64-bit hashes to be less than 2^61 - 1


def signatures(texts: Texts, config: NearDeduplicationConfig) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Of each text the hashes, shape (texts, buckets, hashes), uint64 below 2^61 or uint32; and whether it has words.

    The values are uniform over their range, so that equal parts of it hold equal shares of the documents.
    """
    count = config.num_buckets * config.hashes_per_bucket
    a, b = np.random.default_rng(SEED).integers(0, (1 << 64) - 1, (2, count), np.uint64, endpoint=True)
    a |= np.uint64(1)
    table = folding(digits_alike=True)
    values, found = _sign(*texts, texts.longest, table, config.n_grams, a.view(np.int64), b.view(np.int64))
    values >>= np.uint64(64 - HASH_BITS[config.precision])
    shape = (-1, config.num_buckets, config.hashes_per_bucket)
    return values.astype(f"<u{config.precision // 8}", copy=False).reshape(shape), found


def prepare(config: NearDeduplicationConfig) -> None:
    """Compile the kernel, so that workers find it compiled."""
    signatures(texts_of(pl.Series("text", ["some words"])), config)


@kernel
def _sign(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    room: int,
    table: NDArray[np.uint32],
    n: int,
    a: NDArray[np.int64],
    b: NDArray[np.int64],
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    texts = len(offsets) - 1
    result = np.zeros((texts, len(a)), np.uint64)
    found = np.zeros(texts, np.bool_)
    words = np.empty(room, np.uint64)
    starts, ends = np.empty(room, np.int64), np.empty(room, np.int64)
    least = np.empty(len(a), np.int64)  # signed, for which more processors have a vector instruction
    for text in range(texts):
        count = hash_words(data, offsets[text], offsets[text + 1], table, words, starts, ends)
        grams = hash_grams(words, count, n)
        found[text] = grams > 0
        least[:] = np.int64(0x7FFFFFFFFFFFFFFF)
        for gram in range(grams):
            value = np.int64(words[gram])
            for place in range(len(a)):
                least[place] = min(least[place], a[place] * value + b[place])
        for place in range(len(a)):
            result[text, place] = mix(np.uint64(least[place]))
    return result, found
