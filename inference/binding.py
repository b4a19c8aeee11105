"""Arguments that a kernel is given once and for all: to take dozens of arrays apart at every call takes 0.1 ms."""

from __future__ import annotations

from typing import Any

from numba.core import types
from numba.experimental import structref

from data.compiled import kernel

_structref: Any = structref  # has no types


@_structref.register
class _BoundType(types.StructRef):
    """Numba's name for `Bound`."""


class Bound(structref.StructRefProxy):
    """What `bind` was given: in a kernel, and only there, `arguments` is the tuple of it."""

    arguments: Any


_make: Any = Bound
_structref.define_boxing(_BoundType, Bound)
_structref.define_constructor(Bound, _BoundType, ["arguments"])


@kernel
def bind(*arguments: Any) -> Bound:
    """What stands for arrays, numbers and tuples of them where a kernel takes a `Bound`."""
    bound: Bound = _make(arguments)
    return bound
