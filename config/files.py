"""Writing to disk so that a reader, or a crash, never meets half a file."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from config.errors import UserError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a quota or a missing permission while writing `path` into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"No space left while writing {path}. Free some disk and run the command again; "
                "what was there before is unchanged."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"May not write {path}: {os.strerror(error.errno)}. Choose another folder.") from error
        raise


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries, so that a rename inside it survives a power cut."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success flush it to disk and rename it over `path`.

    On any exception the temporary file is removed and `path` keeps what it had. A full disk raises `UserError`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_directory(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with atomic_write(path, "w") as file:
        file.write(text)


def replace_directory(new: Path, target: Path) -> None:
    """Put the finished directory `new` in the place of `target`, which keeps its old content until the last moment.

    Both must lie on one file system. A crash leaves either the old or the new content under `target`, or, between the
    two renames, the old one whole under `target.old`, which `recover_directory` restores.
    """
    old = target.with_name(target.name + ".old")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        os.replace(new, target)
        sync_directory(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def recover_directory(target: Path) -> None:
    """Restore `target` from `target.old` after a crash between the two renames of `replace_directory`."""
    old = target.with_name(target.name + ".old")
    if old.exists() and not target.exists():
        os.replace(old, target)


@contextmanager
def exclusive(path: Path, busy: str) -> Iterator[None]:
    """Hold `path` for this process alone, by a lock file beside it; the lock ends with the process, however that ends.

    Raises `UserError(busy)` where another process holds it. Without `fcntl` (Windows) there is no lock.
    """
    lock = path.with_name(f".{path.name}.lock")
    with disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "wb")
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except BlockingIOError as error:
            raise UserError(busy) from error
        yield
