"""``--dialect ds4`` of V4.1: the port's types, names and keys; low-bit experts by ggml's library."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from dsv4convert.api import convert_gguf
from dsv4convert.engine.conversion import execute
from dsv4convert.errors import UsageError
from dsv4convert.inspection.describe import inspect_path
from dsv4convert.synth.write import write_synth
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.verification import verify

from ..v41 import TINY


def test_experts_and_tables_of_other_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="--experts mxfp4 is not supported by dialect ds4: expected iq2_xxs, q2_k or q4_k"
    ):
        plan_gguf(TINY["tiny-a"], tmp_path / "m.gguf", GgufOptions(dialect="ds4"), tokenizer_pre="joyai-llm")
    options = GgufOptions(dialect="ds4", engram="q8_0")
    with pytest.raises(UsageError, match="--engram q8_0 is not supported by dialect ds4: expected i8-row264"):
        plan_gguf(TINY["tiny-a"], tmp_path / "m.gguf", options, tokenizer_pre="joyai-llm")


# Tensors under names of the port's own, and in types of its own.
DAMAGED = (
    "blk.0.engram_kv.weight",
    "blk.3.engram_embd.weight",
    "blk.1.ffn_up_exps.weight",
    "blk.3.indexer.proj.weight",
)


@pytest.mark.llama
def test_a_file_has_the_ports_types_names_and_keys(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    wide = {"hidden_size": 256, "moe_intermediate_size": 256, "engram_head_dim": 256}
    write_synth(tmp_path / "s", "v41-tiny", overrides=wide)
    execute(plan_gguf(tmp_path / "s", tmp_path / "m.gguf", GgufOptions(dialect="ds4", experts="q4_k")))
    file = gguf.GGUFReader(tmp_path / "m.gguf")
    at = {tensor.name: tensor for tensor in file.tensors}
    assert file.alignment == 16384
    assert all(int(tensor.data_offset) % 16384 == 0 for tensor in file.tensors)
    types = {tensor.name: tensor.tensor_type.name for tensor in file.tensors}
    assert list(types)[-2:] == ["blk.0.engram_embd.weight", "blk.3.engram_embd.weight"]
    assert {name: types[name] for name in types if not name.startswith("blk.")} == {
        "token_embd.weight": "F16",
        "output.weight": "Q8_0",
        "output_norm.weight": "F32",
    }
    wanted = {
        "hc_attn_fn": "F16", "hc_ffn_base": "F32", "attn_q_a": "Q8_0", "attn_output_b": "Q8_0", "attn_norm": "F32",
        "attn_compressor_kv": "F16", "attn_compressor_norm": "F32", "indexer.attn_k": "F16", "indexer.k_norm": "F32",
        "indexer.attn_q_b": "F16", "indexer.proj": "F16", "ffn_gate_inp": "F32", "engram_q_norm": "F32",
        "engram_k_norm": "F32", "engram_kv": "F16", "engram_embd": "I8", "ffn_up_exps": "Q4_K", "ffn_up_shexp": "Q8_0",
    }  # fmt: skip
    assert {name: types[f"blk.3.{name}.weight"] for name in wanted} == wanted
    keys = {key.removeprefix("deepseek41."): field.contents() for key, field in file.fields.items()}
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert json.loads(keys["config"]) == config
    text = config["text_config"]
    for key in ("hidden_size", "kv_source_layer_ids", "scoring_func", "norm_topk_prob", "candidate_topk_blocks"):
        assert keys[key] == text[key]
    assert keys["compress_ratios"] == text["compress_ratios"][:6]
    assert keys["rope_scaling.factor"] == 16
    assert keys["engram.encoding"] == "e4m3_e8m0_32_row264"
    assert keys["engram.rows"] == text["engram_num_embeddings"]
    assert len(keys["engram.primes"]) == 2 * 4
    assert "engram.offsets" not in keys
    table = next(tensor for tensor in file.tensors if tensor.name == "blk.0.engram_embd.weight")
    assert table.data.shape == (text["engram_num_embeddings"][0], 264)
    assert np.count_nonzero(table.data)
    found = inspect_path(tmp_path / "m.gguf")
    assert found.unexpected == []
    assert (found.config["hidden_size"], found.roles["KV sources"], found.engram[0].columns) == (256, [1, 3], 256)
    report = verify(tmp_path / "s", tmp_path / "m.gguf")
    assert report.problems == []
    assert report.keys > 60
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    key = b"deepseek41.routed_scaling_factor"
    places = {f"tensor {name}": int(at[name].data_offset) for name in DAMAGED} | {
        key.decode(): content.index(key) + len(key) + 4  # behind the type
    }
    for place in places.values():
        content[place] ^= 0x40
    (tmp_path / "m.gguf").write_bytes(content)
    assert {problem.where for problem in verify(tmp_path / "s", tmp_path / "m.gguf").problems} == set(places)


@pytest.mark.llama
def test_a_slice_is_told_where_it_was_cut(tmp_path: Path) -> None:
    """Its hyper-connections are in F16, so that their bytes do not tell."""
    pytest.importorskip("llama_cpp")
    write_synth(tmp_path / "s", "tiny")
    convert_gguf(tmp_path / "s", tmp_path / "m.gguf", dialect="ds4", layers="1-2")
    report = verify(tmp_path / "s", tmp_path / "m.gguf")
    assert report.problems == []
    assert "a slice: layers 1 to 2 of the source" in report.notes
