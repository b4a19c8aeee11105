"""Real text that every machine with the project's environment has: modules and documentation of what is installed."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

ENDINGS = ("md", "rst", "txt", "py", "pyi")


def package_texts(size: float, page: int | None = None) -> list[str]:
    """Files of about `size` characters together, spread over all there are; cut into pages of `page` characters.

    Fewer where the packages do not hold that much.
    """
    files = package_files()
    total = sum(file.stat().st_size for file in files)
    texts: list[str] = []
    for file in _spread(files, max(1.0, total / size)):
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        pages = [text] if page is None else [text[at : at + page] for at in range(0, len(text), page)]
        texts += [text for text in pages if text.strip()]
    return texts


def package_files() -> list[Path]:
    """The files, in a fixed order."""
    paths = {Path(sysconfig.get_paths()[kind]) for kind in ("stdlib", "purelib")}
    found = {file for path in paths for ending in ENDINGS for file in path.rglob(f"*.{ending}")}
    found |= {file for path in paths for file in path.glob("*.dist-info/METADATA")}
    return sorted(file for file in found if file.is_file())


def _spread(files: list[Path], step: float) -> Iterator[Path]:
    position = 0.0
    while position < len(files):
        yield files[int(position)]
        position += step
