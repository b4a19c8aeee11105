"""Lines and paragraphs that stand in several places: the first stays, what is counted, any cut of the corpus."""

from __future__ import annotations

import random
from pathlib import Path

import polars as pl
import pytest

from config.load import load_config
from data.deduplication.lines import hash_lines, without_lines
from data.funnel import total
from data.pipeline.keys import add_keys, in_order
from tests.test_deduplication import NEAR, SPLITS, checksums, make_corpus, prose, run, texts_of
from tests.test_pipeline import frame

BOILERPLATE = "Read our newsletter and follow us wherever you are."
LINES = "data.preprocess.line_deduplication.unit=lines"
PARAGRAPHS = "data.preprocess.line_deduplication.unit=paragraphs"
SETTINGS = load_config().data.preprocess.line_deduplication


class TestWithoutLines:
    @pytest.mark.parametrize(
        ("doomed", "left"),
        [([0], "b\nc"), ([1], "a\nc"), ([2], "a\nb"), ([1, 2], "a"), ([0, 2], "b"), ([0, 1, 2], ""), ([], "a\nb\nc")],
    )
    def test_each_goes_with_its_line_end(self, doomed: list[int], left: str) -> None:
        assert without_lines("a\nb\nc", "lines", doomed) == left

    def test_paragraphs_are_parted_by_blank_lines(self) -> None:
        text = "one\nof two lines\n\n \ntwo\n\nthree\n"
        assert without_lines(text, "paragraphs", [1]) == "one\nof two lines\n\n \nthree\n"
        assert without_lines(text, "paragraphs", [2]) == "one\nof two lines\n\n \ntwo"

    def test_short_lines_and_white_space_do_not_count(self) -> None:
        config = SETTINGS.model_copy(update={"unit": "lines", "min_characters": 4})
        rows = hash_lines(pl.Series(["four\n  four\t\nfou", "x\nfour"]), config)
        assert len(set(rows["hash"].tolist())) == 1
        assert list(zip(rows["document"].tolist(), rows["line"].tolist())) == [(0, 0), (0, 1), (1, 1)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of eight lines of their own, three with one line in common, two with another; one is nothing but it."""
    rng = random.Random(4)
    texts = []
    for number in range(80):
        words = prose(number, 80).split()
        lines = [" ".join(words[at : at + 10]) for at in range(0, 80, 10)]
        if number < 30:
            lines.insert(rng.randrange(9), BOILERPLATE)
        if 30 <= number < 32:
            lines.insert(3, "A line that only two of all these documents have in common.")
        texts.append("\n".join(lines))
    texts += [BOILERPLATE + "\n", f"  {BOILERPLATE}"]
    return make_corpus(tmp_path_factory.mktemp("lines"), {"pages": texts})


class TestCorpus:
    def test_the_first_stays_and_all_is_accounted_for(self, corpus: Path) -> None:
        manifest = run(corpus, LINES)
        funnel = total(manifest.funnel.values())
        funnel.check()
        texts = [text for split in SPLITS for text in texts_of(corpus, split)]
        assert sum(BOILERPLATE in text for text in texts) == 1
        assert sum("only two" in text for text in texts) == 2
        gone = funnel.dropped.get("duplicate-line")
        assert funnel.lines == {"duplicate-line": 30}  # 31 documents, of which the two short ones are equal
        assert funnel.kept.documents + (gone.documents if gone else 0) == 81

    def test_it_is_the_first_in_the_order_of_the_corpus(self, corpus: Path) -> None:
        run(corpus, LINES)
        texts = [text for split in SPLITS for text in texts_of(corpus, split)]
        run(corpus)
        whole = in_order(add_keys(frame(*[text for split in SPLITS for text in texts_of(corpus, split)]), 1337))
        first = next(text for text in whole["text"] if BOILERPLATE in text)
        assert first in texts

    def test_two_are_enough_where_asked(self, corpus: Path) -> None:
        run(corpus, LINES, "data.preprocess.line_deduplication.min_occurrences=2")
        assert sum("only two" in text for split in SPLITS for text in texts_of(corpus, split)) == 1

    def test_of_paragraphs(self, tmp_path: Path) -> None:
        texts = [
            f"{prose(number, 30)}\n\n{BOILERPLATE}\nIt is\na paragraph.\n\n{prose(-number - 1, 30)}"
            for number in range(40)
        ]
        make_corpus(tmp_path, {"pages": texts + [f"{prose(99, 30)}\n{BOILERPLATE}\n\nIt is\na paragraph."]})
        funnel = total(run(tmp_path, PARAGRAPHS).funnel.values())
        assert funnel.lines == {"duplicate-paragraph": 39}
        assert sum(BOILERPLATE in text for split in SPLITS for text in texts_of(tmp_path, split)) == 2

    @pytest.mark.slow
    def test_same_bytes_for_any_workers_and_tasks_with_near_duplicates_gone(self, corpus: Path) -> None:
        run(corpus, LINES, NEAR)
        expected = checksums(corpus)
        run(corpus, LINES, NEAR, "data.preprocess.workers=2", "data.preprocess.tasks=7")
        assert checksums(corpus) == expected
