"""A folder that takes the place of an earlier export all at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from config.errors import UserError
from config.files import disk_errors, recover_directory, replace_directory
from inference.exporting.subject import check_free


def check_replaceable(target: Path, force: bool, is_ours: Callable[[str], bool]) -> None:
    """Raise `UserError` where `target` must not become the folder: it exists, and without `force` or not as an export.

    That has only files whose names `is_ours` knows.
    """
    recover_directory(target.absolute())
    names = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    foreign = [name for name in names if not is_ours(name)]
    check_free(target, force, foreign if target.is_dir() or not target.exists() else [target.name])


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write files into, which then takes its place; what was there stays until then.

    Raises `UserError` where the disk has no room or cannot be written to.
    """
    from safetensors import SafetensorError

    target = Path(os.path.abspath(target))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(target):
            temporary.mkdir(parents=True, exist_ok=True)
            yield temporary
            for path in temporary.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        replace_directory(temporary, target)
    except SafetensorError as error:
        raise UserError(f"{target} could not be written: {error}. What was there before is unchanged.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
