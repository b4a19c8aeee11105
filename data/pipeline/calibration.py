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


class Measured(NamedTuple):
    """Figures per byte of text that is read, and of one worker."""

    sample_bytes: int
    bytes_per_second: float
    """Of processor time on one core."""
    raw: float
    """Bytes on disk, as Parquet of ours."""
    intermediate: float
    tokens: float
    """Bytes of token files, their index included."""
    worker_memory: int
    """Bytes of a worker at its peak."""


def calibrate(data: DataConfig, sample_bytes: int) -> Measured:
    """Preprocess about so many bytes of the sources in `data.use`, in equal shares, in a folder that is then removed.

    A first, short run beforehand keeps what a worker does but once (starting, compiling) out of the figures.
    """
    with tempfile.TemporaryDirectory(prefix="quern-plan-") as name:
        folder = Path(name)
        _run(_sample(data, folder / "first", WARM_UP_BYTES))
        sample = _sample(data, folder / "second", sample_bytes)
        begun = time.process_time()
        read, tokens, intermediate = _run(sample)
        seconds = time.process_time() - begun
        raw = _folder_bytes(folder / "second/raw")
    return Measured(read, read / seconds, raw / read, intermediate / read, tokens / read, _peak_memory())


def _sample(data: DataConfig, folder: Path, size: int) -> DataConfig:
    """A configuration for `size` bytes of text, which are copied from the sources into `folder`."""
    source = FilesSourceConfig(kind="files", paths=["calibration"])
    for name in dict.fromkeys(data.use):
        raw = folder / "raw" / name
        raw.mkdir(parents=True)
        left = size / len(data.use)
        with DocumentWriter(raw, name) as writer:
            for record in read_documents(location(data.raw_dir) / name, data.sources[name], name):
                if isinstance(record, Document):
                    writer.add(record.id, record.text, {})
                    left -= len(record.text.encode("utf-8", "surrogatepass"))
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
    return data.model_copy(
        update={**changed, "preprocess": settings, "sources": {name: source for name in data.sources}}
    )


def _run(data: DataConfig) -> tuple[int, int, int]:
    """Bytes of text read, of token files written, and of all else that lay on disk meanwhile."""
    from data.funnel import total
    from data.pipeline.report import SPLITS
    from data.pipeline.run import preprocess

    partial = Path(data.tokens_dir).parent
    largest = 0

    def look(stage: str, done: int, documents: int) -> None:
        nonlocal largest
        largest = max(largest, sum(_folder_bytes(folder) for folder in partial.glob(".tokens.partial")))

    manifest, _ = preprocess(data, force=True, show=look)
    itemsize = np.dtype(manifest.dtype).itemsize
    tokens = sum(manifest.tokens(split) * itemsize for split in SPLITS)
    tokens += sum(manifest.documents(split) * INDEX_DTYPE.itemsize for split in SPLITS)
    return total(manifest.funnel.values()).read.bytes, tokens, largest - tokens


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _peak_memory() -> int:
    """Of this process in all its life, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)
