"""A tokenizer of `transformers` behind our protocol: byte-level BPE, or SentencePiece-like BPE with byte fallback.

The ids are those of the library that `transformers` itself runs. What has no bytes for its tokens, or would change the
text, but for the space that SentencePiece puts in front of it and Qwen's composing of characters, is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from config.errors import UserError
from data.tokenization.byte_fallback import ByteFallbackBPE, steps
from data.tokenization.byte_level import ByteLevelBPE
from data.tokenization.probes import probe_texts
from data.tokenization.special import SPACE
from data.tokenization.storage import Offices
from data.tokenization.subword import SubwordTokenizer

_PREPEND = {"type": "Prepend", "prepend": SPACE}
_MARK_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_DECODERS = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_OFFICES = ("bos_token", "eos_token", "pad_token", "unk_token")


def adopt_tokenizer(theirs: Any, endings: Sequence[int], pad: int | None) -> SubwordTokenizer:
    """`theirs`, a fast tokenizer of `transformers`.

    `endings` are the ids that end what the model writes, by its configuration; where there are none, the tokenizer's
    own. Raises `UserError` naming what cannot be imported.
    """
    backend = getattr(theirs, "backend_tokenizer", None)
    if backend is None:
        raise UserError("The tokenizer has no tokenizer.json, the only form that can be imported.")
    description = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    special = {token["content"]: token["id"] for token in description["added_tokens"] if token["special"]}
    ours = _adopted(description, special)
    _check_special(ours, special)
    offices = _offices(theirs, endings, pad, set(special.values()))
    settings = {"data": {"tokenizer": {"kind": ours.kind, "encoder": "tokenizers"}}}
    return SubwordTokenizer(ours, special, _template(theirs), "tokenizers", settings, offices)


def check_conversion(ours: SubwordTokenizer, folder: Path) -> None:
    """Raise `UserError` where `transformers` made `ours` of a `tokenizer.model` in `folder` that gives other ids.

    SentencePiece puts a space in front of a text that begins with one, too. Some of its conversions do not, and their
    ids are then those that `transformers` has.
    """
    model = folder / "tokenizer.model"
    if (folder / ours.backend.file_name).exists() or not model.exists():
        return
    from sentencepiece import SentencePieceProcessor

    library = SentencePieceProcessor(model_file=str(model))
    texts = [text for text in probe_texts() if not text.startswith((" ", SPACE))]
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        if library.encode(text) != ids.tolist():
            made = f"t = T.from_pretrained('{folder}'); t.save_pretrained('{folder}')"
            raise UserError(
                f"Of {model}, transformers makes a tokenizer that gives other ids than it for {text[:20]!r}. If it is "
                "of Llama's kind, this writes the tokenizer.json that is missing: "
                f'python -c "from transformers import LlamaTokenizer as T; {made}"'
            )


def _adopted(description: dict[str, Any], special: Container[str]) -> ByteLevelBPE | ByteFallbackBPE:
    """What encodes as the `tokenizer.json` says; `UserError` where it takes text in a way that is not done here."""
    model, cutters = description["model"], list(steps(description["pre_tokenizer"]))
    if model["type"] != "BPE":
        raise UserError(f"The tokenizer is a {model['type']}; only a BPE can be imported.")
    if model.get("dropout"):
        raise UserError("The tokenizer encodes at random (dropout), which is not done here.")
    for cutter in cutters:
        if cutter.get("behavior") == "Removed" or "Whitespace" in cutter["type"]:
            raise UserError("The tokenizer drops parts of the text, which is not done here.")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError("The tokenizer marks in its tokens where words begin or end, which is not done here.")
    if not model.get("byte_fallback") or any(cutter["type"] == "ByteLevel" for cutter in cutters):
        _check_byte_level(description, cutters)
        return ByteLevelBPE(_serialized(description))
    _check_byte_fallback(description, cutters)
    merges = [merge for merge in model["merges"] if _joined(merge) not in special]
    return ByteFallbackBPE(_serialized(description | {"model": model | {"merges": merges}}))


def _serialized(description: dict[str, Any]) -> bytes:
    return json.dumps(description, ensure_ascii=False).encode()


def _joined(merge: str | list[str]) -> str:
    """The token that a merge makes; text that spells a special token must not become one."""
    return merge.replace(" ", "") if isinstance(merge, str) else "".join(merge)


def _check_byte_level(description: dict[str, Any], cutters: Sequence[dict[str, Any]]) -> None:
    """Raise `UserError` unless the BPE is byte-level and takes text as it is, but for composing characters (NFC)."""
    for step in steps(description["normalizer"]):
        if step["type"] != "NFC":
            raise _changes_text(step)
    byte_level = [cutter for cutter in cutters if cutter["type"] == "ByteLevel"]
    decoder = (description["decoder"] or {}).get("type")
    if not byte_level or decoder != "ByteLevel":
        raise UserError("The tokenizer's BPE is neither byte-level nor with byte fallback; no other can be imported.")
    if any(cutter.get("add_prefix_space") or cutter["type"] == "Metaspace" for cutter in cutters):
        raise UserError("The tokenizer puts a space in front of every text, which a byte-level one cannot do here.")


def _check_byte_fallback(description: dict[str, Any], cutters: Sequence[dict[str, Any]]) -> None:
    """Raise `UserError` unless the BPE writes spaces as SentencePiece does, and every byte has a token."""
    for step in steps(description["normalizer"]):
        if step not in (_PREPEND, _MARK_SPACES):
            raise _changes_text(step)
    marks = [cutter for cutter in cutters if cutter["type"] == "Metaspace"]
    if any(mark["replacement"] != SPACE for mark in marks):
        raise UserError("The tokenizer writes spaces by a mark of its own, which is not done here.")
    decoders = list(steps(description["decoder"]))
    if decoders not in (_DECODERS, [*_DECODERS, _STRIP]):
        kinds = ", ".join(step["type"] for step in decoders) or "none"
        raise UserError(f"The tokenizer has a decoder ({kinds}) that is not that of SentencePiece, as is needed here.")
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in description["model"]["vocab"]]
    if missing:
        raise UserError(f"The tokenizer has no token for the byte 0x{missing[0]:02X}, so it cannot write every text.")


def _changes_text(step: dict[str, Any]) -> UserError:
    return UserError(f"The tokenizer changes the text before it encodes it ({step['type']}), which is not done here.")


def _check_special(ours: ByteLevelBPE | ByteFallbackBPE, special: dict[str, int]) -> None:
    """Raise `UserError` where text that spells a special token would become one."""
    reserved = set(special.values())
    for name in special:
        for text in (name, f" {name}", f"a{name}b", f"{name}{name}"):
            if reserved & set(ours.encode(text)):
                raise UserError(f"The tokenizer makes the special token {name!r} of text that spells it.")


def _offices(theirs: Any, endings: Sequence[int], pad: int | None, special: set[int]) -> Offices:
    if not endings and theirs.eos_token_id is not None:
        endings = [theirs.eos_token_id]
    if not endings:
        raise UserError("Neither the model's nor the tokenizer's configuration names the token that ends a text.")
    for index in endings:
        if index not in special:
            raise UserError(f"The token that ends a text, {index}, is no special token of the tokenizer.")
    pad = theirs.pad_token_id if pad is None else pad
    names = {office: getattr(theirs, office) for office in _OFFICES}
    return Offices(
        end_of_text=endings[0],
        pad=pad if pad in special else endings[0],
        prefix=tuple(_prefix(theirs)),
        endings=tuple(endings),
        names={office: str(name) for office, name in names.items() if name is not None},
    )


def _prefix(theirs: Any) -> list[int]:
    """The ids that the tokenizer puts before a text; one put after it is no part of a text that is to go on."""
    plain, whole = (theirs("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    start = next(at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain)
    return [int(index) for index in whole[:start]]


def _template(theirs: Any) -> str | None:
    template = theirs.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
