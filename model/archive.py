"""The file of a checkpoint: the archive that `torch.save` makes, sealed with a checksum of itself.

The checksum is XXH3-128 over every byte of the archive as `torch.save` left it, and stands behind it as the comment
that a zip archive may end with. So it goes wherever the file goes, and `torch.load` reads the file as it is. Files
without one, of an earlier version, are read as well. PyTorch itself checks nothing when it reads.

Imports nothing heavy: the process that writes checkpoints beside a training run needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, wraps
from pathlib import Path
from typing import IO, TypeVar

import xxhash

from config.files import atomic_write

LABEL = b"quern xxh3-128 "
COMMENT = len(LABEL) + 2 * xxhash.xxh3_128().digest_size
LAST_RECORD, LAST_RECORD_SIGNATURE = 22, b"PK\5\6"  # of a zip archive, with its length in bytes
NO_COMMENT = b"\0\0"  # where the last record ends: the length of the comment that follows it
BLOCK = 4 * 2**20

T = TypeVar("T")


class SealingFile:
    """A file to give to `torch.save`; `seal` then adds the checksum of all that was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = xxhash.xxh3_128()

    def write(self, data: bytes | memoryview) -> int:
        """Append `data`; returns its length in bytes."""
        self._hash.update(data)
        self._file.write(data)
        return len(data)

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()

    @property
    def checksum(self) -> str:
        """XXH3-128 of all that was written."""
        return self._hash.hexdigest()

    def seal(self) -> None:
        """End the file, which must now be a whole archive without a comment."""
        self._file.seek(-2, 2)
        self._file.write(COMMENT.to_bytes(2, "little") + LABEL + self.checksum.encode())


def write_archive(path: Path, parts: Iterable[bytes | memoryview], seal: bool = True) -> str:
    """Write a file, given in parts, to `path`, whole or not at all; `UserError` where the disk is full.

    Returns the checksum of its content; one that is a single archive is sealed with it.
    """
    with atomic_write(path) as file:
        sealing = SealingFile(file)
        for part in parts:
            sealing.write(part)
        if seal:
            sealing.seal()
    return sealing.checksum


def once_per_version(read: Callable[[Path], T]) -> Callable[[Path], T]:
    """`read`, which goes through a whole file, such that it does so once for each version of a file in a process."""

    @cache
    def of_version(path: Path, *_version: int) -> T:
        return read(path)

    @wraps(read)
    def remembering(path: Path) -> T:
        found = path.stat()
        return of_version(path.resolve(), found.st_ino, found.st_size, found.st_mtime_ns)

    return remembering


def checksum_of(path: Path) -> str | None:
    """The checksum that a file is sealed with, as it stands there; None where it has none."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - COMMENT))
        label, _, checksum = file.read().rpartition(LABEL)
    return checksum.decode() if not label and len(checksum) == COMMENT - len(LABEL) else None


def is_intact(path: Path) -> bool | None:
    """Whether the file holds what was written; None where it has no checksum. Reads the whole file."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - LAST_RECORD - COMMENT))
        end = file.read()
        record = end.rfind(LAST_RECORD_SIGNATURE)
        if record < 0 or end[record + LAST_RECORD - 2 : record + LAST_RECORD] != COMMENT.to_bytes(2, "little"):
            return None
        comment = end[record + LAST_RECORD :]
        left, found, buffer = size - len(comment) - 2, xxhash.xxh3_128(), memoryview(bytearray(BLOCK))
        file.seek(0)
        while left > 0 and (count := file.readinto(buffer[: min(left, BLOCK)])):
            found.update(buffer[:count])
            left -= count
        found.update(NO_COMMENT)
        return left == 0 and comment == LABEL + found.hexdigest().encode()
