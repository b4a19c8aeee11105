"""The built-in corpus: Python's standard library and language reference, which every machine with Python has.

Each module and each topic of the language reference (the text behind `help("assert")`) is one document.
"""

from __future__ import annotations

import importlib.util
import platform
import runpy
import sys
import sysconfig
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from config.errors import UserError
from config.sources import SampleSourceConfig
from data.documents import BadRecord
from data.formats.rows import Fault, Row
from data.manifest import RawManifest
from data.sources import Job

# What distributions pack separately or not at all, tests, and tables of numbers in Python's clothes.
LEFT_OUT = {
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "test",
    "tests",
    "tkinter",
    "turtle",
    "turtledemo",
    "__pycache__",
}


def revision(name: str, config: SampleSourceConfig) -> str:
    """The interpreter's version."""
    return platform.python_version()


def download(name: str, config: SampleSourceConfig, folder: Path, job: Job) -> RawManifest:
    """Copy the running interpreter's standard library and language reference into `folder` as documents."""
    from data.store import DocumentWriter, empty_folder

    empty_folder(folder)
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = standard_library(library)
    topics = language_reference()
    task = job.progress.add_task(name, total=sum(path.stat().st_size for path in modules))
    with DocumentWriter(folder, name) as writer:
        for path in modules:
            position = f"stdlib/{path.relative_to(library).as_posix()}"
            for row in read_module(path):
                if not isinstance(row, Fault):
                    writer.add(position, row.text, {"path": position})
                elif row.reason != "empty":
                    writer.quarantine.add(BadRecord(name, position, row.reason, row.excerpt))
            job.progress.advance(task, path.stat().st_size)
        for topic, text in topics:
            writer.add(f"pydoc_data/{topic}", text, {"path": f"pydoc_data/{topic}"})
    if not writer.documents:
        raise UserError(
            f"This Python has no sources of its standard library in {library}, so there is no built-in sample. "
            "Name another source, such as data.use='[my-files]' with data.sources.my-files.paths."
        )
    return RawManifest(
        source=name,
        kind="sample",
        origin=f"standard library and language reference of Python {platform.python_version()}",
        revision=revision(name, config),
        licence="PSF-2.0",
        retrieved=datetime.now(UTC).replace(microsecond=0),
        settings=config.model_dump(mode="json"),
        layout="documents",
        taken=sum(path.stat().st_size for path in modules),
        files=writer.files,
        quarantined=dict(writer.quarantine.counts),
    )


def read_module(path: Path) -> list[Row | Fault]:
    """The text of a module as one row, or what is wrong with it."""
    from data.formats import read_rows

    with open(path, "rb") as file:
        return list(read_rows(file, "module.txt", "text", document_bytes=sys.maxsize))


def standard_library(library: Path) -> list[Path]:
    """The modules of the standard library under `library`, sorted, without tests and what not every Python has."""

    def walk(folder: Path, top: bool) -> Iterator[Path]:
        for entry in folder.iterdir():
            known = not top or entry.stem in sys.stdlib_module_names
            if not known or entry.stem in LEFT_OUT:
                continue
            if entry.is_dir():
                yield from walk(entry, False)
            elif entry.suffix == ".py":
                yield entry

    return (
        sorted(walk(library, True), key=lambda path: path.relative_to(library).as_posix()) if library.is_dir() else []
    )


def language_reference() -> list[tuple[str, str]]:
    """Topic and text of each chapter that `help()` shows, sorted; none where the interpreter ships without them."""
    package = importlib.util.find_spec("pydoc_data")
    spec = importlib.util.find_spec("pydoc_data.topics") if package is not None else None
    if spec is None or spec.origin is None:
        return []
    topics: dict[str, str] = runpy.run_path(spec.origin)["topics"]
    return sorted(topics.items())
