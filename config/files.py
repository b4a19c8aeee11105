"""Writing so that a reader, or a crash, never meets half a file: on disk, or in an object store such as S3."""

import errno
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from config.errors import UserError

UNFINISHED = ".unfinished"
S3, GS, AZURE = ("s3fs", "-e '.[s3]'"), ("gcsfs", "-e '.[gs]'"), ("adlfs", "adlfs")
PACKAGES = {"s3": S3, "s3a": S3, "gs": GS, "gcs": GS, "abfs": AZURE, "az": AZURE}
"""What addresses of a storage need, and how it is installed."""


def location(address: str) -> Path:
    """Where a setting points: a local path, or for `s3://bucket/corpus` and the like a path of its storage.

    The latter behaves as a `Path` does, but is none: what takes only real files (`mmap`, the functions of `os`) refuses
    it. Raises `UserError` where the storage needs a package that is missing.
    """
    if "://" not in address:
        return Path(address)
    from upath import UPath

    try:
        path = UPath(address, use_listings_cache=False)
        path.fs  # loads what the protocol needs
    except ImportError as error:
        raise missing_package(address, error) from error
    except ValueError as error:
        scheme = address.partition("://")[0]
        raise UserError(f"{address}: {scheme}:// is no kind of address that can be used, as s3:// is.") from error
    return cast(Path, path)


def missing_package(address: str, error: ImportError) -> UserError:
    """What to tell a user whose address is of a storage that the packages that are installed do not know."""
    scheme = address.partition("://")[0]
    package, argument = PACKAGES.get(scheme, ("", ""))
    hint = f"the package {package}. Type: pip install {argument}" if package else str(error)
    return UserError(f"{scheme}:// addresses need {hint}")


def local(address: str, setting: str) -> Path:
    """The local path that `setting` must be here; `UserError` where it is an address of a storage."""
    if "://" in address:
        raise UserError(
            f"{setting} is {address}, but this needs a folder of this machine. Copy from or to the storage, such as "
            f"with aws s3 sync, and set {setting} to the folder."
        )
    return Path(address)


def is_remote(path: Path) -> bool:
    """Whether `path` is one of a storage and not of this machine."""
    return hasattr(path, "fs")


def remove_directory(directory: Path) -> None:
    """Remove `directory` with all that is in it, if it is there."""
    remote: Any = directory
    if not is_remote(directory):
        shutil.rmtree(directory, ignore_errors=True)
    elif directory.exists():
        remote.fs.rm(remote.path, recursive=True)


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

    On any exception the temporary file is removed and `path` keeps what it had. A full disk raises `UserError`. For a
    storage the file is written here and then put there in one piece.
    """
    if is_remote(path):
        remote: Any = path
        with tempfile.NamedTemporaryFile(mode, encoding=None if "b" in mode else "utf-8") as here, disk_errors(path):
            yield here
            here.flush()
            remote.fs.put_file(here.name, remote.path)
        return
    path = Path(path)
    # On a disk that several machines share, their processes may have the same number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
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


def scratch_file(path: Path) -> IO[bytes]:
    """A file without a name for what does not fit into memory while `path` is made; gone once it is closed.

    The end of the process closes it, however that comes. It lies on the disk of `path`, or on that of this machine
    where `path` is one of a storage.
    """
    if is_remote(path):
        return tempfile.TemporaryFile()
    path.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with atomic_write(path, "w") as file:
        file.write(text)


def replace_directory(new: Path, target: Path) -> None:
    """Put the finished directory `new` in the place of `target`, which keeps its old content until the last moment.

    Both must lie on one file system. A crash leaves either the old or the new content under `target`, or, between the
    two renames, the old one whole under `target.old`, which `recover_directory` restores. A storage cannot rename:
    there the files are copied one by one, and until that is finished, `target` holds a file named `UNFINISHED`.
    """
    if is_remote(target):
        _copy_directory(new, target)
        return
    old = target.with_name(target.name + ".old")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        os.replace(new, target)
        sync_directory(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def _copy_directory(new: Any, target: Any) -> None:
    with atomic_write(target / UNFINISHED):
        pass
    names = {path.name for path in new.iterdir()}
    for path in list(target.iterdir()):
        if path.name not in {*names, UNFINISHED}:
            path.unlink()
    for name in sorted(names):
        target.fs.copy((new / name).path, (target / name).path)
    (target / UNFINISHED).unlink()
    remove_directory(new)


def recover_directory(target: Path) -> None:
    """Restore `target` from `target.old` after a crash between the two renames of `replace_directory`."""
    if is_remote(target):
        return
    old = target.with_name(target.name + ".old")
    if old.exists() and not target.exists():
        os.replace(old, target)


@contextmanager
def exclusive(path: Path, busy: str, patience: float = 0.0) -> Iterator[IO[bytes] | None]:
    """Hold `path` for this process alone, by a lock file beside it; the lock ends with the process, however that ends.

    Yields that file: a process that inherits its descriptor holds the lock as well, until both have ended. Raises
    `UserError(busy)` where another process holds it for `patience` seconds more. In a storage there is no lock.
    """
    if is_remote(path):
        yield None
        return
    lock = path.with_name(f".{path.name}.lock")
    deadline = time.monotonic() + patience
    with disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        while (file := try_lock(lock)) is None and time.monotonic() < deadline:
            time.sleep(0.1)
    if file is None:
        raise UserError(busy)
    with file:
        yield file


def try_lock(path: Path) -> IO[bytes] | None:
    """The file `path`, locked until it is closed or the process ends; None where somebody else has locked it.

    Threads of one process exclude each other, too. Without `fcntl` (Windows) there are no locks.
    """
    file = open(path, "wb")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        file.close()
        return None
    return file
