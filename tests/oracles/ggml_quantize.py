"""llama.cpp's own quantiser of whole files, as the reference for the bytes of low-bit tensors.

    python -m tests.oracles.ggml_quantize ASKED.json

``ASKED`` names the F32 ``source``, the ``out`` to write, ggml's type number by tensor in ``types`` or llama.cpp's
``file_type``, and an ``imatrix`` (.npz by tensor, [experts, columns]) or null. In a process of its own, since the
library ends the process on errors.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader

F32, OUTPUT, EMBEDDING = 0, "output.weight", "token_embd.weight"
ROOT = Path(__file__).resolve().parents[2]


def quantise(
    source: Path,
    out: Path,
    types: dict[str, int],
    imatrix: dict[str, np.ndarray] | None = None,
    file_type: int | None = None,
) -> None:
    """Write the F32 GGUF ``source`` with ``types`` (ggml's numbers; tensors not named keep F32) to ``out``.

    With a ``file_type``, types are llama.cpp's own choice for it.
    """
    asked = out.with_suffix(".json")
    matrix = None
    if imatrix is not None:
        matrix = str(out.with_suffix(".npz"))
        np.savez(matrix, **imatrix)
    document = {"source": str(source), "out": str(out), "types": types, "imatrix": matrix, "file_type": file_type}
    asked.write_text(json.dumps(document))
    done = subprocess.run(
        [sys.executable, "-m", "tests.oracles.ggml_quantize", str(asked)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def _run(asked: dict[str, object]) -> int:
    import llama_cpp

    types: dict[str, int] = asked["types"]  # type: ignore[assignment]
    names = [tensor.name for tensor in GGUFReader(str(asked["source"])).tensors]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = 2
    parameters.ftype = asked["file_type"] or 15  # any file type of a quantised default where every tensor is named
    overrides = (llama_cpp.llama_cpp.llama_model_tensor_override * (len(names) + 1))()
    for override, name in zip(overrides, names, strict=False):
        override.pattern, override.type = f"^{re.escape(name)}$".encode(), types.get(name, F32)
    if asked["file_type"] is None:
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
    return int(llama_cpp.llama_model_quantize(str(asked["source"]).encode(), str(asked["out"]).encode(), parameters))


if __name__ == "__main__":
    raise SystemExit(_run(json.loads(Path(sys.argv[1]).read_text())))
