"""Several examples in a sample: the same loss and gradients as one in each, on less computation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import UserError
from config.load import load_config
from data.data_loader import IGNORED, SampleSource
from data.examples.encoding import Encoded
from data.examples.packed import PackedExamples
from data.examples.samples import ExampleSamples
from model.transformer import Transformer
from tests.small_runs import small_config, train_here, trained_weights
from training.plan import make_plan

PAD = 99


def encoded(*lengths: int) -> list[Encoded]:
    """Examples of so many tokens, the first half of each given and the rest trained."""
    rng = np.random.default_rng(0)
    return [
        Encoded(rng.integers(0, 90, length).astype(np.int32), np.arange(length) >= max(1, length // 2))
        for length in lengths
    ]


def sets(context_length: int, *lengths: int) -> tuple[ExampleSamples, PackedExamples]:
    samples = ExampleSamples(encoded(*lengths), PAD, context_length)
    return samples, PackedExamples(samples, context_length)


class TestPacking:
    @settings(max_examples=60, deadline=None)
    @given(lengths=st.lists(st.integers(2, 33), min_size=1, max_size=40))
    def test_every_example_lies_whole_in_one_sample_and_predicts_only_itself(self, lengths: list[int]) -> None:
        samples, packed = sets(32, *lengths)
        found = []
        for index in range(len(packed)):
            inputs, targets, documents = packed.sample(index)
            assert len(inputs) == len(targets) == len(documents) == packed.length <= 32
            for number in sorted(set(documents[documents >= 0].tolist())):
                places = np.flatnonzero(documents == number)
                assert (np.diff(places) == 1).all()
                ids, trained = samples.encoded(number)
                assert (inputs[places] == ids[:-1]).all()
                assert (targets[places] == np.where(trained[1:], ids[1:], IGNORED)).all()
                found.append(number)
            assert (targets[documents < 0] == IGNORED).all()
        assert sorted(found) == list(range(len(lengths)))

    def test_short_examples_fill_the_samples(self) -> None:
        samples, packed = sets(64, *[9] * 80)
        assert (len(packed), packed.length, packed.examples_per_sample) == (10, 64, 8.0)
        assert len(samples) == 80

    def test_a_small_set_is_one_short_sample(self) -> None:
        _, packed = sets(1024, 5, 6, 7)
        assert (len(packed), packed.length) == (1, 16)

    def test_places_are_those_of_all_its_examples(self) -> None:
        samples = ExampleSamples(encoded(5, 6), PAD, 32, ["set.jsonl:1", "set.jsonl:2"])
        assert PackedExamples(samples, 32).place(0) == "set.jsonl:1, set.jsonl:2"


def loss_and_gradients(model: Transformer, source: SampleSource) -> dict[str, torch.Tensor]:
    """The loss per trained token over all of a set, and what it does to every weight."""
    model.zero_grad()
    rows = [source.sample(index) for index in range(len(source))]
    parts = [torch.from_numpy(np.stack(part).astype(np.int64)) for part in zip(*rows, strict=True)]
    documents = parts[2] if len(parts) == 3 else None
    loss = model(parts[0], parts[1], documents=documents) / (parts[1] != IGNORED).sum()
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.position=learned"],
        ["model.window=5", "model.window_pattern=SL", "model.value_embeddings=alternate"],
        ["model.context_length=1024"],
    ],
    ids=["rotary", "learned positions", "windows", "beyond the length of one mask"],
)
def test_packed_examples_have_the_loss_and_gradients_of_padded_ones(overrides: list[str]) -> None:
    shape = ["model.n_layers=2", "model.d_model=32", "model.n_heads=2", "model.context_length=64"]
    lively = ["model.vocab_size=100", "model.zero_init_projections=false", "model.init_std=0.3"]
    config = load_config([], [*shape, *lively, *overrides]).model
    model = Transformer(config)
    lengths = [3, 5, 8, 13, 21, 30, 2, 17, 40, 11, 65, 6] if config.context_length == 64 else [300, 500, 200, 9]
    padded, packed = sets(config.context_length, *lengths)
    assert len(packed) < len(padded) / 2
    one, other = loss_and_gradients(model, padded), loss_and_gradients(model, packed)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=2e-4, atol=2e-6, msg=lambda text: f"{name}: {text}")


def test_a_run_over_one_packed_sample_is_the_run_over_its_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both take all the examples in every step, so they must end in the same weights."""
    monkeypatch.chdir(tmp_path)
    padded, packed = sets(32, 5, 9, 6, 4)
    assert len(packed) == 1
    weights = []
    for name, source in (("padded", padded), ("packed", packed)):
        size = ["training.batch_size=4", "training.micro_batch_size=4", "training.adamw.eps=0.01"]
        folders = [f"training.checkpoint_dir={name}", f"training.runs_dir={name}", "training.optimizer=adamw"]
        length = f"training.sequence_length={source.length}"
        weights.append(trained_weights(train_here(source, *size, *folders, length)))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-6)


class TestPlan:
    def test_the_batch_counts_examples(self) -> None:
        config = small_config("training.batch_size=16", "training.max_steps=null", "training.epochs=3")
        plan = make_plan(config, 50, 1, examples_per_sample=8.0)
        assert (plan.batch_size, plan.rows, plan.steps) == (2, 2, 75)

    def test_what_processes_cannot_share_is_refused_with_a_batch_that_they_can(self) -> None:
        with pytest.raises(UserError, match="fill 2 packed samples.*4 processes.*training.batch_size=32") as caught:
            make_plan(small_config("training.batch_size=16"), 50, 4, examples_per_sample=8.0)
        assert "data.finetuning.packing=false" in str(caught.value)
        assert make_plan(small_config("training.batch_size=32"), 50, 4, examples_per_sample=8.0).rows == 1
