"""What low-bit types and recipes cost: KL divergence and argmax agreement against the checkpoint, by size.

    python benchmarks/low_bit_quality.py --save benchmarks/results/low_bit_quality.json

The fixture has FP8 experts, which hold nine tenths of its elements, and hash-routed layers, whose choice no rounding
changes. Each type is that of the experts, the rest has the defaults. Each of llama.cpp's file types
(``llama_model_quantize`` on our F32 GGUF) stands against the same types with the protected tensors kept, and against
types of at most the same size: Q8_0 for everything but the experts, as in all recipes, and the experts' matrices raised
from IQ2_XXS on as far as the size allows. All of them use one importance matrix, which ``imatrix`` collects on other
tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import circumstances, save

from dsv4convert.api import convert_gguf, imatrix, load_model
from dsv4convert.containers.gguf import open_gguf
from dsv4convert.containers.imatrix import importance, read_imatrix
from dsv4convert.formats.ggml_types import BY_NAME
from dsv4convert.reference.compare import logits_difference
from dsv4convert.synth.write import write_synth

LAYERS = (4, 128)  # ratios
SHAPE = {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "q_lora_rank": 256,
    "o_lora_rank": 64,
    "num_attention_heads": 4,
    "o_groups": 2,
    "index_n_heads": 2,
    "index_topk": 512,  # more than there are entries: they are no choice, either
    "num_experts_per_tok": 4,
    "num_hash_layers": len(LAYERS),
}
EXPERTS, VOCAB = 48, 384
TOKENS = 512

# Letters that are tokens of the synthetic tokenizer, in words of up to eight.
LETTERS = "etaoinshrdlu"
WORDS = 3000

TYPES = ("q8_0", "q6_k", "q5_k", "q4_k", "iq4_xs", "mxfp4", "q3_k", "iq3_xxs", "q2_k", "iq2_xxs", "iq1_m")
RECIPES = ("q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q3_k_m", "iq3_xxs", "q2_k", "q2_k_s", "iq2_xxs")
# Numbers of llama.cpp's file types.
FILE_TYPES = {"Q6_K": 18, "Q5_K_M": 17, "Q4_K_M": 15, "IQ4_XS": 30, "Q3_K_M": 12, "Q2_K": 10}
# What recipes choose for everything but the experts, and the types of experts by size.
REST: dict[str, Any] = {"dense": "q8_0", "output_type": "q6_k", "embedding_type": "q8_0"}
LADDER = ("iq2_xxs", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
# What recipes keep, and llama.cpp's file types do not.
PROTECTED = re.compile(r"hc_|_ape|compressor|indexer")


class Fixture:
    """The checkpoint, its F32 GGUF, an importance matrix, and what the checkpoint makes of the tokens to judge by."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source, self.wide, self.matrix = folder / "base", folder / "wide.gguf", folder / "imatrix.gguf"
        folder.mkdir(parents=True, exist_ok=True)
        if not self.source.exists():
            write_synth(
                self.source, "tiny", variant="base", ratios=LAYERS, experts=EXPERTS, vocab=VOCAB, mtp=False,
                overrides=SHAPE,
            )  # fmt: skip
        random = np.random.default_rng(1)
        words = ("".join(random.choice(list(LETTERS), random.integers(1, 9))) for _ in range(WORDS))
        text = folder / "text.txt"
        text.write_text(" ".join(words))
        convert_gguf(self.source, self.wide, dense="f32", experts="f32", overwrite=True, fresh=True)
        imatrix(self.source, self.matrix, text=text, context_size=256, chunks=16, overwrite=True)
        self.tokens = np.random.default_rng(7).integers(0, VOCAB, TOKENS)
        self.logits = load_model(self.source).forward(self.tokens)

    def judge(self, path: Path, **facts: Any) -> dict[str, Any]:
        """Return a file's size and what the difference of its logits means, and remove it."""
        difference = logits_difference(self.logits, load_model(path).forward(self.tokens))
        row = {
            **facts,
            "bytes": path.stat().st_size,
            "kl_mean": difference.kl_mean,
            "kl_max": difference.kl_max,
            "argmax_agreement": difference.argmax_agreement,
        }
        for leftover in path.parent.glob(path.name + "*"):
            leftover.unlink()
        print(
            f"{facts['by']:<12} {facts['name']:<20} {row['bytes'] / 1e6:7.2f} MB  KL {row['kl_mean']:.2e} mean,"
            f" {row['kl_max']:.2e} largest; argmax {row['argmax_agreement']:.1%}",
            flush=True,
        )
        return row

    def convert(self, by: str, name: str, **options: Any) -> dict[str, Any]:
        """Convert the checkpoint with options and judge the file."""
        path = self.folder / "ours.gguf"
        convert_gguf(self.source, path, imatrix=self.matrix, overwrite=True, fresh=True, **options)
        return self.judge(path, by=by, name=name)

    def file_type(self, name: str) -> Iterable[dict[str, Any]]:
        """Judge a file type of llama.cpp, and the same types with what recipes protect."""
        path = self.folder / "theirs.gguf"
        command = [sys.executable, __file__, "--quantise", str(FILE_TYPES[name]), "--folder", str(self.folder)]
        subprocess.run(command, check=True, capture_output=True)
        nbytes = path.stat().st_size
        kinds = {tensor.name: tensor.type for tensor in open_gguf(path).tensors.values() if len(tensor.shape) > 1}
        yield self.judge(path, by="llama.cpp", name=name)
        rules = [f"^{re.escape(tensor)}$={kind}" for tensor, kind in kinds.items() if kind not in ("f32", "i32")]
        kept = [rule for rule in rules if not PROTECTED.search(rule)]
        yield self.convert("protected", name, tensor_type=kept)
        yield self.convert("same size", name, tensor_type=self.fitted(nbytes), **REST)

    def fitted(self, nbytes: int) -> list[str]:
        """Return types of the experts' matrices with which the file has at most ``nbytes``: down projections first."""
        matrices = [f"blk.{n}.ffn_{part}_exps" for part in ("down", "gate", "up") for n in range(len(LAYERS))]
        elements = EXPERTS * SHAPE["hidden_size"] * SHAPE["moe_intermediate_size"]
        path = self.folder / "ours.gguf"
        convert_gguf(self.source, path, experts="q8_0", overwrite=True, fresh=True, **REST)
        left = nbytes - (path.stat().st_size - len(matrices) * BY_NAME["q8_0"].row_bytes(elements))
        level = dict.fromkeys(matrices, 0)
        left -= len(matrices) * BY_NAME[LADDER[0]].row_bytes(elements)
        for better in range(1, len(LADDER)):
            more = BY_NAME[LADDER[better]].row_bytes(elements) - BY_NAME[LADDER[better - 1]].row_bytes(elements)
            for matrix in matrices:
                if level[matrix] == better - 1 and left >= more:
                    level[matrix], left = better, left - more
        return [f"^{re.escape(matrix)}={LADDER[number]}" for matrix, number in level.items()]


def quantise(fixture: Path, file_type: int) -> None:
    """Make ``theirs.gguf`` of the F32 GGUF with llama.cpp's own choice of types."""
    import llama_cpp

    matrix = read_imatrix(fixture / "imatrix.gguf")
    values = {}
    for name, entry in matrix.entries.items():
        sums = np.fromfile(entry.file, "<f4", entry.values, offset=entry.offset).reshape(-1, entry.columns)
        rows = [importance(row, count, entry.is_legacy) for row, count in zip(sums, entry.counts, strict=True)]
        values[name] = np.ascontiguousarray(rows, np.float32)
    entries = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
    for place, (name, array) in zip(entries, values.items(), strict=False):
        place.name, place.size = name.encode(), array.size
        place.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    parameters.imatrix = ctypes.cast(entries, type(parameters.imatrix))
    source, out = (str(fixture / name).encode() for name in ("wide.gguf", "theirs.gguf"))
    raise SystemExit(llama_cpp.llama_model_quantize(source, out, parameters))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/dsv4convert-low-bit-quality"))
    parser.add_argument("--save", type=Path)
    parser.add_argument("--quantise", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quantise is not None:
        quantise(arguments.folder, arguments.quantise)
    import llama_cpp

    fixture = Fixture(arguments.folder)
    rows = [fixture.convert("experts", kind, experts=kind) for kind in TYPES]
    rows += [fixture.convert("recipe", name, recipe=name) for name in RECIPES]
    for name in FILE_TYPES:
        rows += fixture.file_type(name)
    if arguments.save is not None:
        facts = {
            **circumstances(),
            "llama_cpp_python": llama_cpp.__version__,
            "command": "python benchmarks/low_bit_quality.py",
            "shape": {**SHAPE, "n_routed_experts": EXPERTS, "vocab_size": VOCAB, "compress_ratios": list(LAYERS)},
            "tokens": TOKENS,
        }
        save({**facts, "results": rows}, arguments.save)


if __name__ == "__main__":
    main()
