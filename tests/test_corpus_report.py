"""The page about a corpus, and trying settings on a few documents."""

from __future__ import annotations

import hashlib
import html
import json
import re
from pathlib import Path

import pytest

from data.pipeline.survey import SAMPLES, repeated_phrases
from data.tokens import load_tokens_manifest
from tests.commands import here
from tests.test_deduplication import make_corpus, prose

PHRASE = "printed by the same press"
SHORT = [f"<b>tiny {number}</b>" for number in range(30)]
GERMAN = [f"Der alte Mann geht am Abend langsam durch den Wald nach Hause, zum {number}. Mal." for number in range(40)]
ENGLISH = [f"{prose(number, 40)} {PHRASE}" for number in range(300)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, one with documents that are too short."""
    return make_corpus(tmp_path_factory.mktemp("report"), {"books": ENGLISH + SHORT, "briefe": GERMAN})


def preprocess(folder: Path, *arguments: str, origin: Path | None = None) -> str:
    """Run the command in `folder` on both sources, which come from `origin`; what it printed."""
    names = ("books", "briefe")
    settings = [f"data.sources.{name}={{kind: files, paths: ['{origin or folder}/{name}.jsonl']}}" for name in names]
    return here(folder, "data/preprocess.py", *settings, "data.use=[books,briefe]", *arguments).stdout


def sections(page: str) -> dict[str, str]:
    """The page cut at its second-level headings."""
    parts = re.split(r"<h2>(.*?)</h2>", page)
    return dict(zip(parts[1::2], parts[2::2]))


def rows(section: str, heading: str) -> dict[str, str]:
    """The first two cells of each row of the table under a third-level heading."""
    table = section.partition(f"<h3>{heading}</h3>")[2].partition("</table>")[0]
    return {label: value for label, value in re.findall(r'<td>(.*?)</td><td class="number">(.*?)</td>', table)}


def files(folder: Path) -> dict[str, str]:
    """SHA-256 of all files under `folder`."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_the_page_shows_where_documents_went(corpus: Path) -> None:
    preprocess(corpus, "data.preprocess.workers=1", "data.preprocess.tasks=3")
    page = (corpus / "corpus/tokens/report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)\s*=|@import|url\(""", page)  # it needs nothing but itself
    found = sections(page)
    manifest = load_tokens_manifest(corpus / "corpus/tokens")

    funnel = rows(found["books"], "What became of the documents")
    assert (funnel["read"], funnel["dropped: too-short"], funnel["kept"]) == ("330", "30", "300")
    lengths = rows(found["books"], "Length of the documents that stayed")
    expected: dict[str, int] = {}
    for text in ENGLISH:
        power = len(text).bit_length() - 1
        label = f"{2**power:,} to {2 ** (power + 1) - 1:,}"
        expected[label] = expected.get(label, 0) + 1
    assert lengths == {label: str(number) for label, number in expected.items()}
    assert rows(found["briefe"], "Language of the documents that stayed") == {"de": "40"}
    assert rows(found["books"], "Most repeated phrases")[PHRASE] == "300"

    shown = re.findall(r"<pre>(.*?)</pre>", found["books"].partition("too-short")[2], re.DOTALL)
    assert len(shown) == SAMPLES and {html.unescape(text) for text in shown} <= set(SHORT)
    tokens = manifest.sources["briefe"].train.tokens
    assert f"{tokens:,}</td>" in found["Sources"]


@pytest.mark.slow
def test_the_page_does_not_depend_on_tasks_and_workers(corpus: Path) -> None:
    preprocess(corpus, "data.preprocess.workers=1", "data.preprocess.tasks=2")
    first = files(corpus / "corpus/tokens")
    preprocess(corpus, "--force", "data.preprocess.workers=2", "data.preprocess.tasks=5")
    assert files(corpus / "corpus/tokens") == first


def test_a_dry_run_shows_the_funnel_and_leaves_the_corpus_alone(corpus: Path) -> None:
    preprocess(corpus, "data.preprocess.workers=1")
    before = files(corpus)
    printed = preprocess(
        corpus, "--dry-run", "80", "data.preprocess.workers=1", "data.preprocess.filter.min_characters=90"
    )
    page = corpus / "corpus/dry-run.html"
    funnel = rows(sections(page.read_text(encoding="utf-8"))["books"], "What became of the documents")
    assert funnel["read"] == "40"
    dropped = int(rows(sections(page.read_text(encoding="utf-8"))["briefe"], "What became of the documents")["kept"])
    assert dropped < 40  # the setting on the command line counts
    assert "corpus/dry-run.html" in printed and "no token files were written" in printed
    assert printed.splitlines()[-1].startswith("Next: python data/preprocess.py")
    page.unlink()
    assert files(corpus) == before


def test_a_dry_run_needs_no_earlier_run(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for name in ("raw", "tokenizer"):
        (tmp_path / "corpus" / name).symlink_to(corpus / "corpus" / name)
    preprocess(tmp_path, "--dry-run", "100", "data.preprocess.workers=1", origin=corpus)
    assert sorted(path.name for path in (tmp_path / "corpus").iterdir()) == ["dry-run.html", "raw", "tokenizer"]


def test_phrases_are_counted_by_the_texts_that_hold_them() -> None:
    texts = ["a b c a b c", "x a b y", "a b", json.dumps(["b a"])]
    assert repeated_phrases(texts, 2, 5) == [("a b", 3)]
    assert repeated_phrases(texts, 1, 2) == [("a", 3), ("b", 3)]
