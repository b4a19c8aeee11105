"""The mixture of sources: shares of tokens, epochs, order of repetitions, and what cannot be had."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.deduplication import MixtureConfig
from config.errors import UserError
from config.load import load_config
from data.pipeline.mixture import asked_epochs
from tests.test_deduplication import checksums, make_corpus, prose, run, texts_of

MIXTURE = "data.preprocess.mixture"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources of 300, 100 and 60 documents of 10 to 60 words; each document names its source."""
    sizes = {"books": 300, "news": 100, "wiki": 60}
    texts = {
        name: [f"{name} {prose(1000 * len(name) + number, 10 + number % 50)}" for number in range(size)]
        for name, size in sizes.items()
    }
    return make_corpus(tmp_path_factory.mktemp("mixture"), texts)


def shares(folder: Path) -> dict[str, float]:
    """The share of each source in the tokens of `train`, counted in the files themselves."""
    from data.tokens import TokenFiles

    files = TokenFiles(folder / "corpus/tokens", "train")
    lengths = np.diff(files.document_ends.astype(np.int64), prepend=0)
    tokens: Counter[str] = Counter()
    for text, length in zip(texts_of(folder, "train"), lengths.tolist()):
        tokens[text.split()[0]] += length
    return {name: count / len(files) for name, count in tokens.items()}


class TestWeights:
    @pytest.mark.parametrize(
        "weights",
        [
            {"books": 0.2, "news": 0.5, "wiki": 0.3},
            {"books": 6, "news": 3, "wiki": 1},
            {"books": 1, "news": 1, "wiki": 0},
        ],
    )
    def test_tokens_have_the_shares_that_were_asked_for(self, corpus: Path, weights: dict[str, float]) -> None:
        manifest = run(corpus, f"{MIXTURE}.weights={weights}".replace("'", ""))
        found = shares(corpus)
        for name, weight in weights.items():
            assert abs(found.get(name, 0) - weight / sum(weights.values())) < 0.01
            assert manifest.sources[name].train.tokens == round(found.get(name, 0) * manifest.tokens("train"))
        assert "share of tokens" in (corpus / "corpus/tokens/report.md").read_text()

    def test_validation_is_not_mixed(self, corpus: Path) -> None:
        run(corpus)
        plain = texts_of(corpus, "val")
        run(corpus, MIXTURE + ".weights={books: 1, news: 3, wiki: 0}")
        assert texts_of(corpus, "val") == plain
        assert len(set(plain)) == len(plain)

    def test_total(self, corpus: Path) -> None:
        manifest = run(corpus, MIXTURE + ".weights={books: 1, news: 1, wiki: 1}", MIXTURE + ".tokens=9000")
        assert abs(manifest.tokens("train") - 9000) < 400
        assert all(source.epochs < 1.2 for source in manifest.sources.values())


class TestEpochs:
    def test_each_document_as_often_as_asked(self, corpus: Path) -> None:
        run(corpus)
        plain = texts_of(corpus, "train")
        manifest = run(corpus, MIXTURE + ".epochs={books: 0.5, news: 3, wiki: 1.25}")
        times = Counter(texts_of(corpus, "train"))
        by_source = {name: Counter(times[t] for t in plain if t.startswith(name)) for name in manifest.sources}
        assert set(by_source["books"]) == {0, 1}
        assert set(by_source["news"]) == {3}
        assert set(by_source["wiki"]) == {1, 2}
        assert [round(manifest.sources[name].epochs, 1) for name in ("books", "news")] == [0.5, 3.0]
        assert abs(manifest.sources["wiki"].epochs - 1.25) < 0.05

    def test_each_pass_goes_through_the_corpus_in_its_order(self, corpus: Path) -> None:
        """So no copy stands next to itself."""
        run(corpus)
        plain = texts_of(corpus, "train")
        run(corpus, MIXTURE + ".epochs={books: 0.5, news: 3, wiki: 1.25}")
        mixed = texts_of(corpus, "train")
        places = {text: place for place, text in enumerate(plain)}
        order = [places[text] for text in mixed]
        falls = [at for at in range(1, len(order)) if order[at] <= order[at - 1]]
        assert len(falls) == 2
        first = mixed[: falls[0]]
        assert [text for text in plain if not text.startswith("books")] == [
            t for t in first if not t.startswith("books")
        ]
        last = {text: at for at, text in enumerate(mixed)}
        assert min(last[text] - mixed.index(text) for text in mixed if last[text] != mixed.index(text)) > 50

    def test_once_each_is_as_without(self, corpus: Path) -> None:
        run(corpus)
        plain = checksums(corpus)["train.bin"]
        run(corpus, MIXTURE + ".epochs={books: 1, news: 1, wiki: 1}")
        assert checksums(corpus)["train.bin"] == plain

    @pytest.mark.parametrize("changes", [("workers=2", "tasks=7"), ("max_file_tokens=5000",)])
    @pytest.mark.slow
    def test_same_tokens_for_any_workers_tasks_and_files(self, corpus: Path, changes: tuple[str, ...]) -> None:
        asked = MIXTURE + ".weights={books: 1, news: 2, wiki: 2}"
        run(corpus, asked)
        expected = checksums(corpus), texts_of(corpus, "train")
        run(corpus, asked, *[f"data.preprocess.{change}" for change in changes])
        assert texts_of(corpus, "train") == expected[1]
        assert checksums(corpus) == expected[0] or "max_file_tokens" in changes[0]


def config(**changes: Any) -> MixtureConfig:
    """The shipped mixture with changes."""
    return load_config().data.preprocess.mixture.model_copy(update=changes)


class TestPlan:
    def test_every_source_is_used_whole_where_epochs_allow(self) -> None:
        asked = asked_epochs(config(weights={"a": 1, "b": 1}), ["a", "b"], np.array([300, 100]))
        assert asked.epochs.tolist() == [1, 3]

    def test_or_a_part_of_the_large_one(self) -> None:
        asked = asked_epochs(config(weights={"a": 1, "b": 1}), ["a", "b"], np.array([1000, 100]))
        assert asked.epochs.tolist() == [0.4, 4]

    def test_what_cannot_be_had_is_said(self, corpus: Path, tmp_path: Path) -> None:
        weights = MIXTURE + ".weights={books: 1, news: 1, wiki: 1}"
        with pytest.raises(UserError, match=r"repeat source 'wiki'.* At most [\d,]+ tokens"):
            run(corpus, weights, MIXTURE + ".tokens=10000000")
        with pytest.raises(UserError, match="'wiki', which is in data.use, has none"):
            run(corpus, MIXTURE + ".weights={books: 1, news: 1}")
        with pytest.raises(UserError, match="'pile' is not in data.use"):
            run(corpus, MIXTURE + ".epochs={books: 1, news: 1, wiki: 1, pile: 2}")
        with pytest.raises(UserError, match="not both"):
            run(corpus, weights, MIXTURE + ".epochs={books: 1, news: 1, wiki: 1}")
        make_corpus(tmp_path, {"one": [prose(1, 1000)], "many": [prose(number, 20) for number in range(99)]})
        with pytest.raises(UserError, match="documents are long and few"):
            run(tmp_path, MIXTURE + ".weights={one: 1, many: 5}", MIXTURE + ".tokens=6000")
        with pytest.raises(UserError, match="nothing of it is left"):
            run(tmp_path, MIXTURE + ".weights={one: 1, many: 5}", "data.preprocess.filter.max_characters=2000")
