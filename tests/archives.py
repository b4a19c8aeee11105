"""Real archives, small: WARC and WET by a WARC library, MediaWiki dumps in their XML schema, and what stands beside."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from itertools import count
from typing import Any

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

CRAWL = "CC-MAIN-2024-10"
HTML = "text/html; charset=utf-8"


class _Writer(WARCWriter):  # type: ignore[misc]
    """Writes the same bytes every time."""

    def curr_warc_date(self) -> str:
        """One moment."""
        return "2024-02-20T21:10:55Z"

    def _make_warc_id(self) -> str:
        return f"<urn:uuid:00000000-0000-0000-0000-{next(self._numbers):012d}>"


class Archive:
    """A WARC file being written; `offsets` are the bytes where its records begin."""

    def __init__(self, packed: bool = True) -> None:
        self._sink = io.BytesIO()
        self._writer: Any = _Writer(self._sink, gzip=packed)
        self._writer._numbers = count()
        self.offsets: list[int] = []
        self._add(self._writer.create_warcinfo_record("file.warc", {"software": "a crawler"}))

    def _add(self, record: Any) -> None:
        self.offsets.append(self._sink.tell())
        self._writer.write_record(record)

    def response(self, url: str, body: bytes, content_type: str = HTML, status: str = "200 OK", **headers: str) -> None:
        """A page as it was served, with the request before it and the crawler's remarks behind it, as crawlers have."""
        asked = StatusAndHeaders("GET / HTTP/1.1", [("Host", "example.org")], is_http_request=True)
        self._add(self._writer.create_warc_record(url, "request", http_headers=asked))
        more = [(key.replace("_", "-"), value) for key, value in headers.items()]
        head = StatusAndHeaders(status, [("Content-Type", content_type), *more], protocol="HTTP/1.1")
        self._add(self._writer.create_warc_record(url, "response", payload=io.BytesIO(body), http_headers=head))
        remarks = io.BytesIO(b"fetchTimeMs: 12\r\n")
        self._add(
            self._writer.create_warc_record(
                url, "metadata", payload=remarks, warc_content_type="application/warc-fields"
            )
        )

    def conversion(self, url: str, text: bytes, language: str | None = "eng") -> None:
        """The text of a page."""
        headers = {"WARC-Identified-Content-Language": language} if language else None
        self._add(
            self._writer.create_warc_record(
                url, "conversion", payload=io.BytesIO(text), warc_content_type="text/plain", warc_headers_dict=headers
            )
        )

    @property
    def content(self) -> bytes:
        """The file."""
        return self._sink.getvalue()


def page(words: str) -> str:
    """An HTML page whose main content is `words`, with what stands around it on the web."""
    return (
        "<!DOCTYPE html><html><head><title>The mill</title><script>var tracking = 1;</script></head><body>"
        '<nav><a href="/">Home</a> <a href="/shop">Shop</a></nav>'
        f"<main><article><h1>The mill</h1><p>{escape(words)}</p></article></main>"
        "<footer>Copyright, all rights reserved</footer></body></html>"
    )


def words(number: int) -> str:
    """Different text for each number."""
    return f"Mill {number} stands by the river, and its wheel has turned for {number + 100} years in the cold water."


def crawl_files(kind: str, files: int, pages: int = 3) -> dict[str, bytes]:
    """What Common Crawl's server has of a crawl with so many files: their list and themselves, by path."""
    found: dict[str, bytes] = {}
    for number in range(files):
        archive = Archive()
        for each in range(number * pages, (number + 1) * pages):
            url = f"http://example.org/{each}"
            if kind == "wet":
                archive.conversion(url, words(each).encode())
            else:
                archive.response(url, page(words(each)).encode())
        suffix = "warc.wet.gz" if kind == "wet" else "warc.gz"
        found[f"crawl-data/{CRAWL}/segments/17079{number % 2}/{kind}/CC-MAIN-{number:05d}.{suffix}"] = archive.content
    listing = "".join(f"{path}\n" for path in found)
    found[f"crawl-data/{CRAWL}/{kind}.paths.gz"] = gzip.compress(listing.encode())
    return {f"/{path}": content for path, content in found.items()}


HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
  <siteinfo>
    <sitename>Wikipedia</sitename>
    <dbname>dewiki</dbname>
    <base>https://de.wikipedia.org/wiki/Wikipedia:Hauptseite</base>
    <namespaces>
      <namespace key="0" case="first-letter" />
      <namespace key="1" case="first-letter">Diskussion</namespace>
      <namespace key="6" case="first-letter">Datei</namespace>
      <namespace key="14" case="first-letter">Kategorie</namespace>
    </namespaces>
  </siteinfo>
"""
TAIL = "</mediawiki>\n"


def wiki_page(number: int, title: str, markup: str, namespace: int = 0, redirect: str = "") -> str:
    """One `<page>`."""
    target = f'    <redirect title="{escape(redirect)}" />\n' if redirect else ""
    return f"""  <page>
    <title>{escape(title)}</title>
    <ns>{namespace}</ns>
    <id>{number}</id>
{target}    <revision>
      <id>{number + 5000}</id>
      <timestamp>2024-02-01T10:00:00Z</timestamp>
      <contributor><username>Miller</username><id>7</id></contributor>
      <model>wikitext</model>
      <format>text/x-wiki</format>
      <text bytes="{len(markup.encode())}" xml:space="preserve">{escape(markup, quote=False)}</text>
      <sha1>0123456789abcdefghijklmnopqrstu</sha1>
    </revision>
  </page>
"""


def articles(count: int) -> list[str]:
    """Pages with the ids 1 ... `count`, all of them articles."""
    return [wiki_page(number, f"Mill {number}", f"'''{words(number)}'''") for number in range(1, count + 1)]


def dump(pages: Iterable[str]) -> bytes:
    """A whole dump as XML."""
    return (HEAD + "".join(pages) + TAIL).encode()


def multistream(pages: Sequence[str], per_stream: int = 10) -> tuple[bytes, list[int]]:
    """A dump as streams of so many pages, between those of its head and its tail; where the streams of pages begin."""
    content = bz2.compress(HEAD.encode())
    offsets = []
    for start in range(0, len(pages), per_stream):
        offsets.append(len(content))
        content += bz2.compress("".join(pages[start : start + per_stream]).encode())
    return content + bz2.compress(TAIL.encode()), offsets


def dump_files(wiki: str, dates: dict[str, str], content: bytes, name: str = "") -> dict[str, bytes]:
    """What Wikimedia's server has: for each date, with the state of its dump, the status, checksums and file."""
    links = "".join(f'<a href="{date}/">{date}/</a>\n' for date in [*dates, "latest"])
    found = {f"/{wiki}/": f"<html><body><h1>Index of /{wiki}/</h1><pre>{links}</pre></body></html>".encode()}
    for date, state in dates.items():
        file = name or f"{wiki}-{date}-pages-articles-multistream.xml.bz2"
        index = f"{wiki}-{date}-pages-articles-multistream-index.txt.bz2"
        checksum = hashlib.sha1(content).hexdigest()
        listed = {
            key: {"size": len(body), "url": f"/{wiki}/{date}/{key}", "sha1": hashlib.sha1(body).hexdigest()}
            for key, body in ((file, content), (index, b"an index"))
        }
        job = {"status": state, "files": listed if state == "done" else {}}
        status = {"version": "0.8", "jobs": {"xmlstubsdump": {"status": "done"}, "articlesmultistreamdump": job}}
        found[f"/{wiki}/{date}/dumpstatus.json"] = json.dumps(status).encode()
        found[f"/{wiki}/{date}/{wiki}-{date}-sha1sums.txt"] = f"{'0' * 40}  {index}\n{checksum}  {file}\n".encode()
        if state == "done":
            found[f"/{wiki}/{date}/{file}"] = content
    return found
