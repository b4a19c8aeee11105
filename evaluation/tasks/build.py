"""Questions that every machine can make: from the part of the built-in corpus that no model trains on.

Python's standard library and language reference are divided as preprocessing divides them, by the hash of each
document's content. The questions come from the documents that are held out, so a model that was trained on the built-in
corpus has not seen them, and one that was trained on anything else is asked the same ones. Chance is one in four.
"""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from config.errors import UserError

QUESTIONS = 250  # of each task
CHOICES = 4
_FEWEST = 50
_SEED = 1337
_WORD = re.compile(r"\b[a-z]{4,12}\b")
_PROSE = re.compile(r"(?:[A-Z][\w,;:'\"` -]*[ \n]+)(?:[\w,;:'\"`()-]+[ \n]+){8,40}([a-z]{4,12})\.(?=\s)")

Question = dict[str, Any]  # "context", "choices", "gold"


def cloze(**settings: Any) -> Any:
    """Sentences of documentation without their last word; the wrong words end other sentences."""
    return _as_data(_cloze, settings)


def next_line(**settings: Any) -> Any:
    """Eight lines, and which one comes next; the wrong ones are the nearest in length from elsewhere in the text."""
    return _as_data(_next_line, settings)


def copying(**settings: Any) -> Any:
    """A list of words, its beginning a second time, and which word comes next."""
    return _as_data(_copying, settings)


def arithmetic(**settings: Any) -> Any:
    """Sums and differences of numbers up to twenty, after four that are done."""
    return _as_data(_arithmetic, settings)


def _as_data(make: Callable[[Sequence[str], random.Random], list[Question]], settings: Mapping[str, Any]) -> Any:
    from datasets import Dataset

    texts = held_out(settings.get("validation_fraction"), tuple(sorted((settings.get("clean") or {}).items())))
    generator = random.Random(_SEED)
    try:
        questions = make(texts, generator)
    except ValueError:  # fewer words than a question needs
        questions = []
    if len(questions) < _FEWEST:
        raise UserError(
            f"What the run holds out of the built-in corpus, {sum(map(len, texts)):,} characters, is too little to "
            f"make questions of. Tasks of the project need a data.preprocess.validation_fraction of 0.01 or more."
        )
    generator.shuffle(questions)
    return {"test": Dataset.from_list(questions[:QUESTIONS])}


@cache
def held_out(fraction: float | None, clean: tuple[tuple[str, Any], ...]) -> tuple[str, ...]:
    """The texts of the built-in corpus that are held out at this fraction, mended by these settings, in their order.

    None and nothing stand for the settings that ship.
    """
    import polars as pl

    from config.load import load_config
    from data.formats.rows import Row
    from data.pipeline.clean import cleaner
    from data.pipeline.keys import add_keys, in_order
    from data.pipeline.split import choose_split, divide
    from data.sources.sample import language_reference, read_module, standard_library

    settings = load_config().data.preprocess
    mend = cleaner(settings.clean.model_copy(update=dict(clean)) if clean else settings.clean)
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [row.text for path in standard_library(library) for row in read_module(path) if isinstance(row, Row)]
    texts = [mend(text) for text in [*texts, *(text for _, text in language_reference())]]
    frame = pl.DataFrame({"source": [0] * len(texts), "id": list(map(str, range(len(texts)))), "text": texts})
    frame = in_order(add_keys(frame, 0))
    split = choose_split(frame["split"].to_numpy(), settings.validation_fraction if fraction is None else fraction)
    return tuple(divide(frame, split)[1]["text"])


def _question(context: str, right: str, wrong: Sequence[str], generator: random.Random) -> Question:
    gold = generator.randrange(CHOICES)
    choices = [*wrong[:gold], right, *wrong[gold:]]
    assert len(set(choices)) == CHOICES
    return {"context": context, "choices": choices, "gold": gold}


def _cloze(texts: Sequence[str], generator: random.Random) -> list[Question]:
    found: dict[str, str] = {}
    for text in texts:
        for sentence in _PROSE.finditer(text):
            context = text[sentence.start() : sentence.start(1)]
            found[" ".join(context.split())] = sentence[1]
    words = sorted(set(found.values()))
    questions = []
    for context, right in sorted(found.items()):
        others = [word for word in words if word != right and word not in context]
        questions.append(_question(context, right, generator.sample(others, CHOICES - 1), generator))
    return questions


def _next_line(texts: Sequence[str], generator: random.Random) -> list[Question]:
    questions = []
    for text in texts:
        lines = [line for line in text.split("\n") if line.strip()]
        for start in range(0, len(lines) - 8, 24):
            seen, right = lines[start : start + 8], lines[start + 8]
            others = sorted({line for line in lines if line not in seen and line != right})
            others.sort(key=lambda line: abs(len(line) - len(right)))
            if 16 <= len(right) <= 80 and len(others) >= 8 and sum(map(len, seen)) < 600:
                wrong = ["\n" + line for line in generator.sample(others[:8], CHOICES - 1)]
                questions.append(_question("\n".join(seen), "\n" + right, wrong, generator))
    return questions


def _copying(texts: Sequence[str], generator: random.Random) -> list[Question]:
    words = sorted(set(_WORD.findall(" ".join(texts))))
    questions = []
    for _ in range(QUESTIONS):
        listed = generator.sample(words, 12)
        place = generator.randrange(3, len(listed))
        others = generator.sample([word for word in listed if word != listed[place]], CHOICES - 1)
        context = f"{', '.join(listed)}.\n{', '.join(listed[:place])},"
        questions.append(_question(context, listed[place], others, generator))
    return questions


def _arithmetic(texts: Sequence[str], generator: random.Random) -> list[Question]:
    def calculation() -> tuple[str, int]:
        left, right = generator.randint(1, 20), generator.randint(1, 20)
        if generator.random() < 0.5:
            return f"{left} + {right} =", left + right
        return f"{max(left, right)} - {min(left, right)} =", abs(left - right)

    questions = []
    for _ in range(QUESTIONS):
        done = [f"{asked} {result}" for asked, result in (calculation() for _ in range(4))]
        asked, result = calculation()
        near = [number for number in range(max(0, result - 6), result + 7) if number != result]
        wrong = [str(number) for number in generator.sample(near, CHOICES - 1)]
        questions.append(_question("\n".join([*done, asked]), str(result), wrong, generator))
    return questions
