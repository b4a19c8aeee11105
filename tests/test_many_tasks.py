"""What only shows with many tasks or many files: shares, merging, order of what is counted."""

from __future__ import annotations

import gzip
import io
import json
import random
from itertools import chain
from pathlib import Path

from data.documents import _share
from data.formats import read_rows
from data.formats.jsonl import count_lines
from data.formats.rows import Fault
from data.funnel import Funnel, total
from data.manifest import RawFile
from data.pipeline.merging import merged_lines


def test_with_more_tasks_than_files_each_reads_one_file() -> None:
    """Of what can only be read from its beginning; together they read every block once."""
    raw = RawFile(path="a.jsonl.zst", bytes=1, sha256="", documents=1)
    for files, parts in ((3, 8), (1, 5), (4, 5), (7, 7)):
        seen: list[tuple[int, int]] = []
        for part in range(parts):
            shares = {index: _share(raw, index, files, part, parts, False) for index in range(files)}
            opened = {index: wanted for index, wanted in shares.items() if wanted is not None}
            assert len(opened) == 1
            seen += [(index, unit) for index, wanted in opened.items() for unit in range(50) if wanted(unit)]
        assert sorted(seen) == [(index, unit) for index in range(files) for unit in range(50)]


def test_more_files_are_merged_than_may_be_open(tmp_path: Path) -> None:
    generator = random.Random(0)
    contents = [sorted(generator.choices(range(1000), k=generator.randint(0, 9))) for _ in range(23)]
    parts = [tmp_path / str(number) for number in range(len(contents))]
    for part, numbers in zip(parts, contents):
        part.write_text("".join(f"{number}\n" for number in numbers))
    merged = [int(line) for line in merged_lines(parts, int, most_open=3)]
    assert merged == sorted(chain(*contents))


def test_the_account_does_not_tell_which_rule_was_met_first() -> None:
    funnels = []
    for rules in (("too-short", "too-long"), ("too-long", "too-short")):
        parts = [Funnel(bad={rule: 1}, lines={rule: 1}) for rule in rules]
        for part, rule in zip(parts, rules):
            part.drop(rule, 1, 10)
        funnels.append(total(parts).model_dump_json())
    assert funnels[0] == funnels[1]


def test_a_packed_file_that_ends_early_is_never_read_as_if_it_were_whole() -> None:
    lines = b"".join(
        json.dumps({"text": f"{number} {random.Random(number).random()}"}).encode() + b"\n" for number in range(20_000)
    )
    packed = gzip.compress(lines)
    cut = packed[: len(packed) // 2]
    count = count_lines(io.BytesIO(cut), "a.jsonl.gz", False)
    rows = list(read_rows(io.BytesIO(cut), "a.jsonl.gz", "text", limit=count))
    assert [row.reason for row in rows if isinstance(row, Fault)] == ["truncated"]
    assert len(rows) == count and 5000 < count < 15_000
    assert count_lines(io.BytesIO(packed), "a.jsonl.gz", False) == 20_000
