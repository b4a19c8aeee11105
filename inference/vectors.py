"""Vectors of 16 float32 numbers for kernels in numba, which has none: loads that widen the stored type, and sums.

A sum of products here has one order, fixed by the code: that of a kernel which computes one row and of another which
computes four at once is the same, to the last bit. LLVM splits a vector where a processor's registers are narrower.

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


def _function(builder: Any, kind: Any, name: str) -> Any:
    return cast(Any, cgutils).get_or_insert_function(builder.module, kind, name)


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


def _loader(half: int) -> Callable[..., Any]:
    def typed(context: Any, kind: Any, weight: Any, scale: Any, index: Any) -> Any:
        def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, weight, scale, index = arguments
            stored = signature.args[0].dtype
            if stored == types.uint8:
                return _scaled_nibbles(builder, weight, scale, index, half)
            index = builder.add(index, ir.Constant(index.type, half * LANES))
            if stored == types.float32:
                return _read(builder, weight, index, 4, ir.FloatType(), LANES)
            if stored == types.uint16:
                return _bfloat16(builder, _read(builder, weight, index, 2, ir.IntType(16), LANES))
            bytes_ = _read(builder, weight, index, 1, ir.IntType(8), LANES)
            return builder.sitofp(builder.sext(bytes_, _INTEGERS), _FLOATS)

        return vector(kind, types.intp, types.intp, types.intp), generate

    return typed


def _scaled_nibbles(builder: Any, weight: Any, scale: Any, index: Any, half: int) -> Any:
    """The lower or upper four bits of the 16 bytes of the group that begins at element `index`, less 8, scaled."""
    group = builder.udiv(index, ir.Constant(index.type, GROUP))
    bits = builder.zext(
        _read(builder, weight, builder.mul(group, ir.Constant(index.type, LANES)), 1, ir.IntType(8), LANES), _INTEGERS
    )
    bits = builder.lshr(bits, _splat(4)) if half else builder.and_(bits, _splat(15))
    # A float32 from 2**23 on has its integer in its lowest bits, so this is cheaper than a conversion.
    value = builder.bitcast(builder.or_(bits, _splat(0x4B000000)), _FLOATS)
    value = builder.fsub(value, ir.Constant(_FLOATS, [2.0**23 + 8] * LANES))
    zero = ir.Constant(ir.IntType(32), 0)
    factor = builder.extract_element(_read(builder, scale, group, 2, ir.IntType(16), 1), zero)
    first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), _widened(builder, factor), zero)
    return builder.fmul(value, builder.shuffle_vector(first, first, _splat(0)))


@intrinsic
def lower(context: Any, kind: Any, weight: Any, scale: Any, index: Any) -> Any:
    """Elements `index` to `index + 15` of the matrix at `weight`, which stores numbers as the array `kind` does.

    float32; uint16, the bits of bfloat16; int8; or uint8, two numbers of four bits each, less 8 and times the bfloat16
    at `scale` of their group, whose 16 bytes hold its first half in their lower bits and its second in their upper.
    """
    return _loader(0)(context, kind, weight, scale, index)


@intrinsic
def upper(context: Any, kind: Any, weight: Any, scale: Any, index: Any) -> Any:
    """Elements `index + 16` to `index + 31`; as `lower`."""
    return _loader(1)(context, kind, weight, scale, index)


@intrinsic
def zeros(context: Any) -> Any:
    """The vector 0."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(_FLOATS, [0.0] * LANES)

    return vector(), generate


@intrinsic
def multiply_add(context: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`, in one instruction where the processor has it."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        return builder.call(_function(builder, kind, f"llvm.fmuladd.v{LANES}f32"), arguments)

    return vector(vector, vector, vector), generate


@intrinsic
def total(context: Any, value: Any) -> Any:
    """The sum of a vector, by halves."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,), width = arguments, LANES
        while width > 1:
            width //= 2
            halves = [ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(n, n + width))) for n in (0, width)]
            low, high = (builder.shuffle_vector(value, value, half) for half in halves)
            value = builder.fadd(low, high)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return types.float32(vector), generate


@intrinsic
def number(context: Any, kind: Any, address: Any, index: Any) -> Any:
    """Element `index` of the memory at `address`, which stores float32 or the bits of bfloat16 as the array `kind`."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, address, index = arguments
        zero = ir.Constant(ir.IntType(32), 0)
        if signature.args[0].dtype == types.float32:
            return builder.extract_element(_read(builder, address, index, 4, ir.FloatType(), 1), zero)
        bits = builder.extract_element(_read(builder, address, index, 2, ir.IntType(16), 1), zero)
        return _widened(builder, bits)

    return types.float32(kind, types.intp, types.intp), generate


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
def prefetch(context: Any, kind: Any, weight: Any, index: Any) -> Any:
    """Ask for four times 32 elements from element `index` of the matrix at `weight` on, which may lie past its end."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, weight, index = arguments
        stored = signature.args[0].dtype
        bits = 4 if stored == types.uint8 else stored.bitwidth
        start = builder.add(
            weight, builder.udiv(builder.mul(index, ir.Constant(index.type, bits)), ir.Constant(index.type, 8))
        )
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        ask = _function(builder, function, "llvm.prefetch.p0")
        for line in range(0, 4 * GROUP * bits // 8, 64):
            address = builder.inttoptr(builder.add(start, ir.Constant(start.type, line)), byte)
            builder.call(ask, [address, *(ir.Constant(word, flag) for flag in (0, 2, 1))])
        return target.get_dummy_value()

    return types.void(kind, types.intp, types.intp), generate


@intrinsic
def add_atomically(context: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at `address`, in one order for all threads; returns what was there before."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, value = arguments
        return builder.atomic_rmw("add", builder.inttoptr(address, ir.IntType(64).as_pointer()), value, "seq_cst")

    return types.int64(types.intp, types.int64), generate
