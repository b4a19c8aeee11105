"""Common Crawl: the web as it was crawled, by the name of the crawl; https://commoncrawl.org.

A crawl publishes the list of its files, `wet.paths.gz` (text) and `warc.paths.gz` (pages as they were served), and is
read as it is published: WET gives its text, WARC the main content of its HTML.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

from config.errors import UserError
from config.sources import CommonCrawlSourceConfig
from data.manifest import RawManifest
from data.published.bring import bring
from data.published.listing import ListedFile, Listing
from data.sources import Job
from data.transport.pages import read_page


def revision(name: str, config: CommonCrawlSourceConfig) -> str:
    """The crawl's name: once published, it does not change."""
    return config.crawl


def download(name: str, config: CommonCrawlSourceConfig, folder: Path, job: Job) -> RawManifest:
    """Bring the chosen files of the crawl, as they are published."""
    return bring(name, "common-crawl", config, folder, job, lambda: list_files(config, job.connections_per_host))


def list_files(config: CommonCrawlSourceConfig, connections: int) -> Listing:
    """The chosen files, in the order of the crawl's own list."""
    base = config.base_url.rstrip("/")
    paths = _paths(f"{base}/crawl-data/{config.crawl}/{config.format}.paths.gz", connections)
    chosen = choose(paths, config.files, config.fraction)
    return Listing(
        origin=f"{base}/crawl-data/{config.crawl}, {len(chosen):,} of {len(paths):,} {config.format} files",
        licence=config.about.licence or "not stated",
        revision=config.crawl,
        files=[ListedFile(_place(path), f"{base}/{path}", lasting=True) for path in chosen],
    )


def choose(paths: Sequence[str], files: int | None, fraction: float | None) -> list[str]:
    """The files to take: the first `files`, the share `fraction` spread evenly over the list, or all."""
    if files is not None:
        return list(paths[:files])
    if fraction is None:
        return list(paths)
    count = max(1, round(fraction * len(paths)))
    return [paths[number * len(paths) // count] for number in range(count)]


def _paths(url: str, connections: int) -> list[str]:
    """The crawl's list of its files."""
    packed = read_page(url, connections)
    if packed is None:
        raise UserError(
            f"There is no {url}. The names of the crawls stand at https://data.commoncrawl.org/crawl-data/index.html; "
            "set the source's crawl to one of them."
        )
    try:
        paths = gzip.decompress(packed).decode().split()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{url} is not a packed list of files ({error}). Try again later.") from error
    if not paths:
        raise UserError(f"{url} names no files.")
    for path in paths:
        if path.startswith("/") or ".." in path.split("/"):
            raise UserError(f"{url} names {path}, which leads out of its folder. Nothing is fetched.")
    return paths


def _place(path: str) -> str:
    """Where a file is kept: by its segment and name."""
    return path.partition("/segments/")[2] or path
