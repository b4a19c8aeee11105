"""Checkpoints written by another process: what was true at the step, in full, whoever dies on the way."""

from __future__ import annotations

import io
import mmap
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any

import psutil
import pytest
import torch

from config.errors import UserError
from model.archive import is_intact
from model.checkpoint import write_state
from model.checkpoint_folder import latest_checkpoint, list_checkpoints
from tests.small_runs import ROOT, RandomSamples, differing, read_checkpoint, small_config, train_here
from training import checkpointing, copying
from training.background import PROGRAM
from training.checkpointing import Checkpoints
from training.staging import Staging


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def checkpoints(said: list[str]) -> Iterator[Checkpoints]:
    config = small_config("training.save_in_background=true", "training.keep_last=9")
    made = Checkpoints(config.training, "run", said.append)
    yield made
    made.close()


def state(step: int) -> dict[str, Any]:
    """A state whose every number is `step`, some in memory that two names share, or that a view sees a part of."""
    weight = torch.full((300, 40), float(step))
    optimizer = {"state": {0: {"step": torch.tensor(float(step)), "empty": torch.empty(0)}}, "groups": [(1, None)]}
    weights = {"embedding": weight, "head": weight, "column": weight[:, 3], "half": weight.bfloat16()}
    return {"model": weights, "optimizer": optimizer, "config": {}, "step": step, "validation_loss": None}


def writers() -> list[psutil.Process]:
    """The processes that write, among all that tests in this one have started."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # one of another test that has just ended
            found += [child] if PROGRAM in child.cmdline() else []
    return found


def writer() -> psutil.Process:
    """The process that writes."""
    (found,) = writers()
    return found


def written(step: int) -> bool:
    """Whether the checkpoint of `step` is there, and holds `state(step)`."""
    path = Path(f"checkpoints/model_step_{step}.pt")
    if not path.exists():
        return False
    found = read_checkpoint(path)
    assert is_intact(path) and not differing(found["model"], state(step)["model"])
    assert not differing(found["optimizer"], state(step)["optimizer"])
    assert found["model"]["embedding"].data_ptr() == found["model"]["head"].data_ptr()
    return True


def test_a_run_writes_the_same_checkpoints_in_the_background() -> None:
    settings = ["training.checkpoint_interval=1", "training.keep_last=9", "training.run_name=same"]
    for way in ("true", "false"):
        own = [
            f"training.save_in_background={way}",
            f"training.checkpoint_dir=in-{way}",
            f"training.runs_dir=runs-{way}",
        ]
        train_here(RandomSamples(32, 32), *settings, *own)
    assert [path.name for _, path in list_checkpoints(Path("in-true"))] == [f"model_step_{n}.pt" for n in range(1, 9)]
    for step, path in list_checkpoints(Path("in-true")):
        found, direct = read_checkpoint(path), read_checkpoint(Path("in-false") / path.name)
        for each in (found, direct):
            each["progress"].pop("seconds")
            each.pop("config")
        assert not differing(found, direct), step
        assert is_intact(path)
    assert latest_checkpoint(Path("in-true")).name == "model_step_8.pt"


def test_what_changes_after_the_step_does_not_reach_the_file(checkpoints: Checkpoints) -> None:
    first = state(1)
    checkpoints.tend(lambda: first)
    writer().suspend()
    checkpoints.save(first, final=False)
    checkpoints.settle()
    for weight in first["model"].values():
        weight.zero_()
    writer().resume()
    checkpoints.close()
    assert written(1)


def test_a_save_waits_until_the_memory_is_free_again(
    checkpoints: Checkpoints, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "LONG", 0.0)
    checkpoints.save(state(1), final=False)
    writer().suspend()
    Timer(0.3, writer().resume).start()
    changing = state(2)
    checkpoints.save(changing, final=False)
    checkpoints.settle()
    changing["model"]["embedding"].zero_()
    checkpoints.save(state(3), final=True)
    assert written(1) and written(2) and written(3)
    assert len(said) == 2 and said[0].startswith("Waited ") and said[0].endswith("model_step_1.pt was on the disk.")


def test_a_writer_that_dies_is_replaced_and_its_work_done(checkpoints: Checkpoints, said: list[str]) -> None:
    checkpoints.save(state(1), final=False)
    first = writer()
    first.suspend()
    first.kill()
    checkpoints.save(state(2), final=False)
    assert written(1)
    assert said == ["warning: the process that writes checkpoints ended with SIGKILL; another one takes over."]
    assert writer().pid != first.pid
    checkpoints.close()
    assert written(2) and not writers()


def test_signals_to_the_whole_group_are_not_for_the_writer(checkpoints: Checkpoints) -> None:
    checkpoints.save(state(1), final=False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        writer().send_signal(number)
    checkpoints.save(state(2), final=False)
    checkpoints.close()
    assert written(1) and written(2)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs prlimit")
def test_a_full_disk_costs_nothing_and_is_tried_again(checkpoints: Checkpoints, said: list[str]) -> None:
    """A limit on the sizes of the writer's files stands for the full disk: its writes fail in the same way."""
    checkpoints.save(state(1), final=True)
    checkpoints.tend(lambda: state(1))
    no_limit = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(writer().pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    for step in (2, 3):
        checkpoints.save(state(step), final=False)
    while len(said) < 2:
        checkpoints.tend(lambda: state(3))
    resource.prlimit(writer().pid, resource.RLIMIT_FSIZE, no_limit)
    checkpoints.save(state(4), final=False)
    checkpoints.close()
    assert [line.partition(". ")[0] for line in said] == [
        f"warning: No space left while writing checkpoints/model_step_{step}.pt" for step in (2, 3)
    ]
    assert written(1) and written(4)
    names = {path.name for path in Path("checkpoints").iterdir()}
    assert names == {"model_step_1.pt", "model_step_4.pt", "latest", ".latest.lock"}


def test_a_folder_belongs_to_one_run_at_a_time(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until its writer has ended too, which outlives a run that is killed by one file."""
    monkeypatch.setattr(checkpointing, "PATIENCE", 0.0)
    training = small_config("training.save_in_background=false").training
    with pytest.raises(UserError, match="Another run is writing to checkpoints/. Wait for its end"):
        Checkpoints(training, "other", print)
    checkpoints.close()
    Path("checkpoints/.model_step_3.pt.17.abcd.tmp").write_bytes(b"left by a run that was killed")
    Checkpoints(training, "other", print).close()
    assert {path.name for path in Path("checkpoints").iterdir()} == {".latest.lock"}


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from config.files import exclusive
from model.checkpoint import load_checkpoint
from model.checkpoint_folder import latest_checkpoint, list_checkpoints
from tests.small_runs import RandomSamples, train_here

folder, source = Path("part"), RandomSamples(32, 32)
settings = ["model.d_model=256", "training.checkpoint_interval=1", "training.save_in_background=true",
            "training.eval_interval=1000", "training.keep_best=false", "training.max_steps=100000",
            "training.schedule.name=constant"]
part = [*settings, "training.run_name=part", "training.checkpoint_dir=part"]
chance, times = random.Random(int(sys.argv[1])), int(sys.argv[2])
reached = 0
for time_number in range(times):
    child = os.fork()
    if not child:
        os.setsid()
        train_here(source, *part, resume=latest_checkpoint(folder) if reached else None)
        os._exit(1)
    while not any(step > reached for step, _ in list_checkpoints(folder)):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended by itself"
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.25))
    if time_number % 2:
        os.kill(child, signal.SIGKILL)
    else:
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with exclusive(folder / "latest", "the writer goes on", patience=60):  # a writer that was spared has ended
        for _, path in list_checkpoints(folder):
            load_checkpoint(path)
        reached = load_checkpoint(latest_checkpoint(folder))["step"]
whole = [*settings, "training.run_name=whole", "training.checkpoint_dir=whole", f"training.max_steps={reached}"]
train_here(source, *whole)
print(reached)
"""


@pytest.mark.slow
def test_killed_at_random_moments_the_last_checkpoint_is_whole_and_the_run_goes_on(folder: Path) -> None:
    """The run alone, or its writer with it, 20 times while checkpoints are written; in the end it is the same run."""
    seed = int(time.time())
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(seed), "20"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    name = f"model_step_{int(done.stdout.split()[-1])}.pt"
    part, whole = (read_checkpoint(folder / way / name) for way in ("part", "whole"))
    for key in ("model", "optimizer", "rng", "cursor"):
        assert not differing(part[key], whole[key]), f"seed {seed}"


def test_the_copy_is_made_beside_the_step_and_awaited_by_its_update(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes the time is not waited for in `save`, but in `settle`."""
    going_on, lay_out = Event(), Staging.lay_out

    def slow(*arguments: Any) -> Any:
        assert going_on.wait(60)
        return lay_out(*arguments)

    monkeypatch.setattr(Staging, "lay_out", slow)
    checkpoints.save(state(1), final=False)
    checkpoints.tend(lambda: state(2))
    waiting = Thread(target=checkpoints.settle)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    going_on.set()
    waiting.join()
    checkpoints.close()
    assert written(1)


class Bytes(io.BytesIO):
    """A file that keeps what it is given, as `torch.save` has it."""

    def write(self, data: Any) -> int:
        return super().write(bytes(data))


@pytest.mark.parametrize("helped", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_what_is_laid_out_is_the_archive_byte_for_byte(
    monkeypatch: pytest.MonkeyPatch, large: bool, helped: bool
) -> None:
    """Pieces of a line of the cache, of several, and odd ones; also where two threads copy and meet somewhere."""
    monkeypatch.setattr(copying, "LARGE", 0 if large else 2**40)
    monkeypatch.setattr(copying, "PIECE", 4096)
    staging = Staging(print)
    for step in (1, 2):
        weights = torch.randn(900, 777, generator=torch.Generator().manual_seed(step))
        mixed = {
            "rows": list(weights[:9]),
            "odd": weights[1:].clone()[3, 5:],
            "half": weights.bfloat16(),
            "small": [torch.tensor(step), torch.tensor([True]), torch.empty(0)],
        }
        with ThreadPoolExecutor(1) as thread:
            laid_out = thread.submit(staging.lay_out, mixed)
            while helped and not laid_out.done():
                staging.help()
        with open(staging.descriptor, "rb", closefd=False) as memory:
            whole = mmap.mmap(memory.fileno(), 0, prot=mmap.PROT_READ)
            found = [part if isinstance(part, bytes) else whole[part[0] : sum(part)] for part in laid_out.result()]
        expected = Bytes()
        write_state(mixed, expected)
        assert b"".join(found) == expected.getvalue()
    staging.close()


def test_a_copy_that_fails_is_raised_where_it_is_awaited(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise MemoryError("no room for the copy")

    monkeypatch.setattr(Staging, "lay_out", failing)
    checkpoints.save(state(1), final=False)
    with pytest.raises(MemoryError, match="no room"):
        checkpoints.settle()
