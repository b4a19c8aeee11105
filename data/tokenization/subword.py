"""The tokenizer that callers hold: a subword model, its special tokens and chat template, and a fast encoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from config.errors import UserError
from data.tokenization.protocol import Backend, Before, Kind, Span
from data.tokenization.special import END_OF_TEXT, PAD, WHITE_SPACE, split_special
from data.tokenization.storage import (
    MANIFEST,
    MODEL_FILES,
    SETTINGS,
    TOKENIZER_CONFIG,
    TRAIN_COMMAND,
    Offices,
    TokenizerManifest,
    read_chat_template,
    read_file,
    read_manifest,
    read_settings,
    write_tokenizer,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray


class SubwordTokenizer:
    """The one implementation of `data.tokenization.Tokenizer`, over any `Backend`.

    Made by `load_tokenizer` and `train_tokenizer`; an imported one has `offices`. It may be pickled: as its folder,
    where it has one.
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, int],
        chat_template: str | None,
        encoder: str,
        settings: dict[str, Any],
        offices: Offices | None = None,
    ) -> None:
        self.chat_template = chat_template
        self.special_tokens: Mapping[str, int] = MappingProxyType(dict(special_tokens))
        self.backend = backend
        self._wanted_encoder = encoder
        self._settings = settings
        self._offices = offices
        self._directory: Path | None = None

    @classmethod
    def load(cls, directory: Path, encoder: str | None = None, fingerprint: str | None = None) -> SubwordTokenizer:
        """See `data.tokenization.load_tokenizer`; with `fingerprint`, only the tokenizer that has it."""
        manifest = read_manifest(directory)
        backend = _backend(manifest.kind, read_file(directory, MODEL_FILES[manifest.kind]), directory)
        wanted = fingerprint or manifest.fingerprint
        if not backend.fingerprint == manifest.fingerprint == wanted:
            raise UserError(f"The tokenizer in {directory} was changed. Run {TRAIN_COMMAND} to train a new one.")
        settings = read_settings(directory)
        encoder = encoder or str(settings["data"]["tokenizer"].get("encoder", "auto"))
        tokenizer = cls(
            backend, manifest.special_tokens, read_chat_template(directory), encoder, settings, manifest.offices
        )
        tokenizer._directory = directory.absolute()
        return tokenizer

    def save(self, directory: Path) -> None:
        manifest = TokenizerManifest(
            kind=self.backend.kind,
            vocab_size=self.vocab_size,
            special_tokens=dict(self.special_tokens),
            fingerprint=self.fingerprint,
            offices=self._offices,
        )
        files = {
            self.backend.file_name: self.backend.serialized,
            TOKENIZER_CONFIG: _json(self._huggingface_config()),
            SETTINGS: yaml.safe_dump(self._settings, sort_keys=False, allow_unicode=True, width=120).encode(),
            MANIFEST: _json(manifest.model_dump(exclude_none=True)),
        }
        write_tokenizer(directory, files)
        self._directory = directory.absolute()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self._directory is not None:
            return SubwordTokenizer.load, (self._directory, self._wanted_encoder, self.fingerprint)
        arguments = (self.backend.kind, self.backend.serialized, dict(self.special_tokens))
        return _restore, (*arguments, self.chat_template, self._wanted_encoder, self._settings, self._offices)

    @property
    def vocab_size(self) -> int:
        return len(self.backend.pieces)

    @property
    def end_of_text_id(self) -> int:
        return self._offices.end_of_text if self._offices else self.special_tokens[END_OF_TEXT]

    @property
    def prefix_ids(self) -> Sequence[int]:
        return self._offices.prefix if self._offices else ()

    @property
    def ending_ids(self) -> Sequence[int]:
        return self._offices.endings if self._offices else (self.end_of_text_id,)

    @property
    def pad_id(self) -> int:
        return self._offices.pad if self._offices else self.special_tokens.get(PAD, self.end_of_text_id)

    @property
    def named_tokens(self) -> Mapping[str, str]:
        if self._offices:
            return self._offices.names
        pad = PAD if PAD in self.special_tokens else END_OF_TEXT
        return {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": pad}

    @property
    def fingerprint(self) -> str:
        return self.backend.fingerprint

    @property
    def encoder(self) -> str:
        return self._fast[0]

    @cached_property
    def _fast(self) -> tuple[str, Callable[[Sequence[str]], list[NDArray[np.uint32]]]]:
        from data.tokenization.encoders import choose_encoder

        return choose_encoder(self.backend, self._wanted_encoder)

    @property
    def drops_first_space(self) -> bool:
        return self.backend.drops_first_space

    def encode(self, text: str, *, allow_special: bool = False, continued: bool = False) -> list[int]:
        _check_unicode([text])
        opening: Before = "text" if continued else "nothing"
        if not allow_special:
            return self.backend.encode(text, before=opening)
        parts: list[str | int] = list(split_special(text, self.special_tokens))
        ids: list[int] = []
        for before, part, after in zip([None, *parts], parts, [*parts[1:], None]):
            if isinstance(part, int):
                ids.append(part)
            else:
                part = self._trimmed(part, before, after)[1]
                ids += self.backend.encode(part, before=opening if before is None else "special")
        return ids

    def encode_between(self, text: str, before: int | None, after: int | None) -> tuple[list[int], list[Span]]:
        _check_unicode([text])
        first, text = self._trimmed(text, before, after)
        ids, spans = self.backend.encode_spans(text, before="nothing" if before is None else "special")
        return ids, [(first + start, first + end) for start, end in spans]

    def _trimmed(self, text: str, before: object, after: object) -> tuple[int, str]:
        """What special tokens beside `text` leave of it, and how many characters are gone at its beginning."""
        trims, size = self.backend.trims, len(text)
        if isinstance(before, int) and trims.get(before, (False, False))[1]:
            text = text.lstrip(WHITE_SPACE)
        gone = size - len(text)
        if isinstance(after, int) and trims.get(after, (False, False))[0]:
            text = text.rstrip(WHITE_SPACE)
        return gone, text

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        try:
            return self._fast[1](texts)
        except Exception:  # each library has its own for text that is no Unicode
            _check_unicode(texts)
            raise

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]], *, skip_special_tokens: bool = False) -> str:
        text = self.decode_bytes(ids, skip_special_tokens=skip_special_tokens).decode(errors="replace")
        return text.removeprefix(" ") if self.drops_first_space else text

    def decode_bytes(
        self, ids: Sequence[int] | NDArray[np.integer[Any]], *, skip_special_tokens: bool = False
    ) -> bytes:
        pieces = self.backend.pieces if skip_special_tokens else self._all_pieces
        unknown = [int(index) for index in ids if not 0 <= index < len(pieces)]
        if unknown:
            raise ValueError(f"there is no token {unknown[0]} in a vocabulary of {len(pieces)}")
        return b"".join([pieces[index] for index in ids])

    @cached_property
    def _all_pieces(self) -> list[bytes]:
        pieces = list(self.backend.pieces)
        for name, index in self.special_tokens.items():
            pieces[index] = name.encode()
        return pieces

    def token_bytes(self) -> NDArray[np.int32]:
        return np.array([len(piece) for piece in self.backend.pieces], dtype=np.int32)

    def _huggingface_config(self) -> dict[str, Any]:
        """What `transformers` reads beside the model's file."""
        others = [name for name in self.special_tokens if name not in self.named_tokens.values()]
        config: dict[str, Any] = {
            **self.named_tokens,
            "additional_special_tokens": others,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        }
        optional = {"tokenizer_class": self.backend.tokenizer_class, "chat_template": self.chat_template}
        return config | {key: value for key, value in optional.items() if value is not None}


def _backend(kind: Kind, serialized: bytes, origin: Path | str) -> Backend:
    try:
        if kind == "bpe":
            from data.tokenization.byte_level import ByteLevelBPE

            return ByteLevelBPE(serialized)
        if kind == "bpe-byte-fallback":
            from data.tokenization.byte_fallback import ByteFallbackBPE

            return ByteFallbackBPE(serialized)
        from data.tokenization.sentence_piece import SentencePiece

        return SentencePiece(kind, serialized)
    except UserError:
        raise
    except Exception as error:  # `tokenizers` and `sentencepiece` raise bare Exception and RuntimeError
        raise UserError(f"The model of the tokenizer in {origin} is damaged. Run {TRAIN_COMMAND}.") from error


def _restore(kind: Kind, serialized: bytes, *others: Any) -> SubwordTokenizer:
    return SubwordTokenizer(_backend(kind, serialized, "memory"), *others)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _check_unicode(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"The text holds a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start}), "
                "which is half a character and no valid Unicode. Remove it."
            ) from error
