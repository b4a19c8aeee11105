"""One run of preprocessing in its folder: the stages one after the other, and the finished token folder as `output`."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from config.errors import UserError
from config.files import atomic_write, remove_directory, write_text
from config.schema import DataConfig
from data.deduplication.selection import Selection
from data.deduplication.steps import find_near_duplicates, find_repeated_lines
from data.funnel import Funnel, total
from data.pipeline.bad_records import first_harmful, merge_quarantine
from data.pipeline.executor import Executor, Stage, run_stage
from data.pipeline.mixture import plan_passes, source_tokens
from data.pipeline.page import page
from data.pipeline.preparation import recorded_settings
from data.pipeline.progress import stage_shares
from data.pipeline.report import SPLITS, markdown
from data.pipeline.runs import Runs, Scale
from data.pipeline.shards import FilePlan, Passes, plan_files
from data.pipeline.split import HeldOut, choose_split
from data.pipeline.stages import (
    CleanReport,
    CleanStage,
    MergeStage,
    ShardReport,
    SurvivorReport,
    SurvivorStage,
    TokenizeStage,
    WriteStage,
)
from data.pipeline.survey import KEPT_SAMPLES, Survey
from data.quarantine import check_bad_fraction
from data.tokens import MANIFEST, Split, TokenFile, TokensManifest, token_dtype

if TYPE_CHECKING:
    from data.tokenization.protocol import Tokenizer

TASKS_TO_A_PART = 4
QUARANTINE = "quarantine.jsonl"
REPORT = "report.md"
PAGE = "report.html"
HITS = "contamination.jsonl"
OUTPUT = "output"
EVALUATION = "evaluation.npz"

Show = Callable[[str, int, int], None]


class Account(NamedTuple):
    """What the stages tell of each source: the documents counted, and some of them seen."""

    funnels: list[Funnel]
    surveys: list[Survey]

    def add(self, report: CleanReport | ShardReport) -> None:
        """Enter what one task tells."""
        for funnel, counted in zip(self.funnels, report.funnels):
            funnel.add(counted)
        for survey, seen in zip(self.surveys, report.surveys):
            survey.add(seen)


def parts_for(size: int, tasks: int, scale: Scale = Scale()) -> tuple[int, int]:
    """Into how many parts a corpus of `size` bytes is cut, of which each is a task of the later stages.

    And into how many ranges each of them, so that one can be held in memory.
    """
    ranges = max(tasks, math.ceil(size / scale.range_bytes))
    parts = min(ranges, max(scale.parts, math.ceil(tasks / TASKS_TO_A_PART)))
    return parts, math.ceil(ranges / parts)


@dataclass(frozen=True)
class Work:
    """One run: its settings and the folder of its unfinished results."""

    data: DataConfig
    tokenizer: Tokenizer
    documents: int
    folder: Path
    workers: Executor
    show: Show
    sample: int | None = None
    """Records to read, of all sources together; None for all there are."""
    scale: Scale = Scale()

    def run(self, identity: str) -> TokensManifest:
        """Do what is left to do of the stages; leaves the complete token folder as `output`."""
        account, hashes = self._clean()
        funnels = account.funnels
        parts, ranges = parts_for(_remaining(funnels)[1], self.data.preprocess.tasks, self.scale)
        selection = Selection(self._merge(funnels, parts), self.data.preprocess, ranges)
        selection, hashes = self._deduplicate(selection, funnels, hashes, parts)
        held_out = choose_split(hashes, self.data.preprocess.validation_fraction)
        shards = self._tokenize(account, held_out, selection, parts)
        mixed = plan_passes(self.data.preprocess.mixture, self.data.use, shards)
        passes: dict[Split, Passes] = {"train": mixed, "val": Passes.once(len(funnels))}
        sources = dict(zip(self.data.use, source_tokens(shards, mixed)))
        for funnel, source in zip(funnels, sources.values()):
            assert funnel.kept.bytes == source.available.bytes + source.val.bytes, (funnel, source)
        files = self._write(shards, passes)
        manifest = TokensManifest(
            fingerprint=identity,
            dtype=self.dtype,
            splits={name: tuple(file for plan, file in files if plan.split == name) for name in SPLITS},
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            vocab_size=self.tokenizer.vocab_size,
            end_of_text_id=self.tokenizer.end_of_text_id,
            seed=self.data.seed,
            validation="tails" if held_out.threshold is None else "documents",
            config=recorded_settings(self.data),
            funnel=dict(zip(self.data.use, funnels)),
            sources=sources,
            contaminated=self._merge_hits(),
        )
        for split in SPLITS:
            assert manifest.tokens(split) == sum(getattr(source, split).tokens for source in sources.values())
        self._publish(manifest, dict(zip(self.data.use, account.surveys)))
        return manifest

    def _clean(self) -> tuple[Account, NDArray[np.uint64]]:
        """The first stage: the account of every source, duplicates between tasks still in it; decisive split hashes."""
        settings, folder = self.data.preprocess, self.folder / "clean"
        evaluation = self.folder / EVALUATION if settings.decontamination.sets else None
        if evaluation is not None and not evaluation.exists():
            from data.decontamination.evaluation_sets import build_grams

            build_grams(settings.decontamination).save(evaluation)
        most = None if self.sample is None else math.ceil(self.sample / len(self.data.use) / settings.tasks)
        self._stage(
            CleanStage(self.data, folder, self._runs.folder, evaluation, most, self.scale.run_bytes),
            settings.tasks,
            self.documents,
        )
        account = Account([Funnel() for _ in self.data.use], [Survey() for _ in self.data.use])
        hashes = []
        for text in _reports(folder, settings.tasks):
            report = CleanReport.model_validate_json(text)
            account.add(report)
            hashes.append(np.array(report.hashes, np.uint64))
        parts = [folder / f"{part:05d}.jsonl" for part in range(settings.tasks)]
        merge_quarantine(parts, self.folder / QUARANTINE)
        for funnel in account.funnels:
            funnel.sort()
        self._check_readable(account.funnels)
        _check_something_left(account.funnels)
        return account, np.concatenate(hashes)

    @property
    def _runs(self) -> Runs:
        """The files of the first stage."""
        return Runs(self.folder / "runs", self.data.preprocess.tasks)

    @property
    def _merged(self) -> bool:
        """Whether these are too many to be read by the later stages."""
        return self.data.preprocess.tasks > self.scale.direct_files

    def _merge(self, funnels: list[Funnel], parts: int) -> Runs:
        """The sorted files for the later stages."""
        if not self._merged:
            return self._runs
        merged = Runs(self.folder / "merged", parts, by_part=True)
        stage = MergeStage(self._runs, merged.folder, self.scale.run_bytes)
        self._stage(stage, parts, _remaining(funnels)[0])
        remove_directory(self._runs.folder)
        return merged

    def _deduplicate(
        self, selection: Selection, funnels: list[Funnel], hashes: NDArray[np.uint64], parts: int
    ) -> tuple[Selection, NDArray[np.uint64]]:
        """The stages between: what is left of the corpus, and the decisive split hashes of that."""
        settings, (documents, size) = self.data.preprocess, _remaining(funnels)

        def run(stage: Stage, tasks: int) -> None:
            self._stage(stage, tasks, documents)

        if settings.near_deduplication.enabled:
            selection = find_near_duplicates(selection, parts, documents, self.folder / "near", run)
        if settings.line_deduplication.unit != "off":
            selection = find_repeated_lines(selection, parts, size, self.folder / "lines", run)
        if selection.near is None and selection.lines is None:
            return selection, hashes
        folder = self.folder / "survivors"
        run(SurvivorStage(selection, settings.validation_fraction, folder), parts)
        reports = [SurvivorReport.model_validate_json(text) for text in _reports(folder, parts)]
        return selection, np.array([value for report in reports for value in report.hashes], np.uint64)

    def _tokenize(self, account: Account, split: HeldOut, selection: Selection, parts: int) -> list[Path]:
        """The shards in order; completes the account."""
        folder, funnels = self.folder / "shards", account.funnels
        documents, _ = _remaining(funnels)
        surveyed = KEPT_SAMPLES / total(funnels).read.documents
        stage = TokenizeStage(self.data, self.tokenizer, split, selection, surveyed, folder)
        self._stage(stage, parts, documents)
        for text in _reports(folder, parts):
            account.add(ShardReport.model_validate_json(text))
        for funnel in funnels:
            funnel.sort()
            funnel.check()
        return [folder / f"{part:05d}" for part in range(parts)]

    def _merge_hits(self) -> dict[str, int]:
        """List what was found of evaluation sets; the number of documents for each."""
        if not self.data.preprocess.decontamination.sets:
            return {}
        from data.decontamination.hits import merge_hits

        tasks = self.data.preprocess.tasks
        parts = [self.folder / "clean" / f"{part:05d}.hits" for part in range(tasks)]
        found = merge_hits(parts, self.data.use, self.folder / HITS)
        return {name: found.get(name, 0) for name in self.data.preprocess.decontamination.sets}

    def _write(self, shards: list[Path], passes: dict[Split, Passes]) -> list[tuple[FilePlan, TokenFile]]:
        """The token files, as planned and as they came out."""
        limit, folder = self.data.preprocess.max_file_tokens, self.folder / "files"
        plans = [plan for split in SPLITS for plan in plan_files(shards, split, passes[split], limit)]
        documents = sum(piece.last - piece.first for plan in plans for piece in plan.pieces)
        self._stage(WriteStage(plans, self.dtype, self.folder / OUTPUT, folder), len(plans), documents)
        return list(zip(plans, [TokenFile.model_validate_json(text) for text in _reports(folder, len(plans))]))

    def _publish(self, manifest: TokensManifest, surveys: dict[str, Survey]) -> None:
        """Complete the output folder: nothing in it but what belongs there, and the manifest last."""
        output = self.folder / OUTPUT
        wanted = {name for files in manifest.splits.values() for file in files for name in file.parts}
        for path in output.iterdir():
            if path.name not in wanted:
                path.unlink()
        for name in (QUARANTINE, HITS):
            if (self.folder / name).exists():
                with (self.folder / name).open("rb") as source, atomic_write(output / name) as target:
                    shutil.copyfileobj(source, target)
        write_text(output / REPORT, markdown(manifest))
        write_text(output / PAGE, page(manifest, surveys))
        write_text(output / MANIFEST, manifest.model_dump_json(indent=2) + "\n")

    def _stage(self, stage: Stage, tasks: int, documents: int) -> None:
        """Run one stage and show how far the whole is while it goes."""
        name = str(stage.name)
        shares = stage_shares(self.data.preprocess, self._merged)
        begun = sum(share for other, share in list(shares.items())[: list(shares).index(name)])
        done = 0

        def on_progress(more: int) -> None:
            nonlocal done
            done += more
            fraction = (begun + shares[name] * min(1.0, done / max(1, documents))) / sum(shares.values())
            self.show(name, round(fraction * self.documents), self.documents)

        on_progress(0)
        run_stage(stage, tasks, self.workers, self.folder / "log" / name, on_progress)
        on_progress(documents)

    def _check_readable(self, funnels: list[Funnel]) -> None:
        """`UserError` if more than `max_bad_fraction` of a source's records are bad."""
        limit, path = self.data.preprocess.max_bad_fraction, self.folder / QUARANTINE
        for name, funnel in zip(self.data.use, funnels):
            if self.sample is None and not funnel.read.documents and funnel.bad.get("left-out"):
                raise UserError(
                    f"data.sources.{name}.keep leaves out all of its {funnel.bad['left-out']:,} rows. "
                    f"Look at data.sources.{name}.keep and keep_column."
                )
            check_bad_fraction(name, funnel.read.documents, funnel.bad, first_harmful(path, name, 3), limit, path)

    @property
    def dtype(self) -> Literal["uint16", "uint32"]:
        """How ids are stored."""
        return token_dtype(self.tokenizer.vocab_size)


def _reports(folder: Path, parts: int) -> Iterator[bytes]:
    """What the tasks of a stage have to tell, one after the other: all at once may be much."""
    for part in range(parts):
        yield (folder / f"{part:05d}.json").read_bytes()


def _remaining(funnels: list[Funnel]) -> tuple[int, int]:
    """Documents and bytes that no rule has dropped so far."""
    whole = total(funnels)
    return (
        whole.read.documents - sum(count.documents for count in whole.dropped.values()),
        whole.read.bytes
        - whole.cleaned.bytes
        - whole.trimmed.bytes
        - sum(count.bytes for count in whole.dropped.values()),
    )


def _check_something_left(funnels: list[Funnel]) -> None:
    """`UserError` that names the rule to blame if no document is left."""
    whole = total(funnels)
    if _remaining(funnels)[0]:
        return
    if not whole.read.documents:
        raise UserError("The sources in data.use hold no documents. Add text, or name other sources in data.use.")
    rule, count = max(whole.dropped.items(), key=lambda item: item[1].documents)
    raise UserError(
        f"None of the {whole.read.documents:,} documents is left: the rule {rule!r} dropped {count.documents:,}. "
        "Change that rule in data.preprocess, or add text."
    )
