"""Questions put to a model in training: when, what they give, and the checkpoint that is best at them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from config.errors import UserError
from config.load import load_config
from scripts.eval import evaluate as eval_command
from scripts.train import train as train_command
from tests.small_runs import SMALL, RandomSamples, command, metrics, read_checkpoint, train_here, write_corpus
from tests.test_distributed import TWO


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass
class Evaluation:
    loss: float


def asked(values: list[float], *overrides: str) -> tuple[list[dict[str, Any]], set[int]]:
    """A run of twelve steps that answers so many questions rightly; its metrics, and the checkpoints that are left."""
    accuracies, losses = iter(values), iter([5.0, 3.0, 4.0, 4.5, 4.0, 3.5])
    run = train_here(
        RandomSamples(32, 32),
        *["training.max_steps=12", "training.checkpoint_interval=2", "training.eval_interval=2"],
        *overrides,
        evaluate=lambda model, rank, world: Evaluation(next(losses)),
        ask=lambda model, rank, world: next(accuracies),
    )
    rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    return rows, {int(path.stem.rpartition("_")[2]) for path in Path("checkpoints").glob("*.pt")}


def test_the_best_checkpoint_is_that_of_the_named_metric() -> None:
    settings = ["training.task_interval=5", "training.best_metric=task_accuracy"]
    rows, left = asked([0.2, 0.3, 0.1, 0.6, 0.3, 0.5, 0.4, 0.4, 0.4], *settings)
    told = {row["step"]: row["task_accuracy"] for row in rows if row["task_accuracy"] is not None}
    assert told == {2: 0.2, 4: 0.3, 5: 0.1, 6: 0.6, 8: 0.3, 10: 0.5, 12: 0.4}  # at checkpoints, too
    assert left == {6, 10, 12}
    last = read_checkpoint(Path("checkpoints/model_step_12.pt"))
    assert last["best"] == {"step": 6, "task_accuracy": 0.6} and last["task_accuracy"] == 0.4
    assert read_checkpoint(Path("checkpoints/model_step_6.pt"))["validation_loss"] == 4.0


def test_questions_have_a_schedule_of_their_own() -> None:
    rows, left = asked([0.2, 0.3, 0.1], "training.task_interval=5")
    assert {row["step"]: row["task_accuracy"] for row in rows if row["task_accuracy"] is not None} == {
        5: 0.2,
        10: 0.3,
        12: 0.1,
    }
    assert left == {4, 10, 12}, "the best one is still that of the validation loss"


def test_asking_leaves_the_run_as_it_is_and_gives_the_figure_of_the_command(folder: Path) -> None:
    write_corpus(folder)
    weights, accuracies = [], []
    for name, more in (("plain", []), ("asked", ["training.task_interval=3", "training.task_questions=6"])):
        settings = [*SMALL, f"training.run_name={name}", f"training.checkpoint_dir={name}", "training.device=cpu"]
        train_command(overrides=[*settings, "model.dropout=0.1", *more])
        weights.append(read_checkpoint(folder / name / "model_step_8.pt")["model"])
        rows = [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        accuracies.append({row["step"]: row.get("task_accuracy") for row in rows})
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert set(accuracies[0].values()) == {None}
    assert {step for step, value in accuracies[1].items() if value is not None} == {3, 6, 8}
    eval_command(overrides=["training.precision=fp32"], checkpoint="asked", tasks="quern", limit=6)
    found = json.loads(Path("runs/asked/tasks.json").read_text())
    assert found["quern"]["metrics"]["acc"]["value"] == pytest.approx(accuracies[1][8])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.best_metric=task_accuracy", "task_accuracy is measured where task_interval is set"),
        ("training.best_metric=accuracy", "task_accuracy"),
        ("training.task_interval=0", "task_interval"),
    ],
)
def test_what_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config([], [override])


@pytest.mark.slow
def test_two_processes_answer_as_one_does(folder: Path) -> None:
    """Whether each holds the whole model, and takes a share of the questions, or a part of it, and answers them all."""
    write_corpus(folder)
    settings = [*SMALL, "training.task_interval=4", "training.task_questions=10", "training.max_steps=4"]
    settings += ["training.optimizer=adamw", "training.micro_batch_size=4"]
    ways = {"one": [], "ddp": ["training.parallelism=ddp"], "fsdp": ["training.parallelism=fsdp"]}
    ways["slices"] = ["training.tensor_parallel=2"]
    for name, way in ways.items():
        own = [*settings, *way, f"training.run_name={name}", f"training.checkpoint_dir={name}"]
        if way:
            command(folder, "distributed_train", *TWO, *own)
        else:
            train_command(overrides=[*own, "training.device=cpu"])
    found = [metrics(Path("runs") / name)[-1]["task_accuracy"] for name in ways]
    assert found == pytest.approx([found[0]] * 4, abs=1e-9) and found[0] > 0
