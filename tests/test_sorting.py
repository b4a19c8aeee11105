"""Sorting: the same order however it is cut, each range read once, nothing left of what was interrupted."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import UserError
from config.files import location
from data.deduplication.lines import LINE, by_hash
from data.deduplication.tables import GRID, SortedRows, gather_starts, read_starts, write_rows
from data.pipeline.keys import add_keys, drop_duplicates, in_order, key_range
from data.pipeline.run import preprocess
from data.pipeline.runs import BLOCK_BYTES, RUN_SCHEMA, RunReader, Runs, Scale, edges_path, run_writer
from data.pipeline.stages import MergeStage
from data.pipeline.work import parts_for
from tests.test_deduplication import checksums, data_config, make_corpus, prose
from tests.test_pipeline import frame

EVERYTHING = 2**64 - 1


def write(path: Path, documents: pl.DataFrame, run_bytes: int) -> list[pl.DataFrame]:
    """Write documents a few at a time; the duplicates that were dropped."""
    dropped: list[pl.DataFrame] = []
    with run_writer(path, dropped.append, run_bytes) as runs:
        for batch in documents.iter_slices(3):
            runs.add(batch)
    return dropped


class TestOrder:
    @given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 4), st.integers(1, 5), st.integers(1, 300))
    @settings(max_examples=30, deadline=None)
    def test_any_cut_gives_the_same(self, numbers: list[int], tasks: int, parts: int, run_bytes: int) -> None:
        """Whether later stages read the files of the tasks or those that they were merged to."""
        documents = add_keys(frame(*[f"text number {number}" for number in numbers]), 5)
        expected, expected_dropped = drop_duplicates(in_order(documents.select(list(RUN_SCHEMA))))
        with tempfile.TemporaryDirectory() as folder:
            direct = Runs(Path(folder), tasks)
            dropped = 0
            for task in range(tasks):
                share = documents.gather_every(tasks, task) if task < len(documents) else documents.clear()
                dropped += sum(map(len, write(direct.path(task), share, run_bytes)))
            merged = Runs(Path(folder) / "merged", parts, by_part=True)
            stage = MergeStage(direct, merged.folder, run_bytes)
            for part in range(parts):
                stage.work(part, parts)
            for runs in (direct, merged):
                ranges = []
                for part in range(parts):
                    with RunReader(runs.of(part)) as reader:
                        ranges += [drop_duplicates(reader.read(*key_range(2 * part + n, 2 * parts))) for n in (0, 1)]
                assert pl.concat([kept for kept, _ in ranges]).equals(expected)
                assert dropped + sum(len(more) for _, more in ranges) == len(expected_dropped)

    def test_a_task_drops_what_it_has_twice_though_in_different_runs(self, tmp_path: Path) -> None:
        """The one of the first source stays, as where all fits one run; every other is reported once."""
        texts = [f"text number {number}" for number in range(50)]
        copies = [frame(*texts, source=source) for source in (2, 0, 1)]
        documents = add_keys(pl.concat(copies), 5)
        for name, run_bytes in (("one", 10**6), ("many", 200)):
            dropped = pl.concat(write(tmp_path / f"{name}.arrow", documents, run_bytes))
            assert sorted(dropped["source"]) == [1] * 50 + [2] * 50
            with RunReader([tmp_path / f"{name}.arrow"]) as reader:
                assert reader.read(0, EVERYTHING)["source"].to_list() == [0] * 50

    def test_in_a_storage(self) -> None:
        path: Any = location("memory://runs/00000.arrow")
        documents = add_keys(frame(*[f"text number {number}" for number in range(200)]), 5)
        write(path, documents, 500)
        with RunReader([path]) as reader:
            assert reader.read(0, EVERYTHING).equals(in_order(documents.select(list(RUN_SCHEMA))))
        assert sorted(found.name for found in path.parent.iterdir()) == ["00000.arrow", "00000.npy"]


def bytes_read(path: Path, part: int, parts: int) -> tuple[int, int]:
    """What this process reads, in bytes, for a range of keys; and the documents that it finds."""
    with RunReader([path]) as reader:
        before = psutil.Process().io_counters().read_chars
        documents = len(reader.read(*key_range(part, parts)))
        return psutil.Process().io_counters().read_chars - before, documents


@pytest.fixture(scope="module")
def long_texts() -> pl.DataFrame:
    """20 MB in 2,000 documents that hardly compress."""
    rng = random.Random(1)
    return add_keys(frame(*[rng.randbytes(5000).hex() for _ in range(2000)]), 5)


class TestReading:
    def test_a_range_costs_its_share_however_many_runs_a_task_had(self, tmp_path: Path, long_texts: Any) -> None:
        """Of 20 runs, a sixteenth: 1.25 MB of text, and at each end a block of which it needs but a part."""
        size = {}
        for name, run_bytes in (("one", 10**9), ("many", 10**6)):
            path = tmp_path / f"{name}.arrow"
            write(path, long_texts, run_bytes)
            edges = np.load(edges_path(path))
            assert (edges[1:, 0] > edges[:-1, 1]).all(), "the blocks are those of one sorted file"
            bytes_read(path, 0, 16)  # what the first one loads of libraries
            read = [bytes_read(path, part, 16) for part in range(16)]
            assert sum(documents for _, documents in read) == 2000
            size[name] = sum(count for count, _ in read)
            file_bytes = path.stat().st_size
            assert size[name] < file_bytes + 16 * 1.1 * BLOCK_BYTES
        assert size["many"] < 1.05 * size["one"]

    def test_whatever_does_not_fit_has_no_second_pass_where_it_fits(self, tmp_path: Path, long_texts: Any) -> None:
        """A run that is full to the brim is still written but once."""
        process = psutil.Process()
        written = {}
        for name, run_bytes in (("one", 20_000_000), ("two", 15_000_000)):
            before = process.io_counters().write_chars
            write(tmp_path / f"{name}.arrow", long_texts, run_bytes)
            written[name] = process.io_counters().write_chars - before
        assert written["one"] < 1.1 * (tmp_path / "one.arrow").stat().st_size
        assert written["two"] > 1.9 * (tmp_path / "two.arrow").stat().st_size


def write_and_end(documents: Path, path: Path, calls: int, end: Callable[[], None]) -> int:
    """Write documents as a dozen runs and merge them; at call `calls` about duplicates, `end`. The number of calls."""
    seen: list[int] = []

    def on_duplicates(frame: pl.DataFrame) -> None:
        seen.append(len(frame))
        if len(seen) == calls:
            end()

    with run_writer(path, on_duplicates, 2000) as runs:
        for batch in pl.read_ipc(documents).iter_slices(20):
            runs.add(batch)
        sorted_before = len(seen)
    return sorted_before


def fill_disk() -> None:
    """What writing does there."""
    raise OSError(28, "full")


def end_process() -> None:
    """As `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("end", [fill_disk, end_process])
def test_an_interrupted_merge_leaves_nothing_and_ends_with_the_same_bytes(
    tmp_path: Path, end: Callable[[], None]
) -> None:
    """Interrupted when all but the last run waited to be merged, and some of the merged text was written."""
    documents = tmp_path / "documents"
    add_keys(frame(*[f"{number} " * 10 for number in range(400)]), 5).write_ipc(documents)
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
    path = tmp_path / "disturbed/00000.arrow"
    runs = write_and_end(documents, tmp_path / "undisturbed/00000.arrow", 0, end)
    assert runs > 5
    if end is fill_disk:
        with pytest.raises(UserError, match="No space left"):
            write_and_end(documents, path, runs + 5, end)
        assert not list(path.parent.iterdir())
    else:
        process = multiprocessing.get_context("spawn").Process(
            target=write_and_end, args=(documents, path, runs + 5, end)
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        (left,) = path.parent.iterdir()
        assert left.name.startswith(".00000.arrow.") and left.suffix == ".tmp", "what was to be renamed, but no run"
    assert write_and_end(documents, path, 0, end) == runs
    for name in ("00000.arrow", "00000.npy"):
        assert (path.parent / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


class TestRows:
    @given(st.lists(st.integers(0, 2**64 - 1), max_size=300), st.integers(1, 9), st.integers(1, 2000))
    @settings(max_examples=40, deadline=None)
    def test_any_memory_gives_the_same_file(self, hashes: list[int], cuts: int, most: int) -> None:
        rows = np.zeros(len(hashes), LINE)
        rows["hash"] = np.array(hashes, np.uint64) >> np.uint64(1) << np.uint64(1)
        rows["line"] = np.arange(len(rows))
        found = []
        with tempfile.TemporaryDirectory() as name:
            for limit in (10**9, most):
                table = SortedRows(Path(name) / "rows", LINE, by_hash, lambda rows: rows["hash"], 64, cuts, limit)
                for start in range(0, len(rows), 7):
                    table.add(rows[start : start + 7])
                starts = table.write()
                found.append((starts.tolist(), (Path(name) / "rows").read_bytes()))
            assert [path.name for path in Path(name).iterdir()] == ["rows"]
        assert found[0] == found[1]
        assert found[0][1] == rows[by_hash(rows)].tobytes()
        ends = [-(-(cut << 64) // cuts) for cut in range(cuts + 1)]
        assert found[0][0] == [sum(value < end for value in rows["hash"].tolist()) for end in ends]

    def test_one_grid_is_fine_enough_for_a_part_of_ten_gigabytes(self) -> None:
        assert GRID * (128 << 20) // 14 > 9e9

    def test_who_owns_a_range_finds_its_beginning_in_every_part(self, tmp_path: Path) -> None:
        for part, starts in enumerate(([0, 2, 5, 5], [0, 0, 1, 7])):
            write_rows(tmp_path / f"{part:05d}.starts", np.array(starts, np.int64))
        gather_starts(tmp_path, 2, tmp_path / "all")
        assert read_starts(tmp_path / "all", 2, 1, 2) == [(2, 5), (0, 1)]
        assert read_starts(tmp_path / "all", 2, 0, 3) == [(0, 5), (0, 7)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents with copies, near-copies and common lines, of two sources."""
    texts = [prose(number, 60) + f"\n{prose(number % 7, 12)}\n" + prose(-number - 1, 60) for number in range(150)]
    near = [text.replace(" ", "  ", 3) + " again" for text in texts[:20]]
    folder = tmp_path_factory.mktemp("sorting")
    return make_corpus(folder, {"one": [*texts[:90], *texts[:9]], "other": [*texts[80:], *near]})


class TestCorpus:
    ALL = (
        "data.preprocess.near_deduplication.enabled=true",
        "data.preprocess.line_deduplication.unit=lines",
        "data.preprocess.line_deduplication.min_occurrences=2",
        "data.preprocess.mixture.epochs={one: 1.5, other: 1}",
    )

    def test_the_same_files_however_it_is_sorted(self, corpus: Path) -> None:
        found = {}
        for name, tasks, scale in (
            ("one run each", 2, Scale()),
            ("many runs and ranges", 2, Scale(run_bytes=9000, range_bytes=9000, parts=3)),
            ("merged by part", 7, Scale(run_bytes=9000, range_bytes=9000, parts=3, direct_files=4)),
        ):
            data = data_config(corpus, ["one", "other"], *self.ALL, f"data.preprocess.tasks={tasks}")
            stages: list[str] = []
            manifest, _ = preprocess(data, force=True, show=lambda stage, *_: stages.append(stage), scale=scale)
            assert ("merge" in stages) == (name == "merged by part")
            rules = {rule for funnel in manifest.funnel.values() for rule in (*funnel.dropped, *funnel.lines)}
            assert {"exact-duplicate", "near-duplicate", "duplicate-line"} <= rules
            found[name] = checksums(corpus)
        first, *others = found.values()
        assert all(other == first for other in others)

    @pytest.mark.parametrize(
        ("size", "tasks", "expected"),
        [(10**6, 8, (8, 1)), (10**10, 8, (150, 1)), (10**12, 2000, (500, 30)), (10**12, 8, (256, 59))],
    )
    def test_few_parts_of_many_ranges(self, size: int, tasks: int, expected: tuple[int, int]) -> None:
        assert parts_for(size, tasks) == expected
