"""The training loop: its arithmetic, its schedules, what it writes, and how it stops."""

from __future__ import annotations

import gc
import io
import json
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from config.errors import UserError
from config.training import BatchWarmupConfig, ScheduleConfig, ShortSequencesConfig
from data.data_loader import DataLoader, TokenWindows
from data.packing import PackedWindows
from data.tokens import TokenFiles
from evaluation.perplexity import evaluate_tokens
from model.transformer import Transformer
from scripts.train import evaluator
from tests.small_runs import (
    SMALL,
    FixedLoss,
    RandomSamples,
    command,
    differing,
    finish,
    metrics,
    new_transformer,
    read_checkpoint,
    small_config,
    start,
    train_here,
    trained_weights,
    wait_for,
    write_corpus,
)
from tests.workspace import LIVELY
from training import randomness
from training.console import Console, count, duration, size
from training.loop import Loop
from training.plan import make_plan
from training.pretraining import open_pretraining
from training.schedules import batch_rows, piece_length, rate_factor, sequences_through
from training.setup import compiled

HOW = ("attend_across", "masked")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def uneven(row: int) -> slice:
    """Masks from none to all of a row's 32 targets, very different from row to row."""
    return slice(0, (row * 13) % 33)


class TestLoss:
    def test_accumulation_weighs_every_valid_token_the_same(self) -> None:
        """The same global batches in one forward pass or in eight, whose counts of valid tokens differ."""
        source = RandomSamples(32, 32, uneven)
        results = [
            train_here(source, f"training.micro_batch_size={rows}", "training.optimizer=adamw") for rows in (8, 2, 1)
        ]
        whole, quarters, rows = (trained_weights(result) for result in results)
        torch.testing.assert_close(quarters, whole, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(rows, whole, rtol=1e-4, atol=2e-5)
        losses = [[row["loss"] for row in metrics(result.run_dir)] for result in results]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)

    def test_the_gradient_is_that_of_the_mean_over_valid_tokens(self) -> None:
        """One step of plain gradient descent by hand on the global mean loss, against the recorded norm."""
        source = RandomSamples(8, 32, uneven)
        result = train_here(source, "training.max_steps=1", "training.micro_batch_size=2", "training.log_interval=1")
        model = new_transformer()
        inputs, targets = (torch.stack([torch.tensor(source.sample(row)[part]) for row in range(8)]) for part in (0, 1))
        logits = model(inputs)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        (row,) = metrics(result.run_dir)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)

    def test_the_reported_loss_leaves_out_the_z_loss_that_is_trained(self) -> None:
        source, model = RandomSamples(8, 32), new_transformer()
        result = train_here(source, "training.max_steps=1", "training.log_interval=1", "training.z_loss=0.5")
        inputs, targets = (torch.stack([torch.tensor(source.sample(row)[part]) for row in range(8)]) for part in (0, 1))
        logits = model(inputs).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, targets.flatten())
        (loss + 0.5 * logits.logsumexp(-1).square().mean()).backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        (row,) = metrics(result.run_dir)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)

    def test_a_batch_without_a_valid_token_is_left_out_and_counted(self) -> None:
        nothing = RandomSamples(8, 32, lambda row: slice(None))
        result = train_here(nothing, model=new_transformer())
        assert not differing(trained_weights(result), dict(new_transformer().state_dict()))
        assert metrics(result.run_dir)[-1]["skipped_steps"] == 8
        assert metrics(result.run_dir)[-1]["loss"] is None

    def test_a_single_empty_micro_batch_does_no_harm(self) -> None:
        half = RandomSamples(8, 32, lambda row: slice(None) if row % 2 else slice(0, 0))
        result = train_here(half, "training.micro_batch_size=1")
        assert all(bool(weight.isfinite().all()) for weight in trained_weights(result).values())
        assert metrics(result.run_dir)[-1]["skipped_steps"] == 0

    def test_gradients_that_are_no_numbers_are_left_out_and_end_the_run(self) -> None:
        broken = new_transformer()
        with torch.no_grad():
            broken.output_weight[3, 0] = torch.nan
        before = {name: weight.clone() for name, weight in broken.state_dict().items()}
        with pytest.raises(UserError, match="not been finite since step 1: the run has diverged"):
            train_here(RandomSamples(64, 32), "training.max_steps=100", model=broken)
        assert len(Path("runs").glob("*/skipped.jsonl").__next__().read_text().splitlines()) == 30
        after = broken.state_dict()
        assert all(torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7)) for name in before)

    def test_no_number_is_read_back_from_the_device_in_a_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From the first layer to the optimizer; Muon would on a CPU alone, where it costs nothing."""
        read: list[str] = []

        class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __init__(self) -> None:
                super().__init__()  # type: ignore[no-untyped-call]
                self.begun = False

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                self.begun |= func is torch.ops.aten.embedding.default
                if self.begun and func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
                    read.append("".join(traceback.format_stack(limit=6)))
                return func(*args, **(kwargs or {}))

        steps, plain = 0, Loop._update

        def watched(loop: Loop, *given: Any) -> None:
            nonlocal steps
            steps += 1
            with Watch() as watch:
                plain(loop, *given)
            assert watch.begun

        monkeypatch.setattr(Loop, "_update", watched)
        train_here(RandomSamples(32, 32), "training.optimizer=adamw", "training.micro_batch_size=4")
        assert steps == 8 and not read, read[0]

    def test_the_collector_leaves_alone_what_was_there_before_the_first_step(self) -> None:
        frozen = []

        def evaluate(model: Transformer, rank: int, world: int) -> FixedLoss:
            frozen.append(gc.get_freeze_count())
            return FixedLoss()

        train_here(RandomSamples(32, 32), "training.eval_interval=4", evaluate=evaluate)
        assert len(frozen) == 2 and min(frozen) > 10_000 and gc.get_freeze_count() == 0

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_mixed_precision_learns_and_keeps_float32_weights(self, precision: str) -> None:
        result = train_here(RandomSamples(8, 32), f"training.precision={precision}", "training.max_steps=12")
        rows = metrics(result.run_dir)
        assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
        assert all(weight.dtype == torch.float32 for weight in trained_weights(result).values())
        assert result.checkpoint is not None
        scaler = read_checkpoint(result.checkpoint)["scaler"]
        assert bool(scaler) == (precision == "fp16")

    def test_clipping_bounds_the_update(self) -> None:
        """AdamW with a huge eps moves by the gradient itself, so the norm of one step shows the clipped norm."""
        settings = ["training.optimizer=adamw", "training.max_steps=1", "training.adamw.eps=1e6"]
        settings += [
            "training.adamw.learning_rate=1e6",
            "training.adamw.weight_decay=0",
            "training.schedule.warmup_steps=0",
        ]
        for limit in (0.01, 0.02):
            result = train_here(RandomSamples(8, 32), *settings, f"training.gradient_clip={limit}")
            begun = new_transformer().state_dict()
            moved = [weight - begun[name] for name, weight in trained_weights(result).items()]
            assert float(nn.utils.get_total_norm(moved)) == pytest.approx(limit, rel=0.05)


class TestSideWork:
    def test_evaluating_and_sampling_do_not_disturb_a_run(self) -> None:
        """With dropout on, whose numbers they would otherwise move."""

        def sampler(model: Transformer) -> str:
            model.eval()
            torch.rand(7)
            return "text"

        def evaluate(model: Transformer, rank: int, world: int) -> FixedLoss:
            model.eval()
            torch.manual_seed(3)
            return FixedLoss()

        quiet = ["model.dropout=0.2", "training.eval_interval=99", "training.keep_best=false"]
        busy = ["model.dropout=0.2", "training.eval_interval=1", "training.sample_interval=1"]
        source = RandomSamples(32, 32)
        left = train_here(source, *quiet)
        right = train_here(source, *busy, sampler=sampler, evaluate=evaluate)
        assert not differing(trained_weights(left), trained_weights(right))
        samples = (right.run_dir / "samples.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in samples] == [{"step": step, "text": "text"} for step in range(1, 9)]

    def test_dropout_differs_from_step_to_step_and_by_seed(self) -> None:
        draws = []
        for seed, step, rank in ((1, 1, 0), (1, 2, 0), (2, 1, 0), (1, 1, 1), (1, 1, 0)):
            randomness.seed_step(seed, step, rank)
            draws.append(torch.rand(4))
        assert torch.equal(draws[0], draws[4])
        assert not any(torch.equal(draws[0], draw) for draw in draws[1:4])


class TestSchedules:
    @given(
        name=st.sampled_from(["wsd", "cosine", "constant"]),
        steps=st.integers(1, 3000),
        warmup=st.integers(0, 400),
        decay=st.floats(0, 1),
        final=st.floats(0, 1),
    )
    def test_rates_rise_through_the_warm_up_and_never_after(
        self, name: Any, steps: int, warmup: int, decay: float, final: float
    ) -> None:
        schedule = ScheduleConfig(name=name, warmup_steps=warmup, decay_fraction=decay, final_fraction=final)
        factors = [rate_factor(schedule, step, steps) for step in range(1, steps + 1)]
        assert all(0 < factor <= 1 for factor in factors[:-1]) and 0 <= factors[-1] <= 1
        rising, after = factors[: warmup - 1 if warmup else 0], factors[max(0, warmup - 1) :]
        if name != "wsd":
            assert rising == sorted(rising)
            assert all(later <= earlier for earlier, later in zip(after, after[1:]))

    def test_wsd_holds_then_falls_in_a_line(self) -> None:
        schedule = ScheduleConfig(name="wsd", warmup_steps=10, decay_fraction=0.4, final_fraction=0.1)
        assert [rate_factor(schedule, step, 100) for step in (1, 5, 10, 60, 61)] == [0.1, 0.5, 1.0, 1.0, 1.0]
        assert rate_factor(schedule, 81, 100) == pytest.approx(0.1 + 0.9 * 0.5)
        assert rate_factor(schedule, 100, 100) == pytest.approx(0.1 + 0.9 / 40)

    def test_cosine_ends_at_its_final_fraction(self) -> None:
        schedule = ScheduleConfig(name="cosine", warmup_steps=10, decay_fraction=0.4, final_fraction=0.1)
        assert rate_factor(schedule, 10, 110) == 1.0
        assert rate_factor(schedule, 60, 110) == pytest.approx(0.55)
        assert rate_factor(schedule, 110, 110) == pytest.approx(0.1)

    def test_short_sequences_come_first(self) -> None:
        short = ShortSequencesConfig(length=64, fraction=0.3)
        lengths = [piece_length(short, step, 10, 256) for step in range(1, 11)]
        assert lengths == [64] * 3 + [256] * 7
        off = ShortSequencesConfig(length=None, fraction=0.3)
        assert piece_length(off, 1, 10, 256) == 256

    def test_windows_reach_the_model_cut_into_pieces(self) -> None:
        model = new_transformer()
        shapes = []
        model.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
        settings = ["training.short_sequences.length=8", "training.short_sequences.fraction=0.5"]
        train_here(RandomSamples(32, 32), *settings, "training.micro_batch_size=4", model=model)
        assert shapes == [(16, 8)] * 8 + [(4, 32)] * 8


class TestDocuments:
    def test_reach_the_model_cut_as_the_tokens_are(self, folder: Path) -> None:
        source, model = opened(folder, "masked", ends=[30, 500, 507, 1400])
        seen: list[tuple[Tensor, Tensor]] = []
        model.register_forward_pre_hook(
            lambda module, inputs, named: seen.append((inputs[0], named["documents"])), with_kwargs=True
        )
        settings = ["training.short_sequences.length=8", "training.short_sequences.fraction=0.5"]
        train_here(source, *settings, "training.micro_batch_size=4", model=model)
        assert [documents.shape for _, documents in seen] == [(16, 8)] * 8 + [(4, 32)] * 8
        samples = [source.sample(index) for index in range(len(source))]
        expected = {tuple(sample[0].tolist()): sample[2].tolist() for sample in samples if len(sample) == 3}
        for tokens, documents in seen[8:]:
            assert [expected[tuple(row)] for row in tokens.tolist()] == documents.tolist()

    def test_masking_them_changes_what_is_learnt(self, folder: Path) -> None:
        runs = []
        for how in ("masked", "masked", "attend_across"):
            source, model = opened(folder, how, ends=list(range(20, 4000, 20)))
            runs.append(trained_weights(train_here(source, model=model)))
        assert not differing(runs[0], runs[1]) and differing(runs[0], runs[2])

    def test_are_masked_in_validation_where_they_are_in_training(self, folder: Path) -> None:
        write_corpus(folder, ends=list(range(20, 4000, 20)))
        jobs = [
            open_pretraining(small_config(f"training.documents={how}", *LIVELY, vocab_size=300), None) for how in HOW
        ]
        model = Transformer(jobs[0].config.model)
        model.init_weights(0)
        across, masked = (evaluator(job)(model, 0, 1).loss for job in jobs)
        tokens = TokenFiles(folder / "corpus/tokens", "val")
        settings: dict[str, Any] = {"context_length": 32, "stride": 32, "batch_size": 1, "device": "cpu"}
        settings["max_tokens"] = jobs[0].config.training.eval_tokens
        assert across == pytest.approx(evaluate_tokens(model, tokens, **settings).loss, rel=1e-6)
        wanted = evaluate_tokens(model, tokens, **settings, document_ends=tokens.document_ends).loss
        assert masked == pytest.approx(wanted, rel=1e-6) and abs(masked - across) > 1e-3


def opened(
    folder: Path, documents: str, ends: list[int], settings: Sequence[str] = ()
) -> tuple[TokenWindows | PackedWindows, Transformer]:
    """The source of a corpus of documents that end there, and a new model for it."""
    if not (folder / "corpus").exists():
        write_corpus(folder, ends=ends)
    config = small_config(*settings, f"training.documents={documents}", vocab_size=300)
    return open_pretraining(config, None).source, Transformer(config.model)


class TestPlan:
    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("training.sequence_length=64", "64 is longer than the model's context_length, 32"),
            (
                "training.short_sequences.length=5",
                r"5 does not divide the sequences of 32 tokens; choose from \[1, 2, 4",
            ),
        ],
    )
    def test_lengths_that_do_not_fit_are_refused(self, setting: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            small_config(setting)

    def test_a_batch_that_cannot_be_dealt_is_refused(self) -> None:
        with pytest.raises(
            UserError, match="batch_size=8 cannot be dealt evenly to 3 processes; choose a multiple of 3"
        ):
            make_plan(small_config(), 100, 3)
        with pytest.raises(UserError, match="batch_warmup.sequences=2 cannot be dealt evenly to 4 processes"):
            make_plan(small_config("training.batch_warmup.sequences=2"), 100, 4)

    @pytest.mark.parametrize(
        ("batch", "micro", "world", "expected"), [(32, 32, 4, 1), (32, 4, 2, 4), (96, 32, 2, 2), (24, 8, 2, 2)]
    )
    def test_micro_batches_are_equal_and_no_larger_than_asked(
        self, batch: int, micro: int, world: int, expected: int
    ) -> None:
        config = small_config(f"training.batch_size={batch}", f"training.micro_batch_size={micro}")
        plan = make_plan(config, 1000, world)
        rows = plan.micro_rows_of(plan.rows)
        assert rows * expected == plan.rows and rows <= micro

    def test_epochs_count_passes_over_the_data(self) -> None:
        config = small_config("training.max_steps=null", "training.epochs=2.5")
        assert make_plan(config, 80, 1).steps == 25
        growing = small_config(
            "training.max_steps=null",
            "training.epochs=2.5",
            "training.batch_warmup.sequences=2",
            "training.batch_warmup.steps=9",
        )
        plan = make_plan(growing, 80, 1)
        assert plan.steps == 30 and plan.sequences_through(plan.steps) == pytest.approx(200, abs=4)

    @given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 40))
    def test_a_batch_grows_in_equal_stages(self, sequences: int, stages: int, steps: int) -> None:
        warmup, batch_size = BatchWarmupConfig(sequences=sequences, steps=steps), sequences * stages
        rows = [batch_rows(warmup, step, batch_size) for step in range(1, steps + 3)]
        assert rows == sorted(rows) and set(rows) <= set(range(sequences, batch_size + 1, sequences))
        assert rows[-2:] == [batch_size] * 2
        lengths = [rows[:steps].count(size) for size in range(sequences, batch_size, sequences)]
        assert not lengths or max(lengths) - min(lengths) <= 1
        for step in range(steps + 3):
            assert sequences_through(warmup, step, batch_size) == sum(rows[:step])

    def test_a_growing_batch_reaches_the_model_in_the_order_of_the_data(self) -> None:
        """With 2, 4, 6, 6, ... rows a step, in passes of at most 3, every sequence comes once and in its place."""
        seen: list[Tensor] = []

        class Watching(Transformer):
            def forward(self, tokens: Tensor, *arguments: Any, **options: Any) -> Any:
                seen.append(tokens)
                return super().forward(tokens, *arguments, **options)

        settings = ("training.batch_size=6", "training.micro_batch_size=3", "training.max_steps=4")
        warmup = ("training.batch_warmup.sequences=2", "training.batch_warmup.steps=2", "training.log_interval=1")
        source, model = RandomSamples(32, 32), Watching(small_config().model)
        model.init_weights(1)
        result = train_here(source, *settings, *warmup, model=model)
        assert [len(tokens) for tokens in seen] == [2, 2, 2, 3, 3, 3, 3]
        with DataLoader(source, batch_size=18, seed=small_config().training.seed) as loader:
            assert torch.equal(torch.cat(seen), next(loader).inputs)
        assert [row["tokens"] for row in metrics(result.run_dir)] == [32 * rows for rows in (2, 6, 12, 18)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said_before_anything_is_written(folder: Path) -> None:
    with pytest.raises(UserError, match="training.device=cuda, but PyTorch finds no GPU here"):
        train_here(RandomSamples(8, 32), "training.device=cuda")
    assert not list(folder.iterdir())


class TestRecord:
    def test_a_run_leaves_its_whole_record(self) -> None:
        result = train_here(RandomSamples(32, 32), "training.run_name=first", draw=True)
        assert result.run_dir == Path("runs/first") and result.steps == result.step == 8
        assert {path.name for path in result.run_dir.iterdir()} == {
            "config.yaml",
            "environment.json",
            "metrics.jsonl",
            "curves.png",
            "result.json",
        }
        rows = metrics(result.run_dir)
        assert [row["step"] for row in rows] == [2, 4, 6, 8]
        assert [row["tokens"] for row in rows] == [512, 1024, 1536, 2048]
        assert [row["validation_loss"] for row in rows] == [None, 5.0, None, 5.0]
        assert all(row["tokens_per_second"] > 0 and row["mfu"] > 0 and row["gradient_norm"] > 0 for row in rows)
        assert rows == sorted(rows, key=lambda row: float(row["seconds"]))
        assert (result.run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
        (environment,) = json.loads((result.run_dir / "environment.json").read_text())
        assert environment["versions"]["torch"] == torch.__version__

    def test_the_saved_configuration_names_the_run_and_loads_back(self) -> None:
        from config.load import load_config

        result = train_here(RandomSamples(32, 32), "training.run_name=null")
        saved = load_config([result.run_dir / "config.yaml"])
        assert saved.training.run_name == result.run_dir.name
        assert saved.model == small_config().model
        assert result.run_dir.name.startswith("demo-20")

    def test_a_second_run_of_the_same_name_gets_another_folder(self) -> None:
        first = train_here(RandomSamples(32, 32), "training.run_name=twin")
        kept = (first.run_dir / "metrics.jsonl").read_bytes()
        second = train_here(RandomSamples(32, 32), "training.run_name=twin")
        assert (first.run_dir, second.run_dir) == (Path("runs/twin"), Path("runs/twin-2"))
        assert (first.run_dir / "metrics.jsonl").read_bytes() == kept

    @pytest.mark.parametrize(("best", "left"), [(True, {4, 10, 12}), (False, {10, 12})])
    def test_the_last_checkpoints_and_the_best_are_kept(self, best: bool, left: set[int]) -> None:
        losses = iter([5.0, 3.0, 4.0, 4.5, 4.0, 3.5])

        @dataclass
        class Evaluation:
            loss: float

        settings = ["training.max_steps=12", "training.checkpoint_interval=2", "training.eval_interval=2"]
        train_here(
            RandomSamples(32, 32),
            *settings,
            f"training.keep_best={str(best).lower()}",
            evaluate=lambda model, rank, world: Evaluation(next(losses)),
        )
        steps = {int(path.stem.rpartition("_")[2]) for path in Path("checkpoints").glob("*.pt")}
        assert steps == left
        last = read_checkpoint(Path("checkpoints/model_step_12.pt"))
        assert last["best"] == {"step": 4, "validation_loss": 3.0}
        assert last["validation_loss"] == 3.5

    def test_a_fresh_run_moves_the_checkpoints_of_others_aside(self) -> None:
        first = train_here(RandomSamples(32, 32), "training.run_name=one")
        weights = trained_weights(first)
        Path("checkpoints/model_step_3.pt").write_bytes(b"no checkpoint")
        Path("checkpoints/finetuned").mkdir()
        train_here(RandomSamples(32, 32), "training.run_name=two", "training.max_steps=4")
        left = {str(path.relative_to("checkpoints")) for path in Path("checkpoints").rglob("*.pt")}
        assert left == {
            "model_step_4.pt",
            "previous/one/model_step_4.pt",
            "previous/one/model_step_8.pt",
            "previous/unreadable/model_step_3.pt",
        }
        assert not differing(read_checkpoint(Path("checkpoints/previous/one/model_step_8.pt"))["model"], weights)

    def test_a_checkpoint_holds_what_the_design_says(self) -> None:
        result = train_here(RandomSamples(32, 32), tokenizer_fingerprint="abc")
        assert result.checkpoint is not None
        state = read_checkpoint(result.checkpoint)
        assert state["format"] == 1 and state["step"] == 8 and state["cursor"] == 64
        assert state["tokenizer_fingerprint"] == "abc" and state["run_name"] == result.run_dir.name
        assert set(state["rng"]) == {"python", "numpy", "torch", "cuda"}
        assert set(state["optimizer"]) == {"muon", "adamw"}
        assert state["config"]["model"]["d_model"] == 32 and state["wandb_id"] is None

    @pytest.mark.slow
    def test_weights_and_biases_falls_back_to_offline_without_a_server(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        result = train_here(RandomSamples(32, 32), "training.wandb.mode=online", "training.run_name=kept")
        assert "127.0.0.1:9 does not answer" in capsys.readouterr().err
        assert list(Path("runs/kept/wandb").glob("offline-run-*/*.wandb"))
        assert result.checkpoint is not None and len(read_checkpoint(result.checkpoint)["wandb_id"]) == 8


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestConsole:
    def test_a_live_line_stays_within_80_columns(self) -> None:
        screen = Terminal()
        console = Console(stream=screen)
        console.progress("step 1/2  " + "x" * 200)
        console.say("a line that stays")
        console.progress("short")
        console.close()
        assert all(len(part) < 80 for line in screen.getvalue().split("\n") for part in line.split("\r"))
        assert "a line that stays\n" in screen.getvalue()

    def test_a_file_gets_plain_lines(self) -> None:
        file = io.StringIO()
        console = Console(stream=file)
        console.progress("step 1/2")
        console.status("nothing for a file")
        console.say("validation")
        console.close()
        assert file.getvalue() == "step 1/2\nvalidation\n"

    def test_other_processes_are_silent(self) -> None:
        file = io.StringIO()
        console = Console(enabled=False, stream=file)
        console.say("one")
        console.progress("two")
        assert file.getvalue() == ""

    @given(st.floats(0, 9.99e14))
    def test_counts_are_short(self, number: float) -> None:
        assert len(count(number)) <= 5

    def test_numbers_as_people_read_them(self) -> None:
        assert [count(x) for x in (0, 999, 1000, 12345, 999_999, 4_100_000, 6.5e9)] == [
            "0",
            "999",
            "1.0k",
            "12.3k",
            "1.0M",
            "4.1M",
            "6.5B",
        ]
        assert [size(x) for x in (520e6, 999.6e6, 1.2e9, 65e9, 139.9e9)] == [
            "520MB",
            "1.0GB",
            "1.2GB",
            "65.0GB",
            "139.9GB",
        ]
        assert [duration(x) for x in (7, 750, 11045, 356400)] == ["0:07", "12:30", "3:04:05", "4d 03:00"]


class TestCompile:
    @pytest.mark.parametrize("autocast", [False, True])
    def test_the_forward_pass_is_one_graph_compiled_once(self, autocast: bool) -> None:
        counter = CompileCounter()
        model = torch.compile(new_transformer(), fullgraph=True, dynamic=False, backend=counter)
        for _ in range(3):
            tokens = torch.randint(0, 100, (2, 32))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                model(tokens, tokens).backward()
        assert counter.frame_count == 1

    @pytest.mark.parametrize(
        ("documents", "settings"),
        [
            ("attend_across", ["training.precision=bf16"]),
            ("masked", ["model.window=6", "model.value_embeddings=all", "model.residual_scaling=true"]),
        ],
    )
    def test_a_run_is_one_graph_for_each_length_whatever_comes_between_its_steps(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, documents: str, settings: list[str]
    ) -> None:
        """`fullgraph` refuses a break; evaluations, checkpoints and new documents must not call for another graph."""
        counter = CompileCounter()
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
        monkeypatch.setattr("shutil.which", lambda name: name)
        torch.compiler.reset()

        def evaluate(model: Transformer, rank: int, world: int) -> FixedLoss:
            model.eval()
            with torch.no_grad():
                model(torch.zeros(3, 20, dtype=torch.int64))
            return FixedLoss()

        source, model = opened(folder, documents, ends=list(range(20, 4000, 20)), settings=settings)
        short = ["training.short_sequences.length=16", "training.short_sequences.fraction=0.5"]
        often = ["training.eval_interval=1", "training.checkpoint_interval=2", "training.micro_batch_size=4"]
        compiled = [*settings, *short, *often, "training.compile=true"]
        train_here(source, *compiled, model=model, evaluate=evaluate)
        assert counter.frame_count == 2

    def test_more_shapes_than_pytorch_allows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It gives up at eight graphs of one function; a batch that grows may have more."""
        counter = CompileCounter()
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))

        def double(x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        fast = compiled(double)
        assert all(fast(torch.ones(rows)).sum() == 2 * rows for rows in range(1, 13))
        assert counter.frame_count == 12

    @pytest.mark.slow
    def test_a_compiled_run_learns_what_an_eager_one_does(self) -> None:
        settings = ["model.n_layers=1", "training.optimizer=adamw"]
        eager = train_here(RandomSamples(32, 32), *settings, "training.compile=false")
        fast = train_here(RandomSamples(32, 32), *settings, "training.compile=true")
        torch.testing.assert_close(trained_weights(fast), trained_weights(eager), rtol=1e-3, atol=1e-4)


class TestCommand:
    def test_trains_and_says_what_to_do_next(self, folder: Path) -> None:
        write_corpus(folder)
        done = command(folder, "train", *SMALL, "training.sample_interval=8", "generation.max_new_tokens=5")
        run_dir = next((folder / "runs").iterdir())
        last = done.stdout.splitlines()[-1]
        assert last == (
            f"Wrote checkpoints/model_step_8.pt and {run_dir.relative_to(folder)}/ (report.html, metrics.jsonl). "
            "Next: python scripts/eval.py"
        )
        assert "step 8/8" in done.stderr and "sample: The " in done.stderr
        rows = metrics(run_dir)
        assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["validation_loss"] < rows[1]["validation_loss"]

    def test_a_mistake_is_one_sentence_and_leaves_nothing_behind(self, folder: Path) -> None:
        done = command(folder, "train", "training.batch_siz=4", status=1)
        assert done.stderr.startswith("error: command line: training.batch_siz=4")
        assert "Did you mean 'batch_size'?" in done.stderr and "Traceback" not in done.stderr
        assert not list(folder.iterdir())

    @pytest.mark.slow
    @pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_finishes_the_step_and_saves(self, folder: Path, number: signal.Signals, status: int) -> None:
        write_corpus(folder)
        settings = [*SMALL, "training.max_steps=100000", "training.run_name=cut", "training.checkpoint_interval=100000"]
        process = start(folder, "train", *settings)
        wait_for(lambda: (folder / "runs/cut/metrics.jsonl").exists(), process)
        process.send_signal(number)
        done = finish(process)
        assert done.returncode == status
        (checkpoint,) = (folder / "checkpoints").glob("*.pt")
        step = int(checkpoint.stem.rpartition("_")[2])
        assert f"Stopped by {number.name} after step {step:,} of 100,000" in done.stdout
        assert (
            done.stdout.splitlines()[-1]
            == f"Go on with: python scripts/train.py --resume checkpoints/{checkpoint.name}"
        )
        assert read_checkpoint(checkpoint)["step"] == step

    @pytest.mark.slow
    @pytest.mark.skipif(not hasattr(__import__("resource"), "prlimit"), reason="needs prlimit")
    def test_a_full_disk_costs_no_checkpoint_and_ends_no_run(self, folder: Path) -> None:
        """A limit on file sizes, set while the run is under way, stands for the full disk."""
        import resource

        write_corpus(folder)
        settings = [*SMALL, "training.max_steps=800", "training.run_name=full", "training.checkpoint_interval=50"]
        process = start(folder, "train", *settings, "training.eval_interval=800", "training.keep_best=false")
        wait_for(lambda: (folder / "checkpoints/model_step_50.pt").exists(), process)
        for each in (process.pid, *(child.pid for child in psutil.Process(process.pid).children())):
            before = resource.prlimit(each, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        there = set((folder / "checkpoints").glob("*.pt"))
        done = finish(process)
        assert before[0] == resource.RLIM_INFINITY
        assert done.returncode == 1
        assert "warning: No space left while writing checkpoints/model_step_" in done.stderr
        assert "step 800/800" in done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: No space left while writing checkpoints/model_step_800.pt")
        left = set((folder / "checkpoints").glob("*.pt*"))
        assert there <= left or len(left) == 2
        assert all(read_checkpoint(path)["run_name"] == "full" for path in left)
