"""A checkpoint as a folder of Hugging Face's `transformers`, which vLLM and the others of that field read, too."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.files import write_text
from data.tokenization import Tokenizer
from data.tokenization.probes import probe_texts
from data.tokenization.storage import TOKENIZER_CONFIG
from inference.exporting.card import model_card
from inference.exporting.replacing import check_replaceable, replacing
from inference.exporting.subject import Subject, check_room, save_tokenizer

_OURS = re.compile(
    r"(model[\w.-]*\.safetensors|model\.safetensors\.index|config|generation_config|tokenizer(_config)?)"
)
_ROOM = 20_000_000  # bytes for all but the weights


def check_folder(target: Path, force: bool) -> None:
    """Raise `UserError` where `target` must not become the folder: it exists, and without `force` or as no export."""
    check_replaceable(
        target, force, lambda name: name == "README.md" or bool(_OURS.fullmatch(name.removesuffix(".json")))
    )


def write_folder(subject: Subject, target: Path) -> None:
    """Make `target` the folder of `subject`, in place of one that is there, all at once.

    Raises `UserError` where the tokenizer has no counterpart or the disk no room; what was there is unchanged then.
    """
    import transformers

    settings_of: Any = transformers.GenerationConfig
    target = Path(os.path.abspath(target))
    check_room(target, subject.bytes + _ROOM)
    ends, tokenizer = subject.ends, subject.tokenizer
    tokens: dict[str, Any] = {"bos_token_id": subject.beginning, "eos_token_id": ends if ends[1:] else ends[0]}
    with replacing(target) as folder:
        save_tokenizer(tokenizer, folder)
        _limit_length(folder / TOKENIZER_CONFIG, subject.config.context_length)
        subject.theirs.config.update(tokens)
        subject.theirs.generation_config = settings_of(**tokens, pad_token_id=tokenizer.pad_id)
        subject.theirs.save_pretrained(folder)
        write_text(folder / "README.md", model_card(subject, target.name))
        check_tokenizer(folder, tokenizer)


def _limit_length(path: Path, length: int) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | {"model_max_length": length}
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise `UserError` unless what `transformers` reads from `folder` gives the same ids as `tokenizer`."""
    import transformers

    load: Any = transformers.AutoTokenizer
    theirs = load.from_pretrained(folder)
    texts = probe_texts()
    spelled = [text for text in texts if any(name in text for name in tokenizer.special_tokens)]
    spelled += [f"a{name}b" for name in tokenizer.special_tokens]
    plain = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    special = [tokenizer.encode(text, allow_special=True) for text in spelled]
    if theirs("")["input_ids"] != list(tokenizer.prefix_ids):
        raise UserError("transformers puts other tokens before a text than this tokenizer; nothing was written.")
    for some, split, expected in ((texts, True, plain), (spelled, False, special)):
        found = theirs(some, add_special_tokens=False, split_special_tokens=split)["input_ids"]
        for text, ids, wanted in zip(some, found, expected, strict=True):
            if ids != wanted:
                raise UserError(
                    f"transformers gives other ids than this tokenizer for {text[:40]!r}; nothing was written."
                )
