"""Low-bit tensors hold the bytes that llama.cpp's own quantiser gives on our F32 file of the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from dsv4convert.api import convert_gguf
from dsv4convert.formats.ggml_types import BY_NAME, NEED_IMPORTANCE, QUANTISED

from ..checkpoints import MakeCheckpoint
from ..low_bit import SLOW, SMALL, WHOLE, write_imatrix
from ..oracles.ggml_quantize import quantise

pytestmark = pytest.mark.llama
pytest.importorskip("llama_cpp")

# Rows of whole super-blocks, and rows that are none.
SHAPES = {"whole": WHOLE, "ragged": {**WHOLE, "moe_intermediate_size": 96, "q_lora_rank": 96}}
EXACT = {"f32", "f16", "bf16", "i32"}


def tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        tensor.name: (tensor.tensor_type.name.lower(), list(tensor.shape), tensor.data.tobytes())
        for tensor in GGUFReader(path).tensors
    }


@pytest.fixture(scope="module", params=SHAPES)
def source(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("tiny", overrides=SHAPES[request.param], **SMALL)


@pytest.fixture(scope="module")
def wide(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the F32 file of the checkpoint."""
    path = tmp_path_factory.mktemp("wide") / "wide.gguf"
    convert_gguf(source, path, dense="f32", experts="f32", threads=2)
    return path


@pytest.fixture(scope="module")
def imatrix(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """Return an importance matrix of all tensors as a file, and as llama.cpp is given it."""
    random = np.random.default_rng(11)
    sums, counts = {}, {}
    for tensor in GGUFReader(wide).tensors:
        if len(tensor.shape) < 2 or tensor.name == "token_embd.weight":
            continue
        experts = int(tensor.shape[2]) if len(tensor.shape) > 2 else 1
        sums[tensor.name] = (random.standard_normal((experts, int(tensor.shape[0]))) ** 4).astype(np.float32)
        counts[tensor.name] = random.integers(0, 50, experts)  # some experts met no token
    path = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    write_imatrix(path, sums, counts, datasets=["text"], chunks=3, chunk_size=512)
    given = {
        name: np.where(counts[name][:, None] > 0, values / np.maximum(counts[name], 1)[:, None].astype(np.float32), 1)
        for name, values in sums.items()
    }
    return path, given


def compare(ours: Path, wide: Path, folder: Path, imatrix: dict[str, np.ndarray] | None, least: int) -> None:
    made = tensors(ours)
    low = {name: kind for name, (kind, _, _) in made.items() if kind not in EXACT}
    assert len(low) >= least
    theirs = folder / "theirs.gguf"
    quantise(wide, theirs, {name: BY_NAME[kind].number for name, kind in low.items()}, imatrix)
    expected = tensors(theirs)
    assert made.keys() == expected.keys()
    for name in low:
        assert made[name] == expected[name], name


RECIPES = ("q2_k_s", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "iq2_xxs", "iq3_xxs", "iq4_xs")


@pytest.mark.parametrize("kind", [kind for kind in QUANTISED if kind not in SLOW])
def test_every_type_with_importance(
    kind: str, source: Path, wide: Path, imatrix: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    path, given = imatrix
    ours = tmp_path / "ours.gguf"
    convert_gguf(source, ours, dense=kind, experts=kind, imatrix=path, threads=2)
    compare(ours, wide, tmp_path, given, least=3)


@pytest.mark.parametrize("kind", SLOW)
def test_slow_types_with_importance(
    kind: str, source: Path, wide: Path, imatrix: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    """Of the slow types, one tensor."""
    path, given = imatrix
    ours = tmp_path / "ours.gguf"
    convert_gguf(source, ours, experts="q4_k", tensor_type=[f"ffn_gate_exps={kind}"], imatrix=path, threads=2)
    compare(ours, wide, tmp_path, given, least=3)
    assert tensors(ours)["blk.0.ffn_gate_exps.weight"][0] == kind


@pytest.mark.parametrize("kind", [kind for kind in QUANTISED if kind not in NEED_IMPORTANCE])
def test_every_type_without_importance(kind: str, source: Path, wide: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours.gguf"
    convert_gguf(source, ours, dense=kind, experts=kind, pure=True, threads=2)
    compare(ours, wide, tmp_path, None, least=3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(
    recipe: str, source: Path, wide: Path, imatrix: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    path, given = imatrix
    ours = tmp_path / "ours.gguf"
    convert_gguf(source, ours, recipe=recipe, imatrix=path, threads=2)
    compare(ours, wide, tmp_path, given, least=12)


def test_metadata_name_the_matrix(source: Path, imatrix: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    path, given = imatrix
    ours = tmp_path / "ours.gguf"
    convert_gguf(source, ours, recipe="q4_k_m", imatrix=path, threads=2)
    reader = GGUFReader(ours)
    stated = {
        key: reader.get_field(f"quantize.imatrix.{key}").contents()
        for key in ("file", "dataset", "entries_count", "chunks_count")
    }
    assert stated == {"file": str(path)[:127], "dataset": "text", "entries_count": len(given), "chunks_count": 3}
    assert reader.get_field("general.file_type").contents() == 15
