"""A GGUF as lists of raw parts, to take apart, change and put together again in tests."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

from gguf import GGML_QUANT_SIZES

STRING, ARRAY = 8, 9
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# Elements and bytes of a block; the gguf package lacks the last one.
BLOCKS = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()} | {42: (64, 18)}
ALIGNMENT = 32


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


@dataclass
class Key:
    name: str
    kind: int
    value: bytes


@dataclass
class Info:
    """A tensor: ``dims`` fastest first, ggml's type number, and its bytes."""

    name: str
    dims: tuple[int, ...]
    kind: int
    data: bytes = field(repr=False)


@dataclass
class RawGguf:
    """Keys and tensors of one file, in order."""

    keys: list[Key]
    infos: list[Info]

    def key(self, name: str) -> Key:
        return next(key for key in self.keys if key.name == name)

    def info(self, name: str) -> Info:
        return next(info for info in self.infos if info.name == name)

    @classmethod
    def read(cls, path: Path) -> RawGguf:
        data = path.read_bytes()
        n_infos, n_keys = struct.unpack_from("<QQ", data, 8)
        at = 24

        def take(nbytes: int) -> bytes:
            nonlocal at
            at += nbytes
            return data[at - nbytes : at]

        def take_text() -> bytes:
            return take(struct.unpack("<Q", take(8))[0])

        def skip_value(kind: int) -> None:
            if kind == STRING:
                take_text()
            elif kind == ARRAY:
                element, count = struct.unpack("<IQ", take(12))
                for _ in range(count):
                    skip_value(element)
            else:
                take(SCALAR_BYTES[kind])

        keys = []
        for _ in range(n_keys):
            name, kind = take_text().decode(), struct.unpack("<I", take(4))[0]
            start = at
            skip_value(kind)
            keys.append(Key(name, kind, data[start:at]))
        heads = []
        for _ in range(n_infos):
            name, n_dims = take_text().decode(), struct.unpack("<I", take(4))[0]
            dims = struct.unpack(f"<{n_dims}Q", take(8 * n_dims))
            heads.append((name, dims, *struct.unpack("<IQ", take(12))))
        start = -(-at // ALIGNMENT) * ALIGNMENT
        infos = []
        for name, dims, kind, offset in heads:
            elements, nbytes = BLOCKS[kind]
            size = nbytes * dims[0] // elements
            for length in dims[1:]:
                size *= length
            infos.append(Info(name, dims, kind, data[start + offset : start + offset + size]))
        return cls(keys, infos)

    def write(self, path: Path) -> None:
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.infos), len(self.keys))
        for key in self.keys:
            head += text(key.name) + struct.pack("<I", key.kind) + key.value
        body = b""
        for info in self.infos:
            dims = struct.pack(f"<I{len(info.dims)}Q", len(info.dims), *info.dims)
            head += text(info.name) + dims + struct.pack("<IQ", info.kind, len(body))
            body += info.data.ljust(-(-len(info.data) // ALIGNMENT) * ALIGNMENT, b"\0")
        path.write_bytes(head.ljust(-(-len(head) // ALIGNMENT) * ALIGNMENT, b"\0") + body)
