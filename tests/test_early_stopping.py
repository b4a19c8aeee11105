"""Ending a run that gets no better: at the same step however it was interrupted, and with the best checkpoint named."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from config.errors import UserError
from config.load import load_config
from model.transformer import Transformer
from tests.commands import here
from tests.small_runs import (
    SMALL,
    TRAIN,
    RandomSamples,
    command,
    differing,
    metrics,
    new_transformer,
    read_checkpoint,
    small_config,
    train_here,
    write_corpus,
)
from tests.test_distributed import TWO
from training.ending import told_best, told_end
from training.measuring import EarlyStopping
from training.trainer import TrainResult


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


EVERY = ["training.eval_interval=2", "training.checkpoint_interval=2", "training.max_steps=20"]


@dataclass(frozen=True)
class Loss:
    loss: float


def losses(*values: float) -> Callable[[Transformer, int, int], Loss]:
    """Evaluations that give `values` one after the other."""
    coming = iter(values)
    return lambda model, rank, world: Loss(next(coming))


def rule(*settings: str) -> EarlyStopping:
    return EarlyStopping(small_config(*settings).training)


class TestRule:
    @pytest.mark.parametrize(
        ("patience", "min_delta", "values", "ends"),
        [
            (2, 0.0, [5, 4, 4, 4], 4),
            (2, 0.0, [5, 6, 4, 5, 3, 4, 5], 7),
            (1, 0.0, [5, 4.9, 4.8, 4.9], 4),
            (2, 0.15, [5, 4.9, 4.8, 4.7, 4.6], None),
            (2, 0.5, [5, 4.9, 4.8], 3),
            (2, 0.0, [math.nan, 5, math.inf, math.nan], 4),
            (1, 0.0, [math.nan], 1),
        ],
    )
    def test_so_many_measurements_in_vain(
        self, patience: int, min_delta: float, values: list[float], ends: int | None
    ) -> None:
        """With a least gain of 0.15, what falls by 0.1 twice is better than two measurements before."""
        stopping = rule(
            f"training.early_stopping.patience={patience}", f"training.early_stopping.min_delta={min_delta}"
        )
        over = []
        for step, value in enumerate(values, start=1):
            assert stopping.judge(step, {"validation_loss": value})
            assert not stopping.judge(step, {"task_accuracy": 0.0})
            over.append(stopping.over)
        assert over == [number == ends for number in range(1, len(values) + 1)]

    def test_the_metric_may_be_one_that_rises(self) -> None:
        accuracy = ["training.best_metric=task_accuracy", "training.task_interval=1"]
        stopping = rule(*accuracy, "training.early_stopping.patience=2")
        for value, over in ((0.2, False), (0.3, False), (0.3, False), (0.25, True)):
            assert stopping.judge(1, {"validation_loss": 1.0, "task_accuracy": value})
            assert stopping.over == over

    def test_it_is_off_by_default(self) -> None:
        stopping = EarlyStopping(load_config().training)
        assert not any(stopping.judge(step, {"validation_loss": 5.0}) for step in range(99)) and not stopping.over

    def test_it_goes_with_a_best_checkpoint_to_use(self) -> None:
        with pytest.raises(UserError, match="early_stopping.patience: .*set keep_best to true"):
            small_config("training.early_stopping.patience=2", "training.keep_best=false")


PATIENT = [*EVERY, "training.early_stopping.patience=3"]
FALLS_AND_RISES = (5.0, 4.0, 4.5, 4.2, 4.1)


def whole_run() -> TrainResult:
    own = ["training.checkpoint_dir=whole", "training.run_name=whole"]
    return train_here(RandomSamples(32, 32), *PATIENT, *own, evaluate=losses(*FALLS_AND_RISES))


def test_a_run_ends_with_its_best_checkpoint_beside_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    result = whole_run()
    assert (result.step, result.steps, result.stopped_by, result.in_vain) == (10, 20, None, 3)
    assert {path.name for path in Path("whole").glob("*.pt")} == {f"model_step_{step}.pt" for step in (4, 8, 10)}
    assert read_checkpoint(Path("whole/model_step_10.pt"))["best"] == {"step": 4, "validation_loss": 4.0}
    assert not told_end(result, "again", "longer")
    assert told_best(result) == Path("whole/model_step_4.pt")
    assert capsys.readouterr().out.splitlines() == [
        "Stopped early after step 10 of 20: the last 3 evaluations were no better than the best before them "
        "(training.early_stopping).",
        "The best checkpoint is whole/model_step_4.pt: validation loss 4.0000 at step 4.",
    ]
    assert metrics(Path("runs/whole"))[-1]["validation_loss"] == 4.1


def test_a_run_that_ended_early_is_complete_until_it_may_be_more_patient(capsys: pytest.CaptureFixture[str]) -> None:
    last = whole_run().checkpoint
    own = ["training.checkpoint_dir=whole"]
    again = train_here(RandomSamples(32, 32), *PATIENT, *own, resume=last, evaluate=losses())
    assert again.already_complete and again.best is not None and again.best.path == Path("whole/model_step_4.pt")
    assert told_end(again, "python go.py", "longer")
    told = capsys.readouterr().out
    assert "it was stopped early after step 10 of 20" in told
    assert told.splitlines()[-1].endswith("To train on: python go.py training.early_stopping.patience=null")
    more = ["training.early_stopping.patience=4", "training.max_steps=14"]
    on = train_here(RandomSamples(32, 32), *PATIENT, *own, *more, resume=last, evaluate=losses(3.5, 3.6))
    assert (on.step, on.in_vain) == (14, 0) and on.best is not None and on.best.value == 3.5


@pytest.mark.parametrize("interrupted", [5, 6, 8, 10])
def test_an_interrupted_run_ends_at_the_same_step_in_the_same_weights(interrupted: int) -> None:
    """Where it was asked to stop after a step that is evaluated, that is made up for when it goes on."""
    whole = whole_run()
    model, calls = new_transformer(), iter(range(1, 99))
    model.register_forward_pre_hook(
        lambda *_: os.kill(os.getpid(), signal.SIGTERM) if next(calls) == interrupted else None
    )
    own = ["training.checkpoint_dir=part", "training.run_name=part"]
    evaluated = FALLS_AND_RISES[: (interrupted - 1) // 2]
    part = train_here(RandomSamples(32, 32), *PATIENT, *own, model=model, evaluate=losses(*evaluated))
    assert (part.step, part.stopped_by) == (interrupted, signal.SIGTERM)
    left = losses(*FALLS_AND_RISES[len(evaluated) :])
    part = train_here(RandomSamples(32, 32), *PATIENT, *own, resume=part.checkpoint, evaluate=left)
    assert (part.step, part.in_vain) == (whole.step, whole.in_vain) == (10, 3)
    assert part.checkpoint is not None and whole.checkpoint is not None
    one, other = (read_checkpoint(path) for path in (whole.checkpoint, part.checkpoint))
    same: list[str] = ["model", "optimizer", "rng", "cursor", *([] if interrupted == 10 else ["stopping"])]
    assert not differing({key: one[key] for key in same}, {key: other[key] for key in same})


@pytest.mark.slow
def test_the_command_ends_early_on_one_process_and_on_two_alike(folder: Path) -> None:
    """A rate so high that the loss soon rises, through the real commands; a killed run would do no other."""
    write_corpus(folder)
    settings = [*SMALL, "training.max_steps=400", "training.muon.learning_rate=0.1", "training.eval_interval=5"]
    settings += ["training.checkpoint_interval=5", "training.early_stopping.patience=2", "training.optimizer=muon"]
    ended: list[dict[str, Any]] = []
    for name in ("one", "two"):
        own = [*settings, f"training.run_name={name}", f"training.checkpoint_dir={name}"]
        done = command(folder, "distributed_train", *TWO, *own) if name == "two" else here(folder, TRAIN, *own)
        (early,) = [line for line in done.stdout.splitlines() if line.startswith("Stopped early after step ")]
        step = int(early.split()[4])
        assert 10 < step < 400 and (folder / name / f"model_step_{step}.pt").exists()
        best = f"{name}/model_step_{step - 10}.pt"
        assert f"The best checkpoint is {best}: validation loss " in done.stdout
        assert done.stdout.splitlines()[-1].endswith(f"Next: python scripts/eval.py --checkpoint {best}")
        ended.append(read_checkpoint(folder / name / f"model_step_{step}.pt"))
    assert ended[0]["stopping"]["best"] == pytest.approx(ended[1]["stopping"]["best"], rel=1e-2)
