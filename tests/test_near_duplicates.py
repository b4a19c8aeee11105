"""Near-duplicates: signatures that follow the theory, datatrove's formats, and one survivor whatever the tasks."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from config.deduplication import NearDeduplicationConfig
from config.load import load_config
from data.deduplication.near import SIGNATURE_BYTES, BucketStage, ClusterStage, SignatureStage, pair_path
from data.deduplication.selection import Selection, removal_path
from data.deduplication.signatures import signatures
from data.deduplication.tables import borders, gather_starts, read_rows
from data.deduplication.words import folding, hash_words
from data.pipeline.executor import Workers, run_stage
from data.pipeline.keys import add_keys, in_order
from data.pipeline.runs import Runs, run_writer
from data.texts import texts_of
from tests.test_pipeline import frame

SETTINGS = load_config().data.preprocess
NEAR = SETTINGS.near_deduplication.model_copy(update={"enabled": True})
SHORT = NEAR.model_copy(update={"precision": 32})
SIMILARITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
PAIRS = 600  # of each similarity
GRAMS = 100


def sign(texts: list[str], config: NearDeduplicationConfig = NEAR) -> NDArray[Any]:
    """Signatures of texts that all have words, shape (texts, buckets, hashes)."""
    hashes, found = signatures(texts_of(pl.Series("text", texts)), config)
    assert found.all()
    return hashes


def alike(one: str, other: str, config: NearDeduplicationConfig = NEAR) -> int:
    """The number of buckets in which two texts agree."""
    hashes = sign([one, other], config)
    return int((hashes[0] == hashes[1]).all(axis=1).sum())


def jaccard(one: str, other: str, n: int = 5) -> float:
    """The true similarity of two texts of lower-case words."""
    sets = []
    for text in (one, other):
        words = text.split()
        sets.append({tuple(words[at : at + n]) for at in range(len(words) - n + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@lru_cache(maxsize=1)
def planted() -> list[tuple[float, str, str]]:
    """Pairs of texts with their similarity: the same beginning, then words of their own."""
    rng = random.Random(11)
    pairs = []
    for similarity in SIMILARITIES:
        shared = round(2 * GRAMS * similarity / (1 + similarity))  # of GRAMS n-grams in each of the two
        for _ in range(PAIRS):
            common = [f"{rng.getrandbits(40):x}" for _ in range(shared + 4)]
            one, other = (" ".join(common + [f"{rng.getrandbits(40):x}" for _ in range(GRAMS - shared)]) for _ in "ab")
            pairs.append((jaccard(one, other), one, other))
    return pairs


def agreements(config: NearDeduplicationConfig) -> Iterator[tuple[float, NDArray[np.bool_]]]:
    """For each similarity its exact value and in which buckets each pair agrees, shape (pairs, buckets)."""
    pairs = planted()
    one = sign([pair[1] for pair in pairs], config)
    other = sign([pair[2] for pair in pairs], config)
    agree = (one == other).all(axis=2)
    for start in range(0, len(pairs), PAIRS):
        exact = {similarity for similarity, _, _ in pairs[start : start + PAIRS]}
        assert max(exact) - min(exact) < 0.01  # hexadecimal words repeat by chance, if ever
        yield float(np.mean([pair[0] for pair in pairs[start : start + PAIRS]])), agree[start : start + PAIRS]


class TestTheory:
    """Against 1 - (1 - s^r)^b, with tolerances of four standard deviations of so many draws: one test in 16,000 fails.

    The draws are fixed, so a test that passes does so for ever.
    """

    @pytest.mark.parametrize(
        "config",
        [NEAR, SHORT, NEAR.model_copy(update={"num_buckets": 20, "hashes_per_bucket": 4})],
        ids=["64", "32", "20x4"],
    )
    def test_pairs_are_found_as_often_as_their_similarity_says(self, config: NearDeduplicationConfig) -> None:
        for similarity, agree in agreements(config):
            in_bucket = similarity**config.hashes_per_bucket
            expected = 1 - (1 - in_bucket) ** config.num_buckets
            found = agree.any(axis=1).mean()
            assert abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / PAIRS) + 1 / PAIRS, similarity
            per_bucket = agree.mean(axis=0)
            assert (abs(per_bucket - in_bucket) <= 4 * np.sqrt(in_bucket * (1 - in_bucket) / PAIRS)).all(), similarity

    def test_buckets_are_independent(self) -> None:
        """The number of buckets that agree scatters as if they were drawn, and no two go together."""
        for similarity, agree in agreements(NEAR):
            rate = similarity**NEAR.hashes_per_bucket
            if not 0.05 < rate < 0.95:
                continue  # too few draws on one side
            spread = agree.sum(axis=1).var() / (NEAR.num_buckets * rate * (1 - rate))
            assert abs(spread - 1) < 4 * np.sqrt(2 / PAIRS), similarity
            together = np.atleast_2d(np.corrcoef(agree.T))[np.triu_indices(NEAR.num_buckets, 1)]
            assert np.abs(together).max() < 5 / np.sqrt(PAIRS), similarity

    def test_unrelated_texts_never_agree(self) -> None:
        hashes = sign([pair[1] for pair in planted()])
        for bucket in range(NEAR.num_buckets):
            assert len(np.unique(hashes[:, bucket], axis=0)) == len(hashes)

    def test_single_hashes_estimate_the_similarity(self) -> None:
        pairs = planted()
        same = (sign([pair[1] for pair in pairs]) == sign([pair[2] for pair in pairs])).mean(axis=(1, 2))
        truth = np.array([pair[0] for pair in pairs])
        hashes = NEAR.num_buckets * NEAR.hashes_per_bucket
        deviation = (same - truth) / np.sqrt(truth * (1 - truth) / hashes)
        assert abs(deviation.mean()) < 4 / np.sqrt(len(pairs))
        assert 0.9 < deviation.std() < 1.1

    def test_hashes_are_spread_evenly(self) -> None:
        """Or equal ranges of them would not bound the memory."""
        first = sign([pair[1] for pair in planted()])[:, :, 0].ravel()
        for cuts in (4, 10):
            sizes = np.diff(borders(np.sort(first), 61, cuts))
            assert sizes.sum() == len(first)
            assert abs(sizes / sizes.mean() - 1).max() < 0.05


class TestWords:
    def words(self, text: str, digits_alike: bool = True) -> list[str]:
        data = np.frombuffer(text.encode(), np.uint8)
        hashes, starts, ends = np.empty(len(data), np.uint64), np.empty(len(data), np.int64), np.empty(len(data), int)
        count = hash_words(data, 0, len(data), folding(digits_alike), hashes, starts, ends)
        assert len(set(hashes[:count].tolist())) == count
        return [text.encode()[start:end].decode() for start, end in zip(starts[:count], ends[:count])]

    def test_of_several_scripts(self) -> None:
        assert self.words("The Cafe\u0301, don't: go_there 12!") == [
            "The",
            "Cafe\u0301",
            "don",
            "t",
            "go",
            "there",
            "12",
        ]
        assert self.words("我们abc在。 ไทย 한국어 हिन्दी") == [*"我们", "abc", "在", *"ไทย", "한국어", "हिन्दी"]
        assert self.words("... --- \n") == self.words("") == []

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("The Straße, Café ÉCOLE", "the straße cafe\u0301 - école"),
            ("on 2024-01-31 at 12:59", "On 1999-12-24 at 00:30!"),
            ("ΛΌΓΟΣ Привет", "λόγοσ привет"),
            ("１２ ａｂ", "34 AB"),
        ],
    )
    def test_what_is_the_same(self, one: str, other: str) -> None:
        assert alike(one, other) == NEAR.num_buckets

    def test_digits_can_tell_apart(self) -> None:
        table = folding(digits_alike=False)
        assert table[ord("1")] != table[ord("2")] and table[ord("１")] == table[ord("1")]


class TestShortTexts:
    def test_fewer_words_than_a_gram_must_be_equal(self) -> None:
        assert alike("Good morning", "good, morning!") == NEAR.num_buckets
        assert alike("good morning", "good evening") == 0
        assert alike("good morning", "good morning to you") == 0
        assert alike("a b c d e", "a b c d e f") < NEAR.num_buckets

    def test_no_word_no_signature(self) -> None:
        _, found = signatures(texts_of(pl.Series("text", ["...", "", "word", "\n"])), NEAR)
        assert found.tolist() == [False, False, True, False]

    def test_chinese_is_compared_by_characters(self) -> None:
        rng = random.Random(5)
        text = "".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(600))
        changed = text[:300] + "的" + text[301:]
        assert alike(text, changed) >= 9  # similarity 591 / 601
        assert alike(text, text[::-1]) == 0


def documents() -> pl.DataFrame:
    """Families of near-copies among texts of their own, short and wordless ones too."""
    rng = random.Random(2)
    words = [f"word{number}" for number in range(3000)]
    spell = [chr(97 + number // 26) + chr(97 + number % 26) for number in range(676)]
    texts = ["... !!!", "--- ???", "hello there", "Hello, there."]
    for family in range(60):
        text = [rng.choice(spell) + rng.choice(words)[:4] + rng.choice(spell) for _ in range(150)]
        for copy in range(family % 4 + 1):
            changed = list(text)
            for place in rng.sample(range(150), copy):
                changed[place] = rng.choice(spell) * 3
            texts.append(" ".join(changed))
    return add_keys(frame(*texts), 3)


def write_runs(folder: Path, keyed: pl.DataFrame, tasks: int, ranges: int = 1) -> Selection:
    """The corpus as the first stage leaves it."""
    runs = Runs(folder, tasks)
    for task in range(tasks):
        with run_writer(runs.path(task), None) as writer:
            writer.add(keyed.gather_every(tasks, task))
    return Selection(runs, SETTINGS, ranges)


def texts_left(selection: Selection, parts: int) -> list[str]:
    """The texts of a selection, in order."""
    return [text for part in range(parts) for texts in selection.texts(part, parts) for text in texts]


def find(
    folder: Path,
    config: NearDeduplicationConfig,
    tasks: int,
    parts: int,
    cuts: int,
    ranges: int = 1,
    most: int = SIGNATURE_BYTES,
) -> list[str]:
    """The texts that are left, in order; all files of the stages stay in `folder`."""
    selection = write_runs(folder, documents(), tasks, ranges)
    signed, starts, pairs, removals = (folder / name for name in ("signatures", "starts", "pairs", "removals"))
    with Workers(1) as workers:
        run_stage(SignatureStage(selection, config, cuts, signed, most), parts, workers, folder / "log/0")
        gather_starts(signed, parts, starts)
        buckets = BucketStage(config, parts, cuts, signed, starts, pairs)
        run_stage(buckets, config.num_buckets * cuts, workers, folder / "log/1")
        last = ClusterStage(config.num_buckets, parts, cuts, signed, pairs, removals)
        run_stage(last, 1, workers, folder / "log/2")
    return texts_left(replace(selection, near=removals), parts)


class TestStages:
    def test_the_first_of_each_cluster_in_corpus_order_is_left(self, tmp_path: Path) -> None:
        """Compared with all pairs, by their signatures, in one go."""
        texts = in_order(documents())["text"].to_list()
        hashes, found = signatures(texts_of(pl.Series("text", texts)), NEAR)
        roots = list(range(len(texts)))
        for one, other in combinations(np.flatnonzero(found).tolist(), 2):
            if (hashes[one] == hashes[other]).all(axis=1).any():
                least, most = sorted((roots[one], roots[other]))
                roots = [least if root == most else root for root in roots]
        expected = [text for place, text in enumerate(texts) if roots[place] == place]
        assert 60 + 3 <= len(expected) < 75  # one of each family, and what is no near-copy
        assert find(tmp_path, NEAR, 1, 1, 1) == expected

    @pytest.mark.parametrize("config", [NEAR, SHORT], ids=["64", "32"])
    def test_any_cut_gives_the_same(self, tmp_path: Path, config: NearDeduplicationConfig) -> None:
        whole = find(tmp_path / "whole", config, 1, 1, 1)
        assert find(tmp_path / "cut", config, 3, 7, 5) == whole
        assert find(tmp_path / "ranges", config, 2, 2, 5, ranges=4) == whole

    def test_signatures_that_exceed_memory_are_the_same(self, tmp_path: Path) -> None:
        """In all 130 kB of them, of which 20 are held."""
        whole = find(tmp_path / "whole", NEAR, 1, 2, 3, ranges=9)
        assert find(tmp_path / "little", NEAR, 1, 2, 3, ranges=9, most=20_000) == whole
        files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole/signatures").rglob("*.*")]
        assert len(files) == 2 * (14 + 2)
        for file in files:
            assert (tmp_path / "little" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()

    @pytest.mark.parametrize("config", [NEAR, SHORT], ids=["64", "32"])
    def test_datatrove_reads_the_signatures_and_finds_the_same(
        self, tmp_path: Path, config: NearDeduplicationConfig
    ) -> None:
        """Its own stages 2 to 4 on our files: the same pairs, the same clusters, as many documents left."""
        from datatrove.data import Document
        from datatrove.pipeline.dedup.minhash import (
            HashConfig,
            MinhashConfig,
            MinhashDedupBuckets,
            MinhashDedupCluster,
            MinhashDedupFilter,
        )

        parts = 4
        ours = find(tmp_path, config, 2, parts, 1, ranges=2)
        theirs = MinhashConfig(5, 14, 8, hash_config=HashConfig(precision=config.precision))
        pairs, removals = str(tmp_path / "their pairs"), str(tmp_path / "their removals")
        for bucket in range(14):
            MinhashDedupBuckets(str(tmp_path / "signatures"), pairs, config=theirs).run(None, bucket, 14)
            files = [pair_path(tmp_path / "pairs", bucket, 0), Path(pairs) / f"{bucket:05d}_00.dups"]
            assert files[0].read_bytes() == files[1].read_bytes()
        assert sum(path.stat().st_size for path in Path(pairs).iterdir()) > 16 * 60
        MinhashDedupCluster(pairs, removals, config=theirs).run(None, 0, 1)
        counts, kept = [], []
        selection = write_runs(tmp_path, documents(), 2, ranges=2)
        for part in range(parts):
            texts = chain.from_iterable(selection.texts(part, parts))
            counts.append(removal_count(Path(removals) / f"{part:06d}.remove"))
            pipeline = iter(Document(text=text, id=str(row)) for row, text in enumerate(texts))
            filtered = MinhashDedupFilter(str(tmp_path / "removals")).run(pipeline, part, parts)
            kept += [document.text for document in filtered]
        assert kept == ours
        assert sum(counts) == sum(len(read_rows(removal_path(tmp_path / "removals", n), DOCUMENT)) for n in range(4))


DOCUMENT = np.dtype("<u4")


def removal_count(path: Path) -> int:
    """Documents in one of datatrove's lists, none where there is no list."""
    content = path.read_bytes() if path.exists() else b""
    return len(struct.unpack(f"<{len(content) // 4}I", content))
