"""Common Crawl and Wikipedia as sources, against a server on loopback that has what theirs have."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from config.errors import UserError
from config.load import load_config
from config.schema import Config
from data.documents import BadRecord, Document, read_documents
from data.download import Downloaded, download_source
from data.formats import mediawiki
from data.sources import Job
from tests.archives import CRAWL, articles, crawl_files, dump_files, multistream, words
from tests.hub_server import Answer, HubServer, Repo

ROOT = Path(__file__).parents[1]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A crawl of four files of each format, a small Wikipedia, and its text on the hub; the current folder is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    table = io.BytesIO()
    pq.write_table(pa.table({"id": ["1", "2"], "title": ["a", "b"], "text": [words(1), words(2)]}), table)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        server.static.update(crawl_files("wet", 4))
        server.static.update(crawl_files("warc", 4))
        states = {"20240301": "done", "20240201": "done", "20240320": "in-progress"}
        server.static.update(dump_files("dewiki", states, multistream(articles(60))[0]))
        subsets = [
            {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/*.parquet"}]}
            for name in ("20231101.de", "20231101.en")
        ]
        files = {f"20231101.{language}/train-00000-of-00001.parquet": table.getvalue() for language in ("de", "en")}
        server.repos["wikimedia/wikipedia"] = Repo(
            {"main": files}, card={"configs": subsets, "license": "cc-by-sa-3.0"}
        )
        yield server


def settings(server: HubServer, name: str, **options: Any) -> list[str]:
    options = {"base_url": server.endpoint, **options}
    return [f"data.sources.{name}.{key}={'null' if value is None else value}" for key, value in options.items()]


def config_of(server: HubServer, name: str, **options: Any) -> Config:
    return load_config([], settings(server, name, **options))


def download(config: Config, name: str, **options: Any) -> Downloaded:
    return download_source(name, config.data, job=Job(), **options)


def read(config: Config, name: str, **options: Any) -> list[Document | BadRecord]:
    folder = Path(config.data.raw_dir) / name
    return list(read_documents(folder, config.data.sources[name], name, **options))


def documents(config: Config, name: str, **options: Any) -> list[Document]:
    return [record for record in read(config, name, **options) if isinstance(record, Document)]


def numbers(found: list[Document]) -> list[int]:
    return [int(document.metadata["url"].rpartition("/")[2]) for document in found]


class TestCommonCrawl:
    def test_the_text_of_the_first_files_with_where_it_is_from(self, server: HubServer) -> None:
        config = config_of(server, "common_crawl", files=2)
        done = download(config, "common_crawl")
        assert done.manifest.documents == 6 and done.manifest.revision == CRAWL
        assert "2 of 4 wet files" in done.manifest.origin
        found = documents(config, "common_crawl")
        assert [document.text for document in found] == [words(number) for number in range(6)]
        metadata = found[4].metadata
        assert metadata["url"] == "http://example.org/4" and metadata["language"] == "eng"
        assert metadata["date"] == "2024-02-20T21:10:55Z" and metadata["record_id"].startswith("<urn:uuid:")
        assert metadata["file"].endswith("CC-MAIN-00001.warc.wet.gz")

    def test_pages_are_extracted_from_warc(self, server: HubServer) -> None:
        config = config_of(server, "common_crawl", format="warc", files=1)
        assert download(config, "common_crawl").manifest.documents == 3
        for number, document in enumerate(documents(config, "common_crawl")):
            assert words(number) in document.text and "Shop" not in document.text

    @pytest.mark.parametrize(
        ("files", "fraction", "taken"),
        [
            (3, None, [0, 1, 2]),
            (9, None, [0, 1, 2, 3]),
            (None, 0.5, [0, 2]),
            (None, 0.01, [0]),
            (None, None, [0, 1, 2, 3]),
        ],
    )
    def test_how_many_files_are_taken(
        self, server: HubServer, files: int | None, fraction: float | None, taken: list[int]
    ) -> None:
        config = config_of(server, "common_crawl", files=files, fraction=fraction)
        download(config, "common_crawl")
        assert sorted({number // 3 for number in numbers(documents(config, "common_crawl"))}) == taken

    @pytest.mark.parametrize("packed", ["once", "twice"])
    def test_a_server_that_names_the_packing_of_the_list(self, server: HubServer, packed: str) -> None:
        path = f"/crawl-data/{CRAWL}/wet.paths.gz"
        server.packings[path] = "gzip"
        if packed == "twice":
            server.static[path] = gzip.compress(server.static[path])
        assert download(config_of(server, "common_crawl", files=1), "common_crawl").manifest.documents == 3
        assert {request.headers["accept-encoding"] for request in server.requests} == {"identity"}

    def test_files_and_fraction_exclude_each_other(self, server: HubServer) -> None:
        with pytest.raises(UserError, match="files or fraction"):
            config_of(server, "common_crawl", files=1, fraction=0.5)

    def test_more_files_later_fetch_only_those(self, server: HubServer) -> None:
        download(config_of(server, "common_crawl", files=1), "common_crawl")
        server.requests.clear()
        more = config_of(server, "common_crawl", files=3)
        assert download(more, "common_crawl").manifest.documents == 9
        assert [len(server.bodies(f"CC-MAIN-0000{number}.warc.wet.gz")) for number in range(4)] == [0, 1, 1, 0]

    def test_all_parts_together_are_the_whole(self, server: HubServer) -> None:
        config = config_of(server, "common_crawl", files=3)
        download(config, "common_crawl")
        whole = documents(config, "common_crawl")
        for parts in (2, 5):
            shares = [documents(config, "common_crawl", part=part, parts=parts) for part in range(parts)]
            assert sorted(document.id for share in shares for document in share) == sorted(one.id for one in whole)

    def test_streaming_reads_the_same(self, server: HubServer) -> None:
        config = config_of(server, "common_crawl", files=2, format="warc")
        download(config, "common_crawl")
        fetched = documents(config, "common_crawl")
        streamed = config_of(server, "common_crawl", files=2, format="warc", streaming="true")
        assert download(streamed, "common_crawl", force=True).manifest.streamed
        assert documents(streamed, "common_crawl") == fetched
        assert not list(Path("corpus/raw/common_crawl").rglob("*.gz"))

    def test_a_limit_in_bytes_cuts_a_file_between_records(self, server: HubServer) -> None:
        size = len(server.static[next(path for path in server.static if path.endswith("00000.warc.wet.gz"))])
        config = config_of(server, "common_crawl", files=2, max_bytes=size + size * 2 // 3)
        download(config, "common_crawl")
        found = read(config, "common_crawl")
        assert numbers([one for one in found if isinstance(one, Document)]) == [0, 1, 2, 3] and len(found) == 4

    def test_a_file_that_is_an_error_page_is_one_fault(self, server: HubServer) -> None:
        error = b"<!DOCTYPE html><html><body>503 Slow Down</body></html>"
        path = next(path for path in server.static if path.endswith("00001.warc.wet.gz"))
        server.static[path] = error
        config = config_of(server, "common_crawl", files=3)
        download(config, "common_crawl")
        found = read(config, "common_crawl")
        assert [record.reason for record in found if isinstance(record, BadRecord)] == ["html-page"]
        assert len(found) == 7

    def test_what_can_be_wrong_with_a_crawl(self, server: HubServer) -> None:
        with pytest.raises(UserError, match="names of the crawls"):
            download(config_of(server, "common_crawl", crawl="CC-MAIN-1999-01"), "common_crawl")
        with pytest.raises(UserError, match="crawl"):
            config_of(server, "common_crawl", crawl="2024-10")
        listing = f"/crawl-data/{CRAWL}/wet.paths.gz"
        server.static[listing] = gzip.compress(b"crawl-data/../../../evil.warc.wet.gz\n")
        with pytest.raises(UserError, match="leads out"):
            download(config_of(server, "common_crawl"), "common_crawl")
        server.static[listing] = b"<html>busy</html>"
        with pytest.raises(UserError, match="not a packed list"):
            download(config_of(server, "common_crawl"), "common_crawl")


class TestWikipedia:
    def dump_config(self, server: HubServer, **options: Any) -> Config:
        return config_of(server, "wikipedia", format="dump", language="de", **options)

    def test_the_newest_dump_that_is_complete(self, server: HubServer) -> None:
        config = self.dump_config(server)
        manifest = download(config, "wikipedia").manifest
        assert manifest.revision == "20240301" and manifest.documents == 60
        assert manifest.origin.endswith("/dewiki/20240301") and "CC-BY-SA" in manifest.licence
        found = documents(config, "wikipedia")
        assert [document.text for document in found] == [words(number) for number in range(1, 61)]
        assert found[6].metadata["title"] == "Mill 7"
        assert found[6].metadata["url"] == "https://de.wikipedia.org/wiki/Mill_7"

    def test_a_date(self, server: HubServer) -> None:
        assert download(self.dump_config(server, date=20240201), "wikipedia").manifest.revision == "20240201"

    def test_all_parts_together_are_the_whole(self, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mediawiki, "UNIT_BYTES", 500)
        config = self.dump_config(server)
        download(config, "wikipedia")
        whole = documents(config, "wikipedia")
        for parts in (2, 5):
            shares = [documents(config, "wikipedia", part=part, parts=parts) for part in range(parts)]
            assert all(shares)
            assert sorted(document.id for share in shares for document in share) == sorted(one.id for one in whole)

    def test_streaming_and_limits_read_the_same_rows(self, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mediawiki, "UNIT_BYTES", 500)
        half = len(server.static["/dewiki/20240301/dewiki-20240301-pages-articles-multistream.xml.bz2"]) // 2
        for limit in (None, half):
            config = self.dump_config(server, max_bytes=limit)
            download(config, "wikipedia", force=True)
            fetched = documents(config, "wikipedia")
            assert len(fetched) == 60 if limit is None else 10 < len(fetched) < 40
            assert len(read(config, "wikipedia")) == len(fetched)
            streamed = self.dump_config(server, max_bytes=limit, streaming="true")
            download(streamed, "wikipedia", force=True)
            for parts in (1, 3):
                found = [
                    record for part in range(parts) for record in read(streamed, "wikipedia", part=part, parts=parts)
                ]
                assert sorted(map(str, found)) == sorted(map(str, fetched))

    def test_the_beginning_of_a_dump_in_parts(self, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mediawiki, "UNIT_BYTES", 500)
        config = self.dump_config(server, max_bytes=2000)
        download(config, "wikipedia")
        whole = read(config, "wikipedia")
        found = [record for part in range(3) for record in read(config, "wikipedia", part=part, parts=3)]
        assert sorted(map(str, found)) == sorted(map(str, whole)) and 0 < len(whole) < 60

    def test_the_publishers_checksum_is_held_to(self, server: HubServer) -> None:
        path = "/dewiki/20240301/dewiki-20240301-pages-articles-multistream.xml.bz2"
        good = server.static[path]
        server.misbehave[path] = [Answer(body=bytes(len(good)))]
        assert download(self.dump_config(server), "wikipedia").manifest.documents == 60
        assert len(server.bodies(path)) == 2
        server.static[path] = good[:-1] + b"\0"
        with pytest.raises(UserError, match="sha1"):
            download(self.dump_config(server), "wikipedia", force=True)

    def test_a_cut_connection_is_gone_on_with_at_the_byte(self, server: HubServer) -> None:
        path = "/dewiki/20240301/dewiki-20240301-pages-articles-multistream.xml.bz2"
        server.misbehave[path] = [Answer(cut_after=1000)]
        assert download(self.dump_config(server), "wikipedia").manifest.documents == 60
        assert [request.range_start for request in server.bodies(path)] == [0, 1000]

    def test_a_mirror_with_checksums_alone(self, server: HubServer) -> None:
        for path in [path for path in server.static if path.endswith("dumpstatus.json")]:
            del server.static[path]
        del server.static["/dewiki/20240320/dewiki-20240320-sha1sums.txt"]
        assert download(self.dump_config(server), "wikipedia").manifest.revision == "20240301"

    def test_files_in_parts(self, server: HubServer) -> None:
        name = "frwiki-20240301-pages-articles-multistream1.xml-p1p60.bz2"
        server.static.update(dump_files("frwiki", {"20240301": "done"}, multistream(articles(60))[0], name))
        config = config_of(server, "wikipedia", format="dump", language="fr")
        (file,) = download(config, "wikipedia").manifest.files
        assert file.path == "frwiki-20240301-pages-articles-multistream1-p1p60.xml.bz2"
        assert len(documents(config, "wikipedia")) == 60

    def test_what_can_be_wrong_with_a_dump(self, server: HubServer) -> None:
        with pytest.raises(UserError, match="language"):
            download(config_of(server, "wikipedia", format="dump", language="xx"), "wikipedia")
        with pytest.raises(UserError, match="no dump of dewiki of 19990101"):
            download(self.dump_config(server, date=19990101), "wikipedia")
        with pytest.raises(UserError, match="no dump of dewiki of 20240320"):
            download(self.dump_config(server, date=20240320), "wikipedia")
        server.static["/dewiki/20240301/dumpstatus.json"] = b"<html>busy</html>"
        with pytest.raises(UserError, match="not what it should be"):
            download(self.dump_config(server, date=20240301), "wikipedia")

    def test_the_cleaned_text_of_the_hub(self, server: HubServer) -> None:
        config = config_of(server, "wikipedia", language="de")
        manifest = download(config, "wikipedia").manifest
        assert (manifest.kind, manifest.licence, manifest.documents) == ("wikipedia", "cc-by-sa-3.0", 2)
        assert [document.text for document in documents(config, "wikipedia")] == [words(1), words(2)]
        with pytest.raises(UserError, match="20231101.xx"):
            download(config_of(server, "wikipedia", language="xx"), "wikipedia")


def test_the_command_as_it_is_typed(server: HubServer) -> None:
    line = [sys.executable, str(ROOT / "data" / "download_datasets.py"), "wikipedia", "common_crawl"]
    more = [*settings(server, "wikipedia", format="dump", language="de"), *settings(server, "common_crawl", files=1)]
    done = subprocess.run([*line, *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "wikipedia: 60 documents" in done.stdout and "common_crawl: 3 documents" in done.stdout
    assert "data.use=[wikipedia,common_crawl]" in done.stdout
