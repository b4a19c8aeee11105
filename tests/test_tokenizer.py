"""Tokenizers: every kind behaves the same to its callers, and every encoder gives the same ids."""

from __future__ import annotations

import codecs
import inspect
import json
import logging
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from config.errors import UserError
from config.load import load_config
from config.schema import TokenizerConfig
from data.tokenization import Tokenizer, load_tokenizer, train_tokenizer
from data.tokenization.encoders import CANDIDATES
from data.tokenization.probes import LANGUAGES, probe_texts
from data.tokenization.protocol import Kind
from data.tokenization.training import interleave, limit_bytes
from data.tokenization.words import LONGEST_WORD
from tests.commands import here

ROOT = Path(__file__).parents[1]
KINDS: tuple[Kind, ...] = get_args(TokenizerConfig.model_fields["kind"].annotation)
SPECIAL = ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
VOCAB_SIZE = 700
TRICKY = [
    "",
    " ",
    "a\0b\0\0",
    "  two  spaces \n\n\n\tend\r\n ",
    "▁ a▁▁b",
    "naïve e\u0301 한국어 عربي 👩\u200d👩\u200d👧 \U0010ffff \ufffd \ufeff",
    "<|endoftext|>x<|end|>",
    "<0x41> <unk> <s>",
    "1234567 it's IT'LL",
]


def tokenizer_config(**changes: object) -> TokenizerConfig:
    config = load_config().data.tokenizer
    return TokenizerConfig.model_validate(config.model_dump() | {"vocab_size": VOCAB_SIZE} | changes)


def corpus() -> list[str]:
    return [inspect.getsource(module) for module in (codecs, json.decoder, pickle)] + list(LANGUAGES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One saved tokenizer of each kind."""
    folders: dict[str, Path] = {kind: tmp_path_factory.mktemp(kind) / "tokenizer" for kind in KINDS}
    for kind, folder in folders.items():
        train_tokenizer(iter(corpus()), tokenizer_config(kind=kind)).save(folder)
    return folders


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(folders[request.param])


@pytest.fixture(scope="module")
def bpe(folders: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(folders["bpe"])


def lists(rows: Sequence[NDArray[np.uint32]]) -> list[list[int]]:
    return [row.tolist() for row in rows]


class TestProtocol:
    def test_special_tokens_take_the_first_ids_in_the_order_of_the_configuration(self, tokenizer: Tokenizer) -> None:
        assert dict(tokenizer.special_tokens) == {name: index for index, name in enumerate(SPECIAL)}
        assert (tokenizer.end_of_text_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 1, VOCAB_SIZE)

    @given(text=st.text())
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
    def test_any_text_comes_back_as_it_was(self, tokenizer: Tokenizer, text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(len(SPECIAL) <= index < tokenizer.vocab_size for index in ids)
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())

    @pytest.mark.parametrize("text", [*TRICKY, "\n".join(probe_texts()[:60])])
    def test_tricky_text_comes_back_as_it_was(self, tokenizer: Tokenizer, text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_a_batch_has_the_ids_of_its_texts_one_by_one(self, tokenizer: Tokenizer) -> None:
        texts = [*TRICKY, *corpus()]
        rows = tokenizer.encode_batch(texts)
        assert {row.dtype for row in rows} == {np.dtype(np.uint32)}
        assert lists(rows) == [tokenizer.encode(text) for text in texts]
        assert tokenizer.encode_batch([]) == []

    def test_compresses(self, tokenizer: Tokenizer) -> None:
        text = corpus()[0]
        assert len(tokenizer.encode(text)) < 0.7 * len(text)

    def test_a_special_token_written_in_text_stays_text_unless_allowed(self, tokenizer: Tokenizer) -> None:
        text = "".join(f"a{name} {name}{name}\n" for name in SPECIAL)
        for ids in (tokenizer.encode(text), tokenizer.encode_batch([text])[0].tolist()):
            assert min(ids) >= len(SPECIAL) and tokenizer.decode(ids) == text
        allowed = tokenizer.encode(text, allow_special=True)
        assert [index for index in allowed if index < len(SPECIAL)] == [i for i in range(len(SPECIAL)) for _ in "123"]
        assert tokenizer.decode(allowed) == text
        assert tokenizer.decode(allowed, skip_special_tokens=True) == "a \n" * len(SPECIAL)

    def test_the_longest_special_token_wins(self) -> None:
        names = ["<|endoftext|>", "<|end", "<|end|>", "|>"]
        tokenizer = train_tokenizer(iter(corpus()), tokenizer_config(special_tokens=names))
        assert tokenizer.encode("<|end|><|end<|endoftext|>|>", allow_special=True) == [2, 1, 0, 3]
        assert tokenizer.pad_id == tokenizer.end_of_text_id

    def test_special_tokens_stand_for_no_text(self, tokenizer: Tokenizer) -> None:
        sizes = tokenizer.token_bytes()
        assert sizes.dtype == np.int32 and sizes.shape == (tokenizer.vocab_size,)
        assert not sizes[: len(SPECIAL)].any()

    def test_tokens_stream_as_bytes(self, tokenizer: Tokenizer) -> None:
        text = "日本 👍🏽 é"
        decoder = codecs.getincrementaldecoder("utf-8")()
        ids = tokenizer.encode(text)
        assert "".join(decoder.decode(tokenizer.decode_bytes([index])) for index in ids) == text
        assert "\ufffd" in tokenizer.decode(tokenizer.encode("\U000fabcd")[:1])

    @pytest.mark.parametrize("index", [-1, VOCAB_SIZE])
    def test_an_id_outside_the_vocabulary_is_refused(self, tokenizer: Tokenizer, index: int) -> None:
        with pytest.raises(ValueError, match=f"no token {index}"):
            tokenizer.decode([5, index])

    def test_decodes_arrays(self, tokenizer: Tokenizer) -> None:
        row = tokenizer.encode_batch(["some text"])[0]
        assert tokenizer.decode(row.astype(np.uint16)) == "some text"

    def test_a_lone_surrogate_is_refused(self, tokenizer: Tokenizer) -> None:
        for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["fine", text])):
            with pytest.raises(UserError, match=r"lone surrogate \(U\+D800 at character 2\)"):
                encode("ab\ud800c")


class TestTraining:
    def test_the_same_texts_give_the_same_files(self, folders: dict[str, Path], tmp_path: Path) -> None:
        code = (
            "import sys; from pathlib import Path; from tests.test_tokenizer import *\n"
            "for kind in KINDS:\n"
            "    train_tokenizer(iter(corpus()), tokenizer_config(kind=kind)).save(Path(sys.argv[1]) / kind)"
        )
        environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3"}
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT, env=environment)
        for kind in KINDS:
            for path in folders[kind].iterdir():
                assert (tmp_path / kind / path.name).read_bytes() == path.read_bytes(), path

    @pytest.mark.parametrize("kind", KINDS)
    def test_other_texts_have_another_fingerprint(self, kind: str, folders: dict[str, Path]) -> None:
        other = train_tokenizer(iter(corpus()[:3]), tokenizer_config(kind=kind))
        assert other.fingerprint != load_tokenizer(folders[kind]).fingerprint

    def test_patterns(self, bpe: Tokenizer) -> None:
        texts = ["20260101 abc.def"] * 50
        split: dict[str, list[str]] = {}
        for pattern in ("gpt2", "llama3"):
            tokenizer = train_tokenizer(iter(texts), tokenizer_config(pattern=pattern))
            split[pattern] = [tokenizer.decode([index]) for index in tokenizer.encode(texts[0])]
        assert split["gpt2"] == ["20260101", " abc", ".", "def"]
        assert split["llama3"] == ["202", "601", "01", " abc", ".def"]

    def test_bpe_takes_the_real_size_where_the_text_is_too_short(self) -> None:
        tokenizer = train_tokenizer(iter(["low lower lowest low"]), tokenizer_config())
        assert 262 < tokenizer.vocab_size < 280
        assert tokenizer.decode(tokenizer.encode("lowest é")) == "lowest é"

    @pytest.mark.parametrize("kind", KINDS[1:])
    def test_sentencepiece_names_the_largest_vocabulary(self, kind: str) -> None:
        config = tokenizer_config(kind=kind, vocab_size=30_000)
        with pytest.raises(UserError, match=r"vocab_size is 30000, .* Set data.tokenizer.vocab_size=(\d+) or") as error:
            train_tokenizer(iter(corpus()[:2]), config)
        largest = int(str(error.value).split("vocab_size=")[1].split()[0])
        tokenizer = train_tokenizer(iter(corpus()[:2]), config.model_copy(update={"vocab_size": largest}))
        assert tokenizer.vocab_size == largest

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_vocabulary_without_room_for_all_bytes_is_refused(self, kind: str) -> None:
        with pytest.raises(UserError, match="data.tokenizer.vocab_size is 261"):
            train_tokenizer(iter(corpus()), tokenizer_config(kind=kind, vocab_size=261))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("texts", [[], ["", ""]])
    def test_no_text_is_refused(self, kind: str, texts: list[str]) -> None:
        with pytest.raises(UserError, match="no text to train"):
            train_tokenizer(iter(texts), tokenizer_config(kind=kind))

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_the_texts_raise_arrives_as_it_is(self, kind: str) -> None:
        def texts() -> Iterator[str]:
            yield from corpus()
            raise UserError("the file vanished")

        with pytest.raises(UserError, match="the file vanished"):
            train_tokenizer(texts(), tokenizer_config(kind=kind))

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["<|pad|>"], "must hold <|endoftext|>"),
            (["<|endoftext|>", "<|x|>", "<|x|>"], "'<|x|>' twice"),
            (["<|endoftext|>", "a b"], "'a b' must be"),
            (["<|endoftext|>", "é!"], "'é!' must be"),
            (["<|endoftext|>", ""], "'' must be"),
        ],
    )
    def test_impossible_special_tokens_are_refused(self, names: list[str], message: str) -> None:
        with pytest.raises(UserError) as error:
            train_tokenizer(iter(corpus()), tokenizer_config(special_tokens=names))
        assert message in str(error.value)

    @pytest.mark.parametrize("kind", KINDS)
    def test_text_past_the_limit_is_not_read(self, kind: str, folders: dict[str, Path]) -> None:
        size = sum(len(text.encode()) for text in corpus())
        read = []

        def texts() -> Iterator[str]:
            for text in [*corpus(), "never " * 1000, "reached"]:
                read.append(text)
                yield text

        tokenizer = train_tokenizer(texts(), tokenizer_config(kind=kind, max_training_bytes=size))
        assert tokenizer.fingerprint == load_tokenizer(folders[kind]).fingerprint
        assert read == corpus()

    def test_bpe_learns_from_the_beginning_of_an_endless_word(self) -> None:
        """Whole, such words would take the library minutes each, and hours from a few megabytes."""
        long = ["ab" * 200_000, "=" * 400_000, " \n" * 200_000, "日" * 200_000]
        cut = [text[:LONGEST_WORD] for text in long]
        first, second = (train_tokenizer(iter([*corpus(), *texts]), tokenizer_config()) for texts in (long, cut))
        assert first.fingerprint == second.fingerprint
        assert first.decode(first.encode(long[3])) == long[3]

    def test_a_text_is_cut_at_the_limit_between_characters(self) -> None:
        assert list(limit_bytes(["abc", "dééf", "g"], 6)) == ["abc", "dé"]
        assert list(limit_bytes(["abc", "dééf", "g"], 7)) == ["abc", "dé"]
        assert list(limit_bytes(["abc", "dééf", "g"], 10)) == ["abc", "dééf", "g"]

    def test_sources_have_equal_shares_until_they_are_empty(self) -> None:
        sources = [iter(["a" * 10] * 100), iter(["b"] * 1000), iter(["é" * 5] * 3)]
        texts = list(interleave(sources))
        assert len(texts) == 1103
        taken = "".join(texts)[:900]
        assert abs(taken.count("a") - taken.count("b")) <= 10 and taken.count("é") == 15


class TestEncoders:
    @pytest.mark.parametrize(
        ("kind", "expected"),
        [("bpe", "fastokens"), ("sentencepiece-bpe", "gigatoken"), ("sentencepiece-unigram", "sentencepiece")],
    )
    def test_auto_takes_a_fast_encoder(self, kind: str, expected: str, folders: dict[str, Path]) -> None:
        assert load_tokenizer(folders[kind], "auto").encoder == expected

    @pytest.mark.parametrize("pattern", ["gpt2", "llama3"])
    def test_the_fast_encoder_gives_the_reference_ids(self, pattern: str, tmp_path: Path) -> None:
        train_tokenizer(iter(corpus()), tokenizer_config(pattern=pattern)).save(tmp_path / "t")
        fast, reference = (load_tokenizer(tmp_path / "t", name) for name in ("fastokens", "tokenizers"))

        generator = random.Random(pattern)
        words = [*"\n".join(LANGUAGES).split(), *TRICKY, *SPECIAL, *" \t\n.,'0123"]
        fuzzed = ["".join(generator.choices(words, k=generator.randint(0, 9))) for _ in range(4000)]
        assert len(LANGUAGES) > 20

        @given(texts=st.lists(st.text(), max_size=5))
        @example(texts=["".join(SPECIAL), "ab" * 100_000])
        @example(texts=[*probe_texts(), *fuzzed])
        @settings(max_examples=300, deadline=None)
        def check(texts: list[str]) -> None:
            assert lists(fast.encode_batch(texts)) == lists(reference.encode_batch(texts))

        check()

    def test_a_named_encoder_with_other_ids_is_refused(self) -> None:
        """gigatoken 0.10.0 takes letters of Unicode 17 for letters, tokenizers 0.23.3 does not know them."""
        texts = ["It's the cat's and the dog's."] * 10
        tokenizer = train_tokenizer(iter(texts), tokenizer_config(encoder="gigatoken"))
        with pytest.raises(UserError, match="gigatoken gives other ids than tokenizers for .* Set .*encoder=auto"):
            tokenizer.encode_batch(["text"])

    @pytest.mark.parametrize(
        ("kind", "encoder"),
        [("bpe", "sentencepiece"), ("sentencepiece-bpe", "fastokens"), ("sentencepiece-unigram", "tokenizers")],
    )
    def test_an_encoder_for_another_kind_is_refused(self, kind: str, encoder: str, folders: dict[str, Path]) -> None:
        with pytest.raises(UserError, match=f"{encoder} cannot encode kind {kind}. Choose from: auto, "):
            load_tokenizer(folders[kind], encoder).encode_batch(["text"])

    def test_that_is_said_before_the_training(self) -> None:
        with pytest.raises(UserError, match="fastokens cannot encode kind sentencepiece-unigram"):
            train_tokenizer(iter([]), tokenizer_config(kind="sentencepiece-unigram", encoder="fastokens"))

    @pytest.mark.parametrize("fault", ["other ids", "raises"])
    def test_auto_falls_back_with_one_line_of_warning(
        self,
        fault: str,
        folders: dict[str, Path],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def make(backend: Any) -> Callable[[Sequence[str]], list[NDArray[np.uint32]]]:
            def encode_batch(texts: Sequence[str]) -> list[NDArray[np.uint32]]:
                if fault == "raises":
                    raise RuntimeError("no such instruction")
                rows: list[NDArray[np.uint32]] = backend.encode_batch(texts)
                return [*rows[:-1], rows[-1][::-1]]

            return encode_batch

        monkeypatch.setitem(CANDIDATES, "bpe", {"fastokens": make})
        tokenizer = load_tokenizer(folders["bpe"])
        with caplog.at_level(logging.WARNING):
            assert lists(tokenizer.encode_batch(TRICKY)) == [tokenizer.encode(text) for text in TRICKY]
        assert tokenizer.encoder == "tokenizers"
        assert len(caplog.messages) == 1
        assert "\n" not in caplog.text.strip() and "tokenizers: fastokens" in caplog.messages[0]
        with pytest.raises(UserError, match="fastokens"):
            load_tokenizer(folders["bpe"], "fastokens").encode_batch(["text"])


def encode_in_worker(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return lists(tokenizer.encode_batch(texts))


class TestProcesses:
    @pytest.mark.parametrize(
        ("kind", "encoder", "method"),
        [
            ("bpe", "fastokens", "fork"),
            ("bpe", "fastokens", "spawn"),
            ("bpe", "tokenizers", "fork"),
            ("sentencepiece-bpe", "gigatoken", "fork"),
            ("sentencepiece-bpe", "gigatoken", "spawn"),
            ("sentencepiece-bpe", "sentencepiece", "fork"),
        ],
    )
    def test_works_in_other_processes_after_use_in_this_one(
        self, kind: str, encoder: str, method: str, folders: dict[str, Path]
    ) -> None:
        tokenizer = load_tokenizer(folders[kind], encoder)
        texts = corpus() * 3
        expected = lists(tokenizer.encode_batch(texts))
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.apply_async(encode_in_worker, (tokenizer, texts)).get(timeout=900) == expected

    def test_a_saved_tokenizer_is_pickled_as_its_folder(self, tokenizer: Tokenizer) -> None:
        pickled = pickle.dumps(tokenizer)
        assert len(pickled) < 1000
        assert pickle.loads(pickled).encode("some text") == tokenizer.encode("some text")

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_that_was_never_saved_is_pickled_whole(self, kind: str, folders: dict[str, Path]) -> None:
        tokenizer = train_tokenizer(iter(corpus()), tokenizer_config(kind=kind))
        again = pickle.loads(pickle.dumps(tokenizer))
        assert again.fingerprint == load_tokenizer(folders[kind]).fingerprint
        assert again.encode("some text<|end|>", allow_special=True)[-1] == 5

    def test_unpickling_notices_that_the_folder_holds_another_tokenizer(self, tmp_path: Path) -> None:
        tokenizer = train_tokenizer(iter(corpus()), tokenizer_config())
        tokenizer.save(tmp_path / "t")
        pickled = pickle.dumps(tokenizer)
        train_tokenizer(iter(corpus()[:1]), tokenizer_config()).save(tmp_path / "t")
        with pytest.raises(UserError, match="changed"):
            pickle.loads(pickled)


class TestFolder:
    def test_holds_the_files_that_other_tools_expect(self, folders: dict[str, Path]) -> None:
        common = {"config.yaml", "manifest.json", "tokenizer_config.json"}
        assert {path.name for path in folders["bpe"].iterdir()} == common | {"tokenizer.json"}
        for kind in KINDS[1:]:
            assert {path.name for path in folders[kind].iterdir()} == common | {"tokenizer.model"}

    def test_its_settings_load_back(self, folders: dict[str, Path]) -> None:
        for kind in KINDS:
            assert load_config([folders[kind] / "config.yaml"]).data.tokenizer == tokenizer_config(kind=kind)

    def test_transformers_reads_it(self, bpe: Tokenizer, folders: dict[str, Path]) -> None:
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(folders["bpe"])
        assert len(theirs) == bpe.vocab_size
        assert (theirs.eos_token_id, theirs.pad_token_id) == (bpe.end_of_text_id, bpe.pad_id)
        assert set(theirs.all_special_ids) == set(bpe.special_tokens.values())
        for text in [*TRICKY, *LANGUAGES]:
            ids = bpe.encode(text, allow_special=True)
            assert theirs.encode(text, add_special_tokens=False) == ids
            assert theirs.decode(ids) == text

    def test_sentencepiece_reads_it(self, folders: dict[str, Path]) -> None:
        import sentencepiece

        model = str(folders["sentencepiece-unigram"] / "tokenizer.model")
        theirs = sentencepiece.SentencePieceProcessor(model_file=model)
        ours = load_tokenizer(folders["sentencepiece-unigram"])
        assert [theirs.encode(text) for text in LANGUAGES] == [ours.encode(text) for text in LANGUAGES]

    def test_a_missing_tokenizer_says_what_to_run(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no tokenizer in .* Run python data/tokenizer.py"):
            load_tokenizer(tmp_path / "none")

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("fault", ["missing", "cut", "other"])
    def test_a_damaged_model_says_what_to_run(
        self, kind: str, fault: str, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        load_tokenizer(folders[kind]).save(tmp_path / "t")
        model = tmp_path / "t" / ("tokenizer.json" if kind == "bpe" else "tokenizer.model")
        if fault == "missing":
            model.unlink()
        elif fault == "cut":
            model.write_bytes(model.read_bytes()[:5000])
        else:
            train_tokenizer(iter(corpus()[:2]), tokenizer_config(kind=kind)).save(tmp_path / "other")
            model.write_bytes((tmp_path / "other" / model.name).read_bytes())
        with pytest.raises(UserError, match="Run python data/tokenizer.py"):
            load_tokenizer(tmp_path / "t")

    @pytest.mark.parametrize("name", ["manifest.json", "tokenizer_config.json", "config.yaml"])
    @pytest.mark.parametrize("content", ["[]", "{", ""])
    def test_a_damaged_description_says_what_to_run(
        self, name: str, content: str, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        load_tokenizer(folders["bpe"]).save(tmp_path / "t")
        (tmp_path / "t" / name).write_text(content)
        with pytest.raises(UserError, match=f"{name}.* Run python data/tokenizer.py"):
            load_tokenizer(tmp_path / "t")

    def test_saving_replaces_a_tokenizer_of_another_kind_whole(self, folders: dict[str, Path], tmp_path: Path) -> None:
        for kind in KINDS:
            load_tokenizer(folders[kind]).save(tmp_path / "t")
        assert not (tmp_path / "t" / "tokenizer.json").exists()
        assert load_tokenizer(tmp_path / "t").fingerprint == load_tokenizer(folders[KINDS[-1]]).fingerprint
        assert [path.name for path in tmp_path.iterdir()] == ["t"]

    def test_saving_refuses_to_delete_other_files(self, bpe: Tokenizer, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("years of work")
        with pytest.raises(UserError, match="holds other files"):
            bpe.save(tmp_path)
        assert (tmp_path / "thesis.txt").read_text() == "years of work"

    def test_a_save_that_fails_leaves_what_was_there(
        self, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        load_tokenizer(folders["bpe"]).save(tmp_path / "t")
        other = load_tokenizer(folders["sentencepiece-bpe"])
        real, calls = os.fsync, iter(range(100))

        def full_disk(descriptor: int) -> None:
            if next(calls) == 2:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(UserError, match="No space left"):
            other.save(tmp_path / "t")
        assert load_tokenizer(tmp_path / "t").fingerprint == load_tokenizer(folders["bpe"]).fingerprint
        assert [path.name for path in tmp_path.iterdir()] == ["t"]

    def test_a_save_cut_between_its_renames_is_mended(self, folders: dict[str, Path], tmp_path: Path) -> None:
        load_tokenizer(folders["bpe"]).save(tmp_path / "t")
        (tmp_path / "t").rename(tmp_path / "t.old")
        assert load_tokenizer(tmp_path / "t").fingerprint == load_tokenizer(folders["bpe"]).fingerprint


COMMAND = "data/tokenizer.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "notes").mkdir()
    for number in range(300):
        (folder / "notes" / f"{number:03}.txt").write_text(corpus()[number % 3][number * 10 : number * 10 + 500])
    settings = ["data.use=[my-files]", "data.sources.my-files.paths=[notes/*.txt]"]
    (folder / "recipe.yaml").write_text(
        "data: {use: [my-files], sources: {my-files: {paths: ['notes/*.txt']}}, tokenizer: {vocab_size: 500}}"
    )
    here(folder, "data/download_datasets.py", *settings)
    return folder


class TestCommand:
    def test_asks_for_the_download_first(self, tmp_path: Path) -> None:
        done = here(tmp_path, COMMAND, status=1)
        assert "python data/download_datasets.py" in done.stderr and done.stderr.count("\n") == 1
        assert not list(tmp_path.iterdir())

    def test_trains_reports_and_says_what_is_next(self, folder: Path) -> None:
        line = [sys.executable, str(ROOT / COMMAND), "--config", "recipe.yaml"]
        first = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=900)
        assert (first.returncode, first.stderr) == (0, "")
        lines = first.stdout.splitlines()
        assert lines[-1] == "Next: python data/preprocess.py --config recipe.yaml"
        assert lines[-2] == "Wrote corpus/tokenizer"
        assert any(line.startswith("vocabulary   500 tokens") for line in lines)
        assert any("bytes per token, on" in line and "kept back" in line for line in lines)
        assert sum("│" in line for line in lines) == 4
        tokenizer = load_tokenizer(folder / "corpus" / "tokenizer")
        assert tokenizer.vocab_size == 500

        again = here(folder, COMMAND, "--config", "recipe.yaml")
        assert "It is the same as the tokenizer that was there" in again.stdout
        other = here(folder, COMMAND, "--config", "recipe.yaml", "data.tokenizer.max_training_bytes=20000")
        assert "documents, 20.0 kB, in" in other.stdout
        assert "made with that one no longer match" in other.stdout
        assert load_tokenizer(folder / "corpus" / "tokenizer").fingerprint != tokenizer.fingerprint

    def test_a_folder_with_other_files_is_refused_before_the_training(self, folder: Path) -> None:
        done = here(folder, COMMAND, "--config", "recipe.yaml", "data.tokenizer_dir=.", status=1)
        assert done.stdout == ""
        assert "holds other files (corpus). Choose another data.tokenizer_dir." in done.stderr

    def test_a_mistake_leaves_the_tokenizer_that_was_there(self, folder: Path, folders: dict[str, Path]) -> None:
        arguments = ["--config", "recipe.yaml", "data.tokenizer.kind=sentencepiece-unigram"]
        load_tokenizer(folders["bpe"]).save(folder / "corpus" / "tokenizer")
        before = load_tokenizer(folder / "corpus" / "tokenizer").fingerprint
        done = here(folder, COMMAND, *arguments, "data.tokenizer.vocab_size=90000", status=1)
        assert done.stdout == ""
        assert done.stderr.startswith("error: data.tokenizer.vocab_size is 90000, but this text yields at most ")
        assert load_tokenizer(folder / "corpus" / "tokenizer").fingerprint == before
