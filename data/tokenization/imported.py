"""A tokenizer of `transformers` behind our protocol: byte-level BPE with any way of cutting text into words.

The ids are those of the library that `transformers` itself runs. What would change the text (a normaliser, a space put
in front), or has no bytes for its tokens, is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from config.errors import UserError
from data.tokenization.byte_level import ByteLevelBPE
from data.tokenization.storage import Offices
from data.tokenization.subword import SubwordTokenizer

_OFFICES = ("bos_token", "eos_token", "pad_token", "unk_token")


def adopt_tokenizer(theirs: Any, endings: Sequence[int], pad: int | None) -> SubwordTokenizer:
    """`theirs`, a fast tokenizer of `transformers`.

    `endings` are the ids that end what the model writes, by its configuration; where there are none, the tokenizer's
    own. Raises `UserError` naming what cannot be imported.
    """
    backend = getattr(theirs, "backend_tokenizer", None)
    if backend is None:
        raise UserError("The tokenizer has no tokenizer.json, the only form that can be imported.")
    serialized = _without_limits(json.loads(backend.to_str()))
    ours = ByteLevelBPE(serialized)
    _check(ours.description)
    special = {token["content"]: token["id"] for token in ours.description["added_tokens"] if token["special"]}
    _check_special(ours, special)
    offices = _offices(theirs, endings, pad, set(special.values()))
    settings = {"data": {"tokenizer": {"kind": "bpe", "encoder": "tokenizers"}}}
    return SubwordTokenizer(ours, special, _template(theirs), "tokenizers", settings, offices)


def _without_limits(description: dict[str, Any]) -> bytes:
    """Neither cut nor filled up, as a tokenizer may have been saved."""
    return json.dumps(description | {"truncation": None, "padding": None}, ensure_ascii=False).encode()


def _check(description: dict[str, Any]) -> None:
    """Raise `UserError` unless the tokenizer is a byte-level BPE that takes text as it is."""
    model = description["model"]
    if model["type"] != "BPE":
        raise UserError(f"The tokenizer is a {model['type']}; only a byte-level BPE can be imported.")
    if description["normalizer"] is not None:
        kind = description["normalizer"]["type"]
        raise UserError(f"The tokenizer changes the text before it encodes it ({kind}), which is not done here.")
    parts = list(_parts(description["pre_tokenizer"]))
    byte_level = [part for part in parts if part["type"] == "ByteLevel"]
    decoder = (description["decoder"] or {}).get("type")
    if not byte_level or decoder != "ByteLevel":
        raise UserError("The tokenizer's BPE is not byte-level, the only kind that can be imported.")
    if any(part.get("add_prefix_space") for part in byte_level) or any(part["type"] == "Metaspace" for part in parts):
        raise UserError("The tokenizer puts a space in front of every text, which is not done here.")
    if any(part.get("behavior") == "Removed" for part in parts) or any("Whitespace" in part["type"] for part in parts):
        raise UserError("The tokenizer drops parts of the text, which is not done here.")
    if model.get("dropout"):
        raise UserError("The tokenizer encodes at random (dropout), which is not done here.")


def _parts(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if step is not None and step["type"] == "Sequence":
        for part in step["pretokenizers"]:
            yield from _parts(part)
    elif step is not None:
        yield step


def _check_special(ours: ByteLevelBPE, special: dict[str, int]) -> None:
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
