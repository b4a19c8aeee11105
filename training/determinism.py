"""Bit-identical runs: only algorithms whose result does not depend on which thread came first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from config.errors import UserError

REFUSED = "does not have a deterministic implementation"


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Where it is `wanted`, let PyTorch compute the same bits every time, and leave its settings as they were.

    To be entered before the first matrix product on a GPU, whose library settles then how it works. Raises `UserError`
    where an operation cannot be had deterministic.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if REFUSED not in str(error):
            raise
        raise UserError(f"{str(error).partition(REFUSED)[0]}{REFUSED}. Train without --deterministic.") from error
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark
        torch.set_num_threads(threads)


def fix_threads(threads: int | None) -> None:
    """Compute with as many CPU threads as the run did that is resumed, since sums depend on how they are divided."""
    if threads is not None and torch.are_deterministic_algorithms_enabled():
        torch.set_num_threads(threads)
