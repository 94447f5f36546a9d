"""Tensors of zeros are told by the ranges that a run read as zero, over files, pieces and stacks, and over a resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4convert.engine.journal import Journal
from dsv4convert.engine.run import Finished, Task
from dsv4convert.engine.zeros import zero_tensors
from dsv4convert.formats.base import Tally
from tests.oracles.safetensors_bytes import RawSafetensors, RawTensor


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, int]:
    """Return a file of three tensors, with 24, 0 and 12 bytes, and where its payload begins."""
    tensors = {
        "model.layers.0.self_attn.q_norm.weight": RawTensor("BF16", [12], bytes(24)),
        "empty": RawTensor("F32", [0], b""),
        "model.layers.0.mlp.experts.gate_up_proj": RawTensor("I8", [3, 2, 2], bytes(12)),
    }
    path = tmp_path / "model.safetensors"
    RawSafetensors(tensors, None).write(path)
    return path, path.stat().st_size - 36


def test_a_tensor_is_zero_where_ranges_cover_it_and_an_expert_where_they_cover_its_part(
    folder: tuple[Path, int],
) -> None:
    path, start = folder
    assert zero_tensors(path.parent, [(path, start, 23)]) == ()
    assert zero_tensors(path.parent, [(path, start + 12, 12), (path, start, 12)]) == (
        "model.layers.0.self_attn.q_norm.weight",
    )
    (stack,) = zero_tensors(path.parent, [(path, start + 28, 7)])
    assert stack == "model.layers.0.mlp.experts.gate_up_proj[1]"
    assert zero_tensors(path.parent, [(path, start + 24, 6), (path, start + 30, 6)]) == (stack.removesuffix("[1]"),)


def test_files_beside_the_model_are_left_out(folder: tuple[Path, int], tmp_path: Path) -> None:
    path, start = folder
    assert zero_tensors(tmp_path / "elsewhere", [(path, start, 24)]) == ()
    assert zero_tensors(tmp_path, [(tmp_path / "imatrix.gguf", 0, 24)]) == ()


def test_zeros_outlive_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "out.journal"
    done = [
        Finished(Task(0, 0, 0, 0), bytes(16), Tally(), 3),
        Finished(Task(0, 0, 1, 8), bytes(16), Tally(nan=1)),
    ]
    with Journal(path) as journal:
        journal.begin({"plan": "p"}, [], {}, {})
        journal.record(done)
    with Journal(path) as journal:
        assert list(journal.finished().values()) == done
