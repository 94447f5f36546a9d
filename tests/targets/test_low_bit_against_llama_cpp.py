"""Low-bit files hold the tensors and the metadata that llama.cpp's own quantiser makes of our F32 file."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from dsv4convert.api import convert_gguf
from dsv4convert.errors import LossyError, UsageError
from dsv4convert.formats.ggml_types import BY_NAME, NEED_IMPORTANCE, QUANTISED
from dsv4convert.targets import low_bit

from ..checkpoints import MakeCheckpoint
from ..low_bit import SLOW, SMALL, WHOLE, write_imatrix
from ..oracles.ggml_quantize import Asked, quantise
from ..oracles.gguf_bytes import RawGguf
from .folders import Editable

pytestmark = pytest.mark.llama
llama_cpp = pytest.importorskip("llama_cpp")

# Rows of whole super-blocks, and rows that are none.
SHAPES = {"whole": WHOLE, "ragged": {**WHOLE, "moe_intermediate_size": 96, "q_lora_rank": 96}}
FILE_TYPE, U32 = "general.file_type", 4
EXACT = {BY_NAME[name].number for name in ("f32", "f16", "bf16", "i32")}
# Published FP4 is moved as it is; llama.cpp sees floats, and chooses scales anew.
MOVED = BY_NAME["mxfp4"].number

# llama.cpp's file types have other names than the type where it mixes types, or has several mixtures.
MIXED = {"q3_k": "Q3_K_M", "q4_k": "Q4_K_M", "q5_k": "Q5_K_M", "mxfp4": "MXFP4_MOE"}


@dataclass(frozen=True)
class Case:
    """A checkpoint, its F32 GGUF, and an importance matrix of all tensors, as a file and as llama.cpp is given it."""

    source: Path
    wide: Path
    imatrix: Path
    given: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def cases(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Return a function that returns the case of one of ``SHAPES``, made once."""

    @cache
    def make(shape: str) -> Case:
        source = make_checkpoint("tiny", overrides=SHAPES[shape], **SMALL)
        folder = tmp_path_factory.mktemp(shape)
        convert_gguf(source, folder / "wide.gguf", dense="f32", experts="f32", threads=2)
        random = np.random.default_rng(11)
        sums, counts = {}, {}
        for tensor in GGUFReader(folder / "wide.gguf").tensors:
            if len(tensor.shape) < 2 or tensor.name == "token_embd.weight":
                continue
            experts = int(tensor.shape[2]) if len(tensor.shape) > 2 else 1
            sums[tensor.name] = (random.standard_normal((experts, int(tensor.shape[0]))) ** 4).astype(np.float32)
            counts[tensor.name] = random.integers(0, 50, experts)  # some experts met no token
        write_imatrix(folder / "imatrix.gguf", sums, counts, datasets=["text"], chunks=3, chunk_size=512)
        given = {
            name: np.where(
                counts[name][:, None] > 0, values / np.maximum(counts[name], 1)[:, None].astype(np.float32), 1
            )
            for name, values in sums.items()
        }
        return Case(source, folder / "wide.gguf", folder / "imatrix.gguf", given)

    return make


@pytest.fixture(params=SHAPES)
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


def file_type_of(kind: str) -> int:
    """Return llama.cpp's number of the file type that is mostly ``kind``."""
    number: int = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{MIXED.get(kind, kind.upper())}")
    return number


def quantised_as(kind: str) -> int:
    """Return the file type to ask llama.cpp for: it makes files of mostly NVFP4 under no number of their own."""
    return file_type_of("q4_k" if kind == "nvfp4" else kind)


def asked_of(ours: Path, case: Case, imatrix: dict[str, np.ndarray] | None, least: int, kind: str) -> Asked:
    """Return the file that llama.cpp has to make, in the types of ours."""
    low = {info.name: info.kind for info in RawGguf.read(ours).infos if info.kind not in EXACT}
    assert len(low) >= least
    stated: dict[str, str | int] = {}
    if imatrix is not None:  # what llama-quantize hands to the library
        stated = {
            "file": str(case.imatrix)[:127],
            "dataset": "text",
            "entries_count": len(case.given),
            "chunks_count": 3,
        }
    theirs = ours.with_name(f"theirs-{ours.name}")
    return Asked(case.wide, theirs, low, imatrix, quantised_as(kind), stated)


def check_equal(ours: Path, theirs: Path, kind: str) -> None:
    """Check that both files have the same tensors, byte for byte, and the same keys of the same types and values."""
    made, expected = RawGguf.read(ours), RawGguf.read(theirs)
    assert {info.name for info in made.infos} == {info.name for info in expected.infos}
    for mine in made.infos:
        other = expected.info(mine.name)  # llama.cpp puts output.weight first
        if mine.kind not in EXACT:
            assert (mine.kind, mine.dims) == (other.kind, other.dims), mine.name
            assert mine.data == other.data or mine.kind == MOVED, mine.name
    keys, others = ({key.name: (key.kind, key.value) for key in file.keys} for file in (made, expected))
    assert keys[FILE_TYPE] == (U32, struct.pack("<I", file_type_of(kind)))
    others[FILE_TYPE] = keys[FILE_TYPE] if quantised_as(kind) != file_type_of(kind) else others[FILE_TYPE]
    assert keys == others


def compare(ours: Path, case: Case, imatrix: dict[str, np.ndarray] | None, least: int, kind: str) -> None:
    asked = asked_of(ours, case, imatrix, least, kind)
    quantise(asked)
    check_equal(ours, asked.out, kind)


# Recipes, and the type of their routed experts that gives the file its type.
RECIPES = {
    "iq1_m": "iq1_m",
    "q2_k_s": "q2_k",
    "q2_k": "q2_k",
    "q3_k_m": "q3_k",
    "q4_k_m": "q4_k",
    "q5_k_m": "q5_k",
    "q6_k": "q6_k",
    "iq2_xxs": "iq2_xxs",
    "iq3_xxs": "iq3_xxs",
    "iq4_xs": "iq4_xs",
    "mxfp4-q8": "mxfp4",
}


@pytest.mark.parametrize("kind", [kind for kind in QUANTISED if kind not in SLOW])
def test_every_type_with_importance(kind: str, case: Case, tmp_path: Path) -> None:
    ours = tmp_path / "ours.gguf"
    convert_gguf(case.source, ours, dense=kind, experts=kind, imatrix=case.imatrix, threads=2)
    compare(ours, case, case.given, 3, kind)


def test_slow_types_with_importance(cases: Callable[[str], Case], tmp_path: Path) -> None:
    """One test, and so one process, makes all of them: it takes seconds to set up each type."""
    for shape in SHAPES:
        for kind in SLOW:
            case, ours = cases(shape), tmp_path / f"{shape}-{kind}.gguf"
            convert_gguf(case.source, ours, dense=kind, experts=kind, imatrix=case.imatrix, threads=2)
            assert BY_NAME[kind].number in asked_of(ours, case, case.given, 3, kind).types.values()
            compare(ours, case, case.given, 3, kind)


@pytest.mark.parametrize("kind", [kind for kind in QUANTISED if kind not in NEED_IMPORTANCE])
def test_every_type_without_importance(kind: str, case: Case, tmp_path: Path) -> None:
    ours = tmp_path / "ours.gguf"
    convert_gguf(case.source, ours, dense=kind, experts=kind, pure=True, threads=2)
    compare(ours, case, None, 3, kind)


@pytest.mark.parametrize("kind", ["q2_k", "iq3_xxs"])
def test_squared_weights_are_an_importance_matrix_of_them(kind: str, case: Case, tmp_path: Path) -> None:
    ours = tmp_path / "ours.gguf"
    convert_gguf(case.source, ours, dense=kind, experts=kind, importance="weights", threads=2)
    squares = {
        tensor.name: np.atleast_3d(np.square(tensor.data.astype(np.float64)).sum(axis=-2))
        .reshape(-1, tensor.shape[0])
        .astype(np.float32)
        for tensor in GGUFReader(case.wide).tensors
        if len(tensor.shape) > 1
    }
    asked = replace(asked_of(ours, case, squares, 3, kind), stated={})
    quantise(asked)
    check_equal(ours, asked.out, kind)


def test_a_matrix_in_several_segments_has_the_squares_of_all_its_rows(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An embedding of four tiles, and weights with scales: bytes depend neither on segments nor on threads."""
    source = make_checkpoint("tiny", overrides=WHOLE, **{**SMALL, "vocab": 8192})
    kinds = {"dense": "q4_0", "experts": "q4_0", "pure": True, "importance": "weights"}
    convert_gguf(source, tmp_path / "whole.gguf", threads=1, **kinds)
    monkeypatch.setattr(low_bit, "SEGMENT_ELEMENTS", 2**14)
    monkeypatch.setattr(low_bit, "LEAST_SEGMENT_ELEMENTS", 2**14)
    convert_gguf(source, tmp_path / "cut.gguf", threads=5, **kinds)
    assert (tmp_path / "cut.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("kind", sorted(NEED_IMPORTANCE))
def test_types_that_need_importance_are_refused_without_as_in_llama_cpp(
    kind: str, cases: Callable[[str], Case], tmp_path: Path
) -> None:
    case = cases("whole")
    with pytest.raises(UsageError, match=f"{kind} needs importance"):
        convert_gguf(case.source, tmp_path / "ours.gguf", experts=kind)
    name = "blk.0.ffn_down_exps.weight"
    with pytest.raises(AssertionError, match="this quantization requires an importance matrix"):
        quantise(Asked(case.wide, tmp_path / "theirs.gguf", {name: BY_NAME[kind].number}))


@pytest.mark.parametrize("bits", [0x7FC0, 0xFF80], ids=["nan", "infinity"])
def test_values_that_are_not_finite_are_refused_by_tensor_and_column(
    bits: int, editable: Callable[..., Editable], tmp_path: Path
) -> None:
    source = editable(overrides=WHOLE, **SMALL)

    def spoil(rows: np.ndarray) -> None:
        rows.view("<u2")[2, 5] = bits

    source.edit("head.weight", spoil)
    value = "nan" if bits == 0x7FC0 else "-inf"
    says = f"stored as q4_0 .while making tensor output.weight.*got {value} in column 5"
    with pytest.raises(LossyError, match=says):
        convert_gguf(source.folder, tmp_path / "ours.gguf", output_type="q4_0")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize("kind", ["q4_0", "q5_1", "tq2_0", "q1_0", "q4_k", "iq4_xs"])
def test_scales_that_float16_does_not_hold_are_counted(
    kind: str, editable: Callable[..., Editable], tmp_path: Path
) -> None:
    source = editable(overrides=WHOLE, **SMALL)

    def spoil(rows: np.ndarray) -> None:
        rows.view("<u2")[2, :256] = 0x4E6E  # 1e9
        rows.view("<u2")[3, :256] = 0x46FF  # 32640

    source.edit("head.weight", spoil)
    (counted,) = (
        counted
        for counted in convert_gguf(source.folder, tmp_path / "ours.gguf", output_type=kind).counted
        if counted["tensor"] == "output.weight"
    )
    assert counted["overflow"] == 256


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe: str, case: Case, tmp_path: Path) -> None:
    ours = tmp_path / "ours.gguf"
    convert_gguf(case.source, ours, recipe=recipe, imatrix=case.imatrix, threads=2)
    compare(ours, case, case.given, 12, RECIPES[recipe])


@pytest.mark.parametrize("recipe", ["q2_k_s", "q3_k_m", "q4_k_m", "iq4_xs"])
def test_recipes_without_importance(recipe: str, case: Case, tmp_path: Path) -> None:
    ours = tmp_path / "ours.gguf"
    convert_gguf(case.source, ours, recipe=recipe, threads=2)
    compare(ours, case, None, 12, RECIPES[recipe])


@pytest.mark.parametrize("recipe", ["ds4-q2", "ds4-q2-q4"])
def test_recipes_of_ds4(recipe: str, cases: Callable[[str], Case], tmp_path: Path) -> None:
    """The port reads no type that rows of other lengths fall back to."""
    case, ours = cases("whole"), tmp_path / "ours.gguf"
    convert_gguf(case.source, ours, recipe=recipe, dialect="ds4", imatrix=case.imatrix, threads=2)
    compare(ours, case, case.given, 12, "iq2_xxs")
