"""A tokenizer on disk: the model's file, Hugging Face's `tokenizer_config.json`, `config.yaml`, and our manifest."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from config.errors import UserError
from config.files import atomic_write, disk_errors, recover_directory, replace_directory
from data.tokenization.protocol import Kind

MANIFEST = "manifest.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SETTINGS = "config.yaml"
MODEL_FILES: dict[Kind, str] = {
    "bpe": "tokenizer.json",
    "bpe-byte-fallback": "tokenizer.json",
    "sentencepiece-unigram": "tokenizer.model",
    "sentencepiece-bpe": "tokenizer.model",
}
TRAIN_COMMAND = "python data/tokenizer.py"


class Offices(BaseModel):
    """Which tokens of an imported tokenizer have an office that its names do not tell."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    end_of_text: int
    pad: int
    prefix: tuple[int, ...]
    endings: tuple[int, ...]
    names: dict[str, str]
    """The tokens that a chat template knows by their office, such as "bos_token"."""


class TokenizerManifest(BaseModel):
    """What the folder holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    kind: Kind
    vocab_size: int
    special_tokens: dict[str, int]
    fingerprint: str
    offices: Offices | None = None


def read_manifest(directory: Path) -> TokenizerManifest:
    """The manifest of the tokenizer in `directory`; `UserError` where there is none or it is not readable."""
    recover_directory(directory.absolute())
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(f"There is no tokenizer in {directory}. Run {TRAIN_COMMAND}.")
    try:
        return TokenizerManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(
            f"{path} is not the manifest of a tokenizer. Run {TRAIN_COMMAND} to train a new one."
        ) from error


def read_file(directory: Path, name: str) -> bytes:
    """A file of the tokenizer in `directory`, or `UserError` where it is missing."""
    try:
        return (directory / name).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{directory / name} is missing. Run {TRAIN_COMMAND} to train a new tokenizer.") from error


def read_settings(directory: Path) -> dict[str, Any]:
    """The configuration that the tokenizer was trained with, as in `config.yaml`."""
    try:
        settings = yaml.safe_load(read_file(directory, SETTINGS))
        assert isinstance(settings["data"]["tokenizer"], dict)
    except (yaml.YAMLError, LookupError, TypeError, AssertionError) as error:
        raise UserError(f"{directory / SETTINGS} has no data.tokenizer settings. Run {TRAIN_COMMAND}.") from error
    return dict(settings)


def read_chat_template(directory: Path) -> str | None:
    """The chat template in `tokenizer_config.json`, or None."""
    try:
        template = json.loads(read_file(directory, TOKENIZER_CONFIG)).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{directory / TOKENIZER_CONFIG} is not a JSON object. Run {TRAIN_COMMAND}.") from error
    return template if isinstance(template, str) else None


def check_target(directory: Path) -> None:
    """Raise `UserError` where `directory` holds what is no part of a tokenizer, and so must not be replaced."""
    known = {MANIFEST, TOKENIZER_CONFIG, SETTINGS, *MODEL_FILES.values()}
    if directory.exists():
        found = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else [directory.name]
        foreign = [name for name in found if name not in known]
        if foreign:
            raise UserError(f"{directory} holds other files ({foreign[0]}). Choose another data.tokenizer_dir.")


def write_tokenizer(directory: Path, files: dict[str, bytes]) -> None:
    """Make `directory` a folder of exactly `files`, all at once; a tokenizer that was there is replaced.

    Raises `UserError` where `check_target` does, and on a full disk.
    """
    directory = Path(os.path.abspath(directory))
    recover_directory(directory)
    check_target(directory)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(directory):
            temporary.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with atomic_write(temporary / name) as file:
                file.write(content)
        replace_directory(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
