"""scripts/scaling.py: every run once, the law through them, and what it says of a larger one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.errors import UserError
from config.load import save_config, with_vocab_size
from scripts.scaling import scaling
from tests.commands import here
from tests.small_runs import SMALL, kill_when, start, write_corpus
from training.estimate import Sizes
from training.ladder import parameters_of, read_ladder
from training.power_law import Law

LAW = Law(1.5, 30.0, 0.4, 60.0, 0.3)
LADDER: dict[str, Any] = {
    "name": "steps",
    "settings": {key: yaml.safe_load(value) for key, value in (setting.split("=") for setting in SMALL)},
    "sizes": {f"w{width}": {"model.d_model": width} for width in (16, 32, 64)},
    "tokens": ["1K", "2K", "4K"],
    "predict": {"size": {"model.d_model": 128}, "tokens": "16K"},
}


def write(**changes: Any) -> Path:
    Path("ladder.yaml").write_text(yaml.safe_dump({**LADDER, **changes}))
    return Path("ladder.yaml")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_law_of_finished_runs_predicts_a_larger_one_and_no_run_is_repeated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write()
    ladder = read_ladder(file)
    assert len(ladder.runs) == 9 and ladder.predicted is not None
    for planned in [*ladder.runs, ladder.predicted]:
        config = with_vocab_size(planned.config, 300)
        save_config(config, planned.directory / "config.yaml")
        size, tokens = parameters_of(config), 256 * (config.training.max_steps or 0)
        (planned.directory / "metrics.jsonl").write_text(
            json.dumps({"tokens": tokens, "flops": 6.0 * size * tokens}) + "\n"
        )
        result = {"step": 1, "validation_loss": LAW.loss(size, tokens), "weights_sha256": None}
        (planned.directory / "result.json").write_text(json.dumps(result))
    scaling(file, measure=True)
    printed = capsys.readouterr().out
    assert len(re.findall(r"steps-w\d+-\dK", printed)) == 9 and "/9" not in printed
    found = re.search(
        r"steps-predicted, \S+ parameters and 15.9k tokens: predicted loss ([\d.]+), 95 % interval", printed
    )
    assert found is not None
    outcome = re.search(r"It came to ([\d.]+): the prediction is [\d.]+ too (high|low)", printed)
    assert outcome is not None and float(found[1]) == pytest.approx(float(outcome[1]), rel=0.02)
    written = json.loads(Path("runs/steps/scaling.json").read_text())
    assert written["law"]["token_exponent"] == pytest.approx(LAW.token_exponent, rel=0.1)
    assert written["prediction"]["interval"] == pytest.approx([float(found[1])] * 2, rel=0.02)
    assert len(written["runs"]) == 9 and "steps-predicted" not in written["runs"]
    assert Path("runs/steps/scaling.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="steps-w16-1K was made with training.seed=1337, which is now 2"):
        scaling(file, ["training.seed=2"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {}}, "there is no key 'size'. Did you mean 'sizes'?"),
        ({"sizes": {}}, "the key 'sizes' is missing or empty"),
        ({"tokens": "1M"}, "tokens must be a list"),
        ({"tokens": None}, "the key 'tokens' is missing or empty; give it, or flops, or both"),
        ({"flops": "1e9"}, "flops must be a list of budgets, such as [1e13, 4e13]"),
        ({"flops": [1e3]}, "a budget of 1000.0 flops is less than one step of 256 tokens"),
        ({"tokens": ["1X"]}, "tokens=1X: give a number above 0"),
        ({"tokens": [10]}, "a budget of 10 tokens is less than one step of 256"),
        ({"sizes": {"a": {"model.d_modle": 16}}}, "d_modle: there is no such key. Did you mean 'd_model'"),
        ({"predict": {"size": {}}}, "predict must hold the keys size and tokens"),
        ({"base": "nowhere.yaml"}, "There is no configuration file nowhere.yaml"),
    ],
)
def test_a_mistake_in_the_file_is_told_before_any_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        scaling(write(**changes))
    assert not Path("runs").exists()


def test_budgets_of_flops_give_each_size_its_tokens() -> None:
    ladder = read_ladder(write(tokens=None, flops=[2e9, 8e9]))
    assert [run.name for run in ladder.runs][:2] == ["steps-w16-2e9flops", "steps-w16-8e9flops"]
    for run in ladder.runs:
        sizes = Sizes(run.config)
        flops = (run.config.training.max_steps or 0) * 256 * sizes.flops_per_token
        wanted = 8e9 if run.name.endswith("8e9flops") else 2e9
        assert flops == pytest.approx(wanted, abs=0.51 * 256 * sizes.flops_per_token)
    steps = [run.config.training.max_steps or 0 for run in ladder.runs[1::2]]
    assert steps[0] > 1.3 * steps[1] > 1.3 * steps[2]


@pytest.mark.slow
def test_a_ladder_that_is_killed_goes_on_where_it_was(folder: Path) -> None:
    write_corpus(folder)
    file = write(sizes={"w16": {"model.d_model": 16}, "w32": {"model.d_model": 32}})
    process = start(folder, "scaling", str(file))
    kill_when(lambda: Path("runs/steps-w16-2K/result.json").exists(), process)
    first = Path("runs/steps-w16-1K/environment.json").read_bytes()
    done = here(folder, "scripts/scaling.py", str(file))
    assert "1/6  " not in done.stdout and "6/6  steps-w32-4K: 16 steps" in done.stdout
    assert Path("runs/steps-w16-1K/environment.json").read_bytes() == first
    assert len(list(Path("runs").glob("*/result.json"))) == 6 and "Root mean square" in done.stdout
