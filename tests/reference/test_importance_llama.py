"""Activation statistics against those that llama.cpp's own graph yields, and what quantisers make of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from dsv4convert.api import convert_gguf, imatrix
from dsv4convert.containers.imatrix import read_imatrix
from dsv4convert.formats.ggml_types import BY_NAME
from dsv4convert.reference.importance import ImatrixOptions, text_chunks
from dsv4convert.reference.weights.open import open_source

from ..checkpoints import MakeCheckpoint
from ..low_bit import SMALL, WHOLE
from ..oracles.ggml_quantize import Asked, quantise
from ..oracles.llama_imatrix import collect
from .test_importance import WORDS, statistics

pytestmark = pytest.mark.llama
pytest.importorskip("llama_cpp")

# llama.cpp keeps compressed entries in F16, whose rounding (5e-4) reaches what attention makes; squares double it.
F16_ENTRIES = 1e-3


def test_llama_cpp_collects_the_same(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The choice of experts that this seed's routers make on the text is clear of that rounding."""
    tiny = make_checkpoint("tiny", seed=2)
    text, model = tmp_path / "text.txt", tmp_path / "model.gguf"
    text.write_text(WORDS * 9)
    convert_gguf(tiny, model, dense="f32", experts="f32", threads=2)
    imatrix(tiny, tmp_path / "ours.gguf", text=text, context_size=130, chunks=3)
    ours = statistics(read_imatrix(tmp_path / "ours.gguf"))
    chunks, _ = text_chunks(tiny, text, open_source(tiny).config, ImatrixOptions(context_size=130, chunks=3))
    theirs = collect(model, chunks, tmp_path)
    assert ours.keys() == theirs.keys()
    for name, (sums, counts) in theirs.items():
        if name.endswith("attn_output_a.weight"):
            # llama.cpp multiplies its groups apart and has a vector for each, which its quantiser then refuses.
            groups = len(sums)
            assert groups > 1
            sums, counts = sums.sum(axis=0, keepdims=True), counts * groups
        assert np.array_equal(ours[name][1], counts), name
        assert np.abs(ours[name][0] - sums).max() < F16_ENTRIES * sums.max(), name


def test_quantisers_take_every_entry(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """llama.cpp refuses an entry of another size than it expects; its bytes and ours are the same."""
    source = make_checkpoint("tiny", overrides=WHOLE, **SMALL)
    text, matrix, wide = tmp_path / "text.txt", tmp_path / "imatrix.gguf", tmp_path / "wide.gguf"
    text.write_text(WORDS * 9)
    imatrix(source, matrix, text=text, context_size=100, process_output=True)
    convert_gguf(source, wide, dense="f32", experts="f32", threads=2)
    summary = convert_gguf(source, tmp_path / "ours.gguf", dense="q4_k", experts="q2_k", pure=True, imatrix=matrix)
    unused = [note for note in summary.notes if "importance" in note or "not needed" in note]
    assert len(unused) == 2
    assert unused[0] == "no importance for 1 tensor, whose columns count alike: token_embd.weight"
    assert "ffn_gate_inp" in unused[1]  # protected, as the hyper-connections are
    both = {"imatrix": matrix, "importance": "weights"}
    filled = convert_gguf(
        source, tmp_path / "filled.gguf", dense="q4_k", experts="q2_k", pure=True, dry_run=True, **both
    )
    told = "no importance for 1 tensor, whose columns count by the squares of their weights: token_embd.weight"
    assert told in filled.notes
    assert "3 entries" in unused[1]
    made = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "ours.gguf").tensors}
    low = {n: t.tensor_type.name.lower() for n, t in made.items() if t.tensor_type.name.startswith(("Q", "IQ"))}
    given = {
        name: np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None].astype(np.float32), 1)
        for name, (sums, counts) in statistics(read_imatrix(matrix)).items()
    }
    theirs = tmp_path / "theirs.gguf"
    quantise(Asked(wide, theirs, {name: BY_NAME[kind].number for name, kind in low.items()}, given))
    expected = {tensor.name: tensor for tensor in GGUFReader(theirs).tensors}
    assert "blk.0.attn_output_a.weight" in low
    for name in low:
        assert np.array_equal(made[name].data, expected[name].data), name
