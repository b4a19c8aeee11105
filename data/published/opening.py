"""Opening a published file wherever it lies: at an http(s) address, in any file system that fsspec knows, or here."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any

from config.errors import UserError
from config.files import missing_package
from data.transport.clients import client_for, hub_endpoint
from data.transport.remote import LIST_ANEW, RemoteStream
from data.transport.slots import CONNECTIONS

MARKS = ("ETag", "etag", "checksum", "md5Hash", "blob_id", "LastModified", "updated", "mtime")
"""Where the file systems keep what changes with a file, the more telling ones first."""
READ_AHEAD = 8 << 20


def open_published(
    url: str, size: int | None = None, etag: str | None = None, connections: int = CONNECTIONS
) -> IO[bytes]:
    """The file as a readable, seekable binary file, of which little is in memory. The caller closes it.

    At http(s) addresses it is read by at most `connections` requests at a time to its host, with all others that this
    user's processes open on this machine.
    Raises `UserError` where it cannot be reached, or is no longer of this `size` and `etag`.
    """
    if url.startswith(("http://", "https://")):
        return io.BufferedReader(RemoteStream(client_for(url), url, size, etag, connections), 1 << 16)
    system, path = file_system(url)
    try:
        found = describe(system, path)
        if size not in (None, found[0]) or etag not in (None, found[1]):
            raise UserError(f"{url} has changed. {LIST_ANEW}")
        opened: IO[bytes] = system.open(path, "rb", **({} if is_local(url) else {"block_size": READ_AHEAD}))
        return opened
    except OSError as error:
        raise unreachable(url, error) from error


def is_local(url: str) -> bool:
    """Whether `url` is a path of this machine."""
    return "://" not in url or url.startswith("file://")


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system for `url`, and the path of `url` in it. `UserError` names a package that is missing."""
    import fsspec

    scheme = url.partition("://")[0] if "://" in url else "file"
    options = {"endpoint": hub_endpoint()} if scheme == "hf" else {}
    try:
        system = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise missing_package(url, error) from error
    except ValueError as error:
        raise UserError(f"{url}: {scheme}:// is no kind of address that can be read.") from error
    return system, str(Path(url).absolute()) if "://" not in url else url


def describe(system: Any, path: str) -> tuple[int | None, str | None]:
    """Size of a file in bytes, and a mark that changes when the file does."""
    info = system.info(path)
    mark = next((str(info[key]) for key in MARKS if info.get(key) is not None), None)
    return info.get("size"), mark


def unreachable(url: str, error: Exception) -> UserError:
    """What to tell the user about a file system's own error."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{url} is not there.")
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return UserError(f"{url} cannot be read: {reason}. Check the address and your access.")


class Beginning(io.RawIOBase):
    """The first `length` bytes of a file, as if it ended there."""

    def __init__(self, file: IO[bytes], length: int) -> None:
        self._file = file
        self._length = length

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The position of the next read, in bytes."""
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to `offset` from the beginning, the position or the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._length}[whence]
        return self._file.seek(max(base + offset, 0))

    def readinto(self, target: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill `target` as far as the beginning goes."""
        data = self._file.read(max(min(len(target), self._length - self.tell()), 0))
        target[: len(data)] = data
        return len(data)
