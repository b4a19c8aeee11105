"""Peak memory of preprocessing over corpora of several sizes, which it makes.

    python -m benchmarks.data_memory --size 1GB --size 10GB

The texts are the files of installed packages; every further round over them has other lines, so that few documents
repeat. Memory is the proportional set size (PSS) of the command and all its processes together, pages that they share
counted once, looked at every quarter of a second.
"""

from __future__ import annotations

import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import psutil
import typer

from config.command import run

ROOT = Path(__file__).parents[1]
SECONDS = 0.25
Size = Annotated[list[str], typer.Option("--size", help="Text of a corpus; may be given several times.")]
Workers = Annotated[int, typer.Option(help="Processes.", min=1)]
Folder = Annotated[Path | None, typer.Option(help="Where the corpora are made; about three times their size.")]


def benchmark(sizes: Size = ["1GB", "10GB"], workers: Workers = 2, folder: Folder = None) -> None:
    """Measure the peak of each size."""
    from config.sources import byte_count

    print(f"{'text':>8} {'documents':>12} {'seconds':>8} {'peak of all processes':>22}")
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            settings = make_corpus(Path(name), byte_count(size))
            begun = time.monotonic()
            peak = peak_memory(
                [str(ROOT / "data/preprocess.py"), *settings, f"data.preprocess.workers={workers}"], Path(name)
            )
            seconds = time.monotonic() - begun
            from data.tokens import load_tokens_manifest

            kept = load_tokens_manifest(Path(name) / "corpus/tokens").funnel["packages"].kept.documents
        print(f"{size:>8} {kept:>12,} {seconds:>8.0f} {peak / 2**20:>17,.0f} MiB", flush=True)


def make_corpus(folder: Path, size: int) -> list[str]:
    """Write so many bytes of text as the downloaded source `packages`, and a tokenizer; the settings that use them."""
    from config.load import load_config
    from data.manifest import RawManifest
    from data.store import DocumentWriter
    from data.tokenization import train_tokenizer

    settings = ["data.sources.packages={kind: files, paths: [packages]}", "data.use=[packages]"]
    data = load_config([], settings).data
    raw = folder / "corpus/raw/packages"
    raw.mkdir(parents=True)
    with DocumentWriter(raw, "packages") as writer:
        written = 0
        for number, text in enumerate(texts()):
            writer.add(str(number), text, {})
            written += len(text.encode())
            if written >= size:
                break
    RawManifest(
        source="packages",
        kind="files",
        origin="installed packages",
        licence="",
        retrieved=datetime.now(UTC),
        settings=data.sources["packages"].model_dump(mode="json"),
        layout="documents",
        files=writer.files,
    ).save(raw)
    sample = (text for text, _ in zip(texts(), range(2000)))
    train_tokenizer(sample, data.tokenizer).save(folder / "corpus/tokenizer")
    return settings


def texts() -> Iterator[str]:
    """The files of installed packages, again and again, their lines in another order in every round but the first."""
    files = [path for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")) if path.stat().st_size < 10**6]
    rng = random.Random(0)
    rng.shuffle(files)
    contents = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    yield from contents
    while True:
        for content in contents:
            lines = content.splitlines(keepends=True)
            rng.shuffle(lines)
            yield "".join(lines)


def peak_memory(words: list[str], folder: Path) -> int:
    """Run a command of ours; the largest sum of the PSS of its processes, in bytes."""
    process = subprocess.Popen([sys.executable, *words], cwd=folder, stdout=subprocess.DEVNULL)
    tree = psutil.Process(process.pid)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(_pss(each) for each in [tree, *tree.children(recursive=True)]))
        time.sleep(SECONDS)
    assert process.returncode == 0, "the command failed"
    return peak


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it has just ended
        return 0


if __name__ == "__main__":
    run(benchmark)
