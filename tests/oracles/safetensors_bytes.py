"""A safetensors file as raw parts, to take apart, change and put together again in tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class RawTensor:
    dtype: str
    shape: list[int]
    data: bytes


@dataclass
class RawSafetensors:
    """Tensors of one file by name, in order, and its ``__metadata__``."""

    tensors: dict[str, RawTensor]
    metadata: dict[str, str] | None

    @classmethod
    def read(cls, path: Path) -> RawSafetensors:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header: dict[str, Any] = json.loads(data[8 : 8 + length])
        metadata = header.pop("__metadata__", None)
        payload = data[8 + length :]
        tensors = {
            name: RawTensor(entry["dtype"], entry["shape"], payload[slice(*entry["data_offsets"])])
            for name, entry in header.items()
        }
        return cls(tensors, metadata)

    def write(self, path: Path) -> None:
        header: dict[str, Any] = {} if self.metadata is None else {"__metadata__": self.metadata}
        at = 0
        for name, tensor in self.tensors.items():
            header[name] = {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "data_offsets": [at, at + len(tensor.data)],
            }
            at += len(tensor.data)
        text = json.dumps(header).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        body = b"".join(tensor.data for tensor in self.tensors.values())
        path.write_bytes(len(text).to_bytes(8, "little") + text + body)
