"""Published files: streamed or fetched with the same result, up to a limit, in part, from every kind of address."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import random
import shlex
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import zstandard
from fsspec.implementations.memory import MemoryFileSystem
from typer.main import get_command

from config.command import run
from config.errors import UserError
from config.files import location
from config.load import load_config
from config.schema import Config
from data.documents import BadRecord, Document, read_documents
from data.download import Downloaded, download_source
from data.download_datasets import download_datasets
from data.examples.preferences import PreferenceExample
from data.examples.reading import ChatExample, read_examples
from data.pipeline.run import preprocess
from data.sources import Job
from data.tokenization.build import build
from data.transport.remote import LONGEST_READ, RemoteStream
from scripts.finetune import finetune
from tests.archives import articles, dump_files, multistream
from tests.hub_server import Answer, HubServer, Repo
from tests.workspace import small_tokenizer

ROOT = Path(__file__).parents[1]
NAMES = ["ArXiv", "Github", "Wikipedia (en)"]
SETTINGS = [
    "data.tokenizer.vocab_size=300",
    "data.tokenizer.encoder=tokenizers",
    "data.preprocess.workers=1",
    "data.preprocess.tasks=3",
]


def records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    source = random.Random(seed)
    words = ["river", "stone", "über", "quern", "grain", "мука", "mill", "wheel"]
    return [
        {
            "text": f"{seed}-{number} " + " ".join(source.choices(words, k=40)) + f" {source.random()}",
            "meta": {"pile_set_name": NAMES[number % 3]},
        }
        for number in range(count)
    ]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=100)
    return file.getvalue()


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def csv_file(rows: list[dict[str, Any]]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, ["text", "set"])
    writer.writeheader()
    writer.writerows({"text": row["text"] + '\n"x"', "set": row["meta"]["pile_set_name"]} for row in rows)
    return file.getvalue().encode()


FORMATS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "parquet": parquet,
    "jsonl": jsonl,
    "jsonl.zst": lambda rows: zstandard.compress(jsonl(rows)),
    "json.gz": lambda rows: gzip.compress(jsonl(rows)),
    "csv": csv_file,
    "txt.gz": lambda rows: gzip.compress("\n\n".join(row["text"] for row in rows).encode()),
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server of files, and a hub, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def publish(server: HubServer, **files: bytes) -> list[str]:
    """Addresses of files that the server now has; a double underscore stands for the dot in their names."""
    for name, body in files.items():
        server.static["/" + name.replace("__", ".")] = body
    return [f"{server.endpoint}/{name.replace('__', '.')}" for name in files]


class Bucket(MemoryFileSystem):  # type: ignore[misc]
    """A storage that stands for Google's."""

    protocol = ("gs", "gcs")
    store: dict[str, Any] = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("gs://", "memory://")))


def config_of(*overrides: str, **sources: dict[str, Any]) -> Config:
    named = [f"data.sources.{name}={json.dumps(source)}" for name, source in sources.items()]
    return load_config([], [*named, f"data.use=[{','.join(sources)}]", *SETTINGS, *overrides])


def urls(addresses: list[str], **options: Any) -> dict[str, Any]:
    return {"kind": "urls", "urls": addresses, **options}


def download(config: Config, name: str = "web", max_bytes: int | None = None, **options: Any) -> Downloaded:
    return download_source(name, config.data, job=Job(max_bytes=max_bytes), **options)


def read(config: Config, name: str = "web", **options: Any) -> list[Document | BadRecord]:
    return list(read_documents(Path(config.data.raw_dir) / name, config.data.sources[name], name, **options))


def documents(config: Config, name: str = "web", **options: Any) -> list[Document]:
    return [record for record in read(config, name, **options) if isinstance(record, Document)]


def on_disk(config: Config, name: str = "web") -> set[str]:
    folder = Path(config.data.raw_dir) / name
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


class TestStreaming:
    def sources(self, server: HubServer, tmp_path: Path) -> dict[str, dict[str, Any]]:
        """One source of each kind that can be streamed."""
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.csv").write_bytes(csv_file(records(60, 1)))
        (tmp_path / "in" / "b.md").write_text("# Notes\n\n" + records(1, 2)[0]["text"])
        server.repos["owner/set"] = Repo(
            {"main": {f"data/train-{part}.parquet": parquet(records(250, 3 + part)) for part in range(2)}}
        )
        addresses = publish(
            server, one__jsonl__zst=FORMATS["jsonl.zst"](records(120, 5)), two__json__gz=FORMATS["json.gz"](records(9))
        )
        return {
            "hub": {"kind": "hub", "repository": "owner/set", "max_documents": 270},
            "web": urls(addresses, keep_column="meta.pile_set_name", keep=["ArXiv", "Github"]),
            "mine": {"kind": "files", "paths": [str(tmp_path / "in")]},
        }

    def tokens(self, config: Config) -> dict[str, bytes]:
        build(config, lambda done, total: None).tokenizer.save(Path(config.data.tokenizer_dir))
        manifest, _ = preprocess(config.data, force=False, show=lambda stage, done, total: None)
        folder = Path(config.data.tokens_dir)
        assert {name: funnel.bad for name, funnel in manifest.funnel.items()} == {
            "hub": {},
            "web": {"left-out": 43},
            "mine": {},
        }
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".index")}

    @pytest.mark.slow
    def test_the_same_token_files_and_nothing_on_disk(self, server: HubServer, tmp_path: Path) -> None:
        sources = self.sources(server, tmp_path)
        fetched = config_of("data.corpus_dir=fetched", **sources)
        for name in sources:
            assert not download(fetched, name).manifest.streamed
        expected = self.tokens(fetched)
        streamed = config_of("data.corpus_dir=streamed", "data.streaming=true", "data.preprocess.workers=2", **sources)
        assert self.tokens(streamed) == expected and len(expected) == 4
        for name in sources:
            assert on_disk(streamed, name) == {"manifest.json"}
            assert [document.id for document in documents(streamed, name)] == [
                document.id for document in documents(fetched, name)
            ]

    @pytest.mark.slow
    def test_the_commands_killed_while_streaming_end_with_the_same_bytes(self, server: HubServer) -> None:
        files = {f"data/train-{part}.parquet": parquet(records(2000, part)) for part in range(4)}
        server.repos["owner/set"] = Repo({"main": files})
        source = {"kind": "hub", "repository": "owner/set", "max_bytes": "250KB"}
        fetched = config_of("data.corpus_dir=fetched", web=source)
        download(fetched)
        build(fetched, lambda done, total: None).tokenizer.save(Path(fetched.data.tokenizer_dir))
        preprocess(fetched.data, force=False, show=lambda stage, done, total: None)

        def start(command: str) -> subprocess.Popen[str]:
            words = [f"data.sources.web={json.dumps(source)}", "data.use=[web]", *SETTINGS]
            line = [sys.executable, str(ROOT / "data" / command), *words, "data.streaming=true"]
            return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

        assert start("tokenizer.py").wait(120) == 0
        before = len(server.requests)
        first = start("preprocess.py")
        while len(server.requests) < before + 3:
            assert first.poll() is None
            time.sleep(0.01)
        first.kill()
        first.wait()
        again = start("preprocess.py")
        _, error = again.communicate(timeout=900)
        assert again.returncode == 0, error
        for name in ("train.bin", "train.index", "val.bin", "val.index"):
            assert Path("corpus/tokens", name).read_bytes() == Path("fetched/tokens", name).read_bytes()
        assert [path.name for path in Path("corpus/raw/web").iterdir()] == ["manifest.json"]

    @pytest.mark.parametrize("parts", [2, 5])
    def test_parts_together_are_the_whole(self, server: HubServer, tmp_path: Path, parts: int) -> None:
        config = config_of("data.streaming=true", **self.sources(server, tmp_path))
        for name in config.data.use:
            download(config, name)
            shares = [documents(config, name, part=part, parts=parts) for part in range(parts)]
            ids = [document.id for share in shares for document in share]
            assert sorted(ids) == sorted(document.id for document in documents(config, name))

    def test_one_source_may_say_otherwise(self, server: HubServer) -> None:
        addresses = publish(server, a__jsonl=jsonl(records(5)))
        config = config_of("data.streaming=true", web=urls(addresses, streaming=False))
        assert not download(config).manifest.streamed and "a.jsonl" in on_disk(config)
        config = config_of(web=urls(addresses, streaming=True))
        assert download(config).manifest.streamed is False, "what was fetched before stays in use"
        assert download(config, force=True).manifest.streamed and on_disk(config) == {"manifest.json"}

    def test_a_name_that_no_list_can_hold(self, server: HubServer, tmp_path: Path) -> None:
        Path(os.fsdecode(b"K\xe4se.jsonl")).write_bytes(jsonl(records(3)))
        with pytest.raises(UserError, match="rename K.*se.jsonl to stream it; its name is not UTF-8"):
            download(config_of("data.streaming=true", web={"kind": "files", "paths": [str(tmp_path)]}))

    def test_a_list_never_replaces_what_was_fetched(self, server: HubServer) -> None:
        addresses = publish(server, a__jsonl=jsonl(records(5)), b__jsonl=jsonl(records(5, 1)))
        download(config_of(web=urls(addresses)))
        other = config_of("data.streaming=true", web=urls(addresses[1:]))
        with pytest.raises(UserError, match="which streaming would replace by a mere list"):
            preprocess(other.data, force=False, show=lambda stage, done, total: None)
        assert len(documents(config_of(web=urls(addresses)))) == 10

    def test_a_list_alone_cannot_be_read_without_streaming(self, server: HubServer) -> None:
        addresses = publish(server, a__jsonl=jsonl(records(5)))
        download(config_of("data.streaming=true", web=urls(addresses)))
        with pytest.raises(UserError, match="says only where source 'web' is.*download_datasets.py web to fetch it"):
            preprocess(config_of(web=urls(addresses)).data, force=False, show=lambda stage, done, total: None)
        assert download(config_of(web=urls(addresses))).fetched

    def test_failures_that_pass(self, server: HubServer) -> None:
        body = jsonl(records(2000))
        config = config_of("data.streaming=true", web=urls(publish(server, a__jsonl=body)))
        download(config)
        server.misbehave["/a.jsonl"] = [
            Answer(status=503, headers={"Retry-After": "0"}),
            Answer(status=429, headers={"Retry-After": "0"}),
        ]
        assert [document.text for document in documents(config)] == [row["text"] for row in records(2000)]
        assert not server.misbehave["/a.jsonl"]

    def test_a_file_that_changed_since_it_was_listed(self, server: HubServer) -> None:
        config = config_of("data.streaming=true", web=urls(publish(server, a__jsonl=jsonl(records(20)))))
        download(config)
        publish(server, a__jsonl=jsonl(records(20, 1)))
        with pytest.raises(UserError, match="a.jsonl has changed. Type: .* NAME data.streaming=true --force"):
            documents(config)
        download(config, force=True)
        assert documents(config)[0].text == records(20, 1)[0]["text"]

    def test_a_server_that_cannot_send_parts(self, server: HubServer) -> None:
        config = config_of("data.streaming=true", web=urls(publish(server, a__jsonl=jsonl(records(20)))))
        server.misbehave["/a.jsonl"] = [Answer(ignore_range=True) for _ in range(9)]
        with pytest.raises(UserError, match="cannot send parts of a file, so it cannot be streamed"):
            download(config)

    def test_memory_is_bounded_and_the_next_range_is_on_its_way(self, server: HubServer) -> None:
        body = random.Random(0).randbytes(1 << 20) * 90
        (address,) = publish(server, large__bin=body)
        with httpx.Client() as client:
            remote = io.BufferedReader(RemoteStream(client, address), 1 << 16)
            tracemalloc.start()
            try:
                digest, seen = hashlib.sha1(), 0
                while block := remote.read(1 << 16):
                    digest.update(block)
                    seen += len(block)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert digest.digest() == hashlib.sha1(body).digest()
            assert peak < 4 * LONGEST_READ, "two ranges, and what the server itself holds"
            remote.seek(0)
            server.requests.clear()
            for _ in range(11):
                remote.read(1 << 16)
            deadline = time.monotonic() + 20
            while server.requests[-1].range_start < 11 << 16 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert server.requests[-1].range_start == 12 << 16, "after ranges of 256 and 512 KiB"
            remote.close()


class TestConnections:
    """What one server gets at a time from this machine, however many processes read."""

    def test_all_workers_together_keep_to_the_limit(self, server: HubServer) -> None:
        addresses = publish(server, **{f"file{number}__jsonl": jsonl(records(40, number)) for number in range(8)})
        limits = ["data.connections_per_host=2", "data.preprocess.workers=4", "data.preprocess.tasks=4"]
        config = config_of("data.streaming=true", *limits, web=urls(addresses))
        small_tokenizer().save(Path(config.data.tokenizer_dir))
        download(config)
        server.delay, server.busiest = 0.3, 0
        manifest, _ = preprocess(config.data, force=False, show=lambda stage, done, total: None)
        assert 0 < server.busiest <= 2 and manifest.funnel["web"].read.documents == 320

    def test_a_publisher_may_ask_for_fewer(self, server: HubServer) -> None:
        server.static.update(dump_files("dewiki", {"20240301": "done"}, multistream(articles(60))[0]))
        wiki = {"kind": "wikipedia", "format": "dump", "language": "de", "base_url": server.endpoint}
        config = config_of("data.streaming=true", web=wiki)
        download(config)
        server.delay, server.busiest = 0.1, 0
        with ThreadPoolExecutor(4) as readers:
            shares = readers.map(lambda part: documents(config, part=part, parts=4), range(4))
        assert sum(map(len, shares)) == 60 and server.busiest == 2

    def test_a_connection_of_a_process_that_was_killed_is_free(self, server: HubServer) -> None:
        (address,) = publish(server, a__jsonl=jsonl(records(5)))
        code = f"with connection({address!r}, 1):\n    print('held', flush=True)\n    time.sleep(60)"
        line = [sys.executable, "-c", f"import time\nfrom data.transport.slots import connection\n{code}"]
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            reader = threading.Thread(
                target=download, args=[config_of("data.connections_per_host=1", web=urls([address]))]
            )
            reader.start()
            reader.join(0.5)
            assert reader.is_alive() and not server.requests
            holder.kill()
            reader.join(30)
        assert Path("corpus/raw/web/a.jsonl").read_bytes() == jsonl(records(5))


class TestPackedOnTheWay:
    """Servers that name a packing that nobody asked for: what is read is the file itself."""

    BODY = b"".join(jsonl(records(40, number)) for number in range(3))
    ONCE = gzip.compress(BODY)

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
    def test_the_files_own_packing_named_once_more(self, server: HubServer, name: str, streaming: bool) -> None:
        server.static[f"/{name}"] = self.ONCE if name.endswith("gz") else zstandard.compress(self.BODY)
        server.packings[f"/{name}"] = "x-gzip" if name.endswith("gz") else "zstd"
        source = urls([f"{server.endpoint}/{name}"], streaming=streaming)
        server.misbehave[f"/{name}"] = [] if streaming else [Answer(), Answer(), Answer(), Answer(cut_after=5000)]
        config = config_of(web=source)
        download(config)
        assert len(documents(config)) == 120
        if not streaming:
            assert Path("corpus/raw/web", name).read_bytes() == server.static[f"/{name}"]
            assert [request.range_start for request in server.bodies(name)][-2:] == [0, 5000], "parts are of the file"

    @pytest.mark.parametrize(
        ("name", "own", "sent"),
        [("a.jsonl.gz", ONCE, gzip.compress(ONCE)), ("a.jsonl", BODY, ONCE), ("a.jsonl", BODY, BODY)],
    )
    def test_a_packing_on_top_is_taken_off(self, server: HubServer, name: str, own: bytes, sent: bytes) -> None:
        server.static[f"/{name}"], server.packings[f"/{name}"] = sent, "gzip"
        address = f"{server.endpoint}/{name}#sha256={hashlib.sha256(own).hexdigest()}"
        config = config_of(web=urls([address]))
        server.misbehave[f"/{name}"] = [Answer(), Answer(), Answer(), Answer(cut_after=5000)]
        assert not download(config).manifest.streamed
        assert Path("corpus/raw/web", name).read_bytes() == own and len(documents(config)) == 120
        assert download(config, max_bytes=5000, force=True).manifest.taken == 5000
        assert Path("corpus/raw/web", name).read_bytes() == own[:5000]
        if own != sent:
            with pytest.raises(UserError, match="sent packed .gzip., so it cannot be streamed, only fetched"):
                download(config_of(web=urls([address], streaming=True)), force=True)

    def test_a_packing_that_nobody_knows(self, server: HubServer) -> None:
        addresses = publish(server, a__jsonl=self.BODY)
        server.packings["/a.jsonl"] = "br"
        with pytest.raises(UserError, match="sent packed as br, which cannot be unpacked"):
            download(config_of(web=urls(addresses)))


class TestKeep:
    @pytest.mark.parametrize("suffix", ["parquet", "jsonl", "jsonl.zst", "csv"])
    def test_rows_of_some_components(self, server: HubServer, suffix: str) -> None:
        rows = records(2500)
        server.static[f"/a.{suffix}"] = FORMATS[suffix](rows)
        column = "set" if suffix == "csv" else "meta.pile_set_name"
        config = config_of(web=urls([f"{server.endpoint}/a.{suffix}"], keep_column=column, keep=NAMES[1:]))
        download(config)
        found = read(config)
        texts = [record.text.split("\n")[0] for record in found if isinstance(record, Document)]
        assert texts == [row["text"] for row in rows if row["meta"]["pile_set_name"] != "ArXiv"]
        left_out = [record for record in found if isinstance(record, BadRecord)]
        assert {record.reason for record in left_out} == {"left-out"}
        assert sum(record.count for record in left_out) == 834
        shares = [read(config, part=part, parts=4) for part in range(4)]
        again = [record for share in shares for record in share if isinstance(record, BadRecord)]
        assert sorted(record.location for record in again) == sorted(record.location for record in left_out)
        everything = config_of(web=urls([f"{server.endpoint}/a.{suffix}"]))
        assert not download(everything).fetched and len(documents(everything)) == 2500

    def test_components_that_are_not_there(self, server: HubServer) -> None:
        source = urls(publish(server, a__jsonl=jsonl(records(20))), keep_column="meta.pile_set_name", keep=["Arxiv"])
        config = config_of(web=source)
        download(config)
        small_tokenizer().save(Path(config.data.tokenizer_dir))
        with pytest.raises(UserError, match="data.sources.web.keep leaves out all of its 20 rows"):
            preprocess(config.data, force=False, show=lambda stage, done, total: None)

    def test_a_text_column_that_is_not_there_is_told_by_the_tokenizer_too(self, server: HubServer) -> None:
        addresses = publish(server, a__jsonl=jsonl(records(20)))
        download(config_of(web=urls(addresses)))
        with pytest.raises(
            UserError, match="'web' has no text in a column 'body'. Its columns are: text, meta. Set data"
        ):
            build(config_of(web=urls(addresses, text_column="body")), lambda done, total: None)

    def test_keep_without_a_column(self) -> None:
        with pytest.raises(UserError, match="data.sources.web.keep: needs keep_column"):
            config_of(web=urls([], keep=["ArXiv"]))


class TestLimits:
    @pytest.mark.parametrize("suffix", FORMATS)
    def test_whole_files_and_the_beginning_of_the_next_one(self, server: HubServer, suffix: str) -> None:
        count = 1500 if "." in suffix else 400  # what is packed is cut between blocks of 128 KiB of text
        bodies = [FORMATS[suffix](records(count, seed)) for seed in range(3)]
        for number, body in enumerate(bodies):
            server.static[f"/{number}.{suffix}"] = body
        source = urls([f"{server.endpoint}/{number}.{suffix}" for number in range(3)], max_document_bytes=400)
        whole = config_of("data.corpus_dir=whole", web=source)
        download(whole)
        everything = [(document.id, document.text) for document in documents(whole)]
        config = config_of(web=source)
        counts = []
        for share in (0.6, 1.5):
            limit = int(share * len(bodies[0]))
            manifest = download(config, max_bytes=limit).manifest
            found = [(document.id, document.text) for document in documents(config)]
            counts.append(len(found))
            assert found == everything[: len(found)] and manifest.limit == limit and manifest.taken == limit
            assert manifest.bytes <= 1.3 * limit if suffix == "parquet" else manifest.bytes <= limit
            assert not download(config, max_bytes=limit).fetched
            streamed = config_of("data.corpus_dir=streamed", "data.streaming=true", web=source)
            assert download(streamed, max_bytes=limit).manifest.limit == limit
            assert [(document.id, document.text) for document in documents(streamed)] == found
            assert not [record for record in read(config) if isinstance(record, BadRecord)]
        assert 0 < counts[0] < counts[1] < len(everything)
        assert abs(counts[1] / len(everything) - 1.5 / 3) < 0.1
        assert download(config, max_bytes=sum(map(len, bodies))).manifest.limit is None
        assert [(document.id, document.text) for document in documents(config)] == everything

    def test_a_larger_limit_goes_on_at_the_byte_and_a_smaller_one_needs_nothing(self, server: HubServer) -> None:
        bodies = [jsonl(records(400, seed)) for seed in range(2)]
        config = config_of(web=urls(publish(server, a__jsonl=bodies[0], b__jsonl=bodies[1])))
        limit = len(bodies[0]) + 10_000
        download(config, max_bytes=limit)
        server.requests.clear()
        download(config, max_bytes=limit + 5_000)
        bulk = [request for request in server.requests if request.sent > 1]
        assert [(request.path, request.range_start, request.sent) for request in bulk[1:]] == [
            ("/b.jsonl", 10_000, 5_000)
        ]
        assert bulk[0].path == "/a.jsonl" and bulk[0].headers["range"].startswith("bytes=0-"), "the look at a row"
        server.requests.clear()
        assert download(config, max_bytes=limit).manifest.limit == limit
        assert [request.path for request in server.requests if request.sent > 1] == ["/a.jsonl"]
        server.requests.clear()
        assert download(config).manifest.limit is None
        assert [request.range_start for request in server.requests if request.path == "/b.jsonl"][-1] == 10_000
        assert len(documents(config)) == 800

    def test_a_part_of_a_file_that_changed_is_not_gone_on_with(self, server: HubServer) -> None:
        config = config_of(web=urls(publish(server, a__jsonl=jsonl(records(400)))))
        download(config, max_bytes=20_000)
        publish(server, a__jsonl=jsonl(records(400, 1)))
        download(config)
        assert [document.text for document in documents(config)] == [row["text"] for row in records(400, 1)]

    def test_a_limit_without_room_for_one_row(self, server: HubServer) -> None:
        config = config_of(web=urls(publish(server, a__jsonl=jsonl(records(4)))))
        with pytest.raises(UserError, match="not one row fits into the limit of 10 bytes"):
            download(config, max_bytes=10)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_rows_that_end_before_the_bytes_do(self, server: HubServer, streaming: bool) -> None:
        bodies = [jsonl(records(100, seed)) for seed in range(3)]
        addresses = publish(server, a__jsonl=bodies[0], b__jsonl=bodies[1], c__jsonl=bodies[2])
        config = config_of(web=urls(addresses, max_documents=120, streaming=streaming))
        manifest = download(config, max_bytes=len(bodies[0] + bodies[1]) + 1000).manifest
        assert [file.documents for file in manifest.files] == [100, 20]
        assert manifest.limit is None and manifest.taken == len(bodies[0] + bodies[1])
        assert not download(config).fetched, "a larger limit adds nothing"

    def test_of_ones_own_files(self, server: HubServer, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(jsonl(records(100)))
        (tmp_path / "b.jsonl").write_bytes(jsonl(records(100, 1)))
        source = {"kind": "files", "paths": [str(tmp_path / "*.jsonl")], "max_bytes": "30KB", "max_documents": 90}
        config = config_of(web=source)
        manifest = download(config).manifest
        assert manifest.limit is None and manifest.taken == 30_000, "the rows ended it, not the bytes"
        expected = [row["text"] for row in records(100)]
        found = [document.text for document in documents(config)]
        assert found == expected[: len(found)] and 50 < len(found) <= 90
        config = config_of(web={**source, "max_bytes": "1MB"})
        assert download(config).manifest.documents == 90
        assert [document.text for document in documents(config)] == expected[:90]

    @pytest.mark.parametrize("size", ["5XB", "0", "-1", "many"])
    def test_sizes_that_are_none(self, size: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            run(download_datasets, ["sample", f"--max-bytes={size}"])
        assert "--max-bytes: " in capsys.readouterr().err

    def test_shares_of_a_total(self, server: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
        small, large = jsonl(records(10)), jsonl(records(1000, 1))
        one, two = publish(server, small__jsonl=small, large__jsonl=large)
        words = [f"data.sources.{name}={json.dumps(urls([url]))}" for name, url in (("small", one), ("large", two))]
        run_command = ["small", "large", *words, "--max-bytes"]
        with pytest.raises(SystemExit) as stopped:
            run(download_datasets, [*run_command, "0.1MB"])
        assert stopped.value.code == 0
        output = capsys.readouterr().out
        assert "small: 10 documents" in output and "large: the limit of" in output
        assert Path("corpus/raw/large/large.jsonl").stat().st_size == 100_000 - len(small)
        with pytest.raises(SystemExit):
            run(download_datasets, ["sample", "large", *words, "--max-bytes", "0.1MB"])
        assert "--max-bytes is used up by sample; nothing is left for 'large'" in capsys.readouterr().err


class TestAddresses:
    def test_checksums_in_addresses(self, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("data.fetch.DAMAGED_TRIES", 1)
        body = jsonl(records(9))
        (address,) = publish(server, a__jsonl=body)
        for algorithm in ("sha1", "sha256", "md5"):
            digest = hashlib.new(algorithm, body).hexdigest()
            config = config_of(web=urls([f"{address}#{algorithm}={digest}"]))
            assert download(config, force=True).manifest.files[0].checksum == (algorithm, digest)
        with pytest.raises(UserError, match="its sha1 is not what the publisher states"):
            download(config_of(web=urls([f"{address}#sha1={'0' * 40}"])))

    def test_files_of_one_name(self, server: HubServer) -> None:
        server.static["/x/a.jsonl"], server.static["/y/a.jsonl"] = jsonl(records(3)), jsonl(records(4, 1))
        config = config_of(web=urls([f"{server.endpoint}/{folder}/a.jsonl?key=1" for folder in "xy"]))
        assert [file.path for file in download(config).manifest.files] == ["00000/a.jsonl", "00001/a.jsonl"]
        assert len({document.id for document in documents(config)}) == 7

    @pytest.mark.parametrize(
        ("address", "message"),
        [
            ("ftp://host/a.jsonl", "is no http.s. address. For other kinds of addresses take kind: files"),
            ("http://127.0.0.1:9/page.html", "is of no format that can be read"),
        ],
    )
    def test_addresses_that_lead_nowhere(self, server: HubServer, address: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            download(config_of(web=urls([address])))

    def test_at_most_so_many_requests_to_a_host(self, server: HubServer) -> None:
        addresses = publish(server, **{f"file{number}__jsonl": jsonl(records(50, number)) for number in range(6)})
        for number in range(6):
            # the look at each size, and for the first one the look at its first row, come before
            looks = [Answer()] * (2 if number == 0 else 1)
            server.misbehave[f"/file{number}.jsonl"] = [*looks, Answer(pause_after=100)]
        config = config_of("data.connections_per_host=2", web=urls(addresses))

        def resume_later() -> None:
            assert server.paused.wait(60)
            time.sleep(0.5)
            self.at_once = sum(request.sent == 100 for request in server.requests)
            server.resume.set()

        thread = threading.Thread(target=resume_later)
        thread.start()
        download(config)
        thread.join()
        assert self.at_once == 2 and len(documents(config)) == 300

    def test_any_file_system_that_fsspec_knows(self, server: HubServer) -> None:
        memory = fsspec.filesystem("memory")
        memory.pipe({"/bucket/a/one.jsonl": jsonl(records(30)), "/bucket/two.csv": csv_file(records(20, 1))})
        memory.pipe({"/bucket/.hidden.csv": b"text\n", "/bucket/picture.png": b"PNG"})
        try:
            config = config_of(web={"kind": "files", "paths": ["memory://bucket"]})
            download(config)
            assert [document.metadata["file"] for document in documents(config)][::30] == ["a/one.jsonl", "two.csv"]
            streamed = config_of(
                "data.corpus_dir=streamed", "data.streaming=true", web={"kind": "files", "paths": ["memory://bucket"]}
            )
            download(streamed)
            assert [(document.id, document.text) for document in documents(streamed)] == [
                (document.id, document.text) for document in documents(config)
            ]
            with pytest.raises(UserError, match="matches no file that can be read"):
                download(config_of(web={"kind": "files", "paths": ["memory://bucket/*.png"]}))
        finally:
            memory.rm("/bucket", recursive=True)

    def test_a_bucket_of_google(self, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(vars(sys.modules["fsspec.registry"])["_registry"], "gs", Bucket)
        body = gzip.compress(jsonl(records(500)))
        Bucket().pipe({"/mill/texts/a.jsonl.gz": body, "/mill/texts/more/b.parquet": parquet(records(30, 1))})
        try:
            source = {"kind": "files", "paths": ["gs://mill/texts"]}
            config = config_of(web=source)
            assert download(config).manifest.documents == 530
            streamed = config_of("data.corpus_dir=streamed", "data.streaming=true", web=source)
            assert [file.url for file in download(streamed).manifest.files][0] == "gs:///mill/texts/a.jsonl.gz"
            assert [document.text for document in documents(streamed)] == [doc.text for doc in documents(config)]
            with pytest.raises(UserError, match="gs://mill/nothing.jsonl matches no file. Check the address"):
                download(config_of(web={"kind": "files", "paths": ["gs://mill/nothing.jsonl"]}))
        finally:
            Bucket().rm("/mill", recursive=True)

    def test_the_hub_as_a_file_system(self, server: HubServer) -> None:
        files = {f"data/part-{part}.parquet": parquet(records(30, part)) for part in range(2)}
        server.repos["owner/set"] = Repo({"main": {**files, "data/notes.txt": b"left alone"}})
        source = {"kind": "files", "paths": ["hf://datasets/owner/set/data/*.parquet"]}
        config = config_of(web=source)
        assert download(config).manifest.documents == 60
        streamed = config_of("data.corpus_dir=streamed", "data.streaming=true", web=source)
        download(streamed)
        assert [document.id for document in documents(streamed)] == [document.id for document in documents(config)]

    @pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
    def test_the_package_that_is_missing_is_named(
        self, server: HubServer, monkeypatch: pytest.MonkeyPatch, scheme: str, package: str
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        told = rf"{scheme}:// addresses need the package {package}. Type: pip install -e '\.\[{scheme}\]'"
        with pytest.raises(UserError, match=told):
            download(config_of(web={"kind": "files", "paths": [f"{scheme}://bucket/*.jsonl"]}))
        with pytest.raises(UserError, match=told):
            location(f"{scheme}://bucket/corpus")

    def test_a_kind_of_address_that_nobody_knows(self, server: HubServer) -> None:
        with pytest.raises(UserError, match="gopher:// is no kind of address"):
            download(config_of(web={"kind": "files", "paths": ["gopher://host/a.jsonl"]}))

    def test_what_can_be_fetched(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            run(download_datasets, ["--list", "--available"])
        output = capsys.readouterr().out
        assert stopped.value.code == 0
        for name, source in load_config().data.sources.items():
            assert name in output
            assert not hasattr(source, "repository") or source.repository in output
            assert source.kind in ("files", "urls") or source.about.licence and source.about.size


class TestExamples:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_downloaded_set_of_conversations(
        self, server: HubServer, streaming: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        turns = [
            [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"}]
            for number in range(120)
        ]
        turns[7][1]["content"] = ""
        rows = [{"messages": messages, "source": "x"} for messages in turns]
        server.repos["owner/talk"] = Repo({"main": {"data/all/train-0.parquet": parquet(rows)}})
        settings = {"kind": "hub", "repository": "owner/talk", "text_column": "messages", "max_documents": 110}
        config = config_of(web={**settings, "streaming": streaming})
        download(config)
        folder = Path(config.data.raw_dir) / "web"
        examples = read_examples(folder, 0.05)
        assert len(examples) == 109
        assert isinstance(examples[0], ChatExample) and list(examples[0].messages) == turns[0]
        assert "1 of 110 rows" in capsys.readouterr().err
        with pytest.raises(UserError, match="1 of 110 rows of corpus/raw/web cannot be used"):
            read_examples(folder)

    def test_a_downloaded_set_of_preferences_in_messages(self, server: HubServer) -> None:
        asked = {"role": "user", "content": "why?"}
        rows = [
            {side: [asked, {"role": "assistant", "content": f"{side} {number}"}] for side in ("chosen", "rejected")}
            for number in range(20)
        ]
        server.repos["owner/pairs"] = Repo({"main": {"data/train-0.parquet": parquet(rows)}})
        config = config_of(web={"kind": "hub", "repository": "owner/pairs", "text_column": "chosen"})
        download(config)
        examples = read_examples(Path(config.data.raw_dir) / "web")
        assert len(examples) == 20 and all(isinstance(example, PreferenceExample) for example in examples)

    def test_what_to_type_next_depends_on_what_it_is(
        self, server: HubServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]
        talk, text = publish(server, talk__jsonl=jsonl([{"messages": turns}] * 20), text__jsonl=jsonl(records(20)))
        named = [f"data.sources.talk={json.dumps(urls([talk], text_column='messages'))}"]
        named += [f"data.sources.text={json.dumps(urls([text]))}", "data.corpus_dir=my corpus"]

        def lines(*words: str) -> list[list[str]]:
            with pytest.raises(SystemExit) as stopped:
                run(download_datasets, [*words, *named])
            assert stopped.value.code == 0
            said = [line.partition(": python ") for line in capsys.readouterr().out.splitlines()]
            return [[when, *shlex.split(command)] for when, between, command in said if between]

        teach = ["scripts/finetune.py", *named, "--dataset", "my corpus/raw/talk"]
        assert lines("talk") == [["Next", *teach]]
        settings = finetune_settings(teach[1:])
        assert settings["dataset"] == Path("my corpus/raw/talk") and settings["overrides"] == named
        assert load_config([], settings["overrides"]).data.sources["talk"].kind == "urls"
        assert len(read_examples(settings["dataset"])) == 20
        assert lines("text", "talk") == [
            ["Next", "data/tokenizer.py", *named, "data.use=[text]"],
            ["Once there is a model to teach", *teach],
        ]
        assert lines("data.use=[talk, text]")[0] == ["Next", "data/tokenizer.py", *named, "data.use=[text]"]


def finetune_settings(arguments: list[str]) -> dict[str, Any]:
    """What scripts/finetune.py understands of its arguments."""
    app = typer.Typer()
    app.command()(finetune)
    return dict(get_command(app).make_context("finetune", arguments).params)
