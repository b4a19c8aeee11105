"""How fast near-duplicates are found, how many, and how that compares with datatrove's stages on the same documents.

    python -m benchmarks.near_duplicates --megabytes 100

The documents are pages of the standard library and of installed packages; of every twentieth one a copy is planted with
one of a hundred words changed. A round times, in processor seconds of one process: our stages 1 to 3 and reading what
is left; datatrove's stages 2 and 3 on our signatures; and, if it is installed, rensa's RMinHash on the hashes of our
n-grams. Reported are medians of the rounds.
"""

from __future__ import annotations

import random
import re
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from config.command import run

if TYPE_CHECKING:
    from config.deduplication import NearDeduplicationConfig
    from data.deduplication.selection import Selection

SUFFIXES = (".py", ".md", ".rst", ".txt", ".h", ".pyi", ".json")
WORD = re.compile(r"[^\W_]+")
PAGE = 4000  # characters
PLANTED = 20
KERNEL_MEGABYTES = 10
Rounds = Annotated[int, typer.Option(help="Timed rounds.", min=1)]
Megabytes = Annotated[float, typer.Option(help="Text to read.", min=1)]
Theirs = Annotated[bool, typer.Option(help="Time datatrove's stages as well.")]


def benchmark(rounds: Rounds = 3, megabytes: Megabytes = 100, theirs: Theirs = True) -> None:
    """Measure."""
    from config.load import load_config
    from data.deduplication.signatures import prepare

    settings = load_config([Path("web-data")]).data.preprocess
    near = settings.near_deduplication
    prepare(near)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planted, sample, documents, size = _write(folder, megabytes * 1e6)
        print(f"{documents:,} documents, {size / 1e6:.1f} MB, {len(planted):,} of them planted")
        rates: dict[str, list[float]] = {}
        for number in range(rounds):
            for what, rate in _round(folder / str(number), settings, planted, documents, size, sample, theirs):
                rates.setdefault(what, []).append(rate)
        for what, values in rates.items():
            print(f"{what:<45} {statistics.median(values):8.3f}   ({min(values):.3f} to {max(values):.3f})")


def _texts(size: float) -> Iterator[str]:
    """Pages of files of installed packages, until they make `size` bytes."""
    paths = sysconfig.get_paths()
    for root in (paths["stdlib"], paths["purelib"]):
        for file in sorted(Path(root).rglob("*")):
            if file.suffix not in SUFFIXES or not file.is_file():
                continue
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            for at in range(0, min(len(text), 50 * PAGE), PAGE):
                page = text[at : at + PAGE]
                if len(page) < PAGE // 8:
                    continue
                yield page
                size -= len(page.encode())
                if size < 0:
                    return


def _changed(text: str, seed: int) -> str | None:
    """The text with one of a hundred words changed, or None where it has fewer."""
    rng = random.Random(seed)
    words = list(WORD.finditer(text))
    if len(words) < 100:
        return None
    for word in sorted(rng.sample(words, len(words) // 100), key=lambda word: -word.start()):
        new = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=8))
        text = text[: word.start()] + new + text[word.end() :]
    return text


def _write(folder: Path, size: float) -> tuple[list[tuple[str, str]], list[str], int, int]:
    """Sorted runs of all documents; the pairs planted, documents for datatrove, and how many and how large they are."""
    import polars as pl

    from data.pipeline.batches import SCHEMA
    from data.pipeline.keys import add_keys
    from data.pipeline.runs import run_writer

    planted: list[tuple[str, str]] = []
    sample: list[str] = []
    batch: list[str] = []
    documents = written = 0

    def flush() -> None:
        ids = [f"{documents + row:032x}" for row in range(len(batch))]
        runs.add(add_keys(pl.DataFrame({"source": [0] * len(batch), "id": ids, "text": batch}, schema=SCHEMA), 0))

    with run_writer(folder / "00000.arrow", None) as runs:
        for number, text in enumerate(_texts(size)):
            copies = [text]
            if number % PLANTED == 0 and (copy := _changed(text, number)) is not None:
                copies.append(copy)
                planted.append((text, copy))
            batch += copies
            if sum(len(each) for each in sample) < KERNEL_MEGABYTES * 1e6:
                sample += copies
            if len(batch) >= 1000:
                flush()
                documents, written, batch = documents + len(batch), written + _bytes(batch), []
        flush()
    return planted, sample, documents + len(batch), written + _bytes(batch)


def _bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _round(
    folder: Path,
    settings: Any,
    planted: list[tuple[str, str]],
    documents: int,
    size: int,
    sample: list[str],
    theirs: bool,
) -> Iterator[tuple[str, float]]:
    """What one round measures, in MB per core-second or as a fraction."""
    from data.deduplication.near import BucketStage, ClusterStage, SignatureStage, bucket_cuts
    from data.deduplication.selection import Selection
    from data.deduplication.tables import gather_starts
    from data.pipeline.runs import Runs

    near = settings.near_deduplication
    selection = Selection(Runs(folder.parent, 1), settings)
    ranges, cuts = max(1, size >> 26), bucket_cuts(documents, near)
    signed, starts, pairs, removals = (folder / each for each in ("signatures", "starts", "pairs", "removals"))

    def all_ranges(chosen: Selection) -> list[int]:
        return [len(texts) for part in range(ranges) for texts in chosen.texts(part, ranges)]

    def work(stage: Any, parts: int) -> None:
        if stage.name == BucketStage.name:
            gather_starts(signed, ranges, starts)
        for part in range(parts):
            stage.work(part, parts)

    stages: list[tuple[Any, int]] = [
        (SignatureStage(selection, near, cuts, signed), ranges),
        (BucketStage(near, ranges, cuts, signed, starts, pairs), near.num_buckets * cuts),
        (ClusterStage(near.num_buckets, ranges, cuts, signed, pairs, removals), 1),
    ]
    seconds = [_time(partial(work, stage, parts)) for stage, parts in stages]
    final = replace(selection, near=removals)
    seconds.append(_time(lambda: all_ranges(final)))
    for name, taken in zip(("signatures", "buckets", "clusters", "filter"), seconds):
        yield f"ours: {name}, MB per core-second", size / 1e6 / taken
    yield "ours: all stages, MB per core-second", size / 1e6 / sum(seconds)
    yield "recall at 1 % of words changed", _recall(final, ranges, planted)
    if theirs:
        yield from _theirs(folder, near, size, seconds[0] + seconds[3])
    yield from _rensa(near, sample)


def _time(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _recall(selection: Selection, ranges: int, planted: list[tuple[str, str]]) -> float:
    """The share of planted pairs of which not both are left."""
    left = {text for part in range(ranges) for texts in selection.texts(part, ranges) for text in texts}
    return sum(not (one in left and other in left) for one, other in planted) / len(planted)


def _theirs(folder: Path, near: NearDeduplicationConfig, size: int, ours: float) -> Iterator[tuple[str, float]]:
    """datatrove's stages 2 and 3 on our signatures."""
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster

    config = MinhashConfig(near.n_grams, near.num_buckets, near.hashes_per_bucket)
    pairs, removals = str(folder / "their pairs"), str(folder / "their removals")
    buckets = MinhashDedupBuckets(str(folder / "signatures"), pairs, config=config, lines_to_buffer=1000)
    taken = [_time(lambda: [buckets.run(None, rank, near.num_buckets) for rank in range(near.num_buckets)])]
    taken.append(_time(lambda: MinhashDedupCluster(pairs, removals, config=config).run(None, 0, 1)))
    for name, seconds in zip(("buckets", "clusters"), taken):
        yield f"datatrove: {name}, MB per core-second", size / 1e6 / seconds
    yield "our signatures and filter, its stages between", size / 1e6 / (sum(taken) + ours)


def _rensa(near: NearDeduplicationConfig, sample: list[str]) -> Iterator[tuple[str, float]]:
    """RMinHash on the hashes of our n-grams, and our own kernel, which makes these hashes as well."""
    import numpy as np
    import polars as pl

    from data.deduplication.signatures import signatures
    from data.deduplication.words import folding, hash_grams, hash_words
    from data.texts import texts_of

    texts = texts_of(pl.Series(sample))
    size = _bytes(sample) / 1e6
    yield "our signatures alone, MB per core-second", size / _time(lambda: signatures(texts, near))
    try:
        from rensa import RMinHash
    except ImportError:
        return
    room = texts.longest
    words, starts, ends = np.empty(room, np.uint64), np.empty(room, np.int64), np.empty(room, np.int64)

    def hashes() -> tuple[Any, Any]:
        grams, bounds = [], [0]
        for begin, end in zip(texts.offsets, texts.offsets[1:]):
            count = hash_words(texts.data, begin, end, folding(True), words, starts, ends)
            grams.append(words[: hash_grams(words, count, near.n_grams)].copy())
            bounds.append(bounds[-1] + len(grams[-1]))
        return np.concatenate(grams), np.array(bounds, np.uint64)

    flat, bounds = hashes()
    count = near.num_buckets * near.hashes_per_bucket
    taken = _time(lambda: RMinHash.digest_matrix_from_flat_token_hashes(flat, bounds, count, 1))
    yield "rensa's on our n-grams, MB per core-second", size / taken


def main() -> None:
    """Run the benchmark."""
    run(benchmark)


if __name__ == "__main__":
    main()
