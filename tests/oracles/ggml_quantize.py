"""llama.cpp's own quantiser of whole files, as the reference for the bytes of low-bit tensors.

It is asked for one file at a time: the F32 ``source``, the ``out`` to write, llama.cpp's ``file_type``, ggml's type
number by tensor in ``types`` (none: llama.cpp's own choice), an ``imatrix`` (.npz by tensor, [experts, columns]) or
null, and ``stated``, what the metadata say of that. In a process of its own, since the library ends the process on
errors; it stays, since the grids of a type take up to eight seconds to set up.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf import GGUFReader

from .server import Server, serve

Q4_K_M = 15  # a file type of a quantised default, as good as any where all tensors are named
F32, OUTPUT, EMBEDDING = 0, "output.weight", "token_embd.weight"


@dataclass(frozen=True)
class Asked:
    """A file to make: the F32 GGUF ``source`` with ``types`` (ggml's numbers; others keep F32) at ``out``.

    Without ``types`` they are llama.cpp's own choice for the ``file_type``. ``stated`` are values of
    ``quantize.imatrix`` keys, as llama-quantize hands them to the library.
    """

    source: Path
    out: Path
    types: dict[str, int]
    imatrix: dict[str, np.ndarray] | None = None
    file_type: int = Q4_K_M
    stated: dict[str, str | int] = field(default_factory=dict)


_SERVER = Server("-m", "tests.oracles.ggml_quantize")


def quantise(file: Asked) -> None:
    """Make a file."""
    matrix = None
    if file.imatrix is not None:
        matrix = str(file.out.with_suffix(".npz"))
        np.savez(matrix, **file.imatrix)
    asked = {
        "source": str(file.source),
        "out": str(file.out),
        "types": file.types,
        "imatrix": matrix,
        "file_type": file.file_type,
        "stated": file.stated,
    }
    assert _SERVER.ask(asked) == 0, _SERVER.said()


def _run(asked: dict[str, object]) -> int:
    import llama_cpp

    types: dict[str, int] = asked["types"]  # type: ignore[assignment]
    names = [tensor.name for tensor in GGUFReader(str(asked["source"])).tensors]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = 2
    parameters.ftype = asked["file_type"]
    overrides = (llama_cpp.llama_cpp.llama_model_tensor_override * (len(names) + 1))()
    for override, name in zip(overrides, names, strict=False):
        override.pattern, override.type = f"^{re.escape(name)}$".encode(), types.get(name, F32)
    if types:
        parameters.output_tensor_type = types.get(OUTPUT, F32)
        parameters.token_embedding_type = types.get(EMBEDDING, F32)
        parameters.tt_overrides = ctypes.cast(overrides, type(parameters.tt_overrides))
    if asked["imatrix"] is not None:
        values = {name: array.astype(np.float32) for name, array in np.load(str(asked["imatrix"])).items()}
        entries = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
        for entry, (name, array) in zip(entries, values.items(), strict=False):
            entry.name, entry.size = name.encode(), array.size
            entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        parameters.imatrix = ctypes.cast(entries, type(parameters.imatrix))
    stated: dict[str, str | int] = asked["stated"]  # type: ignore[assignment]
    pairs = (llama_cpp.llama_cpp.llama_model_kv_override * (len(stated) + 1))()
    for pair, (name, value) in zip(pairs, stated.items(), strict=False):
        pair.key = f"quantize.imatrix.{name}".encode()
        if isinstance(value, int):
            pair.tag, pair.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            pair.tag, pair.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
    if stated:
        parameters.kv_overrides = ctypes.cast(pairs, type(parameters.kv_overrides))
    return int(llama_cpp.llama_model_quantize(str(asked["source"]).encode(), str(asked["out"]).encode(), parameters))


if __name__ == "__main__":
    serve(_run)
