"""From the downloaded sources to `corpus/tokens/`: what is there, what is left to do, and the manifest last.

Unfinished work lies in `corpus/.tokens.partial/<key>/`, where the key stands for everything the work depends on: the
same command continues there after an interruption, and work for other settings is thrown away. `corpus/tokens/` keeps
what it has until the very end, when the finished folder takes its place.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from config.files import (
    disk_errors,
    exclusive,
    is_remote,
    location,
    recover_directory,
    remove_directory,
    replace_directory,
    write_text,
)
from config.schema import DataConfig
from data.pipeline.executor import executor_for
from data.pipeline.preparation import expected_documents, fingerprint, present, raw_manifests
from data.pipeline.runs import Scale
from data.pipeline.stages import WriteStage
from data.pipeline.work import OUTPUT, PAGE, Show, Work
from data.tokenization import load_tokenizer
from data.tokens import TokensManifest

DRY_RUN_PAGE = "dry-run.html"
LAYOUT = 2  # of the unfinished work; raised whenever it changes, so that none is continued by another version


def preprocess(data: DataConfig, *, force: bool, show: Show, scale: Scale = Scale()) -> tuple[TokensManifest, bool]:
    """Bring `data.tokens_dir` up to date; its manifest, and whether there was anything to do.

    Args:
        force: begin anew even if the files are there.
        show: called with the name of the running stage, and how many documents' worth of how many is done.
        scale: from what size on text is sorted in several steps; makes no difference to the files.

    Raises `UserError` for what the user can put right; then the old token files are as they were.
    """
    data = data.model_copy(update={"use": list(dict.fromkeys(data.use))})
    tokens_dir = location(data.tokens_dir).absolute()
    partial = tokens_dir.with_name(f".{tokens_dir.name}.partial")
    with exclusive(tokens_dir, f"Another process is writing {tokens_dir} now. Wait until it is done."):
        recover_directory(tokens_dir)
        raw = raw_manifests(data)
        tokenizer = load_tokenizer(location(data.tokenizer_dir), data.tokenizer.encoder)
        identity = fingerprint(data, raw, tokenizer)
        manifest = present(tokens_dir, identity)
        if manifest is not None and not force:
            remove_directory(partial)
            return manifest, False
        key = hashlib.sha256(f"{identity} {data.preprocess.tasks} {LAYOUT}".encode()).hexdigest()[:16]
        for other in partial.iterdir() if partial.is_dir() else ():
            if force or other.name != key:
                remove_directory(other)
        documents = expected_documents(raw)
        with executor_for(data) as workers, disk_errors(partial / key):
            work = Work(data, tokenizer, documents, partial / key, workers, show, scale=scale)
            if not (work.folder / OUTPUT).exists():
                remove_directory(work.folder / "log" / WriteStage.name)
            manifest = work.run(identity)
            replace_directory(work.folder / OUTPUT, tokens_dir)
        remove_directory(partial)
        return manifest, True


def dry_run(data: DataConfig, records: int, show: Show) -> tuple[TokensManifest, Path]:
    """Preprocess about `records` records from the beginnings of the files, and keep nothing of it but its page.

    The manifest that the token files would have, and where the page lies. Raises `UserError` as `preprocess` does.
    """
    data = data.model_copy(update={"use": list(dict.fromkeys(data.use)), "executor": "local"})
    tokens_dir = location(data.tokens_dir).absolute()
    scratch = None if is_remote(tokens_dir) else tokens_dir.parent
    files = min(len(manifest.files) for manifest in raw_manifests(data))
    tasks = max(1, min(files, data.preprocess.tasks))  # so that each finds a file to read from in every source
    few = {"tasks": tasks, "mixture": data.preprocess.mixture.off()}  # shares of a sample would say nothing
    data = data.model_copy(update={"preprocess": data.preprocess.model_copy(update=few)})
    tokenizer = load_tokenizer(location(data.tokenizer_dir), data.tokenizer.encoder)
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    with (
        disk_errors(tokens_dir),
        tempfile.TemporaryDirectory(prefix=".dry-run-", dir=scratch) as name,
        executor_for(data) as workers,
    ):
        work = Work(data, tokenizer, records, Path(name), workers, show, sample=records)
        manifest = work.run("dry run")
        path = location(data.tokens_dir).parent / DRY_RUN_PAGE
        write_text(path, (work.folder / OUTPUT / PAGE).read_text(encoding="utf-8"))
    return manifest, path
