"""Web archives: WARC with pages as they were served, and WET with their text; .warc and .warc.wet, packed or not.

Records are read by FastWARC, out of .zst (with a dictionary or without) and .bz2 as if they were not packed. Where one
is broken, reading goes on at the next: the end of the last good record is looked up, and from there the next place
where a record begins (`data.formats.warc_repair`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType

from data.formats.rows import BLOCK_ROWS, RECORD_BYTES, Fault, Row, Wanted, excerpt_of, is_end, row_or_fault
from data.formats.unpacked import Unpacked
from data.formats.warc_repair import find_damage, next_record
from data.pipeline.markup import page_text

HTML = frozenset({"text/html", "application/xhtml+xml"})


def read_warc(file: IO[bytes], path: str, wanted: Wanted, limit: int | None = None) -> Iterator[Row | Fault]:
    """One row per page: a `conversion` record (the text of WET), or a `response` record of status 200 with HTML.

    Of HTML the main content is taken. Rows are numbered by their record in the file, from 1; a stretch that cannot be
    read counts as one record. The columns are `url`, `date`, `record_id` and, where the record tells it, `language`.
    """
    for row, (number, record) in enumerate(islice(_pages(file, path), limit)):
        if wanted(row // BLOCK_ROWS):
            yield Fault(number, record.reason, record.excerpt) if isinstance(record, Fault) else _row(number, record)


def count_pages(file: IO[bytes], path: str, cut: bool = False) -> int:
    """Rows of an open archive, without a look into its pages; where it was `cut`, its end is none."""
    return sum(1 for _, page in _pages(file, path) if not (cut and is_end(page)))


def _pages(file: IO[bytes], path: str) -> Iterator[tuple[int, _Record | Fault]]:
    content = file
    if path.endswith((".zst", ".bz2")):
        content = io.BufferedReader(Unpacked(file, path), 1 << 16)
    for number, record in enumerate(_records(content, path.endswith(".gz")), start=1):
        if isinstance(record, Fault) or _is_page(record.warc):
            yield number, record


@dataclass(frozen=True, slots=True)
class _Record:
    """A record whose HTTP head, if it has one, is parsed; its body is in memory, unless it is `too_long`."""

    warc: WarcRecord
    too_long: bool


def _records(file: IO[bytes], packed: bool) -> Iterator[_Record | Fault]:
    """All records in order, and a fault in place of each stretch that is none.

    A record counts as good when reading could go on behind it: a wrong length shows only there.
    """
    start: int | None = 0
    while start is not None:
        last: _Record | None = None
        position = start
        trouble = "ends early"
        try:
            file.seek(start)
            for warc in ArchiveIterator(file, parse_http=False):
                if last is not None:
                    yield last
                last = None
                position = warc.stream_pos
                last = _take(warc)
        except OSError as error:
            trouble = str(error)
        damage = find_damage(file, position, packed, read=last is not None)
        if last is not None and (damage is None or damage.start > position):
            yield last
        broken = file.raw.broken if isinstance(file, io.BufferedReader) and isinstance(file.raw, Unpacked) else None
        if damage is None:
            if broken is not None:
                yield Fault(0, broken, f"byte {position}: {trouble}")
            return
        start = next_record(file, damage.start + 1, packed)
        reason = (broken or damage.reason) if start is None else "broken-record"
        yield Fault(0, reason, f"byte {damage.start}: {trouble}")


def _take(warc: WarcRecord) -> _Record:
    """Read a record into memory; `OSError` where it ends early."""
    length = warc.content_length
    if warc.record_type == WarcRecordType.unknown and not length:
        raise OSError("no head of a record")
    too_long = length > RECORD_BYTES
    if not too_long:
        warc.freeze()
        if warc.content_length < length:
            raise OSError("ends early")
    if warc.record_type == WarcRecordType.response and warc.is_http:
        warc.parse_http(auto_decode="all")
    return _Record(warc, too_long)


def _is_page(warc: WarcRecord) -> bool:
    if warc.record_type == WarcRecordType.conversion:
        return True
    http = warc.http_headers
    return (
        warc.record_type == WarcRecordType.response
        and http is not None
        and http.status_code == 200
        and warc.http_content_type in HTML
    )


def _row(number: int, record: _Record) -> Row | Fault:
    columns = _columns(record.warc)
    if record.too_long:
        return Fault(number, "record-too-long", columns["url"])
    try:
        body = record.warc.reader.read()
    except OSError as error:
        return Fault(number, "broken-record", f"{columns['url']}: {error}")
    if record.warc.record_type == WarcRecordType.response:
        return row_or_fault(number, page_text(_decode(body, record.warc.http_charset)), columns, ())
    try:
        return row_or_fault(number, body.decode("utf-8"), columns, ())
    except UnicodeDecodeError:
        return Fault(number, "invalid-utf8", excerpt_of(body))


def _columns(warc: WarcRecord) -> dict[str, Any]:
    headers = warc.headers
    language = headers.get("WARC-Identified-Content-Language")
    if language is None and warc.http_headers is not None:
        language = warc.http_headers.get("Content-Language")
    columns = {
        "url": (headers.get("WARC-Target-URI") or "").strip("<>"),
        "date": headers.get("WARC-Date", ""),
        "record_id": headers.get("WARC-Record-ID", ""),
    }
    return columns if language is None else {**columns, "language": language}


def _decode(body: bytes, charset: str | None) -> str:
    """HTML as text: by the encoding of the HTTP head, else of the page's own head, else by its bytes."""
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

    encoding = map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
    text: str = bytes_to_str(body, encoding or detect_encoding(body, from_html_meta=True) or "utf-8")
    return text
