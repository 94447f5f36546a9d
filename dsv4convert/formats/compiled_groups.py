"""One group of 32 elements as one vector: the inner steps of the compiled codecs, built for LLVM.

numba cannot say that input and output do not overlap, so LLVM must check it for every group of 32 or give
up on vectors; loops of 32 then run two to four times slower than the memory. Each function here loads a
group, works on all its lanes, and stores once. LLVM splits the vectors to fit the processor, so the same
code serves SSE, AVX2, AVX-512 and NEON. No operation carries a fast-math flag: each rounds as numpy's.

numba's cache does not notice changes to this file: touch compiled.py after one.

Offsets count elements of the flat, contiguous array before them; nothing is checked here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from dsv4convert.formats.base import GROUP
from dsv4convert.formats.e4m3 import MIN_SUBNORMAL_EXPONENT, NAN_CODE, PLACED_EXPONENT


def _intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba's decorator, typed; kernels call the result without its first argument, the typing context."""
    return cast(Callable[..., Any], intrinsic(function))


_I1, _I8, _I16, _I32, _F32 = ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_PAIRS = GROUP // 2
_MANTISSA_BITS = 23
_E4M3_PLACE = _MANTISSA_BITS - 3
_E2M1_PLACE = _MANTISSA_BITS - 1
_CODE_2_EXPONENT = 127 - 1  # e2m1's code 2, exponent field 1, is 1.0
_MAGNITUDE = 0x7FFF_FFFF
_EXPONENT = 0x7F80_0000


class _Lanes:
    """The instructions of one intrinsic, on vectors of ``length`` lanes."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        self.context = context
        self.builder = builder
        self.signature = signature
        self.arguments = arguments

    def pointer(self, position: int, vector: Any) -> Any:
        """Address of a vector in the array argument ``position``, at the offset that follows it."""
        array = self.context.make_array(self.signature.args[position])(
            self.context, self.builder, self.arguments[position]
        )
        element = self.builder.gep(array.data, [self.arguments[position + 1]])
        return self.builder.bitcast(element, vector.as_pointer())

    def load(self, position: int, kind: Any, length: int = GROUP) -> Any:
        return self.builder.load(self.pointer(position, ir.VectorType(kind, length)), align=1)

    def store(self, value: Any, position: int) -> None:
        self.builder.store(value, self.pointer(position, value.type), align=1)

    def splat(self, scalar: Any, length: int = GROUP) -> Any:
        vector = ir.VectorType(scalar.type, length)
        one = self.builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, _I32(0))
        return self.builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, length), [0] * length))

    def shuffle(self, first: Any, second: Any, order: list[int]) -> Any:
        return self.builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_I32, len(order)), order))

    def reduce(self, name: str, value: Any) -> Any:
        """One of LLVM's vector reductions."""
        scalar = value.type.element
        function = cgutils.get_or_insert_function(
            self.builder.module,
            ir.FunctionType(scalar, [value.type]),
            f"llvm.vector.reduce.{name}.v{value.type.count}i{scalar.width}",
        )
        return self.builder.call(function, [value])

    def count(self, flags: Any) -> Any:
        """How many of 32 flags are set, as a 32-bit integer."""
        return self.builder.ctpop(self.builder.bitcast(flags, _I32))

    def nibbles(self, position: int) -> tuple[Any, Any]:
        """The low and the high nibbles of 16 packed bytes."""
        packed = self.load(position, _I8, _PAIRS)
        low = self.builder.and_(packed, constant(packed, 0xF))
        return low, self.builder.lshr(packed, constant(packed, 4))

    def e4m3_magnitudes(self, codes: Any) -> Any:
        """Magnitudes of 32 e4m3 codes, widened to 32 bits; subnormal codes by conversion."""
        b = self.builder
        magnitude = b.and_(codes, constant(codes, NAN_CODE))
        bits = b.shl(magnitude, constant(codes, _E4M3_PLACE))
        bits = b.add(bits, constant(codes, PLACED_EXPONENT << _MANTISSA_BITS))
        normal = b.bitcast(bits, ir.VectorType(_F32, GROUP))
        subnormal = b.sitofp(magnitude, normal.type)
        subnormal = b.fmul(subnormal, constant(normal, 2.0**MIN_SUBNORMAL_EXPONENT))
        return b.select(b.icmp_unsigned("<", magnitude, constant(codes, 8)), subnormal, normal)

    def e2m1_magnitudes(self, codes: Any) -> Any:
        """Magnitudes of 32 e2m1 codes, widened to 32 bits."""
        b = self.builder
        magnitude = b.and_(codes, constant(codes, 7))
        # Code 1, the only subnormal, is 0.5: the exponent below code 2's, with an empty mantissa.
        one = b.icmp_unsigned("==", magnitude, constant(codes, 1))
        bits = b.shl(b.sub(magnitude, b.zext(one, codes.type)), constant(codes, _E2M1_PLACE))
        bits = b.add(bits, constant(codes, _CODE_2_EXPONENT << _MANTISSA_BITS))
        zero = b.icmp_unsigned("==", magnitude, constant(codes, 0))
        return b.bitcast(b.select(zero, constant(codes, 0), bits), ir.VectorType(_F32, GROUP))

    def store_levels(self, levels: Any, negative: Any, position: int) -> None:
        """Store 32 levels as int8, with their signs."""
        b = self.builder
        signed = b.select(negative, b.neg(levels), levels)
        self.store(b.trunc(signed, ir.VectorType(_I8, GROUP)), position)

    def levels_by_multiplier(self, magnitudes: Any, multiplier: Any) -> Any:
        """trunc(magnitude * multiplier + 1/2); the multipliers keep every product away from the halves."""
        b = self.builder
        scaled = b.fmul(magnitudes, self.splat(multiplier))
        return b.fptosi(b.fadd(scaled, constant(scaled, 0.5)), ir.VectorType(_I32, GROUP))

    def floats(self, position: int) -> Any:
        """32 values as float32: float32 as they are, or bfloat16 bits widened."""
        if self.signature.args[position].dtype == types.float32:
            return self.load(position, _F32)
        bits = self.builder.zext(self.load(position, _I16), ir.VectorType(_I32, GROUP))
        bits = self.builder.shl(bits, constant(bits, 16))
        return self.builder.bitcast(bits, ir.VectorType(_F32, GROUP))

    def magnitude_bits(self, values: Any) -> Any:
        bits = self.builder.bitcast(values, ir.VectorType(_I32, GROUP))
        return self.builder.and_(bits, constant(bits, _MAGNITUDE))


def constant(like: Any, value: float) -> Any:
    """A vector of the type of ``like`` with one value in all lanes."""
    return ir.Constant(like.type, [value] * like.type.count)


_ALTERNATE = [lane for k in range(_PAIRS) for lane in (k, _PAIRS + k)]


def _group_function(result: Any, emit: Callable[[_Lanes], Any]) -> Callable[..., tuple[Any, Any]]:
    """Make what numba's `intrinsic` wants out of a function that emits the instructions."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = emit(_Lanes(context, builder, signature, arguments))
        return context.get_dummy_value() if value is None else value

    return lambda *arguments: (result(*arguments), codegen)


@_intrinsic
def repack_group(typing: Any, packed: Any, start: Any, out: Any, where: Any) -> Any:
    """Write the 16 code bytes of an MXFP4 block from 16 packed bytes."""

    def emit(v: _Lanes) -> None:
        low, high = v.nibbles(0)
        # Element 2i is in low[i], element 2i+1 in high[i]; the first half of both belongs in low nibbles.
        first = v.shuffle(low, high, _ALTERNATE[:_PAIRS])
        second = v.shuffle(low, high, [lane + _PAIRS // 2 for lane in _ALTERNATE[:_PAIRS]])
        v.store(v.builder.or_(first, v.builder.shl(second, constant(second, 4))), 2)

    return _group_function(types.void, emit)(packed, start, out, where)


@_intrinsic
def fp4_to_fp8_group(typing: Any, packed: Any, start: Any, base: Any, out: Any, where: Any) -> Any:
    """Write 32 e4m3 codes; ``base`` (uint8) is what the exponents of the e2m1 codes are counted from."""

    def emit(v: _Lanes) -> None:
        b = v.builder
        low, high = v.nibbles(0)
        codes = v.shuffle(low, high, _ALTERNATE)
        magnitude = b.and_(codes, constant(codes, 7))
        one = b.zext(b.icmp_unsigned("==", magnitude, constant(codes, 1)), codes.type)
        bits = b.add(b.shl(b.sub(magnitude, one), constant(codes, 2)), v.splat(v.arguments[2]))
        bits = b.select(b.icmp_unsigned("==", magnitude, constant(codes, 0)), constant(codes, 0), bits)
        sign = b.shl(b.and_(codes, constant(codes, 8)), constant(codes, 4))
        v.store(b.or_(bits, sign), 3)

    return _group_function(types.void, emit)(packed, start, base, out, where)


@_intrinsic
def largest_fp8(typing: Any, weight: Any, start: Any) -> Any:
    """Largest e4m3 code of 32 without the signs, as uint8."""

    def emit(v: _Lanes) -> Any:
        codes = v.load(0, _I8)
        return v.reduce("umax", v.builder.and_(codes, constant(codes, NAN_CODE)))

    return _group_function(types.uint8, emit)(weight, start)


@_intrinsic
def largest_fp4(typing: Any, packed: Any, start: Any) -> Any:
    """Largest e2m1 code of 32 without the signs, as uint8."""

    def emit(v: _Lanes) -> Any:
        b = v.builder
        low, high = v.nibbles(0)
        low, high = b.and_(low, constant(low, 7)), b.and_(high, constant(high, 7))
        return v.reduce("umax", b.select(b.icmp_unsigned(">", low, high), low, high))

    return _group_function(types.uint8, emit)(packed, start)


@_intrinsic
def largest_bits(typing: Any, values: Any, start: Any) -> Any:
    """Largest magnitude of 32 float32 or bfloat16 as float32 bits; NaN is larger than infinity."""

    def emit(v: _Lanes) -> Any:
        return v.reduce("umax", v.magnitude_bits(v.floats(0)))

    return _group_function(types.uint32, emit)(values, start)


@_intrinsic
def fp8_levels(typing: Any, weight: Any, start: Any, multiplier: Any, out: Any, where: Any) -> Any:
    """Write the 32 levels of a Q8_0 block from e4m3 codes."""

    def emit(v: _Lanes) -> None:
        codes = v.builder.zext(v.load(0, _I8), ir.VectorType(_I32, GROUP))
        levels = v.levels_by_multiplier(v.e4m3_magnitudes(codes), v.arguments[2])
        v.store_levels(levels, v.builder.icmp_unsigned(">", codes, constant(codes, NAN_CODE)), 3)

    return _group_function(types.void, emit)(weight, start, multiplier, out, where)


@_intrinsic
def fp4_levels(typing: Any, packed: Any, start: Any, multiplier: Any, out: Any, where: Any) -> Any:
    """Write the 32 levels of a Q8_0 block from 16 packed bytes."""

    def emit(v: _Lanes) -> None:
        codes = v.builder.zext(v.shuffle(*v.nibbles(0), _ALTERNATE), ir.VectorType(_I32, GROUP))
        levels = v.levels_by_multiplier(v.e2m1_magnitudes(codes), v.arguments[2])
        v.store_levels(levels, v.builder.icmp_unsigned(">", codes, constant(codes, 7)), 3)

    return _group_function(types.void, emit)(packed, start, multiplier, out, where)


@_intrinsic
def float_levels(typing: Any, values: Any, start: Any, inverse: Any, out: Any, where: Any) -> Any:
    """Write the 32 levels of a Q8_0 block from float32 or bfloat16: x * inverse, half away from zero."""

    def emit(v: _Lanes) -> None:
        b = v.builder
        scaled = b.fmul(v.floats(0), v.splat(v.arguments[2]))
        magnitude = b.bitcast(v.magnitude_bits(scaled), scaled.type)
        whole = b.fptosi(magnitude, ir.VectorType(_I32, GROUP))
        rest = b.fsub(magnitude, b.sitofp(whole, scaled.type))
        up = b.zext(b.fcmp_ordered(">=", rest, constant(rest, 0.5)), whole.type)
        v.store_levels(b.add(whole, up), b.fcmp_ordered("<", scaled, constant(scaled, 0.0)), 3)

    return _group_function(types.void, emit)(values, start, inverse, out, where)


# What `encode_group` returns: how many values were rounded, and above that whether a code is 0.5 or 1.5.
HAS_FINE_CODE = 1 << 8


@_intrinsic
def encode_group(typing: Any, values: Any, start: Any, inverse: Any, out: Any, where: Any) -> Any:
    """Write the 16 code bytes of an MXFP4 block: x * inverse to the nearest e2m1 code, ties to even.

    A code is k + 2e for a magnitude in [2^e, 2^(e+1)), e = 0 below 1, where k counts steps of 2^(e-1).
    Adding 2^(22+e), whose last place is such a step, makes the processor round and leaves k in the lowest
    bits. Returns how many values were rounded, plus `HAS_FINE_CODE` if a code is 1 or 3.
    """

    def emit(v: _Lanes) -> Any:
        b = v.builder
        source = v.floats(0)
        integers, floats = ir.VectorType(_I32, GROUP), source.type
        y = b.fmul(b.bitcast(v.magnitude_bits(source), floats), v.splat(v.arguments[2]))
        exponent = b.and_(b.bitcast(y, integers), ir.Constant(integers, [_EXPONENT] * GROUP))
        one = constant(exponent, 127 << _MANTISSA_BITS)
        exponent = b.select(b.icmp_unsigned(">", exponent, one), exponent, one)
        magic_bits = b.add(exponent, constant(exponent, (_MANTISSA_BITS - 1) << _MANTISSA_BITS))
        magic = b.bitcast(magic_bits, floats)
        lifted = b.fadd(y, magic)
        rounded = b.fcmp_unordered("!=", b.fsub(lifted, magic), y)
        steps = b.and_(b.bitcast(lifted, integers), constant(exponent, 7))
        twice_e = b.sub(
            b.lshr(magic_bits, constant(exponent, _MANTISSA_BITS - 1)),
            constant(exponent, 2 * (127 + _MANTISSA_BITS - 1)),
        )
        magnitude = b.add(steps, twice_e)
        odd = b.trunc(magnitude, ir.VectorType(_I1, GROUP))
        fine = b.and_(odd, b.icmp_unsigned("<", magnitude, constant(magnitude, 4)))
        sign = b.and_(b.lshr(b.bitcast(source, integers), constant(exponent, 28)), constant(exponent, 8))
        codes = b.trunc(b.or_(magnitude, sign), ir.VectorType(_I8, GROUP))
        low = v.shuffle(codes, codes, list(range(_PAIRS)))
        high = v.shuffle(codes, codes, list(range(_PAIRS, GROUP)))
        v.store(b.or_(low, b.shl(high, constant(high, 4))), 3)
        none = b.icmp_unsigned("==", b.bitcast(fine, _I32), _I32(0))
        return b.add(v.count(rounded), b.select(none, _I32(0), _I32(HAS_FINE_CODE)))

    return _group_function(types.int32, emit)(values, start, inverse, out, where)
