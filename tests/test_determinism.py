"""`--deterministic`: what it asks of PyTorch, for the time of the run and no longer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from config.errors import UserError
from tests.commands import here
from tests.small_runs import (
    SMALL,
    TRAIN,
    RandomSamples,
    command,
    differing,
    new_transformer,
    read_checkpoint,
    train_here,
    write_corpus,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    return tmp_path


def settings_during(*settings: str, resume: Path | None = None) -> list[tuple[bool, int]]:
    """Whether PyTorch was deterministic in each step of a run, and the number of its threads."""
    found = []
    model = new_transformer()
    model.register_forward_pre_hook(
        lambda *_: found.append((torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()))
    )
    train_here(RandomSamples(32, 32), *settings, model=model, resume=resume)
    return found


def test_only_deterministic_algorithms_run_and_only_where_they_are_wanted() -> None:
    assert {deterministic for deterministic, _ in settings_during()} == {False}
    assert {deterministic for deterministic, _ in settings_during("training.deterministic=true")} == {True}
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_resumed_run_takes_the_number_of_threads_of_its_checkpoint() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        settings = ["training.run_name=threads", "training.deterministic=true", "training.keep_last=9"]
        settings_during(*settings)
        torch.set_num_threads(1)
        resume = Path("checkpoints/model_step_4.pt")
        assert {threads for _, threads in settings_during(*settings, resume=resume)} == {2}
        assert torch.get_num_threads() == 1
        settings[1] = "training.deterministic=false"
        assert {threads for _, threads in settings_during(*settings, resume=resume)} == {1}
    finally:
        torch.set_num_threads(before)


def test_an_operation_that_cannot_be_deterministic_is_named() -> None:
    model = new_transformer()

    def refused(*_: object) -> None:
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...")

    model.register_forward_pre_hook(refused)
    with pytest.raises(UserError, match="cumsum_cuda_kernel does not have .* Train without --deterministic."):
        train_here(RandomSamples(32, 32), "training.deterministic=true", model=model)


@pytest.mark.slow
def test_the_command_gives_the_same_bits_twice(folder: Path) -> None:
    write_corpus(folder)
    states: list[dict[str, Any]] = []
    for name, run, script in (("one", command, "train"), ("two", here, TRAIN)):
        own = [f"training.run_name={name}", f"training.checkpoint_dir={name}", "model.dropout=0.1"]
        run(folder, script, "--deterministic", *SMALL, *own)
        (start,) = json.loads((folder / "runs" / name / "environment.json").read_text())
        assert start["deterministic"] is True
        states.append(read_checkpoint(folder / name / "model_step_8.pt"))
    for key in ("model", "optimizer", "spikes", "rng"):
        assert not differing(states[0][key], states[1][key])
