"""Low-bit GGUFs verify byte for byte where they can be made anew, by their error where not; damage is caught."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsv4convert.api import convert_gguf, inspect, verify
from dsv4convert.containers.gguf import open_gguf
from dsv4convert.errors import DeviceError
from dsv4convert.formats import ggml
from dsv4convert.formats.ggml_types import BY_NAME, NEED_IMPORTANCE, QUANTISED
from dsv4convert.verification import Report, low_bit

from ..checkpoints import MakeCheckpoint
from ..command_line import run_cli
from ..low_bit import SLOW, SMALL, WHOLE, write_imatrix

pytest.importorskip("llama_cpp")

UP, DOWN = "blk.0.ffn_up_exps.weight", "blk.0.ffn_down_exps.weight"


@pytest.fixture(scope="module")
def source(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("tiny", overrides=WHOLE, **SMALL)


@pytest.fixture(scope="module")
def imatrix(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imatrix")
    convert_gguf(source, folder / "plain.gguf", threads=2)
    random = np.random.default_rng(5)
    sums, counts = {}, {}
    for name, tensor in open_gguf(folder / "plain.gguf").tensors.items():
        if len(tensor.shape) > 1 and name != "token_embd.weight":
            experts = tensor.shape[0] if len(tensor.shape) > 2 else 1
            sums[name] = (random.standard_normal((experts, tensor.shape[-1])) ** 2).astype(np.float32)
            counts[name] = np.arange(experts)  # the first expert met no token
    write_imatrix(folder / "imatrix.gguf", sums, counts, datasets=["text"], chunks=3, chunk_size=512)
    return folder / "imatrix.gguf"


@pytest.fixture(scope="module")
def q2_k(source: Path, imatrix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Q2_K file with MXFP4 down projections and importance."""
    path = tmp_path_factory.mktemp("q2_k") / "model.gguf"
    convert_gguf(source, path, recipe="q2_k", imatrix=imatrix, threads=2)
    return path


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path | None = None) -> ggml.Quantiser:
        raise DeviceError("ggml's library is missing")

    monkeypatch.setattr("dsv4convert.verification.find_quantiser", missing)


def changed(path: Path, out: Path, name: str, change: Callable[[np.ndarray], object]) -> Path:
    """Write a copy of a file with the blocks [n, bytes] of one tensor changed."""
    tensor, content = open_gguf(path).tensors[name], bytearray(path.read_bytes())
    change(np.frombuffer(content, np.uint8, tensor.nbytes, tensor.offset).reshape(-1, BY_NAME[tensor.type].nbytes))
    out.write_bytes(content)
    return out


def wrong(report: Report) -> dict[str, int]:
    return {name: result.wrong for name, result in report.results.items() if result.wrong}


@pytest.mark.parametrize("kind", [kind for kind in QUANTISED if kind not in SLOW and kind not in NEED_IMPORTANCE])
@pytest.mark.parametrize("has_library", [True, False], ids=["library", "alone"])
def test_every_type_verifies(
    kind: str, has_library: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense, expert and BF16-stored tensors, and 2-D tensors that usually keep F32."""
    path = tmp_path / "x.gguf"
    convert_gguf(source, path, dense=kind, experts=kind, pure=True, tensor_type=[f"hc_attn_fn={kind}"], threads=2)
    if not has_library:
        without_library(monkeypatch)
    report = verify(source, path, threads=2)
    assert report.problems == []
    assert ("made anew by ggml" in " ".join(report.notes)) == has_library
    assert ("error alone" in " ".join(report.notes)) != has_library
    assert "blk.0.hc_attn_fn.weight" in " ".join(report.notes)
    families = {total.family: total for total in report.low_bit()}
    assert {"routed experts", "attention", "hyper-connections"} <= families.keys()
    assert all(0 < total.relative_rmse < 1.2 for total in families.values())


@pytest.mark.parametrize("kind", SLOW)
def test_slow_types_verify(kind: str, source: Path, imatrix: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    convert_gguf(source, path, tensor_type=[f"ffn_gate_exps={kind}"], imatrix=imatrix, threads=2)
    report = verify(source, path, imatrix=imatrix, threads=2)
    assert report.problems == []
    assert report.results["blk.0.ffn_gate_exps.weight"].is_low_bit


@pytest.mark.parametrize("kind", ["q2_k", "iq2_xxs", "iq3_xxs"])
def test_the_weights_own_squares_are_recognised(kind: str, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    convert_gguf(source, path, experts=kind, importance="weights", threads=2)
    assert verify(source, path, threads=2).problems == []
    flipped = changed(path, tmp_path / "y.gguf", UP, lambda blocks: blocks[5].__setitem__(20, blocks[5][20] ^ 1))
    assert wrong(verify(source, flipped)) == {UP: 256}


def test_importance_is_asked_for_by_name(source: Path, q2_k: Path, imatrix: Path) -> None:
    alone = verify(source, q2_k)
    assert alone.problems == []
    assert any("--imatrix FILE" in note for note in alone.notes)
    report = verify(source, q2_k, imatrix=imatrix)
    assert report.problems == []
    assert any("byte for byte" in note for note in report.notes)


def test_another_importance_matrix_is_told_apart(source: Path, q2_k: Path, imatrix: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    random = np.random.default_rng(6)
    sums = {UP: random.random((2, 256)).astype(np.float32)}
    write_imatrix(other, sums, {UP: np.ones(2, np.int64)}, datasets=["text"], chunks=3, chunk_size=512)
    report = verify(source, q2_k, imatrix=other)
    assert UP in wrong(report)
    assert "quantize.imatrix.entries_count" in {problem.where for problem in report.problems}


def test_an_importance_matrix_of_another_model_is_named(source: Path, q2_k: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    write_imatrix(
        other,
        {UP: np.ones((2, 32), np.float32)},
        {UP: np.ones(2, np.int64)},
        datasets=["text"],
        chunks=3,
        chunk_size=512,
    )
    problems = verify(source, q2_k, imatrix=other).problems
    assert any("was other.gguf made from another model?" in problem.what for problem in problems)


@pytest.mark.parametrize("at", range(0, BY_NAME["q2_k"].nbytes, 7))
def test_a_flipped_bit_is_caught(at: int, source: Path, q2_k: Path, imatrix: Path, tmp_path: Path) -> None:
    def flip(blocks: np.ndarray) -> None:
        blocks[at * 3, at] ^= 1 << at % 8

    path = changed(q2_k, tmp_path / "x.gguf", UP, flip)
    assert wrong(verify(source, path, imatrix=imatrix)) == {UP: 256}


def test_swapped_experts_are_caught_without_the_library(source: Path, q2_k: Path, tmp_path: Path) -> None:
    def swap(blocks: np.ndarray) -> None:
        half = len(blocks) // 2
        blocks[:] = np.concatenate([blocks[half:], blocks[:half]])

    path = changed(q2_k, tmp_path / "x.gguf", UP, swap)
    assert wrong(verify(source, path)).keys() == {UP}


def test_rows_in_another_order_are_caught_without_the_library(source: Path, q2_k: Path, tmp_path: Path) -> None:
    def roll(blocks: np.ndarray) -> None:
        blocks[:256] = np.roll(blocks[:256], 1, axis=0)

    assert wrong(verify(source, changed(q2_k, tmp_path / "x.gguf", UP, roll))).keys() == {UP}


@pytest.mark.parametrize("foreign", [True, False])
def test_a_scale_that_is_not_finite_is_caught_anywhere(foreign: bool, source: Path, q2_k: Path, tmp_path: Path) -> None:
    def infinite(blocks: np.ndarray) -> None:
        blocks[9, 80:82] = 0x00, 0x7C  # d of Q2_K

    report = verify(source, changed(q2_k, tmp_path / "x.gguf", UP, infinite), foreign=foreign)
    assert wrong(report).keys() == {UP}


def test_a_foreign_file_may_round_otherwise(source: Path, tmp_path: Path) -> None:
    """Q4_K made with importance is another quantiser's choice; zeroed blocks are nobody's."""
    path = tmp_path / "x.gguf"
    convert_gguf(source, path, experts="q4_k", threads=2)

    def other_code(blocks: np.ndarray) -> None:
        blocks[3, 40] ^= 1

    def zero(blocks: np.ndarray) -> None:
        blocks[3] = 0

    near = changed(path, tmp_path / "near.gguf", UP, other_code)
    assert wrong(verify(source, near)) == {UP: 256}
    assert verify(source, near, foreign=True).problems == []
    far = changed(path, tmp_path / "far.gguf", UP, zero)
    assert wrong(verify(source, far, foreign=True)) == {UP: 256}


def test_a_sample_looks_at_whole_rows(source: Path, q2_k: Path, imatrix: Path) -> None:
    report = verify(source, q2_k, imatrix=imatrix, sample=0.1)
    assert report.problems == []
    result = report.results[UP]
    assert 0 < result.compared < result.elements
    assert result.compared % 256 == 0


def test_the_report_tells_errors_by_tensor_and_by_family(source: Path, q2_k: Path, imatrix: Path) -> None:
    done = run_cli("verify", source, q2_k, "--imatrix", imatrix)
    assert done.code == 0, done.err
    assert "RMSE" in done.out
    printed = json.loads(run_cli("verify", source, q2_k, "--imatrix", imatrix, "--json").out)
    up = next(entry for entry in printed["inexact"] if entry["name"] == UP)
    family = next(entry for entry in printed["low_bit"] if entry["output"] == "q2_k")
    assert 0 < up["rmse"] < up["largest_error"]
    assert 0.1 < family["relative_rmse"] < 0.6
    down = next(entry for entry in printed["inexact"] if entry["output"] == "q8_0")
    assert down["rmse"] is None


def test_errors_are_those_of_the_gguf_package(source: Path, q2_k: Path, imatrix: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    made = next(tensor for tensor in GGUFReader(q2_k).tensors if tensor.name == UP)
    convert_gguf(source, q2_k.parent / "wide.gguf", experts="f32", overwrite=True)
    wide = next(tensor for tensor in GGUFReader(q2_k.parent / "wide.gguf").tensors if tensor.name == UP)
    error = dequantize(made.data, made.tensor_type).astype(np.float64).reshape(-1) - wide.data.reshape(-1)
    result = verify(source, q2_k, imatrix=imatrix).results[UP]
    assert result.rmse == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-9)
    assert result.largest_error == pytest.approx(np.abs(error).max(), rel=1e-9)


def test_q1_0_is_decoded_by_its_definition() -> None:
    raw = np.zeros((1, BY_NAME["q1_0"].nbytes), np.uint8)
    raw[0, :2] = np.array([1.5], np.float16).view(np.uint8)
    raw[0, 2] = 0b101
    assert low_bit.decode("q1_0", raw)[0, :4].tolist() == [1.5, -1.5, 1.5, -1.5]


def test_inspect_shows_low_bit_types_by_family(q2_k: Path) -> None:
    found = inspect(q2_k)
    assert found.unexpected == []
    assert {use.encoding for use in found.encodings if use.family == "routed experts"} == {"q2_k", "mxfp4"}
