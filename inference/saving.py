"""What was written in a session, as a file to keep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from config.errors import UserError
from config.files import write_text

Exchange = tuple[str, Sequence[str]]  # what a person wrote, and what the model made of it, one text or several samples


def save_session(path: Path, exchanges: Sequence[Exchange], chat: bool) -> None:
    """Write `exchanges` to `path` at once, by its ending: `.json`, or `.md` for Markdown.

    JSON of a conversation is `{"messages": [...]}`, a line of a file to fine-tune on; of continued texts it is
    `{"texts": [{"prompt": ..., "continuations": [...]}]}`. Raises `UserError` for another ending, or where nothing was
    written yet.
    """
    if not exchanges:
        raise UserError("There is nothing to save yet.")
    if path.suffix == ".json":
        text = json.dumps(_as_json(exchanges, chat), ensure_ascii=False, indent=None if chat else 2) + "\n"
    elif path.suffix == ".md":
        text = _as_markdown(exchanges, chat)
    else:
        raise UserError(f"{path}: a name that ends in .json or .md tells how to save.")
    write_text(path, text)


def _as_json(exchanges: Sequence[Exchange], chat: bool) -> dict[str, object]:
    if not chat:
        return {"texts": [{"prompt": prompt, "continuations": list(texts)} for prompt, texts in exchanges]}
    turns = [
        (role, text) for asked, (answer, *_) in exchanges for role, text in (("user", asked), ("assistant", answer))
    ]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def _as_markdown(exchanges: Sequence[Exchange], chat: bool) -> str:
    if chat:
        return "\n\n".join(f"**You**\n\n{asked}\n\n**Model**\n\n{answer}" for asked, (answer, *_) in exchanges) + "\n"
    return "\n\n---\n\n".join(f"**{prompt}**{text}" for prompt, texts in exchanges for text in texts) + "\n"
