"""The stages between the first and the tokens, in their order: what they find to remove goes into a selection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from config.files import remove_directory
from data.deduplication.lines import LINE, LineStage, Places, RepeatedLineStage, line_cuts
from data.deduplication.near import BucketStage, ClusterStage, SignatureStage, bucket_cuts
from data.deduplication.selection import Selection
from data.deduplication.tables import cuts_for, gather_starts, read_starts
from data.pipeline.executor import Stage

RunStage = Callable[[Stage, int], None]
"""Runs a stage in so many tasks."""


def find_near_duplicates(selection: Selection, parts: int, documents: int, folder: Path, run: RunStage) -> Selection:
    """`selection` without near-duplicates.

    Args:
        parts: into how many parts the corpus is cut.
        documents: at least as many as there are.
        folder: for what the stages write; all but the result is deleted at the end.
    """
    from data.deduplication.signatures import prepare

    config = selection.settings.near_deduplication
    prepare(config)
    cuts = bucket_cuts(documents, config)
    signed, starts = folder / "signatures", folder / "signatures.starts"
    pairs, removals = folder / "pairs", folder / "removals"
    run(SignatureStage(selection, config, cuts, signed), parts)
    gather_starts(signed, parts, starts)
    run(BucketStage(config, parts, cuts, signed, starts, pairs), config.num_buckets * cuts)
    run(ClusterStage(config.num_buckets, parts, cuts, signed, pairs, removals), 1)
    for finished in (signed, pairs):
        remove_directory(finished)
    return replace(selection, near=removals)


def find_repeated_lines(selection: Selection, parts: int, size: int, folder: Path, run: RunStage) -> Selection:
    """`selection` without repeated lines, of a corpus of at most `size` bytes; the rest as above."""
    config = selection.settings.line_deduplication
    cuts = line_cuts(size, config)
    hashed, starts, places = folder / "hashed", folder / "hashed.starts", folder / "places"
    run(LineStage(selection, config, cuts, hashed), parts)
    gather_starts(hashed, parts, starts)
    ends = read_starts(starts, parts, 0, cuts)
    tasks = min(cuts, cuts_for(sum(last for _, last in ends), LINE.itemsize))
    run(RepeatedLineStage(config, parts, cuts, hashed, starts, places), tasks)
    of_parts = Places(places, tasks, folder / "places.starts")
    gather_starts(places, tasks, of_parts.starts)
    remove_directory(hashed)
    return replace(selection, lines=of_parts)
