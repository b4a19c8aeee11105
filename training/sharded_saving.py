"""Saving a sharded run: all processes write their parts of a checkpoint, and the main one makes it a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.files import disk_errors
from config.schema import Config
from training.distributed import Process


def write_parts(state: dict[str, Any], config: Config, process: Process) -> tuple[dict[str, Any], Path]:
    """Write the sharded tensors of `state` into a folder beside the checkpoints, still without their name.

    Returns `state` with marks in their places, and the folder. All processes must call it; all raise the same
    `UserError` where one of them cannot write.
    """
    from model.sharded_checkpoint import PARTS, take_apart, write_tensors

    plain, tensors = take_apart(state)
    folder = Path(config.training.checkpoint_dir) / f".model_step_{state['step']}.parts"
    error = None
    if process.is_main:
        try:
            with disk_errors(folder):
                for leftover in folder.parent.glob(".model_step_*.parts"):
                    shutil.rmtree(leftover, ignore_errors=True)
                folder.mkdir(parents=True)
        except UserError as raised:
            error = raised
    process.largest(0)  # the main one has made it
    if process.largest(int(not folder.is_dir())):
        raise error or UserError(
            f"Not every machine sees {folder.parent}/. A sharded run needs training.checkpoint_dir on a shared disk."
        )
    try:
        checksums = write_tensors(tensors, folder)
    except UserError:
        if process.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return {**plain, PARTS: checksums}, folder
