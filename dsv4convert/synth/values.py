"""What the tensors of a synthetic checkpoint hold: seeded codes, scales, norms and routers, streamed.

A tensor's bytes depend on the seed, its name, its shape and its recipe, and on nothing else: not on the
file that it lies in, not on the other tensors, not on the version of numpy. Only raw 64-bit draws of
SFC64 are used, whose stream numpy promises to keep; every distribution is a table of 65,536 entries that
16 bits of a draw choose from. That also makes it fast: one lookup yields four bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import Enum
from functools import cache, lru_cache
from hashlib import blake2b
from statistics import NormalDist
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ..formats import e2m1, e4m3, e8m0
from ..formats.e2m1 import f32_to_e2m1, pack_e2m1
from ..formats.e4m3 import f32_to_e4m3

Draws = np.random.SFC64
Number = TypeVar("Number", bound=np.generic)

# Tables are indexed by 16 random bits, four of which come out of one 64-bit draw.
TABLE_ENTRIES = 2**16
DRAWS_PER_RAW = 64 // 16

# Streams come in pieces of this many table entries (1 MiB): below the cache size, above the call overhead.
PIECE_ENTRIES = 2**18

# A block's largest code should lie in the upper half of the format's range, as quantisation leaves it:
# 128 x 128 gaussians reach about 4 sigma, 32 of them about 2.
E4M3_CODE_STD = e4m3.MAX / 5.6  # 80
E2M1_CODE_STD = e2m1.MAX / 3  # 2

# How far scale exponents lie from the middle one, each as often as it stands here. A small tensor has
# few 128 x 128 blocks, whose spread must not make the whole of it weak or strong; 1 x 32 groups are many.
GROUP_SCALE_STEPS = (-2,) * 1 + (-1,) * 4 + (0,) * 6 + (1,) * 4 + (2,) * 1
BLOCK_SCALE_STEPS = (-1,) * 4 + (0,) * 8 + (1,) * 4

NORM_SPREAD = 0.1

# Routers. Randomly initialised ones sit near ties. Here experts come in pairs whose gate rows are +- one
# random direction, ROUTER_GAIN long, so that a token gives one of the two a large logit and the other the
# opposite one. A bias of HIGH for as many pairs as there are experts to take makes every token take exactly
# one expert of each of those pairs: the better one scores at least HIGH + sqrt(softplus(0)) = 4.83, the
# worse one less, and an expert of another pair at most LOW_MAX + sqrt(softplus(20)) = 2.5. So the choice
# depends on the token, and is a near tie only where a token is nearly orthogonal to a direction. Where
# there are too few experts for that many pairs, single experts with a bias of ALWAYS make up the number.
ROUTER_GAIN = 4.0
BIAS_ALWAYS = 12.0
BIAS_HIGH = 4.0
BIAS_LOW_MIN, BIAS_LOW_MAX = -4.0, -2.0


class Kind(str, Enum):
    """How a tensor's bytes come about."""

    E4M3 = "gaussian float8_e4m3fn codes"
    E2M1 = "gaussian float4_e2m1fn codes, two a byte"
    E8M0_GROUP = "float8_e8m0fnu scales of 1 x 32 groups"
    E8M0_BLOCK = "float8_e8m0fnu scales of 128 x 128 blocks"
    F32_POWER = "float32 scales of 128 x 128 blocks, powers of two"
    F32_ANY = "float32 scales of 128 x 128 blocks, no powers of two"
    BF16 = "bfloat16 gaussians"
    BF16_NORM = "bfloat16 around one"
    F32 = "float32 gaussians"
    F32_UNIFORM = "float32 between a quarter and three quarters"
    ROUTER = "bfloat16 router rows in opposite pairs"
    ROUTER_BIAS = "float32 routing bias of text tokens"
    ROUTER_BIAS_IMAGE = "float32 routing bias of image tokens"
    HASH_TABLE = "int64 experts of each token id"


class Recipe(NamedTuple):
    """A kind with its one parameter.

    ``size`` is the standard deviation of gaussians and of the codes, the middle exponent of scales, the
    number of experts that a token takes for routers, and the number there are for hash tables.
    """

    kind: Kind
    size: float = 0.0


def fp4_recipes(fan_in: int) -> tuple[Recipe, Recipe]:
    """Return the recipes of an FP4 weight, whose deviation will be about fan_in^-1/2, and of its scales."""
    code_std, exponent = _codes_and_exponent(fan_in, E2M1_CODE_STD, GROUP_SCALE_STEPS)
    return Recipe(Kind.E2M1, code_std), Recipe(Kind.E8M0_GROUP, exponent)


def fp8_recipes(fan_in: int, scales: Kind) -> tuple[Recipe, Recipe]:
    """Return the recipes of an FP8 weight, whose deviation will be about fan_in^-1/2, and of its scales."""
    code_std, exponent = _codes_and_exponent(fan_in, E4M3_CODE_STD, BLOCK_SCALE_STEPS)
    return Recipe(Kind.E4M3, code_std), Recipe(scales, exponent)


def _codes_and_exponent(fan_in: int, usual_std: float, steps: tuple[int, ...]) -> tuple[float, int]:
    """Return the deviation of the codes, within sqrt(2) of the usual one, and the middle exponent."""
    spread = math.sqrt(sum(4.0**step for step in steps) / len(steps))
    ratio = 1 / (math.sqrt(fan_in) * spread)
    exponent = round(math.log2(ratio / usual_std))
    return ratio / 2.0**exponent, exponent


def tensor_stream(recipe: Recipe, name: str, shape: tuple[int, ...], seed: int) -> Iterator[memoryview]:
    """Yield the bytes of one tensor, little-endian, in pieces of about a MiB (routers in one)."""
    draws = _draws(seed, name, shape)
    count = math.prod(shape)
    kind, size = recipe
    if kind is Kind.ROUTER:
        yield _bytes(_bf16(_router_rows(name, shape, int(size), seed)))
    elif kind in (Kind.ROUTER_BIAS, Kind.ROUTER_BIAS_IMAGE):
        yield _bytes(_router_bias(name, shape[0], int(size), kind is Kind.ROUTER_BIAS_IMAGE, seed))
    elif kind is Kind.HASH_TABLE:
        yield from _hash_table(draws, shape, int(size))
    elif kind is Kind.F32_ANY:
        scales = _scale_table(int(size))
        for entries in _choices(draws, count):
            # Each gets a mantissa 1 + k/2^16 of its own with k > 0, so that none is a power of two.
            fraction = np.maximum(_draw16(draws, len(entries)), 1).astype(np.float32) / np.float32(2**16)
            yield _bytes(scales[entries] * (1 + fraction))
    else:
        table, width = _table(kind, size)
        left = count * width
        for entries in _choices(draws, -(-left // table.itemsize)):
            piece = _bytes(table[entries])[:left]
            left -= len(piece)
            yield piece


def _draws(seed: int, *what: object) -> Draws:
    key = "\0".join(map(str, (seed, *what)))
    return Draws(int.from_bytes(blake2b(key.encode(), digest_size=16).digest(), "little"))


def _draw16(draws: Draws, count: int) -> npt.NDArray[np.uint16]:
    raw: npt.NDArray[np.uint64] = draws.random_raw(-(-count // DRAWS_PER_RAW))
    return raw.astype("<u8", copy=False).view("<u2")[:count]


def _choices(draws: Draws, count: int) -> Iterator[npt.NDArray[np.uint16]]:
    for start in range(0, count, PIECE_ENTRIES):
        yield _draw16(draws, min(PIECE_ENTRIES, count - start))


def _bytes(array: npt.NDArray[np.generic]) -> memoryview:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data


@cache
def _normal_table() -> npt.NDArray[np.float32]:
    """Return the standard normal distribution as TABLE_ENTRIES equally likely values, ascending."""
    quantile = NormalDist().inv_cdf
    lower = np.array([quantile((i + 0.5) / TABLE_ENTRIES) for i in range(TABLE_ENTRIES // 2)], np.float32)
    return np.concatenate([lower, -lower[::-1]])


def _normal(draws: Draws, count: int) -> npt.NDArray[np.float32]:
    return _normal_table()[_draw16(draws, count)]


def _bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    # Truncated, not rounded: these are random numbers, and any bfloat16 near the value will do.
    return (values.view(np.uint32) >> 16).astype("<u2")


@lru_cache(maxsize=64)
def _table(kind: Kind, size: float) -> tuple[npt.NDArray[np.generic], int]:
    """Return a table whose entries are runs of elements, and how many bytes an element takes."""
    normal = _normal_table()
    draws = _draws(0, "table", kind.value)

    def run(values: npt.NDArray[Number], length: int) -> npt.NDArray[Number]:
        return values[_draw16(draws, TABLE_ENTRIES * length)].reshape(TABLE_ENTRIES, length)

    if kind is Kind.E4M3:
        codes = f32_to_e4m3(normal * np.float32(size))
        return run(codes, 4).view("<u4").reshape(-1), 1
    if kind is Kind.E2M1:
        codes = f32_to_e2m1(normal * np.float32(size))
        return pack_e2m1(run(codes, 8)).view("<u4").reshape(-1), 1
    if kind in (Kind.E8M0_GROUP, Kind.E8M0_BLOCK):
        exponents = (
            np.array(GROUP_SCALE_STEPS if kind is Kind.E8M0_GROUP else BLOCK_SCALE_STEPS) + int(size) + e8m0.BIAS
        )
        return run(np.resize(exponents.astype(np.uint8), TABLE_ENTRIES), 4).view("<u4").reshape(-1), 1
    if kind is Kind.F32_POWER:
        return _scale_table(int(size)), 4
    if kind is Kind.BF16:
        return run(_bf16(normal * np.float32(size)), 2).view("<u4").reshape(-1), 2
    if kind is Kind.BF16_NORM:
        return run(_bf16(1 + normal * np.float32(NORM_SPREAD)), 2).view("<u4").reshape(-1), 2
    if kind is Kind.F32:
        return (normal * np.float32(size)).astype("<f4"), 4
    if kind is Kind.F32_UNIFORM:
        return np.linspace(0.25, 0.75, TABLE_ENTRIES, dtype="<f4"), 4
    raise ValueError(f"no table for {kind}")


def _scale_table(exponent: int) -> npt.NDArray[np.float32]:
    steps = np.resize(np.array(BLOCK_SCALE_STEPS), TABLE_ENTRIES)
    scales: npt.NDArray[np.float32] = np.ldexp(np.float32(1), steps + exponent).astype("<f4")
    return scales


class _Pairs(NamedTuple):
    """A router's experts in random order: those always taken, the pairs, and how many of them are high."""

    always: npt.NDArray[np.intp]
    first: npt.NDArray[np.intp]
    second: npt.NDArray[np.intp]
    high: int


def _pairs(name: str, experts: int, taken: int, seed: int) -> _Pairs:
    # One order for all tensors of a router: it hangs on what their names have in common.
    router = name.rpartition("ffn.gate.")[0]
    order = np.argsort(_draws(seed, "router", router, experts).random_raw(experts), kind="stable")
    high = min(taken, experts - taken)
    always = taken - high
    rest = order[always:]
    pairs = len(rest) // 2
    return _Pairs(order[:always], rest[:pairs], rest[pairs : 2 * pairs], high)


def _router_rows(name: str, shape: tuple[int, ...], taken: int, seed: int) -> npt.NDArray[np.float32]:
    experts, hidden = shape
    _, first, second, _ = _pairs(name, experts, taken, seed)
    draws = _draws(seed, name, shape)
    rows: npt.NDArray[np.float32] = _normal(draws, experts * hidden).reshape(experts, hidden)
    rows = rows * np.float32(hidden**-0.5)
    rows[first] *= np.float32(ROUTER_GAIN)
    rows[second] = -rows[first]
    return rows


def _router_bias(name: str, experts: int, taken: int, image: bool, seed: int) -> npt.NDArray[np.float32]:
    always, first, second, high = _pairs(name, experts, taken, seed)
    draws = _draws(seed, name, experts)
    low = np.linspace(BIAS_LOW_MIN, BIAS_LOW_MAX, TABLE_ENTRIES, dtype=np.float32)
    bias = low[_draw16(draws, experts)]
    # Images take the next pairs, round the end where there are not enough.
    chosen = (np.arange(high) + (high if image else 0)) % max(len(first), 1)
    bias[first[chosen]] = bias[second[chosen]] = BIAS_HIGH
    bias[always] = BIAS_ALWAYS
    return bias.astype("<f4")


def _hash_table(draws: Draws, shape: tuple[int, ...], experts: int) -> Iterator[memoryview]:
    """Yield [tokens, taken] int64 rows of distinct experts: an arithmetic sequence modulo their number."""
    tokens, taken = shape
    step = np.arange(taken)
    strides = np.array([s for s in range(1, max(experts, 2)) if len(set(step * s % experts)) == taken])
    rows_per_piece = max(PIECE_ENTRIES // taken, 1)
    for start in range(0, tokens, rows_per_piece):
        rows = min(rows_per_piece, tokens - start)
        choice = _draw16(draws, 2 * rows).astype(np.int64).reshape(rows, 2)
        first, stride = choice[:, :1] % experts, strides[choice[:, 1:] % len(strides)]
        yield _bytes(((first + stride * step) % experts).astype("<i8"))
