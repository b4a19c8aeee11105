"""Rates, decay and initialisation that carry over from a measured run to another."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.load import CONFIG_DIR, load_config, with_vocab_size
from config.schema import Config
from tests.small_runs import RandomSamples, metrics, read_checkpoint, train_here
from training.plan import make_plan
from training.scaling import DEMO, DEMO_RATES, Rates, Run, choose_rates, scaled


def chosen(*overrides: str) -> Config:
    config = with_vocab_size(load_config([CONFIG_DIR / "recipes/demo.yaml"], overrides), 100)
    return choose_rates(config, make_plan(config, 10_000, 1))


def test_the_base_is_the_demo() -> None:
    """Whoever tunes the demo must bring the numbers here: everything else is derived from them."""
    given, auto = chosen(), chosen("training.learning_rate=auto")
    assert auto.training.muon == given.training.muon
    assert auto.model == given.model
    adamw = given.training.adamw
    for rate in ("embedding_learning_rate", "head_learning_rate", "scalar_learning_rate"):
        assert getattr(auto.training.adamw, rate) == (getattr(adamw, rate) or adamw.learning_rate)
    assert auto.training.adamw.weight_decay == adamw.weight_decay


def test_given_rates_stay() -> None:
    config = chosen("training.adamw.learning_rate=0.5")
    assert config.training.adamw.learning_rate == 0.5


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        # Four times as wide: AdamW's matrices and head take a fourth, the weights begin at half.
        (Run(512, 4, 1024, 2_560_000), Rates(0.02, 0.3, 0.001, 0.01, 0.3, 0.1, 0.2, 0.01)),
        # Four times as deep: the blocks move half as far.
        (Run(128, 16, 1024, 2_560_000), Rates(0.01, 0.3, 0.002, 0.04, 0.3, 0.1, 0.2, 0.02)),
        # Batches of four times the tokens, a fourth of the steps: twice the rate, and twice the decay.
        (Run(128, 4, 4096, 2_560_000), Rates(0.04, 0.6, 0.008, 0.08, 0.6, 0.2, 0.4, 0.02)),
        # A thousand times the tokens: 0.1097 of the rate, and so that rate * decay * steps stays, 0.00912 of the decay.
        (
            Run(128, 4, 1024, 2_560_000_000),
            Rates(0.0021929, 0.032893, 0.00043857, 0.0043857, 0.032893, 0.00091201, 0.0018240, 0.02),
        ),
    ],
    ids=["wider", "deeper", "larger batches", "longer"],
)
def test_the_rules_give_these_numbers(run: Run, expected: Rates) -> None:
    base = Rates(0.02, 0.3, 0.004, 0.04, 0.3, 0.1, 0.2, 0.02)
    found = scaled(run, DEMO, base)
    for name, value in vars(expected).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name


def test_the_rules_compose() -> None:
    """By way of a run in between or at once: the order of growing does not matter."""
    middle, far = Run(256, 8, 4096, 10**8), Run(1024, 24, 2**19, 10**10)
    there = scaled(far, middle, scaled(middle))
    for name, value in vars(scaled(far)).items():
        assert getattr(there, name) == pytest.approx(value, rel=1e-9), name
    assert scaled(DEMO) == DEMO_RATES


def test_a_run_trains_with_what_was_chosen_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = train_here(RandomSamples(64, 32), "training.learning_rate=auto", "training.schedule.warmup_steps=0")
    said = "".join(capsys.readouterr())
    state = read_checkpoint(tmp_path / "checkpoints/model_step_8.pt")
    expected = scaled(Run(32, 2, 8 * 32, 8 * 8 * 32))
    saved = state["config"]["training"]
    assert saved["muon"]["learning_rate"] == expected.muon
    assert state["config"]["model"]["init_std"] == expected.init_std == pytest.approx(0.04)
    groups = state["optimizer"]["adamw"]["param_groups"]
    assert [group["initial_lr"] for group in groups] == [expected.embedding, expected.head, expected.scalar]
    assert f"learning_rate: auto chose embedding {expected.embedding:.2g}" in said
    assert metrics(result.run_dir)[0]["learning_rate"] == pytest.approx(expected.muon, rel=0.2)
    resumed = train_here(RandomSamples(64, 32), "training.learning_rate=auto", resume=result.checkpoint)
    assert resumed.already_complete
