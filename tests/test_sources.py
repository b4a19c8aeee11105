"""Sources that need no network: formats, the user's own files, the built-in sample, and what lies on disk after."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from config.command import run
from config.errors import UserError
from config.load import load_config
from config.schema import Config
from data.documents import BadRecord, Document, document_id, read_documents
from data.download import Downloaded, download_source
from data.download_datasets import download_datasets
from data.formats import SUFFIXES, read_rows
from data.formats.rows import RECORD_BYTES, Fault, Row
from data.manifest import load_raw_manifest
from data.sources import Job
from data.sources.sample import language_reference
from tests.archives import Archive, articles, dump, page

ROOT = Path(__file__).parents[1]
TEXTS = ["One story.", 'Zwei Geschichten\nmit Umbruch, und "Zeichen".', "третья", "四番目の話"]


def rows_of(data: bytes, name: str, column: str = "text", **options: Any) -> list[Row | Fault]:
    return list(read_rows(io.BytesIO(data), name, column, **options))


def texts_of(rows: list[Row | Fault]) -> list[str]:
    return [row.text for row in rows if isinstance(row, Row)]


def faults_of(rows: list[Row | Fault]) -> list[tuple[int, str]]:
    return [(row.number, row.reason) for row in rows if isinstance(row, Fault)]


def jsonl(records: list[Any]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def csv_bytes(records: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue().encode()


def parquet(columns: dict[str, Any], row_group_size: int = 1000) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, row_group_size=row_group_size)
    return file.getvalue()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


class TestFormats:
    @pytest.mark.parametrize("packed", PACK)
    @pytest.mark.parametrize("base", [".jsonl", ".csv"])
    def test_rows_of_every_compression(self, base: str, packed: str) -> None:
        records = [{"text": text, "n": number} for number, text in enumerate(TEXTS)]
        data = jsonl(records) if base == ".jsonl" else csv_bytes(records)
        assert texts_of(rows_of(PACK[packed](data), f"a{base}{packed}")) == TEXTS

    @pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.MD.zst"])
    def test_a_text_file_is_one_document(self, name: str) -> None:
        data = PACK[Path(name.lower()).suffix.replace(".txt", "").replace(".md", "")]("\n\n".join(TEXTS).encode())
        assert texts_of(rows_of(data, name)) == ["\n\n".join(TEXTS)]

    def test_parquet_with_row_groups_strings_and_dictionaries(self) -> None:
        data = parquet({"text": pa.array(TEXTS).dictionary_encode(), "n": [1, 2, 3, 4]}, row_group_size=3)
        rows = rows_of(data, "a.parquet", with_columns=True)
        assert texts_of(rows) == TEXTS
        assert [row.columns for row in rows] == [{"n": 1}, {"n": 2}, {"n": 3}, {"n": 4}]
        assert texts_of(rows_of(data, "a.parquet", wanted=lambda group: group == 1)) == TEXTS[3:]
        assert texts_of(rows_of(data, "a.parquet", limit=2)) == TEXTS[:2]

    @settings(max_examples=50, deadline=None)
    @given(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(lambda text: text + "."), max_size=5)
    )
    def test_any_text_comes_back_from_jsonl_and_parquet(self, texts: list[str]) -> None:
        texts = [text for text in texts if "\0" not in text and "\ufffd" not in text]
        records = [{"text": text} for text in texts]
        assert texts_of(rows_of(PACK[".zst"](jsonl(records)), "a.jsonl.zst")) == texts
        assert texts_of(rows_of(parquet({"text": pa.array(texts, pa.string())}), "a.parquet")) == texts

    @settings(max_examples=150, deadline=None)
    @given(st.sampled_from(SUFFIXES), st.integers(0, 3), st.data())
    def test_no_bytes_whatever_break_a_reader(self, suffix: str, changes: int, data: st.DataObject) -> None:
        records = [{"text": text, "n": "1"} for text in TEXTS]
        base, packed = suffix.split(".")[1], Path(suffix).suffix
        whole = {
            "parquet": parquet({"text": TEXTS}),
            "csv": csv_bytes(records),
            "xml": dump(articles(3)),
            "warc": crawl_archive(packed=False),
        }.get(base, jsonl(records))
        body = bytearray(PACK.get(packed, bytes)(whole) if changes else data.draw(st.binary(max_size=300)))
        if base == "warc" and packed == ".gz" and changes:
            body = bytearray(crawl_archive(packed=True))
        for _ in range(changes):
            at = data.draw(st.integers(0, len(body)))
            body[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
        for row in rows_of(bytes(body), f"a{suffix}", with_columns=True):
            if isinstance(row, Row):
                orjson.dumps([row.text, row.columns])

    def test_each_bad_line_of_jsonl_is_named_and_the_good_ones_stay(self) -> None:
        lines = [
            b'\xef\xbb\xbf{"text": "after a byte order mark"}',
            b'["no object"]',
            b'{"text": "half a',
            b"",
            b'{"body": "other column"}',
            b'{"text": 7}',
            b'{"text": "  "}',
            b'{"text": "\xff\xfe"}',
            b'{"text": "lone \\ud800 surrogate"}',
            b'{"text": "\\u0000\\u0001\\u0002\\u0000"}',
            b'{"text": null}',
            b'{"text": "NaN is fine", "score": NaN}\r',
            b'{"text": "one \\u0000 in a longer text is left to the cleaning"}',
            b'{"text": "only the text counts", "title": "\\udfff", "\\ud800": 1, "n": 99999999999999999999, "m": 2}',
        ]
        rows = rows_of(b"\n".join(lines), "a.jsonl", with_columns=True)
        assert faults_of(rows) == [
            (2, "not-an-object"),
            (3, "not-json"),
            (5, "missing-text"),
            (6, "text-not-a-string"),
            (7, "empty"),
            (8, "invalid-utf8"),
            (9, "lone-surrogate"),
            (10, "binary"),
            (11, "missing-text"),
        ]
        assert [row.number for row in rows if isinstance(row, Row)] == [1, 12, 13, 14]
        assert rows[-1].columns == {"m": 2}

    @pytest.mark.parametrize("packed", [".gz", ".bz2", ".zst"])
    def test_what_stands_before_a_cut_is_kept(self, packed: str) -> None:
        records = [{"text": f"number {number} {os.urandom(200).hex()}"} for number in range(5000)]
        data = PACK[packed](jsonl(records))
        rows = rows_of(data[: len(data) // 2], f"a.jsonl{packed}")
        kept = texts_of(rows)
        assert len(kept) > 1000 and kept == [record["text"] for record in records[: len(kept)]]
        assert faults_of(rows) == [(len(kept) + 1, "truncated")]

    @pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.txt.zst", "a.csv.gz"])
    def test_bytes_that_are_not_packed_as_the_name_says(self, name: str) -> None:
        assert faults_of(rows_of(b"404 Not Found\n" * 20, name))[0][1] == "corrupt"

    def test_zst_of_several_frames_and_a_long_window(self) -> None:
        parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
        data = jsonl([{"text": text} for text in TEXTS])
        packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        assert (
            texts_of(rows_of(packer.compress(data) + packer.flush() + PACK[".zst"](data), "a.jsonl.zst")) == 2 * TEXTS
        )

    @pytest.mark.parametrize("name", ["a.jsonl.zst", "a.csv.zst", "a.txt.zst"])
    def test_a_line_of_200_megabytes_does_not_fill_memory(self, name: str) -> None:
        good = {"a.jsonl.zst": b'{"text": "good"}\n', "a.csv.zst": b"text\n", "a.txt.zst": b"good\n"}[name]
        data = PACK[".zst"](good + b"x" * 200_000_000 + b"\n" + good.replace(b"text\n", b"good\n"))
        tracemalloc.start()
        try:
            rows = rows_of(data, name, document_bytes=1000)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert "line-too-long" in [reason for _, reason in faults_of(rows)]
        assert "good" in "".join(texts_of(rows))
        assert peak < 3 * RECORD_BYTES

    def test_text_that_is_none(self) -> None:
        assert faults_of(rows_of(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" * 50, "a.txt")) == [(1, "binary")]
        assert faults_of(rows_of("Käse".encode("latin-1"), "a.txt")) == [(1, "invalid-utf8")]
        assert faults_of(rows_of(b" \n\n", "a.md")) == [(1, "empty")]
        assert rows_of(b"", "a.md") == []

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
    @pytest.mark.parametrize("packed", PACK)
    def test_a_byte_order_mark_in_every_format(self, encoding: str, packed: str) -> None:
        wanted = ["Straße naïve\n日本語", "мука 😀"]
        records = [{"text": text} for text in wanted]
        article = (
            "<page><title>x</title><ns>0</ns><id>1</id><revision><text>мука 😀</text></revision></page></mediawiki>"
        )
        files = {
            "a.jsonl": ("\n".join(json.dumps(record, ensure_ascii=False) for record in records), wanted),
            "a.csv": (csv_bytes(records, "\t").decode(), wanted),
            "a.txt": (wanted[1], wanted[1:]),
            "a.xml": (f"<mediawiki>{article}", wanted[1:] if packed != ".bz2" or encoding == "utf-8-sig" else []),
        }
        for name, (content, texts) in files.items():
            rows = rows_of(PACK[packed](content.encode(encoding)), name + packed)
            assert texts_of(rows) == texts
            assert faults_of(rows) == ([] if texts else [(0, "not-a-dump")])

    def test_a_long_text_is_cut_between_paragraphs_and_nothing_is_lost(self) -> None:
        text = "".join(f"Paragraph {number}. {'word ' * (number % 50)}\n\n" for number in range(2000))
        rows = rows_of(text.encode(), "a.txt", document_bytes=10_000)
        pieces = texts_of(rows)
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 10_000 and len(pieces) < 2 * len(text) / 10_000
        assert all(piece.startswith("Paragraph") for piece in pieces)
        assert [row.number for row in rows] == list(range(1, len(rows) + 1))

    def test_csv_with_line_breaks_other_delimiters_and_bad_rows(self) -> None:
        records = [{"id": "1", "text": 'line one\nline two, "quoted"'}, {"id": "2", "text": "x" * 200_000}]
        for delimiter in ",;\t":
            rows = rows_of(csv_bytes(records, delimiter), "a.csv", with_columns=True)
            assert texts_of(rows) == [record["text"] for record in records]
            assert rows[0].columns == {"id": "1"}
        data = b"id,text\n1,good\n2,K\xe4se\n3,too,many\n4\n5,\n6,good too\n"
        rows = rows_of(data, "a.csv")
        assert texts_of(rows) == ["good", "good too"]
        assert faults_of(rows) == [
            (3, "invalid-utf8"),
            (4, "too-many-columns"),
            (5, "missing-text"),
            (6, "empty"),
        ]

    def test_parquet_that_is_none_or_has_other_columns(self) -> None:
        assert faults_of(rows_of(b"not Parquet at all", "a.parquet")) == [(0, "corrupt")]
        data = parquet({"body": TEXTS, "n": [1, 2, 3, 4]}, row_group_size=3)
        rows = rows_of(data, "a.parquet")
        assert [(row.count, row.columns) for row in rows if isinstance(row, Fault)] == [
            (3, ("body", "n")),
            (1, ("body", "n")),
        ]
        data = parquet({"text": ["good", None, "", "fine"]})
        assert texts_of(rows_of(data, "a.parquet")) == ["good", "fine"]
        assert faults_of(rows_of(data, "a.parquet")) == [(1, "missing-text"), (2, "empty")]
        data = parquet({"text": pa.array([b"good", b"\xff\xff"], pa.binary())})
        assert texts_of(rows_of(data, "a.parquet")) == ["good"]
        assert faults_of(rows_of(data, "a.parquet")) == [(1, "invalid-utf8")]
        cut = parquet({"text": [random.Random(n).randbytes(500).hex() for n in range(1000)]})
        broken = cut[:2000] + b"\xff" * 50_000 + cut[52_000:]
        rows = rows_of(broken, "a.parquet")
        assert sum(row.count for row in rows if isinstance(row, Fault)) + len(texts_of(rows)) == 1000
        assert {reason for _, reason in faults_of(rows)} == {"corrupt"}


def crawl_archive(packed: bool) -> bytes:
    """A page and the text of one."""
    archive = Archive(packed)
    archive.response("http://example.org/", page(TEXTS[1]).encode())
    archive.conversion("http://example.org/", TEXTS[2].encode())
    return archive.content


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files_config(*paths: str, **options: Any) -> Config:
    overrides = [f"data.sources.my-files.{key}={value}" for key, value in options.items()]
    return load_config([], [f"data.sources.my-files.paths={json.dumps(list(paths))}", *overrides])


def download(config: Config, name: str = "my-files", **options: Any) -> Downloaded:
    return download_source(name, config.data, job=Job(config.data.preprocess.max_bad_fraction), **options)


def read(config: Config, name: str = "my-files", **options: Any) -> Iterator[Document | BadRecord]:
    return read_documents(Path(config.data.raw_dir) / name, config.data.sources[name], name, **options)


def documents(config: Config, name: str = "my-files", **options: Any) -> list[Document]:
    return [record for record in read(config, name, **options) if isinstance(record, Document)]


class TestFiles:
    def test_every_format_at_once(self, corpus: Path) -> None:
        folder = corpus / "in" / "sub"
        folder.mkdir(parents=True)
        records = [{"text": text, "n": number} for number, text in enumerate(TEXTS)]
        contents = {
            "a.txt": TEXTS[0].encode(),
            "b.md": TEXTS[1].encode(),
            "c.jsonl": jsonl(records),
            "d.jsonl.gz": PACK[".gz"](jsonl(records)),
            "e.jsonl.zst": PACK[".zst"](jsonl(records)),
            "f.csv": csv_bytes(records),
            "sub/g.parquet": parquet({"text": TEXTS, "n": [0, 1, 2, 3]}),
        }
        for name, data in contents.items():
            (corpus / "in" / name).write_bytes(data)
        (corpus / "in" / "picture.png").write_bytes(b"\x89PNG")
        (corpus / "in" / ".hidden.txt").write_text("not meant")
        config = files_config("in/*", "in/sub")
        done = download(config)
        found = documents(config)
        assert done.fetched and done.manifest.documents == len(found) == 2 + 5 * len(TEXTS)
        assert [document.text for document in found] == TEXTS[:2] + 5 * TEXTS
        assert found[2].metadata == {"n": 0, "file": "c.jsonl", "row": 1}
        assert found[-1].metadata == {"n": 3, "file": "sub/g.parquet", "row": 3}
        assert found[0].id == document_id("my-files", "a.txt:1")
        assert len({document.id for document in found}) == len(found)
        assert not download(config).fetched

    def test_ids_and_bytes_do_not_depend_on_where_the_files_lie(self, corpus: Path) -> None:
        states = []
        for place in ("here", "there/deeper"):
            (corpus / place / "sub").mkdir(parents=True)
            for name in ("one.txt", "sub/two.txt"):
                (corpus / place / name).write_text(f"text of {name}")
            config = files_config(str(corpus / place / "**/*.txt"))
            manifest = download(config).manifest
            states.append(([document.id for document in documents(config)], [file.sha256 for file in manifest.files]))
        assert states[0] == states[1]

    def test_bad_records_are_set_aside_with_place_and_reason(self, corpus: Path) -> None:
        good = [{"text": f"good {number}"} for number in range(97)]
        (corpus / "a.jsonl").write_bytes(jsonl(good) + b'{"text": "torn\n[1]\n' + jsonl([{"text": ""}]))
        config = files_config("a.jsonl")
        manifest = download(config).manifest
        assert manifest.documents == 97
        assert manifest.quarantined == {"not-json": 1, "not-an-object": 1, "empty": 1}
        lines = (Path(config.data.raw_dir) / "my-files" / "quarantine.jsonl").read_text().splitlines()
        assert [json.loads(line)["location"] for line in lines] == ["a.jsonl:98", "a.jsonl:99", "a.jsonl:100"]
        records = list(read(config))
        bad = [record for record in records if isinstance(record, BadRecord)]
        assert [record.reason for record in bad] == ["not-json", "not-an-object", "empty"]
        assert bad[0].excerpt == '{"text": "torn'
        assert len(records) == 100

    def test_too_many_bad_records_stop_it_and_the_old_copy_stays(self, corpus: Path) -> None:
        path = corpus / "a.jsonl"
        path.write_bytes(jsonl([{"text": "old"}] * 4))
        config = files_config("a.jsonl")
        download(config)
        path.write_bytes(jsonl([{"text": "new"}] * 6) + b"torn\n" * 3 + b"[]\n")
        with pytest.raises(
            UserError, match=r"4 of 10 records cannot be read \(not-json 3, not-an-object 1\).*a.jsonl:7"
        ):
            download(config)
        assert [document.text for document in documents(config)] == ["old"] * 4
        lenient = load_config([], [f'data.sources.my-files.paths=["{path}"]', "data.preprocess.max_bad_fraction=0.5"])
        assert download(lenient).manifest.documents == 6

    def test_empty_rows_alone_never_stop_it(self, corpus: Path) -> None:
        (corpus / "a.jsonl").write_bytes(jsonl([{"text": "good"}, *[{"text": ""}] * 50]))
        assert download(files_config("a.jsonl")).manifest.quarantined == {"empty": 50}

    @pytest.mark.parametrize(
        ("name", "data"),
        [
            ("a.jsonl", jsonl([{"title": "t", "content": "c"}] * 3)),
            ("a.csv", csv_bytes([{"title": "t", "content": "c"}] * 3)),
            ("a.parquet", parquet({"title": ["t"] * 3, "content": ["c"] * 3})),
        ],
    )
    def test_a_missing_text_column_names_the_columns_and_the_option(self, corpus: Path, name: str, data: bytes) -> None:
        (corpus / name).write_bytes(data)
        with pytest.raises(UserError, match=r"title, content\. Set data\.sources\.my-files\.text_column"):
            download(files_config(name))
        assert download(files_config(name, text_column="content")).manifest.documents == 3

    @pytest.mark.parametrize(
        ("paths", "message"),
        [
            ([], r"names no files. Set data\.sources\.my-files\.paths"),
            (["nothing/*.txt"], r"nothing/\*\.txt matches no file"),
            (["a.pdf"], r"a\.pdf is of no format"),
            (["."], r"\. matches no file that can be read"),
        ],
    )
    def test_paths_that_lead_nowhere(self, corpus: Path, paths: list[str], message: str) -> None:
        (corpus / "a.pdf").write_bytes(b"%PDF")
        with pytest.raises(UserError, match=message):
            download(files_config(*paths))

    def test_an_empty_file_is_no_corpus(self, corpus: Path) -> None:
        (corpus / "a.txt").write_text("")
        with pytest.raises(UserError, match="holds no documents"):
            download(files_config("a.txt"))

    def test_a_name_that_is_not_utf8(self, corpus: Path) -> None:
        Path(os.fsdecode(b"K\xe4se.jsonl")).write_bytes(jsonl([{"text": "good"}] * 30 + [{}]))
        config = files_config("*.jsonl")
        assert download(config).manifest.quarantined == {"missing-text": 1}
        assert documents(config)[0].metadata["file"] == "K\\xe4se.jsonl"

    def test_names_with_brackets_and_the_whole_folder(self, corpus: Path) -> None:
        (corpus / "a [draft].txt").write_text("a draft")
        config = files_config("a [draft].txt")
        assert download(config).manifest.documents == 1
        config = files_config(".")
        assert download(config).manifest.documents == 1
        (corpus / "b.txt").write_text("another")
        assert download(config).manifest.documents == 2

    def test_changed_files_and_damaged_copies_are_read_again(self, corpus: Path) -> None:
        path = corpus / "a.txt"
        path.write_text("first")
        config = files_config("a.txt")
        download(config)
        path.write_text("second")
        assert download(config).fetched
        assert [document.text for document in documents(config)] == ["second"]
        copy = Path(config.data.raw_dir) / "my-files" / "documents-00000.parquet"
        whole = copy.read_bytes()
        copy.write_bytes(whole[:-1])
        with pytest.raises(UserError, match="missing or damaged"):
            documents(config)
        assert download(config).fetched and copy.read_bytes() == whole
        copy.write_bytes(whole[:-1] + b"x")
        assert not download(config).fetched
        assert download(config, verify=True).fetched and copy.read_bytes() == whole

    def test_a_long_text_file_becomes_several_documents(self, corpus: Path) -> None:
        (corpus / "a.txt").write_text("A paragraph of some length.\n\n" * 100)
        config = files_config("a.txt", max_document_bytes=500)
        assert (download(config).manifest.documents or 0) > 5
        assert "".join(document.text for document in documents(config)) == "A paragraph of some length.\n\n" * 100

    def test_two_downloads_of_one_source_do_not_mix(self, corpus: Path) -> None:
        fcntl = pytest.importorskip("fcntl")
        (corpus / "a.txt").write_text("text")
        config = files_config("a.txt")
        download(config)
        with open(Path(config.data.raw_dir) / ".my-files.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(UserError, match="Another process is downloading"):
                download(config)


class TestReadDocuments:
    @pytest.fixture
    def many(self, corpus: Path) -> Config:
        records = [{"text": f"document {number} " + "words " * (number % 400)} for number in range(6000)]
        (corpus / "a.jsonl").write_bytes(jsonl(records))
        config = files_config("a.jsonl")
        download(config)
        return config

    @pytest.mark.parametrize("parts", [2, 3, 7])
    def test_parts_are_disjoint_and_together_the_whole(self, many: Config, parts: int) -> None:
        whole = documents(many)
        shares = [documents(many, part=part, parts=parts) for part in range(parts)]
        assert sorted(document.id for share in shares for document in share) == sorted(
            document.id for document in whole
        )
        assert len({document.id for document in whole}) == 6000
        assert all(shares)

    def test_other_settings_than_downloaded(self, many: Config) -> None:
        changed = files_config("a.jsonl", text_column="body")
        with pytest.raises(UserError, match=r"other settings of data\.sources\.my-files"):
            read(changed)

    def test_nothing_downloaded(self, corpus: Path) -> None:
        with pytest.raises(UserError, match=r"Run python data/download_datasets.py sample first"):
            read(load_config(), "sample")

    def test_a_torn_manifest(self, many: Config) -> None:
        folder = Path(many.data.raw_dir) / "my-files"
        (folder / "manifest.json").write_text('{"format": 1,')
        with pytest.raises(UserError, match="manifest.json is damaged"):
            load_raw_manifest(folder)
        assert download(many).fetched


class TestSample:
    def test_the_standard_library_and_language_reference(self, corpus: Path) -> None:
        config = load_config()
        manifest = download(config, "sample").manifest
        found = {document.metadata["path"]: document for document in documents(config, "sample")}
        assert manifest.documents == len(found) > 300
        assert manifest.licence == "PSF-2.0" and sys.version.split()[0] in manifest.origin
        assert "class JSONDecoder" in found["stdlib/json/decoder.py"].text
        topics = dict(language_reference())
        assert found["pydoc_data/assert"].text == topics["assert"]
        parts = {part for path in found for part in path.split("/")}
        assert not parts & {"test", "tests", "site-packages", "dist-packages", "idlelib", "__pycache__"}
        assert manifest.quarantined == {}

    def test_the_same_bytes_every_time(self, corpus: Path) -> None:
        config = load_config()
        first = download(config, "sample").manifest.files
        assert download(config, "sample", force=True).manifest.files == first


def command(*words: str, cwd: Path, limit: str = "") -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "data" / "download_datasets.py"), *words]
    if limit:
        line = ["bash", "-c", f'{limit}; exec "$@"', "bash", *line]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True)


def run_here(*words: str) -> int:
    """The command in this process; its exit status."""
    with pytest.raises(SystemExit) as stop:
        run(download_datasets, words)
    return int(stop.value.code or 0)


class TestCommand:
    def test_download_list_and_download_again(self, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_here("--list") == 0
        nothing = capsys.readouterr().out
        assert "Nothing has been downloaded" in nothing and "python data/download_datasets.py" in nothing
        first = command(cwd=corpus)
        assert first.returncode == 0, first.stderr
        assert first.stdout.splitlines()[-1] == "Next: python data/tokenizer.py"
        assert "corpus/raw/sample" in first.stdout
        assert run_here() == 0
        assert "complete and unchanged" in capsys.readouterr().out
        assert run_here("--list") == 0
        table = capsys.readouterr().out
        for word in ("source", "documents", "size", "date", "licence", "path", "PSF-2.0", "corpus/raw/sample"):
            assert word in table

    def test_a_wrong_name_gets_the_nearest_one(self, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_here("smaple") == 1
        error = capsys.readouterr().err
        assert error.startswith("error: There is no source 'smaple'") and "'sample'" in error

    def test_a_name_that_is_no_folder(self, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_here("../up", "data.sources={../up: {kind: sample}}") == 1
        assert "'../up' needs a name that can be a folder's" in capsys.readouterr().err
        assert list(corpus.iterdir()) == []

    def test_settings_are_handed_to_the_next_command(self, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (corpus / "a.txt").write_text("some text")
        assert run_here("my-files", 'data.sources.my-files.paths=["a.txt"]') == 0
        expected = "Next: python data/tokenizer.py 'data.sources.my-files.paths=[\"a.txt\"]' 'data.use=[my-files]'"
        assert capsys.readouterr().out.splitlines()[-1] == expected

    def test_a_full_disk_leaves_the_old_copy(self, corpus: Path) -> None:
        path = corpus / "a.txt"
        words = ("my-files", f'data.sources.my-files.paths=["{path}"]')
        path.write_text("small")
        assert run_here(*words) == 0
        manifest = corpus / "corpus/raw/my-files/manifest.json"
        before = manifest.read_bytes()
        path.write_text("\n".join(os.urandom(500).hex() for _ in range(1000)))
        full = command(*words, cwd=corpus, limit="ulimit -f 100")
        assert full.returncode == 1, full.stdout + full.stderr
        assert full.stderr.startswith("error: No space left while writing")
        assert "Traceback" not in full.stderr
        assert manifest.read_bytes() == before
        assert run_here(*words) == 0
        assert manifest.read_bytes() != before
