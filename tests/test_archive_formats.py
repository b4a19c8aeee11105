"""Web archives and Wikipedia's dumps as formats: what they are read into, whole, damaged, and in parts."""

from __future__ import annotations

import bz2
import gzip
import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data.formats import count_rows, mediawiki, read_rows, unpacked, warc, wikitext
from data.formats.bzip2 import next_stream
from data.formats.rows import Fault, Row
from data.formats.wikitext import wiki_text
from tests.archives import HEAD, TAIL, Archive, articles, dump, multistream, page, wiki_page, words


def read(content: bytes, name: str, wanted: Callable[[int], bool] = lambda unit: True) -> list[Row | Fault]:
    return list(read_rows(io.BytesIO(content), name, "text", wanted=wanted))


def good(found: list[Row | Fault]) -> list[Row]:
    return [row for row in found if isinstance(row, Row)]


def reasons(found: list[Row | Fault]) -> list[str]:
    return [row.reason for row in found if isinstance(row, Fault)]


def counted(content: bytes, name: str, folder: Path) -> int:
    path = folder / name
    path.write_bytes(content)
    with open(path, "rb") as file:
        return count_rows(file, name, "text")


def web(count: int, packed: bool = True) -> Archive:
    archive = Archive(packed)
    for number in range(count):
        archive.response(f"http://example.org/{number}", page(words(number)).encode())
    return archive


def pages_in(found: list[Row | Fault]) -> list[int]:
    """The numbers of the pages that came out, each with exactly its own words."""
    numbers = [int(row.columns["url"].rpartition("/")[2]) for row in good(found)]
    for number, row in zip(numbers, good(found)):
        assert words(number) in row.text and words(number + 1) not in row.text
    return numbers


def packed_archive(archive: Archive, form: str) -> tuple[str, bytes]:
    """Name and content of an archive that is not packed record by record with gzip."""
    bounds = [*archive.offsets, len(archive.content)]
    pieces: list[Any] = [archive.content[start:end] for start, end in zip(bounds, bounds[1:])]
    if form == "bz2":
        return "a.warc.bz2", bz2.compress(archive.content)
    if form == "one frame":
        return "a.warc.zst", zstandard.compress(archive.content)
    if form == "a frame each":
        return "a.warc.zst", b"".join(zstandard.compress(piece) for piece in pieces)
    trained = zstandard.train_dictionary(3000, pieces * 20)
    dictionary = zstandard.compress(trained.as_bytes()) if "packed" in form else trained.as_bytes()
    compressor = zstandard.ZstdCompressor(dict_data=trained)
    head = struct.pack("<II", 0x184D2A5D, len(dictionary)) + dictionary
    return "a.warc.zst", head + b"".join(compressor.compress(piece) for piece in pieces)


class TestWarc:
    def test_a_page_is_its_main_content_with_its_address(self) -> None:
        archive = Archive()
        archive.response("http://example.org/mill", page(words(1)).encode(), Content_Language="en")
        (row,) = good(read(archive.content, "a.warc.gz"))
        assert words(1) in row.text
        for noise in ("tracking", "Shop", "Copyright", "<p>", "HTTP"):
            assert noise not in row.text
        assert row.columns["url"] == "http://example.org/mill"
        assert row.columns["language"] == "en"
        assert row.columns["date"].startswith("20") and row.columns["record_id"].startswith("<urn:uuid:")
        assert row.number == 3

    def test_only_good_answers_with_html_are_pages(self) -> None:
        archive = Archive()
        body = page(words(1)).encode()
        archive.response("http://example.org/0", body, status="404 Not Found")
        archive.response("http://example.org/1", body, content_type="application/xhtml+xml")
        archive.response("http://example.org/2", b"\x89PNG\r\n" * 100, content_type="image/png")
        archive.response("http://example.org/3", body, status="301 Moved Permanently")
        found = read(archive.content, "a.warc.gz")
        assert [row.columns["url"] for row in good(found)] == ["http://example.org/1"] and not reasons(found)

    @pytest.mark.parametrize(
        ("encoding", "content_type", "meta"),
        [
            ("iso-8859-1", "text/html; charset=ISO-8859-1", ""),
            ("windows-1251", "text/html", '<meta charset="windows-1251">'),
            ("shift_jis", "text/html; charset=no-such-charset", '<meta charset="Shift_JIS">'),
            ("koi8-r", "text/html", ""),
        ],
    )
    def test_encodings(self, encoding: str, content_type: str, meta: str) -> None:
        sentence = (
            {
                "iso-8859-1": "Die Mühle steht am Fluß, naïve Gäste hören zu.",
                "shift_jis": "水車小屋は川のそばに立っている。" * 5,
            }
            .get(encoding, "Мельница стоит у реки, и колесо вращается уже триста лет в холодной воде. " * 5)
            .strip()
        )
        html = page(sentence).replace("<head>", f"<head>{meta}")
        archive = Archive()
        archive.response("http://example.org/", html.encode(encoding), content_type)
        (row,) = good(read(archive.content, "a.warc.gz"))
        assert sentence in row.text

    def test_packed_and_chunked_bodies_are_unpacked(self) -> None:
        body = gzip.compress(page(words(5)).encode())
        chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        archive = Archive()
        archive.response("http://example.org/5", chunked, Content_Encoding="gzip", Transfer_Encoding="chunked")
        assert pages_in(read(archive.content, "a.warc.gz")) == [5]

    def test_wet_is_text_with_its_language(self) -> None:
        archive = Archive()
        archive.conversion("http://example.org/0", "Die Mühle.\nDas Rad.".encode(), "deu,eng")
        archive.conversion("http://example.org/1", b"\xff\xfe not UTF-8", None)
        archive.conversion("http://example.org/2", b"  \n", None)
        found = read(archive.content, "a.warc.wet.gz")
        (row,) = good(found)
        assert row.text == "Die Mühle.\nDas Rad."
        assert row.columns["language"] == "deu,eng" and row.columns["date"] == "2024-02-20T21:10:55Z"
        assert reasons(found) == ["invalid-utf8", "empty"]

    @pytest.mark.parametrize("packed", [True, False])
    @pytest.mark.parametrize("victim", [0, 3, 7])
    @pytest.mark.parametrize("harm", ["noise", "too long", "far too long", "too short", "no length", "another thing"])
    def test_a_broken_record_costs_only_itself(self, harm: str, victim: int, packed: bool, tmp_path: Path) -> None:
        archive = web(8, packed)
        content = bytearray(archive.content)
        begin, end = archive.offsets[3 * victim + 2 : 3 * victim + 4]  # behind the head and three records a page
        record = gzip.decompress(content[begin:end]) if packed else bytes(content[begin:end])
        length = next(line for line in record.split(b"\r\n") if line.startswith(b"Content-Length: "))
        changed = {
            "too long": b"Content-Length: 9" + length[17:],
            "far too long": length + b"00000000",
            "too short": b"Content-Length: 1" + length[18:],
            "no length": b"X-Nothing: 1",
        }
        if harm in changed:
            record = record.replace(length, changed[harm], 1)
        elif harm == "another thing":
            record = b"<html>503</html>\r\n" * 20
        elif not packed:
            record = b"\0" * 40 + record[40:]
        content[begin:end] = gzip.compress(record) if packed else record
        if harm == "noise" and packed:
            content[begin + 30 : begin + 60] = b"\0" * 30
        name = "a.warc.gz" if packed else "a.warc"
        found = read(bytes(content), name)
        assert pages_in(found) == [number for number in range(8) if number != victim]
        assert reasons(found) == ["broken-record"]
        assert counted(bytes(content), name, tmp_path) == 8

    @pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
    def test_a_cut_file_keeps_what_came_before(self, name: str) -> None:
        archive = web(5, name.endswith(".gz"))
        cuts = random.Random(0).sample(range(1, len(archive.content)), 40)
        for cut in cuts:
            found = read(archive.content[:cut], name)
            ends = [archive.offsets[3 * number + 3] for number in range(5)]
            whole = [number for number, end in enumerate(ends) if end <= cut]
            nearly = [number for number, end in enumerate(ends) if end - 4 <= cut < end]  # but for its last line ends
            assert pages_in(found) in (whole, sorted(whole + nearly))
            assert reasons(found) == ([] if cut in archive.offsets else ["truncated"])

    @pytest.mark.parametrize("form", ["one frame", "a frame each", "a dictionary", "a packed dictionary", "bz2"])
    def test_packed_as_other_archives_do(self, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(unpacked, "KEPT", 3000)  # so that going back means unpacking again, now and then
        name, content = packed_archive(web(30, packed=False), form)
        whole = read(content, name)
        assert pages_in(whole) == list(range(30)) and not reasons(whole)
        assert counted(content, name, tmp_path) == 30
        cut = read(content[: len(content) * 3 // 4], name)
        assert reasons(cut) == ["truncated"] and pages_in(cut) == list(range(len(cut) - 1))
        assert len(cut) > 10 or form in ("one frame", "bz2")
        again = [row for part in range(3) for row in read(content, name, wanted=lambda unit: unit % 3 == part)]
        assert sorted(map(str, again)) == sorted(map(str, whole))

    def test_a_broken_record_and_a_broken_frame_in_zst(self) -> None:
        archive = web(30, packed=False)
        content = bytearray(archive.content)
        start = archive.offsets[2 + 3 * 9]
        content[start : start + 8] = bytes(8)
        found = read(zstandard.compress(bytes(content)), "a.warc.zst")
        assert reasons(found) == ["broken-record"] and pages_in(found) == [
            number for number in range(30) if number != 9
        ]
        frames = bytearray(packed_archive(archive, "a frame each")[1])
        place = frames.index(b"\x28\xb5\x2f\xfd", len(frames) // 2)
        frames[place : place + 4] = b"none"
        found = read(bytes(frames), "a.warc.zst")
        assert reasons(found) == ["corrupt"] and pages_in(found) == list(range(len(found) - 1)) and len(found) > 10

    def test_all_records_in_one_gzip_member(self) -> None:
        content = gzip.compress(web(5, packed=False).content)
        found = read(content, "a.warc.gz")
        assert pages_in(found) == [0, 1, 2, 3, 4] and not reasons(found)
        cut = read(content[:-100], "a.warc.gz")
        assert pages_in(cut) == [0, 1, 2, 3, 4][: len(good(cut))] and reasons(cut) == ["truncated"]

    def test_records_of_any_length_need_bounded_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(warc, "RECORD_BYTES", 10_000)
        archive = Archive()
        archive.response("http://example.org/0", page(words(0)).encode())
        archive.response("http://example.org/9", page(words(9) * 500).encode())
        archive.response("http://example.org/8", b"\0" * 50_000, content_type="video/mp4")
        archive.response("http://example.org/1", page(words(1)).encode())
        found = read(archive.content, "a.warc.gz")
        assert pages_in(found) == [0, 1] and reasons(found) == ["record-too-long"]

    def test_parts_together_are_the_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(warc, "BLOCK_ROWS", 2)
        archive = web(9)
        content = bytearray(archive.content)
        content[archive.offsets[11] + 30 : archive.offsets[11] + 60] = b"\0" * 30
        whole = read(bytes(content), "a.warc.gz")
        parts = [read(bytes(content), "a.warc.gz", lambda unit: unit % 3 == part) for part in range(3)]
        assert sorted((row.number for part in parts for row in part)) == [row.number for row in whole]
        assert all(len(part) >= 2 for part in parts)

    def test_a_page_in_place_of_the_file_is_one_fault(self, tmp_path: Path) -> None:
        error = b"<!DOCTYPE html>\n<html><head><title>503</title></head>\n<body>Slow down</body></html>\n" * 9
        for name in ("a.warc.gz", "a.warc.wet.gz", "a.xml.bz2", "a.parquet", "a.jsonl", "a.jsonl.zst", "a.csv"):
            assert reasons(read(error, name)) == ["html-page"]
            assert counted(error, name, tmp_path) == 1
        assert good(read(error, "a.txt"))


MARKUP = [
    ("The '''mill''' is ''old''.", "The mill is old."),
    ("[[Mill (grinding)|Mills]] and [[river]]s", "Mills and rivers"),
    ("before{{Infobox mill\n| built = {{date|1701}}\n}} after", "before after"),
    ("It<ref name=a>Miller, [[Mills]]</ref> turns<ref name=a /> on.", "It turns on."),
    ("[[Datei:Mill.jpg|mini|The [[mill]]]]Text[[Kategorie:Mills]][[File:x.png]]", "Text"),
    ("[[Bild:Mill.svg|mini|by its ending]]Text", "Text"),
    ("One\n{| class=wikitable\n|-\n| a || b\n|}\nTwo", "One\n\nTwo"),
    ("== History ==\nOld.\n=== Stones ===\nNew.", "History\nOld.\nStones\nNew."),
    ("* one\n** two [[three]]\n# four", "- one\n  - two three\n- four"),
    ("; term\n: indented", "term\nindented"),
    ("a &amp; b&nbsp;c &#8212; d<!-- hidden -->", "a & b\xa0c \u2014 d"),
    ("See [https://example.org the site] [https://example.org].", "See the site ."),
    ("A word ({{IPA|x}}; 1701) and (, old) and ({{audio|y}}).", "A word (1701) and (old) and."),
    ("say {{lang|fr|moulin}} at {{convert|5|km}}", "say moulin at 5 km"),
    ("line<br />break H<sub>2</sub>O __NOTOC__", "line\nbreak H2O"),
    ("<nowiki>[[raw]]</nowiki> <math>x'' + 1</math>", "[[raw]] x'' + 1"),
    ("<syntaxhighlight lang=python>\n# note\nx = ''\nf()\n</syntaxhighlight>", "# note\nx = ''\nf()"),
    ("<gallery>\nFile:a.jpg|b\n</gallery>Text<references />", "Text"),
]


NAMESPACES = {"file", "category", "datei", "kategorie"}
INLINE = [
    *(markup for markup, _ in MARKUP if "\n" not in markup),
    "{{outer|a={{inner|[[link]]|<ref>x</ref>}}|b={{{parameter|}}}}}",
    "<ref>{{cite|title={{lang|fr|x}} [[a|b]]}}</ref>",
    "[[File:x.jpg|thumb|A [[caption]] with {{template}}<ref name='x'/>]]",
    "<math>{{a}_b}^{{c}} [[d]]</math>",
    "<nowiki>{{not}} <ref>a</ref> [[one|two]]</nowiki>",
    "[[ spaces ]] [[:Category:Shown]] [[a#b|''c'']] [[de:Other]]",
    "<!-- {{ [[ <ref> -->",
    "{{lang|fr|le [[moulin]]{{x}}}}",
    "{{{name|default}}}",
]
BLOCKS = [*(f"{markup}\n" for markup, _ in MARKUP if "\n" in markup), "{|\n| [[a]] || {{b}}\n|}\n"]


def prose(pieces: list[str]) -> str:
    return f"Words {' '.join(pieces)}.\n"


class TestWikitext:
    @pytest.mark.parametrize(("markup", "text"), MARKUP, ids=[text[:20] for _, text in MARKUP])
    def test_markup_becomes_text(self, markup: str, text: str) -> None:
        assert wiki_text(markup, NAMESPACES) == text

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.sampled_from(BLOCKS) | st.lists(st.sampled_from(INLINE), max_size=5).map(prose), max_size=5))
    def test_what_is_done_before_the_parser_changes_nothing(self, pieces: list[str]) -> None:
        markup = "".join(pieces)
        quick = wiki_text(markup, NAMESPACES)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wikitext, "lighten", lambda markup: markup)
            assert wiki_text(markup, NAMESPACES) == quick

    def test_markup_that_is_never_closed_is_no_error(self) -> None:
        for markup in ("{{open", "[[open", "<ref>open", "{|\n| open", "'''''", "==", "[[" * 200, "{{" * 200):
            wiki_text(f"Text {markup}", set())


def ids(found: list[Row | Fault]) -> list[int]:
    for row in good(found):
        assert row.text == words(row.number)
    return [row.number for row in good(found)]


PACK: dict[str, Callable[[bytes], bytes]] = {
    "a.xml": bytes,
    "a.xml.gz": gzip.compress,
    "a.xml.bz2": bz2.compress,
    "a.xml.zst": zstandard.compress,
}


class TestDump:
    @pytest.mark.parametrize("name", PACK)
    def test_articles_alone_with_their_title(self, name: str, tmp_path: Path) -> None:
        pages = [
            wiki_page(1, "Mühle & Co", "Text [[Datei:a.jpg]][[Kategorie:Mühlen]]."),
            wiki_page(2, "Diskussion:Mühle", "Talk", namespace=1),
            wiki_page(3, "Wassermühle", "#REDIRECT [[Mühle]]", redirect="Mühle"),
            wiki_page(4, "Rad", "A <redirect> and <page> that are only text."),
            wiki_page(5, "Leer", "{{nothing}}"),
        ]
        content = PACK[name](dump(pages))
        found = read(content, name)
        assert [(row.number, row.text) for row in good(found)] == [
            (1, "Text ."),
            (4, "A <redirect> and <page> that are only text."),
        ]
        assert good(found)[0].columns == {
            "title": "Mühle & Co",
            "timestamp": "2024-02-01T10:00:00Z",
            "url": "https://de.wikipedia.org/wiki/M%C3%BChle_&_Co",
        }
        assert reasons(found) == ["empty"]
        assert counted(content, name, tmp_path) == 3

    def test_multistream_is_read_in_parts_from_where_its_index_says(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        content, offsets = multistream(articles(200))
        found = [next_stream(io.BytesIO(content), offset - 5, len(content)) for offset in offsets]
        assert found == offsets
        monkeypatch.setattr(mediawiki, "UNIT_BYTES", 1000)
        whole = read(content, "a.xml.bz2")
        assert ids(whole) == list(range(1, 201)) and not reasons(whole)
        for parts in (2, 3, 7):
            shares = [read(content, "a.xml.bz2", lambda unit: unit % parts == part) for part in range(parts)]
            assert sorted(number for share in shares for number in ids(share)) == ids(whole)
            assert not any(reasons(share) for share in shares) and all(shares)
        assert counted(content, "a.xml.bz2", tmp_path) == 200

    def test_streams_that_are_cut_anywhere_in_the_text(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = dump(articles(40))
        source = random.Random(1)
        for size in (3, 100, 777):
            cuts = range(0, len(text), size) if size > 3 else sorted(source.sample(range(len(text)), 60))
            edges = [0, *[cut for cut in cuts if cut], len(text)]
            content = b"".join(bz2.compress(text[start:end]) for start, end in zip(edges, edges[1:]))
            for unit in (200, 1500):
                monkeypatch.setattr(mediawiki, "UNIT_BYTES", unit)
                found = read(content, "a.xml.bz2")
                assert ids(found) == list(range(1, 41)) and not reasons(found)

    @pytest.mark.parametrize("name", [*PACK, "multistream"])
    def test_a_cut_file_keeps_what_came_before(self, name: str) -> None:
        text = dump(articles(60))
        content = multistream(articles(60))[0] if name == "multistream" else PACK[name](text)
        name = "a.xml.bz2" if name == "multistream" else name
        for cut in random.Random(2).sample(range(400, len(content) - 20), 15):
            found = read(content[:cut], name)
            assert ids(found) == list(range(1, len(good(found)) + 1))
            assert reasons(found) in (["truncated"], ["not-a-dump"]) and (good(found) or name != "a.xml" or cut < 2000)
            if name == "a.xml":
                assert len(good(found)) == text[:cut].count(b"</page>")
            if name == "a.xml.gz":
                assert len(good(found)) == zlib.decompressobj(31).decompress(content[:cut]).count(b"</page>")

    @pytest.mark.parametrize("harm", [0, 40])
    def test_a_damaged_stream_costs_only_itself(self, harm: int, monkeypatch: pytest.MonkeyPatch) -> None:
        content, offsets = multistream(articles(100))
        damaged = bytearray(content)
        damaged[offsets[4] + harm : offsets[4] + harm + 8] = b"\0" * 8
        for unit in (500, 1000, 1 << 20):
            monkeypatch.setattr(mediawiki, "UNIT_BYTES", unit)
            found = read(bytes(damaged), "a.xml.bz2")
            assert ids(found) == [*range(1, 41), *range(51, 101)]
            assert reasons(found) == ["corrupt"]

    def test_a_broken_page_costs_only_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pages = articles(6)
        pages[1] = pages[1].replace("</title>", "</titel>")
        pages[3] = pages[3].replace("  </page>\n", "")
        found = read(dump(pages), "a.xml")
        assert ids(found) == [1, 3, 5, 6] and reasons(found) == ["not-xml", "broken-page"]
        monkeypatch.setattr(mediawiki, "RECORD_BYTES", 300_000)
        pages = articles(3)
        pages[1] = wiki_page(2, "Long", "x" * 2_000_000)
        found = read(dump(pages), "a.xml")
        assert ids(found) == [1, 3] and "record-too-long" in reasons(found)

    def test_what_is_no_dump(self) -> None:
        assert reasons(read(b"<?xml version='1.0'?><feed><entry/></feed>", "a.xml")) == ["not-a-dump"]
        assert reasons(read(b"nothing that bzip2 made" * 9, "a.xml.bz2")) == ["corrupt"]
        assert reasons(read(b"", "a.xml.bz2")) == ["truncated"]
        assert not read((HEAD + TAIL).encode(), "a.xml")


class TestBzip2Lines:
    def test_streams_one_after_the_other(self) -> None:
        content = b"".join(bz2.compress(b'{"text": "line %d"}\n' % number) for number in range(20))
        assert [row.text for row in good(read(content, "a.jsonl.bz2"))] == [f"line {number}" for number in range(20)]

    def test_cut_and_damaged(self) -> None:
        lines = b"".join(b'{"text": "line %d"}\n' % number for number in range(200_000))
        content = bz2.compress(lines)
        found = read(content[: len(content) * 2 // 3], "a.jsonl.bz2")
        assert len(good(found)) > 1000 and reasons(found)[-1] == "truncated"
        harmed = bytearray(content)
        harmed[len(content) // 2] ^= 255
        assert reasons(read(bytes(harmed), "a.jsonl.bz2"))[-1] == "corrupt"
