"""SentencePiece (Kudo and Richardson, 2018): unigram (Kudo, 2018) and BPE.

Text is taken as it is: no normalisation, no space added in front, no spaces joined. Spaces are written as the marker
U+2581, characters outside the vocabulary as their UTF-8 bytes. The marker itself, met in text, is written as bytes
too, so any text comes back as it was.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from config.errors import UserError
from data.tokenization.protocol import Before, Kind, Span
from data.tokenization.special import END_OF_TEXT, SPACE, spans_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from config.schema import TokenizerConfig

CHUNK_CHARACTERS = 4000
TRAINING_THREADS = 8  # a constant, since sums over threads depend on it


class SentencePiece:
    """A trained SentencePiece model; `serialized` is a `tokenizer.model`."""

    file_name = "tokenizer.model"
    tokenizer_class = None
    drops_first_space = False
    trims: dict[int, tuple[bool, bool]] = {}

    def __init__(self, kind: Kind, serialized: bytes) -> None:
        import sentencepiece

        self.kind = kind
        self.serialized = serialized
        self._library = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        self._space = [self._library.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.kind.encode() + b"\0" + self.serialized).hexdigest()

    @cached_property
    def pieces(self) -> list[bytes]:
        return [self._piece(index) for index in range(self._library.vocab_size())]

    def _piece(self, index: int) -> bytes:
        piece: str = self._library.id_to_piece(index)
        if self._library.is_control(index) or self._library.is_unknown(index):
            return b""
        return bytes([int(piece[3:5], 16)]) if self._library.is_byte(index) else piece.replace(SPACE, " ").encode()

    def encode(self, text: str, *, before: Before = "nothing") -> list[int]:
        first, *others = text.split(SPACE)
        ids: list[int] = self._library.encode(first)
        for part in others:
            ids += [*self._space, *self._library.encode(part)]
        return ids

    def encode_spans(self, text: str, *, before: Before = "nothing") -> tuple[list[int], list[Span]]:
        ids = self.encode(text)
        return ids, spans_of(text, [len(self.pieces[index]) for index in ids])

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [np.array(self.encode(text), dtype=np.uint32) for text in texts]


def train_sentence_piece(texts: Iterator[str], config: TokenizerConfig) -> SentencePiece:
    """Train on `texts`, which the library holds in memory: 15 bytes for each byte of text, 25 for unigram.

    Special tokens take the first ids, then come `<unk>` (never used) and the 256 bytes. Raises `UserError` naming the
    possible sizes where `config.vocab_size` does not fit the text.
    """
    import sentencepiece

    others = [name for name in config.special_tokens if name != END_OF_TEXT]
    model = io.BytesIO()
    chunks = _Chunks(texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chunks,
            model_writer=model,
            model_type=config.kind.removeprefix("sentencepiece-"),
            vocab_size=config.vocab_size,
            eos_id=config.special_tokens.index(END_OF_TEXT),
            eos_piece=END_OF_TEXT,
            control_symbols=others,
            unk_id=len(config.special_tokens),
            bos_id=-1,
            pad_id=-1,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * CHUNK_CHARACTERS + 4,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        if chunks.error is not None:
            raise chunks.error from None
        raise _explained(str(error), config) from error
    return SentencePiece(config.kind, model.getvalue())


class _Chunks:
    """Texts cut at line ends into pieces of at most `CHUNK_CHARACTERS`, for the library leaves out long ones.

    The library turns every exception into a RuntimeError, so what the texts raised is kept in `error`.
    """

    def __init__(self, texts: Iterator[str]) -> None:
        self.error: BaseException | None = None
        self._chunks = (chunk for text in texts for chunk in _cut(text))

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._chunks)
        except StopIteration:
            raise
        except BaseException as error:
            self.error = error
            raise


def _cut(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + CHUNK_CHARACTERS
        after_line = text.rfind("\n", start, end) + 1
        if end < len(text) and after_line > start:
            end = after_line
        yield text[start:end]
        start = end


def _explained(message: str, config: TokenizerConfig) -> Exception:
    key = f"data.tokenizer.vocab_size is {config.vocab_size}"
    if found := re.search(r"value <= (\d+)", message):
        return UserError(
            f"{key}, but this text yields at most {found[1]} pieces. Set data.tokenizer.vocab_size={found[1]} or less, "
            "or add text."
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"{key}, but this text needs at least {found[1]} for its characters, bytes and special tokens. "
            f"Set data.tokenizer.vocab_size to more than that."
        )
    if "!sentences_.empty()" in message:
        return UserError("There is no text to train a tokenizer on: the sources in data.use are empty.")
    return RuntimeError(message)
