"""Compiling kernels with numba, once for each state of their code.

Numba keeps machine code from run to run, but looks only at the file of the function itself to see whether it still
holds, not at what that calls. So it is kept in a folder named after the content of all files of the room with kernels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import config

Function = TypeVar("Function", bound=Callable[..., Any])
ROOT = Path(__file__).resolve().parents[1]


def kernel(function: Function) -> Function:
    """Compile `function` when it is first called; without bounds checks, and division by zero gives inf or nan.

    While it runs, other threads of Python may.
    """
    folder = _folder(Path(function.__code__.co_filename).resolve().relative_to(ROOT).parts[0])
    before = getattr(config, "CACHE_DIR")
    try:
        setattr(config, "CACHE_DIR", folder or before)
        return cast(Function, numba.njit(cache=folder is not None, error_model="numpy", nogil=True)(function))
    finally:
        setattr(config, "CACHE_DIR", before)


@lru_cache
def _folder(room: str) -> str | None:
    """Where machine code is kept: beside the code, else in the user's cache, or nowhere if neither can be written."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / room).rglob("*.py")):
        content = path.read_bytes()
        if b"@kernel" in content or b"@intrinsic" in content:
            digest.update(content)
    for base in (ROOT / room / "__pycache__", Path(os.path.expanduser("~"), ".cache", "quern")):
        folder = base / f"kernels-{digest.hexdigest()[:16]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return str(folder)
    return None
