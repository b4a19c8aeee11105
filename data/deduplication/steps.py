"""The stages between the first and the tokens, in their order: what they find to remove goes into a selection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from config.files import remove_directory
from data.deduplication.lines import LineStage, RepeatedLineStage, line_cuts
from data.deduplication.near import BucketStage, ClusterStage, SignatureStage, bucket_cuts
from data.deduplication.selection import Selection
from data.pipeline.executor import Stage

RunStage = Callable[[Stage, int], None]
"""Runs a stage in so many tasks."""


def find_near_duplicates(selection: Selection, ranges: int, documents: int, folder: Path, run: RunStage) -> Selection:
    """`selection` without near-duplicates.

    Args:
        ranges: into how many key ranges the corpus is cut.
        documents: at least as many as there are.
        folder: for what the stages write; all but the result is deleted at the end.
    """
    from data.deduplication.signatures import prepare

    config = selection.settings.near_deduplication
    prepare(config)
    cuts = bucket_cuts(documents, config)
    signed, pairs, removals = folder / "signatures", folder / "pairs", folder / "removals"
    run(SignatureStage(selection, config, cuts, signed), ranges)
    run(BucketStage(config, ranges, cuts, signed, pairs), config.num_buckets * cuts)
    run(ClusterStage(config.num_buckets, ranges, cuts, signed, pairs, removals), 1)
    for finished in (signed, pairs):
        remove_directory(finished)
    return replace(selection, near=removals)


def find_repeated_lines(selection: Selection, ranges: int, size: int, folder: Path, run: RunStage) -> Selection:
    """`selection` without repeated lines, of a corpus of at most `size` bytes; the rest as above."""
    config = selection.settings.line_deduplication
    cuts = line_cuts(size, config)
    hashed, places = folder / "hashed", folder / "places"
    run(LineStage(selection, config, cuts, hashed), ranges)
    run(RepeatedLineStage(config, ranges, hashed, places), cuts)
    remove_directory(hashed)
    return replace(selection, lines=places, line_cuts=cuts)
