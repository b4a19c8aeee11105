"""The evaluation sets that a user names: their files, read by the readers of all data, as one table of n-grams."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from config.deduplication import DecontaminationConfig, EvaluationSetConfig
from config.errors import UserError
from config.sources import FilesSourceConfig
from data.decontamination.grams import Grams, find_grams, grams_of, load_grams, make_grams
from data.formats import read_rows
from data.formats.rows import Fault
from data.published.listing import ListedFile
from data.published.opening import open_published
from data.sources.paths import input_files
from data.texts import texts_of

if TYPE_CHECKING:
    from io import BufferedReader


def build_grams(config: DecontaminationConfig) -> Grams:
    """The n-grams of all sets; `UserError` where a file or a column is missing, or a set has no text long enough."""
    found = [_grams_of_set(name, entry, config.n_grams) for name, entry in config.sets.items()]
    bits = [np.full(len(hashes), 1 << number, np.int64) for number, hashes in enumerate(found)]
    grams = make_grams(np.concatenate(found), np.concatenate(bits), config.n_grams)
    find_grams(texts_of(pl.Series("text", ["compiled"])), grams)  # so that workers find it compiled
    return grams


def checksums(config: DecontaminationConfig) -> dict[str, list[str]]:
    """SHA-256 of the files of every set."""
    return {name: [_checksum(file) for file in _files(name, entry)] for name, entry in config.sets.items()}


@lru_cache(maxsize=1)
def grams_at(path: Path) -> Grams:
    """The table at `path`, once per process."""
    return load_grams(path)


def _grams_of_set(name: str, entry: EvaluationSetConfig, n: int) -> NDArray[np.uint64]:
    hashes, texts, short = np.empty(0, np.uint64), 0, 0
    for file in _files(name, entry):
        for column in entry.text_columns:
            batch = _texts(name, file, column)
            more, few = grams_of(batch, n)
            hashes = np.unique(np.concatenate([hashes, more]))
            texts, short = texts + len(batch), short + few
    if not len(hashes):
        raise UserError(
            f"Evaluation set {name!r}: none of its {texts:,} texts has {n} words. "
            "Lower data.preprocess.decontamination.n_grams, or leave it out."
        )
    return hashes


def _texts(name: str, file: ListedFile, column: str) -> list[str]:
    """The texts in one column of a file."""
    texts: list[str] = []
    columns: tuple[str, ...] = ()
    with open_published(file.url) as content:
        for row in read_rows(content, file.url, column):
            if isinstance(row, Fault):
                columns = columns or row.columns
            else:
                texts.append(row.text)
    if not texts:
        there = f" The columns are: {', '.join(columns)}." if columns else ""
        raise UserError(
            f"Evaluation set {name!r}: {file.url} has no text in a column {column!r}.{there} "
            f"Set data.preprocess.decontamination.sets.{name}.text_columns."
        )
    return texts


def _files(name: str, entry: EvaluationSetConfig) -> list[ListedFile]:
    return input_files(name, FilesSourceConfig(kind="files", paths=entry.paths))


def _checksum(file: ListedFile) -> str:
    with open_published(file.url) as content:
        return hashlib.file_digest(cast("BufferedReader", content), "sha256").hexdigest()
