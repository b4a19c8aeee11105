"""What is exported: a model as `transformers` has it, its tokenizer, and what its checkpoint says about it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.model import ModelConfig
from config.schema import Config
from data.tokenization import Tokenizer
from data.tokenization.matching import matching_tokenizer
from data.tokenization.storage import TOKENIZER_CONFIG
from inference.prompting import chat_stop_tokens
from model.checkpoint import CheckpointInfo, load_checkpoint, load_model
from model.checkpoint_folder import resolve_checkpoint
from model.devices import DTYPES
from model.huggingface.exporting import to_huggingface

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Subject:
    """`theirs` is of a class of `transformers`, on the CPU; `tokens` were trained on, None where nothing tells."""

    theirs: Any
    config: ModelConfig
    tokenizer: Tokenizer
    info: CheckpointInfo
    tokens: int | None

    @property
    def architecture(self) -> str:
        """Name of the class of the model in `transformers`."""
        return type(self.theirs).__name__

    @property
    def parameters(self) -> int:
        """Number of weights; a matrix that is used twice counts once."""
        return sum(parameter.numel() for parameter in self.theirs.parameters())

    @property
    def bytes(self) -> int:
        """Size of the weights in memory."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.theirs.parameters())

    @property
    def chat(self) -> bool:
        """Whether the model was fine-tuned on messages."""
        return bool(self.info.finetuning and self.info.finetuning["format"] == "messages")

    @property
    def name(self) -> str:
        """The run and the step."""
        return f"{self.info.run_name or 'model'}, step {self.info.step:,}"

    @property
    def ends(self) -> list[int]:
        """The tokens at which a text ends, end-of-text first; in a chat what ends an answer, too."""
        chat = chat_stop_tokens(self.tokenizer) if self.chat else []
        return list(dict.fromkeys([self.tokenizer.end_of_text_id, *self.tokenizer.ending_ids, *chat]))

    @property
    def beginning(self) -> int:
        """The token that programs put before a text, where they put one."""
        name = self.tokenizer.named_tokens.get("bos_token", "")
        return self.tokenizer.special_tokens.get(name, self.tokenizer.end_of_text_id)


def open_subject(checkpoint: str, config: Config, precision: str = "fp32") -> Subject:
    """The model of `checkpoint` (its path, a folder of them, or "latest") in a `precision` of `DTYPES`.

    Raises `UserError` where the checkpoint or its tokenizer is missing or damaged, or has no counterpart there.
    """
    path = resolve_checkpoint(checkpoint, Path(config.training.checkpoint_dir))
    model, info = load_model(path, "cpu", DTYPES[precision])
    places = [config.data.tokenizer_dir, info.config["data"]["tokenizer_dir"]]
    tokenizer = matching_tokenizer(info.tokenizer_fingerprint, [Path(place) for place in places])
    tokens = _tokens(load_checkpoint(path), model.config) if info.finetuning is None else None
    return Subject(to_huggingface(model), model.config, tokenizer, info, tokens)


def _tokens(state: dict[str, Any], config: ModelConfig) -> int | None:
    if "cursor" not in state:
        return None
    return int(state["cursor"]) * (state["config"]["training"].get("sequence_length") or config.context_length)


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> dict[str, Any]:
    """Write `tokenizer.json` and `tokenizer_config.json` into `directory`; returns the content of the former.

    Raises `UserError` for a SentencePiece tokenizer: the programs that could read one take its marker for spaces, met
    in text, for a space, and this project does not.
    """
    aside = directory / "tokenizer"
    tokenizer.save(aside)
    if not (aside / TOKENIZER).exists():
        raise UserError(
            "The tokenizer is of SentencePiece, and nothing else gives the same ids for every text. Only a model "
            "trained with data.tokenizer.kind=bpe can be exported."
        )
    for name in (TOKENIZER, TOKENIZER_CONFIG):
        (aside / name).replace(directory / name)
    shutil.rmtree(aside)
    content: dict[str, Any] = json.loads((directory / TOKENIZER).read_bytes())
    return content


def check_room(directory: Path, needed: int) -> None:
    """Raise `UserError` unless the disk of `directory`, which need not exist yet, has `needed` bytes left."""
    existing = next(folder for folder in [directory, *directory.parents] if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"Writing to {directory} takes {needed / 1e6:,.1f} MB, and its disk has {free / 1e6:,.1f} MB left. "
            "Free some, or choose another place."
        )


def check_free(target: Path, force: bool, foreign: Sequence[str] = ()) -> None:
    """Raise `UserError` where `target` exists, unless `force`; and even then if it holds files that are `foreign`."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if foreign:
        raise UserError(f"{target} holds other files ({foreign[0]}). Choose another place.")
    if not force:
        raise UserError(f"{target} exists. Add --force to replace it, or choose another place.")
