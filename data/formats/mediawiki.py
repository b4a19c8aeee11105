"""MediaWiki XML dumps (export-0.10 and 0.11): .xml, also as .bz2, .gz and .zst; one row per article.

A dump is cut at `<page>` and `</page>`, which cannot stand inside its escaped text, and each article is parsed by
itself, so that one broken page costs no other. The official dumps are many bzip2 streams in one file; where those begin
is seen by bzip2's signature, so such a file is read in parallel from any byte on, and reading goes on behind a damaged
stream.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from lxml import etree
from mwparserfromhell.parser import ParserError

from data.formats.bzip2 import Piece, stream_pieces
from data.formats.rows import BLOCK_ROWS, RECORD_BYTES, Fault, Row, Wanted, excerpt_of, is_end, row_or_fault
from data.formats.streams import BrokenStream, text_chunks
from data.formats.wikitext import wiki_text

UNIT_BYTES = 4 << 20
"""Bytes of a .xml.bz2 that are dealt to readers together: all pages of the streams that begin there."""
OPEN, CLOSE, LAST = b"<page>", b"</page>", b"</mediawiki>"
OPENING = re.compile(rb"<(?:p(?:a(?:ge?)?)?)?$")
FILE, CATEGORY = "6", "14"
HEAD_BYTES = 1 << 18
TAIL = 64  # bytes in which the end of the root element is looked for


def read_dump(file: IO[bytes], path: str, wanted: Wanted, cut: bool = False) -> Iterator[Row | Fault]:
    """One row per page of the main namespace that is no redirect, numbered by its page id.

    The columns are `title`, `url` and `timestamp`, of the revision. What cannot be read has the id of the page before.
    Where the file was `cut`, its end is no fault.
    """
    wiki = _read_head(file, path)
    for page in _articles(file, path, wanted, cut):
        yield page if isinstance(page, Fault) else _row(page, wiki)


def count_articles(file: IO[bytes], path: str, cut: bool = False) -> int:
    """Rows of an open dump, by all cores where it lies on disk and can be read in parallel."""
    name = getattr(file, "name", None)
    if not path.endswith(".bz2") or not isinstance(name, str | Path):
        return sum(1 for _ in _articles(file, path, lambda unit: True, cut))

    def count(unit: int) -> int:
        with open(name, "rb") as own:
            return sum(1 for _ in _articles(own, path, lambda other: other == unit, cut))

    with ThreadPoolExecutor() as threads:
        return sum(threads.map(count, range(_units(file))))


@dataclass(frozen=True)
class _Wiki:
    """What a dump says of its wiki: what an article's address begins with, and namespaces that hold no text."""

    address: str
    left_out: frozenset[str]


def _read_head(file: IO[bytes], path: str) -> _Wiki:
    """The `<siteinfo>` that a dump begins with."""
    head = bytearray()
    file.seek(0)
    try:
        for chunk in text_chunks(file, path):
            head += chunk
            if b"</siteinfo>" in head or len(head) > HEAD_BYTES:
                break
    except BrokenStream:
        pass
    text = html.unescape(head.decode("utf-8", "replace"))
    base = re.search(r"<base>(https?://[^<]+/)[^<]*</base>", text)
    names = re.findall(rf'<namespace key="(?:{FILE}|{CATEGORY})"[^>]*>([^<]+)<', text)
    return _Wiki(base[1] if base else "", frozenset({"file", "image", "category", *(name.lower() for name in names)}))


def _articles(file: IO[bytes], path: str, wanted: Wanted, cut: bool) -> Iterator[bytes | Fault]:
    """The `<page>` elements of articles, and a fault in place of what is broken."""

    def counts(page: bytes | Fault) -> bool:
        return not (cut and is_end(page)) if isinstance(page, Fault) else _is_article(page)

    if path.endswith(".bz2"):
        for unit in range(_units(file)):
            if wanted(unit):
                start = unit * UNIT_BYTES
                for page in _pages(stream_pieces(file, start, start + UNIT_BYTES)):
                    if counts(page):
                        yield page
        return
    rows = 0
    file.seek(0)
    for page in _pages(_whole(text_chunks(file, path))):
        if counts(page):
            if wanted(rows // BLOCK_ROWS):
                yield page
            rows += 1


def _units(file: IO[bytes]) -> int:
    return max(1, -(-file.seek(0, 2) // UNIT_BYTES))


def _whole(content: Iterator[bytes]) -> Iterator[Piece | BrokenStream]:
    """A file that is read from beginning to end, in the form of `stream_pieces`."""
    try:
        for chunk in content:
            yield chunk, True
    except BrokenStream as broken:
        yield broken


def _pages(pieces: Iterator[Piece | BrokenStream]) -> Iterator[bytes | Fault]:
    """All `<page>` elements that begin in pieces of our own, even if they end in others."""
    buffer = bytearray()
    identity = 0
    seen = broken = False
    for piece in pieces:
        if isinstance(piece, BrokenStream):
            yield Fault(identity, piece.reason)
            buffer.clear()
            seen = broken = True
            continue
        data, own = piece
        if not own:
            last = _last_page(buffer, data, pieces)
            if last is not None:
                yield last
            return
        seen, broken = True, False
        buffer += data
        for page in _cut_pages(buffer):
            identity = _identity(page) if isinstance(page, bytes) else identity
            yield page if isinstance(page, bytes) else Fault(identity, page.reason, page.excerpt)
    if seen and not broken and LAST not in buffer:
        yield Fault(identity, "truncated" if identity or OPEN in buffer else "not-a-dump", excerpt_of(bytes(buffer)))


def _cut_pages(buffer: bytearray) -> Iterator[bytes | Fault]:
    """Take the pages that are complete off the buffer, and what cannot become one."""
    done = 0
    while (start := buffer.find(OPEN, done)) >= 0:
        end = buffer.find(CLOSE, start)
        other = buffer.find(OPEN, start + len(OPEN), end if end >= 0 else len(buffer))
        if other >= 0:
            yield Fault(0, "broken-page", excerpt_of(bytes(buffer[start:other])))
            done = other
        elif end >= 0:
            done = end + len(CLOSE)
            yield bytes(buffer[start:done])
        else:
            break
    if start < 0:
        done = max(done, len(buffer) - TAIL)
    elif len(buffer) - start > RECORD_BYTES:
        yield Fault(0, "record-too-long", excerpt_of(bytes(buffer[start : start + RECORD_BYTES])))
        done = len(buffer)
    del buffer[:done]


def _last_page(buffer: bytearray, data: bytes, pieces: Iterator[Piece | BrokenStream]) -> bytes | None:
    """The page that is open at the end of `buffer`, which goes on in `data` and further pieces."""
    mine = len(buffer)
    if OPEN not in buffer and not OPENING.search(buffer):
        return None
    while True:
        buffer += data
        start = buffer.find(OPEN)
        if not 0 <= start < mine or len(buffer) > RECORD_BYTES:
            return None
        end = buffer.find(CLOSE, start)
        if end >= 0:
            return bytes(buffer[start : end + len(CLOSE)])
        piece = next(pieces, None)
        if piece is None or isinstance(piece, BrokenStream):
            return None
        data = piece[0]


def _head(page: bytes) -> bytes:
    return page[: page.find(b"<revision>")]


def _identity(page: bytes) -> int:
    found = re.search(rb"<id>(\d+)</id>", _head(page))
    return int(found[1]) if found else 0


def _is_article(page: bytes) -> bool:
    head = _head(page)
    return b"<ns>0</ns>" in head and b"<redirect" not in head


def _row(page: bytes, wiki: _Wiki) -> Row | Fault:
    number = _identity(page)
    try:
        element: Any = etree.fromstring(page, etree.XMLParser(huge_tree=True, resolve_entities=False))
    except etree.XMLSyntaxError as error:
        return Fault(number, "not-xml", excerpt_of(f"{error}: {excerpt_of(page)}"))
    title = element.findtext("title") or ""
    markup = element.findtext("revision/text")
    columns = {"title": title, "timestamp": element.findtext("revision/timestamp") or ""}
    if wiki.address:
        columns["url"] = wiki.address + quote(title.replace(" ", "_"), safe="/:@!$&'()*,;=~")
    try:
        text = None if markup is None else wiki_text(markup, wiki.left_out)
    except (ParserError, RecursionError) as error:
        return Fault(number, "broken-markup", excerpt_of(f"{title}: {error}"))
    return row_or_fault(number, text, columns, ())
