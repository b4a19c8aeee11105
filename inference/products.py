"""Sums of products of stored weights and float32 vectors, as kernels add them up: in float32, or int8 in whole numbers.

For int8, a vector is written in fixed point by its largest magnitude and cut into three bytes, digits to the base 256
from -128 to 127. AVX-512 VNNI and AVX-VNNI multiply unsigned with signed bytes and add up exactly, so the weights are
raised by 128, and what that adds is taken off at the end. Nothing is rounded but the vector, once, to some 2**-24 of
its largest element, about as much as sums in float32 are; and there are no conversions, which took longer than reading.
Without these instructions int8 is widened to float32.
"""

from __future__ import annotations

from typing import Any, cast

from llvmlite import binding, ir
from numba.core import types
from numba.extending import models, register_model

from inference.vectors import LANES, call, halved, intrinsic, read_numbers, repeated, vector

DIGITS = 3
LARGEST = 127.0 * 2**16  # what the largest magnitude of a vector becomes
EXACT_INT8 = any(binding.get_host_cpu_features().get(feature) for feature in ("avx512vnni", "avxvnni"))

BLOCK = 32  # weights of eight bits that are multiplied at once

_BYTE, _WORD = ir.IntType(8), ir.IntType(32)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_BYTES = ir.VectorType(_BYTE, BLOCK)
_SUMS, _WIDE = ir.VectorType(_WORD, BLOCK // 4), ir.VectorType(ir.IntType(64), BLOCK // 4)


class Bytes(types.Type):
    """Numba's name for 32 bytes in a register."""

    def __init__(self) -> None:
        super().__init__(name="int8x32")


class Sums(types.Type):
    """Numba's name for 8 int32 numbers in a register."""

    def __init__(self) -> None:
        super().__init__(name="int32x8")


@register_model(Bytes)
class _BytesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        cast(Any, super()).__init__(manager, kind, _BYTES)


@register_model(Sums)
class _SumsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        cast(Any, super()).__init__(manager, kind, _SUMS)


three_bytes, three_sums = (cast(Any, types.UniTuple)(part, DIGITS) for part in (Bytes(), Sums()))


def _exact(kind: Any) -> bool:
    return EXACT_INT8 and kind.dtype == types.int8


def _place(builder: Any, address: Any, index: Any, kind: Any) -> Any:
    return builder.inttoptr(builder.add(address, index), kind.as_pointer())


@intrinsic
def exact(context: Any, kind: Any) -> Any:
    """Whether matrices stored as `kind` are multiplied in whole numbers, so that `operand` reads digits; a constant."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(1), int(_exact(signature.args[0])))

    return types.boolean(kind), generate


@intrinsic
def lanes(context: Any, kind: Any) -> Any:
    """How many elements are multiplied at once, a constant."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(64), BLOCK if _exact(signature.args[0]) else LANES)

    return types.int64(kind), generate


@intrinsic
def weights(context: Any, kind: Any, matrix: Any, scale: Any, index: Any) -> Any:
    """The `lanes(kind)` elements of a matrix from `index` on, as `vectors.numbers`, or raised by 128 as bytes."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, matrix, scale, index = arguments
        if not _exact(signature.args[0]):
            return read_numbers(builder, signature.args[0].dtype, matrix, scale, index)
        signed = builder.load(_place(builder, matrix, index, _BYTES))
        signed.align = 1
        return builder.xor(signed, ir.Constant(_BYTES, [-128] * BLOCK))

    return (Bytes() if _exact(kind) else vector)(kind, types.intp, types.intp, types.intp), generate


@intrinsic
def prefetch(context: Any, kind: Any, matrix: Any, index: Any) -> Any:
    """Ask for four times `lanes(kind)` elements of a matrix from `index` on, which may lie past its end."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, matrix, index = arguments
        stored = signature.args[0].dtype
        bits = 4 if stored == types.uint8 else stored.bitwidth
        start = builder.udiv(builder.mul(index, ir.Constant(index.type, bits)), ir.Constant(index.type, 8))
        for line in range(0, (BLOCK if _exact(signature.args[0]) else LANES) * bits // 2, 64):
            place = _place(builder, matrix, builder.add(start, ir.Constant(start.type, line)), _BYTE)
            reading = (ir.Constant(_WORD, flag) for flag in (0, 2, 1))
            call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, *reading])
        return target.get_dummy_value()

    return types.void(kind, types.intp, types.intp), generate


@intrinsic
def no_weights(context: Any, kind: Any) -> Any:
    """The weights 0 as `weights` gives them."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not _exact(signature.args[0]):
            return ir.Constant(_FLOATS, [0.0] * LANES)
        return ir.Constant(_BYTES, [-128] * BLOCK)

    return (Bytes() if _exact(kind) else vector)(kind), generate


@intrinsic
def operand(context: Any, kind: Any, address: Any, index: Any) -> Any:
    """Elements `index` and so on of vectors that are multiplied: float32, or the digits that `cut` has written."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, address, index = arguments
        if not _exact(signature.args[0]):
            return read_numbers(builder, types.float32, address, address, index)
        start = builder.mul(index, ir.Constant(index.type, DIGITS))
        parts = []
        for digit in range(DIGITS):
            place = builder.add(start, ir.Constant(start.type, digit * BLOCK))
            parts.append(builder.load(_place(builder, address, place, _BYTES)))
            parts[-1].align = 1
        return target.make_tuple(builder, three_bytes, parts)

    return (three_bytes if _exact(kind) else vector)(kind, types.intp, types.intp), generate


@intrinsic
def no_products(context: Any, kind: Any) -> Any:
    """Sums of no products yet with a matrix stored as `kind`."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not _exact(signature.args[0]):
            return ir.Constant(_FLOATS, [0.0] * LANES)
        return target.make_tuple(builder, three_sums, [ir.Constant(_SUMS, [0] * (BLOCK // 4))] * DIGITS)

    return (three_sums if _exact(kind) else vector)(kind), generate


@intrinsic
def add_products(context: Any, weight: Any, factor: Any, sofar: Any) -> Any:
    """`sofar` and the products of weights and elements of an operand; in one instruction where there is one."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weight, factor, sofar = arguments
        if signature.args[0] == vector:
            return call(builder, f"llvm.fmuladd.v{LANES}f32", _FLOATS, arguments)
        parts = []
        for digit in range(DIGITS):
            both = builder.extract_value(sofar, digit), weight, builder.extract_value(factor, digit)
            parts.append(call(builder, "llvm.x86.avx512.vpdpbusd.256", _SUMS, both))
        return target.make_tuple(builder, three_sums, parts)

    return sofar(weight, factor, sofar), generate


@intrinsic
def added_up(context: Any, sofar: Any) -> Any:
    """One number: float32 of float32 sums, by halves; float64 of whole ones, which is exact."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (sofar,) = arguments
        if signature.args[0] == vector:
            return halved(builder, sofar, builder.fadd)
        whole: Any = ir.Constant(_WIDE, [0] * (BLOCK // 4))
        for digit in range(DIGITS):
            part = builder.sext(builder.extract_value(sofar, digit), _WIDE)
            whole = builder.add(whole, builder.shl(part, ir.Constant(_WIDE, [8 * digit] * (BLOCK // 4))))
        return builder.sitofp(halved(builder, whole, builder.add), ir.DoubleType())

    return (types.float32 if sofar == vector else types.float64)(sofar), generate


@intrinsic
def larger(context: Any, sofar: Any, values: Any) -> Any:
    """The larger of `sofar` and the magnitude of `values`, for each of 16; NaN if that is not a number."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sofar, values = arguments
        size = call(builder, f"llvm.fabs.v{LANES}f32", values.type, [values])
        return call(builder, f"llvm.maximum.v{LANES}f32", values.type, [sofar, size])

    return vector(vector, vector), generate


@intrinsic
def largest(context: Any, values: Any) -> Any:
    """The largest of 16 numbers; NaN if one is not a number."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def combine(a: Any, b: Any) -> Any:
            return call(builder, f"llvm.maximum.v{a.type.count}f32", a.type, [a, b])

        return halved(builder, arguments[0], combine)

    return types.float32(vector), generate


@intrinsic
def cut(context: Any, values: Any, factor: Any, address: Any, index: Any) -> Any:
    """Write `values` times `factor`, as digits of whole numbers, as elements `index` to `index + 15` of an operand."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, factor, address, index = arguments
        words, bytes_ = ir.VectorType(_WORD, LANES), ir.VectorType(_BYTE, LANES)
        scaled = builder.fmul(values, repeated(builder, factor, LANES))
        rest = builder.fptosi(call(builder, f"llvm.rint.v{LANES}f32", _FLOATS, [scaled]), words)
        block = ir.Constant(index.type, BLOCK)
        inside = builder.urem(index, block)
        start = builder.add(inside, builder.mul(builder.sub(index, inside), ir.Constant(index.type, DIGITS)))
        for digit in range(DIGITS):
            lowest = builder.trunc(rest, bytes_)
            place = builder.add(start, ir.Constant(start.type, digit * BLOCK))
            builder.store(lowest, _place(builder, address, place, bytes_)).align = 1
            rest = builder.ashr(builder.sub(rest, builder.sext(lowest, words)), ir.Constant(words, [8] * LANES))
        return target.get_dummy_value()

    return types.void(vector, types.float32, types.intp, types.intp), generate
