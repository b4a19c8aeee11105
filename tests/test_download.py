"""Downloads, against a server on loopback that speaks the hub's protocol and misbehaves when told to."""

from __future__ import annotations

import hashlib
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from config.errors import UserError
from config.load import load_config
from config.schema import Config
from data.documents import Document, read_documents
from data.download import Downloaded, download_source, downloaded_sources
from data.fetch import FileFetch
from data.sources import Job
from data.transport import parallel
from data.transport.notes import Fetched, RemoteFile
from data.transport.remote import RemoteStream
from data.transport.retry import FetchError, retry_after
from tests.hub_server import Answer, HubServer, Repo

ROOT = Path(__file__).parents[1]
NAME = "owner/stories"
BODY = random.Random(0).randbytes(300_000)


def parquet(texts: list[str], column: str = "text") -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), file, row_group_size=100)
    return file.getvalue()


def stories(count: int, seed: int = 0, words: int = 100) -> list[str]:
    source = random.Random(seed)
    return [f"{seed}-{number}: " + source.randbytes(2 * words).hex() for number in range(count)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with one small public data set, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        server.repos[NAME] = Repo(
            {
                "main": {
                    "README.md": b"# Stories",
                    "data/train-00000-of-00002.parquet": parquet(stories(250)),
                    "data/train-00001-of-00002.parquet": parquet(stories(150, 1)),
                    "data/validation-00000-of-00001.parquet": parquet(stories(10, 2)),
                }
            },
            card={"license": "cdla-sharing-1.0"},
        )
        yield server


def hub_config(repository: str = NAME, **options: Any) -> Config:
    settings = {"repository": repository, **options}
    return load_config([], [f"data.sources.tinystories.{key}={value}" for key, value in settings.items()])


def download(config: Config, **options: Any) -> Downloaded:
    return download_source("tinystories", config.data, job=Job(), **options)


def documents(config: Config, **options: Any) -> list[Document]:
    folder = Path(config.data.raw_dir) / "tinystories"
    records = read_documents(folder, config.data.sources["tinystories"], "tinystories", **options)
    return [record for record in records if isinstance(record, Document)]


class TestFileFetch:
    """One file, from a storage that answers as it is told."""

    @pytest.fixture
    def fetch(self, hub: HubServer, tmp_path: Path) -> Iterator[Callable[..., Fetched]]:
        hub.repos["owner/file"] = Repo({"main": {"file.bin": BODY}}, large=lambda path: True)
        self.path = tmp_path / "out" / "file.bin"
        with httpx.Client(follow_redirects=True) as client:

            def run(**known: Any) -> Fetched:
                file = RemoteFile(f"{hub.endpoint}/datasets/owner/file/resolve/main/file.bin", self.path, **known)
                self.waits: list[str] = []
                return FileFetch(client, file, first_wait=0.01, waiting=self.waits.append).run()

            yield run

    def right(self) -> dict[str, Any]:
        return {"size": len(BODY), "checksum": ("sha256", hashlib.sha256(BODY).hexdigest())}

    @pytest.mark.parametrize(
        "known",
        [
            {},
            {"size": len(BODY)},
            {"size": len(BODY), "checksum": ("sha256", hashlib.sha256(BODY).hexdigest())},
            {"checksum": ("sha1", hashlib.sha1(BODY).hexdigest())},
            {
                "size": len(BODY),
                "checksum": ("git-sha1", hashlib.sha1(f"blob {len(BODY)}\0".encode() + BODY).hexdigest()),
            },
        ],
    )
    def test_whole_whatever_is_known_of_it(self, fetch: Callable[..., Fetched], known: dict[str, Any]) -> None:
        done = fetch(**known)
        assert self.path.read_bytes() == BODY
        assert (done.bytes, done.sha256) == (len(BODY), hashlib.sha256(BODY).hexdigest())

    def test_cut_connections_go_on_where_they_were_cut(self, fetch: Callable[..., Fetched], hub: HubServer) -> None:
        hub.misbehave["file.bin"] = [Answer(cut_after=20_000) for _ in range(12)]
        fetch(**self.right())
        assert self.path.read_bytes() == BODY
        requests = hub.bodies("file.bin")
        assert [request.range_start for request in requests] == [20_000 * number for number in range(13)]
        assert sum(request.sent for request in requests) == len(BODY)

    def test_a_server_without_ranges_that_always_cuts_is_given_up(
        self, fetch: Callable[..., Fetched], hub: HubServer
    ) -> None:
        hub.misbehave["file.bin"] = [Answer(cut_after=20_000, ignore_range=True) for _ in range(50)]
        with pytest.raises(FetchError, match="could not be fetched"):
            fetch(**self.right())
        assert len(hub.bodies("file.bin")) < 15

    def test_refusals_that_pass(self, fetch: Callable[..., Fetched], hub: HubServer) -> None:
        hub.misbehave["file.bin"] = [
            Answer(status=503, headers={"Retry-After": "0"}),
            Answer(status=429, headers={"RateLimit": '"resolvers";r=0;t=0'}),
            Answer(status=502),
        ]
        fetch(**self.right())
        assert self.path.read_bytes() == BODY
        assert [why for why in self.waits if why] == ["503, waiting 0 s", "429, waiting 0 s", "502, waiting 0 s"]
        assert self.waits[-1] == ""

    def test_retry_after_is_waited_for(self, fetch: Callable[..., Fetched], hub: HubServer) -> None:
        hub.misbehave["file.bin"] = [Answer(status=503, headers={"Retry-After": "1"})]
        before = datetime.now(UTC)
        fetch(**self.right())
        assert (datetime.now(UTC) - before).total_seconds() >= 1.0

    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [
            ({"Retry-After": "7"}, 7.0),
            ({"Retry-After": "Mon, 01 Jan 2024 00:01:00 GMT"}, 60.0),
            ({"Retry-After": "Sun, 31 Dec 2023 00:00:00 GMT"}, 0.0),
            ({"RateLimit": '"api";r=0;t=55'}, 55.0),
            ({"Retry-After": "soon"}, None),
            ({}, None),
        ],
    )
    def test_how_long_a_server_asks_to_wait(self, headers: dict[str, str], seconds: float | None) -> None:
        assert retry_after(httpx.Headers(headers), datetime(2024, 1, 1, tzinfo=UTC)) == seconds

    def test_a_refusal_that_stays(self, fetch: Callable[..., Fetched], hub: HubServer) -> None:
        hub.misbehave["file.bin"] = [Answer(status=503, headers={"Retry-After": "0"}) for _ in range(100)]
        with pytest.raises(FetchError, match="503") as error:
            fetch(**self.right())
        assert error.value.status == 503 and len(hub.misbehave["file.bin"]) > 80

    def test_damage_on_the_way_is_fetched_again(self, fetch: Callable[..., Fetched], hub: HubServer) -> None:
        hub.misbehave["file.bin"] = [
            Answer(body=bytes([BODY[0] ^ 1]) + BODY[1:]),
            Answer(body=BODY[:-10]),
        ]
        fetch(**self.right())
        assert self.path.read_bytes() == BODY

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (BODY[:-1] + b"x", "its sha256 is not what the publisher states"),
            (BODY + b"x", "300001 bytes instead of 300000"),
            (b"<html>Sign in</html>", "20 bytes instead of 300000"),
        ],
    )
    def test_damage_that_stays_is_an_error_and_no_file(
        self, fetch: Callable[..., Fetched], hub: HubServer, body: bytes, message: str
    ) -> None:
        hub.misbehave["file.bin"] = [Answer(body=body) for _ in range(10)]
        with pytest.raises(FetchError, match=message):
            fetch(**self.right())
        assert not self.path.exists()

    @pytest.mark.parametrize("checksum", [True, False])
    def test_a_file_that_changed_since_the_part_starts_anew(
        self, fetch: Callable[..., Fetched], hub: HubServer, checksum: bool
    ) -> None:
        old = random.Random(1).randbytes(len(BODY))
        hub.misbehave["file.bin"] = [
            Answer(body=old, etag='"old"', cut_after=100_000),
            *[Answer(status=404) for _ in range(1)],
        ]
        known = self.right() if checksum else {"size": len(BODY)}
        with pytest.raises(FetchError):
            fetch(**known)
        assert self.path.with_name("file.bin.part").stat().st_size == 100_000
        fetch(**known)
        assert self.path.read_bytes() == BODY
        last = hub.bodies("file.bin")[-1]
        assert last.headers["if-range"] == '"old"' and last.status == 200

    def test_a_weak_etag_without_a_checksum_is_never_continued(
        self, fetch: Callable[..., Fetched], hub: HubServer
    ) -> None:
        hub.misbehave["file.bin"] = [Answer(etag='W/"1"', cut_after=100_000), Answer(status=404)]
        with pytest.raises(FetchError):
            fetch()
        fetch()
        assert self.path.read_bytes() == BODY and hub.bodies("file.bin")[-1].range_start == 0

    def test_a_part_with_rotten_bytes_is_noticed(self, fetch: Callable[..., Fetched], hub: HubServer) -> None:
        hub.misbehave["file.bin"] = [Answer(cut_after=100_000), Answer(status=404)]
        with pytest.raises(FetchError):
            fetch(**self.right())
        part = self.path.with_name("file.bin.part")
        part.write_bytes(b"rot" + part.read_bytes()[3:])
        fetch(**self.right())
        assert self.path.read_bytes() == BODY

    @pytest.mark.parametrize("ignore_range", [False, True])
    @pytest.mark.parametrize("known", [True, False])
    def test_the_beginning_of_a_file_and_then_more_of_it(
        self, fetch: Callable[..., Fetched], hub: HubServer, known: bool, ignore_range: bool
    ) -> None:
        hub.misbehave["file.bin"] = [Answer(cut_after=40_000, ignore_range=ignore_range)] if ignore_range else []
        right = self.right() if known else {}
        sizes = []
        for take in (100_000, 50_000, 170_000, 10 * len(BODY)):
            hub.requests.clear()
            done = fetch(**right, take=take)
            assert self.path.read_bytes() == BODY[:take] and done.bytes == min(take, len(BODY))
            assert done.sha256 == hashlib.sha256(BODY[:take]).hexdigest()
            sizes.append([request.sent for request in hub.bodies("file.bin")])
        assert sizes[1:] == [[50_000], [120_000], [130_000]]
        hub.requests.clear()
        assert fetch(**right).bytes == len(BODY) and not hub.requests

    def test_a_beginning_is_gone_on_with_only_if_it_is_of_the_same_file(
        self, fetch: Callable[..., Fetched], hub: HubServer
    ) -> None:
        old = random.Random(1).randbytes(len(BODY))
        hub.misbehave["file.bin"] = [Answer(body=old, etag='"old"')]
        fetch(take=100_000)
        assert self.path.read_bytes() == old[:100_000]
        fetch(take=200_000)
        assert self.path.read_bytes() == BODY[:200_000]

    def test_a_finished_file_is_not_asked_for_again(self, fetch: Callable[..., Fetched], hub: HubServer) -> None:
        first = fetch(**self.right())
        hub.requests.clear()
        assert fetch(**self.right()) == first
        assert hub.requests == []

    def test_a_finished_file_of_another_content_is_fetched_anew(
        self, fetch: Callable[..., Fetched], hub: HubServer
    ) -> None:
        old = random.Random(1).randbytes(len(BODY))
        hub.misbehave["file.bin"] = [Answer(body=old, etag='"old"')]
        fetch(size=len(BODY), etag='"old"')
        hub.requests.clear()
        fetch(size=len(BODY), etag='"old"')
        assert self.path.read_bytes() == old and not hub.requests
        done = fetch(size=len(BODY), etag='"new"')
        assert self.path.read_bytes() == BODY and done.etag == f'"{hashlib.sha256(BODY).hexdigest()}"'

    def test_an_address_that_is_not_there(self, fetch: Callable[..., Fetched], hub: HubServer) -> None:
        hub.repos["owner/file"].branches["main"] = {}
        with pytest.raises(FetchError, match="404") as error:
            fetch()
        assert error.value.status == 404


class TestRemoteStream:
    def test_reads_like_a_file(self, hub: HubServer) -> None:
        body = random.Random(2).randbytes(3_000_000)
        hub.repos["owner/file"] = Repo({"main": {"file.bin": body}}, large=lambda path: True)
        local = io.BytesIO(body)
        hub.misbehave["file.bin"] = [Answer(status=503, headers={"Retry-After": "0"}), Answer(cut_after=1000)]
        with httpx.Client(follow_redirects=True) as client:
            url = f"{hub.endpoint}/datasets/owner/file/resolve/main/file.bin"
            remote = io.BufferedReader(RemoteStream(client, url, len(body), first_wait=0.01))
            source = random.Random(3)
            for _ in range(40):
                if source.random() < 0.4:
                    offset = source.randrange(len(body) + 10)
                    assert remote.seek(offset) == local.seek(offset)
                size = source.choice([1, 100, 70_000, 900_000])
                assert remote.read(size) == local.read(size)
            assert remote.seek(-5, io.SEEK_END) == local.seek(-5, io.SEEK_END)
            assert remote.read() == local.read() == body[-5:]

    def test_a_file_that_changes_meanwhile(self, hub: HubServer) -> None:
        hub.repos["owner/file"] = Repo({"main": {"file.bin": BODY}}, large=lambda path: True)
        hub.misbehave["file.bin"] = [Answer(), Answer(etag='"other"')]
        with httpx.Client(follow_redirects=True) as client:
            url = f"{hub.endpoint}/datasets/owner/file/resolve/main/file.bin"
            remote = RemoteStream(client, url, len(BODY))
            remote.read(10)
            remote.seek(290_000)
            with pytest.raises(UserError, match="has changed.*--force"):
                remote.read(10)


class TestHub:
    def test_a_split_as_it_is_published(self, hub: HubServer) -> None:
        config = hub_config()
        manifest = download(config).manifest
        assert manifest.documents == 400
        assert manifest.licence == "cdla-sharing-1.0"
        assert manifest.revision == hub.repos[NAME].commit("main")
        files = hub.repos[NAME].branches["main"]
        for file in manifest.files:
            assert file.sha256 == hashlib.sha256(files[file.path]).hexdigest()
            assert file.bytes == len(files[file.path])
        found = documents(config)
        assert [document.text for document in found] == stories(250) + stories(150, 1)
        assert found[250].metadata == {"file": "data/train-00001-of-00002.parquet", "row": 0}
        folder = Path(config.data.raw_dir) / "tinystories"
        kept = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert kept == {"manifest.json", *(file.path for file in manifest.files)}

    def test_complete_data_needs_no_network(self, hub: HubServer) -> None:
        download(hub_config())
        hub.requests.clear()
        assert not download(hub_config()).fetched
        assert hub.requests == []

    @pytest.mark.parametrize("parts", [2, 3, 5])
    def test_parts_share_the_row_groups(self, hub: HubServer, parts: int) -> None:
        config = hub_config()
        download(config)
        shares = [documents(config, part=part, parts=parts) for part in range(parts)]
        ids = [document.id for share in shares for document in share]
        assert sorted(ids) == sorted(document.id for document in documents(config)) and len(set(ids)) == 400

    def test_the_other_split_and_the_text_column(self, hub: HubServer) -> None:
        config = hub_config(split="validation")
        download(config)
        assert [document.text for document in documents(config)] == stories(10, 2)

    def test_subsets_and_splits_that_the_card_declares(self, hub: HubServer) -> None:
        hub.repos["owner/sets"] = Repo(
            {
                "main": {
                    "german/part-0.jsonl.zst": zstandard.compress(b'{"text": "eins"}\n{"text": "zwei"}\n'),
                    "english/part-0.csv": b"text\none\ntwo\n",
                    "english/held-out.csv": b"text\nthree\n",
                }
            },
            card={
                "license": ["cc-by-4.0", "odc-by"],
                "configs": [
                    {"config_name": "german", "data_files": "german/*.jsonl.zst"},
                    {
                        "config_name": "english",
                        "data_files": [
                            {"split": "train", "path": ["english/part-*.csv"]},
                            {"split": "test", "path": "english/held-out.csv"},
                        ],
                    },
                ],
            },
        )
        german = hub_config("owner/sets", subset="german")
        assert download(german).manifest.licence == "cc-by-4.0, odc-by"
        assert [document.text for document in documents(german)] == ["eins", "zwei"]
        test = hub_config("owner/sets", subset="english", split="test")
        download(test)
        assert [document.text for document in documents(test)] == ["three"]
        with pytest.raises(UserError, match="several subsets; set the source's subset to one of: german, english"):
            download(hub_config("owner/sets"))
        with pytest.raises(UserError, match="no subset 'germn'. Did you mean 'german'"):
            download(hub_config("owner/sets", subset="germn"))
        with pytest.raises(UserError, match="no split 'dev'. Set the source's split to one of: train, test"):
            download(hub_config("owner/sets", subset="english", split="dev"))

    def test_the_hubs_parquet_copy_where_the_repository_has_none(self, hub: HubServer) -> None:
        hub.repos["owner/script"] = Repo(
            {
                "main": {"stories.py": b"# a loading script", "data.zip": b"PK"},
                "refs/convert/parquet": {"plain/train/0000.parquet": parquet(stories(20))},
            },
            card={"license": "mit"},
        )
        config = hub_config("owner/script")
        assert download(config).manifest.licence == "mit"
        assert [document.text for document in documents(config)] == stories(20)
        hub.repos["owner/script"].branches.pop("refs/convert/parquet")
        with pytest.raises(UserError, match="has no Parquet, JSON Lines or CSV files for split 'train'"):
            download(config, force=True)
        assert len(documents(config)) == 20

    def test_private_gated_and_missing(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        files = {"train.parquet": parquet(stories(5))}
        hub.repos["owner/private"] = Repo({"main": files}, needs_token="secret")
        hub.repos["owner/gated"] = Repo({"main": files}, needs_token="secret", gated=True)
        with pytest.raises(UserError, match="no data set owner/nothing.*or it is private.*HF_TOKEN"):
            download(hub_config("owner/nothing"))
        with pytest.raises(UserError, match="or it is private.*HF_TOKEN"):
            download(hub_config("owner/private"))
        with pytest.raises(UserError, match="gated, set HF_TOKEN.*accept its conditions"):
            download(hub_config("owner/gated"))
        with pytest.raises(UserError, match="no revision 'v9'"):
            download(hub_config(revision="v9"))
        with pytest.raises(UserError, match="write owner/name"):
            download(hub_config("a/b/c"))
        monkeypatch.setenv("HF_TOKEN", "secret")
        for name in ("owner/private", "owner/gated"):
            assert download(hub_config(name)).manifest.documents == 5
        storage = [request for request in hub.requests if request.path.startswith("/storage/")]
        assert storage and not any("authorization" in request.headers for request in storage)

    def test_no_server(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr("data.hub.repository.TRIES", 2)
        with pytest.raises(UserError, match="http://127.0.0.1:9 cannot be reached"):
            download(hub_config())

    def test_a_busy_hub_is_asked_again(self, hub: HubServer) -> None:
        hub.misbehave[f"revision:{NAME}"] = [Answer(status=503, headers={"Retry-After": "0"})]
        hub.misbehave[f"tree:{NAME}"] = [Answer(status=429, headers={"Retry-After": "0"})]
        assert download(hub_config()).manifest.documents == 400

    def test_a_wrong_text_column_is_found_before_anything_is_fetched(self, hub: HubServer) -> None:
        with pytest.raises(
            UserError, match=r"no text in a column 'story'.*id, text.*data\.sources\.tinystories\.text_column"
        ):
            download(hub_config(text_column="story"))
        assert not any(request.status == 200 for request in hub.bodies(".parquet"))

    def test_the_first_rows_need_not_have_text(self, hub: HubServer) -> None:
        lines = [b'{"id": 1}', b'{"id": 2, "text": null}', b'{"text": ""}', b"not json", b'{"id": 3, "text": "a mill"}']
        for repository, first in (("owner/late", lines), ("owner/number", lines[1:2] + lines[-1:])):
            hub.repos[repository] = Repo({"main": {"train.jsonl": b"\n".join(first)}})
            download(hub_config(repository))
            assert [document.text for document in documents(hub_config(repository))] == ["a mill"]

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    def test_a_column_without_text_is_refused(self, hub: HubServer, suffix: str) -> None:
        body = parquet(stories(20)) if suffix == "parquet" else b'{"id": 7, "text": "a mill"}\n' * 20
        hub.repos["owner/file"] = Repo({"main": {f"train.{suffix}": body}}, large=lambda path: True)
        with pytest.raises(
            UserError, match="has no text in a column 'id'. Its columns are: id, text. Set data.sources"
        ):
            download(hub_config("owner/file", text_column="id"))
        assert not any(request.status == 200 for request in hub.bodies(f".{suffix}"))
        download(hub_config("owner/file"))
        with pytest.raises(UserError, match="has no text in a column 'id'"):
            download(hub_config("owner/file", text_column="id"))

    def test_max_documents_takes_only_the_files_it_needs(self, hub: HubServer) -> None:
        config = hub_config(max_documents=120)
        manifest = download(config).manifest
        assert [file.documents for file in manifest.files] == [120]
        assert [document.text for document in documents(config)] == stories(250)[:120]
        more = hub_config(max_documents=260)
        assert [file.documents for file in download(more).manifest.files] == [250, 10]
        assert [document.text for document in documents(more)] == stories(250) + stories(10, 1)

    def test_streaming_gives_the_same_documents(self, hub: HubServer) -> None:
        whole = hub_config(max_documents=270)
        download(whole)
        expected = [(document.id, document.text, document.metadata) for document in documents(whole)]
        streamed = hub_config(max_documents=270, streaming=True)
        manifest = download(streamed).manifest
        assert manifest.documents == 270
        assert [(document.id, document.text, document.metadata) for document in documents(streamed)] == expected

    def test_streaming_reads_little_of_a_large_file(self, hub: HubServer) -> None:
        body = parquet(stories(4000, words=1000))
        hub.repos["owner/large"] = Repo({"main": {"train.parquet": body}})
        config = hub_config("owner/large", max_documents=50, streaming=True)
        assert download(config).manifest.documents == len(documents(config)) == 50
        assert sum(request.sent for request in hub.bodies("train.parquet")) < len(body) / 4

    def test_a_new_state_of_the_set_takes_only_the_files_that_changed(self, hub: HubServer) -> None:
        download(hub_config())
        files = hub.repos[NAME].branches["main"]
        files["data/train-00001-of-00002.parquet"] = parquet(stories(30, 7))
        folder = Path("corpus/raw/tinystories")
        damaged = folder / "data/train-00001-of-00002.parquet"
        damaged.write_bytes(damaged.read_bytes()[:-5])
        hub.requests.clear()
        assert download(hub_config()).manifest.documents == 280
        whole = [request.path for request in hub.bodies(".parquet") if request.status == 200]
        assert len(whole) == 1 and whole[0].endswith("data/train-00001-of-00002.parquet")
        assert [document.text for document in documents(hub_config())] == stories(250) + stories(30, 7)

    def test_force_fetches_all_of_it_again(self, hub: HubServer) -> None:
        download(hub_config())
        hub.requests.clear()
        assert download(hub_config(), force=True).fetched
        assert len([request for request in hub.bodies(".parquet") if request.status == 200]) == 2

    def test_an_interrupted_replacement_leaves_the_old_copy(self, hub: HubServer) -> None:
        config = hub_config()
        download(config)
        hub.repos[NAME].branches["main"]["data/train-00000-of-00002.parquet"] = parquet(stories(99, 9))
        hub.misbehave["data/train-00001-of-00002.parquet"] = [Answer(status=404)]
        with pytest.raises(UserError):
            download(config, force=True)
        assert len(documents(config)) == 400
        assert download(config, force=True).manifest.documents == 249
        assert downloaded_sources(Path(config.data.raw_dir))[0][1] is not None

    def test_a_line_now_and_then_where_there_is_no_terminal(
        self, hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(parallel, "SECONDS_BETWEEN_LINES", 0.0)
        download(hub_config())
        lines = capsys.readouterr().err.splitlines()
        assert lines and all(line.startswith("tinystories: ") for line in lines)
        assert lines[-1].endswith("2 of 2 files")

    def test_names_that_lead_out_of_the_folder_are_refused(self, hub: HubServer) -> None:
        hub.repos["owner/evil"] = Repo({"main": {"../../train.parquet": parquet(stories(2))}})
        with pytest.raises(UserError, match="leads out of"):
            download(hub_config("owner/evil"))


class TestCommand:
    def start(self, *words: str) -> subprocess.Popen[str]:
        line = [sys.executable, str(ROOT / "data" / "download_datasets.py"), "tinystories"]
        words = (f"data.sources.tinystories.repository={NAME}", *words)
        return subprocess.Popen([*line, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def interrupted(self, hub: HubServer, number: signal.Signals) -> tuple[str, bytes, Path, subprocess.Popen[str]]:
        """A download that was sent a signal in the middle of a file: the file, its content, its part, the process."""
        path = "data/train-00000-of-00002.parquet"
        body = hub.repos[NAME].branches["main"][path] = parquet(stories(3000, words=300))
        hub.misbehave[path] = [Answer(pause_after=1_000_000, whole=True)]
        process = self.start()
        assert hub.paused.wait(60)
        part = Path("corpus/raw/.tinystories.partial") / f"{path}.part"
        while not part.exists() or part.stat().st_size < 900_000:
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, number)
        hub.resume.set()
        return path, body, part, process

    def test_a_killed_download_goes_on_at_the_byte(self, hub: HubServer) -> None:
        path, body, part, first = self.interrupted(hub, signal.SIGKILL)
        first.communicate(timeout=900)
        assert not Path("corpus/raw/tinystories").exists()
        size = part.stat().st_size
        assert 900_000 <= size < len(body)
        hub.requests.clear()
        again = self.start()
        output, error = again.communicate(timeout=900)
        assert again.returncode == 0, error
        assert "3,150 documents" in output
        asked = [request for request in hub.bodies(path) if "if-range" in request.headers]
        assert [request.range_start for request in asked] == [size]
        assert asked[0].sent == len(body) - size
        assert not any(request.status == 200 for request in hub.bodies(path))
        assert Path("corpus/raw/tinystories", path).read_bytes() == body

    def test_ctrl_c_says_how_to_go_on(self, hub: HubServer) -> None:
        _, _, part, process = self.interrupted(hub, signal.SIGINT)
        _, error = process.communicate(timeout=900)
        assert process.returncode == 1 and "Traceback" not in error
        assert "Type the same command again to continue" in error
        assert part.stat().st_size > 900_000
