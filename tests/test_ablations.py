"""The ablation benchmark, on a run of a few steps."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ablations import MEANS, Stopwatch, choose, main
from config.errors import UserError
from config.load import load_config
from evaluation.perplexity import Evaluation
from tests.small_runs import SMALL, write_corpus


@pytest.mark.parametrize("name", MEANS)
def test_every_means_is_a_setting_that_loads(name: str) -> None:
    assert load_config([], MEANS[name]) is not None


def test_what_the_recipe_has_anyway_is_left_out() -> None:
    variants = choose(None, ["training.schedule.name=cosine"], ["cosine", "tied head"], ["mine: model.n_layers=2"])
    assert list(variants) == ["the recipe", "tied head", "mine"]
    assert variants["tied head"].model.tie_embeddings and variants["tied head"].training.schedule.name == "cosine"
    with pytest.raises(UserError, match="no means 'gelu'; choose from: AdamW alone"):
        choose(None, [], ["gelu"], None)


def test_an_interrupt_ends_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    evaluate = Stopwatch.evaluate

    def interrupt(watch: Stopwatch, *arguments: Any) -> Evaluation:
        signal.raise_signal(signal.SIGINT)
        return evaluate(watch, *arguments)

    monkeypatch.setattr(Stopwatch, "evaluate", interrupt)
    settings = [*SMALL, "training.eval_interval=1"]
    monkeypatch.setattr(
        "sys.argv", ["ablations.py", "--try", "longer: training.max_steps=9", "--output", "a", *settings]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130 and not Path("a").exists()


def test_losses_and_seconds_of_every_variant_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["ablations.py", "--seeds", "2", "--target", "9", "--try", "longer: training.max_steps=6"]
    monkeypatch.setattr("sys.argv", [*words, "--output", "runs.json", *SMALL, "training.max_steps=4"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    runs = json.loads(Path("runs.json").read_text())
    assert [(run["name"], run["seed"]) for run in runs] == [
        ("the recipe", 1),
        ("longer", 1),
        ("the recipe", 2),
        ("longer", 2),
    ]
    assert len(runs[0]["curve"]) == 1 and len(runs[1]["curve"]) == 2, "at step 4, and at step 4 and 6"
    assert runs[0]["loss"] == runs[0]["curve"][-1][1] != runs[2]["loss"]
    assert 0 < runs[1]["curve"][0][0] < runs[1]["curve"][1][0] == runs[1]["seconds"]
    table = capsys.readouterr().out
    assert "to 9" in table and "longer" in table
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "runs.json"], "nothing is left behind"
