"""Adapters: what is trained and what stays, what a checkpoint holds, and the commands that take it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from scipy.stats import norm
from torch import Tensor

from config.errors import UserError
from config.load import load_config
from config.training import AdapterConfig
from model.checkpoint import load_checkpoint, load_model, save_checkpoint
from model.checkpoint_folder import latest_checkpoint
from model.quantized import Kind, QuantizedLinear, normal_levels
from model.transformer import Transformer
from scripts.export import export
from tests.small_runs import new_transformer
from tests.test_finetuning import ANIMALS, QUICK, ROOT, fresh, here, write_lines
from tests.workspace import make_workspace
from training.adapters import adapt, adapter_tensors, is_adapted, merged_weights, weights_state

LIVELY = ["model.zero_init_projections=false", "model.init_std=0.3"]
KINDS = {
    "modern": ["model.activation=swiglu", "model.value_embeddings=alternate"],
    "gpt2": ["model.bias=true", "model.activation=gelu", "model.norm=layernorm", "model.tie_embeddings=true"],
}


def adapter(**settings: Any) -> AdapterConfig:
    """The defaults of the YAML, as LoRA of rank 4, with `settings`."""
    given = {"method": "lora", "rank": 4, "alpha": 8.0, **settings}
    return AdapterConfig.model_validate({**load_config([], []).training.adapter.model_dump(), **given})


def stir(model: Transformer) -> None:
    """Give every weight of the adapter a value as after some training: one that does something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in adapter_tensors(model).values():
            value.add_(0.2 * torch.randn(value.shape, generator=generator))


def tokens(model: Transformer) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    assert model.config.vocab_size is not None
    return torch.randint(0, model.config.vocab_size, (2, 24), generator=generator)


class TestAdapting:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("quantize", [None, "nf4"])
    @pytest.mark.parametrize("method", ["lora", "dora"])
    def test_merged_weights_give_the_same_logits(self, kind: str, method: str, quantize: Kind | None) -> None:
        model = new_transformer(*LIVELY, *KINDS[kind])
        plain = new_transformer(*LIVELY, *KINDS[kind])
        ids = tokens(model)
        with torch.no_grad():
            before = model(ids)
            adapt(model, adapter(method=method, quantize=quantize), seed=0)
            begun = model(ids)
            stir(model)
            after = model(ids)
            plain.load_state_dict(merged_weights(model))
            assert quantize is not None or (begun - before).abs().max() < 1e-5
            assert (after - begun).abs().max() > 0.1
            assert (plain(ids) - after).abs().max() < 1e-5 * after.abs().max()

    @pytest.mark.parametrize("method", ["lora", "dora"])
    def test_the_forward_pass_is_that_of_peft(self, method: str) -> None:
        """With dropout, too, drawn from the same seed."""
        from peft import LoraConfig, inject_adapter_in_model

        ours, theirs = new_transformer(*LIVELY), new_transformer(*LIVELY)
        adapt(ours, adapter(method=method, dropout=0.3), seed=0)
        stir(ours)
        names = sorted({name.rpartition(".lora")[0] for name in adapter_tensors(ours)})
        settings = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, use_dora=method == "dora", target_modules=names)
        inject_adapter_in_model(settings, theirs)
        theirs.load_state_dict(ours.state_dict())
        losses, gradients = [], []
        for model in (ours, theirs):
            torch.manual_seed(0)
            loss = model.train()(tokens(model), tokens(model))
            loss.backward()
            losses.append(loss.item())
            gradients.append({name: value.grad for name, value in model.named_parameters() if value.requires_grad})
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        for name, gradient in gradients[1].items():
            assert gradient is not None
            torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))

    def test_targets_are_the_matrices_that_are_named(self) -> None:
        model = new_transformer(*KINDS["modern"])
        adapt(model, adapter(targets=["query", "gate"]), seed=0)
        assert {name.split(".")[-2] for name in adapter_tensors(model)} == {"lora_A", "lora_B"}
        assert {name.split(".")[3] for name in adapter_tensors(model)} == {"query", "gate"}
        whole = new_transformer(*KINDS["modern"])
        adapt(whole, adapter(), seed=0)
        names = {name.split(".")[3] for name in adapter_tensors(whole)}
        assert names == {"query", "key", "value", "output", "gate", "up", "down"}

    def test_the_first_weights_depend_on_the_seed_alone(self) -> None:
        models = [new_transformer() for _ in range(3)]
        for number, (model, seed) in enumerate(zip(models, (5, 5, 6), strict=True)):
            torch.manual_seed(number)
            adapt(model, adapter(), seed=seed)
        first, same, other = (adapter_tensors(model) for model in models)
        assert all(torch.equal(first[name], same[name]) for name in first)
        assert not all(torch.equal(first[name], other[name]) for name in first)

    def test_frozen_weights_count_for_less_work(self) -> None:
        model, adapted = new_transformer(), new_transformer()
        adapt(adapted, adapter(quantize="int4"), seed=0)
        added = sum(value.numel() for value in adapter_tensors(adapted).values())
        assert adapted.num_parameters() == model.num_parameters() + added
        weights = model.num_parameters(non_embedding=True)
        saved = model.flops_per_token(32) - adapted.flops_per_token(32)
        assert saved == 2 * weights - 6 * added

    @pytest.mark.slow
    @pytest.mark.parametrize(("method", "quantize"), [("dora", None), ("lora", "nf4")])
    def test_it_compiles_to_one_graph(self, method: str, quantize: Kind | None) -> None:
        model = new_transformer(*LIVELY, "model.n_layers=1")
        adapt(model, adapter(method=method, quantize=quantize), seed=0)
        stir(model)
        gradients = []
        for forward in (model, torch.compile(model, fullgraph=True)):
            forward(tokens(model), tokens(model)).backward()
            gradients.append([value.grad.clone() for value in model.parameters() if value.grad is not None])
            model.zero_grad()
        for eager, compiled in zip(*gradients, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


class TestQuantizedBase:
    def test_the_levels_of_nf4_are_those_of_the_paper(self) -> None:
        tail = 0.9677083
        above = [norm.ppf(tail + (0.5 - tail) * place / 8) for place in range(8)]
        below = [-norm.ppf(tail + (0.5 - tail) * place / 7) for place in range(7)]
        expected = torch.tensor(sorted([*above, 0.0, *below])) / max(above)
        torch.testing.assert_close(normal_levels(), expected.float(), rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize(("kind", "bits", "error"), [("int8", 8.1, 1e-4), ("int4", 4.6, 8e-3), ("nf4", 4.3, 9e-3)])
    def test_memory_error_and_gradient(self, kind: Kind, bits: float, error: float) -> None:
        generator = torch.Generator().manual_seed(0)
        weight, bias = torch.randn(96, 640, generator=generator), torch.randn(96, generator=generator)
        layer = QuantizedLinear(weight, bias, kind)
        assert 8 * (layer.numbers.nbytes + layer.scales.nbytes) / weight.numel() < bits
        assert (layer.whole() - weight).square().mean() < error
        x = torch.randn(5, 640, generator=generator, requires_grad=True)
        kept: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held):
            y = layer(x)
        grad = torch.randn(5, 96, generator=generator)
        y.backward(grad)
        torch.testing.assert_close(y, x @ layer.whole().T + bias)
        torch.testing.assert_close(x.grad, grad @ layer.whole())
        assert sum(tensor.nbytes for tensor in kept) < weight.nbytes / 3, "the whole weights were kept"

    def test_a_width_that_is_no_multiple_of_a_group(self) -> None:
        weight = torch.randn(8, 70, generator=torch.Generator().manual_seed(0))
        layer = QuantizedLinear(weight, None, "nf4")
        assert layer.whole().shape == (8, 70)
        assert (layer.whole() - weight).abs().max() < 0.5


LORA = ["training.adapter.method=lora", "training.adapter.rank=4", "training.adapter.dropout=0.1"]
LASTING = ["training.epochs=30", "training.checkpoint_interval=10", "training.keep_last=9"]


@pytest.fixture(scope="module", params=["lora", pytest.param("dora-nf4", marks=pytest.mark.slow)])
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder after fine-tuning an adapter, and what the command printed."""
    folder = fresh(tmp_path_factory.mktemp("adapted"))
    pairs = [{"prompt": f"So the {animal} said", "completion": f" {sound}!"} for animal, sound in ANIMALS.items()]
    write_lines(folder / "val.jsonl", *pairs)
    more = ["training.adapter.method=dora", "training.adapter.quantize=nf4"] if request.param == "dora-nf4" else []
    files = ["--dataset", "animals.jsonl", "--validation", "val.jsonl"]
    status, output, errors = here(folder, *files, *QUICK, *LORA, *LASTING, *more)
    assert status == 0, errors
    return folder, output


class TestCommand:
    def test_the_base_stays_and_the_loss_falls(self, tuned: tuple[Path, str]) -> None:
        folder, output = tuned
        before = load_checkpoint(folder / "checkpoints/model_step_7.pt")["model"]
        state = load_checkpoint(folder / "checkpoints/finetuned/model_step_30.pt")
        assert state["model"].keys() == before.keys()
        still = {name for name, value in before.items() if torch.equal(value, state["model"][name])}
        assert still == {name for name in before if "norm" in name or "embedding" in name or name == "head.weight"}
        assert " of rank 4: " in output and " weights are trained, " in output
        found = [float(word) for word in output.split("held-out examples: ")[1].replace(",", " ").split()[:3:2]]
        assert found[1] < found[0] - 0.5
        moments = [entry["exp_avg"].numel() for entry in state["optimizer"]["adamw"]["state"].values()]
        assert sum(moments) == sum(value.numel() for value in state["adapter"].values())

    def test_a_resumed_run_ends_in_the_same_bits(self, tuned: tuple[Path, str], tmp_path: Path) -> None:
        """With dropout on; the settings are those of the checkpoint."""
        folder = tmp_path / "copy"
        shutil.copytree(tuned[0], folder)
        last = folder / "checkpoints/finetuned/model_step_30.pt"
        whole = load_checkpoint(last)
        last.unlink()
        status, output, errors = here(folder, "--resume", "checkpoints/finetuned/model_step_10.pt")
        assert status == 0, errors
        resumed = load_checkpoint(last)
        for part in ("model", "adapter"):
            assert all(torch.equal(whole[part][name], resumed[part][name]) for name in whole[part])
        assert (
            output.split("held-out examples: ")[1].split(" (")[0]
            == tuned[1].split("held-out examples: ")[1].split(" (")[0]
        )

    def test_an_adapter_for_another_base_is_refused(self, tuned: tuple[Path, str], tmp_path: Path) -> None:
        folder = tmp_path / "copy"
        shutil.copytree(tuned[0], folder)
        base = folder / "checkpoints/model_step_7.pt"
        state = load_checkpoint(base)
        weights = {name: value.clone() for name, value in state["model"].items()}
        weights["blocks.0.attention.query.weight"][0, 0] += 1e-3
        save_checkpoint(base, {**state, "model": weights})
        resume = ["--resume", "checkpoints/finetuned/model_step_10.pt"]
        status, _, errors = here(folder, *resume)
        assert status == 1
        assert "is an adapter for another base" in errors and "Traceback" not in errors
        base.unlink()
        status, _, errors = here(folder, *resume)
        assert status == 1
        assert "is an adapter for checkpoints/model_step_7.pt, which is not there any more" in errors
        status, _, errors = here(folder, *resume, "training.adapter.rank=8")
        assert "was trained with training.adapter.rank=4" in errors

    def test_the_checkpoint_is_an_ordinary_one(self, tuned: tuple[Path, str]) -> None:
        model, info = load_model(tuned[0] / "checkpoints/finetuned/model_step_30.pt")
        assert not is_adapted(model)
        assert info.finetuning is not None and info.finetuning["format"] == "prompt-completion"
        assert weights_state(model).keys() == {"model"}


@pytest.mark.slow
def test_processes_and_micro_batches_make_the_same_update(tmp_path: Path) -> None:
    """Promise 3. A large eps keeps AdamW from making a step of the sign of a rounding error."""
    folder = fresh(tmp_path)
    pairs = [{"prompt": f"{number}", "completion": "~" * (1 + 9 * (number % 4))} for number in range(20)]
    write_lines(folder / "set.jsonl", *pairs)
    common = [*QUICK, *LORA, "training.adapter.dropout=0", "training.adamw.eps=0.01", "training.epochs=2"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = []
    for size in (8, 2):
        own = ["training.precision=fp32", f"training.micro_batch_size={size}", f"training.checkpoint_dir=of-{size}"]
        words = ["--dataset", "set.jsonl", *common, *own]
        command = [sys.executable, *launcher, str(ROOT / "scripts/finetune.py"), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if size == 8:
            status, output, errors = here(folder, *words)
        else:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=environment)
            status, output, errors = done.returncode, done.stdout, done.stderr
        assert status == 0, errors
        assert output.count("weights are trained") == 1
        found.append(load_checkpoint(latest_checkpoint(folder / f"of-{size}")))
    assert found[0]["step"] == found[1]["step"] > 2
    for part in ("model", "adapter"):
        for name, value in found[0][part].items():
            torch.testing.assert_close(found[1][part][name], value, rtol=1e-4, atol=1e-6)


GPT2 = ["position=learned", "norm=layernorm", "activation=gelu", "bias=true", "qk_norm=false", "tie_embeddings=true"]
LLAMA = ["activation=swiglu", "qk_norm=false", "n_kv_heads=1"]


def adapted_workspace(folder: Path, shape: list[str], *settings: str) -> Transformer:
    """A base and, as step 8 after it, the checkpoint of an adapter that does something; the adapted model."""
    settings = ("method=lora", "rank=4", *settings)
    training = ["training.optimizer=adamw", *[f"training.adapter.{setting}" for setting in settings]]
    workspace = make_workspace(folder, *[f"model.{setting}" for setting in shape], *training)
    model, state = workspace.model, load_checkpoint(workspace.checkpoint)
    adapt(model, workspace.config.training.adapter, seed=0)
    stir(model)
    about = {"format": "text", "start": "checkpoints/model_step_7.pt", "base_fingerprint": "f00d"}
    saved = {**state, **weights_state(model), "step": 8, "finetuning": about}
    save_checkpoint(folder / "checkpoints/model_step_8.pt", saved)
    return model


class TestExport:
    @pytest.mark.parametrize(
        ("shape", "settings"),
        [
            ([], []),
            pytest.param(LLAMA, ["method=dora"], marks=pytest.mark.slow),
            pytest.param(GPT2, [], marks=pytest.mark.slow),
            (GPT2, ["method=dora", "targets=[query, value, output]"]),
        ],
    )
    def test_peft_gives_the_same_logits_on_the_exported_base(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: list[str], settings: list[str]
    ) -> None:
        from peft import PeftModel

        monkeypatch.chdir(tmp_path)
        model = adapted_workspace(tmp_path, shape, *settings)
        export(Path("base"), checkpoint="checkpoints/model_step_7.pt")
        export(Path("adapter"), to="adapter")
        names = {path.name for path in Path("adapter").iterdir()}
        assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert "model_step_7.pt" in Path("adapter/README.md").read_text()
        ids = tokens(model)
        with torch.no_grad():
            ours = load_model(tmp_path / "checkpoints/model_step_8.pt")[0](ids)
            base = transformers.AutoModelForCausalLM.from_pretrained("base")
            before = base(ids).logits
            theirs = PeftModel.from_pretrained(base, "adapter")(ids).logits
        assert (before - ours).abs().max() > 0.1
        assert (theirs - ours).abs().max() < 1e-4

    def test_what_holds_no_adapter_or_must_not_be_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        adapted_workspace(tmp_path, [])
        with pytest.raises(UserError, match="model_step_7.pt holds no adapter"):
            export(Path("adapter"), to="adapter", checkpoint="checkpoints/model_step_7.pt")
        assert not Path("adapter").exists()
        export(Path("adapter"), to="adapter")
        with pytest.raises(UserError, match="adapter exists. Add --force"):
            export(Path("adapter"), to="adapter")
        export(Path("adapter"), to="adapter", force=True)
        Path("adapter/mine.txt").write_text("kept")
        with pytest.raises(UserError, match="holds other files"):
            export(Path("adapter"), to="adapter", force=True)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                ["training.adapter.quantize=nf4"],
                "training.adapter.quantize: a quantized model is trained by an adapter",
            ),
            (["training.adapter.method=lora"], "training.optimizer: adapters are trained by adamw"),
            ([*LORA, "training.optimizer=adamw", "training.parallelism=fsdp"], "training.parallelism: adapters are"),
            (
                [*LORA, "training.optimizer=adamw", "training.fp8=true"],
                "training.fp8: adapters are trained with fp8=false",
            ),
            (["training.adapter.targets=[gate]"], "model.activation=squared_relu has no gate"),
            (["training.adapter.targets=[quary]"], "quary"),
            (["training.adapter.quantize=int2"], "choose 'int8', 'int4' or 'nf4'"),
        ],
    )
    def test_settings_that_do_not_go_together(self, settings: list[str], message: str) -> None:
        with pytest.raises(UserError) as caught:
            load_config([], settings)
        assert message in str(caught.value)
