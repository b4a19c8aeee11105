"""Vectors of 16 float32 numbers for kernels in numba, which has none: loads that widen the stored type, and sums.

A sum of products here has one order, fixed by the code: that of a kernel which computes one row and of another which
computes several at once is the same, to the last bit. LLVM splits a vector where a processor's registers are narrower.

Memory is named by its address, so that one compiled kernel takes any number of matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from llvmlite import ir
from numba import extending
from numba.core import cgutils, types
from numba.extending import models, register_model

LANES = 16
GROUP = 2 * LANES  # weights of four bits that share a scale

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTEGERS = ir.VectorType(ir.IntType(32), LANES)


class Vector(types.Type):
    """Numba's name for 16 float32 numbers in registers."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


vector = Vector()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        cast(Any, super()).__init__(manager, kind, _FLOATS)


def intrinsic(typed: Callable[..., Any]) -> Any:
    """Let kernels call what `typed` describes: a signature, and the code that LLVM is given for it."""
    return extending.intrinsic(typed)


def call(builder: Any, name: str, returned: Any, arguments: Any) -> Any:
    """Call an instruction that LLVM knows by name."""
    kind = ir.FunctionType(returned, [argument.type for argument in arguments])
    return builder.call(cast(Any, cgutils).get_or_insert_function(builder.module, kind, name), arguments)


def repeated(builder: Any, value: Any, count: int) -> Any:
    """A vector of a number."""
    zero = ir.Constant(ir.IntType(32), 0)
    first = builder.insert_element(ir.Constant(ir.VectorType(value.type, count), ir.Undefined), value, zero)
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(ir.IntType(32), count), [0] * count))


def halved(builder: Any, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """One number of a vector: its halves are combined, and theirs, and so on."""
    width = value.type.count
    while width > 1:
        width //= 2
        halves = [ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(n, n + width))) for n in (0, width)]
        value = combine(*(builder.shuffle_vector(value, value, half) for half in halves))
    return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))


def _splat(value: int) -> ir.Constant:
    return ir.Constant(_INTEGERS, [value] * LANES)


def _read(builder: Any, address: Any, index: Any, width: int, element: Any, count: int) -> Any:
    """`count` elements of `width` bytes from the `index`-th on, as a vector; aligned to one element."""
    start = builder.add(address, builder.mul(index, ir.Constant(index.type, width)))
    value = builder.load(builder.inttoptr(start, ir.VectorType(element, count).as_pointer()))
    value.align = width
    return value


def _bfloat16(builder: Any, bits: Any) -> Any:
    """The upper half of a float32 is a bfloat16."""
    return builder.bitcast(builder.shl(builder.zext(bits, _INTEGERS), _splat(16)), _FLOATS)


def _scaled_nibbles(builder: Any, weight: Any, scale: Any, index: Any) -> Any:
    """The half of a group that begins at `index`, in the lower or the upper bits of 16 bytes; less 8, scaled."""

    def constant(value: int) -> Any:
        return ir.Constant(index.type, value)

    group, half = builder.udiv(index, constant(GROUP)), builder.and_(builder.udiv(index, constant(LANES)), constant(1))
    pairs = builder.zext(
        _read(builder, weight, builder.mul(group, constant(LANES)), 1, ir.IntType(8), LANES), _INTEGERS
    )
    shift = builder.trunc(builder.mul(half, constant(4)), ir.IntType(32))
    bits = builder.and_(builder.lshr(pairs, repeated(builder, shift, LANES)), _splat(15))
    # A float32 from 2**23 on has its integer in its lowest bits, so this is cheaper than a conversion.
    value = builder.bitcast(builder.or_(bits, _splat(0x4B000000)), _FLOATS)
    value = builder.fsub(value, ir.Constant(_FLOATS, [2.0**23 + 8] * LANES))
    factor = builder.extract_element(_read(builder, scale, group, 2, ir.IntType(16), 1), ir.Constant(ir.IntType(32), 0))
    return builder.fmul(value, repeated(builder, _widened(builder, factor), LANES))


def read_numbers(builder: Any, stored: Any, matrix: Any, scale: Any, index: Any) -> Any:
    """Elements `index` to `index + 15` of the matrix at `matrix`, which stores numbers of the type `stored`.

    float32; uint16, the bits of bfloat16; int8; or uint8, two numbers of four bits each, less 8 and times the bfloat16
    at `scale` of their group, whose 16 bytes hold its first half in their lower bits and its second in their upper.
    `index` is a multiple of 16 there.
    """
    if stored == types.uint8:
        return _scaled_nibbles(builder, matrix, scale, index)
    if stored == types.float32:
        return _read(builder, matrix, index, 4, ir.FloatType(), LANES)
    if stored == types.uint16:
        return _bfloat16(builder, _read(builder, matrix, index, 2, ir.IntType(16), LANES))
    bytes_ = _read(builder, matrix, index, 1, ir.IntType(8), LANES)
    return builder.sitofp(builder.sext(bytes_, _INTEGERS), _FLOATS)


@intrinsic
def numbers(context: Any, kind: Any, address: Any, index: Any) -> Any:
    """Elements `index` to `index + 15` of what is at `address`, stored as in the array `kind`; see `read_numbers`."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, address, index = arguments
        return read_numbers(builder, signature.args[0].dtype, address, address, index)

    return vector(kind, types.intp, types.intp), generate


@intrinsic
def number(context: Any, kind: Any, address: Any, index: Any) -> Any:
    """Element `index` of the memory at `address`, stored as in the array `kind`: a float, or the bits of bfloat16."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, address, index = arguments
        zero, stored = ir.Constant(ir.IntType(32), 0), signature.args[0].dtype
        if stored == types.uint16:
            return _widened(
                builder, builder.extract_element(_read(builder, address, index, 2, ir.IntType(16), 1), zero)
            )
        element = ir.FloatType() if stored == types.float32 else ir.DoubleType()
        return builder.extract_element(_read(builder, address, index, stored.bitwidth // 8, element, 1), zero)

    return (types.float64 if kind.dtype == types.float64 else types.float32)(kind, types.intp, types.intp), generate


@intrinsic
def filled(context: Any, value: Any) -> Any:
    """16 times a float32 number."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return repeated(builder, arguments[0], LANES)

    return vector(types.float32), generate


@intrinsic
def put_numbers(context: Any, address: Any, index: Any, values: Any) -> Any:
    """Write elements `index` to `index + 15` of the float32 numbers at `address`."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, index, values = arguments
        start = builder.add(address, builder.mul(index, ir.Constant(index.type, 4)))
        builder.store(values, builder.inttoptr(start, _FLOATS.as_pointer())).align = 4
        return target.get_dummy_value()

    return types.void(types.intp, types.intp, vector), generate


@intrinsic
def put(context: Any, address: Any, index: Any, value: Any) -> Any:
    """Write element `index` of the float32 numbers at `address`."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, index, value = arguments
        start = builder.add(address, builder.mul(index, ir.Constant(index.type, 4)))
        builder.store(value, builder.inttoptr(start, ir.FloatType().as_pointer())).align = 4
        return target.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32), generate


def _widened(builder: Any, bits: Any) -> Any:
    wide = builder.shl(builder.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
    return builder.bitcast(wide, ir.FloatType())


@intrinsic
def widened(context: Any, bits: Any) -> Any:
    """A number of a cache as float32: itself, or the bfloat16 of 16 bits."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] == types.float32:
            return arguments[0]
        return _widened(builder, arguments[0])

    return types.float32(bits), generate


@intrinsic
def narrowed(context: Any, kind: Any, value: Any) -> Any:
    """A float32 number as the array `kind` stores it: itself, or the 16 bits of the nearest bfloat16 (ties to even)."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0].dtype == types.float32:
            return arguments[1]
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[1], word)
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), ir.IntType(16))

    return kind.dtype(kind, types.float32), generate


@intrinsic
def power_of_two(context: Any, exponent: Any) -> Any:
    """2 to the power of an int32 between -126 and 127, as float32."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.shl(builder.add(arguments[0], ir.Constant(word, 127)), ir.Constant(word, 23))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def add_atomically(context: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at `address`, in one order for all threads; returns what was there before."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, value = arguments
        return builder.atomic_rmw("add", builder.inttoptr(address, ir.IntType(64).as_pointer()), value, "seq_cst")

    return types.int64(types.intp, types.int64), generate


@intrinsic
def look(context: Any, address: Any) -> Any:
    """The int64 at `address`, as another thread left it, with all that it had written before."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(types.intp), generate


@intrinsic
def change(context: Any, address: Any, before: Any, after: Any) -> Any:
    """Put `after` in the place of the int64 `before` at `address`; whether that was there."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, before, after = arguments
        place = builder.inttoptr(address, ir.IntType(64).as_pointer())
        return builder.extract_value(builder.cmpxchg(place, before, after, "seq_cst", "seq_cst"), 1)

    return types.boolean(types.intp, types.int64, types.int64), generate
