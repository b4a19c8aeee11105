"""Files at plain http(s) addresses, in any format that we read.

An address may end in the file's checksum, as `#sha256=...`, `#sha1=...` or `#md5=...`; it is then checked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from config.errors import UserError
from config.sources import UrlsSourceConfig
from data.formats import READABLE, suffix_of
from data.manifest import RawManifest
from data.published.bring import bring
from data.published.limits import known_all
from data.published.listing import ListedFile, Listing
from data.sources import Job


def revision(name: str, config: UrlsSourceConfig) -> None:
    """None: only the servers know. What is complete is taken as it is until `--force` asks anew."""
    return None


def download(name: str, config: UrlsSourceConfig, folder: Path, job: Job) -> RawManifest:
    """Bring the files, as they are published."""
    return bring(name, "urls", config, folder, job, lambda: list_files(name, config, job.connections_per_host))


def list_files(name: str, config: UrlsSourceConfig, connections: int) -> Listing:
    """The files at the addresses, in the order given, with the sizes and ETags that the servers tell."""
    if not config.urls:
        raise UserError(f"Source {name!r} names no addresses. Set data.sources.{name}.urls to a list of them.")
    files = [_listed(name, url) for url in dict.fromkeys(config.urls)]
    hosts = dict.fromkeys(urlsplit(file.url).netloc for file in files)
    return Listing(
        origin=", ".join(hosts),
        licence=config.about.licence or "not stated",
        files=known_all(_named_apart(files), connections),
    )


def _listed(name: str, url: str) -> ListedFile:
    address, _, fragment = url.partition("#")
    parts = urlsplit(address)
    file = re.sub(r"[^\w.+-]", "_", unquote(parts.path).rpartition("/")[2]).lstrip(".")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"Source {name!r}: {url} is no http(s) address. For other kinds of addresses take kind: files.")
    if suffix_of(file) is None:
        raise UserError(f"{url} is of no format that can be read. Those are: {READABLE}.")
    found = re.fullmatch(r"(sha256|sha1|md5)=([0-9a-fA-F]+)", fragment)
    return ListedFile(file, address, checksum=(found[1], found[2].lower()) if found else None)


def _named_apart(files: Sequence[ListedFile]) -> list[ListedFile]:
    """The files, where those of one name lie in numbered folders."""
    names = [file.path for file in files]
    return [
        file if names.count(file.path) == 1 else ListedFile(f"{number:05d}/{file.path}", file.url, None, file.checksum)
        for number, file in enumerate(files)
    ]
