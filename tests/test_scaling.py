"""Rates, decay and initialisation that carry over from a measured run to another."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from config.load import CONFIG_DIR, load_config, with_vocab_size
from config.schema import Config
from model.transformer import Transformer
from tests.small_runs import RandomSamples, metrics, read_checkpoint, train_here
from training.optimizers import make_optimizers
from training.plan import make_plan
from training.scaling import DEMO, DEMO_RATES, Rates, Run, choose_rates, scaled
from training.schedules import rate_factor


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


def test_a_decay_that_the_demo_has_not_stays_as_given() -> None:
    muon = chosen("training.learning_rate=auto", "training.muon.weight_decay=0.02", "model.d_model=256").training.muon
    assert DEMO_RATES.muon_decay == 0 and muon.weight_decay == 0.02


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


TINY = Run(width=32, depth=2, batch_tokens=8 * 64, tokens=80 * 8 * 64)
TINY_RATES = replace(DEMO_RATES, embedding=0.016, hidden=0.016, head=0.016, scalar=0.016, adamw_decay=0.0)
FACTORS = (1 / 8, 1 / 4, 1 / 2, 1, 2)


def best_factor(width: int, rates: Rates) -> float:
    """By which of `FACTORS` the rates must be multiplied for the lowest loss, of a letter model trained with AdamW."""
    text = torch.tensor(list(inspect.getsource(argparse).encode())).clamp(max=127)
    losses = []
    for factor in FACTORS:
        settings = [f"model.d_model={width}", "model.n_layers=2", "model.n_heads=1", "model.context_length=64"]
        settings += ["training.optimizer=adamw", "training.schedule.warmup_steps=10", "training.adamw.weight_decay=0"]
        settings += [f"training.adamw.learning_rate={factor * rates.hidden}", f"model.init_std={rates.init_std}"]
        for name in ("embedding", "head", "scalar"):
            settings.append(f"training.adamw.{name}_learning_rate={factor * getattr(rates, name)}")
        config = with_vocab_size(load_config([], settings), 128)
        model = Transformer(config.model)
        model.init_weights(1)
        optimizers = make_optimizers(model, config.training)
        generator, last = torch.Generator().manual_seed(1), 0.0
        for step in range(1, 81):
            begin = torch.randint(len(text) - 64, (8, 1), generator=generator)
            rows = text[begin + torch.arange(65)]
            loss = model(rows[:, :-1], rows[:, 1:]) / (8 * 64)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers.set_rate_factor(rate_factor(config.training.schedule, step, 80))
            optimizers.step(~torch.isfinite(norm))
            optimizers.zero_grad()
            last += loss.item() if step > 60 else 0.0
        losses.append(last)
    return FACTORS[losses.index(min(losses))]


@pytest.mark.slow
def test_the_best_rate_of_a_narrow_model_is_that_of_a_wide_one() -> None:
    """Four times as wide: the same multiple of the scaled rates is best; of the same rates, a far smaller one is."""
    narrow = best_factor(32, TINY_RATES)
    assert narrow not in (FACTORS[0], FACTORS[-1])
    assert best_factor(128, scaled(replace(TINY, width=128), TINY, TINY_RATES)) == narrow
    assert best_factor(128, TINY_RATES) <= narrow / 2
