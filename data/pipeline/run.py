"""From the downloaded sources to `corpus/tokens/`: the three stages one after the other, and the manifest last.

Unfinished work lies in `corpus/.tokens.partial/<key>/`, where the key stands for everything the work depends on: the
same command continues there after an interruption, and work for other settings is thrown away. `corpus/tokens/` keeps
what it has until the very end, when the finished folder takes its place.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from config.errors import UserError
from config.files import disk_errors, exclusive, recover_directory, replace_directory, write_text
from config.schema import DataConfig
from data.funnel import Funnel, total
from data.pipeline.bad_records import first_harmful, merge_quarantine
from data.pipeline.executor import Executor, Stage, executor_for, run_stage
from data.pipeline.preparation import fingerprint, present, raw_manifests, recorded_settings
from data.pipeline.report import SPLITS, markdown
from data.pipeline.shards import FilePlan, plan_files
from data.pipeline.split import Split, choose_split
from data.pipeline.stages import CleanReport, CleanStage, ShardReport, TokenizeStage, WriteStage
from data.quarantine import check_bad_fraction
from data.tokenization import load_tokenizer
from data.tokens import MANIFEST, TokenFile, TokensManifest, token_dtype

if TYPE_CHECKING:
    from data.tokenization.protocol import Tokenizer

RANGE_BYTES = 64 << 20  # of text that a task of the second stage holds in memory
QUARANTINE = "quarantine.jsonl"
REPORT = "report.md"
OUTPUT = "output"
SHARES = {"clean": 0.3, "tokenize": 0.6, "write": 0.1}  # of the running time, for the progress bar

Show = Callable[[str, int, int], None]


def preprocess(data: DataConfig, *, force: bool, show: Show) -> tuple[TokensManifest, bool]:
    """Bring `data.tokens_dir` up to date; its manifest, and whether there was anything to do.

    Args:
        force: begin anew even if the files are there.
        show: called with the name of the running stage, and how many documents' worth of how many is done.

    Raises `UserError` for what the user can put right; then the old token files are as they were.
    """
    data = data.model_copy(update={"use": list(dict.fromkeys(data.use))})
    tokens_dir = Path(os.path.abspath(data.tokens_dir))
    partial = tokens_dir.with_name(f".{tokens_dir.name}.partial")
    with exclusive(tokens_dir, f"Another process is writing {tokens_dir} now. Wait until it is done."):
        recover_directory(tokens_dir)
        raw = raw_manifests(data)
        tokenizer = load_tokenizer(Path(data.tokenizer_dir), data.tokenizer.encoder)
        identity = fingerprint(data, raw, tokenizer)
        manifest = present(tokens_dir, identity)
        if manifest is not None and not force:
            shutil.rmtree(partial, ignore_errors=True)
            return manifest, False
        key = hashlib.sha256(f"{identity} {data.preprocess.tasks}".encode()).hexdigest()[:16]
        for other in partial.iterdir() if partial.is_dir() else ():
            if force or other.name != key:
                shutil.rmtree(other)
        documents = sum(source.documents or 0 for source in raw)
        with executor_for(data) as workers, disk_errors(partial / key):
            work = _Work(data, tokenizer, documents, partial / key, workers, show)
            if not (work.folder / OUTPUT).exists():
                shutil.rmtree(work.folder / "log" / WriteStage.name, ignore_errors=True)
            manifest = work.run(identity)
            replace_directory(work.folder / OUTPUT, tokens_dir)
        shutil.rmtree(partial)
        return manifest, True


@dataclass(frozen=True)
class _Work:
    """One run: its settings and the folder of its unfinished results."""

    data: DataConfig
    tokenizer: Tokenizer
    documents: int
    folder: Path
    workers: Executor
    show: Show

    def run(self, identity: str) -> TokensManifest:
        """Do what is left to do of the three stages; leaves the complete token folder as `output`."""
        funnels, split = self._clean()
        shards = self._tokenize(funnels, split)
        files = self._write(shards, total(funnels).kept.documents)
        manifest = TokensManifest(
            fingerprint=identity,
            dtype=self.dtype,
            splits={name: tuple(file for plan, file in files if plan.split == name) for name in SPLITS},
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            vocab_size=self.tokenizer.vocab_size,
            end_of_text_id=self.tokenizer.end_of_text_id,
            seed=self.data.seed,
            validation="tails" if split.threshold is None else "documents",
            config=recorded_settings(self.data),
            funnel=dict(zip(self.data.use, funnels)),
        )
        assert sum(manifest.bytes(split) for split in SPLITS) == total(funnels).kept.bytes
        self._publish(manifest)
        return manifest

    def _clean(self) -> tuple[list[Funnel], Split]:
        """The first stage: the funnel of every source, duplicates between tasks still in it, and the split."""
        settings, folder = self.data.preprocess, self.folder / "clean"
        self._stage(CleanStage(self.data, folder), settings.tasks, self.documents)
        reports = [CleanReport.model_validate_json(text) for text in _reports(folder, settings.tasks)]
        funnels = [total(each) for each in zip(*[report.funnels for report in reports])]
        parts = [folder / f"{part:05d}.jsonl" for part in range(settings.tasks)]
        merge_quarantine(parts, self.folder / QUARANTINE)
        self._check_readable(funnels)
        _check_something_left(funnels)
        hashes = np.array([value for report in reports for value in report.lowest], np.uint64)
        return funnels, choose_split(hashes, settings.validation_fraction)

    def _tokenize(self, funnels: list[Funnel], split: Split) -> list[Path]:
        """The second stage: its shards in order; completes the funnels."""
        tasks, folder = self.data.preprocess.tasks, self.folder / "shards"
        documents, size = _remaining(funnels)
        parts = max(tasks, math.ceil(size / RANGE_BYTES))
        runs = [self.folder / "clean" / f"{part:05d}.arrow" for part in range(tasks)]
        self._stage(TokenizeStage(self.data, self.tokenizer, split, runs, folder), parts, documents)
        for text in _reports(folder, parts):
            for funnel, more in zip(funnels, ShardReport.model_validate_json(text).funnels):
                funnel.add(more)
        for funnel in funnels:
            funnel.check()
        return [folder / f"{part:05d}" for part in range(parts)]

    def _write(self, shards: list[Path], documents: int) -> list[tuple[FilePlan, TokenFile]]:
        """The third stage: the token files, as planned and as they came out."""
        limit, folder = self.data.preprocess.max_file_tokens, self.folder / "files"
        plans = [plan for split in SPLITS for plan in plan_files(shards, split, limit)]
        self._stage(WriteStage(plans, self.dtype, self.folder / OUTPUT, folder), len(plans), documents)
        return list(zip(plans, [TokenFile.model_validate_json(text) for text in _reports(folder, len(plans))]))

    def _publish(self, manifest: TokensManifest) -> None:
        """Complete the output folder: nothing in it but what belongs there, and the manifest last."""
        output = self.folder / OUTPUT
        wanted = {name for files in manifest.splits.values() for file in files for name in (file.name, file.index_name)}
        for path in output.iterdir():
            if path.name not in wanted:
                path.unlink()
        if (self.folder / QUARANTINE).exists():
            shutil.copyfile(self.folder / QUARANTINE, output / QUARANTINE)
        write_text(output / REPORT, markdown(manifest))
        write_text(output / MANIFEST, manifest.model_dump_json(indent=2) + "\n")

    def _stage(self, stage: Stage, tasks: int, documents: int) -> None:
        """Run one stage and show how far the whole is while it goes."""
        name = str(stage.name)
        begun = sum(share for other, share in list(SHARES.items())[: list(SHARES).index(name)])
        done = 0

        def on_progress(more: int) -> None:
            nonlocal done
            done += more
            fraction = begun + SHARES[name] * min(1.0, done / max(1, documents))
            self.show(name, round(fraction * self.documents), self.documents)

        on_progress(0)
        run_stage(stage, tasks, self.workers, self.folder / "log" / name, on_progress)
        on_progress(documents)

    def _check_readable(self, funnels: list[Funnel]) -> None:
        """`UserError` if more than `max_bad_fraction` of a source's records are bad."""
        limit, path = self.data.preprocess.max_bad_fraction, self.folder / QUARANTINE
        for name, funnel in zip(self.data.use, funnels):
            check_bad_fraction(name, funnel.read.documents, funnel.bad, first_harmful(path, name, 3), limit, path)

    @property
    def dtype(self) -> Literal["uint16", "uint32"]:
        """How ids are stored."""
        return token_dtype(self.tokenizer.vocab_size)


def _reports(folder: Path, parts: int) -> list[bytes]:
    return [(folder / f"{part:05d}.json").read_bytes() for part in range(parts)]


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
