"""Special tokens that somebody wrote stay text: through the real commands, with every backend and every encoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from config.load import load_config
from data.tokenization import load_tokenizer
from data.tokens import Split, TokenFiles
from tests.commands import here
from tests.test_preprocess import SETTINGS, sentences, write_corpus

SPECIAL = tuple(load_config().data.tokenizer.special_tokens)
SPLITS: tuple[Split, Split] = ("train", "val")
BACKENDS = [
    ("bpe", "tokenizers"),
    ("bpe", "fastokens"),
    ("bpe", "gigatoken"),
    ("sentencepiece-bpe", "sentencepiece"),
    ("sentencepiece-unigram", "sentencepiece"),
]


def texts() -> list[str]:
    """Documents that are, begin with, end with and hold each special token, beside words, themselves and each other."""
    whole = "".join(SPECIAL)
    chat = "<|system|>Be kind.<|end|>\n<|user|>Hello<|end|>\n<|assistant|>Hi.<|end|>"
    return [
        *[f"{name} a text that has it on either side {name}" for name in SPECIAL],
        *[f"before{name}after and {name}{name} and {name[:-1]} and {name.upper()}" for name in SPECIAL],
        *[name * 5 for name in SPECIAL],
        whole * 3,
        f"{whole}\n{' '.join(SPECIAL)}",
        chat,
    ]


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts among others, as a source."""
    folder = tmp_path_factory.mktemp("special")
    write_corpus(folder, texts() + sentences(60))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "encoder"), BACKENDS)
def test_written_special_tokens_stay_text(downloaded: Path, tmp_path: Path, kind: str, encoder: str) -> None:
    shutil.copytree(downloaded / "corpus", tmp_path / "corpus")
    settings = [
        *SETTINGS,
        f"data.tokenizer.kind={kind}",
        f"data.tokenizer.encoder={encoder}",
        "data.tokenizer.vocab_size=340",
    ]
    for name in ("data/tokenizer.py", "data/preprocess.py"):
        here(tmp_path, name, *settings, "data.preprocess.validation_fraction=0.2")
    tokenizer = load_tokenizer(tmp_path / "corpus/tokenizer")
    assert set(tokenizer.special_tokens) == set(SPECIAL)
    special = np.array(sorted(tokenizer.special_tokens.values()))
    found = []
    for split in SPLITS:
        files = TokenFiles(tmp_path / "corpus/tokens", split)
        tokens = files.read(0, len(files))
        ends = np.flatnonzero(np.isin(tokens, special)) + 1
        assert ends.tolist() == files.document_ends.tolist()
        assert set(tokens[ends - 1].tolist()) == {tokenizer.end_of_text_id}
        found += [tokenizer.decode(part[:-1].tolist()) for part in np.split(tokens, ends)[:-1]]
    assert set(texts()) <= set(found)
    assert json.loads((tmp_path / "corpus/tokens/manifest.json").read_text())["funnel"]["notes"]["dropped"] == {}
