"""Wikipedia by language and date: the hub's cleaned text, or the official dumps of https://dumps.wikimedia.org.

Beside the files of a dump stands `dumpstatus.json`, with size and SHA-1 of each; mirrors may have only the text file of
the SHA-1 sums.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.sources import HubSourceConfig, WikipediaSourceConfig
from data.manifest import RawManifest
from data.published.bring import bring
from data.published.listing import ListedFile, Listing
from data.sources import Job, hub
from data.transport.pages import read_page

REPOSITORY = "wikimedia/wikipedia"
NEWEST_PARQUET = "20231101"
JOBS = ("articlesmultistreamdumprecombine", "articlesmultistreamdump", "articlesdumprecombine", "articlesdump")
"""What makes the files of all articles, the best first; large wikis have theirs in parts and put together."""
NAMES = (r"pages-articles-multistream\.xml\.bz2", r"pages-articles\.xml\.bz2")
PART = re.compile(r"\.xml-(p\d+p\d+)\.bz2$")
CONNECTIONS = 2
"""More are refused by the dumps' server."""


def revision(name: str, config: WikipediaSourceConfig) -> None:
    """None: only the server knows which date is the newest. `--force` asks for it."""
    return None


def download(name: str, config: WikipediaSourceConfig, folder: Path, job: Job) -> RawManifest:
    """Bring one language's articles, as they are published."""
    return bring(name, "wikipedia", config, folder, job, lambda: list_files(config, job.connections_per_host))


def list_files(config: WikipediaSourceConfig, connections: int) -> Listing:
    """The files of the language at the date, or the newest one that is complete."""
    if config.format == "dump":
        return _dump(config, min(connections, CONNECTIONS))
    subset = f"{config.date or NEWEST_PARQUET}.{config.language}"
    return hub.list_files(HubSourceConfig(kind="hub", repository=REPOSITORY, subset=subset))


def _dump(config: WikipediaSourceConfig, connections: int) -> Listing:
    base = config.base_url.rstrip("/")
    wiki = f"{config.language.replace('-', '_')}wiki"
    for date in [config.date] if config.date else _dates(f"{base}/{wiki}/", config.language, connections):
        folder = f"{base}/{wiki}/{date}"
        files = _by_status(base, f"{folder}/dumpstatus.json", connections)
        if files is None:
            files = _by_checksums(folder, f"{wiki}-{date}", connections)
        if files:
            licence = config.about.licence or "not stated"
            return Listing(origin=folder, licence=licence, revision=date, files=files, connections=CONNECTIONS)
    which = f"of {config.date}" if config.date else "that is complete"
    raise UserError(
        f"There is no dump of {wiki} {which} at {base}/{wiki}/. Set the source's date to one that is there."
    )


def _dates(url: str, language: str, connections: int) -> list[str]:
    """The dates of which there are folders, the newest first."""
    page = read_page(url, connections)
    if page is None:
        raise UserError(
            f"There is no {url}. Check the source's language, {language!r}: it is the first word of a Wikipedia's "
            "address, such as `de` in de.wikipedia.org."
        )
    return sorted({date.decode() for date in re.findall(rb'href="(?:[^"]*/)?(\d{8})/?"', page)}, reverse=True)


def _by_status(base: str, url: str, connections: int) -> list[ListedFile] | None:
    """The files of the best job that is done; None where the server does not tell."""
    page = read_page(url, connections)
    if page is None:
        return None
    try:
        jobs: dict[str, Any] = json.loads(page)["jobs"]
        done = [jobs[name] for name in JOBS if name in jobs and jobs[name]["status"] == "done"]
        files = done[0]["files"] if done else {}
        return [
            _listed(f"{base}{file['url']}", int(file["size"]), str(file["sha1"]))
            for name, file in sorted(files.items())
            if "-index" not in name
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{url} is not what it should be ({error!r}). Try again later.") from error


def _by_checksums(folder: str, prefix: str, connections: int) -> list[ListedFile]:
    """The file of all articles, as the list of SHA-1 sums names it."""
    sums = (read_page(f"{folder}/{prefix}-sha1sums.txt", connections) or b"").decode("utf-8", "replace")
    for name in NAMES:
        found = re.search(rf"^([0-9a-f]{{40}}) [ *]({prefix}-{name})$", sums, re.M)
        if found is not None:
            return [_listed(f"{folder}/{found[2]}", None, found[1])]
    return []


def _listed(url: str, size: int | None, sha1: str) -> ListedFile:
    """A file, under a name that ends as its format does."""
    name = PART.sub(r"-\1.xml.bz2", url.rpartition("/")[2])
    return ListedFile(name, url, size, ("sha1", sha1), lasting=True)
