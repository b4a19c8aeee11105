"""Any text file as tokens to evaluate on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from config.errors import UserError

if TYPE_CHECKING:
    from data.tokenization import Tokenizer


def read_text_tokens(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of a UTF-8 text file as int64, after one end-of-text token, so that its first token is scored too.

    Raises `UserError` where the file is missing, empty or not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path} is not a file that can be read. Give --text the path of a text file.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start:,}). Save it as UTF-8, as iconv -f ENCODING -t UTF-8 does."
        ) from error
    ids = tokenizer.encode(text)
    if len(ids) == 0:
        raise UserError(f"{path} is empty. Give --text a file with text in it.")
    return np.array([tokenizer.end_of_text_id, *ids], dtype=np.int64)
