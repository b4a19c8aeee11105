"""A checkpoint under evaluation: the model, how it is run, by which share of the processes, and where results go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evaluation.held_out import HeldOut
from evaluation.likelihood import Ids, Likelihood, likelihoods
from evaluation.perplexity import Evaluation, default_batch_size, evaluate_tokens
from evaluation.report import STEPS
from model.checkpoint import CheckpointInfo
from model.transformer import Transformer

if TYPE_CHECKING:
    from data.tokenization import Tokenizer

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Judged:
    """`autocast` is the dtype of the matrix products, None for that of the weights; `precision` is its name.

    `quantize` says in how many bits the weights are, "none" for those of the checkpoint.
    """

    model: Transformer
    info: CheckpointInfo
    tokenizer: Tokenizer
    precision: str
    autocast: torch.dtype | None
    runs_dir: Path
    quantize: str = "none"
    batch_size: int | None = None
    rank: int = 0
    world_size: int = 1

    @property
    def folder(self) -> Path:
        """Where results go: the run's folder, or that of the checkpoint where the run has none."""
        run_dir = self.runs_dir / self.info.run_name if self.info.run_name else None
        return run_dir if run_dir is not None and run_dir.is_dir() else self.info.path.parent

    def files(self, what: str) -> tuple[Path, Path]:
        """Where results on `what` go: the file of what was measured last, and that of this step.

        Those of quantized weights do not take the place of the checkpoint's own.
        """
        name = f"{what}.json" if self.quantize == "none" else f"{what}-{self.quantize}.json"
        return self.folder / name, self.folder / STEPS / f"step_{self.info.step}" / name

    @property
    def about(self) -> dict[str, Any]:
        """What every result says of where it came from."""
        return {
            "checkpoint": str(self.info.path),
            "step": self.info.step,
            "precision": self.precision,
            "quantize": self.quantize,
        }

    def on_text(self, held_out: HeldOut, stride: int, advance: Advance | None = None) -> Evaluation:
        """The figures on `held_out`; `advance` is told the number of targets that all processes together have done."""
        context_length = self.model.config.context_length
        device = self.model.token_embedding.weight.device
        return evaluate_tokens(
            self.model,
            held_out.tokens,
            context_length=context_length,
            stride=stride,
            batch_size=self.batch_size or default_batch_size(context_length, self.tokenizer.vocab_size, device),
            device=device,
            token_bytes=self.tokenizer.token_bytes(),
            block_ends=held_out.block_ends(context_length),
            document_ends=held_out.document_ends if self.info.masked else None,
            rank=self.rank,
            world_size=self.world_size,
            autocast=self.autocast,
            advance=advance and (lambda targets: advance(targets * self.world_size)),
        )

    def score(self, pairs: Sequence[tuple[Ids, Ids]], advance: Advance | None = None) -> list[Likelihood]:
        """The likelihoods of continuations, each process computing its share."""
        return likelihoods(
            self.model,
            pairs,
            most_rows=self.batch_size,
            autocast=self.autocast,
            rank=self.rank,
            world_size=self.world_size,
            advance=advance and (lambda done: advance(done * self.world_size)),
        )
