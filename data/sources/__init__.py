"""Kinds of sources, one module per kind, chosen by the `kind:` of a source's configuration.

A kind is a module with two functions. `revision(name, config)` is the state of the origin as far as it can be told
without a network, or None; a source whose revision changed is fetched again. `download(name, config, folder, job)`
fills `folder`, which may hold what an interrupted run left, and returns the manifest; it is not yet saved.

A kind whose publisher has files in a format we read only has to list them: its `download` calls
`data.published.bring.bring` with a function that returns a `Listing`, and limits, parallel and continued downloads,
reuse of what is there, and streaming work. Its settings derive from `config.sources.PublishedSection`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from data.transport.slots import CONNECTIONS

if TYPE_CHECKING:
    from rich.progress import Progress

    from data.manifest import RawManifest

KINDS = {
    "sample": "data.sources.sample",
    "files": "data.sources.files",
    "urls": "data.sources.urls",
    "hub": "data.sources.hub",
    "common-crawl": "data.sources.common_crawl",
    "wikipedia": "data.sources.wikipedia",
}


def _silent() -> Progress:
    from rich.progress import Progress

    return Progress(disable=True)


@dataclass(frozen=True)
class Job:
    """What a download needs besides the source's own settings."""

    max_bad_fraction: float = 0.05
    """Stop when more records than this cannot be read."""
    previous: Path | None = None
    """The folder of an earlier complete download, whose files may be used again where they are still right."""
    progress: Progress = field(default_factory=_silent)
    max_bytes: int | None = None
    """Take files of at most so many bytes, as they are published."""
    streaming: bool = False
    """Note down where the files are, and fetch nothing."""
    connections_per_host: int = CONNECTIONS


class Source(Protocol):
    """The two functions of a kind's module."""

    def revision(self, name: str, config: Any) -> str | None:
        """The origin's state, where it can be told without a network."""

    def download(self, name: str, config: Any, folder: Path, job: Job) -> RawManifest:
        """Bring the data into `folder`; raises `UserError` for what the user can put right."""


def source_of(kind: str) -> Source:
    """The module for a kind of source."""
    return cast(Source, importlib.import_module(KINDS[kind]))
