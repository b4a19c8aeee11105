"""Preprocessing from and to an object store, through a server that speaks the protocol of S3."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from config.errors import UserError
from config.files import UNFINISHED, is_remote, local, location, replace_directory, write_text
from data.pipeline.preparation import present
from data.tokens import MANIFEST, load_tokens_manifest
from tests.commands import here
from tests.test_preprocess import ROOT, SETTINGS, checksums, run, sentences, write_corpus


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    """An S3 server on loopback, with the bucket `shared`; who looks for one in the environment finds it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import s3fs
        from moto.server import ThreadedMotoServer

        running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3fs.S3FileSystem(use_listings_cache=False).mkdir("shared")
        yield
        s3fs.S3FileSystem.clear_instance_cache()
        running.stop()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, a tokenizer, and token files made on the local disk."""
    folder = tmp_path_factory.mktemp("local")
    texts = sentences(150)
    write_corpus(folder, [*texts, *texts[:5], "short"], bad_lines=["no json"])
    here(folder, "data/tokenizer.py", *SETTINGS)
    run(folder, *MORE)
    return folder


@pytest.fixture
def corpus(request: pytest.FixtureRequest, server: None, finished: Path) -> Any:
    """An address with the same source and tokenizer, and nothing else."""
    there: Any = location(f"s3://shared/{request.node.name}/corpus")
    for name in ("raw", "tokenizer"):
        there.fs.put(str(finished / "corpus" / name), f"{there.path}/{name}", recursive=True)
    return there


MORE = (
    "data.preprocess.near_deduplication={enabled: true, num_buckets: 2}",
    "data.preprocess.line_deduplication.unit=lines",
)


def there_checksums(corpus: Any) -> dict[str, str]:
    """SHA-256 of every file of the token folder."""
    files = {path.name: path.read_bytes() for path in (corpus / "tokens").iterdir()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}


@pytest.mark.slow
def test_the_same_bytes_though_it_was_killed(corpus: Any, finished: Path, tmp_path: Path) -> None:
    settings = (*MORE, f"data.corpus_dir={corpus}", "data.preprocess.workers=2")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "data/preprocess.py"), *SETTINGS, *settings],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    partial = corpus / ".tokens.partial"
    while not any("completions" in found for found in corpus.fs.find(partial.path)):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.kill()
    process.communicate()
    output = run(tmp_path, *settings)
    assert there_checksums(corpus) == checksums(finished)
    assert f"Wrote {corpus}/tokens" in output
    assert not partial.exists()
    assert not list(tmp_path.iterdir()), "nothing of it lies on the local disk"
    assert "up to date" in run(tmp_path, *settings)


@pytest.mark.slow
class TestPublishing:
    def test_what_was_copied_in_part_is_not_taken_for_whole(self, corpus: Any, finished: Path) -> None:
        tokens = corpus / "tokens"
        expected = load_tokens_manifest(finished / "corpus/tokens")
        new = corpus / "new"
        corpus.fs.put(str(finished / "corpus/tokens"), new.path, recursive=True)
        write_text(tokens / "left-over", "x")
        write_text(tokens / UNFINISHED, "")
        assert present(tokens, expected.fingerprint) is None
        replace_directory(new, tokens)
        assert there_checksums(corpus) == checksums(finished)
        assert present(tokens, expected.fingerprint) == expected
        assert not new.exists()

    def test_files_of_another_size_and_other_things(self, corpus: Any, finished: Path) -> None:
        tokens = corpus / "tokens"
        corpus.fs.put(str(finished / "corpus/tokens"), tokens.path, recursive=True)
        fingerprint = load_tokens_manifest(tokens).fingerprint
        write_text(tokens / "train.bin", "cut")
        assert present(tokens, fingerprint) is None
        (tokens / MANIFEST).unlink()
        with pytest.raises(UserError, match="something other than token files"):
            present(tokens, fingerprint)

    def test_a_file_that_was_not_finished_is_not_there(self, corpus: Any) -> None:
        from config.files import atomic_write

        with pytest.raises(RuntimeError), atomic_write(corpus / "half") as file:
            file.write(b"half")
            raise RuntimeError
        assert not (corpus / "half").exists()


class TestAddresses:
    def test_a_local_one_is_a_path(self) -> None:
        assert location("corpus/raw") == Path("corpus/raw") and not is_remote(location("corpus"))

    def test_what_needs_a_real_folder_says_how_to_get_one(self, tmp_path: Path) -> None:
        for script, setting in (
            ("data/download_datasets.py", "data.raw_dir"),
            ("data/tokenizer.py", "data.tokenizer_dir"),
            ("scripts/train.py", "data.tokens_dir"),
        ):
            if script == "scripts/train.py":
                with pytest.raises(UserError, match="aws s3 sync"):
                    local("s3://shared/corpus/tokens", setting)
                continue
            done = here(tmp_path, script, f"{setting}=s3://shared/corpus", status=1)
            assert f"{setting} is s3://shared/corpus" in done.stderr and "aws s3 sync" in done.stderr

    def test_an_unknown_protocol(self) -> None:
        with pytest.raises(UserError, match="s4:// is no kind of address that can be used"):
            location("s4://bucket/corpus")
