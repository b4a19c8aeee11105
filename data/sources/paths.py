"""Which files the paths of a source name: files, folders and globs, here or in other file systems."""

from __future__ import annotations

import glob
import os
import posixpath
from pathlib import Path

from config.errors import UserError
from config.sources import FilesSourceConfig
from data.formats import READABLE, suffix_of
from data.manifest import MANIFEST
from data.published.listing import ListedFile
from data.published.opening import describe, file_system, is_local, unreachable


def input_files(name: str, config: FilesSourceConfig) -> list[ListedFile]:
    """Every file that `paths` names; its `path` is its place below the deepest folder that holds them all.

    So the places, and the ids made of them, do not depend on where that folder lies. Sorted by place. In a folder or a
    glob, hidden files and those of other formats are passed over.
    """
    if not config.paths:
        raise UserError(
            f"Source {name!r} names no files. Set data.sources.{name}.paths, for example to '[\"notes/**/*.md\"]'; "
            "files, folders and globs will do."
        )
    found: dict[str, ListedFile] = {}
    mixed = len({is_local(pattern) for pattern in config.paths}) > 1
    if mixed:
        raise UserError(f"Source {name!r} mixes files of this machine with others. Make two sources of them.")
    for pattern in config.paths:
        for file in _local(pattern) if is_local(pattern) else _elsewhere(pattern):
            found[file.url] = file
    places = {url: url.partition("://")[2] or url for url in found}
    parent = posixpath.commonpath([posixpath.dirname(place) for place in places.values()])
    files = [
        ListedFile(_readable(places[url][len(parent) :].lstrip("/")), url, file.size, None, file.etag)
        for url, file in found.items()
    ]
    return sorted(files, key=lambda file: file.path)


def _readable(name: str) -> str:
    """A file's name that can be written down, whatever bytes it is made of."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _local(pattern: str) -> list[ListedFile]:
    files = []
    for path in _matches(pattern.removeprefix("file://")):
        status = os.stat(path)
        files.append(ListedFile(path.name, os.path.abspath(path), status.st_size, None, str(status.st_mtime)))
    return files


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        if suffix_of(path.name) is None:
            raise UserError(f"{pattern} is of no format that can be read. Those are: {READABLE}.")
        return [path]
    names = glob.glob(os.path.join(glob.escape(str(path)), "**") if path.is_dir() else str(path), recursive=True)
    files = [Path(name) for name in names if suffix_of(name) is not None and os.path.isfile(name) and not _ours(name)]
    if not files and names:
        raise _none_readable(pattern)
    if not files:
        raise UserError(f"{pattern} matches no file. It is relative to the current folder, {Path.cwd()}.")
    return files


def _ours(name: str) -> bool:
    """Whether the file is itself a copy that a download made, met because a glob covers the corpus folder."""
    folder, file = os.path.split(name)
    return file.startswith("documents-") and file.endswith(".parquet") and (Path(folder) / MANIFEST).exists()


def _elsewhere(pattern: str) -> list[ListedFile]:
    """The files that an address names, a folder with all below it."""
    system, path = file_system(pattern)
    try:
        if system.isfile(path):
            names = [path]
        else:
            names = system.glob(path) if glob.has_magic(path) else system.find(path)
            if not names:
                raise UserError(f"{pattern} matches no file. Check the address and your access.")
            names = [name for name in names if suffix_of(name) and not posixpath.basename(name).startswith(".")]
        files = []
        for name in names:
            size, mark = describe(system, name)
            files.append(ListedFile(name, str(system.unstrip_protocol(name)), size, None, mark))
    except UserError:
        raise
    except Exception as error:  # every file system has errors of its own
        raise unreachable(pattern, error) from error
    if not files:
        raise _none_readable(pattern)
    return files


def _none_readable(pattern: str) -> UserError:
    return UserError(f"{pattern} matches no file that can be read. Those are: {READABLE}.")
