"""Runs that start themselves again: after a process or a machine is lost, from the latest checkpoint of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from config.errors import UserError
from config.files import exclusive
from config.load import load_config, read_setting
from model.checkpoint import checkpoint_run_name
from model.checkpoint_folder import LATEST, latest_checkpoint, list_checkpoints
from training.setup import run_name

AUTO = "auto"
PATIENCE = 60.0  # seconds for the writer of a run that was killed to finish its last file
_stores: list[object] = []  # the one that the first process serves goes on until it ends


def own_checkpoint(recipes: Sequence[Path], overrides: Sequence[str]) -> str | None:
    """What `--resume auto` means: the latest checkpoint of the run `training.run_name`, or None where it has none yet.

    The first process looks, and tells the others of its group. Raises `UserError` where the run has no name.
    """
    name = read_setting("training.run_name", recipes, overrides)
    if name is None:
        raise UserError("--resume auto goes on with the run of one name: set training.run_name=NAME.")
    directory = Path(read_setting("training.checkpoint_dir", recipes, overrides))
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return _newest(directory, str(name))

    def choose() -> str | None:
        busy = f"Another run is writing to {directory}/. Wait for its end, or set another training.checkpoint_dir."
        with exclusive(directory / LATEST, busy, PATIENCE):
            return _newest(directory, str(name))

    return _agree(choose)


def named(recipes: Sequence[Path], settings: Sequence[str], resume: str | None, nodes: int) -> list[str]:
    """`settings` of a run that is to start itself again: with a name, if it has none.

    Raises `UserError` for a run on several machines without one, which each would name differently, and where it is to
    go on from anything but its own latest checkpoint.
    """
    if resume not in (None, AUTO):
        raise UserError(
            f"--max-restarts goes on from the latest checkpoint of the run, not from --resume {resume}. "
            "Leave --resume out, and set training.run_name to the name of the run."
        )
    if read_setting("training.run_name", recipes, settings) is not None:
        return list(settings)
    if nodes > 1:
        raise UserError(
            "--max-restarts on several machines needs a name that all of them know: training.run_name=NAME."
        )
    return [*settings, f"training.run_name={run_name(load_config(recipes, settings))}"]


def _newest(directory: Path, name: str) -> str | None:
    if not list_checkpoints(directory):
        return None
    path = latest_checkpoint(directory)
    return str(path) if checkpoint_run_name(path) == name else None


def _agree(choose: Callable[[], str | None]) -> str | None:
    """What `choose` returns in the first process of the group, in all of them."""
    from torch.distributed.rendezvous import rendezvous

    store, rank, _ = next(iter(rendezvous("env://")))
    _stores.append(store)
    if rank == 0:
        store.set("quern/resume", choose() or "")
    return store.get("quern/resume").decode() or None
