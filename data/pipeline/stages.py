"""The stages that every corpus goes through, as pipeline steps: clean, tokenize, write.

1. `CleanStage`, a share of the raw documents per task: mend, judge by the rules, hash, write in the order of hashes.
2. `MergeStage`, a part of the corpus per task, where there are many: their files become one for each part.
3. What looks for repetition beyond equal documents (`data.deduplication`), then `SurvivorStage`.
4. `TokenizeStage`, a part of the corpus per task: drop duplicates, divide, tokenize, write a shard.
5. `WriteStage`, a token file per task: put it together from the shards.

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
from numpy.typing import NDArray
from pydantic import BaseModel

from config.errors import UserError
from config.files import location, write_text
from config.schema import DataConfig
from data.deduplication.selection import Selected, Selection, count_trimmed
from data.documents import BadRecord
from data.funnel import Funnel
from data.pipeline.bad_records import write_quarantine
from data.pipeline.batches import count_by, count_dropped, read_batches, text_bytes
from data.pipeline.clean import clean
from data.pipeline.executor import Stage, advance
from data.pipeline.keys import add_keys, key_range
from data.pipeline.language import RULE as LANGUAGE
from data.pipeline.language import check_languages, in_other_language
from data.pipeline.rules import apply_rules, length_rules
from data.pipeline.runs import RUN_BYTES, RunReader, Runs, run_writer
from data.pipeline.shards import FilePlan, assemble, shard_writer
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
    """Raw documents to sorted files (`00000.arrow` in `runs`), bad records (`00000.jsonl`), a report (`00000.json`)."""

    name = "clean"

    def __init__(
        self,
        data: DataConfig,
        folder: Path,
        runs: Path,
        evaluation: Path | None = None,
        most: int | None = None,
        run_bytes: int = RUN_BYTES,
    ) -> None:
        """`evaluation` is the table of n-grams that documents may not hold; `most` records are read per source."""
        super().__init__()
        self.runs = runs
        self.run_bytes = run_bytes
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
        with run_writer(self.runs / f"{part:05d}.arrow", duplicates, self.run_bytes) as runs:
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


class MergeStage(Stage):
    """The sorted files of many tasks to one for each part of the corpus (`00000.arrow`)."""

    name = "merge"

    def __init__(self, runs: Runs, folder: Path, run_bytes: int = RUN_BYTES) -> None:
        super().__init__()
        self.runs = runs
        self.folder = folder
        self.run_bytes = run_bytes

    def work(self, part: int, parts: int) -> None:
        with run_writer(self.folder / f"{part:05d}.arrow", None, self.run_bytes) as merged:
            for path in self.runs.of(part):
                with RunReader([path]) as reader:
                    for frame in reader.frames(*key_range(part, parts)):
                        merged.add(frame)
                        advance(len(frame))


class SurvivorReport(BaseModel):
    """The decisive split hashes of the documents of one part that are left."""

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
        hashes = np.empty(0, np.uint64)
        for split in map(_split_hashes, self.selection.read(part, parts)):
            hashes = decisive(np.append(hashes, split), self.fraction)
            advance(len(split))
        report = SurvivorReport(hashes=hashes.tolist())
        write_text(self.folder / f"{part:05d}.json", report.model_dump_json())


def _split_hashes(selected: Selected) -> NDArray[np.uint64]:
    return selected.kept["split"].to_numpy()


class ShardReport(BaseModel):
    """What one task of `TokenizeStage` has to tell: duplicates dropped and documents kept, per source."""

    funnels: list[Funnel]
    surveys: list[Survey]


class TokenizeStage(Stage):
    """Sorted files to shards (`00000/train.bin` ...) and a report (`00000.json`)."""

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
        report = ShardReport(funnels=[Funnel() for _ in self.data.use], surveys=[Survey() for _ in self.data.use])
        shard = self.folder / f"{part:05d}"
        how = (tokenizer, np.dtype(self.dtype), self.data.preprocess.batch_documents, advance)
        with shard_writer(shard, "train", *how) as add_train, shard_writer(shard, "val", *how) as add_validation:
            for selected in self.selection.read(part, parts):
                self._account(report, selected)
                train, validation = divide(selected.kept, self.split)
                del selected  # or two ranges would be in memory at once
                add_train(train)
                add_validation(validation)
                del train, validation
        write_text(self.folder / f"{part:05d}.json", report.model_dump_json())

    def _account(self, report: ShardReport, selected: Selected) -> None:
        """Enter what was dropped and kept of a range."""
        funnels, surveys = report.funnels, report.surveys
        count_dropped(funnels, selected.dropped)
        see_dropped(surveys, selected.dropped)
        see_kept(surveys, selected.kept, self.surveyed)
        count_trimmed(funnels, selected, self.data.preprocess.line_deduplication.unit)
        for source, documents, size in count_by(selected.kept, "source"):
            funnels[source].kept.add(documents, size)


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
