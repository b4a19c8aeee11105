"""Encoding many texts by the fastest library that gives the same ids as the reference.

`fastokens` and `gigatoken` are some fifty times as fast as `tokenizers`, and young. So before one is used, its ids for
the probe texts are compared with the reference's; where they differ, `auto` takes the next one.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from config.errors import UserError
from data.tokenization.probes import probe_texts
from data.tokenization.protocol import Backend, Kind
from data.tokenization.special import SPACE

if TYPE_CHECKING:
    from numpy.typing import NDArray

EncodeBatch = Callable[[Sequence[str]], "list[NDArray[np.uint32]]"]

logger = logging.getLogger(__name__)


def choose_encoder(backend: Backend, wanted: str) -> tuple[str, EncodeBatch]:
    """Name and function of the encoder for `backend`; `wanted` as `data.tokenizer.encoder`.

    `auto` takes the first of `CANDIDATES` that passes the check, else the reference library, with one line of warning
    about those that failed. A named one that fails, or that does not know this kind of tokenizer, raises `UserError`.
    """
    check_encoder(backend.kind, wanted)
    reference = reference_name(backend.kind)
    if wanted == reference:
        return reference, backend.encode_batch
    failures: list[str] = []
    for name, make in CANDIDATES.get(backend.kind, {}).items():
        if wanted not in ("auto", name):
            continue
        encode_batch, failure = checked(backend, make)
        if encode_batch is not None:
            _warn(failures, name)
            return name, encode_batch
        failures.append(f"{name} {failure}")
    if wanted != "auto":
        raise UserError(f"data.tokenizer.encoder: {failures[0]}. Set data.tokenizer.encoder=auto.")
    _warn(failures, reference)
    return reference, backend.encode_batch


def check_encoder(kind: Kind, wanted: str) -> None:
    """Raise `UserError` where the encoder `wanted` does not know tokenizers of this kind."""
    allowed = ["auto", reference_name(kind), *CANDIDATES.get(kind, {})]
    if wanted not in allowed:
        choices = ", ".join(allowed)
        raise UserError(f"data.tokenizer.encoder={wanted} cannot encode kind {kind}. Choose from: {choices}.")


def reference_name(kind: Kind) -> str:
    """The library that tokenizers of this kind are made for, whose ids are right by definition."""
    return "sentencepiece" if kind.startswith("sentencepiece") else "tokenizers"


def _warn(failures: list[str], chosen: str) -> None:
    if failures and multiprocessing.parent_process() is None:
        logger.warning("Encoding with %s: %s.", chosen, "; ".join(failures))


def checked(backend: Backend, make: Callable[[Backend], EncodeBatch]) -> tuple[EncodeBatch | None, str]:
    """The encoder that `make` makes, if its ids are the reference's; else None and what is wrong with it."""
    probes = probe_texts()
    try:
        encode_batch = make(backend)
        found = encode_batch(probes)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a wheel that does not load here, or a panic of Rust, which is no Exception
        return None, f"failed ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    for text, ids in zip(probes, found, strict=True):
        if ids.tolist() != backend.encode(text):
            return None, f"gives other ids than {reference_name(backend.kind)} for {text[:40]!r}"
    return encode_batch, ""


def _fastokens(backend: Backend) -> EncodeBatch:
    import fastokens

    library = fastokens.Tokenizer.from_json_str(backend.serialized.decode())

    def encode_batch(texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        ids, ends = library.encode_batch_flat(list(texts), split_special_tokens=True)
        return _rows(np.frombuffer(ids, dtype="<u4"), np.frombuffer(ends, dtype="<u8"))

    return encode_batch


def _gigatoken(backend: Backend) -> EncodeBatch:
    import gigatoken
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    # Without added tokens the library cannot take text for a special token.
    source = backend.serialized if backend.kind == "bpe" else sentencepiece_to_tokenizer_json(backend.serialized)
    library = gigatoken.Tokenizer.from_json(json.dumps(json.loads(source) | {"added_tokens": []}))

    def encode_batch(texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        if not texts:
            return []
        layout: Any = library.encode_batch(list(texts)).layout
        rows = _rows(np.asarray(layout.content.data), np.asarray(layout.offsets.data))
        if backend.kind == "bpe":
            return rows
        # Like the reference library, it takes SentencePiece's own marker for a space.
        return [np.array(backend.encode(text), np.uint32) if SPACE in text else row for text, row in zip(texts, rows)]

    return encode_batch


def _rows(ids: NDArray[np.uint32], ends: NDArray[Any]) -> list[NDArray[np.uint32]]:
    """Views of the flat `ids`, one for each text; `ends` has one more entry than there are texts and begins with 0."""
    return [ids[first:last] for first, last in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


# Fastest first, as measured by benchmarks/tokenizer.py.
CANDIDATES: dict[str, dict[str, Callable[[Backend], EncodeBatch]]] = {
    "bpe": {"fastokens": _fastokens, "gigatoken": _gigatoken},
    "sentencepiece-bpe": {"gigatoken": _gigatoken},
}
