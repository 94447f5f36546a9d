"""Activation statistics as llama.cpp's own graph yields them, collected by the rules of its imatrix tool.

    python -m tests.oracles.llama_imatrix MODEL.gguf CHUNKS.npy OUT.npz

``CHUNKS`` are token ids [chunks, tokens]. ``OUT`` holds ``NAME.in_sum2`` [matrices, columns] and ``NAME.counts``
[matrices] for every matrix of a block. In a process of its own, since the library ends the process on errors.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[2]
F32, F32_BYTES = 0, 4

Array = npt.NDArray[Any]


class Tensor(ctypes.Structure):
    """``struct ggml_tensor`` of ggml.h, as far as it is looked at."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


def collect(model: Path, chunks: Array, folder: Path) -> dict[str, tuple[Array, Array]]:
    """Return sums [matrices, columns] and counts [matrices] by tensor of the GGUF ``model`` run over ``chunks``."""
    asked, out = folder / "chunks.npy", folder / "theirs.npz"
    np.save(asked, chunks)
    done = subprocess.run(
        [sys.executable, "-m", "tests.oracles.llama_imatrix", str(model), str(asked), str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(out) as file:
        names = {name.removesuffix(".counts") for name in file.files if name.endswith(".counts")}
        return {name: (file[f"{name}.in_sum2"], file[f"{name}.counts"]) for name in names}


def _values(tensor: Tensor, dtype: type, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """Return the values of a tensor in the main memory as an array that looks at them."""
    nbytes = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + F32_BYTES
    buffer = (ctypes.c_char * nbytes).from_address(tensor.data)
    return np.ndarray(shape, dtype, buffer, strides=strides)


class Collector:
    """What llama.cpp's imatrix tool does with every product of a weight and activations."""

    def __init__(self) -> None:
        self.sums: dict[str, Array] = {}
        self.counts: dict[str, Array] = {}

    def see(self, op: str, weight: Tensor, x: Tensor, ids: Any) -> None:
        name = weight.name.decode()
        # All four dimensions, slowest first.
        shape, strides = tuple(x.ne)[::-1], tuple(x.nb)[::-1]
        values = _values(x, np.float32, shape, strides).astype(np.float64)
        if op == "MUL_MAT_ID":
            matrices = int(weight.ne[2])
            sums = self.sums.setdefault(name, np.zeros((matrices, shape[3])))
            counts = self.counts.setdefault(name, np.zeros(matrices))
            ids = ids.contents
            chosen = _values(ids, np.int32, (int(ids.ne[1]), int(ids.ne[0])), (int(ids.nb[1]), int(ids.nb[0])))
            for row, experts in enumerate(chosen):
                for number, expert in enumerate(experts):
                    sums[expert] += values[0, row, number % shape[2]] ** 2
                    counts[expert] += 1
            return
        matrices = int(weight.ne[2] * weight.ne[3])
        sums = self.sums.setdefault(name, np.zeros((matrices, shape[3])))
        counts = self.counts.setdefault(name, np.zeros(1))
        for number, rows in enumerate(values.reshape(-1, shape[2], shape[3])):
            sums[number % matrices] += (rows**2).sum(axis=0)
        counts += values.size // shape[3] // matrices


def _run(model_path: str, chunks: Array, out: str) -> None:
    import llama_cpp
    from llama_cpp import llama_cpp as api

    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_op_name.restype = ctypes.c_char_p
    collector = Collector()

    def on_node(address: int, ask: bool, _: object) -> bool:
        node = Tensor.from_address(address)
        op = library.ggml_op_name(node.op).decode()
        if op not in ("MUL_MAT", "MUL_MAT_ID") or not node.src[0].contents.name.startswith(b"blk."):
            return not ask
        if not ask:
            collector.see(op, node.src[0].contents, node.src[1].contents, node.src[2])
        return True

    callback = api.ggml_backend_sched_eval_callback(on_node)
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(model_path.encode(), parameters)
    size = chunks.shape[1]
    for tokens in chunks:
        context_parameters = llama_cpp.llama_context_default_params()
        context_parameters.n_ctx = context_parameters.n_batch = context_parameters.n_ubatch = size
        context_parameters.type_k = context_parameters.type_v = F32
        context_parameters.cb_eval = callback
        context = llama_cpp.llama_init_from_model(model, context_parameters)
        batch = llama_cpp.llama_batch_init(size, 0, 1)
        batch.n_tokens = size
        for position, token in enumerate(tokens.tolist()):
            batch.token[position], batch.pos[position] = token, position
            batch.n_seq_id[position], batch.seq_id[position][0], batch.logits[position] = 1, 0, 1
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("the batch was not decoded")
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
    arrays = {f"{name}.in_sum2": values for name, values in collector.sums.items()}
    arrays |= {f"{name}.counts": values for name, values in collector.counts.items()}
    np.savez(out, **arrays)


if __name__ == "__main__":
    _run(sys.argv[1], np.load(sys.argv[2]), sys.argv[3])
