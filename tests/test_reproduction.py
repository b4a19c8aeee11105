"""A run is run again: the same bits are told, and so is whatever is no longer the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from config.errors import UserError
from scripts.train import train as train_command
from tests.commands import here
from tests.small_runs import SMALL, TRAIN, RandomSamples, command, train_here, write_corpus
from training.reproduction import open_original

RUN = [*SMALL, "training.run_name=first", "model.dropout=0.1"]


def test_a_run_repeated_is_bit_identical_and_a_changed_one_is_told(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    here(tmp_path, TRAIN, *RUN)
    before = (tmp_path / "checkpoints/model_step_8.pt").read_bytes()

    done = command(tmp_path, "train", "--reproduce", "runs/first")
    assert re.search(
        r"runs/first-again against runs/first: bit-identical: the weights after 8 steps are the same "
        r"\(SHA-256 \w{12}\); so is every figure of 4 rows of metrics.jsonl\.",
        done.stdout,
    )
    assert "warning" not in done.stdout
    results = [json.loads((tmp_path / f"runs/{name}/result.json").read_text()) for name in ("first", "first-again")]
    assert results[0] == results[1] and results[0]["step"] == 8 and len(results[0]["weights_sha256"]) == 64
    assert (tmp_path / "checkpoints/model_step_8.pt").read_bytes() == before
    assert (tmp_path / "runs/first-again/checkpoints/model_step_8.pt").exists()

    environment = tmp_path / "runs/first/environment.json"
    (start,) = json.loads(environment.read_text())
    start["git_commit"], start["versions"]["numpy"] = "0" * 40, "1.0"
    environment.write_text(json.dumps([start]))
    done = here(tmp_path, TRAIN, "--reproduce", "runs/first", "training.adamw.learning_rate=0.004", status=1)
    assert "warning: training.adamw.learning_rate was 0.003, is 0.004." in done.stdout
    assert re.search(r"warning: numpy was 1\.0, is \d", done.stdout)
    assert "warning: commit was 0000" in done.stdout or "whether the code is the same cannot be told" in done.stdout
    assert re.search(
        r"runs/first-again-2 against runs/first: not bit-identical: the weights after 8 steps are others", done.stdout
    )
    assert re.search(r"metrics.jsonl first differs at step 2: loss was \d\S+, is \d\S+\.", done.stdout)


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    train_here(RandomSamples(32, 32), "training.run_name=run", data_fingerprint="d" * 64)
    return Path("runs/run")


def test_other_data_another_tokenizer_and_what_is_no_run_are_refused(tmp_path: Path, finished: Path) -> None:
    write_corpus(tmp_path)
    for folder, resume, message in (
        ("run", None, "runs/run was trained with another tokenizer (fingerprint t, now "),
        ("none", None, "runs/none is not the folder of a run"),
        ("run", "latest", "Leave --resume out"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            train_command(reproduce=Path("runs") / folder, resume=resume)
    assert [path.name for path in Path("runs").iterdir()] == ["run"]


def test_the_first_step_that_differs_is_named(finished: Path) -> None:
    train_here(RandomSamples(32, 32), "training.run_name=same", data_fingerprint="d" * 64)
    train_here(RandomSamples(32, 32), "training.run_name=longer", "training.max_steps=10", data_fingerprint="d" * 64)
    original = open_original(finished)
    assert original.compare(Path("runs/same"))[0]
    rows = Path("runs/same/metrics.jsonl").read_text().splitlines()
    row = json.loads(rows[2])
    row["loss"] += 1e-9
    Path("runs/same/metrics.jsonl").write_text("\n".join([*rows[:2], json.dumps(row), *rows[3:]]) + "\n")
    same, told = original.compare(Path("runs/same"))
    assert not same and "weights after 8 steps are the same" in told and "first differs at step 6: loss was" in told
    assert not original.compare(Path("runs/longer"))[0]


def test_fingerprints_of_the_data_and_of_other_files_are_told_apart(finished: Path) -> None:
    original = open_original(finished)
    original.require_same_data("t", "d" * 64)
    with pytest.raises(UserError, match="was trained on other token files .fingerprint dddddddddddd, now eee."):
        original.require_same_data("t", "eee")


def test_a_run_of_fine_tuning_or_without_a_record_of_its_data_cannot_be_repeated(finished: Path) -> None:
    environment = finished / "environment.json"
    (start,) = json.loads(environment.read_text())
    environment.write_text(json.dumps([{**start, "finetuned": True}]))
    with pytest.raises(UserError, match="is a run of scripts/finetune.py"):
        open_original(finished)
    del start["data_fingerprint"]
    environment.write_text(json.dumps([start]))
    with pytest.raises(UserError, match="does not tell which data"):
        open_original(finished)


def test_an_unfinished_run_has_no_result_and_is_not_called_identical(finished: Path) -> None:
    (finished / "result.json").unlink()
    train_here(RandomSamples(32, 32), "training.run_name=whole", data_fingerprint="d" * 64)
    same, told = open_original(finished).compare(Path("runs/whole"))
    assert not same and "runs/run is not complete" in told and "the same in all 4 rows that both have" in told
