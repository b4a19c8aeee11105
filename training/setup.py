"""What stands before the first step: names and folders, compiled forward pass, and the state of an earlier run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from config.errors import UserError
from config.schema import Config
from model.checkpoint import load_weights
from model.transformer import Transformer
from training import randomness
from training.adapters import is_adapted, load_adapter
from training.optimizers import Optimizers
from training.precision import Precision
from training.spikes import SPIKE, Skipped, SpikeGuard

GRAPHS = 256
Forward = TypeVar("Forward", bound=Callable[..., Any])


@dataclass
class Progress:
    """How far a run has come. `seconds` is time spent, over all its starts; the counts are of steps left out."""

    step: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    empty_steps: int = 0
    non_finite_steps: int = 0
    spike_steps: int = 0
    samples: int = 0
    data_fingerprint: str | None = None
    started: float = field(default_factory=time.perf_counter, init=False)

    @property
    def skipped_steps(self) -> int:
        """All the steps left out."""
        return self.empty_steps + self.non_finite_steps + self.spike_steps

    def count_skipped(self, skipped: Skipped) -> None:
        """Count a step that was left out for its gradient."""
        if skipped.reason == SPIKE:
            self.spike_steps += 1
        else:
            self.non_finite_steps += 1

    def elapsed(self) -> float:
        """Seconds of this run, those of its earlier starts included."""
        return self.seconds + time.perf_counter() - self.started

    def state_dict(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return {
            "seconds": self.elapsed(),
            "flops": self.flops,
            "empty_steps": self.empty_steps,
            "non_finite_steps": self.non_finite_steps,
            "spike_steps": self.spike_steps,
            "samples": self.samples,
            "data_fingerprint": self.data_fingerprint,
        }


def new_model(
    config: Config, device: torch.device, deal: Callable[[Transformer], None] = lambda model: None
) -> Transformer:
    """A model on `device` with the initial weights of `training.seed`; `deal` may shard it before it takes memory."""
    with torch.device("meta"):
        model = Transformer(config.model)
    deal(model)
    model.to_empty(device=device)
    model.init_weights(config.training.seed)
    return model


def load_state(
    state: dict[str, Any],
    path: Path,
    model: Transformer,
    optimizers: Optimizers,
    precision: Precision,
    guard: SpikeGuard,
) -> Progress:
    """Put the checkpoint `state`, read from `path`, into the parts of a run; returns how far it had come."""
    if is_adapted(model):
        load_adapter(model, state, path)
    else:
        load_weights(model, state, path)
    try:
        optimizers.load_state_dict(state["optimizer"])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"The optimizer state of {path} does not fit training.optimizer. Leave that setting as it was."
        ) from error
    if precision.scaler.is_enabled() and state["scaler"]:
        precision.scaler.load_state_dict(state["scaler"])
    if "spikes" in state:
        guard.load_state_dict(state["spikes"])
    randomness.restore(state["rng"])
    return Progress(step=state["step"], **state["progress"])


def run_name(config: Config, keep: bool = False) -> str:
    """A name that no run in `training.runs_dir` bears yet: the one asked for, with a number where it is taken.

    With `keep`, the one asked for even so.
    """
    wanted = config.training.run_name or f"{config.model.variant}-{time.strftime('%Y%m%d-%H%M%S')}"
    name, number = wanted, 1
    while not keep and (Path(config.training.runs_dir) / name).exists():
        number += 1
        name = f"{wanted}-{number}"
    return name


def with_run_name(config: Config, name: str) -> Config:
    """`config` with the name that the run has got."""
    return config.model_copy(update={"training": config.training.model_copy(update={"run_name": name})})


def should_compile(config: Config, device: torch.device) -> bool:
    """Whether `torch.compile` is to be used: where asked for, or, with `auto`, on a GPU.

    On a CPU it saves a tenth of a float32 step and nothing of a bfloat16 one, and takes half a minute to begin. Slices
    of a model that draw random numbers of their own are never compiled: a graph can't put a generator back.
    """
    training = config.training
    apart = training.tensor_parallel > 1 and config.model.dropout > 0
    if training.compile == "auto":
        return device.type == "cuda" and not apart
    if training.compile and apart:
        raise UserError(
            "training.compile=true does not go with model.dropout above 0 where training.tensor_parallel slices the "
            "model. Use training.compile=auto."
        )
    if training.compile and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        raise UserError(
            "training.compile=true needs a C++ compiler on a CPU (g++ or clang++). Install one, or use auto."
        )
    return bool(training.compile)


def compiled(function: Forward) -> Forward:
    """A module or function with its forward and backward pass compiled as one graph, once for each shape it is given.

    There may be many: of rows while the batch grows, of lengths, in training and evaluation, of blocks of every kind.
    PyTorch would give up at eight.
    """
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    return cast(Forward, torch.compile(function, fullgraph=True, dynamic=False))
