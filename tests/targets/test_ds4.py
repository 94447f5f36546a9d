"""``--dialect ds4`` of V4: the types that the port's layout checks ask for, llama.cpp's names and keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from dsv4convert.api import convert_gguf, list_recipes, verify
from dsv4convert.containers.gguf import open_gguf
from dsv4convert.errors import UsageError
from dsv4convert.targets.gguf import open_for_gguf, plan_checkpoint
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.targets.low_bit import SizesOnly

from ..checkpoints import MakeCheckpoint
from ..command_line import run_cli
from ..low_bit import SMALL, WHOLE
from .folders import Editable
from .test_gguf_against_llama_cpp import logits

# What the port's checks of a file's layout ask for, by the name below the block.
OUTSIDE = {
    "token_embd": "F16", "output": "Q8_0", "output_norm": "F32", "output_hc_fn": "F16", "output_hc_base": "F32",
    "output_hc_scale": "F32",
}  # fmt: skip
IN_BLOCKS = {
    "hc_attn_fn": "F16", "hc_attn_base": "F32", "hc_attn_scale": "F32",
    "hc_ffn_fn": "F16", "hc_ffn_base": "F32", "hc_ffn_scale": "F32",
    "attn_norm": "F32", "ffn_norm": "F32", "attn_sinks": "F32", "attn_q_a_norm": "F32", "attn_kv_a_norm": "F32",
    "attn_q_a": "Q8_0", "attn_q_b": "Q8_0", "attn_kv": "Q8_0", "attn_output_a": "Q8_0", "attn_output_b": "Q8_0",
    "attn_compressor_ape": "F16", "attn_compressor_kv": "F16", "attn_compressor_gate": "F16",
    "attn_compressor_norm": "F32",
    "indexer_compressor_ape": "F16", "indexer_compressor_kv": "F16", "indexer_compressor_gate": "F16",
    "indexer_compressor_norm": "F32", "indexer.proj": "F16", "indexer.attn_q_b": "F16",
    "ffn_gate_inp": "F16", "exp_probs_b": "F32", "ffn_gate_tid2eid": "I32",
    "ffn_gate_exps": "MXFP4", "ffn_up_exps": "MXFP4", "ffn_down_exps": "MXFP4",
    "ffn_gate_shexp": "Q8_0", "ffn_up_shexp": "Q8_0", "ffn_down_shexp": "Q8_0",
}  # fmt: skip


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


def test_every_tensor_has_the_type_that_the_port_asks_for(tiny: Path, tmp_path: Path) -> None:
    convert_gguf(tiny, tmp_path / "ds4.gguf", dialect="ds4")
    found = types_of(tmp_path / "ds4.gguf")
    for name, kind in found.items():
        base = name.removesuffix(".weight").removesuffix(".bias")
        if base.startswith("blk."):
            assert kind == IN_BLOCKS[base.split(".", 2)[2]], name
        else:
            assert kind == OUTSIDE[base], name
    bases = {name.rsplit(".", 1)[0].split(".", 2)[-1] for name in found if name.startswith("blk.")}
    assert bases == IN_BLOCKS.keys()
    assert verify(tiny, tmp_path / "ds4.gguf").ok
    # Names, shapes and keys are those of the llama.cpp dialect.
    convert_gguf(tiny, tmp_path / "llama.gguf")
    ours, theirs = open_gguf(tmp_path / "ds4.gguf"), open_gguf(tmp_path / "llama.gguf")
    assert {name: t.shape for name, t in ours.tensors.items()} == {name: t.shape for name, t in theirs.tensors.items()}
    assert ours.metadata == theirs.metadata


@pytest.mark.parametrize("variant", ["base", "vision", "dspark"])
def test_every_variant_has_a_file(variant: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny", variant=variant)
    experts = "mxfp4" if variant == "base" else None
    summary = convert_gguf(source, tmp_path / "ds4.gguf", dialect="ds4", experts=experts)
    assert any("the only choice with --dialect ds4" in entry.reason for entry in summary.dropped)
    assert "BF16" not in types_of(tmp_path / "ds4.gguf").values()
    keys = open_gguf(tmp_path / "ds4.gguf")
    named = {key: keys.metadata.get(f"deepseek4.{key}") for key in ("checkpoint_variant", "vision.sidecar_required")}
    is_vision = variant == "vision"
    assert named == {
        "checkpoint_variant": "vision-exp" if is_vision else None,
        "vision.sidecar_required": True if is_vision else None,
    }
    assert verify(source, tmp_path / "ds4.gguf").ok


def test_weights_in_bf16_become_q8_0_too(tiny: Path, tmp_path: Path) -> None:
    from dsv4convert.api import dequantize

    dequantize(tiny, tmp_path / "bf16")
    with pytest.raises(UsageError, match="--experts bf16 is not supported by dialect ds4"):
        convert_gguf(tmp_path / "bf16", tmp_path / "ds4.gguf", dialect="ds4")
    convert_gguf(tmp_path / "bf16", tmp_path / "ds4.gguf", dialect="ds4", experts="mxfp4")
    assert types_of(tmp_path / "ds4.gguf")["blk.0.attn_q_a.weight"] == "Q8_0"


def test_overflows_of_f16_are_counted_and_named_first(editable: Callable[..., Editable], tmp_path: Path) -> None:
    source = editable()

    def enlarge(rows: np.ndarray) -> None:
        rows.view("<u2")[1, 3:5] = 0x4789, 0xCE6E  # BF16 of 70144 and of -1e9

    source.edit("layers.3.ffn.gate.weight", enlarge)
    summary = convert_gguf(source.folder, tmp_path / "ds4.gguf", dialect="ds4")
    counted = {entry["tensor"]: entry["overflow"] for entry in summary.counted}
    assert {name: count for name, count in counted.items() if count} == {"blk.3.ffn_gate_inp.weight": 2}
    assert counted["blk.0.hc_attn_fn.weight"] == 0  # rounded, which is counted besides
    done = run_cli("hf-to-gguf", source.folder, tmp_path / "again.gguf", "--dialect", "ds4")
    lines = [line for line in done.out.splitlines() if line.startswith("counted in")]
    assert lines[0].startswith("counted in blk.3.ffn_gate_inp.weight: 2 overflow")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"experts": "q6_k"}, "--experts q6_k is not supported by dialect ds4: expected mxfp4, q4_k, q2_k or iq2"),
        ({"dense": "bf16"}, "attn_.*: bf16 is not supported by dialect ds4: expected q8_0 or q4_k"),
        ({"output_type": "q6_k"}, "output.weight: q6_k is not supported by dialect ds4: expected q8_0 or q4_k"),
        ({"embedding_type": "q8_0"}, "token_embd.weight: q8_0 is not supported by dialect ds4: expected f16"),
        ({"tensor_type": ["hc_attn_fn=f32"]}, "hc_attn_fn.weight: f32 is not supported by dialect ds4: expected f16"),
        ({"recipe": "q2_k_s"}, "is not supported by dialect ds4"),
        ({"tensor_type": ["ffn_up_exps=q4_k"]}, "ffn_up_exps.weight: dialect ds4 wants gate and up experts in one"),
        ({"draft": "split"}, "--draft split is not supported by dialect ds4: expected drop"),
        ({"mmproj": "split"}, "--mmproj split is not supported by dialect ds4: expected drop"),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_port_does_not_read_is_refused(
    options: dict[str, Any], says: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint("tiny", overrides=WHOLE, variant="vision", **{**SMALL, "ratios": [4] * 3})
    with pytest.raises(UsageError, match=says):
        convert_gguf(source, tmp_path / "ds4.gguf", dialect="ds4", dry_run=True, **options)


@pytest.mark.llama
def test_the_recipes_have_the_experts_that_the_port_publishes(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    source = make_checkpoint("tiny", overrides=WHOLE, **SMALL)
    convert_gguf(
        source, tmp_path / "ds4.gguf", dialect="ds4", recipe="ds4-q2", importance="weights", output_type="q4_k"
    )
    found = types_of(tmp_path / "ds4.gguf")
    experts = [found[f"blk.0.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")]
    assert experts == ["IQ2_XXS", "IQ2_XXS", "Q2_K"]
    assert (found["output.weight"], found["token_embd.weight"]) == ("Q4_K", "F16")
    assert verify(source, tmp_path / "ds4.gguf").ok


def test_the_mixed_recipe_has_larger_experts_in_the_last_layers(make_checkpoint: MakeCheckpoint) -> None:
    source = make_checkpoint("tiny", overrides=WHOLE, ratios=[4] * 43, experts=1, vocab=384, headers_only=True)
    options = GgufOptions(dialect="ds4", recipe="ds4-q2-q4")
    plan = plan_checkpoint(open_for_gguf(source, options), None, options, low_bit=SizesOnly())
    types = {tensor.name: tensor.dtype for tensor in plan.files[0].tensors}
    for layer in range(43):
        wanted = ("q4_k", "q4_k", "q4_k") if layer >= 37 else ("iq2_xxs", "iq2_xxs", "q2_k")
        assert tuple(types[f"blk.{layer}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")) == wanted
    listed = {recipe.name for recipe in list_recipes(source, dialect="ds4").recipes if recipe.nbytes is not None}
    assert listed == {"ds4-q2", "ds4-q2-q4"}


@pytest.mark.llama
def test_llama_cpp_runs_the_file_too(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    source = make_checkpoint("tiny", seed=1)
    tokens = [0, *range(5, 105)]
    for dialect in ("ds4", "llama.cpp"):
        convert_gguf(source, tmp_path / f"{dialect}.gguf", dialect=dialect)
    ours, theirs = (logits(tmp_path / f"{dialect}.gguf", tokens) for dialect in ("ds4", "llama.cpp"))
    assert np.isfinite(ours).all()
    # F16 in place of F32 and BF16, and Q8_0 for the output: about three digits are the same.
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.05 * theirs.std()


def test_a_fallback_that_the_port_does_not_read_is_told_with_the_type_that_was_asked_for(
    tiny: Path, tmp_path: Path
) -> None:
    done = run_cli("hf-to-gguf", tiny, tmp_path / "m.gguf", "--dialect", "ds4", "--experts", "q2_k")
    assert (done.code, done.err.count("\n")) == (2, 1)
    told = "rows of 160 are no multiple of 256: q4_0 for q2_k, which is not supported by dialect ds4; expected mxfp4"
    assert told.replace("; expected", ": expected") in done.err
    refused = run_cli("hf-to-gguf", tiny, tmp_path / "m.gguf", "--dialect", "ds4", "--experts", "q3_k")
    assert "--experts q3_k is not supported by dialect ds4" in refused.err
