"""What a kind of source finds out before anything is fetched: which files there are, and what is known of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ListedFile:
    """One published file.

    `url` is an http(s) address, one of another file system that fsspec knows (s3://, gs://, hf://), or a local path.
    `size` in bytes, `checksum` (algorithm, digest; see `RemoteFile`) and `etag` are given where they are known without
    asking for each file; what is needed and not given is asked for later.
    """

    path: str
    """Its place below the source's folder, with forward slashes. The suffix tells the format."""
    url: str
    size: int | None = None
    checksum: tuple[str, str] | None = None
    etag: str | None = None
    lasting: bool = False
    """Whether the content at this address never changes, so that size and address alone tell it."""


@dataclass(frozen=True)
class Listing:
    """The files of a source, in the order in which they are read and in which limits count them."""

    origin: str
    licence: str
    files: Sequence[ListedFile]
    revision: str | None = None
    """The exact state of the origin, such as a commit."""
    connections: int | None = None
    """Most requests at a time that this publisher allows."""
    refused: str = ""
    """A sentence for the user where the server answers 401 or 403."""
