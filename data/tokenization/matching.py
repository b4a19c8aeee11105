"""The tokenizer that a model was trained with, told by its fingerprint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from config.errors import UserError
from data.tokenization import load_tokenizer
from data.tokenization.protocol import Tokenizer


def matching_tokenizer(fingerprint: str, directories: Sequence[Path]) -> Tokenizer:
    """The first tokenizer of `directories` that has `fingerprint`.

    Raises `UserError` where none has it; of a folder without a tokenizer only if there is no other.
    """
    problem: UserError | None = None
    others: list[str] = []
    for directory in dict.fromkeys(directories):
        try:
            tokenizer = load_tokenizer(directory)
        except UserError as error:
            problem = problem or error
            continue
        if tokenizer.fingerprint == fingerprint:
            return tokenizer
        others.append(f"{directory} (fingerprint {tokenizer.fingerprint[:12]})")
    if problem is not None and not others:
        raise problem
    raise UserError(
        f"The checkpoint was trained with another tokenizer (fingerprint {fingerprint[:12]}) than that in "
        f"{' or '.join(others)}. Give the folder of the right one as data.tokenizer_dir=FOLDER."
    )
