"""Copies by stores that pass the caches by, compiled with numba.

They take half the time of ordinary ones: no line is read before it is overwritten. And nothing that a computation
beside them needs is pushed out of the caches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from data.compiled import kernel

LINE = 64  # bytes of a line of the cache


@intrinsic
def stream(_context: Any, to: Any, source: Any, lines: Any) -> Any:
    """Copy lines of the cache from one address to another, both multiples of `LINE`."""

    def code(_compiler: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        line = ir.VectorType(ir.IntType(64), LINE // 8)
        written, read = (builder.inttoptr(address, line.as_pointer()) for address in arguments[:2])
        streaming = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        with cgutils.for_range(builder, arguments[2]) as loop:
            loaded = builder.load(builder.gep(read, [loop.index]), align=LINE)
            stored = builder.store(loaded, builder.gep(written, [loop.index]), align=LINE)
            stored.set_metadata("nontemporal", streaming)
        builder.fence("seq_cst")

    return types.void(to, source, lines), code


@kernel
def copy_pieces(pieces: Any, meeting: Any, backwards: bool) -> None:
    """Copy `pieces`, (to, source, lines) each, up to where the thread that begins at the other end has come.

    `meeting` is how many pieces have been begun from the front, and where those from the back begin. Should both take
    the same one, it is copied twice.
    """
    for step in range(len(pieces)):
        place = len(pieces) - 1 - step if backwards else step
        if (place < meeting[0]) if backwards else (place >= meeting[1]):
            return
        meeting[1 if backwards else 0] = place if backwards else place + 1
        stream(pieces[place, 0], pieces[place, 1], pieces[place, 2])  # type: ignore[call-arg]


def prepare() -> None:
    """Have the machine code at hand."""
    copy_pieces(np.empty((0, 3), np.int64), np.zeros(2, np.int64), False)
