"""The typed form of deduplication, decontamination and mixture; what each key means stands in the YAML."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from config.section import OffIsAWord, PositiveInt, Rate, Section


class NearDeduplicationConfig(Section):
    """MinHash (`data.deduplication`), with the names of datatrove's parameters."""

    enabled: bool
    n_grams: PositiveInt
    num_buckets: PositiveInt
    hashes_per_bucket: PositiveInt
    precision: Literal[32, 64]


class LineDeduplicationConfig(Section):
    """Lines or paragraphs that stand in several places of the corpus (`data.deduplication.lines`)."""

    unit: Annotated[Literal["off", "lines", "paragraphs"], OffIsAWord]
    min_characters: PositiveInt
    min_occurrences: Annotated[int, Field(ge=2)]


class EvaluationSetConfig(Section):
    """Files of one evaluation set, and the columns that hold its questions, answers and texts."""

    paths: Annotated[list[str], Field(min_length=1)]
    text_columns: Annotated[list[str], Field(min_length=1)] = ["text"]


class DecontaminationConfig(Section):
    """What the training text may not share with evaluation sets (`data.decontamination`)."""

    sets: Annotated[dict[str, EvaluationSetConfig], Field(max_length=63)]
    n_grams: PositiveInt
    action: Literal["drop", "cut"]
    window_characters: Annotated[int, Field(ge=0)]
    min_piece_characters: PositiveInt
    max_pieces: PositiveInt


class MixtureConfig(Section):
    """How much of each source the training part holds (`data.pipeline.mixture`)."""

    weights: dict[str, Annotated[float, Field(ge=0.0)]]
    epochs: dict[str, Annotated[float, Field(ge=0.0)]]
    tokens: PositiveInt | None
    max_epochs: Rate

    @model_validator(mode="after")
    def _combinations(self) -> MixtureConfig:
        if self.weights and self.epochs:
            raise ValueError("weights: set weights or epochs, not both; the other one to {}")
        if self.weights and not sum(self.weights.values()):
            raise ValueError("weights: at least one source needs a weight above 0")
        if self.epochs and not sum(self.epochs.values()):
            raise ValueError("epochs: at least one source needs more than 0 epochs")
        if self.tokens is not None and not self.weights:
            raise ValueError("tokens: a number of tokens needs weights, such as {web: 0.7, books: 0.3}")
        return self

    def off(self) -> MixtureConfig:
        """The same without a mixture: every source once."""
        return self.model_copy(update={"weights": {}, "epochs": {}, "tokens": None})

    def check(self, use: list[str]) -> None:
        """`ValueError` unless the mixture, where there is one, names just the sources in `use`."""
        for key, asked in (("weights", self.weights), ("epochs", self.epochs)):
            unknown = [name for name in asked if name not in use]
            missing = [name for name in use if asked and name not in asked]
            if unknown:
                raise ValueError(f"preprocess.mixture.{key}: {unknown[0]!r} is not in data.use ({', '.join(use)})")
            if missing:
                raise ValueError(
                    f"preprocess.mixture.{key}: {missing[0]!r}, which is in data.use, has none; 0 leaves it out"
                )
