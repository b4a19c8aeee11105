"""The adapter of a checkpoint in `peft`'s format, for the model that `--to huggingface` makes of its base.

GPT-2 has one matrix for queries, keys and values. Their adapters side by side are one of the summed rank, which reads
with all of the thin matrices that go down, and writes with those that go up, each to its own rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config.errors import UserError
from config.files import write_text
from config.model import ModelConfig
from config.training import AdapterConfig
from inference.exporting.replacing import check_replaceable, replacing
from inference.exporting.subject import Subject, check_room
from model.checkpoint import checkpoint_config, load_checkpoint
from model.huggingface.names import LLAMA, QKV, gpt2_names

_OURS = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
_ROOM = 1_000_000  # bytes for all but the weights


@dataclass(frozen=True, slots=True)
class Pair:
    """The adapter of one matrix `(out, in)`: `down` `(rank, in)`, `up` `(out, rank)`, DoRA's `magnitude` `(out,)`."""

    down: Tensor
    up: Tensor
    magnitude: Tensor | None


def check_adapter(target: Path, force: bool) -> None:
    """Raise `UserError` where `target` must not become the folder: it exists, and without `force` or as no adapter."""
    check_replaceable(target, force, _OURS.__contains__)


def write_adapter(subject: Subject, target: Path) -> str:
    """Make `target` the folder of the adapter in the checkpoint of `subject`, all at once; returns what it is.

    Raises `UserError` where that holds none.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    path = subject.info.path
    state = load_checkpoint(path)
    if "adapter" not in state:
        raise UserError(f"{path} holds no adapter: it was not trained with training.adapter.method=lora or dora.")
    settings = checkpoint_config(path, state).training.adapter
    pairs = _their_pairs(_our_pairs(state["adapter"]), state["model"], subject.config)
    count = sum(pair.down.numel() + pair.up.numel() for pair in pairs.values())
    check_room(target, 4 * count + _ROOM)
    wider = {_suffix(name): len(pair.down) for name, pair in pairs.items() if len(pair.down) != settings.rank}
    asked = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        use_dora=settings.method == "dora",
        target_modules=sorted({_suffix(name) for name in pairs}),
        rank_pattern=wider,
        alpha_pattern={name: settings.alpha * rank / settings.rank for name, rank in wider.items()},
        fan_in_fan_out=subject.config.position == "learned",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for what has another name by now
        adapted: Any = get_peft_model(subject.theirs, asked, autocast_adapter_dtype=False)
    layers = {name: module for name, module in subject.theirs.named_modules() if isinstance(module, LoraLayer)}
    assert layers.keys() == pairs.keys()
    with torch.no_grad():
        for name, pair in pairs.items():
            _fill(layers[name], pair)
    with replacing(target) as folder:
        adapted.save_pretrained(folder, save_embedding_layers=False)
        write_text(folder / "README.md", _page(subject, settings, target.name, state["finetuning"]))
    return f"{settings.title} of rank {settings.rank} for {subject.architecture}, {count:,} weights"


def _our_pairs(tensors: Mapping[str, Tensor]) -> dict[str, Pair]:
    """The adapters by the names of our matrices."""
    names = {name.partition(".lora_")[0] for name in tensors}
    return {
        name: Pair(
            tensors[f"{name}.lora_A.weight"],
            tensors[f"{name}.lora_B.weight"],
            tensors.get(f"{name}.lora_magnitude_vector.weight"),
        )
        for name in sorted(names)
    }


def _their_pairs(ours: dict[str, Pair], weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Pair]:
    """The adapters by the names of their matrices; `weights` are those of the model, merged."""
    theirs: dict[str, Pair] = {}
    names = gpt2_names(config) if config.position == "learned" else {}  # the others keep the matrices apart
    for name, pair in ours.items():
        _, layer, own = name.split(".", 2)
        if not names:
            theirs[f"model.layers.{layer}.{LLAMA.block[own]}"] = pair
        elif name in names:
            theirs[names[name]] = pair
        else:
            parts = [f"blocks.{layer}.attention.{part}" for part in QKV]
            fused = _side_by_side([(ours.get(part), weights[f"{part}.weight"]) for part in parts])
            theirs[f"transformer.h.{layer}.attn.c_attn"] = fused
    return theirs


def _side_by_side(parts: list[tuple[Pair | None, Tensor]]) -> Pair:
    """The adapter of matrices `(out, in)` that are one, each with its own adapter or none."""
    present = [pair for pair, _ in parts if pair is not None]
    blocks = [torch.zeros(len(weight), 0) if pair is None else pair.up for pair, weight in parts]
    magnitude = None
    if present[0].magnitude is not None:
        # A matrix without an adapter keeps the lengths that its rows have.
        lengths = [weight.norm(dim=1) if pair is None else pair.magnitude for pair, weight in parts]
        magnitude = torch.cat([length for length in lengths if length is not None])
    up: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return Pair(torch.cat([pair.down for pair in present]), up, magnitude)


def _suffix(name: str) -> str:
    """The end of a layer's name that is the same in every block, and tells it from the others there."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].startswith("c_") else parts[-1:])


def _fill(layer: Any, pair: Pair) -> None:
    layer.lora_A["default"].weight.copy_(pair.down)
    layer.lora_B["default"].weight.copy_(pair.up)
    if pair.magnitude is not None:
        layer.lora_magnitude_vector["default"].weight.copy_(pair.magnitude)


def _page(subject: Subject, settings: AdapterConfig, name: str, about: Mapping[str, Any]) -> str:
    quantized = f", stored in {settings.quantize} while it was trained" if settings.quantize else ""
    return f"""---
library_name: peft
pipeline_tag: text-generation
---

# {subject.name}: {settings.title} of rank {settings.rank}

An adapter for the model{quantized} that this writes:

```bash
python scripts/export.py --to huggingface base --checkpoint {about["start"]}
```

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "{name}")
```

SHA-256 of the weights that it was trained beside: {about["base_fingerprint"]}
"""
