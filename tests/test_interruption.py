"""Preprocessing that is killed, as a whole or one worker, ends with the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.commands import here
from tests.test_preprocess import ROOT, SETTINGS, checksums, sentences, write_corpus

KILLS = 20
TWO_WORKERS = (
    "data.preprocess.workers=2",
    "data.preprocess.tasks=6",
    "data.preprocess.max_file_tokens=30000",
    "data.preprocess.near_deduplication.enabled=true",
    "data.preprocess.line_deduplication.unit=lines",
    "data.preprocess.mixture.epochs={notes: 1.5}",
)


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Start the command with two workers in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "data/preprocess.py"), *SETTINGS, *TWO_WORKERS],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source and a tokenizer."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = sentences(300)
    write_corpus(folder, [*texts, *texts[:9], "short"], bad_lines=["no json"])
    here(folder, "data/tokenizer.py", *SETTINGS)
    return folder


@pytest.fixture(scope="module")
def undisturbed(prepared: Path) -> tuple[dict[str, str], float]:
    """The checksums of a run that nothing happened to, and its seconds."""
    begun = time.monotonic()
    assert start(prepared).wait() == 0
    return checksums(prepared), time.monotonic() - begun


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A copy of `prepared` without token files."""
    for name in ("raw", "tokenizer"):
        shutil.copytree(prepared / "corpus" / name, tmp_path / "corpus" / name)
    return tmp_path


@pytest.mark.slow
def test_killed_at_20_random_moments(undisturbed: tuple[dict[str, str], float], copy: Path) -> None:
    """Moments spread over the running time. Each run goes on from the one before; one that ends is followed by anew."""
    expected, seconds = undisturbed
    rng = random.Random(20)
    kills = 0
    while kills < KILLS:
        process = start(copy)
        try:
            process.wait(timeout=rng.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            kills += 1
        else:  # it ended by itself, maybe a moment before it was to be killed
            assert process.returncode == 0
            assert checksums(copy) == expected
            shutil.rmtree(copy / "corpus/tokens")
    assert start(copy).wait() == 0
    assert checksums(copy) == expected
    assert sorted(path.name for path in (copy / "corpus").iterdir()) == [".tokens.lock", "raw", "tokenizer", "tokens"]


@pytest.mark.slow
def test_one_worker_killed_in_the_middle(undisturbed: tuple[dict[str, str], float], copy: Path) -> None:
    process = start(copy)
    killed = False
    while process.poll() is None and not killed:
        if list((copy / "corpus").glob(".tokens.partial/*/log/clean/completions/*")):
            with suppress(psutil.NoSuchProcess):  # one of a stage that has just ended
                workers = [worker for child in psutil.Process(process.pid).children() for worker in child.children()]
                if len(workers) == 2:
                    workers[0].kill()
                    killed = True
        time.sleep(0.002)
    assert killed
    assert process.wait() == 0
    assert checksums(copy) == undisturbed[0]
