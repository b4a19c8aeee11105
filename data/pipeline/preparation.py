"""What is to be done: the settings and inputs that the token files depend on, in one fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.deduplication import DecontaminationConfig
from config.errors import UserError
from config.files import UNFINISHED, location
from config.schema import DataConfig
from data.download import raw_manifest
from data.manifest import LEAVES_NO_TRACE, QUARANTINE, RawFile, RawManifest, file_sha256
from data.tokens import MANIFEST, TokensManifest, check_sizes, load_tokens_manifest

if TYPE_CHECKING:
    from data.tokenization.protocol import Tokenizer

VERSION = 2  # raised whenever the same inputs and settings would give other bytes than before
NO_TRACE = {"workers", "tasks", "batch_documents", "max_bad_fraction"}  # settings that leave none in the output


def raw_manifests(data: DataConfig) -> list[RawManifest]:
    """The manifest of every source in use; `UserError` for the first that was not downloaded."""
    return [raw_manifest(name, data) for name in data.use]


def expected_documents(raw: Sequence[RawManifest]) -> int:
    """Documents in all sources, for the progress bar; where they were not counted, one for every 2 kB of the files."""
    return sum(source.bytes // 2000 if source.documents is None else source.documents for source in raw)


def recorded_settings(data: DataConfig) -> dict[str, Any]:
    """The part of the configuration that decides the content of the token files, as the manifest records it."""
    return {
        "seed": data.seed,
        "use": list(data.use),
        "sources": {name: data.sources[name].model_dump(mode="json", exclude=LEAVES_NO_TRACE) for name in data.use},
        "preprocess": data.preprocess.model_dump(mode="json", exclude=NO_TRACE),
    }


def fingerprint(data: DataConfig, raw: Sequence[RawManifest], tokenizer: Tokenizer) -> str:
    """SHA-256 over all that the token files depend on: settings, checksums of the inputs, tokenizer, this code."""
    inputs = [
        {
            "files": [_state(file) for file in manifest.files],
            "quarantine": _checksum(location(data.raw_dir) / name / QUARANTINE),
        }
        for name, manifest in zip(data.use, raw)
    ]
    bad_words = data.preprocess.quality.c4.bad_words_file
    decontamination = data.preprocess.decontamination
    identity = {
        "version": VERSION,
        "settings": recorded_settings(data),
        "inputs": inputs,
        "evaluation": _evaluation(decontamination) if decontamination.sets else None,
        "bad_words": _checksum(Path(bad_words)) if bad_words else None,
        "tokenizer": [tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.end_of_text_id],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _state(file: RawFile) -> list[Any]:
    """What tells the content of a file: its checksum, or where it is streamed, all that is known of it."""
    if file.sha256 is not None:
        return [file.path, file.sha256, file.documents]
    return [file.path, file.url, file.bytes, file.etag, file.checksum, file.documents]


def present(tokens_dir: Path, expected: str) -> TokensManifest | None:
    """The manifest of `tokens_dir` if its files are those with the fingerprint `expected`, and all there.

    Raises `UserError` where the folder holds something else altogether, which must not be replaced.
    """
    if (tokens_dir / UNFINISHED).exists():
        return None
    if not (tokens_dir / MANIFEST).exists():
        if tokens_dir.is_dir() and any(tokens_dir.iterdir()) or tokens_dir.is_file():
            raise UserError(
                f"{tokens_dir} holds something other than token files, which would be lost. "
                "Choose another data.tokens_dir, or move what is there."
            )
        return None
    try:
        manifest = load_tokens_manifest(tokens_dir)
        check_sizes(tokens_dir, manifest)
    except UserError:
        return None
    return manifest if manifest.fingerprint == expected else None


def _evaluation(config: DecontaminationConfig) -> dict[str, list[str]]:
    from data.decontamination.evaluation_sets import checksums

    return checksums(config)


def _checksum(path: Path) -> str | None:
    return file_sha256(path) if path.exists() else None
