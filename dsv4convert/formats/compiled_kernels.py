"""The loops of the compiled codecs, as instructions for LLVM (see ``llvm``).

A kernel takes the ordinary tile: see ``compiled``, which also checks shapes and ranges. It works on vectors
of 32 elements, the size of a group; LLVM splits them to fit the processor, so the same code serves SSE,
AVX2, AVX-512 and NEON. Arrays are flat and contiguous, numbers little-endian.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from llvmlite import ir

from dsv4convert.formats import e2m1, e4m3, mxfp4, q8_0
from dsv4convert.formats.base import GROUP
from dsv4convert.formats.e8m0 import BIAS, F32_MANTISSA_BITS, NAN_BYTE
from dsv4convert.formats.llvm import ELEMENTS, F32, I1, I8, I16, I32, I64, Builder, Kernel, Value, constant, resized

_PAIRS = GROUP // 2
_ALTERNATE = [lane for k in range(_PAIRS) for lane in (k, _PAIRS + k)]

_MAGNITUDE_BITS = 0x7FFF_FFFF
_EXPONENT_BITS = 0x7F80_0000  # infinity, too
_MANTISSA_BITS = 0x007F_FFFF
_MIN_NORMAL_BITS = 0x0080_0000
_MANTISSA_OF_6 = 0x0040_0000

_E4M3_PLACE = F32_MANTISSA_BITS - 3
_E4M3_FIRST_NORMAL = 8
_E2M1_PLACE = F32_MANTISSA_BITS - 1
_E2M1_CODE_2_EXPONENT = BIAS - 1  # code 2, exponent field 1, is 1.0
_E4M3_CODE_OF_1_EXPONENT = 7  # 1.0 in e4m3

_F16_PLACE = F32_MANTISSA_BITS - 10
_F16_REBIAS = (BIAS - 15) << 10
_F16_MIN_NORMAL_BITS = (BIAS - 14) << F32_MANTISSA_BITS
_F16_SUBNORMAL_STEPS = 2.0**24
_F16_INF_BITS = 0x7C00
_F16_OVERFLOW = 65520.0  # rounds to infinity from here
_TO_INTEGER = 2.0**23  # a float32 this large has no places behind the point

_INVERSE_BYTE = 2 * BIAS  # 2^(127 - e) as an e8m0 byte is 254 - e
_LAST_MXFP4_BYTE = 127
_FINE = 1 << 8  # in what ``_encode`` returns: a code is 0.5 or 1.5


def _no_bytes() -> Value:
    return ir.Constant(ir.VectorType(I8, GROUP), [0] * GROUP)


def _sweep(
    v: Builder,
    start: Value,
    count: Value,
    step: Callable[..., Sequence[Value]],
    vectors: Sequence[Value] = (),
    singles: Sequence[Value] = (),
) -> tuple[list[Value], list[Value]]:
    """Call ``step(place, lanes, *carried)`` for groups of 32 from ``start`` on, and one by one for the rest.

    ``lanes`` is 32 or 0, for a single element; what is carried is kept apart for the two.
    """
    groups = v.b.ashr(count, I64(5))
    vectors = v.loop(groups, lambda g, *carried: step(v.b.add(start, v.b.shl(g, I64(5))), GROUP, *carried), vectors)
    singles = v.loop(
        count, lambda j, *carried: step(v.b.add(start, j), 0, *carried), singles, start=v.b.shl(groups, I64(5))
    )
    return vectors, singles


_BLOCKS = ("rows", "tall", "block_rows", "block_columns")


def _blocks(v: Builder, body: Callable[..., Sequence[Value] | None], carried: Sequence[Value] = ()) -> list[Value]:
    """Call ``body(row, block, place, *carried)`` for every row of a matrix and every block of columns in it.

    ``place`` is that of the block's scale. Needs the parameters ``_BLOCKS``; a block is ``tall`` rows.
    """
    b = v.b

    def block_row(r: Value, *carried: Value) -> list[Value]:
        first, scales = b.mul(r, v["tall"]), b.mul(r, v["block_columns"])

        def row(i: Value, *carried: Value) -> list[Value]:
            return v.loop(v["block_columns"], lambda c, *carried: body(i, c, b.add(scales, c), *carried), carried)

        return v.loop(v.smaller(b.add(first, v["tall"]), v["rows"]), row, carried, start=first)

    return v.loop(v["block_rows"], block_row, carried)


# --- values of codes ------------------------------------------------------------------------------------


def _e4m3_magnitudes(v: Builder, codes: Value) -> Value:
    """Return the magnitudes of 32-bit e4m3 codes; subnormal codes by conversion, so that no subnormal is touched."""
    b = v.b
    magnitude = b.and_(codes, constant(codes, e4m3.NAN_CODE))
    bits = b.shl(magnitude, constant(codes, _E4M3_PLACE))
    bits = b.add(bits, constant(codes, e4m3.PLACED_EXPONENT << F32_MANTISSA_BITS))
    normal = b.bitcast(bits, resized(F32, codes))
    subnormal = b.sitofp(magnitude, normal.type)
    subnormal = b.fmul(subnormal, constant(normal, 2.0**e4m3.MIN_SUBNORMAL_EXPONENT))
    return b.select(b.icmp_unsigned("<", magnitude, constant(codes, _E4M3_FIRST_NORMAL)), subnormal, normal)


def _e2m1_magnitudes(v: Builder, codes: Value) -> Value:
    """Return the magnitudes of 32-bit e2m1 codes."""
    b = v.b
    magnitude = b.and_(codes, constant(codes, 7))
    # Code 1, the only subnormal, is 0.5: the exponent below code 2's, with an empty mantissa.
    one = b.icmp_unsigned("==", magnitude, constant(codes, 1))
    bits = b.shl(b.sub(magnitude, b.zext(one, codes.type)), constant(codes, _E2M1_PLACE))
    bits = b.add(bits, constant(codes, _E2M1_CODE_2_EXPONENT << F32_MANTISSA_BITS))
    zero = b.icmp_unsigned("==", magnitude, constant(codes, 0))
    return b.bitcast(b.select(zero, constant(codes, 0), bits), resized(F32, codes))


def _nibbles(v: Builder, name: str, offset: Value) -> tuple[Value, Value]:
    """Return the low and the high nibbles of 16 packed bytes."""
    packed = v.load(name, offset, _PAIRS)
    return v.b.and_(packed, constant(packed, 0xF)), v.b.lshr(packed, constant(packed, 4))


def _fp4_codes(v: Builder, name: str, offset: Value) -> Value:
    """Return the 32 e2m1 codes of 16 packed bytes, in order."""
    return v.shuffle(*_nibbles(v, name, offset), _ALTERNATE)


# --- a float32 magnitude and a sign, as bits of the output's type ----------------------------------------

# Each takes the magnitude, exact in the output's type, and the sign as bit 31 of 32, and leaves 32 bits wide
# what it makes.


def _as_f32(v: Builder, magnitude: Value, sign: Value) -> Value:
    return v.b.or_(v.b.bitcast(magnitude, sign.type), sign)


def _as_bf16(v: Builder, magnitude: Value, sign: Value) -> Value:
    bits = _as_f32(v, magnitude, sign)
    return v.b.lshr(bits, constant(bits, 16))


def _as_f16(v: Builder, magnitude: Value, sign: Value) -> Value:
    b = v.b
    bits = b.bitcast(magnitude, sign.type)
    normal = b.sub(b.lshr(bits, constant(bits, _F16_PLACE)), constant(bits, _F16_REBIAS))
    subnormal = b.fptosi(b.fmul(magnitude, constant(magnitude, _F16_SUBNORMAL_STEPS)), sign.type)
    small = b.icmp_unsigned("<", bits, constant(bits, _F16_MIN_NORMAL_BITS))
    return b.or_(b.select(small, subnormal, normal), b.lshr(sign, constant(sign, 16)))


def _sign_of(v: Builder, codes: Value, position: int) -> Value:
    """Return bit ``position`` of 32-bit lanes as their bit 31."""
    high = v.b.shl(codes, constant(codes, 31 - position))
    return v.b.and_(high, constant(codes, 1 << 31))


_Output = Callable[[Builder, Value, Value], Value]
_OUTPUTS: dict[str, tuple[str, _Output]] = {
    "f32": ("u4", _as_f32),
    "bf16": ("u2", _as_bf16),
    "f16": ("u2", _as_f16),
}


def _fp8_to(name: str) -> Kernel:
    """FP8 codes times scales in blocks of tall x wide; returns the largest code without its sign."""
    kind, as_output = _OUTPUTS[name]

    def build(v: Builder) -> Value:
        b = v.b

        def block(i: Value, c: Value, place: Value, vector: Value, single: Value) -> list[Value]:
            factor = v.load("table", b.zext(v.load("codes", place), I64))
            factors = v.splat(factor, GROUP)

            def step(place: Value, lanes: int, largest: Value) -> list[Value]:
                code = v.load("weight", place, lanes)
                wide = b.zext(code, resized(I32, code))
                value = b.fmul(_e4m3_magnitudes(v, wide), factors if lanes else factor)
                bits = as_output(v, value, _sign_of(v, wide, 7))
                v.store(b.trunc(bits, resized(ELEMENTS[kind], bits)), "out", place)
                return [v.umax(largest, b.and_(code, constant(code, e4m3.NAN_CODE)))]

            column = b.mul(c, v["wide"])
            start = b.add(b.mul(i, v["columns"]), column)
            count = v.smaller(v["wide"], b.sub(v["columns"], column))
            vectors, singles = _sweep(v, start, count, step, [vector], [single])
            return [*vectors, *singles]

        vector, single = _blocks(v, block, [_no_bytes(), I8(0)])
        return b.zext(v.umax(v.reduce("umax", vector), single), I64)

    arrays = {"weight": "u1", "codes": "u1", "table": "f4", "out": kind}
    return Kernel(f"fp8_to_{name}", {**arrays, **dict.fromkeys((*_BLOCKS, "columns", "wide"), "n")}, build)


_FP4_TO = {"packed": "u1", "codes": "u1", "table": "f4"}


def _build_fp4_to_f32(v: Builder) -> None:
    """FP4 groups of 16 bytes times a scale each."""
    b = v.b

    def group(g: Value) -> None:
        factor = v.load("table", b.zext(v.load("codes", g), I64))
        wide = b.zext(_fp4_codes(v, "packed", b.mul(g, I64(_PAIRS))), ir.VectorType(I32, GROUP))
        value = b.fmul(_e2m1_magnitudes(v, wide), v.splat(factor, GROUP))
        v.store(_as_f32(v, value, _sign_of(v, wide, 3)), "out", b.mul(g, I64(GROUP)))

    v.loop(v["groups"], group)


def _fp4_to_half(name: str) -> Kernel:
    """FP4 to 16 bits: both elements of a byte stay in its lane, and no lanes need to be sorted."""
    _, as_output = _OUTPUTS[name]

    def build(v: Builder) -> None:
        b = v.b

        def group(g: Value) -> None:
            factor = v.splat(v.load("table", b.zext(v.load("codes", g), I64)), _PAIRS)
            pairs = b.zext(v.load("packed", b.mul(g, I64(_PAIRS)), _PAIRS), ir.VectorType(I32, _PAIRS))
            low = b.fmul(_e2m1_magnitudes(v, pairs), factor)
            high = b.fmul(_e2m1_magnitudes(v, b.lshr(pairs, constant(pairs, 4))), factor)
            low, high = as_output(v, low, _sign_of(v, pairs, 3)), as_output(v, high, _sign_of(v, pairs, 7))
            v.store(b.or_(low, b.shl(high, constant(high, 16))), "out", b.mul(g, I64(_PAIRS)))

        v.loop(v["groups"], group)

    return Kernel(f"fp4_to_{name}", {**_FP4_TO, "out": "u4", "groups": "n"}, build)


fp8_to_f32, fp8_to_bf16, fp8_to_f16 = map(_fp8_to, _OUTPUTS)
fp4_to_f32 = Kernel("fp4_to_f32", {**_FP4_TO, "out": "u4", "groups": "n"}, _build_fp4_to_f32)
fp4_to_bf16, fp4_to_f16 = map(_fp4_to_half, ("bf16", "f16"))


# --- FP4 to MXFP4 and to FP8 ----------------------------------------------------------------------------


def _build_fp4_to_mxfp4(v: Builder) -> None:
    b = v.b

    def group(g: Value) -> None:
        start = b.mul(g, I64(_PAIRS))
        first = v.load("packed", start, _PAIRS // 2)
        second = v.load("packed", b.add(start, I64(_PAIRS // 2)), _PAIRS // 2)
        # Byte j of the output holds element j and element j + 16: low nibbles where j is even, else high ones.
        four, low_bits, high_bits = (constant(first, value) for value in (4, 0x0F, 0xF0))
        even = b.or_(b.and_(first, low_bits), b.shl(second, four))
        odd = b.or_(b.lshr(first, four), b.and_(second, high_bits))
        order = [lane for j in range(_PAIRS // 2) for lane in (j, _PAIRS // 2 + j)]
        where = b.mul(g, I64(mxfp4.BLOCK_BYTES))
        v.store(v.load("scale", g), "out", where)
        v.store(v.shuffle(even, odd, order), "out", b.add(where, I64(1)))

    v.loop(v["groups"], group)


fp4_to_mxfp4 = Kernel("fp4_to_mxfp4", {"packed": "u1", "scale": "u1", "out": "u1", "groups": "n"}, _build_fp4_to_mxfp4)


_TILE_GROUPS = e2m1.FP8_TILE // GROUP
_TILES = GROUP // _TILE_GROUPS  # of a vector of scales
HAS_NAN = -(1 << 15)  # what the kernel of scales returns where one is NaN


def _build_fp4_to_fp8_scales(v: Builder) -> Value:
    """Write each tile's scale; return the smallest scale relative to its tile's, or ``HAS_NAN``."""
    b = v.b

    def tile_scales(r: Value, low: Value, high: Value, place: Value, lowest: Value, largest: Value) -> list[Value]:
        """Write the scales of tiles whose smallest and largest FP4 scales are given."""
        headroom = constant(high, e2m1.FP8_HEADROOM_EXPONENT)
        scale = b.sub(v.umax(high, headroom), headroom)
        v.store(scale, "tiles", b.add(b.mul(r, v["block_columns"]), place))
        lift = b.sub(b.zext(low, resized(I16, low)), b.zext(scale, resized(I16, low)))
        return [v.smaller(lowest, lift), v.umax(largest, high)]

    def tile_row(r: Value, *carried: Value) -> list[Value]:
        first = b.mul(r, v["tall"])
        end = v.smaller(b.add(first, v["tall"]), v["rows"])

        def some_tiles(q: Value, lowest: Value, largest: Value) -> list[Value]:
            def row(i: Value, low: Value, high: Value) -> list[Value]:
                scales = v.load("scale", b.add(b.mul(i, v["groups"]), b.mul(q, I64(GROUP))), GROUP)
                return [v.umin(low, scales), v.umax(high, scales)]

            zero = _no_bytes()
            low, high = v.loop(end, row, [constant(zero, NAN_BYTE), zero], start=first)
            lanes = [list(range(k, GROUP, _TILE_GROUPS)) for k in range(_TILE_GROUPS)]
            low = functools.reduce(v.umin, (v.shuffle(low, low, lane) for lane in lanes))
            high = functools.reduce(v.umax, (v.shuffle(high, high, lane) for lane in lanes))
            return tile_scales(r, low, high, b.mul(q, I64(_TILES)), lowest, largest)

        def one_tile(c: Value, lowest: Value, largest: Value) -> list[Value]:
            start = b.mul(c, I64(_TILE_GROUPS))
            stop = v.smaller(b.add(start, I64(_TILE_GROUPS)), v["groups"])

            def row(i: Value, *carried: Value) -> list[Value]:
                def group(g: Value, low: Value, high: Value) -> list[Value]:
                    scale = v.load("scale", b.add(b.mul(i, v["groups"]), g))
                    return [v.umin(low, scale), v.umax(high, scale)]

                return v.loop(stop, group, carried, start=start)

            low, high = v.loop(end, row, [I8(NAN_BYTE), I8(0)], start=first)
            return tile_scales(r, low, high, c, lowest, largest)

        whole = b.ashr(v["groups"], I64(5))
        vectors = v.loop(whole, some_tiles, carried[:2])
        singles = v.loop(v["block_columns"], one_tile, carried[2:], start=b.mul(whole, I64(_TILES)))
        return [*vectors, *singles]

    none = [ir.Constant(ir.VectorType(kind, _TILES), [0] * _TILES) for kind in (I16, I8)]
    lowest, largest, lowest_one, largest_one = v.loop(v["block_rows"], tile_row, [*none, I16(0), I8(0)])
    lowest = v.smaller(v.reduce("smin", lowest), lowest_one)
    largest = v.umax(v.reduce("umax", largest), largest_one)
    return b.select(b.icmp_unsigned("==", largest, I8(NAN_BYTE)), I64(HAS_NAN), b.sext(lowest, I64))


fp4_to_fp8_scales = Kernel(
    "fp4_to_fp8_scales",
    {"scale": "u1", "tiles": "u1", **dict.fromkeys((*_BLOCKS, "groups"), "n")},
    _build_fp4_to_fp8_scales,
)


def _build_fp4_to_fp8(v: Builder) -> None:
    """Exponents of the e2m1 codes are counted from a base for each group; every product is zero or normal."""
    b = v.b

    def tile(i: Value, c: Value, place: Value) -> None:
        tile_scale = v.load("tiles", place)
        start = b.mul(c, I64(_TILE_GROUPS))

        def group(g: Value) -> None:
            k = b.add(b.mul(i, v["groups"]), g)
            lift = b.sub(v.load("scale", k), tile_scale)
            # Code 2 is 1.0; its own bits, shifted into place, bring 1 of its exponent.
            base = b.shl(b.add(lift, I8(_E4M3_CODE_OF_1_EXPONENT - 1)), I8(3))
            codes = _fp4_codes(v, "packed", b.mul(k, I64(_PAIRS)))
            magnitude = b.and_(codes, constant(codes, 7))
            one = b.zext(b.icmp_unsigned("==", magnitude, constant(codes, 1)), codes.type)
            bits = b.add(b.shl(b.sub(magnitude, one), constant(codes, 2)), v.splat(base, GROUP))
            bits = b.select(b.icmp_unsigned("==", magnitude, constant(codes, 0)), constant(codes, 0), bits)
            sign = b.shl(b.and_(codes, constant(codes, 8)), constant(codes, 4))
            v.store(b.or_(bits, sign), "out", b.mul(k, I64(GROUP)))

        v.loop(v.smaller(b.add(start, I64(_TILE_GROUPS)), v["groups"]), group, start=start)

    _blocks(v, tile)


fp4_to_fp8 = Kernel(
    "fp4_to_fp8",
    {**dict.fromkeys(("packed", "scale", "tiles", "out"), "u1"), **dict.fromkeys((*_BLOCKS, "groups"), "n")},
    _build_fp4_to_fp8,
)


# --- to Q8_0 --------------------------------------------------------------------------------------------


def _store_d(v: Builder, d: Value, largest: Value, where: Value) -> Value:
    """Write the two bytes of d (uint16); return whether it is NaN, infinite, or vanished."""
    b = v.b
    v.store(d, "out", where)
    vanished = b.and_(b.icmp_unsigned("==", d, I16(0)), b.icmp_unsigned("!=", largest, constant(largest, 0)))
    return b.or_(b.icmp_unsigned(">=", d, I16(_F16_INF_BITS)), vanished)


def _store_levels(v: Builder, levels: Value, negative: Value, where: Value) -> None:
    signed = v.b.select(negative, v.b.neg(levels), levels)
    v.store(v.b.trunc(signed, ir.VectorType(I8, GROUP)), "out", where)


def _levels_by_multiplier(v: Builder, magnitudes: Value, multiplier: Value) -> Value:
    """Return trunc(magnitude * multiplier + 1/2); the multipliers keep every product away from the halves."""
    scaled = v.b.fmul(magnitudes, v.splat(multiplier, GROUP))
    return v.b.fptosi(v.b.fadd(scaled, constant(scaled, 0.5)), ir.VectorType(I32, GROUP))


def _d_of(v: Builder, largest: Value, byte: Value) -> Value:
    """Return d for the largest magnitude of a block and its scale's byte."""
    return v.load("d", v.b.or_(v.b.shl(v.b.zext(largest, I64), I64(8)), v.b.zext(byte, I64)))


def _build_fp8_to_q8_0(v: Builder) -> Value:
    """Return whether a block needs the general treatment."""
    b = v.b

    def block(i: Value, c: Value, place: Value, *carried: Value) -> list[Value]:
        byte = v.load("codes", place)
        start = b.mul(c, v["wide"])

        def group(g: Value, strange: Value) -> list[Value]:
            k = b.add(b.mul(i, v["groups"]), g)
            where = b.mul(k, I64(q8_0.BLOCK_BYTES))
            codes = v.load("weight", b.mul(k, I64(GROUP)), GROUP)
            largest = v.reduce("umax", b.and_(codes, constant(codes, e4m3.NAN_CODE)))
            strange = b.or_(strange, _store_d(v, _d_of(v, largest, byte), largest, where))
            wide = b.zext(codes, ir.VectorType(I32, GROUP))
            multiplier = v.load("multipliers", b.zext(largest, I64))
            levels = _levels_by_multiplier(v, _e4m3_magnitudes(v, wide), multiplier)
            negative = b.icmp_unsigned(">", wide, constant(wide, e4m3.NAN_CODE))
            _store_levels(v, levels, negative, b.add(where, I64(2)))
            return [strange]

        return v.loop(v.smaller(b.add(start, v["wide"]), v["groups"]), group, carried, start=start)

    (strange,) = _blocks(v, block, [I1(0)])
    return b.zext(strange, I64)


fp8_to_q8_0 = Kernel(
    "fp8_to_q8_0",
    {
        "weight": "u1",
        "codes": "u1",
        "multipliers": "f4",
        "d": "u2",
        "out": "u1",
        **dict.fromkeys((*_BLOCKS, "groups", "wide"), "n"),
    },
    _build_fp8_to_q8_0,
)


def _build_fp4_to_q8_0(v: Builder) -> Value:
    """Return whether a block needs the general treatment."""
    b = v.b

    def group(g: Value, strange: Value) -> list[Value]:
        where = b.mul(g, I64(q8_0.BLOCK_BYTES))
        codes = _fp4_codes(v, "packed", b.mul(g, I64(_PAIRS)))
        largest = v.reduce("umax", b.and_(codes, constant(codes, 7)))
        strange = b.or_(strange, _store_d(v, _d_of(v, largest, v.load("codes", g)), largest, where))
        wide = b.zext(codes, ir.VectorType(I32, GROUP))
        multiplier = v.load("multipliers", b.zext(largest, I64))
        levels = _levels_by_multiplier(v, _e2m1_magnitudes(v, wide), multiplier)
        _store_levels(v, levels, b.icmp_unsigned(">", wide, constant(wide, 7)), b.add(where, I64(2)))
        return [strange]

    (strange,) = v.loop(v["groups"], group, [I1(0)])
    return b.zext(strange, I64)


fp4_to_q8_0 = Kernel(
    "fp4_to_q8_0",
    {"packed": "u1", "codes": "u1", "multipliers": "f4", "d": "u2", "out": "u1", "groups": "n"},
    _build_fp4_to_q8_0,
)


def _floats(v: Builder, offset: Value) -> Value:
    """Return 32 values as float32: float32 bits as they are, or bfloat16 bits widened."""
    bits = v.load("values", offset, GROUP)
    if bits.type.element is I16:
        bits = v.b.zext(bits, ir.VectorType(I32, GROUP))
        bits = v.b.shl(bits, constant(bits, 16))
    return bits


def _magnitude_bits(v: Builder, bits: Value) -> Value:
    return v.b.and_(bits, constant(bits, _MAGNITUDE_BITS))


def _rounded_f16(v: Builder, value: Value) -> Value:
    """Return the bits of a positive float32 below 65520 rounded to float16, nearest even."""
    b = v.b
    bits = b.bitcast(value, I32)
    odd = b.and_(b.lshr(bits, I32(_F16_PLACE)), I32(1))
    normal = b.lshr(b.add(b.add(bits, I32((1 << (_F16_PLACE - 1)) - 1)), odd), I32(_F16_PLACE))
    steps = b.fmul(value, F32(_F16_SUBNORMAL_STEPS))
    subnormal = b.and_(b.bitcast(b.fadd(steps, F32(_TO_INTEGER)), I32), I32(_MANTISSA_BITS))
    small = b.icmp_unsigned("<", bits, I32(_F16_MIN_NORMAL_BITS))
    return b.trunc(b.select(small, subnormal, b.sub(normal, I32(_F16_REBIAS))), I16)


def _build_float_to_q8_0(v: Builder) -> Value:
    """Return whether a block is beyond the plain formula."""
    b = v.b

    def group(g: Value, strange: Value) -> list[Value]:
        where = b.mul(g, I64(q8_0.BLOCK_BYTES))
        bits = _floats(v, b.mul(g, I64(GROUP)))
        magnitudes = _magnitude_bits(v, bits)
        largest = v.reduce("umax", magnitudes)
        d = b.fdiv(b.bitcast(largest, F32), F32(float(q8_0.LEVELS)))
        inverse = b.select(b.fcmp_ordered("==", d, F32(0.0)), F32(0.0), b.fdiv(F32(1.0), d))
        for beyond in (
            b.icmp_unsigned(">=", largest, I32(_EXPONENT_BITS)),
            b.fcmp_unordered(">=", d, F32(_F16_OVERFLOW)),
            b.icmp_unsigned(">=", b.bitcast(inverse, I32), I32(_EXPONENT_BITS)),
            _store_d(v, _rounded_f16(v, d), largest, where),
        ):
            strange = b.or_(strange, beyond)
        scaled = b.fmul(b.bitcast(bits, ir.VectorType(F32, GROUP)), v.splat(inverse, GROUP))
        magnitude = b.bitcast(_magnitude_bits(v, b.bitcast(scaled, bits.type)), scaled.type)
        whole = b.fptosi(magnitude, bits.type)
        rest = b.fsub(magnitude, b.sitofp(whole, scaled.type))
        up = b.zext(b.fcmp_ordered(">=", rest, constant(rest, 0.5)), whole.type)
        negative = b.fcmp_ordered("<", scaled, constant(scaled, 0.0))
        _store_levels(v, b.add(whole, up), negative, b.add(where, I64(2)))
        return [strange]

    (strange,) = v.loop(v["groups"], group, [I1(0)])
    return b.zext(strange, I64)


f32_to_q8_0 = Kernel("f32_to_q8_0", {"values": "u4", "out": "u1", "groups": "n"}, _build_float_to_q8_0)
bf16_to_q8_0 = Kernel("bf16_to_q8_0", {"values": "u2", "out": "u1", "groups": "n"}, _build_float_to_q8_0)


# --- to MXFP4 by rounding -------------------------------------------------------------------------------


def _encode(v: Builder, source: Value, inverse: Value, where: Value) -> Value:
    """Write 16 code bytes: x * inverse to the nearest e2m1 code, ties to even.

    A code is k + 2e for a magnitude in [2^e, 2^(e+1)), e = 0 below 1, where k counts steps of 2^(e-1).
    Adding 2^(22+e), whose last place is such a step, makes the processor round and leaves k in the lowest
    bits. Returns how many values were rounded, plus ``_FINE`` if a code is 1 or 3.
    """
    b = v.b
    floats = ir.VectorType(F32, GROUP)
    y = b.fmul(b.bitcast(_magnitude_bits(v, source), floats), v.splat(inverse, GROUP))
    exponent = b.and_(b.bitcast(y, source.type), constant(source, _EXPONENT_BITS))
    exponent = v.larger(exponent, constant(exponent, BIAS << F32_MANTISSA_BITS))
    magic_bits = b.add(exponent, constant(exponent, (F32_MANTISSA_BITS - 1) << F32_MANTISSA_BITS))
    magic = b.bitcast(magic_bits, floats)
    lifted = b.fadd(y, magic)
    rounded = b.fcmp_unordered("!=", b.fsub(lifted, magic), y)
    steps = b.and_(b.bitcast(lifted, source.type), constant(source, 7))
    twice_e = b.sub(
        b.lshr(magic_bits, constant(source, F32_MANTISSA_BITS - 1)),
        constant(source, 2 * (BIAS + F32_MANTISSA_BITS - 1)),
    )
    magnitude = b.add(steps, twice_e)
    odd = b.trunc(magnitude, ir.VectorType(I1, GROUP))
    fine = b.and_(odd, b.icmp_unsigned("<", magnitude, constant(magnitude, 4)))
    sign = b.and_(b.lshr(source, constant(source, 28)), constant(source, 8))
    codes = b.trunc(b.or_(magnitude, sign), ir.VectorType(I8, GROUP))
    low = v.shuffle(codes, codes, list(range(_PAIRS)))
    high = v.shuffle(codes, codes, list(range(_PAIRS, GROUP)))
    v.store(b.or_(low, b.shl(high, constant(high, 4))), "out", where)
    none = b.icmp_unsigned("==", b.bitcast(fine, I32), I32(0))
    return b.add(v.count(rounded), b.select(none, I64(0), I64(_FINE)))


def _build_float_to_mxfp4(v: Builder) -> Value:
    """Return how many values were rounded, or -1 if a block needs the general treatment."""
    b = v.b

    def group(g: Value, changed: Value, strange: Value) -> list[Value]:
        where = b.mul(g, I64(mxfp4.BLOCK_BYTES))
        codes_at = b.add(where, I64(1))
        source = _floats(v, b.mul(g, I64(GROUP)))
        bits = v.reduce("umax", _magnitude_bits(v, source))
        mantissa = b.and_(bits, I32(_MANTISSA_BITS))
        above_6 = b.icmp_unsigned(">", mantissa, I32(_MANTISSA_OF_6))
        scale = b.add(b.sub(b.lshr(bits, I32(F32_MANTISSA_BITS)), I32(2)), b.zext(above_6, I32))
        tiny = b.and_(b.icmp_signed("<", scale, I32(2)), b.icmp_unsigned("!=", bits, I32(0)))
        for beyond in (
            b.icmp_unsigned(">=", bits, I32(_EXPONENT_BITS)),
            b.icmp_signed(">", scale, I32(_LAST_MXFP4_BYTE)),
            tiny,
        ):
            strange = b.or_(strange, beyond)
        # The bounds keep the look-up inside the table where the block is done again anyway.
        scale = v.smaller(v.larger(scale, I32(1)), I32(_LAST_MXFP4_BYTE))

        def inverse(scale: Value) -> Value:
            return v.load("table", b.zext(b.sub(I32(_INVERSE_BYTE), scale), I64))

        rounded = _encode(v, source, inverse(scale), codes_at)
        exact = b.icmp_unsigned("==", rounded, I64(0))
        # Exact, with a 6, and no code that twice the scale lacks: that scale is preferred.
        prefers_twice = b.and_(exact, b.icmp_unsigned("==", mantissa, I32(_MANTISSA_OF_6)))
        twice = b.add(scale, I32(1))
        with b.if_then(prefers_twice):
            _encode(v, source, inverse(twice), codes_at)
        v.store(b.trunc(b.select(prefers_twice, twice, scale), I8), "out", where)
        return [b.add(changed, b.and_(rounded, I64(_FINE - 1))), strange]

    changed, strange = v.loop(v["groups"], group, [I64(0), I1(0)])
    return b.select(strange, I64(-1), changed)


_TO_MXFP4 = {"table": "f4", "out": "u1", "groups": "n"}
f32_to_mxfp4 = Kernel("f32_to_mxfp4", {"values": "u4", **_TO_MXFP4}, _build_float_to_mxfp4)
bf16_to_mxfp4 = Kernel("bf16_to_mxfp4", {"values": "u2", **_TO_MXFP4}, _build_float_to_mxfp4)


# --- floats ---------------------------------------------------------------------------------------------


def _counted(v: Builder, flags: Value) -> Value:
    return v.count(flags) if isinstance(flags.type, ir.VectorType) else v.b.zext(flags, I64)


def _build_f32_to_bf16(v: Builder) -> Value:
    """Round to nearest even; return the largest magnitude.

    ``counts`` gets how many values were rounded, and how many of these are below the normal numbers.
    """
    b = v.b

    def step(place: Value, lanes: int, largest: Value, inexact: Value, tiny: Value) -> list[Value]:
        bits = v.load("values", place, lanes)
        magnitude = _magnitude_bits(v, bits)
        rounded = b.icmp_unsigned("!=", b.and_(bits, constant(bits, 0xFFFF)), constant(bits, 0))
        small = b.icmp_unsigned("<", magnitude, constant(bits, _MIN_NORMAL_BITS))
        odd = b.and_(b.lshr(bits, constant(bits, 16)), constant(bits, 1))
        lifted = b.add(b.add(bits, constant(bits, 0x7FFF)), odd)
        v.store(b.trunc(b.lshr(lifted, constant(bits, 16)), resized(I16, bits)), "out", place)
        return [
            v.umax(largest, magnitude),
            b.add(inexact, _counted(v, rounded)),
            b.add(tiny, _counted(v, b.and_(rounded, small))),
        ]

    none = ir.Constant(ir.VectorType(I32, GROUP), [0] * GROUP)
    vectors, singles = _sweep(v, I64(0), v["size"], step, [none, I64(0), I64(0)], [I32(0), I64(0), I64(0)])
    v.store(b.add(vectors[1], singles[1]), "counts", I64(0))
    v.store(b.add(vectors[2], singles[2]), "counts", I64(1))
    return b.zext(v.umax(v.reduce("umax", vectors[0]), singles[0]), I64)


f32_to_bf16 = Kernel("f32_to_bf16", {"values": "u4", "out": "u2", "counts": "i8", "size": "n"}, _build_f32_to_bf16)


def _build_bf16_to_f32(v: Builder) -> Value:
    """Return the largest magnitude, as bfloat16 bits."""
    b = v.b

    def step(place: Value, lanes: int, largest: Value) -> list[Value]:
        bits = v.load("values", place, lanes)
        wide = b.zext(bits, resized(I32, bits))
        v.store(b.shl(wide, constant(wide, 16)), "out", place)
        return [v.umax(largest, b.and_(bits, constant(bits, 0x7FFF)))]

    none = ir.Constant(ir.VectorType(I16, GROUP), [0] * GROUP)
    (vector,), (single,) = _sweep(v, I64(0), v["size"], step, [none], [I16(0)])
    return b.zext(v.umax(v.reduce("umax", vector), single), I64)


bf16_to_f32 = Kernel("bf16_to_f32", {"values": "u2", "out": "u4", "size": "n"}, _build_bf16_to_f32)
