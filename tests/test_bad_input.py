"""Bad input through the real commands: the road ends, nothing good is lost, all that is bad is counted and kept."""

from __future__ import annotations

import bz2
import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data.tokens import load_tokens_manifest
from tests.archives import Archive, page, words
from tests.test_preprocess import texts_of

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "data.sources.web={kind: files, paths: [raw]}",
    "data.use=[web]",
    "data.tokenizer.vocab_size=400",
    "data.tokenizer.max_training_bytes=300000",
    "data.preprocess.workers=2",
    "data.preprocess.tasks=4",
    "data.preprocess.validation_fraction=0.02",
]
LONG_LINE = b'{"text": "' + b"x" * 50_000_000 + b'"}'
POISON = {
    "empty": [b'{"text": ""}', b'{"text": " \\n\\t "}'],
    "binary": [json.dumps({"text": "\0" * 200}).encode(), json.dumps({"text": "\ufffd\x01\x02" * 50}).encode()],
    "lone-surrogate": [b'{"text": "half of a pair: \\ud800 and nothing"}'],
    "invalid-utf8": [b'{"text": "\xff\xfe\x80\x81"}', bytes(range(1, 9)) + b"\x89PNG"],
    "not-json": [b'{"text": "cut', b"Segmentation fault"],
}


def command(name: str, *settings: str) -> subprocess.CompletedProcess[str]:
    """Type a command of the project in the current folder."""
    line = [sys.executable, str(ROOT / "data" / f"{name}.py"), *SETTINGS, *settings]
    return subprocess.run(line, text=True, capture_output=True, timeout=900)


def poisoned(count: int) -> tuple[bytes, list[str], Counter[str]]:
    """JSON lines of `count` documents of which 1 % are bad: the file, the good texts, and the bad ones by reason."""
    source = random.Random(0)
    bad = source.sample(range(count), count // 100)
    reasons = [reason for reason in POISON for _ in POISON[reason]]
    lines, texts, counts = [], [], Counter[str]()
    for number in range(count):
        if number not in bad:
            texts.append(f"Note {number}. {words(number)}")
            lines.append(json.dumps({"text": texts[-1] + "\0" * (number % 1000 == 0)}).encode())  # a NUL is mended
            continue
        place = bad.index(number)
        if place < 2:
            lines.append(LONG_LINE)
            counts["line-too-long"] += 1
            continue
        reason = reasons[place % len(reasons)]
        lines.append(POISON[reason][place % len(POISON[reason])])
        counts[reason] += 1
    return b"\n".join(lines), texts, counts


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Counter[str]]:
    """A folder of files, each of which is bad in its own way; the good texts in it, and the faults by reason."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "raw"
    folder.mkdir()
    content, texts, counts = poisoned(10_000)
    (folder / "notes.jsonl.zst").write_bytes(zstandard.compress(content))

    random_texts = [f"Cut {number}. {random.Random(number).randbytes(60).hex()}" for number in range(2000)]
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in random_texts)
    for name, packed in (("cut.jsonl.zst", zstandard.compress(lines)), ("cut.jsonl.bz2", bz2.compress(lines, 1))):
        (folder / name).write_bytes(packed[: len(packed) * 3 // 4])
    counts["truncated"] += 2

    archive = Archive()
    for number in range(20):
        archive.response(f"http://example.org/{number}", page(words(20_000 + number)).encode())
    damaged = bytearray(archive.content)
    begin = archive.offsets[2 + 3 * 9]
    damaged[begin + 40 : begin + 60] = bytes(20)
    (folder / "pages.warc.gz").write_bytes(damaged)
    texts += [f"The mill\n\n{words(20_000 + number)}" for number in range(20) if number != 9]
    counts["broken-record"] += 1

    table = io.BytesIO()
    pq.write_table(pa.table({"body": ["no text"] * 30, "id": list(range(30))}), table)
    (folder / "other.parquet").write_bytes(table.getvalue())
    counts["missing-text"] += 30
    (folder / "shard.jsonl.gz").write_bytes(b"<!DOCTYPE html>\n<html><body>\n<h1>503</h1>\n</body></html>\n" * 9)
    counts["html-page"] += 1
    return texts, counts


@pytest.mark.slow
def test_the_whole_road_over_bad_input(raw: tuple[list[str], Counter[str]]) -> None:
    texts, counts = raw
    downloaded = command("download_datasets")
    assert downloaded.returncode == 0, downloaded.stderr
    manifest = json.loads(Path("corpus/raw/web/manifest.json").read_text())
    assert manifest["quarantined"] == counts
    for name in ("tokenizer", "preprocess"):
        done = command(name)
        assert done.returncode == 0, done.stderr

    funnel = load_tokens_manifest(Path("corpus/tokens")).funnel["web"]
    assert funnel.bad == counts
    kept = {text for split in ("train", "val") for text in texts_of(Path("."), split)}
    assert set(texts) <= kept
    others = [text for text in kept if text not in set(texts)]
    assert all(text.startswith("Cut ") for text in others) and len(others) > 1000
    entries = [json.loads(line) for line in Path("corpus/tokens/quarantine.jsonl").read_text().splitlines()]
    kept_aside: Counter[str] = Counter()
    for entry in entries:
        assert entry["source"] == "web" and entry["location"]
        kept_aside[entry["reason"]] += entry["count"]
    assert kept_aside == counts
    assert os.path.getsize("corpus/tokens/quarantine.jsonl") < 200_000  # beginnings of records, not 50 MB lines


def test_too_much_of_it_stops_the_road_and_says_so(raw: tuple[list[str], Counter[str]]) -> None:
    refused = command("download_datasets", "data.preprocess.max_bad_fraction=0.005")
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1
    bad = sum(count for reason, count in raw[1].items() if reason != "empty")
    assert f"{bad} of " in refused.stderr and "max_bad_fraction=0.005" in refused.stderr
    assert "missing-text 30" in refused.stderr and "html-page 1" in refused.stderr
    assert not Path("corpus/raw/web").exists()
