"""Preprocessing through its command: the same bytes however it ran, every document accounted for, bad input."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from config.errors import UserError
from config.load import load_config
from data.funnel import total
from data.pipeline.run import preprocess as run_pipeline
from data.tokenization import load_tokenizer
from data.tokens import Split, TokenFiles, TokensManifest, load_tokens_manifest
from tests.commands import here

ROOT = Path(__file__).parent.parent
MARKER = "<|endoftext|>"


def command(folder: Path, name: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command of the project in `folder` to its end."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *arguments],
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=900,
        **options,
    )


def run(folder: Path, *settings: str, **options: Any) -> str:
    """Run the command, which must succeed; its standard output."""
    done = command(folder, "data/preprocess.py", *SETTINGS, *settings, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_refused(folder: Path, *settings: str, **options: Any) -> str:
    """Run the command, with `options` in a process of its own, which must end with one message; the message."""
    words = ("data/preprocess.py", *SETTINGS, *settings)
    done = command(folder, *words, **options) if options else here(folder, *words, status=1)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def preprocess(folder: Path, *settings: str, force: bool = False) -> TokensManifest:
    """What the command does, in this process, with one worker."""
    config = load_config([], [*SETTINGS, f"data.corpus_dir={folder / 'corpus'}", *settings])
    manifest, _ = run_pipeline(config.data, force=force, show=lambda stage, done, documents: None)
    return manifest


def refused(folder: Path, *settings: str) -> str:
    """The message with which preprocessing refuses."""
    with pytest.raises(UserError) as error:
        preprocess(folder, *settings)
    return str(error.value)


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the token folder."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "corpus/tokens").iterdir())
    }


def texts_of(folder: Path, split: Split) -> list[str]:
    """The documents of a split, decoded, without their end-of-text."""
    files = TokenFiles(folder / "corpus/tokens", split)
    tokenizer = load_tokenizer(folder / "corpus/tokenizer")
    ends = [0, *files.document_ends.tolist()]
    documents = [files.read(first, last - first) for first, last in zip(ends, ends[1:])]
    assert all(document[-1] == tokenizer.end_of_text_id for document in documents)
    return [tokenizer.decode(document[:-1].tolist()) for document in documents]


def write_corpus(folder: Path, texts: list[str], bad_lines: list[str] | None = None) -> None:
    """Make the source `notes` of `folder` from these texts, and download it."""
    lines = [json.dumps({"text": text}) for text in texts]
    for number, line in enumerate(bad_lines or []):
        lines.insert(number * 7, line)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "notes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    here(folder, "data/download_datasets.py", "notes", *SETTINGS)


SETTINGS = (
    "data.sources.notes={kind: files, paths: [notes.jsonl]}",
    "data.use=[notes]",
    "data.tokenizer.vocab_size=400",
    "data.preprocess.workers=1",
    "data.preprocess.tasks=3",
    "data.preprocess.validation_fraction=0.02",
)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Different texts of some 60 to 2,000 characters."""
    rng = random.Random(seed)
    words = ["river", "stone", "mill", "grain", "wheel", "turns", "slowly", "over", "the", "cold", "naïve", "δοκός"]
    return [f"Note {number}. " + " ".join(rng.choices(words, k=rng.randint(10, 300))) + "." for number in range(count)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source and a tokenizer, and what tests need to see in them."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = sentences(400)
    texts += [texts[3], texts[3].replace(" ", "  "), texts[10]]  # duplicates, one in other spacing
    texts += ["short", "\x9f \n" * 20]
    texts += [f"A text about the marker {MARKER} which is{MARKER}only text. " * 3]
    texts += ["Cafe\u0301 a\u0300 la carte,\r\nwith a bell\x07 and\x00 a NUL, twice.\r" * 2]
    write_corpus(folder, texts, bad_lines=['{"text": "cut', "[1, 2]", '{"other": 1}'])
    here(folder, "data/tokenizer.py", *SETTINGS)
    return folder


@pytest.fixture(scope="module")
def finished(prepared: Path) -> Path:
    """The same with token files made by the command in one process."""
    here(prepared, "data/preprocess.py", *SETTINGS)
    return prepared


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A copy of `prepared` without token files."""
    for name in ("raw", "tokenizer"):
        shutil.copytree(prepared / "corpus" / name, tmp_path / "corpus" / name)
    return tmp_path


@pytest.fixture
def complete(finished: Path, copy: Path) -> Path:
    """A copy of `finished`, token files included."""
    shutil.copytree(finished / "corpus/tokens", copy / "corpus/tokens")
    return copy


class TestSameBytes:
    """Promise 1: same inputs, configuration and seed give byte-identical corpus/tokens."""

    @pytest.mark.slow
    def test_for_several_workers(self, finished: Path, copy: Path) -> None:
        run(copy, "data.preprocess.workers=3", "data.preprocess.tasks=4")
        assert checksums(copy) == checksums(finished)

    @pytest.mark.parametrize(
        "settings", [("data.preprocess.tasks=1",), ("data.preprocess.tasks=5", "data.preprocess.batch_documents=7")]
    )
    def test_for_any_tasks_and_batches(self, finished: Path, copy: Path, settings: tuple[str, ...]) -> None:
        preprocess(copy, *settings)
        assert checksums(copy) == checksums(finished)

    @pytest.mark.slow
    def test_after_kill_9_finished_tasks_are_not_done_again(self, finished: Path, copy: Path) -> None:
        """The command alone is killed, again and again; its workers end by themselves."""
        partial = copy / "corpus/.tokens.partial"
        assert kill_when(copy, 10)
        done = {path: path.stat().st_mtime_ns for path in partial.glob("*/runs/*.arrow")}
        assert len(done) == 8
        assert kill_when(copy, 12)
        assert {path: path.stat().st_mtime_ns for path in partial.glob("*/runs/*.arrow")} == done
        preprocess(copy, "data.preprocess.tasks=8")
        assert checksums(copy) == checksums(finished)
        assert not partial.exists()

    @pytest.mark.slow
    def test_work_for_other_settings_is_thrown_away(self, finished: Path, copy: Path) -> None:
        assert kill_when(copy, 3)
        (unfinished,) = (copy / "corpus/.tokens.partial").iterdir()
        preprocess(copy, "data.seed=7")
        assert not unfinished.exists()
        assert checksums(copy)["train.bin"] != checksums(finished)["train.bin"]
        preprocess(copy)
        assert checksums(copy) == checksums(finished)

    def test_killed_while_the_folders_change_places(self, finished: Path, complete: Path) -> None:
        (complete / "corpus/tokens").rename(complete / "corpus/tokens.old")
        preprocess(complete)
        assert checksums(complete) == checksums(finished)
        assert not (complete / "corpus/tokens.old").exists()

    def test_another_seed_changes_the_order_but_not_the_split(self, finished: Path, copy: Path) -> None:
        preprocess(copy, "data.seed=7")
        for split in SPLITS:
            one, other = texts_of(finished, split), texts_of(copy, split)
            assert one != other
            assert sorted(one) == sorted(other)


SPLITS: tuple[Split, Split] = ("train", "val")


def kill_when(folder: Path, tasks: int) -> bool:
    """Start the command with two workers, kill -9 it as soon as so many tasks are done; False if it ended before.

    Its workers must end by themselves.
    """
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "data/preprocess.py"),
            *SETTINGS,
            "data.preprocess.workers=2",
            "data.preprocess.tasks=8",
        ],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    partial = folder / "corpus/.tokens.partial"
    while process.poll() is None and len(list(partial.glob("*/log/*/completions/*"))) < tasks:
        time.sleep(0.002)
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=120)
    assert not alive
    return process.returncode == -signal.SIGKILL


class TestAccounting:
    """Promise 6: every document that came in is kept, or dropped by a named rule."""

    def test_each_record_is_counted_once(self, finished: Path) -> None:
        manifest = load_tokens_manifest(finished / "corpus/tokens")
        funnel = manifest.funnel["notes"]
        assert funnel.read.documents == 407
        assert {rule: count.documents for rule, count in funnel.dropped.items()} == {
            "blank": 1,
            "exact-duplicate": 3,
            "too-short": 1,
        }
        assert funnel.kept.documents == 402
        assert sum(funnel.bad.values()) == 3
        funnel.check()
        assert manifest.documents("train") + manifest.documents("val") == funnel.kept.documents
        assert manifest.bytes("train") + manifest.bytes("val") == funnel.kept.bytes

    def test_what_is_kept_is_in_the_files(self, finished: Path) -> None:
        manifest = load_tokens_manifest(finished / "corpus/tokens")
        texts = [text for split in SPLITS for text in texts_of(finished, split)]
        assert len(texts) == len(set(texts)) == manifest.funnel["notes"].kept.documents
        assert sum(len(text.encode()) for text in texts) == manifest.funnel["notes"].kept.bytes
        without_space = {"".join(text.split()) for text in texts}
        assert {"".join(text.split()) for text in sentences(400)} <= without_space
        assert "Café à la carte,\nwith a bell and a NUL, twice.\n" * 2 in texts

    def test_report_shows_the_same(self, finished: Path) -> None:
        report = (finished / "corpus/tokens/report.md").read_text()
        output = here(finished, "data/preprocess.py", *SETTINGS).stdout
        for row in ("dropped: exact-duplicate", "dropped: too-short", "dropped: blank", "kept"):
            assert row in report and row in output
        assert "402" in report and "402" in output

    def test_bad_records_are_set_aside_with_their_reason(self, finished: Path) -> None:
        lines = (finished / "corpus/tokens/quarantine.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        manifest = load_tokens_manifest(finished / "corpus/tokens")
        assert {record["reason"] for record in records} == set(manifest.funnel["notes"].bad)
        assert all(record["source"] == "notes" and record["location"] for record in records)

    def test_several_sources(self, copy: Path) -> None:
        """Of equal documents in two sources, the one of the source named first survives."""
        shutil.copytree(copy / "corpus/raw/notes", copy / "corpus/raw/again")
        both = ("data.sources.again={kind: files, paths: [notes.jsonl]}", "data.use=[again,notes]")
        preprocess(copy, *both)
        manifest = load_tokens_manifest(copy / "corpus/tokens")
        assert manifest.funnel["again"].kept.documents == 402
        assert manifest.funnel["notes"].kept.documents == 0
        assert manifest.funnel["notes"].dropped["exact-duplicate"].documents == 405
        assert total(manifest.funnel.values()).kept.documents == 402

    def test_without_deduplication_all_copies_stay_on_one_side(self, copy: Path) -> None:
        preprocess(copy, "data.preprocess.exact_deduplication=false", "data.preprocess.validation_fraction=0.3")
        train, val = texts_of(copy, "train"), texts_of(copy, "val")
        assert len(train) + len(val) == 405
        assert not {"".join(text.split()) for text in train} & {"".join(text.split()) for text in val}


class TestFiles:
    def test_special_tokens_written_in_a_document_stay_text(self, finished: Path) -> None:
        texts = texts_of(finished, "train") + texts_of(finished, "val")
        assert sum(MARKER in text for text in texts) == 1
        files = TokenFiles(finished / "corpus/tokens", "train")
        ends = np.flatnonzero(files.read(0, len(files)) == files.manifest.end_of_text_id)
        assert (ends + 1).tolist() == files.document_ends.tolist()

    def test_share_of_validation_documents(self, copy: Path) -> None:
        preprocess(copy, "data.preprocess.validation_fraction=0.25")
        manifest = load_tokens_manifest(copy / "corpus/tokens")
        assert manifest.validation == "documents"
        assert 70 <= manifest.documents("val") <= 130

    def test_documents_are_shuffled_across_the_corpus(self, finished: Path) -> None:
        numbers = [int(text.split()[1][:-1]) for text in texts_of(finished, "train") if text.startswith("Note ")]
        assert abs(np.corrcoef(np.arange(len(numbers)), numbers)[0, 1]) < 0.2

    def test_neighbours_come_from_different_input_files(self, prepared: Path, tmp_path: Path) -> None:
        texts = sentences(200)
        for number in range(4):
            lines = [json.dumps({"text": text}) for text in texts[number * 50 : number * 50 + 50]]
            (tmp_path / f"notes-{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        several = "data.sources.notes={kind: files, paths: [notes-*.jsonl]}"
        here(tmp_path, "data/download_datasets.py", "notes", *SETTINGS, several)
        shutil.copytree(prepared / "corpus/tokenizer", tmp_path / "corpus/tokenizer")
        preprocess(tmp_path, several)
        files = np.array([int(text.split()[1][:-1]) // 50 for text in texts_of(tmp_path, "train")])
        assert 0.6 < (files[1:] != files[:-1]).mean() < 0.9, "three in four, if files played no part"

    def test_large_data_is_several_files_with_the_same_tokens(self, finished: Path, copy: Path) -> None:
        preprocess(copy, "data.preprocess.max_file_tokens=20000")
        files = TokenFiles(copy / "corpus/tokens", "train")
        whole = TokenFiles(finished / "corpus/tokens", "train")
        assert len(files.files) >= 3
        assert [file.name for file in files.files][:2] == ["train_0000.bin", "train_0001.bin"]
        assert all(file.tokens <= 20000 for file in files.files)
        assert np.array_equal(files.read(0, len(files)), whole.read(0, len(whole)))
        assert np.array_equal(files.document_ends, whole.document_ends)
        files.verify()

    def test_one_document_is_cut_in_two(self, prepared: Path, tmp_path: Path) -> None:
        """A single book, the most usual corpus of one's own, has its end held out."""
        book = "\n".join(sentences(60))
        write_corpus(tmp_path, [book])
        shutil.copytree(prepared / "corpus/tokenizer", tmp_path / "corpus/tokenizer")
        preprocess(tmp_path)
        (train,), (val,) = texts_of(tmp_path, "train"), texts_of(tmp_path, "val")
        assert train + val == book
        assert 0.01 < len(val) / len(book) < 0.04
        assert load_tokens_manifest(tmp_path / "corpus/tokens").validation == "tails"

    def test_up_to_date_files_are_left_alone(self, finished: Path) -> None:
        before = (finished / "corpus/tokens/train.bin").stat().st_mtime_ns
        output = here(finished, "data/preprocess.py", *SETTINGS).stdout
        assert "up to date" in output and output.splitlines()[-1].startswith("Next: python scripts/train.py")
        assert (finished / "corpus/tokens/train.bin").stat().st_mtime_ns == before

    def test_a_damaged_file_makes_them_anew(self, finished: Path, complete: Path) -> None:
        (complete / "corpus/tokens/train.bin").write_bytes(b"cut")
        preprocess(complete)
        assert checksums(complete) == checksums(finished)

    def test_force_makes_them_anew(self, finished: Path, complete: Path) -> None:
        before = (complete / "corpus/tokens/manifest.json").stat().st_mtime_ns
        preprocess(complete, force=True)
        assert (complete / "corpus/tokens/manifest.json").stat().st_mtime_ns != before
        assert checksums(complete) == checksums(finished)


class TestBadInput:
    def test_nothing_downloaded(self, tmp_path: Path) -> None:
        assert "python data/download_datasets.py notes" in refused(tmp_path)

    def test_no_tokenizer(self, copy: Path) -> None:
        shutil.rmtree(copy / "corpus/tokenizer")
        assert "python data/tokenizer.py" in refused(copy)

    def test_unknown_source(self, copy: Path) -> None:
        assert "there is no source 'note'" in run_refused(copy, "data.use=[note]")

    def test_everything_dropped_names_the_rule(self, copy: Path) -> None:
        message = refused(copy, "data.preprocess.filter.min_characters=100000")
        assert "'too-short' dropped 406" in message
        assert not (copy / "corpus/tokens").exists()

    def test_too_many_bad_records(self, copy: Path) -> None:
        message = run_refused(copy, "data.preprocess.max_bad_fraction=0.001")
        assert "3 of 410 records cannot be read" in message
        kept = Path(message.split("All of them: ")[1].split(". Mend")[0])
        assert len(kept.read_text().splitlines()) == 3
        preprocess(copy)

    def test_token_folder_with_something_else_in_it(self, copy: Path) -> None:
        (copy / "corpus/tokens").mkdir()
        (copy / "corpus/tokens/thesis.txt").write_text("precious")
        assert "thesis" not in refused(copy)
        assert (copy / "corpus/tokens/thesis.txt").read_text() == "precious"

    def test_source_changed_since_it_was_downloaded(self, copy: Path) -> None:
        for path in (copy / "corpus/raw/notes").glob("*.parquet"):
            path.write_bytes(path.read_bytes()[:-100])
        assert "missing or damaged" in refused(copy)

    @pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
    def test_full_disk_leaves_the_old_files_whole(self, finished: Path, complete: Path, workers: int) -> None:

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

        message = run_refused(complete, "data.seed=7", f"data.preprocess.workers={workers}", preexec_fn=limit)
        assert "No space left" in message
        assert checksums(complete) == checksums(finished)
        preprocess(complete, "data.seed=7")
        assert checksums(complete) != checksums(finished)

    def test_two_at_once(self, copy: Path) -> None:
        import fcntl

        with open(copy / "corpus/.tokens.lock", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert "Another process" in refused(copy)

    def test_ctrl_c_ends_the_workers_and_says_how_to_continue(self, copy: Path) -> None:
        process = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "data/preprocess.py"),
                *SETTINGS,
                "data.preprocess.workers=2",
                "data.preprocess.tasks=100",
            ],
            cwd=copy,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        while not list((copy / "corpus").glob(".tokens.partial/*/log/clean/completions/*")):
            assert process.poll() is None
            time.sleep(0.002)
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=900)
        _, alive = psutil.wait_procs(children, timeout=120)
        assert not alive
        assert process.returncode == 1
        assert errors.strip() == "error: Stopped. Type the same command again to continue."


def test_manifest_says_what_the_design_asks(finished: Path) -> None:
    manifest: TokensManifest = load_tokens_manifest(finished / "corpus/tokens")
    tokenizer = load_tokenizer(finished / "corpus/tokenizer")
    assert manifest.dtype == "uint16"
    assert manifest.tokenizer_fingerprint == tokenizer.fingerprint
    assert manifest.vocab_size == tokenizer.vocab_size
    assert manifest.end_of_text_id == tokenizer.end_of_text_id
    assert manifest.seed == manifest.config["seed"] == 1337
    for split in SPLITS:
        TokenFiles(finished / "corpus/tokens", split).verify()
    assert sorted(path.name for path in (finished / "corpus/tokens").iterdir()) == [
        "manifest.json",
        "quarantine.jsonl",
        "report.html",
        "report.md",
        "train.bin",
        "train.index",
        "val.bin",
        "val.index",
    ]


def test_the_code_in_the_documentation_runs(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/preprocessing.md").read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in page.split("```python\n")[1:]]
    assert len(blocks) == 2
    monkeypatch.chdir(finished)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    manifest = load_tokens_manifest(Path("corpus/tokens"))
    assert len(names["ends"]) == manifest.documents("train")
    assert names["second_document"][-1] == manifest.end_of_text_id
    assert names["batch"].inputs.shape == (32, 256) and names["loader"].cursor == 32
