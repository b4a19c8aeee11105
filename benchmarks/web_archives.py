"""How fast web archives and Wikipedia's dumps become text, in megabytes of their content per core-second.

    python -m benchmarks.web_archives
    python -m benchmarks.web_archives --megabytes 100 --rounds 5
    python -m benchmarks.web_archives --dump enwiki-latest-pages-articles1.xml.bz2

The pages are the documentation of the Python modules on this machine, as `pydoc` renders it, between the head, menu and
foot of a site, and written as WARC by a WARC library; the same texts are WET, and, with their links, lists and headings
as markup, a multistream dump. Each is read from gzip or bzip2 to clean text as preprocessing reads it. All formats take
turns, round after round; the median of the rounds is shown, in CPU seconds of this process.
"""

from __future__ import annotations

import bz2
import importlib
import io
import pydoc
import statistics
import sys
import time
from html import escape
from pathlib import Path
from typing import Annotated

import typer

from config.command import run

Megabytes = Annotated[float, typer.Option(help="Size of the HTML, in MB.", min=1)]
Dump = Annotated[Path | None, typer.Option(help="A real dump, .xml.bz2, to read too.", exists=True, dir_okay=False)]
Rounds = Annotated[int, typer.Option(help="Rounds over all formats.", min=1)]
LEFT_OUT = {"antigravity", "idlelib", "lib2to3", "this", "turtle", "turtledemo"}
PACKAGES = ("numpy", "pyarrow", "polars", "httpx", "pydantic")


def benchmark(megabytes: Megabytes = 40, rounds: Rounds = 3, dump: Dump = None) -> None:
    """Measure WARC, WET and a dump side by side."""
    from rich.console import Console
    from rich.table import Table

    from data.formats import read_rows
    from data.formats.rows import Row

    print("Rendering the pages ...", flush=True)
    pages = _pages(megabytes * 1e6)
    texts = [_text(page) for page in pages]
    made: dict[str, tuple[str, bytes, float]] = {
        "WARC, HTML to text": ("a.warc.gz", _warc(pages, "response"), _size(pages)),
        "WET": ("a.warc.wet.gz", _warc(texts, "conversion"), _size(texts)),
        "Wikipedia dump": ("a.xml.bz2", *_dump([_markup(text) for text in texts[: max(1, len(texts) // 4)]])),
    }
    if dump is not None:
        content = dump.read_bytes()
        made[dump.name] = ("a.xml.bz2", content, len(bz2.decompress(content)) / 1e6)
    rates: dict[str, list[float]] = {name: [] for name in made}
    kept: dict[str, float] = {}
    for timed in [False] + [True] * rounds:
        for name, (path, content, size) in made.items():
            start = time.process_time()
            rows = [row for row in read_rows(io.BytesIO(content), path, "text") if isinstance(row, Row)]
            taken = time.process_time() - start
            kept[name] = _size([row.text for row in rows])
            if timed:
                rates[name].append(size / taken)
    print(f"{len(pages):,} pages, {_size(pages):.1f} MB of HTML")
    table = Table("read")
    for heading in ("content, MB", "text, MB", "MB of content per core-second", "lowest", "highest"):
        table.add_column(heading, justify="right")
    for name, values in rates.items():
        numbers = (made[name][2], kept[name], statistics.median(values), min(values), max(values))
        table.add_row(name, *(f"{number:.1f}" for number in numbers))
    Console(width=110).print(table)


def _size(texts: list[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def _pages(size: float) -> list[str]:
    """Documentation of modules as the pages of a site, again from the first where there are too few."""
    bodies = []
    names = sorted(name for name in sys.stdlib_module_names if not name.startswith("_") and name not in LEFT_OUT)
    for name in [*PACKAGES, *names]:
        body = _rendered(name)
        if body is not None and 2000 < len(body) < 1_000_000:
            bodies.append((name, body))
        if sum(len(body) for _, body in bodies) > size:
            break
    pages: list[str] = []
    menu = "".join(f'<li><a href="/{name}.html">{name}</a></li>' for name, _ in bodies[:60])
    total = 0
    while bodies and total < size:
        name, body = bodies[len(pages) % len(bodies)]
        pages.append(
            f"<!DOCTYPE html><html><head><title>{name}</title><script>window.page = '{len(pages)}';</script></head>"
            f"<body><header><nav><ul>{menu}</ul></nav></header><main><article>{body}</article></main>"
            f"<footer><p>Page {len(pages)}. Copyright, all rights reserved.</p></footer></body></html>"
        )
        total += len(pages[-1])
    return pages


def _rendered(name: str) -> str | None:
    try:
        return pydoc.html.document(importlib.import_module(name), name)
    except (ImportError, AttributeError, TypeError, ValueError):  # modules of other systems
        return None


def _text(page: str) -> str:
    from data.pipeline.markup import piece_text

    return piece_text(page)


def _warc(contents: list[str], kind: str) -> bytes:
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    sink = io.BytesIO()
    writer = WARCWriter(sink, gzip=True)
    for number, content in enumerate(contents):
        head = StatusAndHeaders("200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.1")
        payload = io.BytesIO(content.encode())
        http = {"http_headers": head} if kind == "response" else {"warc_content_type": "text/plain"}
        writer.write_record(writer.create_warc_record(f"http://example.org/{number}", kind, payload=payload, **http))
    return sink.getvalue()


def _markup(text: str) -> str:
    """The text as an encyclopaedia would mark it up: an infobox, links, references, lists, a heading here and there."""
    lines = ["{{Infobox software\n| name = a module\n| license = [[PSF]]\n}}", "[[File:Logo.svg|thumb|The [[logo]]]]"]
    for number, line in enumerate(filter(str.strip, text.splitlines())):
        words = line.strip().split(" ")
        if len(words) > 6:
            words[2] = f"[[{words[2]}]]"
            words[5] = f"'''{words[5]}'''<ref name=r{number}>{{{{cite web|url=http://example.org|title=x}}}}</ref>"
        mark = "* " if number % 7 == 3 else ""
        lines.append(f"== {' '.join(words[:4])} ==" if number % 40 == 20 else mark + " ".join(words))
    return "\n".join([*lines, "[[Category:Software]]"])


def _dump(markup: list[str]) -> tuple[bytes, float]:
    """A multistream dump of 100 pages a stream, and the megabytes of its XML."""
    pages = [
        f"<page><title>P{number}</title><ns>0</ns><id>{number + 1}</id><revision><id>1</id><text>"
        f"{escape(text, quote=False)}</text></revision></page>\n".translate(dict.fromkeys(range(9)))
        for number, text in enumerate(markup)
    ]
    parts = ["<mediawiki><siteinfo></siteinfo>\n"]
    parts += ["".join(pages[start : start + 100]) for start in range(0, len(pages), 100)] + ["</mediawiki>\n"]
    return b"".join(bz2.compress(part.encode()) for part in parts), sum(len(part.encode()) for part in parts) / 1e6


def main() -> None:
    """Run the benchmark."""
    run(benchmark)


if __name__ == "__main__":
    main()
