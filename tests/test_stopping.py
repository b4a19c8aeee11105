"""What a run under way is asked: to save and go on, or to be done by a certain time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.commands import here
from tests.small_runs import (
    SMALL,
    TRAIN,
    RandomSamples,
    command,
    finish,
    new_transformer,
    read_checkpoint,
    start,
    train_here,
    wait_for,
    write_corpus,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_sigusr1_saves_and_goes_on() -> None:
    model, steps = new_transformer(), iter(range(1, 99))
    model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGUSR1) if next(steps) == 3 else None)
    before = signal.getsignal(signal.SIGUSR1)
    result = train_here(RandomSamples(32, 32), "training.checkpoint_interval=8", model=model)
    assert result.step == 8 and result.stopped_by is None
    assert {path.name for path in Path("checkpoints").glob("*.pt")} == {"model_step_3.pt", "model_step_8.pt"}
    assert read_checkpoint(Path("checkpoints/model_step_3.pt"))["cursor"] == 24
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_run_ends_with_a_checkpoint_before_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a step takes a minute, and which has half an hour left."""
    clock = [time.time()]
    monkeypatch.setattr("training.signals.time", SimpleNamespace(time=lambda: clock[0]))
    model = new_transformer()
    model.register_forward_pre_hook(lambda *_: clock.append(clock.pop() + 60.0))
    started = psutil.Process().create_time()
    end = clock[0] + 1800.0
    settings = ["training.checkpoint_interval=100000", "training.max_steps=100000"]
    hours = (end - started) / 3600
    result = train_here(RandomSamples(32, 32), *settings, f"training.max_hours={hours}", model=model)
    assert clock[0] < end
    assert result.stopped_by == 0 and 20 < result.step < 30
    assert result.checkpoint is not None and read_checkpoint(result.checkpoint)["step"] == result.step


class Impatient(RandomSamples):
    """Samples of which a run is asked to stop as soon as it looks at them."""

    asked = False

    def __len__(self) -> int:
        if not self.asked:
            self.asked = True
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__len__()


def test_a_run_asked_to_stop_before_its_first_step_takes_none_and_leaves_nothing(folder: Path) -> None:
    result = train_here(Impatient(32, 32))
    assert (result.step, result.stopped_by, result.checkpoint) == (0, signal.SIGTERM, None)
    assert not list(folder.iterdir())


def awaited(process: subprocess.Popen[str], field: str, number: signal.Signals) -> bool:
    """Whether a signal is among those that `field` of the process's status names."""
    (mask,) = re.findall(rf"^{field}:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> number - 1 & 1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs to see which signals a process expects")
class TestStarting:
    def test_a_request_to_save_harms_nothing(self, folder: Path) -> None:
        write_corpus(folder)
        process = start(folder, "train", *SMALL, "training.run_name=asked")
        wait_for(lambda: awaited(process, "SigIgn", signal.SIGUSR1), process)
        while not (folder / "runs/asked").exists():
            assert process.poll() is None
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.02)
        assert finish(process).returncode == 0

    def test_a_request_to_stop_ends_it_with_a_sentence(self, folder: Path) -> None:
        write_corpus(folder)
        there = set(folder.iterdir())
        process = start(folder, "train", *SMALL)
        wait_for(lambda: awaited(process, "SigCgt", signal.SIGTERM), process)
        process.send_signal(signal.SIGTERM)
        done = finish(process)
        said = (done.returncode, done.stdout, done.stderr)
        assert said == (143, "", "Stopped by SIGTERM before the first step. Nothing was changed.\n")
        assert set(folder.iterdir()) == there


@pytest.mark.slow
def test_the_command_says_how_to_go_on_when_its_time_is_over(folder: Path) -> None:
    write_corpus(folder)
    settings = [*SMALL, "training.max_steps=10000000", "training.max_hours=0.004", "training.eval_interval=10000000"]
    done = command(folder, "train", *settings)
    cause, advice = done.stdout.splitlines()
    assert cause.startswith("Stopped by training.max_hours after step ")
    again = advice.removeprefix("Go on with: python scripts/train.py ").split()
    step = read_checkpoint(Path(again[1]))["step"]
    more = here(folder, TRAIN, *again, "training.max_hours=null", f"training.max_steps={step + 2}")
    assert f"step {step + 2}/{step + 2}" in more.stderr
