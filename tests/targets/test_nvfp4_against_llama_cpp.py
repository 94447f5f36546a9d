"""NVFP4 experts in a GGUF: llama.cpp's own packing, and what its library computes of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsv4convert.containers.gguf import open_gguf
from dsv4convert.reference import Model
from dsv4convert.reference.weights.open import open_source

from ..checkpoints import MakeCheckpoint
from ..command_line import run_cli
from ..oracles.llama_cpp import llama_cpp_folder
from ..oracles.safetensors_bytes import RawTensor
from ..packed import MODELOPT, Tensors, modelopt_nvfp4, repacked, tensor
from ..reference.test_llama import cosines, llama_logits

pytestmark = pytest.mark.llama

SIZES = {"hidden_size": 256, "moe_intermediate_size": 128}

# Run with llama.cpp's folder, a file of codes and scales, and the file to write.
PACK = """
import sys
import numpy as np
root, given, out = sys.argv[1:]
sys.path[:0] = [root, root + "/gguf-py"]
import torch
from conversion.base import ModelBase
with np.load(given) as found:
    codes, scale = torch.from_numpy(found["codes"]), torch.from_numpy(found["scale"])
raw, _ = ModelBase._nvfp4_pack(codes, scale.view(torch.float8_e4m3fn))
np.save(out, raw)
"""


def whole(stem: str, codes: np.ndarray, powers: np.ndarray, random: np.random.Generator) -> Tensors:
    """NVFP4 whose second scale is 1, so that it needs no tensor: small e4m3 scales."""
    made = modelopt_nvfp4(stem, codes, powers, random)
    made[f"{stem}.weight_scale_2"] = RawTensor("F32", [], np.float32(1).tobytes())
    made[f"{stem}.weight_scale"] = tensor(
        "F8_E4M3", random.integers(1, 16, (len(codes), codes.shape[1] // 8), np.uint8)
    )
    return made


def converted(source: Path, out: Path) -> Path:
    assert run_cli("hf-to-gguf", source, out, "--quiet", "--dense", "f32").code == 0
    return out


def test_blocks_are_those_of_llama_cpps_converter(tmp_path: Path) -> None:
    from dsv4convert.formats.base import Scratch, Tally
    from dsv4convert.formats.nvfp4 import nvfp4_to_ggml

    random = np.random.default_rng(2)
    codes = random.integers(0, 256, (24, 160), np.uint8)
    scale = random.integers(0, 0x7F, (24, 20), np.uint8)
    np.savez(tmp_path / "given.npz", codes=codes, scale=scale)
    words = [sys.executable, "-c", PACK, llama_cpp_folder(), tmp_path / "given.npz", tmp_path / "raw.npy"]
    subprocess.run(list(map(str, words)), check=True)
    ours = np.empty((24, 5 * 36), np.uint8)
    nvfp4_to_ggml(codes, scale, ours, Scratch(), Tally())
    assert np.array_equal(np.load(tmp_path / "raw.npy"), ours)


def test_llama_cpp_computes_what_the_reference_does(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    small = make_checkpoint("tiny", vocab=400, overrides=SIZES)
    path = converted(repacked(small, tmp_path, whole, quantization=MODELOPT), tmp_path / "m.gguf")
    assert not any(name.endswith(".scale") for name in open_gguf(path).tensors)
    tokens = np.random.default_rng(0).integers(5, 390, 60).tolist()
    ours = Model(open_source(path)).forward(tokens).astype(np.float64)
    assert np.median(cosines(ours, llama_logits(path, tokens))) > 0.999


def test_llama_cpp_does_not_multiply_by_second_scales(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Which the note of a conversion says. Where this fails, a newer llama.cpp does, and the note has to go."""
    small = make_checkpoint("tiny", vocab=400, overrides=SIZES)
    path = converted(repacked(small, tmp_path, modelopt_nvfp4, quantization=MODELOPT), tmp_path / "m.gguf")
    tokens = np.random.default_rng(0).integers(5, 390, 60).tolist()
    theirs = llama_logits(path, tokens)
    ours = Model(open_source(path)).forward(tokens).astype(np.float64)
    content = bytearray(path.read_bytes())
    for name, held in open_gguf(path).tensors.items():
        if name.endswith("_exps.scale"):
            content[held.offset : held.offset + held.nbytes] = np.ones(held.shape, "<f4").tobytes()
    (tmp_path / "ones.gguf").write_bytes(content)
    assert np.array_equal(llama_logits(tmp_path / "ones.gguf", tokens), theirs)
    assert np.median(cosines(ours, theirs)) < 0.99
