"""What preprocessing takes on this machine, measured: the real pipeline on a part of the sources, with one worker."""

from __future__ import annotations

import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from config.files import location
from config.schema import DataConfig
from config.sources import FilesSourceConfig
from data.documents import Document, read_documents
from data.manifest import RawManifest
from data.store import DocumentWriter
from data.tokens import INDEX_DTYPE

WARM_UP_BYTES = 1_000_000
SAMPLE_RUNS = 3  # so that the merges of a large run are in the measured time


class Measured(NamedTuple):
    """Figures per byte of text that is read, and of one worker."""

    sample_bytes: int
    bytes_per_second: float
    """Of processor time on one core."""
    raw: float
    """Bytes on disk, as Parquet of ours."""
    intermediate: float
    runs: float
    """Bytes of the sorted files, which are a part of these."""
    documents: float
    tokens: float
    """Bytes of token files, their index included."""
    worker_memory: int
    """Bytes of a worker at its peak."""


def calibrate(data: DataConfig, sample_bytes: int) -> Measured:
    """Preprocess about so many bytes of the sources in `data.use`, in equal shares, in a folder that is then removed.

    It is sorted as a large corpus is: in several runs, then merged by part. A first, short run beforehand keeps what a
    worker does but once (starting, compiling) out of the figures.
    """
    with tempfile.TemporaryDirectory(prefix="quern-plan-") as name:
        folder = Path(name)
        _run(*_sample(data, folder / "first", WARM_UP_BYTES))
        sample, size = _sample(data, folder / "second", sample_bytes)
        begun = time.process_time()
        sizes = _run(sample, size)
        seconds = time.process_time() - begun
        raw = _folder_bytes(folder / "second/raw")
    read = sizes.read
    return Measured(
        read,
        read / seconds,
        raw / read,
        sizes.intermediate / read,
        sizes.runs / read,
        sizes.documents / read,
        sizes.tokens / read,
        _peak_memory(),
    )


def _sample(data: DataConfig, folder: Path, size: int) -> tuple[DataConfig, int]:
    """A configuration for `size` bytes of text, copied from the sources into `folder`; how many there were."""
    copied = 0
    source = FilesSourceConfig(kind="files", paths=["calibration"])
    for name in dict.fromkeys(data.use):
        raw = folder / "raw" / name
        raw.mkdir(parents=True)
        left = size / len(data.use)
        with DocumentWriter(raw, name) as writer:
            for record in read_documents(location(data.raw_dir) / name, data.sources[name], name):
                if isinstance(record, Document):
                    writer.add(record.id, record.text, {})
                    length = len(record.text.encode("utf-8", "surrogatepass"))
                    left, copied = left - length, copied + length
                if left <= 0:
                    break
        RawManifest(
            source=name,
            kind=source.kind,
            origin="calibration",
            licence="",
            retrieved=datetime.now(UTC),
            settings=source.model_dump(mode="json"),
            layout="documents",
            files=writer.files,
        ).save(raw)
    settings = data.preprocess.model_copy(update={"workers": 1, "tasks": 1, "mixture": data.preprocess.mixture.off()})
    changed = {"raw_dir": str(folder / "raw"), "tokens_dir": str(folder / "tokens"), "executor": "local"}
    update = {**changed, "preprocess": settings, "sources": {name: source for name in data.sources}}
    return data.model_copy(update=update), copied


class _Sizes(NamedTuple):
    """Bytes of text read, its documents, bytes of token files, of sorted files, of all but tokens that lay on disk."""

    read: int
    documents: int
    tokens: int
    runs: int
    intermediate: int


def _run(data: DataConfig, size: int) -> _Sizes:
    """Preprocess `size` bytes of text."""
    from data.funnel import total
    from data.pipeline.report import SPLITS
    from data.pipeline.run import preprocess
    from data.pipeline.runs import RUN_BYTES, Scale

    partial = Path(data.tokens_dir).parent / ".tokens.partial"
    largest = runs = 0

    def look(stage: str, done: int, documents: int) -> None:
        nonlocal largest, runs
        largest = max(largest, _folder_bytes(partial))
        runs = max(runs, *(_folder_bytes(folder) for folder in partial.glob("*/runs")), 0)

    scale = Scale(run_bytes=max(1, min(RUN_BYTES, size // SAMPLE_RUNS)), parts=1, direct_files=0)
    manifest, _ = preprocess(data, force=True, show=look, scale=scale)
    itemsize = np.dtype(manifest.dtype).itemsize
    tokens = sum(manifest.tokens(split) * itemsize for split in SPLITS)
    tokens += sum(manifest.documents(split) * INDEX_DTYPE.itemsize for split in SPLITS)
    read = total(manifest.funnel.values()).read
    return _Sizes(read.bytes, read.documents, tokens, runs, largest - tokens)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _peak_memory() -> int:
    """Of this process in all its life, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)
