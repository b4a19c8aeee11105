"""Direct preference optimisation: its loss is the field's, its runs are as exact as all others, and it works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from config.errors import UserError
from config.load import load_config
from config.training import DPOConfig
from data.data_loader import Batch
from data.examples.docstrings import docstring_pairs
from data.examples.encoding import encode_examples
from data.examples.pairs import PairSamples
from data.examples.preferences import PreferenceExample
from data.examples.samples import ExampleSamples
from data.tokenization import Tokenizer
from evaluation.pairs import evaluate_margins, measure_margins
from inference.engine import Engine, Request
from inference.sampling import SamplingSettings
from model.checkpoint import load_checkpoint, load_model
from model.huggingface.exporting import to_huggingface
from model.loss import linear_cross_entropy, token_cross_entropy
from model.preferences import preference_loss
from model.transformer import Transformer
from tests.small_runs import differing, metrics
from tests.test_finetuning import QUICK, ROOT, here, write_lines
from tests.workspace import LIVELY, SMALL, make_workspace, small_tokenizer
from training.distributed import Process
from training.objectives import DirectPreference
from training.pretraining import open_pretraining

BETA = 0.3
ANSWERS = [("What is it?", "A dog.", "Jumps over"), ("Who?", "Viktor", "the quick brown fox"), ("And?", "No.", "ü" * 9)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


def model_of(*overrides: str, seed: int = 0) -> Transformer:
    config = load_config([], [*SMALL, *LIVELY, "model.vocab_size=300", "model.context_length=64", *overrides]).model
    model = Transformer(config)
    model.init_weights(seed)
    return model


def conversations() -> list[PreferenceExample]:
    return [
        PreferenceExample(
            f"set.jsonl:{line}",
            ({"role": "user", "content": prompt},),
            ({"role": "assistant", "content": chosen},),
            ({"role": "assistant", "content": rejected},),
        )
        for line, (prompt, chosen, rejected) in enumerate(ANSWERS, start=1)
    ]


def samples_of(tokenizer: Tokenizer, packing: bool = True, times: int = 1) -> PairSamples:
    found = encode_examples(tokenizer, conversations() * times, 64, "refuse")
    return PairSamples(ExampleSamples(found.samples, tokenizer.pad_id, 64), 64, packing)


def objective_of(samples: PairSamples, reference: Transformer, beta: float = BETA, smoothing: float = 0.0) -> Any:
    margins = measure_margins(reference, samples.sides, batch_size=3, device="cpu")
    about: dict[str, Any] = {"reference": {"train": margins}}
    objective = DirectPreference(DPOConfig(beta=beta, label_smoothing=smoothing), about, lambda *_: {})
    objective.begin(reference, Process(0, 1, torch.device("cpu")))
    return objective


def whole_batch(samples: PairSamples) -> Batch:
    parts = zip(*(samples.sample(index) for index in range(len(samples))), strict=True)
    inputs, targets, documents = (torch.from_numpy(np.stack(part)) for part in parts)
    return Batch(inputs.long(), targets.long(), documents)


class TestLossOfTokens:
    @pytest.mark.parametrize("cap", [None, 5.0])
    def test_each_token_has_the_loss_and_the_gradient_that_it_has_in_the_sum(self, cap: float | None) -> None:
        torch.manual_seed(0)
        hidden, weight = torch.randn(2500, 8, requires_grad=True), torch.randn(24, 8, requires_grad=True)
        targets = torch.randint(0, 20, (2500,))
        targets[::7] = -100
        each = token_cross_entropy(hidden, weight, targets, 20, cap)
        assert each.shape == (2500,) and (each[::7] == 0).all()
        chosen = torch.randperm(2500)[:900]
        torch.autograd.backward(each[chosen].sum())
        expected = hidden.grad, weight.grad
        hidden.grad = weight.grad = None
        only = torch.full_like(targets, -100)
        only[chosen] = targets[chosen]
        total = linear_cross_entropy(hidden, weight, only, 20, cap)
        torch.autograd.backward(total)
        torch.testing.assert_close(each[chosen].sum(), total)
        torch.testing.assert_close((hidden.grad, weight.grad), expected, rtol=1e-4, atol=1e-5)


class TestAgainstTrl:
    @pytest.fixture(scope="class")
    @classmethod
    def trainer(cls, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Any:
        """Its trainer, with our models exported and our tokenizer saved, on the same conversations."""
        import transformers
        from datasets import Dataset
        from trl.trainer.dpo_config import DPOConfig as TheirConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        folder = tmp_path_factory.mktemp("trl")
        tokenizer.save(folder)
        rows = [
            {"prompt": list(e.prompt), "chosen": list(e.chosen), "rejected": list(e.rejected)} for e in conversations()
        ]
        return DPOTrainer(
            model=to_huggingface(model_of("model.qk_norm=false", "model.activation=swiglu", seed=1)),
            ref_model=to_huggingface(model_of("model.qk_norm=false", "model.activation=swiglu", seed=2)),
            args=TheirConfig(str(folder), use_cpu=True, beta=BETA, max_length=None, report_to=[], bf16=False),
            train_dataset=Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        )

    def test_the_same_loss_and_gradient_on_the_same_batch(self, trainer: Any, tokenizer: Tokenizer) -> None:
        samples = samples_of(tokenizer)
        model, reference = (model_of("model.qk_norm=false", "model.activation=swiglu", seed=seed) for seed in (1, 2))
        objective, batch = objective_of(samples, reference), whole_batch(samples)
        loss = objective.loss(model, batch.micro_batches(1, samples.length, torch.device("cpu"))[0]) / 3
        loss.backward()
        rows = list(trainer.train_dataset)
        for number, row in enumerate(rows):
            chosen, rejected = samples.pair(number)
            assert [*row["prompt_ids"], *row["chosen_ids"]] == chosen.ids.tolist()
            assert [*row["prompt_ids"], *row["rejected_ids"]] == rejected.ids.tolist()
            assert len(row["chosen_ids"]) == chosen.trained.sum()
        trainer.model.zero_grad()
        theirs = trainer._compute_loss(trainer.model, trainer.data_collator(rows), False)
        theirs.backward()
        assert objective.count(batch) == 3
        assert abs(float(loss.detach()) - 0.693) > 0.05, "models that differ in nothing would prove nothing"
        torch.testing.assert_close(loss, theirs, rtol=1e-4, atol=1e-5)
        ours = model.token_embedding.weight.grad
        assert ours is not None
        torch.testing.assert_close(ours[:300], trainer.model.get_input_embeddings().weight.grad, rtol=1e-3, atol=1e-5)

    def test_label_smoothing_is_its_loss_of_one_pair_that_may_be_the_wrong_way_round(
        self, trainer: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`aot` sorts the pairs of a batch; of one pair, it is conservative DPO."""
        monkeypatch.setattr(trainer, "loss_types", ["aot"])
        monkeypatch.setattr(trainer, "label_smoothing", 0.2)
        samples = samples_of(tokenizer, packing=False)
        model, reference = (model_of("model.qk_norm=false", "model.activation=swiglu", seed=seed) for seed in (1, 2))
        margins, before = (
            measure_margins(each, samples.sides, batch_size=2, device="cpu") for each in (model, reference)
        )
        ours = preference_loss(margins, before, BETA, 0.2)
        for number, row in enumerate(trainer.train_dataset):
            theirs = trainer._compute_loss(trainer.model, trainer.data_collator([row]), False)
            assert float(ours[number]) == pytest.approx(theirs.item(), rel=1e-4)


class TestObjective:
    def gradients(self, model: Transformer, samples: PairSamples, passes: int) -> list[Tensor]:
        model.zero_grad()
        objective, batch = objective_of(samples, model_of(seed=2)), whole_batch(samples)
        total = objective.count(batch)
        for part in batch.micro_batches(passes, samples.length, torch.device("cpu")):
            (objective.loss(model, part) / total).backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    def test_packed_pairs_and_any_micro_batch_give_the_same_gradients(self, tokenizer: Tokenizer) -> None:
        model = model_of(seed=1)
        alone = samples_of(tokenizer, packing=False, times=2)
        packed = samples_of(tokenizer, packing=True, times=2)
        assert len(packed) < len(alone) == 6
        expected = self.gradients(model, alone, 1)
        assert max(float(each.abs().max()) for each in expected) > 1e-3
        for found in (self.gradients(model, alone, 3), self.gradients(model, packed, 1)):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)

    def test_a_pair_twice_in_a_batch_counts_twice(self, tokenizer: Tokenizer) -> None:
        """As where one epoch ends and the next begins."""
        samples = samples_of(tokenizer)
        objective, batch = objective_of(samples, model_of(seed=2)), whole_batch(samples)
        twice = Batch(*(torch.cat([part, part]) for part in batch if part is not None))
        losses = []
        for each in (batch, twice):
            (part,) = each.micro_batches(1, samples.length, torch.device("cpu"))
            losses.append(float(objective.loss(model_of(seed=1), part).detach()) / objective.count(each))
        assert objective.count(twice) == 6
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_margins_are_the_same_bits_however_many_processes_measure(self, tokenizer: Tokenizer) -> None:
        samples, model = samples_of(tokenizer, times=3), model_of()
        whole = measure_margins(model, samples.sides, batch_size=4, device="cpu")
        shares: list[Tensor] = []
        for rank in range(3):
            options: Any = {"rank": rank, "world_size": 3, "all_reduce": lambda found: shares.append(found.clone())}
            measure_margins(model, samples.sides, batch_size=4, device="cpu", **options)
        summed = torch.stack(shares).sum(0)
        assert (summed[1] == 1).all(), "every side is measured once"
        chosen, rejected = summed[0].view(-1, 2).unbind(1)
        assert torch.equal((chosen - rejected).float(), whole)
        assert len(whole) == 9 and len(set(whole.tolist())) >= 3

    def test_the_figures_of_an_evaluation(self) -> None:
        found = evaluate_margins(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 0.0]), 0.5, 0.0)
        assert found.reward_accuracy == pytest.approx(1 / 3)
        assert found.reward_margin == pytest.approx((1.0 - 0.5) / 3)
        assert found.loss == pytest.approx(float(-torch.tensor([1.0, -0.5, 0.0]).sigmoid().log().mean()), rel=1e-6)


REVERSED = ["--config", str(ROOT / "config/recipes/dpo.yaml"), "--dataset", "pairs.jsonl"]
LEARNING = [
    *(each for each in QUICK if "learning_rate" not in each),
    "training.adamw.learning_rate=0.003",
    "training.epochs=3",
    "training.checkpoint_interval=10",
    "training.keep_last=99",
    "training.precision=fp32",
    "training.adamw.eps=1e-4",
]


def pairs_folder(folder: Path, count: int = 100) -> Path:
    """A model, and real sentences that are preferred to the same words in reverse."""
    make_workspace(folder, "model.context_length=64", "model.init_std=0.05")
    rows = []
    library = Path(os.__file__).parent
    modules = [library / f"{name}.py" for name in ("argparse", "ast", "inspect", "os", "statistics", "threading")]
    for signature, sentence in docstring_pairs(modules):
        words = sentence.split()
        rows.append({"prompt": signature[-20:], "chosen": sentence[:40], "rejected": " ".join(words[::-1])[:40]})
    write_lines(folder / "pairs.jsonl", *[row for row in rows if row["chosen"] != row["rejected"]][:count])
    return folder


@pytest.fixture(scope="module")
def preferring(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder after DPO through the real command, and what that printed."""
    folder = pairs_folder(tmp_path_factory.mktemp("dpo"))
    status, output, errors = here(folder, *REVERSED, *LEARNING)
    assert status == 0, errors
    return folder, output


class TestCommand:
    def test_the_margin_of_held_out_pairs_grows(self, preferring: tuple[Path, str]) -> None:
        folder, output = preferring
        (run,) = (folder / "runs").iterdir()
        rows = [row for row in metrics(run) if row["validation_loss"] is not None]
        assert rows[-1]["reward_margin"] > 0.05 and rows[-1]["reward_accuracy"] > 0.7
        assert rows[-1]["validation_loss"] < 0.69
        assert "held-out pairs: 0.6931 before" in output and "the chosen answer has gained" in output
        assert "pairs to train on" in output

    def test_the_checkpoint_generates(self, preferring: tuple[Path, str]) -> None:
        folder, output = preferring
        path = max((folder / "checkpoints/preferred").glob("*.pt"), key=lambda each: int(each.stem.split("_")[-1]))
        model, info = load_model(path)
        assert info.finetuning is not None and info.finetuning["format"] == "prompt-completion"
        request = Request(small_tokenizer().encode("def f():"), 5, SamplingSettings(temperature=0.0))
        assert list(Engine(model, small_tokenizer(), 1).generate([request]))
        assert "scripts/generate.py --checkpoint checkpoints/preferred/" in output.splitlines()[-1]

    def test_a_resumed_run_is_held_against_the_same_reference(
        self, preferring: tuple[Path, str], tmp_path: Path
    ) -> None:
        """Bit for bit, and without the checkpoint it once began with."""
        folder = tmp_path / "copy"
        shutil.copytree(preferring[0], folder)
        checkpoints = folder / "checkpoints/preferred"
        steps = sorted(int(path.stem.split("_")[-1]) for path in checkpoints.glob("*.pt"))
        (folder / "checkpoints/model_step_7.pt").unlink()
        whole = load_checkpoint(checkpoints / f"model_step_{steps[-1]}.pt")
        (run,) = (folder / "runs").iterdir()
        rows = metrics(run)
        written = checkpoints / f"model_step_{steps[-1]}.pt"
        began = written.stat().st_mtime_ns
        status, _, errors = here(folder, "--resume", str(checkpoints.relative_to(folder) / f"model_step_{steps[0]}.pt"))
        assert status == 0 and len(steps) > 1 and written.stat().st_mtime_ns > began, errors
        resumed = load_checkpoint(checkpoints / f"model_step_{steps[-1]}.pt")
        for key in ("model", "optimizer", "finetuning"):
            assert not differing(whole[key], resumed[key], key)
        measured = [
            [row[key] for key in ("loss", "validation_loss", "reward_accuracy", "reward_margin")] for row in rows
        ]
        assert measured == [
            [row[key] for key in ("loss", "validation_loss", "reward_accuracy", "reward_margin")]
            for row in metrics(run)
        ]

    def test_other_pairs_to_validate_on_are_refused_on_resume(
        self, preferring: tuple[Path, str], tmp_path: Path
    ) -> None:
        folder = tmp_path / "copy"
        shutil.copytree(preferring[0], folder)
        write_lines(folder / "val.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
        status, _, errors = here(
            folder, "--resume", "checkpoints/preferred", "--validation", "val.jsonl", "training.epochs=9"
        )
        assert status == 1 and "pairs to validate on are not those that the run began with" in errors

    def test_the_page_tells_what_the_loss_is(self, preferring: tuple[Path, str]) -> None:
        (run,) = (preferring[0] / "runs").iterdir()
        page = (run / "report.html").read_text()
        assert "held-out loss of DPO, nats per pair" in page and "reward accuracy" in page and "reward margin" in page

    def test_preview_shows_both_answers(self, preferring: tuple[Path, str]) -> None:
        status, output, _ = here(preferring[0], "--dataset", "pairs.jsonl", "--preview", "1")
        assert status == 0 and output.count("\u27e6") == 3 and "rejected: \u27e6" in output

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--dataset", "pairs.jsonl"], "To prefer the chosen ones (DPO): --config config/recipes/dpo.yaml"),
            (["--dataset", "text.jsonl", "training.objective=dpo"], "text.jsonl has none: nothing in it is chosen"),
            (["--dataset", "pairs.jsonl", "training.objective=dpo", "training.z_loss=0.1"], "z_loss: goes with"),
            (["--dataset", "pairs.jsonl", "training.objective=dpo", "training.tensor_parallel=2"], "tensor_parallel=1"),
            (["--dataset", "pairs.jsonl", "training.dpo.label_smoothing=0.5"], "training.dpo.label_smoothing"),
        ],
    )
    def test_what_does_not_go_together(self, preferring: tuple[Path, str], arguments: list[str], message: str) -> None:
        write_lines(preferring[0] / "text.jsonl", {"text": "a"}, {"text": "b"})
        status, _, errors = here(preferring[0], *arguments)
        assert status == 1 and message in errors

    def test_it_is_no_objective_of_pre_training(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match="training.objective=dpo is for pairs of answers"):
            open_pretraining(load_config([], ["training.objective=dpo"]), None)

    def test_chosen_answers_alone(self, preferring: tuple[Path, str], tmp_path: Path) -> None:
        folder = pairs_folder(tmp_path, 12)
        words = ["--map", "completion=chosen", "training.epochs=1"]
        status, output, _ = here(folder, "--dataset", "pairs.jsonl", *words, *QUICK)
        assert status == 0 and "held-out examples" in output

    def weights(self, folder: Path, name: str, *settings: str, processes: int = 1) -> dict[str, Tensor]:
        """After two steps, without what AdamW makes of rounding errors."""
        words = [*REVERSED, *LEARNING, f"training.checkpoint_dir=of-{name}", "training.adamw.eps=0.01", *settings]
        words += ["training.epochs=null", "training.max_steps=2", "data.finetuning.packing=false"]
        if processes > 1:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*torchrun, str(ROOT / "scripts/finetune.py"), *words],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=900,
            )
            assert done.returncode == 0, done.stderr
        else:
            status, _, errors = here(folder, *words)
            assert status == 0, errors
        (path,) = (folder / f"of-{name}").glob("model_step_2*")
        model, info = load_model(path)
        assert info.finetuning is not None
        reference = info.finetuning["reference"]
        return {**model.state_dict(), **{key: reference[key] for key in ("train", "validation")}}

    def test_the_same_update_in_any_micro_batch(self, tmp_path: Path) -> None:
        folder = pairs_folder(tmp_path, 20)
        expected = self.weights(folder, "whole")
        for size in ("2", "auto"):
            found = self.weights(folder, size, f"training.micro_batch_size={size}")
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
            assert torch.equal(found["train"], expected["train"])

    @pytest.mark.slow
    @pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
    def test_two_processes_are_one(self, tmp_path: Path, parallelism: str) -> None:
        folder = pairs_folder(tmp_path, 20)
        expected = self.weights(folder, "one")
        found = self.weights(folder, "two", f"training.parallelism={parallelism}", processes=2)
        assert torch.equal(found["train"], expected["train"])
        assert torch.equal(found["validation"], expected["validation"])
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
