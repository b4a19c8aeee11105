"""Token files as preprocessing leaves them, from numbers that a test makes up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Content = tuple[NDArray[Any], Sequence[int], int]  # tokens of a file, where its documents end, bytes of their text


def write_token_files(folder: Path, splits: Mapping[str, Sequence[Content]], **manifest: Any) -> None:
    """Write `train` and `val`, each of any number of files, with a manifest that `manifest` adds to.

    The tokens' own type is that of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        name: [_write(folder, name, number, split) for number in range(len(split))] for name, split in splits.items()
    }
    (dtype,) = {tokens.dtype.name for split in splits.values() for tokens, _, _ in split}
    about = {
        "fingerprint": "f" * 64,
        "dtype": dtype,
        "splits": {"train": [], "val": [], **files},
        "tokenizer_fingerprint": "a" * 64,
        "end_of_text_id": 0,
        "seed": 1,
        "validation": "documents",
        "config": {},
        "funnel": {},
    }
    (folder / "manifest.json").write_text(json.dumps({**about, **manifest}))


def _write(folder: Path, split: str, number: int, contents: Sequence[Content]) -> dict[str, Any]:
    tokens, ends, size = contents[number]
    name = split if len(contents) == 1 else f"{split}_{number:04d}"
    content, index = tokens.tobytes(), np.array(ends, dtype="<u8").tobytes()
    (folder / f"{name}.bin").write_bytes(content)
    (folder / f"{name}.index").write_bytes(index)
    return {
        "name": f"{name}.bin",
        "tokens": len(tokens),
        "documents": len(ends),
        "bytes": size,
        "sha256": hashlib.sha256(content).hexdigest(),
        "index_sha256": hashlib.sha256(index).hexdigest(),
    }
