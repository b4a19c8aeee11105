"""Quality rules against datatrove's own filters, document by document, with our words and sentences in both."""

from __future__ import annotations

import random
import re
import sysconfig
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import datatrove.pipeline.filters.c4_filters as c4_filters
import datatrove.utils.word_tokenizers as word_tokenizers
import polars as pl
import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils.text import split_into_parts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.errors import UserError
from config.load import load_config
from config.quality import QualityConfig
from data.quality import c4, fineweb, gopher_quality, gopher_repetition
from data.quality.rules import apply_quality, prepare
from data.quality.words import count_sentences, split_words
from data.texts import column_of, texts_of

DEFAULTS = load_config().data.preprocess.quality
SETS = ("gopher_repetition", "gopher_quality", "c4", "fineweb")


def config_of(**changes: dict[str, Any]) -> QualityConfig:
    """The shipped settings with changes to some sets."""
    sets = {name: getattr(DEFAULTS, name).model_copy(update=update) for name, update in changes.items()}
    return DEFAULTS.model_copy(update=sets)


class Ours:
    """Our word splitter in the shape of datatrove's."""

    def word_tokenize(self, text: str) -> list[str]:
        return split_words(text)


@pytest.fixture(scope="module", autouse=True)
def same_words() -> Iterator[None]:
    """datatrove's filters split words and sentences as we do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(word_tokenizers, "load_word_tokenizer", lambda language: Ours())
        patch.setattr(c4_filters, "split_into_sentences", lambda text, language: [""] * count_sentences(text))
        split_into_parts.cache_clear()
        yield
    split_into_parts.cache_clear()


def theirs(name: str, config: QualityConfig) -> Any:
    """datatrove's filter with the settings of `config`."""
    if name == "gopher_repetition":
        repetition = config.gopher_repetition

        def limits(key: str, sizes: tuple[int, ...]) -> tuple[tuple[int, float], ...]:
            values = ((n, getattr(repetition, key.format(n))) for n in sizes)
            return tuple((n, value) for n, value in values if value is not None)

        return GopherRepetitionFilter(
            repetition.dup_line_frac,
            repetition.dup_para_frac,
            repetition.dup_line_char_frac,
            repetition.dup_para_char_frac,
            limits("top_{}_gram", gopher_repetition.TOP),
            limits("duplicated_{}_n_grams", gopher_repetition.DUPLICATED),
        )
    if name == "c4":
        off = {"min_num_sentences", "min_words_per_line", "max_word_length"}
        values = config.c4.model_dump(exclude={"enabled", "bad_words_file"})
        return C4QualityFilter(**{key: -1 if key in off and value is None else value for key, value in values.items()})
    kind = GopherQualityFilter if name == "gopher_quality" else FineWebQualityFilter
    return kind(**getattr(config, name).model_dump(exclude={"enabled"}))


def their_reason(filter_: Any, document: Document) -> str | None:
    """The name of the rule that drops the document, or None."""
    verdict = filter_.filter(document)
    return None if verdict is True else str(verdict[1])


def our_reasons(name: str, texts: list[str], config: QualityConfig) -> tuple[list[str | None], list[str]]:
    """For each text the rule of the set that drops it, or None; and what the set makes of the texts."""
    column = pl.Series("text", texts, dtype=pl.String)
    if name == "c4":
        result = c4.c4(texts_of(column), config.c4)
        return [c4.RULES[row] if row >= 0 else None for row in result.verdicts], column_of(result.texts).to_list()
    if name == "gopher_repetition":
        verdicts, rules = (
            gopher_repetition.gopher_repetition(texts_of(column), config.gopher_repetition),
            gopher_repetition.RULES,
        )
    elif name == "gopher_quality":
        verdicts, rules = gopher_quality.gopher_quality(texts_of(column), config.gopher_quality), gopher_quality.RULES
    else:
        verdicts, rules = fineweb.fineweb(texts_of(column), config.fineweb), fineweb.RULES
    return [rules[row] if row >= 0 else None for row in verdicts], texts


def compare(name: str, texts: list[str], config: QualityConfig) -> Counter[str | None]:
    """Hold our decisions and texts to datatrove's; how often each rule applied."""
    filter_ = theirs(name, config)
    reasons, kept = our_reasons(name, texts, config)
    for text, reason, ours in zip(texts, reasons, kept):
        document = Document(text=text, id="")
        expected = their_reason(filter_, document)
        if (expected, document.text, reason) == (None, "", "c4_no_lines_left"):
            continue  # datatrove keeps the empty text
        assert reason == expected, text
        assert ours == document.text
    return Counter(reasons)


@lru_cache(maxsize=1)
def real_texts() -> list[str]:
    """The standard library's modules and the documentation of installed packages, in pieces and whole, shuffled."""
    folders = {kind: Path(sysconfig.get_paths()[kind]) for kind in ("stdlib", "purelib")}
    files = sorted([*folders["stdlib"].glob("*.py"), *folders["stdlib"].glob("[a-k]*/*.py")])
    files += sorted(folders["purelib"].glob("*.dist-info/METADATA"))
    for ending in ("md", "rst", "txt"):
        files += sorted(folders["purelib"].rglob(f"*.{ending}"))
    texts: list[str] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        pages = [page[at : at + 4000] for page in text.split("\n\n\n") for at in range(0, len(page), 4000)]
        texts += [page for page in (*pages, text[:50_000]) if page.strip()]
    random.Random(0).shuffle(texts)
    return texts


PROSE = (
    "The mill stands by the river, and the wheel has turned for three hundred years. It was built by a family of "
    "farmers who had to grind the grain of the whole valley. Their sons left for the city when steam came. Nobody "
    "thought that the stones would ever move again. But an engineer bought the ruin and mended the race with care. "
    "Visitors come from far away to see the flour fall into the sack, warm and smelling of summer."
)
WORDS = [f"w{number:02}a" for number in range(60)]
ROWS = [f"This is line number {number} of the text and it ends well." for number in range(12)]
PLANTED = {
    "dup_para_frac": "\n\n".join(["Again.", "Again.", *ROWS[:1], "Again."]),
    "dup_para_char_frac": "\n\n".join([PROSE, PROSE, *ROWS, *"abcdefgh"]),
    "dup_line_frac": "\n".join(["No.", *"abc", "No.", "No.", "No.", PROSE]),
    "dup_line_char_frac": "\n".join([PROSE, *"abcdefgh", PROSE, *ROWS]),
    "top_2_gram": " ".join(f"{word} grinding wheels" for word in WORDS[:40]),
    "top_3_gram": " ".join(f"{word} of it in {word[::-1]}" for word in WORDS),
    "top_4_gram": " ".join(f"{word} a b c d {word[::-1]}x {word}yy" for word in WORDS),
    "gopher_short_doc": "Too short for a page.",
    "gopher_long_doc": "word " * 100_001,
    "gopher_below_avg_threshold": "a of to be in " * 20,
    "gopher_above_avg_threshold": "the internationalisation of characterisations " * 30,
    "gopher_too_many_hashes": PROSE + " #" * 30,
    "gopher_too_many_ellipsis": PROSE.replace(" ", "... ", 20),
    "gopher_too_many_bullets": "\n".join(f"- {row}" for row in ROWS),
    "gopher_too_many_end_ellipsis": "\n".join(f"{row}.. " for row in ROWS) + "\n" + PROSE * 2,
    "gopher_below_alpha_threshold": PROSE + " 12 34" * 40,
    "gopher_enough_stop_words": " ".join(WORDS),
    "lorem_ipsum": PROSE + "\nLorem Ipsum dolor sit amet.",
    "curly_bracket": PROSE + "\nfunction main() { return true; } is code.",
    "too_few_sentences": "One. Two. Three.",
    "empty": " \n \n",
    "line_punct_ratio": "\n".join(f"A menu of things, number {number}, without an end" for number in range(20)),
    "short_line_ratio": "\n".join(f"Short line {number}." for number in range(20)),
    "char_dup_ratio": "\n".join([ROWS[0], PROSE, ROWS[0]]),
    "list_ratio": "\n".join(f"{'incomprehensible' * 2}{number}." for number in range(9)),
}
ALONE = {
    "gopher_repetition": {rule: rule for rule in gopher_repetition.RULES[1:8]},
    "gopher_quality": {
        "gopher_short_doc": "min_doc_words",
        "gopher_long_doc": "max_doc_words",
        "gopher_below_avg_threshold": "min_avg_word_length",
        "gopher_above_avg_threshold": "max_avg_word_length",
        "gopher_too_many_hashes": "max_symbol_word_ratio",
        "gopher_too_many_ellipsis": "max_symbol_word_ratio",
        "gopher_too_many_bullets": "max_bullet_lines_ratio",
        "gopher_too_many_end_ellipsis": "max_ellipsis_lines_ratio",
        "gopher_below_alpha_threshold": "max_non_alpha_words_ratio",
        "gopher_enough_stop_words": "min_stop_words",
    },
    "c4": {
        "lorem_ipsum": "filter_lorem_ipsum",
        "curly_bracket": "filter_curly_bracket",
        "too_few_sentences": "min_num_sentences",
    },
    "fineweb": {
        "line_punct_ratio": "line_punct_thr",
        "short_line_ratio": "short_line_thr",
        "char_dup_ratio": "char_duplicates_ratio",
        "list_ratio": "new_line_ratio",
    },
}


class TestAgainstDatatrove:
    @pytest.mark.parametrize(("name", "rule"), [(name, rule) for name, rules in ALONE.items() for rule in rules])
    def test_each_rule_can_be_switched_by_itself(self, name: str, rule: str) -> None:
        """With all others of its set off, a rule drops the text made for it, and nothing does without it."""
        key = ALONE[name][rule]
        off = {other: False if other.startswith("filter") else None for other in ALONE[name].values()}
        off |= {f"duplicated_{n}_n_grams": None for n in gopher_repetition.DUPLICATED} if "dup_para_frac" in off else {}
        on = {**off, key: getattr(getattr(DEFAULTS, name), key)}
        assert our_reasons(name, [PLANTED[rule]], config_of(**{name: on}))[0] == [rule]
        assert our_reasons(name, [PLANTED[rule]], config_of(**{name: off}))[0] == [None]

    @pytest.mark.parametrize("name", SETS)
    def test_texts_made_for_a_rule(self, name: str) -> None:
        compare(name, [text for text in PLANTED.values() if text.strip() or name == "fineweb"], DEFAULTS)

    @pytest.mark.parametrize("n", gopher_repetition.DUPLICATED)
    def test_repeated_runs_of_words(self, n: int) -> None:
        """A run of `n` words that occurs twice counts for `n`, and not for `n + 1`."""
        limits = {rule: None for rule in gopher_repetition.RULES[1:]}
        run = " ".join(WORDS[:n])
        text = f"{run} one {run} two"
        for limit, rule in ((n, f"duplicated_{n}_n_grams"), (n + 1, None)):
            if limit > 10:
                continue
            changed = config_of(gopher_repetition={**limits, f"duplicated_{limit}_n_grams": 0.1})
            assert compare("gopher_repetition", [text], changed) == {rule: 1}

    @pytest.mark.parametrize("name", SETS)
    def test_real_documents(self, name: str) -> None:
        compare(name, real_texts()[:200], DEFAULTS)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", SETS)
    def test_five_thousand_real_documents(self, name: str) -> None:
        found = compare(name, real_texts()[:5200], DEFAULTS)
        assert sum(found.values()) >= 5000
        assert sum(count >= 5 for count in found.values()) >= 3

    def test_lines_without_an_end_as_fineweb_keeps_them(self) -> None:
        compare("c4", real_texts()[:200], config_of(c4={"filter_no_terminal_punct": False}))


PIECES = [
    *"the,of,word,a,I,don't,naïve,हिन्दी,你好,Ünï,x_y,3.14,७,½,e\u0301,line of it.,line of it.,👩‍🚀,\U00010f86".split(
        ","
    ),
    *"1,000|...|…|.|!|?|。|،|\"|'|’|•|- |#|##|--|{|}|[1]|[٣]|[]|[edit]|[citation needed]|[|]|aaaaaaaaaaaa".split("|"),
    *"lorem ipsum|Lorem ipsu|JavaScript|Use Cookies|privacy policy|terms of us|\n|\n\n|\n\n\n".split("|"),
    *(" ", " ", " ", "  ", "\t", "\u00a0", "\u3000", "\n", "\r\n", "\r", "\x0b", "\x1c", "\x85", "\u2028"),
]
LOOSE = config_of(
    gopher_repetition={
        **{rule: 0.4 for rule in gopher_repetition.RULES[5:]},
        "dup_line_frac": 0.5,
        "dup_para_frac": 0.6,
    },
    gopher_quality={
        "min_doc_words": 3,
        "max_doc_words": 60,
        "min_avg_word_length": 1.8,
        "max_avg_word_length": 6,
        "max_symbol_word_ratio": 0.3,
        "max_bullet_lines_ratio": 0.5,
        "max_non_alpha_words_ratio": 0.4,
        "min_stop_words": 1,
    },
    c4={"min_num_sentences": 1, "min_words_per_line": 1, "max_word_length": 20},
    fineweb={"char_duplicates_ratio": 0.2, "new_line_ratio": 0.6, "short_line_thr": 0.9, "short_line_length": 12},
)
OFF: dict[str, dict[str, Any]] = {
    "gopher_repetition": {rule: None for rule in gopher_repetition.RULES[1:8]},
    "gopher_quality": {"min_doc_words": None, "min_avg_word_length": None, "max_symbol_word_ratio": None},
    "c4": {
        "remove_citations": False,
        "filter_no_terminal_punct": False,
        "filter_curly_bracket": False,
        "filter_lorem_ipsum": False,
        "filter_javascript": False,
        "filter_policy": False,
        "max_word_length": None,
    },
    "fineweb": {"line_punct_exclude_zero": True},
}


@pytest.mark.parametrize("name", SETS)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), min_size=1, max_size=80))
def test_any_text(name: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    if not text.strip():
        return  # datatrove divides by zero; such documents are dropped before
    compare(name, [text], LOOSE)
    compare(name, [text], config_of(**{name: {**getattr(LOOSE, name).model_dump(), **OFF[name]}}))


class TestWords:
    MARKS = "".join(chr(point) for point in range(0x300, 0xE01F0) if unicodedata.category(chr(point))[0] == "M")
    WORD = rf"[\w\u200c\u200d{MARKS}]"
    RULE = re.compile(rf"{WORD}+(?:(?:(?<={WORD})['’.](?={WORD})|(?<=\d),(?=\d)){WORD}+)*|(\S)\1*")

    @given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(alphabet="ab1.,'-_ é…", max_size=5))).map("".join))
    @settings(max_examples=150, deadline=None)
    def test_follow_the_definition(self, text: str) -> None:
        assert split_words(text) == [match[0] for match in self.RULE.finditer(text)]

    def test_as_people_would_count(self) -> None:
        text = "Don't panic: it's 3.14, or 1,000... at example.com -- “naïve” c'est हिन्दी."
        assert split_words(text) == [
            *("Don't", "panic", ":", "it's", "3.14", ",", "or", "1,000", "...", "at", "example.com", "--"),
            *("“", "naïve", "”", "c'est", "हिन्दी", "."),
        ]

    @pytest.mark.parametrize(
        ("text", "count"),
        [
            ("", 0),
            ("One.", 1),
            ("One. Two", 2),
            ('He said "Stop!" and left. (Really?) Yes...', 4),
            ("Version 3.14 of example.com is out.", 1),
            ("你好。世界！再见", 3),
            ("What?! No", 2),
        ],
    )
    def test_sentences(self, text: str, count: int) -> None:
        assert count_sentences(text) == count


class TestApply:
    ALL = config_of(**{name: {"enabled": True} for name in SETS})

    def test_everything_is_off_by_default(self) -> None:
        frame = pl.DataFrame({"text": list(PLANTED.values())})
        judged = apply_quality(frame, DEFAULTS)
        assert judged.kept.equals(frame) and not len(judged.dropped) and not judged.trimmed

    def test_each_document_is_kept_or_dropped_once(self) -> None:
        texts = [*PLANTED.values(), PROSE, *real_texts()[:200]]
        frame = pl.DataFrame({"id": [str(number) for number in range(len(texts))], "text": texts})
        judged = apply_quality(frame, self.ALL)
        assert sorted([*judged.kept["id"], *judged.dropped["id"]]) == sorted(frame["id"])
        assert judged.dropped["rule"].null_count() == 0
        assert "rule" not in judged.kept.columns
        size = frame["text"].str.len_bytes().sum()
        parts = (judged.kept, judged.dropped)
        assert size == judged.trimmed_bytes + sum(part["text"].str.len_bytes().sum() for part in parts)

    def test_is_one_set_after_the_other(self) -> None:
        texts = [PROSE, *[text for text in PLANTED.values() if text.strip()], *real_texts()[:200]]
        frame = pl.DataFrame({"id": list(range(len(texts))), "text": texts})
        judged = apply_quality(frame, self.ALL)
        documents = [Document(text=text, id="") for text in texts]
        filters = [theirs(name, self.ALL) for name in SETS]
        expected = [
            next(filter(None, (their_reason(each, document) for each in filters)), None) for document in documents
        ]
        ours = dict(zip(judged.dropped["id"], judged.dropped["rule"]))
        assert [ours.get(number) for number in range(len(texts))] == expected
        assert judged.kept["text"].to_list() == [
            document.text for document, reason in zip(documents, expected) if reason is None
        ]

    def test_order_and_batches_do_not_matter(self) -> None:
        frame = pl.DataFrame({"text": real_texts()[:100]})
        whole = apply_quality(frame, self.ALL)
        parts = [apply_quality(frame.slice(at, 7), self.ALL) for at in range(0, 100, 7)]
        assert pl.concat([part.kept for part in parts]).equals(whole.kept)
        assert Counter(whole.dropped["rule"]) == sum((Counter(part.dropped["rule"]) for part in parts), Counter())

    def test_lines_taken_out_are_counted_by_rule(self) -> None:
        lines = [
            "A menu without an end",
            "Yes.",
            "Please turn JavaScript on for this.",
            "Read our Privacy Policy before you go on.",
            "x" * 1001 + " is a long word.",
        ]
        text = "\n".join([PROSE, *lines, ROWS[0]])
        judged = apply_quality(pl.DataFrame({"text": [text, PROSE]}), config_of(c4={"enabled": True}))
        assert judged.kept["text"].to_list() == [f"{PROSE}\n{ROWS[0]}", PROSE]
        assert judged.lines == dict.fromkeys(c4.LINE_RULES, 1)
        assert (judged.trimmed, judged.trimmed_bytes) == (1, len("\n".join(lines)) + 1)

    def test_citations_are_removed(self) -> None:
        text = PROSE.replace("years.", "years[12].[citation needed][edit]") + " [3]"
        judged = apply_quality(pl.DataFrame({"text": [text + "."]}), config_of(c4={"enabled": True}))
        assert judged.kept["text"].to_list() == [PROSE + " ."]

    def test_a_text_with_nothing_left_is_dropped(self) -> None:
        config = config_of(c4={"enabled": True, "min_num_sentences": None})
        judged = apply_quality(pl.DataFrame({"text": ["Menu\nHome\nSearch"]}), config)
        assert judged.dropped["rule"].to_list() == ["c4_no_lines_left"]

    def test_no_documents(self) -> None:
        judged = apply_quality(pl.DataFrame({"text": []}, schema={"text": pl.String}), self.ALL)
        assert not len(judged.kept) and not len(judged.dropped)

    def test_a_huge_document(self) -> None:
        text = " ".join(f"word{number}" for number in range(40_000)) + "\n" * 20_000
        for name in SETS:
            compare(name, [text], DEFAULTS)


class TestBadWords:
    def run(self, path: Path, words: str, texts: list[str]) -> list[str]:
        """The texts that are dropped for these words."""
        path.write_text(words, encoding="utf-8")
        config = config_of(c4={"enabled": True, "min_num_sentences": None, "bad_words_file": str(path)})
        dropped = apply_quality(pl.DataFrame({"text": texts}), config).dropped
        assert set(dropped["rule"]) <= {"document_removed_with_badwords"}
        return dropped["text"].to_list()

    def test_words_that_stand_by_themselves(self, tmp_path: Path) -> None:
        texts = [
            "This is Darned bad.",
            "Undarned is a word.",
            "It is darned-well so.",
            "No swear (word) here.",
            "A swear word.",
        ]
        assert self.run(tmp_path / "a.txt", "darned\nswear word\n\n", texts) == [texts[0], texts[2], texts[4]]

    def test_scripts_without_spaces(self, tmp_path: Path) -> None:
        texts = ["这是坏话在这里 and so on.", "这是好的 and so on."]
        assert self.run(tmp_path / "b.txt", "坏话\nbad", texts) == texts[:1]

    @pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"])
    def test_a_file_without_words(self, tmp_path: Path, content: bytes | None) -> None:
        if content is not None:
            (tmp_path / "words.txt").write_bytes(content)
        with pytest.raises(UserError, match="words.txt .*null"):
            prepare(config_of(c4={"enabled": True, "bad_words_file": str(tmp_path / "words.txt")}))


def test_settings_are_checked() -> None:
    check: Callable[[str], Any] = lambda text: load_config([], [f"data.preprocess.quality.{text}"])
    with pytest.raises(UserError, match="dup_line_frac"):
        check("gopher_repetition.dup_line_frak=0.5")
    with pytest.raises(UserError, match="min_doc_words"):
        check("gopher_quality.min_doc_words=-1")
    assert check("gopher_repetition.top_2_gram=null").data.preprocess.quality.gopher_repetition.top_2_gram is None
