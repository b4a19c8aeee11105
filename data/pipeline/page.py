"""`report.html`: the corpus as a person wants to look at it, and the documents that each rule dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from config.pages import render
from data.funnel import Funnel, total
from data.pipeline.language import identify
from data.pipeline.report import SPLIT_NOTES, SPLITS, contamination_rows, steps
from data.pipeline.survey import Survey, repeated_phrases
from data.tokens import TokensManifest

TEMPLATE = Path(__file__).parents[1] / "templates" / "corpus.html"
PHRASE_WORDS = 5
MOST_PHRASES = 12
MOST_LANGUAGES = 8

Bar = tuple[str, str, float]


def page(manifest: TokensManifest, surveys: Mapping[str, Survey]) -> str:
    """The page; it depends on its arguments alone. `surveys` are by source."""
    whole = total(manifest.funnel.values())
    tokens = {split: manifest.tokens(split) for split in SPLITS}
    return render(
        TEMPLATE,
        figures=[
            ("documents read", f"{whole.read.documents:,}"),
            ("documents kept", f"{whole.kept.documents:,}"),
            ("tokens for training", f"{tokens['train']:,}"),
            ("tokens for validation", f"{tokens['val']:,}"),
            ("bytes per token", _ratio(sum(map(manifest.bytes, SPLITS)), sum(tokens.values()))),
        ],
        note=SPLIT_NOTES[manifest.validation],
        source_headings=("source", "documents read", "kept", "tokens to train", "share", "epochs", "bytes per token"),
        source_rows=[_source_row(manifest, name) for name in manifest.sources],
        contaminated=contamination_rows(manifest),
        sources=[_source(name, funnel, surveys[name]) for name, funnel in manifest.funnel.items()],
    )


def _source_row(manifest: TokensManifest, name: str) -> tuple[str, ...]:
    funnel, source = manifest.funnel[name], manifest.sources[name]
    available = source.available.tokens + source.val.tokens
    return (
        name,
        f"{funnel.read.documents:,}",
        f"{funnel.kept.documents:,}",
        f"{source.train.tokens:,}",
        f"{source.train.tokens / max(1, manifest.tokens('train')):.1%}",
        f"{source.epochs:g}",
        _ratio(source.available.bytes + source.val.bytes, available),
    )


def _source(name: str, funnel: Funnel, survey: Survey) -> dict[str, Any]:
    texts = [sample.text for sample in sorted(survey.kept, key=lambda sample: sample.id)]
    languages = Counter(language for language, _ in identify(texts))
    phrases = repeated_phrases(texts, PHRASE_WORDS, MOST_PHRASES)
    return {
        "name": name,
        "funnel": _funnel(funnel),
        "lines": _bars(sorted(funnel.lines.items(), key=lambda item: (-item[1], item[0]))),
        "lengths": _bars(
            (f"{2**power:,} to {2 ** (power + 1) - 1:,}", survey.lengths[power]) for power in sorted(survey.lengths)
        ),
        "languages": _bars(_with_rest(languages.most_common(), MOST_LANGUAGES)),
        "phrases": _bars(phrases, of=len(texts)),
        "samples": f"{len(texts):,}",
        "dropped": sorted(survey.dropped.items()),
        "unreadable": _bars(sorted(funnel.bad.items())),
    }


def _funnel(funnel: Funnel) -> list[tuple[str, str, str, str, float, bool]]:
    """The rows of the terminal's funnel, each with the length of its bar and whether it counts what was lost."""
    read = funnel.read.documents
    return [
        (*step.cells(read), min(1.0, step.documents / max(1, read)), step.name not in ("read", "kept"))
        for step in steps(funnel)
    ]


def _bars(counts: Iterable[tuple[str, int]], of: int | None = None) -> list[Bar]:
    """Labels, numbers and lengths of bars; the longest is 1, or that of the number `of`."""
    pairs = list(counts)
    longest = of or max((number for _, number in pairs), default=1)
    return [(label, f"{number:,}", number / longest) for label, number in pairs]


def _with_rest(counts: list[tuple[str, int]], most: int) -> list[tuple[str, int]]:
    rest = sum(number for _, number in counts[most:])
    return counts[:most] + ([("others", rest)] if rest else [])


def _ratio(size: int, tokens: int) -> str:
    return f"{size / tokens:.2f}" if tokens else ""
