"""A checkpoint made ready to generate from: the one way in for every command that does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING

import torch

from config.errors import UserError
from config.schema import Config
from data.tokenization.matching import matching_tokenizer
from inference.cpu import CPUModel
from inference.memory import settle_
from inference.quantization import quantize_
from inference.runners import SMALL, Chunk, CPURunner
from model.cache import KVCache
from model.checkpoint import CheckpointInfo, load_model
from model.checkpoint_folder import resolve_checkpoint
from model.devices import DTYPES, automatic_precision, choose_device
from model.transformer import Transformer

if TYPE_CHECKING:
    from data.tokenization import Tokenizer

SLOW = 5.0  # seconds; machine code from an earlier run is loaded in less


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in evaluation mode on its device, and the tokenizer it was trained with.

    `chat` tells whether it was fine-tuned on messages and so answers in the tokenizer's chat template.
    """

    model: Transformer
    tokenizer: Tokenizer
    chat: bool
    info: CheckpointInfo


def tell(sentence: str) -> None:
    """Say something to the person at the terminal, beside what is written for programs."""
    print(sentence, file=sys.stderr, flush=True)


def load_for_generation(checkpoint: str, config: Config, say: Callable[[str], object] = tell) -> Loaded:
    """Load `checkpoint` (its path, a folder of them, or "latest") as `config` says.

    That is `training.device`, `training.checkpoint_dir` for the latest one, `data.tokenizer_dir` and
    `generation.precision`, whose `auto` is what the device is fast in on a GPU; on a CPU the weights stay as they were
    saved, so that a seed gives the same text; `generation.quantize`; and `generation.context_length`, from then on that
    of the model. `say` tells what takes long. Raises `UserError` where the checkpoint, its tokenizer or the device is
    missing or unfit, or the model sees fewer tokens.
    """
    path = resolve_checkpoint(checkpoint, Path(config.training.checkpoint_dir))
    device, precision = choose_device(config.training.device), config.generation.precision
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else automatic_precision(device)
    model, info = load_model(path, device, DTYPES[precision])
    if config.generation.context_length is not None:
        _limit_context(model, config.generation.context_length)
    quantize_(model, config.generation.quantize)
    settle_(model)
    if device.type == "cpu" and model.num_parameters() < SMALL:
        torch.set_num_threads(1)
    places = [config.data.tokenizer_dir, info.config["data"]["tokenizer_dir"]]
    tokenizer = matching_tokenizer(info.tokenizer_fingerprint, [Path(place) for place in places])
    slowly = Timer(SLOW, lambda: say("Compiling the kernels that generate, once on this machine: about half a minute."))
    slowly.daemon = True
    slowly.start()
    try:
        _compile_kernels(model)
    finally:
        slowly.cancel()
    return Loaded(model, tokenizer, bool(info.finetuning and info.finetuning["format"] == "messages"), info)


def _limit_context(model: Transformer, tokens: int) -> None:
    if tokens > model.config.context_length:
        raise UserError(
            f"generation.context_length: the model sees {model.config.context_length:,} tokens, not {tokens:,}."
        )
    model.config = model.config.model_copy(update={"context_length": tokens})


@torch.inference_mode()
def _compile_kernels(model: Transformer) -> None:
    """Have the machine code for `model` before a person, or a request, waits for the first token."""
    if CPUModel.takes(model):
        cache = KVCache(model.config, 1, 1, dtype=model.token_embedding.weight.dtype)
        CPURunner(model, cache).run([Chunk(0, 0, [0])])
