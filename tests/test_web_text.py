"""Text from the web: HTML, addresses, white space, languages, and the recipe that treats all of it as FineWeb does."""

from __future__ import annotations

import hashlib
import json
import random
import sysconfig
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from datatrove.pipeline.formatters.pii import PIIFormatter
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import UserError
from config.load import load_config
from config.schema import DataConfig
from data.download import download_source
from data.funnel import Funnel
from data.pipeline.clean import cleaner, normalize_whitespace
from data.pipeline.code import looks_like_code
from data.pipeline.language import check_languages, identify, in_other_language
from data.pipeline.markup import is_page, page_text
from data.pipeline.masking import mask_emails, mask_ips
from data.pipeline.run import preprocess
from data.sources import Job
from data.tokens import TokensManifest
from tests.workspace import small_tokenizer

CLEAN = load_config().data.preprocess.clean
LANGUAGE = load_config([Path("web-data")]).data.preprocess.language
PAGE = """<!DOCTYPE html>
<html><head><title>The mill</title><script>var tracking = {id: 1};</script><style>p {color: red}</style></head>
<body><nav><ul><li><a href="/">Home</a></li><li><a href="/shop">Shop</a></li></ul></nav>
<main><article><h1>The mill</h1><p>The mill stands by the river &amp; turns.</p>
<p>It was built by a family of farmers.</p><pre>if a &lt; b:
    return c</pre></article></main><footer>Copyright, all rights reserved</footer></body></html>"""
CODE = '''"""Mail people."""

import smtplib


def send(host,   address="jane.doe@site.org"):
    server = smtplib.SMTP(host,    25)
    return server.sendmail(address, "8.8.8.8")



class Sender:
    retries    = 3
'''
PROSE = (
    "The mill stands by the river, and the wheel has turned for three hundred years. It was built by a family of "
    "farmers who had to grind the grain of the whole valley. Their sons left for the city when steam came. Nobody "
    "thought that the stones would ever move again. But an engineer bought the ruin and mended the race with care. "
    "Visitors come from far away to see the flour fall into the sack, warm and smelling of summer."
)
OTHERS = {
    "de": "Die Mühle steht am Fluss, und das Rad dreht sich seit dreihundert Jahren im kalten Wasser des Baches.",
    "fr": "Le moulin se trouve au bord de la rivière et la roue tourne depuis trois cents ans dans l'eau froide.",
    "zh": "磨坊矗立在河边，水轮已经转动了三百年。它是由一个农民家庭建造的，他们要为整个山谷磨粮食。",
    "ru": "Мельница стоит у реки, и колесо вращается уже триста лет в холодной воде горного ручья.",
}


class TestHtml:
    def test_main_content_of_a_page(self) -> None:
        text = cleaner(CLEAN.model_copy(update={"html": "pages"}))(PAGE)
        assert "The mill stands by the river & turns." in text
        assert "if a < b:\n    return c" in text
        for noise in ("tracking", "color", "Shop", "Copyright", "<p>"):
            assert noise not in text

    @pytest.mark.parametrize(
        "start", ["<!doctype HTML>", '\ufeff\n<?xml version="1.0"?>\n<html lang="en">', "<!-- saved -->\n<HTML>"]
    )
    def test_pages_are_told_by_how_they_start(self, start: str) -> None:
        assert is_page(f"{start}<body><p>Text.</p></body></html>")

    @pytest.mark.parametrize(
        "text", ["Write <html> first.", "a <b and c> d", "#include <html>", "<p>A piece.</p>", "<htmlx>", ""]
    )
    def test_anything_else_is_left_alone(self, text: str) -> None:
        assert cleaner(CLEAN.model_copy(update={"html": "pages"}))(text) == text

    def test_pieces(self) -> None:
        mend = cleaner(CLEAN.model_copy(update={"html": "all"}))
        assert mend("<p>One <b>bold</b> &mdash; word.</p><p>Two.</p>").split("\n")[0] == "One bold — word."

    @given(st.text(alphabet="<>/!-aphtml \"='&;\n", max_size=200))
    @settings(max_examples=100, deadline=None)
    def test_broken_markup(self, text: str) -> None:
        assert isinstance(page_text("<html>" + text), str)

    def test_off_by_default(self) -> None:
        assert cleaner(CLEAN)(PAGE) == PAGE


class TestMasks:
    def test_words_of_fineweb_in_turn(self) -> None:
        text = "Ask a.b@site.org, (c_d@mail.co.uk) or e+f@x.io; not @user, a@b or x @ y.z"
        assert mask_emails(text) == (
            "Ask email@example.com, (firstname.lastname@example.org) or email@example.com; not @user, a@b or x @ y.z"
        )
        assert mask_ips("8.8.8.8, 1.1.1.1; not 10.0.0.1 or 127.0.0.1") == (
            "22.214.171.124, 126.96.36.199; not 10.0.0.1 or 127.0.0.1"
        )

    @given(
        st.lists(
            st.sampled_from(
                [
                    *"a1.@ -+/=[]:é\n",
                    "..",
                    "@@",
                    "jane",
                    "site.org",
                    "@b.co",
                    "8.8.8.8",
                    "192.168.0.1",
                    "1.2.3.",
                    "a.b@c.de",
                ]
            ),
            max_size=40,
        )
    )
    @settings(max_examples=500, deadline=None)
    def test_as_datatrove_masks(self, pieces: list[str]) -> None:
        text = "".join(pieces)
        assert mask_ips(mask_emails(text)) == PIIFormatter().format(text)

    def test_as_datatrove_masks_real_documents(self) -> None:
        files = sorted(Path(sysconfig.get_paths()["purelib"]).glob("*.dist-info/METADATA"))
        texts = [file.read_text(encoding="utf-8") for file in files[:150]]
        assert sum("email@example.com" in mask_emails(text) for text in texts) > 20
        for text in texts:
            assert mask_ips(mask_emails(text)) == PIIFormatter().format(text)

    @pytest.mark.parametrize(
        "text", ["a/" * 200_000 + "@", "a@" * 20_000, "@" * 200_000, "1." * 200_000, "a" * 300_000]
    )
    def test_time_is_linear(self, text: str) -> None:
        start = time.process_time()
        mask_ips(mask_emails(text))
        assert time.process_time() - start < 5  # datatrove's own takes minutes

    def test_off_by_default(self) -> None:
        assert cleaner(CLEAN)("jane@site.org 8.8.8.8") == "jane@site.org 8.8.8.8"


class TestWhitespace:
    def test_what_changes(self) -> None:
        text = "\n\n A\u00a0line  with\tmany \u3000 spaces \t\n  - kept indent\u200b\n\n\n\nEnd\u2028here\ufeff \n"
        assert normalize_whitespace(text) == " A line with many spaces\n  - kept indent\n\nEnd\nhere"

    @given(st.text(alphabet=" \t\na\u00a0\u200b\u2028é", max_size=60))
    @settings(max_examples=300, deadline=None)
    def test_twice_is_once_and_words_stay(self, text: str) -> None:
        once = normalize_whitespace(text)
        assert normalize_whitespace(once) == once
        assert once.replace("\u200b", "").split() == text.replace("\u200b", "").split()
        assert "\n\n\n" not in once and " \n" not in once

    def test_time_is_linear(self) -> None:
        start = time.process_time()
        normalize_whitespace(" " * 500_000 + "a" + "\t " * 500_000 + "b")
        assert time.process_time() - start < 5


class TestCode:
    EVERYTHING = {"whitespace": True, "mask_emails": True, "mask_ips": True, "ftfy": True, "html": "pages"}

    def test_code_stays_as_it_is(self) -> None:
        mend = cleaner(CLEAN.model_copy(update=self.EVERYTHING))
        assert mend(CODE) == CODE
        assert mend("See   jane@site.org.") == "See email@example.com."

    def test_the_switch(self) -> None:
        mended = cleaner(CLEAN.model_copy(update={**self.EVERYTHING, "keep_code": False}))(CODE)
        assert "jane" not in mended and "host, address" in mended

    def test_modules_are_code_and_prose_is_not(self) -> None:
        modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        texts = [module.read_text(encoding="utf-8") for module in modules if module.stat().st_size > 1000]
        assert sum(map(looks_like_code, texts)) > 0.93 * len(texts)
        licences = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("LICENSE*"))
        prose = [PROSE, *OTHERS.values(), *[file.read_text("utf-8", "replace") for file in licences if file.is_file()]]
        assert sum(map(looks_like_code, prose)) <= 0.05 * len(prose)

    def test_defaults_leave_the_standard_library_alone(self) -> None:
        mend = cleaner(CLEAN)
        for module in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("a*.py")):
            text = module.read_text(encoding="utf-8")
            assert mend(text) == text


class TestLanguage:
    def test_common_languages(self) -> None:
        found = identify([PROSE, *OTHERS.values()])
        assert [language for language, _ in found] == ["en", *OTHERS]
        assert all(score > 0.8 for _, score in found)

    def test_other_languages_are_dropped(self) -> None:
        texts = pl.Series([PROSE, *OTHERS.values(), PROSE.replace(". ", ".\n"), "", "12 34"])
        assert in_other_language(texts, LANGUAGE).tolist() == [False, *[True] * 4, False, True, True]
        several = LANGUAGE.model_copy(update={"allowed": ["de", "zh"]})
        assert in_other_language(texts, several).tolist() == [True, False, True, False, True, True, True, True]

    def test_the_score_counts(self) -> None:
        texts = pl.Series([PROSE[:40] + OTHERS["de"][:40]])
        score = dict(identify(texts))
        assert max(score.values()) < 0.99
        assert in_other_language(texts, LANGUAGE.model_copy(update={"min_score": 0.999})).tolist() == [True]

    def test_only_the_beginning_is_read(self) -> None:
        texts = pl.Series([(PROSE * 6)[:2000] + OTHERS["ru"] * 1000])
        assert in_other_language(texts, LANGUAGE).tolist() == [False]

    def test_an_unknown_language_is_an_error(self) -> None:
        with pytest.raises(UserError, match="'eng'.*en"):
            check_languages(LANGUAGE.model_copy(update={"allowed": ["de", "eng"]}))


def web_corpus(folder: Path) -> None:
    """Documents of every kind that the recipe knows, as one source."""
    rng = random.Random(3)
    texts = [
        ". ".join(rng.sample(PROSE.split(". "), 6)).rstrip(".") + f". Visit number {n} was the best." for n in range(80)
    ]
    texts[0] += " Write to jane.doe@site.org."
    texts[1] = PAGE.replace("<p>It was", "".join(f"<p>{line}.</p>" for line in PROSE.split(". ")) + "<p>It was")
    texts[2] += "\nOK.\nRead our privacy policy first."
    texts += [
        *OTHERS.values(),
        "The mill. " * 60,
        PROSE + " { }",
        "\n".join(f"Item {n}" for n in range(40)),
        "a short text, this one",
    ]
    (folder / "web.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A downloaded corpus and a tokenizer."""
    folder = tmp_path_factory.mktemp("web")
    web_corpus(folder)
    small_tokenizer().save(folder / "corpus/tokenizer")
    download_source("web", web_data(folder), job=Job())
    return folder


def web_data(folder: Path, *settings: str) -> DataConfig:
    """The data section of the recipe, for the corpus in `folder`."""
    source = f"data.sources.web={{kind: files, paths: ['{folder / 'web.jsonl'}']}}"
    common = (
        f"data.corpus_dir={folder / 'corpus'}",
        source,
        "data.use=[web]",
        "data.preprocess.workers=1",
        "data.preprocess.tasks=2",
        "data.preprocess.near_deduplication.enabled=false",  # the documents are made of the same sentences
    )
    return load_config([Path("web-data")], [*common, *settings]).data


def run(folder: Path, *settings: str) -> tuple[TokensManifest, dict[str, str]]:
    """Preprocess anew; the manifest and the checksum of every file."""
    manifest, _ = preprocess(web_data(folder, *settings), force=True, show=lambda stage, done, documents: None)
    files = sorted((folder / "corpus/tokens").iterdir())
    return manifest, {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class TestRecipe:
    def test_every_document_is_accounted_for(self, folder: Path) -> None:
        manifest, _ = run(folder)
        funnel: Funnel = manifest.funnel["web"]
        funnel.check()
        assert funnel.read.documents == 88
        dropped: dict[str, Any] = {rule: count.documents for rule, count in funnel.dropped.items()}
        assert dropped["language"] >= 4 and dropped["curly_bracket"] == 1 and dropped["top_2_gram"] == 1
        assert sum(dropped.values()) == 8 and funnel.kept.documents == 80
        assert funnel.trimmed.documents == 2  # the lines put in, and the heading of the page
        assert funnel.lines["policy"] == 1 and set(funnel.lines) == {"policy", "too_few_words"}
        report = (folder / "corpus/tokens/report.md").read_text()
        assert "trimmed" in report and "dropped: curly_bracket" in report

    @pytest.mark.slow
    def test_same_bytes_for_any_workers_tasks_and_batches(self, folder: Path) -> None:
        _, expected = run(folder)
        for changes in (("workers=2", "tasks=3"), ("tasks=1", "batch_documents=9")):
            assert run(folder, *[f"data.preprocess.{change}" for change in changes])[1] == expected

    def test_another_bad_word_makes_the_files_anew(self, folder: Path) -> None:
        words = folder / "words.txt"
        setting = f"data.preprocess.quality.c4.bad_words_file={words}"
        data = web_data(folder, setting)
        kept = []
        for word in ("nonesuch", "visit number 7"):
            words.write_text(word)
            manifest, changed = preprocess(data, force=False, show=lambda stage, done, documents: None)
            assert changed
            kept.append(manifest.funnel["web"].kept.documents)
        assert kept == [80, 79]
