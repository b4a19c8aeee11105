"""The stages that every corpus goes through, as pipeline steps: clean, tokenize, write.

1. `CleanStage`, a share of the raw documents per task: mend, judge by the rules, hash, write as sorted runs.
2. What looks for repetition beyond equal documents (`data.deduplication`), then `SurvivorStage`.
3. `TokenizeStage`, a range of hashes per task: merge the runs, drop duplicates, divide, tokenize, write a shard.
4. `WriteStage`, a token file per task: put it together from the shards.

What stands in the files after a stage is a function of the documents and the settings; which task did it, in which
order and how often, leaves no trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from pydantic import BaseModel

from config.errors import UserError
from config.files import location, write_text
from config.schema import DataConfig
from data.deduplication.selection import Selection, count_trimmed
from data.documents import BadRecord
from data.funnel import Count, Funnel
from data.pipeline.bad_records import write_quarantine
from data.pipeline.batches import count_by, count_dropped, read_batches, text_bytes
from data.pipeline.clean import clean
from data.pipeline.executor import Stage, advance
from data.pipeline.keys import add_keys
from data.pipeline.language import RULE as LANGUAGE
from data.pipeline.language import check_languages, in_other_language
from data.pipeline.rules import apply_rules, length_rules
from data.pipeline.runs import run_writer
from data.pipeline.shards import FilePlan, assemble, write_shard
from data.pipeline.split import HeldOut, decisive, divide
from data.pipeline.survey import Survey, see_dropped, see_kept
from data.tokenization import load_tokenizer
from data.tokenization.protocol import Tokenizer
from data.tokens import TokenFile, token_dtype

if TYPE_CHECKING:
    from data.decontamination.documents import Hit


class CleanReport(BaseModel):
    """What one task of the first stage has to tell: a funnel and a survey per source, decisive split hashes."""

    funnels: list[Funnel]
    surveys: list[Survey]
    hashes: list[int]


class CleanStage(Stage):
    """Raw documents to sorted runs (`00000.arrow`), bad records (`00000.jsonl`) and a report (`00000.json`)."""

    name = "clean"

    def __init__(self, data: DataConfig, folder: Path, evaluation: Path | None = None, most: int | None = None) -> None:
        """`evaluation` is the table of n-grams that documents may not hold; `most` records are read per source."""
        super().__init__()
        self.most = most
        self.data = data
        self.folder = folder
        self.evaluation = evaluation
        check_languages(data.preprocess.language)
        if data.preprocess.quality.enabled:
            from data.quality.rules import prepare

            prepare(data.preprocess.quality)

    def work(self, part: int, parts: int) -> None:
        settings = self.data.preprocess
        rules = length_rules(settings.filter)
        funnels = [Funnel() for _ in self.data.use]
        surveys = [Survey() for _ in self.data.use]
        bad: list[BadRecord] = []
        hits: list[Hit] = []
        hashes = np.empty(0, np.uint64)

        def drop(frame: pl.DataFrame) -> None:
            count_dropped(funnels, frame)
            see_dropped(surveys, frame)

        duplicates = drop if settings.exact_deduplication else None
        with run_writer(self.folder / f"{part:05d}.arrow", duplicates) as runs:
            for frame in read_batches(self.data, part, parts, bad.append, self.most):
                documents = len(frame)
                funnel = funnels[frame["source"][0]]
                funnel.read.add(documents, text_bytes(frame))
                frame, changed, removed = clean(frame, settings.clean)
                funnel.cleaned.add(changed, removed)
                frame, dropped = apply_rules(frame, rules)
                drop(dropped)
                if settings.language.allowed:
                    other = pl.Series(in_other_language(frame["text"], settings.language))
                    drop(frame.filter(other).with_columns(pl.lit(LANGUAGE).alias("rule")))
                    frame = frame.filter(~other)
                if settings.quality.enabled:
                    from data.quality.rules import apply_quality

                    frame, dropped, *trimmed = apply_quality(frame, settings.quality)
                    funnel.trim(*trimmed)
                    drop(dropped)
                if self.evaluation is not None:
                    from data.decontamination.documents import CUT, decontaminate
                    from data.decontamination.evaluation_sets import grams_at

                    result = decontaminate(frame, grams_at(self.evaluation), settings.decontamination)
                    funnel.trim(result.trimmed, result.trimmed_bytes, {CUT: result.passages})
                    drop(result.dropped)
                    hits += result.hits
                    frame = result.kept
                frame = add_keys(frame, self.data.seed)
                hashes = decisive(np.append(hashes, frame["split"].to_numpy()), settings.validation_fraction)
                runs.add(frame)
                advance(documents)
        for record in bad:
            reasons = funnels[self.data.use.index(record.source)].bad
            reasons[record.reason] = reasons.get(record.reason, 0) + record.count
        write_quarantine(self.folder / f"{part:05d}.jsonl", self.data.use, bad)
        if self.evaluation is not None:
            from data.decontamination.hits import write_hits

            write_hits(self.folder / f"{part:05d}.hits", hits)
        report = CleanReport(funnels=funnels, surveys=surveys, hashes=hashes.tolist())
        write_text(self.folder / f"{part:05d}.json", report.model_dump_json())


class SurvivorReport(BaseModel):
    """The decisive split hashes of the documents of one range that are left."""

    hashes: list[int]


class SurvivorStage(Stage):
    """After near-duplicates and repeated lines are known: who may be held out (`00000.json`)."""

    name = "survivors"

    def __init__(self, selection: Selection, fraction: float, folder: Path) -> None:
        super().__init__()
        self.selection = selection
        self.fraction = fraction
        self.folder = folder

    def work(self, part: int, parts: int) -> None:
        hashes = self.selection.read(part, parts).kept["split"].to_numpy()
        report = SurvivorReport(hashes=decisive(hashes, self.fraction).tolist())
        write_text(self.folder / f"{part:05d}.json", report.model_dump_json())
        advance(len(hashes))


class ShardReport(BaseModel):
    """What one task of `TokenizeStage` has to tell: duplicates dropped and documents kept, per source."""

    funnels: list[Funnel]
    surveys: list[Survey]


class TokenizeStage(Stage):
    """Sorted runs to shards (`00000/train.bin` ...) and a report (`00000.json`)."""

    name = "tokenize"

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        split: HeldOut,
        selection: Selection,
        surveyed: float,
        folder: Path,
    ) -> None:
        """`surveyed` is the share of the documents that the survey looks at."""
        super().__init__()
        self.surveyed = surveyed
        self.data = data
        self.tokenizer_fingerprint = tokenizer.fingerprint
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.split = split
        self.selection = selection
        self.folder = folder

    def work(self, part: int, parts: int) -> None:
        tokenizer = _tokenizer(self.data.tokenizer_dir, self.data.tokenizer.encoder, self.tokenizer_fingerprint)
        funnels = [Funnel() for _ in self.data.use]
        surveys = [Survey() for _ in self.data.use]
        selected = self.selection.read(part, parts)
        frame = selected.kept
        count_dropped(funnels, selected.dropped)
        see_dropped(surveys, selected.dropped)
        see_kept(surveys, frame, self.surveyed)
        count_trimmed(funnels, selected, self.data.preprocess.line_deduplication.unit)
        for source, documents, size in count_by(frame, "source"):
            funnels[source].kept = Count(documents=documents, bytes=size)
        train, validation = divide(frame, self.split)
        batch, dtype = self.data.preprocess.batch_documents, np.dtype(self.dtype)
        shard = self.folder / f"{part:05d}"
        write_shard(shard, "train", train, tokenizer, dtype, batch, advance)
        write_shard(shard, "val", validation, tokenizer, dtype, batch, advance)
        write_text(self.folder / f"{part:05d}.json", ShardReport(funnels=funnels, surveys=surveys).model_dump_json())


@lru_cache(maxsize=1)
def _tokenizer(directory: str, encoder: str, fingerprint: str) -> Tokenizer:
    """The tokenizer, once per process, since its check against the reference library takes a moment."""
    tokenizer = load_tokenizer(location(directory), encoder)
    if tokenizer.fingerprint != fingerprint:
        raise UserError(f"The tokenizer in {directory} was changed during preprocessing. Type the same command again.")
    return tokenizer


class WriteStage(Stage):
    """Shards to token files, each with its description for the manifest (`00000.json`)."""

    name = "write"

    def __init__(self, plans: Sequence[FilePlan], dtype: str, output: Path, folder: Path) -> None:
        super().__init__()
        self.plans = list(plans)
        self.dtype = dtype
        self.output = output
        self.folder = folder

    def work(self, part: int, parts: int) -> None:
        file: TokenFile = assemble(self.plans[part], self.output, np.dtype(self.dtype).itemsize, advance)
        write_text(self.folder / f"{part:05d}.json", file.model_dump_json())
