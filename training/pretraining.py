"""What a pre-training run starts from: the configuration, the token files, and the checkpoint it resumes, if any."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from config.errors import UserError
from config.files import local
from config.load import with_vocab_size
from config.schema import Config
from data.data_loader import TokenWindows
from data.packing import PackedWindows
from data.tokens import TokenFiles
from model.checkpoint import load_checkpoint
from training.plan import make_plan, sequence_length
from training.resume import require_same_data, require_same_tokenizer


@dataclass(frozen=True, slots=True)
class Pretraining:
    """`config` knows its vocabulary size; `checkpoint` is None for a fresh run."""

    config: Config
    source: TokenWindows | PackedWindows
    checkpoint: Path | None

    @property
    def tokenizer_fingerprint(self) -> str:
        """Of the tokenizer that made the tokens."""
        return self.source.tokens.manifest.tokenizer_fingerprint

    @property
    def data_fingerprint(self) -> str:
        """Of the token files."""
        return self.source.tokens.manifest.fingerprint


def open_pretraining(config: Config, checkpoint: Path | None) -> Pretraining:
    """Open the token files that `config` names, for a fresh run or one that resumes `checkpoint`.

    Raises `UserError` where there are none, or where they do not go with the configuration or the checkpoint.
    """
    if config.training.adapter.method is not None:
        raise UserError("training.adapter is for fine-tuning alone. Set training.adapter.method=null.")
    if config.training.objective != "next_token":
        raise UserError(
            f"training.objective={config.training.objective} is for pairs of answers: python scripts/finetune.py. "
            "Set training.objective=next_token."
        )
    tokens = TokenFiles(local(config.data.tokens_dir, "data.tokens_dir"), "train")
    state = load_checkpoint(checkpoint) if checkpoint is not None else None
    if checkpoint is not None and state is not None:
        require_same_tokenizer(checkpoint, state, tokens.manifest.tokenizer_fingerprint)
    config = with_vocab_size(config, tokens.manifest.vocab_size)
    windows = PackedWindows if config.data.loader.packing == "best_fit" else TokenWindows
    masked = config.training.documents == "masked"
    source = windows(tokens, sequence_length(config.model, config.training), with_documents=masked)
    if checkpoint is not None and state is not None:
        require_same_data(checkpoint, state, len(source), tokens.manifest.fingerprint)
    return Pretraining(config, source, checkpoint)


def check_command_line(config: Config, checkpoint: Path | None, world_size: int) -> None:
    """Raise here, once, the `UserError` that each of `world_size` processes of such a run would otherwise raise."""
    job = open_pretraining(config, checkpoint)
    make_plan(job.config, len(job.source), world_size)
