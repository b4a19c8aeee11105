"""Token files: what preprocessing writes and training reads.

A split (`train`, `val`) is one or more flat little-endian arrays of token ids without a header, every document followed
by its end-of-text id. Beside each `.bin` lies its `.index`: little-endian uint64, the end of every document in that
file; and where there are several sources, `.sources`: little-endian uint16, the place of every document's source in the
manifest's `sources`. `manifest.json`, written last, says what they hold.
"""

from __future__ import annotations

import hashlib
import mmap
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from config.errors import UserError
from data.funnel import Funnel

MANIFEST = "manifest.json"
INDEX_DTYPE = np.dtype("<u8")
SOURCE_DTYPE = np.dtype("<u2")
REDO = "Run python data/preprocess.py"

Split = Literal["train", "val"]
TokenArray = NDArray[np.uint16] | NDArray[np.uint32]


class TokenFile(BaseModel):
    """One `.bin`, its `.index`, and its `.sources` if it has them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    index_sha256: str
    sources_sha256: str | None = None

    @property
    def index_name(self) -> str:
        """Name of the file of document ends."""
        return str(Path(self.name).with_suffix(".index"))

    @property
    def sources_name(self) -> str:
        """Name of the file of the documents' sources."""
        return str(Path(self.name).with_suffix(".sources"))

    @property
    def parts(self) -> dict[str, str]:
        """The names of all its files, and the SHA-256 of each."""
        sources = {} if self.sources_sha256 is None else {self.sources_name: self.sources_sha256}
        return {self.name: self.sha256, self.index_name: self.index_sha256, **sources}


class TokenCount(BaseModel):
    """A number of documents, their tokens with all end-of-text ids, and their size as UTF-8."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: int
    tokens: int
    bytes: int


class SourceTokens(BaseModel):
    """What of one source stands in the token files, and how often its text for training was taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: float
    available: TokenCount
    """What there is for training; `train` is what the mixture made of that."""
    train: TokenCount
    val: TokenCount


class TokensManifest(BaseModel):
    """`manifest.json`. `bytes` of a file are those of the text that its tokens stand for, as UTF-8.

    `fingerprint` identifies inputs, settings and tokenizer: the same one means the same bytes in every file.
    `validation` is how the split was made: whole documents by hash, or, of a corpus of few documents, the tail of each.
    `contaminated` counts the documents that share text with each evaluation set, whether they were dropped or cut.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    fingerprint: str
    dtype: Literal["uint16", "uint32"]
    splits: dict[Split, tuple[TokenFile, ...]]
    tokenizer_fingerprint: str
    vocab_size: int
    end_of_text_id: int
    seed: int
    validation: Literal["documents", "tails"]
    config: dict[str, Any]
    funnel: dict[str, Funnel]
    sources: dict[str, SourceTokens] = {}
    contaminated: dict[str, int] = {}

    def tokens(self, split: Split) -> int:
        """Number of tokens of `split`, end-of-text ids included."""
        return sum(file.tokens for file in self.splits[split])

    def documents(self, split: Split) -> int:
        """Number of documents of `split`."""
        return sum(file.documents for file in self.splits[split])

    def bytes(self, split: Split) -> int:
        """UTF-8 bytes of the text of `split`."""
        return sum(file.bytes for file in self.splits[split])


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The narrowest type that holds every id: uint16 up to a vocabulary of 65,536."""
    return "uint16" if vocab_size <= 65_536 else "uint32"


def load_tokens_manifest(tokens_dir: Path) -> TokensManifest:
    """Read `manifest.json` of `tokens_dir`; `UserError` where it is missing or not one of ours."""
    path = tokens_dir / MANIFEST
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"There are no token files in {tokens_dir} ({MANIFEST} is missing). {REDO}.") from error
    try:
        return TokensManifest.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{path} is damaged or of another version. {REDO} --force.") from error


def check_sizes(tokens_dir: Path, manifest: TokensManifest) -> None:
    """`UserError` unless every file of the manifest lies in `tokens_dir`, local or not, with the size that it says."""
    itemsize = np.dtype(manifest.dtype).itemsize
    for files in manifest.splits.values():
        for file in files:
            _check_size(tokens_dir / file.name, file.tokens * itemsize)
            _check_size(tokens_dir / file.index_name, file.documents * INDEX_DTYPE.itemsize)
            if file.sources_sha256 is not None:
                _check_size(tokens_dir / file.sources_name, file.documents * SOURCE_DTYPE.itemsize)


def check_tokens(manifest: TokensManifest, tokenizer_fingerprint: str, vocab_size: int) -> None:
    """`UserError` unless the tokens were made by the tokenizer with this fingerprint and vocabulary."""
    if manifest.vocab_size != vocab_size:
        raise UserError(
            f"The token files were made by a tokenizer of {manifest.vocab_size:,} tokens, this one has {vocab_size:,}. "
            f"{REDO} to make them anew."
        )
    if manifest.tokenizer_fingerprint != tokenizer_fingerprint:
        raise UserError(
            f"The token files were made by another tokenizer (fingerprint {manifest.tokenizer_fingerprint[:12]}, "
            f"not {tokenizer_fingerprint[:12]}). {REDO} to make them anew."
        )


class TokenFiles:
    """The tokens of one split as one long read-only sequence, memory-mapped, whatever the number of files.

    Raises `UserError` where the manifest or a file is missing, or a file does not have the size that the manifest says.
    """

    def __init__(self, tokens_dir: Path, split: Split) -> None:
        self.directory = Path(tokens_dir)
        self.split = split
        self.manifest = load_tokens_manifest(self.directory)
        self.files = self.manifest.splits[split]
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._parts = [_map(self.directory / file.name, file.tokens, dtype) for file in self.files]
        self._starts = list(accumulate((file.tokens for file in self.files), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, count: int) -> TokenArray:
        """Tokens `start` ... `start + count`, shape (count,), uint16 or uint32 as stored; no copy within one file."""
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} ... {start + count} of {len(self)}")
        if count == 0:
            return np.empty(0, self.manifest.dtype)
        first = bisect_right(self._starts, start) - 1
        pieces = []
        for part, offset in zip(self._parts[first:], self._starts[first:]):
            begin = start - offset
            pieces.append(part[begin : begin + count])
            start += len(pieces[-1])
            count -= len(pieces[-1])
            if count == 0:
                break
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    @cached_property
    def document_ends(self) -> NDArray[np.uint64]:
        """Where every document ends (after its end-of-text id) in the whole sequence, shape (documents,), ascending."""
        ends = []
        for file, offset in zip(self.files, self._starts):
            ends.append(_map(self.directory / file.index_name, file.documents, INDEX_DTYPE) + np.uint64(offset))
        return np.concatenate(ends)

    @cached_property
    def document_sources(self) -> NDArray[np.uint16] | None:
        """The place of every document's source in `manifest.sources`, shape (documents,); None where not known."""
        if any(file.sources_sha256 is None for file in self.files):
            return None
        parts = [_map(self.directory / file.sources_name, file.documents, SOURCE_DTYPE) for file in self.files]
        return np.concatenate([np.empty(0, SOURCE_DTYPE), *parts])

    def verify(self) -> None:
        """Read every file and compare its SHA-256 with the manifest's; `UserError` names the first that differs."""
        for file in self.files:
            for name, expected in file.parts.items():
                with open(self.directory / name, "rb") as handle:
                    found = hashlib.file_digest(handle, "sha256").hexdigest()
                if found != expected:
                    raise UserError(f"{self.directory / name} is damaged (its SHA-256 differs). {REDO} --force.")


def _map(path: Path, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """`count` values of `dtype` of the file at `path`, mapped read-only."""
    _check_size(path, count * dtype.itemsize)
    if count == 0:
        return np.empty(0, dtype)
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing. {REDO} --force.") from error
    if size != expected:
        raise UserError(
            f"{path} has {size:,} bytes, but the manifest says {expected:,}: it is cut short or not the manifest's. "
            f"{REDO} --force."
        )
