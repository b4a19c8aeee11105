"""A folder as a user has it after training: tokenizer, token files and checkpoint, all real, made in a second."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config.load import load_config, with_vocab_size
from config.schema import Config
from data.tokenization import Tokenizer, train_tokenizer
from model.checkpoint import save_checkpoint
from model.checkpoint_folder import checkpoint_path
from model.transformer import Transformer
from tests.token_files import write_token_files

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 5,
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 5,
    "На берегу пустынных волн стоял он, дум великих полн, 😀 и вдаль глядел. " * 3,
    "def add(left, right):\n    return left + right\n\n\nprint(add(1, 2))\n" * 4,
]
SMALL = ["model.n_layers=2", "model.n_heads=2", "model.d_model=32", "model.context_length=32"]
LIVELY = ["model.zero_init_projections=false", "model.init_std=0.3"]  # random weights whose choices are not all alike


@dataclass(frozen=True)
class Workspace:
    """`config` resolves as the commands resolve it in `folder`, vocabulary included."""

    folder: Path
    config: Config
    tokenizer: Tokenizer
    model: Transformer
    checkpoint: Path


def small_tokenizer(*overrides: str) -> Tokenizer:
    """Byte-level BPE of 300 ids, or what `overrides` make of it."""
    config = load_config([], ["data.tokenizer.vocab_size=300", "data.tokenizer.encoder=tokenizers", *overrides])
    return train_tokenizer(iter(TEXTS), config.data.tokenizer)


def make_workspace(folder: Path, *overrides: str, **entries: Any) -> Workspace:
    """Fill `folder`; `entries` go into the checkpoint."""
    tokenizer = small_tokenizer()
    tokenizer.save(folder / "corpus/tokenizer")
    write_texts(folder / "corpus/tokens", tokenizer)
    config = with_vocab_size(load_config([], [*SMALL, *LIVELY, *overrides]), tokenizer.vocab_size)
    torch.manual_seed(0)
    model = Transformer(config.model).eval()
    path = checkpoint_path(folder / "checkpoints", 7)
    state = {
        "model": model.state_dict(),
        "config": config.model_dump(),
        "step": 7,
        "run_name": "small-run",
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "validation_loss": None,
    }
    save_checkpoint(path, {**state, **entries})
    return Workspace(folder, config, tokenizer, model, path)


def write_texts(folder: Path, tokenizer: Tokenizer) -> None:
    """The texts as the split `val`, each followed by end-of-text."""
    documents = [[*tokenizer.encode(text), tokenizer.end_of_text_id] for text in TEXTS]
    tokens = np.concatenate(documents).astype("<u2")
    ends = np.cumsum([len(document) for document in documents]).tolist()
    write_token_files(
        folder,
        {"val": [(tokens, ends, sum(len(text.encode()) for text in TEXTS))]},
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
    )


def command(script: str, *arguments: str) -> list[str]:
    """The command line that runs `script` of the project with this interpreter."""
    return [sys.executable, str(Path(__file__).parents[1] / script), *arguments]
