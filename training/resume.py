"""Going on from a checkpoint: with which configuration, and what may not change on the way."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.load import load_config, read_setting
from config.model import ModelConfig
from config.schema import Config
from model.checkpoint import checkpoint_config, load_checkpoint
from model.checkpoint_folder import resolve_checkpoint
from training.plan import sequence_length

FIXED_MODEL = [key for key in ModelConfig.model_fields if key != "dropout"]
FIXED_TRAINING = (
    "run_name",
    "seed",
    "batch_size",
    "batch_warmup.sequences",
    "batch_warmup.steps",
    "sequence_length",
    "documents",
    "objective",
    "dpo.beta",
    "dpo.label_smoothing",
    "optimizer",
    "adapter.method",
    "adapter.rank",
    "adapter.alpha",
    "adapter.targets",
    "adapter.quantize",
)
FIXED_DATA = ("loader.packing", "finetuning.packing")


def run_config(
    recipes: Sequence[Path], overrides: Sequence[str], resume: str | None, base: Sequence[Path] = ()
) -> tuple[Config, Path | None]:
    """The configuration a command line asks for, and the checkpoint it goes on from, if any.

    `resume` is `latest`, a checkpoint or a folder of them. Its own configuration then lies under `recipes` and
    `overrides`; `UserError` names the key where these would make another model or another order of the data of it.
    `base` are recipes of the command itself, under the user's, for a run that does not go on from a checkpoint.
    """
    if resume is None:
        return load_config([*base, *recipes], overrides), None
    directory = read_setting("training.checkpoint_dir", [*base, *recipes], overrides)
    checkpoint = resolve_checkpoint(resume, Path(directory))
    state = load_checkpoint(checkpoint)
    saved = checkpoint_config(checkpoint, state)
    config = load_config(recipes, overrides, saved=(str(checkpoint), state["config"]))
    _require_same(saved, config, checkpoint)
    return config, checkpoint


def require_same_tokenizer(checkpoint: Path, state: dict[str, Any], fingerprint: str) -> None:
    """`UserError` unless the checkpoint `state` was trained on tokens of the tokenizer with this fingerprint."""
    if state["tokenizer_fingerprint"] != fingerprint:
        raise UserError(
            f"{checkpoint} was trained with another tokenizer (fingerprint {state['tokenizer_fingerprint'][:12]}, "
            f"the tokens now have {fingerprint[:12]}). Put its tokens back, or start a new run without --resume."
        )


def require_same_data(checkpoint: Path, state: dict[str, Any], samples: int, fingerprint: str | None) -> None:
    """`UserError` unless the data is what the checkpoint `state` was trained on, so that its order continues."""
    before = state["progress"]
    if before["samples"] != samples or before["data_fingerprint"] != fingerprint:
        what = f"{before['samples']:,} sequences then, {samples:,} now" if before["samples"] != samples else "same size"
        raise UserError(
            f"The training data is not what {checkpoint} was trained on ({what}). "
            "Put that data back, or start a new run without --resume."
        )


def _require_same(saved: Config, config: Config, checkpoint: Path) -> None:
    for key, before, now in _fixed(saved, config):
        if before != now:
            raise UserError(
                f"{checkpoint} was trained with {key}={_show(before)}, which a resumed run cannot change to "
                f"{_show(now)}. Leave {key} out, or start a new run without --resume."
            )


def _fixed(saved: Config, config: Config) -> list[tuple[str, Any, Any]]:
    pairs = [(f"model.{key}", getattr(saved.model, key), getattr(config.model, key)) for key in FIXED_MODEL]
    for key in FIXED_TRAINING:
        before, now = (attrgetter(key)(each.training) for each in (saved, config))
        if key == "sequence_length":
            before, now = (sequence_length(each.model, each.training) for each in (saved, config))
        pairs.append((f"training.{key}", before, now))
    for key in FIXED_DATA:
        pairs.append((f"data.{key}", *(attrgetter(key)(each.data) for each in (saved, config))))
    return pairs


def _show(value: Any) -> str:
    return "null" if value is None else str(value)
