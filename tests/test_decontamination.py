"""Decontamination: what shares an n-gram with an evaluation set is found, dropped or cut, counted and listed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import UserError
from config.load import load_config
from data.decontamination.documents import cut_out
from data.decontamination.grams import find_grams, grams_of, make_grams
from data.funnel import total
from data.texts import texts_of as arrow_texts
from tests.test_deduplication import SPLITS, checksums, make_corpus, prose, run, texts_of

CONFIG = load_config().data.preprocess.decontamination
QUESTION = "A mill grinds 12 sacks of grain in 3 hours. How many sacks does it grind in 7 hours, if nothing breaks?"
ANSWER = "It grinds four sacks each hour, and so in seven hours it grinds twenty-eight sacks of grain."
POEM = "On either side the river lie long fields of barley and of rye that clothe the wold and meet the sky"


def found(texts: list[str], evaluation: list[str], n: int = 13) -> list[tuple[int, str]]:
    """The number of each text that holds an n-gram of `evaluation`, with the n-gram."""
    hashes, _ = grams_of(evaluation, n)
    grams = make_grams(hashes, np.ones(len(hashes), np.int64), n)
    rows = find_grams(arrow_texts(pl.Series(texts)), grams)
    return [(int(text), texts[text].encode()[start:end].decode()) for text, start, end, _ in rows]


class TestGrams:
    def test_case_and_punctuation_do_not_hide_it(self) -> None:
        loud = QUESTION.upper().replace(",", " --")
        (text, ngram), *more = found(["so: " + loud], [QUESTION], n=20)
        assert text == 0 and ngram == loud.partition(" NOTHING")[0]
        assert len(more) == 2

    def test_another_number_is_another_question(self) -> None:
        assert not found([QUESTION.replace("3", "4").replace("12", "16")], [QUESTION], n=20)

    def test_one_word_less_is_not_enough(self) -> None:
        words = POEM.split()
        assert len(found([f"x {' '.join(words[:13])} x"], [POEM])) == 1
        assert not found([f"x {' '.join(words[:12])} x"], [POEM])

    @given(st.lists(st.lists(st.sampled_from("abc"), max_size=12), max_size=6), st.lists(st.sampled_from("abc")))
    @settings(max_examples=100, deadline=None)
    def test_all_and_nothing_else(self, texts: list[list[str]], evaluation: list[str]) -> None:
        grams = {tuple(evaluation[at : at + 3]) for at in range(len(evaluation) - 2)}
        expected = [
            (number, " ".join(text[at : at + 3]))
            for number, text in enumerate(texts)
            for at in range(len(text) - 2)
            if tuple(text[at : at + 3]) in grams
        ]
        assert found([" ".join(text) for text in texts], [" ".join(evaluation)], n=3) == expected


class TestCut:
    TEXT = "a" * 1000 + "B" * 50 + "c" * 1000

    def test_takes_the_window_too(self) -> None:
        assert cut_out(self.TEXT, [(1000, 1050)], CONFIG) == ("a" * 800 + "\n\n" + "c" * 800, 1)
        assert cut_out(self.TEXT, [(1000, 1030), (1020, 1050)], CONFIG) == ("a" * 800 + "\n\n" + "c" * 800, 1)

    def test_short_pieces_are_forgotten(self) -> None:
        assert cut_out(self.TEXT, [(300, 310), (1000, 1050)], CONFIG) == ("a" * 290 + "\n\n" + "c" * 800, 2)
        assert cut_out(self.TEXT, [(399, 401)], CONFIG) == ("a" * 399 + "B" * 50 + "c" * 1000, 1)
        assert cut_out("x" * 500, [(250, 260)], CONFIG) is None

    def test_too_many_pieces(self) -> None:
        text = "x" * 12_000
        spans = [(at, at + 1) for at in range(1000, 12_000, 1000)]
        assert cut_out(text, spans[:9], CONFIG) is not None
        assert cut_out(text, spans, CONFIG) is None


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents, four of which quote an evaluation set."""
    texts = [prose(number, 200) for number in range(60)]
    texts[7] = f"{texts[7]}\n{QUESTION} é\n{texts[8]}"
    texts[17] = f"ä {texts[17]} {ANSWER.lower()} {POEM} {texts[18]}"
    texts[27] = POEM
    texts[37] += " " + POEM.upper()
    folder = make_corpus(tmp_path_factory.mktemp("contaminated"), {"pages": texts})
    rows = [{"question": QUESTION, "answer": ANSWER}, {"question": "How many?", "answer": "Two."}]
    (folder / "sums").mkdir()
    (folder / "sums/test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "poem.txt").write_text(POEM)
    return folder


def sets(folder: Path, columns: str = "question, answer") -> str:
    """The setting that names both evaluation sets."""
    sums = f"sums: {{paths: ['{folder / 'sums'}/*.jsonl'], text_columns: [{columns}]}}"
    return f"data.preprocess.decontamination.sets={{{sums}, poem: {{paths: ['{folder / 'poem.txt'}']}}}}"


class TestCorpus:
    def test_dropped_counted_and_listed(self, corpus: Path) -> None:
        manifest = run(corpus, sets(corpus))
        funnel = total(manifest.funnel.values())
        funnel.check()
        assert funnel.dropped["contaminated"].documents == 4
        assert manifest.contaminated == {"sums": 2, "poem": 3}
        texts = [text for split in SPLITS for text in texts_of(corpus, split)]
        assert not any("river lie" in text.lower() or "grain" in text for text in texts)
        lines = (corpus / "corpus/tokens/contamination.jsonl").read_text().splitlines()
        hits = [json.loads(line) for line in lines]
        assert len(hits) == 5 and len({hit["id"] for hit in hits}) == 4
        assert {hit["ngram"] for hit in hits if hit["set"] == "sums"} == {
            " ".join(QUESTION.split()[:13]),
            " ".join(ANSWER.lower().split()[:13]),
        }
        assert "| sums | 2 |" in (corpus / "corpus/tokens/report.md").read_text()

    def test_cut(self, corpus: Path) -> None:
        manifest = run(corpus, sets(corpus), "data.preprocess.decontamination.action=cut")
        funnel = total(manifest.funnel.values())
        funnel.check()
        assert funnel.dropped["contaminated"].documents == 1  # the poem alone
        assert funnel.lines == {"contaminated-passage": 3} and funnel.trimmed.documents == 3
        texts = [text for split in SPLITS for text in texts_of(corpus, split)]
        assert not any("river lie" in text.lower() or "grain" in text for text in texts)
        assert sum("\n\n" in text for text in texts) == 2  # the third had it at its end

    @pytest.mark.slow
    def test_same_bytes_for_any_workers_and_tasks(self, corpus: Path) -> None:
        run(corpus, sets(corpus))
        expected = checksums(corpus)
        run(corpus, sets(corpus), "data.preprocess.workers=2", "data.preprocess.tasks=5")
        assert checksums(corpus) == expected

    def test_another_evaluation_file_makes_the_files_anew(self, corpus: Path) -> None:
        before = run(corpus, sets(corpus)).fingerprint
        (corpus / "poem.txt").write_text(POEM + " and more")
        after = run(corpus, sets(corpus)).fingerprint
        (corpus / "poem.txt").write_text(POEM)
        assert before != after

    def test_what_cannot_be_is_said(self, corpus: Path) -> None:
        with pytest.raises(UserError, match="no text in a column 'prompt'. The columns are: .*question"):
            run(corpus, sets(corpus, "prompt"))
        with pytest.raises(UserError, match="none of its 1 texts has 100 words"):
            run(
                corpus,
                sets(corpus, "question").split("{sums")[0] + f"{{poem: {{paths: ['{corpus / 'poem.txt'}']}}}}",
                "data.preprocess.decontamination.n_grams=100",
            )
        with pytest.raises(UserError, match="nothing.txt matches no file"):
            run(corpus, f"data.preprocess.decontamination.sets={{none: {{paths: ['{corpus / 'nothing.txt'}']}}}}")
