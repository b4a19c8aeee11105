"""Runs side by side: figures, costs at equal loss, settings, and differences judged on the same text and questions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.errors import UserError
from config.load import load_config, save_config
from evaluation.bootstrap import mean_ratio_difference, ratio_difference
from evaluation.charts import short, ticks
from evaluation.compare import config_differences, curve, figures, judgements, reached
from evaluation.subjects import open_subjects
from model.checkpoint import load_checkpoint, save_checkpoint
from scripts.compare import compare as compare_command
from scripts.eval import evaluate as eval_command
from tests.test_report import Text

GENERATOR = np.random.default_rng(0)
WEIGHTS = GENERATOR.integers(5, 50, 200).astype(float)
HARDNESS = GENERATOR.normal(3.0, 1.0, 200)


def per_token(losses: np.ndarray) -> np.ndarray:
    return np.stack([losses * WEIGHTS, WEIGHTS], axis=1)


def test_a_paired_difference_is_known_far_better_than_either_figure() -> None:
    noise = GENERATOR.normal(0.0, 0.02, 200)
    found = ratio_difference(per_token(HARDNESS), per_token(HARDNESS + 0.01 + noise))
    expected = float(((0.01 + noise) * WEIGHTS).sum() / WEIGHTS.sum())
    assert found.value == pytest.approx(expected)
    assert found.interval is not None and found.interval[0] < expected < found.interval[1]
    assert found.interval[1] - found.interval[0] < 0.01 < HARDNESS.std() / 200**0.5
    assert found == ratio_difference(per_token(HARDNESS), per_token(HARDNESS + 0.01 + noise))
    swapped = ratio_difference(per_token(HARDNESS + 0.01 + noise), per_token(HARDNESS))
    assert swapped.value == pytest.approx(-expected)


def test_p_values_of_equal_models_are_spread_evenly() -> None:
    found = []
    for seed in range(60):
        draw = np.random.default_rng(seed)
        sums = [np.stack([draw.normal(2.0, 0.3, 60), np.ones(60)], axis=1) for _ in range(2)]
        p_value = ratio_difference(*sums).p_value
        assert p_value is not None
        found.append(p_value)
    assert 0.35 < np.mean(found) < 0.65
    assert np.mean(np.array(found) < 0.1) < 0.25
    same = per_token(HARDNESS)
    assert ratio_difference(same, same).p_value == 1.0
    assert ratio_difference(same, per_token(HARDNESS - 1.0)).p_value == pytest.approx(2 / 10_001)


def test_the_mean_of_several_differences_and_too_few_blocks() -> None:
    first, second = per_token(HARDNESS), per_token(HARDNESS + 0.5)
    ones = np.ones((40, 2))
    both = mean_ratio_difference([(first, second), (ones, ones)])
    assert both.value == pytest.approx(0.25) and both.interval is not None
    few = mean_ratio_difference([(first, second), (ones[:5], ones[:5])])
    assert few.value == pytest.approx(0.25) and (few.interval, few.p_value) == (None, None)


def blocks(shift: float) -> dict[str, list[float]]:
    losses = ((HARDNESS + shift) * WEIGHTS).tolist()
    return {"loss": losses, "tokens": WEIGHTS.tolist(), "text_loss": losses, "bytes": (4 * WEIGHTS).tolist()}


def outcomes(share: float, seed: int) -> list[float]:
    return [float(drawn < share) for drawn in np.random.default_rng(seed).random(100)]


def task(right: list[float], group: str | None = "all") -> dict[str, Any]:
    metrics = {"acc": {"value": float(np.mean(right)), "interval": None}}
    about = {"documents": len(right), "fewshot": 0, "step": 20, "group": group, "fingerprint": "f"}
    return {**about, "metrics": metrics, "outcomes": {"acc": right}}


def make_run(folder: Path, shift: float, share: float, *overrides: str, factor: float = 1.0) -> Path:
    save_config(load_config([], list(overrides)), folder / "config.yaml")
    rows = [
        {
            "step": step,
            "tokens": int(100 * step * factor),
            "flops": 1e12 * step * factor,
            "seconds": 2.0 * step,
            "loss": 6.0 - step / 10,
            "task_accuracy": 0.25 + share * step / 100 if step % 5 == 0 else None,
            "validation_loss": 6.5 - step / 10 + shift if step % 4 == 0 else None,
        }
        for step in range(1, 21)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums = {name: np.array(column) for name, column in blocks(shift).items()}
    loss = float(sums["loss"].sum() / sums["tokens"].sum())
    bits = float(sums["text_loss"].sum() / np.log(2) / sums["bytes"].sum())
    whole = {"step": 20, "loss": loss, "bits_per_byte": bits, "blocks": blocks(shift)}
    (folder / "evaluation.json").write_text(json.dumps(whole))
    members = {name: task(outcomes(share, seed)) for seed, name in enumerate(("one", "two"))}
    mean = float(np.mean([found["metrics"]["acc"]["value"] for found in members.values()]))
    group = {**task([mean], None), "fingerprint": None, "outcomes": {}}
    (folder / "tasks.json").write_text(json.dumps({"all": group, **members}))
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/a"), 0.0, 0.5)
    make_run(Path("runs/b"), -0.2, 0.95, "model.n_layers=3", factor=2.0)
    return tmp_path


def test_differences_are_judged_where_both_were_asked_the_same(runs: Path) -> None:
    found = {one.what: one for one in judgements(open_subjects(["runs/a", "b"], Path("runs")))}
    assert set(found) == {"validation: loss", "validation: bits per byte", "all: acc", "one: acc", "two: acc"}
    for one in found.values():
        assert one.other == "b" and one.difference is not None
        assert one.difference.value == pytest.approx(one.after - one.before, abs=1e-6)
        assert one.difference.p_value is not None and one.difference.p_value < 0.01
    assert found["validation: loss"].difference.value == pytest.approx(-0.2)  # type: ignore[union-attr]
    assert found["all: acc"].after > 0.9


def test_differences_are_not_judged_where_they_were_not(runs: Path) -> None:
    evaluation = json.loads(Path("runs/b/evaluation.json").read_text())
    evaluation["blocks"]["tokens"][3] += 1  # another tokenizer, on the same bytes
    Path("runs/b/evaluation.json").write_text(json.dumps(evaluation))
    tasks = json.loads(Path("runs/b/tasks.json").read_text())
    tasks["two"]["fingerprint"] = "other questions"
    Path("runs/b/tasks.json").write_text(json.dumps(tasks))
    subjects = open_subjects(["runs/a", "runs/b"], Path("runs"))
    found = {one.what: one for one in judgements(subjects)}
    assert found["validation: loss"].reason == "not the same tokens"
    assert found["validation: bits per byte"].difference is not None
    assert found["one: acc"].difference is not None
    assert found["two: acc"].reason == found["all: acc"].reason == "not the same questions"
    evaluation["blocks"]["bytes"][3] += 1
    Path("runs/b/evaluation.json").write_text(json.dumps(evaluation))
    found = {one.what: one for one in judgements(open_subjects(["runs/a", "runs/b"], Path("runs")))}
    assert found["validation: bits per byte"].reason == "not the same text"


def test_costs_are_compared_at_the_loss_that_all_reached(runs: Path) -> None:
    subjects = open_subjects(["runs/a", "runs/b"], Path("runs"))
    found = reached(subjects)
    assert found is not None
    target, (first, second) = found
    assert target == pytest.approx(4.5)
    assert first.at == pytest.approx({"step": 20, "tokens": 2000, "flops": 20e12, "seconds": 40})
    assert second.at == pytest.approx({"step": 18, "tokens": 3600, "flops": 36e12, "seconds": 36})
    assert config_differences(subjects) == [("model.n_layers", [4, 3])]
    assert curve(subjects[1], "flops", "validation_loss")[0] == pytest.approx((8e12, 5.9))


def test_the_command_prints_tables_and_writes_one_page(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare_command(words=["runs/a", "runs/b"], output=Path("out/page.html"))
    printed = capsys.readouterr().out
    assert re.search(r"model\.n_layers │ +4 │ +3 │", printed)
    assert re.search(r"validation: loss +│ +b │ +-0\.2000 │ .* │ < 0\.001 │", printed)
    assert re.search(r"accuracy in questions, last +│ +0\.3500 │ +0\.4400 │", printed)
    assert re.search(r"tokens +│ +2,000 │ +3,600 │", printed) and "down to 4.5000" in printed
    assert "Written to out/page.html" in printed
    text = Path("out/page.html").read_text(encoding="utf-8")
    page = Text(text)
    assert "script" not in page.tags and not page.addresses and "http" not in text.replace("http-equiv", "")
    assert page.tags.count("svg") == 12 and page.tags.count("polyline") == 24
    words = " ".join(" ".join(page.words).split())
    for part in ("over tokens", "over floating-point operations", "over seconds", "model.n_layers 4 3", "-0.2000"):
        assert part in words


def test_a_run_without_evaluations_or_metrics_is_still_compared(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_config(load_config([], ["training.seed=2"]), Path("runs/new/config.yaml"))
    compare_command(words=["runs/a", "runs/new"], output=Path("page.html"))
    assert "No evaluation is common" in capsys.readouterr().out


def test_checkpoints_are_compared_by_their_own_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.workspace import make_workspace

    monkeypatch.chdir(tmp_path)
    first = make_workspace(tmp_path).checkpoint
    state = load_checkpoint(first)
    state["step"], state["model"] = 9, {name: 0.9 * weights for name, weights in state["model"].items()}
    save_checkpoint(second := first.parent / "model_step_9.pt", state)
    run = make_run(Path("runs/small-run"), 0.1, 0.5)
    make_run(Path("runs/a"), 0.0, 0.5)
    with pytest.raises(UserError, match=r"step 9 of the run small-run, .*scripts/eval.py --checkpoint \S+_step_9.pt"):
        open_subjects(["runs/a", str(second)], Path("runs"))
    losses = []
    for checkpoint in (first, second):
        eval_command(overrides=["training.device=cpu", "training.precision=fp32"], checkpoint=str(checkpoint))
        losses.append(json.loads((run / "evaluation.json").read_text())["loss"])
    places = [str(second), str(first), "runs/small-run"]
    subjects = open_subjects(places, Path("runs"))
    assert [one.name for one in subjects] == ["small-run (step 9)", "small-run (step 7)", "small-run"]
    found = dict(figures(subjects))
    assert found["validation: loss"] == [losses[1], losses[0], None] and losses[0] != losses[1]
    assert found["evaluated at step"] == [9, 7, 20] and found["all: acc"][:2] == [None, None]
    assert found["steps"] == [9, 7, 20] and found["validation loss, last"] == pytest.approx([5.8, 6.2, 4.6])
    assert judgements(subjects[:2])[0].after - judgements(subjects[:2])[0].before == losses[0] - losses[1]
    capsys.readouterr()
    compare_command(words=places[:2])
    assert re.search(r"evaluated at step +│ +9 │ +7 │", capsys.readouterr().out)
    with pytest.raises(UserError, match="model_step_9.pt is the run small-run, of step 9, which is named already"):
        open_subjects([places[0], places[0]], Path("runs"))
    with pytest.raises(UserError, match="of the run small-run, whose folder elsewhere/small-run is not there"):
        open_subjects(["runs/a", str(first)], Path("elsewhere"))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([], "Name two runs or more"),
        (["runs/a"], "Name two runs or more"),
        (["runs/a", "runs/c"], "no run and no checkpoint runs/c"),
        (["runs/a", "a"], "is the run a, of step 20, which is named already"),
    ],
)
def test_what_is_refused(runs: Path, places: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compare_command(words=places)
    assert not Path("comparison.html").exists()


def test_ticks_are_round_and_numbers_short() -> None:
    assert ticks(0.0, 250.0) == [0.0, 50.0, 100.0, 150.0, 200.0, 250.0]
    assert ticks(4.93, 5.61) == [5.0, 5.2, 5.4, 5.6]
    assert [short(value) for value in (0.5, 950, 12_345, 3.4e6, 2.5e9, 1.234e15)] == [
        "0.5",
        "950",
        "12.3K",
        "3.4M",
        "2.5B",
        "1.23e+15",
    ]
