"""What a large run would take: measured on a small one, and multiplied."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from config.load import load_config
from data.funnel import total
from data.pipeline.calibration import Measured, calibrate
from data.pipeline.traffic import Corpus, reads
from data.tokens import load_tokens_manifest
from scripts.plan import MOST_FILES, intermediate_reads, rows, sensible_size, tasks_for
from tests.commands import here
from tests.test_preprocess import SETTINGS, command, run, sentences, write_corpus

MEASURED = Measured(
    100_000_000,
    10e6,
    raw=0.25,
    intermediate=1.0,
    runs=0.4,
    documents=1 / 3300,
    tokens=0.5,
    worker_memory=500_000_000,
)
PLAIN = load_config().data.preprocess
ALL = PLAIN.model_copy(
    update={
        "near_deduplication": PLAIN.near_deduplication.model_copy(update={"enabled": True}),
        "line_deduplication": PLAIN.line_deduplication.model_copy(update={"unit": "lines"}),
    }
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, a tokenizer and token files."""
    folder = tmp_path_factory.mktemp("prepared")
    write_corpus(folder, [*sentences(200), "short"])
    here(folder, "data/tokenizer.py", *SETTINGS)
    run(folder)
    return folder


def test_a_terabyte_at_ten_megabytes_a_second() -> None:
    lines = dict(rows(MEASURED, 10**12, 100, PLAIN))
    assert lines["core-hours"] == "28"
    assert lines["hours on 100 cores"] == "0.28"
    assert lines["memory of 100 workers"] == "50.0 GB"
    assert lines["raw data"] == "250.0 GB"
    assert lines["intermediate files"] == "1.0 TB"
    assert lines["token files"] == "500.0 GB"
    assert lines["disk in all"] == "1.8 TB"
    assert lines["data.preprocess.tasks"] == "400"


def test_tasks_take_ten_minutes_and_are_enough_for_all_cores() -> None:
    assert tasks_for(10**14, 100, 10e6) == 16_667
    assert tasks_for(10**9, 100, 10e6) == 400


class TestIntermediateReads:
    def test_grow_as_the_corpus_does(self) -> None:
        """Whatever is deduplicated, each byte is read a few times: ten times as much text, not much more each."""
        for settings in (PLAIN, ALL):
            small, large = (intermediate_reads(MEASURED, size, 100, settings)[0] / size for size in (10**12, 10**13))
            assert large < 1.5 * small
        assert 1.6 < intermediate_reads(MEASURED, 10**12, 512, PLAIN)[0] / 10**12 < 3

    def test_a_terabyte_opens_files_some_million_times(self) -> None:
        plain, everything = (intermediate_reads(MEASURED, 10**12, 512, settings)[1] for settings in (PLAIN, ALL))
        assert 10**6 < plain < everything < 2 * 10**7

    def test_a_small_corpus_is_read_once_for_the_tokens_and_the_tokens_once(self) -> None:
        corpus = Corpus(bytes=10**8, documents=30_000, stored=0.4, tokens=5 * 10**7, tasks=8)
        found = reads(corpus, PLAIN)
        assert set(found) == {"clean", "tokenize", "write"} and found["clean"].bytes == 0
        assert found["tokenize"].bytes == pytest.approx(4e7, rel=0.15)

    def test_where_one_run_is_too_many_files_it_says_how_much_is_not(self) -> None:
        assert sensible_size(MEASURED, 10**12, 512, ALL) == 10**12
        part = sensible_size(MEASURED, 10**14, 512, ALL)
        assert 10**12 < part < 10**14 and 10**14 % part < 100
        assert intermediate_reads(MEASURED, part, 512, ALL)[1] <= MOST_FILES


@pytest.mark.slow
def test_calibration_measures_what_the_real_run_makes(prepared: Path) -> None:
    config = load_config([], [*SETTINGS, f"data.corpus_dir={prepared / 'corpus'}"])
    before = sorted(prepared.rglob("*"))
    measured = calibrate(config.data, 10**9)
    manifest = load_tokens_manifest(prepared / "corpus/tokens")
    assert measured.sample_bytes == total(manifest.funnel.values()).read.bytes
    tokens = sum(2 * manifest.tokens(split) + 8 * manifest.documents(split) for split in manifest.splits)
    assert measured.tokens * measured.sample_bytes == pytest.approx(tokens)
    assert 0.05 < measured.raw < 1
    assert measured.intermediate > measured.tokens, "the tokens lie there a second time, beside the text"
    assert measured.bytes_per_second > 1000
    assert measured.worker_memory > 50e6
    assert 0.02 < measured.runs < measured.intermediate
    assert measured.documents * measured.sample_bytes == pytest.approx(201)
    assert sorted(prepared.rglob("*")) == before


@pytest.mark.slow
def test_the_command(prepared: Path) -> None:
    sizes = ("--size", "2TB", "--size", "36GB", "--sample", "100KB")
    done = command(prepared, "scripts/plan.py", "data", *SETTINGS, *sizes, "--speed", "10", "--cores", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Given: 10.0 MB per core-second.")
    (hours,) = [line for line in lines if "core-hours" in line]
    assert [word for word in hours.split() if word.isdigit()] == ["56", "1"]
    assert lines[-1].startswith("Next: python data/preprocess.py") and "data.preprocess.tasks=3" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "much"], "--size: 'much' is no size"),
        (["--sample", "0MB"], "--sample: it must be more than 0"),
        (["data.use=[note]"], "there is no source 'note'"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = here(tmp_path, "scripts/plan.py", "data", *arguments, status=1)
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_nothing_downloaded(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "corpus/tokenizer", tmp_path / "corpus/tokenizer")
    done = here(tmp_path, "scripts/plan.py", "data", *SETTINGS, status=1)
    assert "python data/download_datasets.py notes" in done.stderr
