"""Runs small enough for a test: a corpus, a recipe, and the real commands over them."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from config.load import load_config, with_vocab_size
from config.schema import Config
from data.data_loader import SampleSource
from data.tokenization import Tokenizer
from model.transformer import Transformer
from tests.token_files import write_token_files
from tests.workspace import SMALL as MODEL
from tests.workspace import small_tokenizer
from training.trainer import TrainResult, train

ROOT = Path(__file__).parents[1]
TRAIN = "scripts/train.py"
SMALL = [
    *MODEL,
    "training.max_steps=8",
    "training.batch_size=8",
    "training.micro_batch_size=8",
    "training.precision=fp32",
    "training.adamw.learning_rate=0.003",
    "training.muon.learning_rate=0.02",
    "training.schedule.warmup_steps=2",
    "training.log_interval=2",
    "training.eval_interval=4",
    "training.eval_tokens=512",
    "training.checkpoint_interval=4",
    "training.sample_interval=0",
    "training.wandb.mode=off",
]


def write_corpus(folder: Path, repeat: int = 1, ends: Sequence[int] = ()) -> Tokenizer:
    """`corpus/tokenizer` and `corpus/tokens` in `folder`, of the source of a module of the standard library.

    It is one document, or several where the indices have `ends` besides the last.
    """
    tokenizer = small_tokenizer()
    tokenizer.save(folder / "corpus/tokenizer")
    text = inspect.getsource(argparse)
    ids = np.array([*tokenizer.encode(text), tokenizer.end_of_text_id] * repeat, dtype="<u2")
    held, held_ends = ids[-4000:], [*(end for end in ends if end < 4000), 4000]
    write_token_files(
        folder / "corpus/tokens",
        {"train": [(ids, [*ends, len(ids)], 4 * len(ids))], "val": [(held, held_ends, 4 * len(held))]},
        fingerprint=hashlib.sha256(ids.tobytes()).hexdigest(),
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
    )
    return tokenizer


def start(folder: Path, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start `scripts/<script>.py` in `folder`, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(
    folder: Path, script: str, *arguments: str, status: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `scripts/<script>.py` in `folder` to its end, which must be `status`."""
    process = start(folder, script, *arguments, **environment)
    done = finish(process)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a started command; it is killed where it does not end."""
    try:
        output, errors = process.communicate(timeout=900)
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Return as soon as `condition` holds; an `AssertionError` where the process ends before it does."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "".join(process.communicate())
        assert time.monotonic() < deadline, "waited five minutes"
        time.sleep(0.005)


def kill_when(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """`kill -9` a started command as soon as `condition` holds."""
    wait_for(condition, process)
    process.kill()
    finish(process)
    assert process.returncode == -signal.SIGKILL


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint as plain `torch.load` sees it."""
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir: Path) -> list[tuple[Any, ...]]:
    """What of `metrics.jsonl` may not depend on the clock."""
    timeless = ("step", "tokens", "loss", "validation_loss", "learning_rate", "gradient_norm", "skipped_steps")
    return [tuple(row[key] for key in timeless) for row in metrics(run_dir)]


def differing(left: Any, right: Any, where: str = "") -> list[str]:
    """The places where two nested states are not bit for bit the same."""
    if isinstance(left, Tensor):
        return [] if left.dtype == right.dtype and torch.equal(left, right) else [where]
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return [where]
        return [place for key in left for place in differing(left[key], right[key], f"{where}/{key}")]
    if isinstance(left, (list, tuple)):
        pairs = zip(left, right, strict=True)
        return [place for number, (a, b) in enumerate(pairs) for place in differing(a, b, f"{where}/{number}")]
    return [] if left == right else [where]


class RandomSamples:
    """`count` samples of `length` tokens; of row i, `masked(i)` says which targets are not trained."""

    def __init__(self, count: int, length: int, masked: Callable[[int], Sequence[int] | slice] = lambda i: []) -> None:
        rng = np.random.default_rng(0)
        self._rows = rng.integers(0, 100, (count, length + 1))
        self._masked = masked

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Inputs and targets, each (length,) int64."""
        inputs, targets = self._rows[index][:-1], self._rows[index][1:].copy()
        targets[self._masked(index)] = -100
        return inputs, targets


class FixedLoss:
    """An evaluation that costs nothing."""

    loss = 5.0


@cache
def small_config(*overrides: str, vocab_size: int = 100) -> Config:
    """The configuration of a small run in a test's own process, which by default writes its checkpoints itself."""
    return with_vocab_size(load_config([], [*SMALL, "training.save_in_background=false", *overrides]), vocab_size)


def train_here(source: SampleSource, *overrides: str, draw: bool = False, **options: Any) -> TrainResult:
    """Train in this process and folder; without `draw`, leave out the picture, which takes longer than the training."""
    settings = {"tokenizer_fingerprint": "t", "evaluate": lambda model, rank, world: FixedLoss(), **options}
    with nullcontext() if draw else patch("training.tracking.plot_curves"):
        return train(small_config(*overrides), source, **settings)


def trained_weights(result: TrainResult) -> dict[str, Tensor]:
    """The weights in the last checkpoint of a run."""
    assert result.checkpoint is not None
    weights: dict[str, Tensor] = read_checkpoint(result.checkpoint)["model"]
    return weights


def new_transformer(*overrides: str) -> Transformer:
    """The model of `small_config`, with the initial weights of the default seed."""
    config = small_config(*overrides)
    model = Transformer(config.model)
    model.init_weights(config.training.seed)
    return model
