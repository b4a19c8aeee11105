"""What an earlier run left of a file: `name.fetch` beside it says of which content it is, or is a part of."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from config.files import write_text


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch: its address, its place on disk, and its size and checksum as far as the publisher tells them.

    `checksum` is the algorithm and the digest in hexadecimal: any name of `hashlib`, or `git-sha1` for a git blob.
    `etag` is what the server calls the content that is wanted, where that is known.
    With `take`, only so many bytes of its beginning are wanted; they cannot be checked against the checksum.
    """

    url: str
    path: Path
    size: int | None = None
    checksum: tuple[str, str] | None = None
    take: int | None = None
    etag: str | None = None

    @property
    def wanted(self) -> int | None:
        """How many bytes are to come, as far as that is known."""
        return self.size if self.take is None or self.size is not None and self.size < self.take else self.take

    @property
    def part(self) -> Path:
        """Where the bytes go until they are complete."""
        return self.path.with_name(self.path.name + ".part")

    @property
    def note(self) -> Path:
        """Where it is written which content that is."""
        return self.path.with_name(self.path.name + ".fetch")


@dataclass(frozen=True)
class Fetched:
    """A file that is on disk, complete and verified."""

    file: RemoteFile
    bytes: int
    sha256: str
    etag: str | None = None


@dataclass(frozen=True)
class Note:
    """What stands in `RemoteFile.note`; `size` and `sha256` are of the complete file, once it is."""

    url: str
    checksum: list[str] | None
    etag: str | None = None
    size: int | None = None
    sha256: str | None = None
    cut: bool = False
    """Whether the complete file is the beginning of a longer one, as far as that is known."""
    sent_as_is: bool = False
    """Whether the server names a packing, and yet what it sends, parts included, is the file itself."""


def read_note(file: RemoteFile) -> Note | None:
    """The note beside `file` if it is about the same content; where a checksum is known, that alone tells."""
    try:
        note = Note(**json.loads(file.note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    same = note.checksum == list(file.checksum) if file.checksum is not None else note.url == file.url
    return note if same else None


def write_note(
    file: RemoteFile,
    etag: str | None = None,
    size: int | None = None,
    sha256: str | None = None,
    sent_as_is: bool = False,
) -> None:
    """Say what the bytes of `file` on disk are, atomically."""
    cut = size is not None and size == file.take and size != file.size
    note = Note(file.url, list(file.checksum) if file.checksum else None, etag, size, sha256, cut, sent_as_is)
    write_text(file.note, json.dumps(asdict(note)))


def finished(file: RemoteFile) -> Fetched | None:
    """The file if it is complete on disk since an earlier run and still what is wanted, else None."""
    note = read_note(file)
    if note is None or note.sha256 is None or note.size is None:
        return None
    if file.checksum is None and file.etag is not None and note.etag != file.etag:
        return None
    if file.wanted is None and note.cut:
        return None
    if file.wanted not in (None, note.size) or not file.path.is_file() or file.path.stat().st_size != note.size:
        return None
    return Fetched(file, note.size, note.sha256, note.etag)


def unfinished_bytes(file: RemoteFile) -> int:
    """Bytes of the part that can be gone on with: there must be an ETag or a checksum to tell what they are of."""
    note = read_note(file)
    if note is None or (note.etag is None and file.checksum is None) or not file.part.is_file():
        return 0
    return file.part.stat().st_size


def present_bytes(file: RemoteFile) -> int:
    """Bytes of the file that an earlier run left, complete or not."""
    done = finished(file)
    return done.bytes if done is not None else unfinished_bytes(file)
