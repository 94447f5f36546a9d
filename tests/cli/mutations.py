"""Seeded damage to files: bytes, JSON by its structure, little-endian numbers."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

# Numbers at the edges of what fits, and texts that have broken other programs.
NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 7, 127, 128, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**9,
    10**30, -(2**63), 0.5, -0.0, 1e308, 1e-320, 10**400,
)  # fmt: skip
TEXTS: tuple[str, ...] = (
    "", ".", "..", "../x", "/etc/passwd", "a/b", "a\0b", "a\nb", "\x1b[31mred\x1b[0m", "\x07", "\u202e", "\ud800",
    "🦙", "x" * 5000, "%s%n", "model.safetensors", "__metadata__", "F32", "BF16", "I8", "F8_E8M0", "F4", "NaN", " ",
)  # fmt: skip
RAW: tuple[bytes, ...] = (
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"true", b"NaN", b"Infinity", b"-", b"1e999", b"\\u0000",
    b"\xff", b"\0", b"\xef\xbb\xbf", b"[" * 2000, b'{"a":' * 1500, b"9" * 5000, b"\n", b"\xed\xa0\x80",
)  # fmt: skip
# Three of them in one another are still within what json.dumps can write; deeper ones come as raw text.
DEPTHS = (50, 250)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return ``data`` with one to four pieces flipped, cut, doubled, moved or replaced."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not result:
            return bytes(result)
        at = rng.randrange(len(result))
        length = min(rng.choice((1, 1, 2, 8, 40, 400)), len(result) - at)
        kind = rng.randrange(8)
        if kind == 0:
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del result[at : at + length]
        elif kind == 2:
            result[at:at] = result[at : at + length]
        elif kind == 3:
            del result[at:]
        elif kind == 4:
            result[at : at + length] = rng.randbytes(length)
        elif kind == 5:
            result[at:at] = rng.choice(RAW)
        elif kind == 6:
            other = rng.randrange(len(result))
            result[at : at + length] = result[other : other + length]
        else:
            number = rng.choice([n for n in NUMBERS if type(n) is int and 0 <= n < 2**64])
            code = rng.choice(["<Q", "<I", "<H", "<B"])
            size = struct.calcsize(code)
            result[at : at + size] = struct.pack(code, number % 256**size)
    return bytes(result)


def mutate_json(text: bytes, rng: random.Random) -> bytes:
    """Return a JSON document with one to three values or keys replaced, lost, doubled or exchanged, as text."""
    document = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        document = _mutate_value(document, rng)
    result = json.dumps(document).encode()
    if rng.random() < 0.05:  # a key that is there twice, which no parsed document can hold
        at = result.find(b'"', rng.randrange(len(result)))
        end = result.find(b",", at)
        if 0 <= at < end:
            result = result[:at] + result[at : end + 1] + result[at:]
    return result


def _mutate_value(document: Any, rng: random.Random) -> Any:
    places = list(_places(document, 4000))
    if not places:
        return _strange(rng, document)
    holder, key = rng.choice(places)
    kind = rng.randrange(7)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(TEXTS)] = holder.pop(key)
    elif kind == 2:
        other, other_key = rng.choice(places)
        value = holder[key]
        if not _holds(value, other) and not _holds(other[other_key], holder):
            holder[key], other[other_key] = other[other_key], value
    elif kind == 3 and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif kind == 4 and type(holder[key]) is int:
        holder[key] += rng.choice((-1, 1, 7, 128, 2**32, 2**63))
    else:
        holder[key] = _strange(rng, holder[key])
    return document


def _holds(value: Any, inner: Any) -> bool:
    level = [value]
    while level:
        part = level.pop()
        if part is inner:
            return True
        level.extend(part.values() if isinstance(part, dict) else part if isinstance(part, list) else ())
    return False


def _places(document: Any, most: int) -> list[tuple[Any, Any]]:
    """Return (container, key or index) of values, at most ``most``, breadth first."""
    found: list[tuple[Any, Any]] = []
    level = [document]
    while level and len(found) < most:
        inner = []
        for holder in level:
            keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
            for key in keys:
                found.append((holder, key))
                inner.append(holder[key])
        level = inner
    return found[:most]


def _strange(rng: random.Random, old: Any) -> Any:
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return rng.choice((None, True, False, [], {}, [[]], {"": None}, [0] * 1000))
    if kind == 3:
        return [old]
    if kind == 4:
        nested: Any = old
        for _ in range(rng.choice(DEPTHS)):
            nested = [nested]
        return nested
    return [rng.choice(NUMBERS) for _ in range(rng.randrange(5))]


def nest(depth: int) -> bytes:
    """Return a JSON array nested ``depth`` times."""
    return b"[" * depth + b"]" * depth
