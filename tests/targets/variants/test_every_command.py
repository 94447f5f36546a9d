"""Every variant through every command, there and back, and what it computes on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4convert.engine.conversion import execute
from dsv4convert.errors import UnsupportedError
from dsv4convert.inspection.describe import inspect_path
from dsv4convert.reference import Model
from dsv4convert.reference.weights.open import open_source
from dsv4convert.targets.repack import plan_repack
from dsv4convert.verification import verify

from ...checkpoints import MakeCheckpoint
from ..sharding import shard, unshard
from .conversions import VARIANTS, assert_same_values, gguf_keys, gguf_tensors, read_tensors, to_bf16, to_fp8, to_gguf

TOKENS = [0, *range(5, 45)]


def logits(path: Path) -> Any:
    return Model(open_source(path)).forward(TOKENS)


@pytest.mark.parametrize("names", ["official", "transformers"])
def test_dequantize_verifies_reads_again_and_computes_the_same(variant: Path, names: str, tmp_path: Path) -> None:
    out = to_bf16(variant, tmp_path / "out", dtype="f32", names=names)
    assert verify(variant, out).problems == []
    assert inspect_path(out).unexpected == []
    assert np.array_equal(logits(out), logits(variant))


def test_shards_verify_compute_the_same_and_come_back(variant: Path, tmp_path: Path) -> None:
    out = tmp_path / "mp2"
    shard(variant, out, 2)
    assert verify(variant, out).problems == []
    assert inspect_path(out).unexpected == []
    unshard(out, tmp_path / "back")
    assert verify(variant, tmp_path / "back").problems == []
    original, back = read_tensors(variant), read_tensors(tmp_path / "back")
    assert {n: t for n, t in back.items() if ".wo_a." not in n} == {
        n: t for n, t in original.items() if ".wo_a." not in n
    }
    # wo_a is BF16 there, which rounds what is no power of two.
    if _scales(variant) != "any":
        assert np.array_equal(logits(out), logits(variant))


def _scales(folder: Path) -> str:
    """Return "any" where a float scale is no power of two."""
    held = {n: t for n, t in read_tensors(folder).items() if n.endswith(".scale") and t.dtype == "F32"}
    scales = [np.frombuffer(tensor.data, np.float32) for tensor in held.values()]
    return "any" if any((np.frexp(scale)[0] != 0.5).any() for scale in scales) else "powers of two"


def test_a_gguf_in_float32_verifies_and_computes_the_same(variant: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    to_gguf(variant, out, dense="f32", experts="f32")
    assert verify(variant, out, ignore_keys=["general.name"]).problems == []
    assert inspect_path(out).unexpected == []
    assert np.array_equal(logits(out), logits(variant))


def test_repack_verifies_and_computes_the_same_or_says_why_not(variant: Path, tmp_path: Path) -> None:
    held = {t.dtype for n, t in read_tensors(variant).items() if ".experts." in n and n.endswith(".weight")}
    if held == {"I8"}:
        out = to_fp8(variant, tmp_path / "out")
        assert verify(variant, out).problems == []
        assert inspect_path(out).unexpected == []
        assert np.array_equal(logits(out), logits(variant))
    else:
        with pytest.raises(UnsupportedError, match="no packed FP4 experts to repack: expected fp4, got fp8"):
            execute(plan_repack(variant, tmp_path / "out"))


def test_inspect_knows_the_variant(make_checkpoint: MakeCheckpoint) -> None:
    traits = {name: inspect_path(make_checkpoint("tiny", **options)) for name, options in VARIANTS.items()}
    assert {name: found.unexpected for name, found in traits.items()} == {name: [] for name in VARIANTS}
    assert "MTP draft" in traits["flash"].traits
    assert "fp8 experts, F32 scales" in traits["base"].traits
    assert "DSpark draft" in traits["dspark"].traits
    assert {"vision tower", "DSpark draft"} <= set(traits["vision"].traits)


def test_a_variant_is_known_whatever_its_folder_is_called(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    for name, options in VARIANTS.items():
        named = make_checkpoint("tiny", **options)
        other = shutil.copytree(named, tmp_path / f"DeepSeek-V4-Flash-Base-0731-{len(name)}")
        assert inspect_path(other).traits == inspect_path(named).traits
        shutil.rmtree(other)


def test_the_trunk_computes_the_same_whatever_draft_or_tower_is_beside_it(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Synthetic weights depend on seed and name: all three have one trunk, and Vision-Exp an epsilon of its own."""
    flash = make_checkpoint("tiny")
    expected = logits(flash)
    vision = shutil.copytree(make_checkpoint("tiny", variant="vision"), tmp_path / "vision")
    raw = json.loads((vision / "config.json").read_text())
    assert raw["rms_norm_eps"] == 1e-20
    raw["rms_norm_eps"] = json.loads((flash / "config.json").read_text())["rms_norm_eps"]
    (vision / "config.json").write_text(json.dumps(raw))
    for other in (make_checkpoint("tiny", variant="dspark"), vision):
        assert np.array_equal(logits(other), expected)
        to_gguf(other, tmp_path / "m.gguf", dense="f32")
        assert np.array_equal(logits(tmp_path / "m.gguf"), expected)
        (tmp_path / "m.gguf").unlink()
        (tmp_path / "m.gguf.manifest.json").unlink()


# transformers


@pytest.mark.oracle
@pytest.mark.parametrize("names", ["official", "transformers"])
def test_transformers_loads_the_bf16_and_computes_the_same(variant: Path, names: str, tmp_path: Path) -> None:
    """In official names a vision tower is what transformers does not expect; nothing may be missing in any."""
    import torch
    from transformers import AutoModelForCausalLM

    out = to_bf16(variant, tmp_path / "out", dtype="f32", names=names)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    known = ("vision.", "aligner.", "image_", "model.vision.", "model.aligner.", "model.image_")
    assert [k for k in info["unexpected_keys"] if not k.startswith(known) and ".mlp.gate." not in k] == []
    if names == "transformers":
        assert not info["unexpected_keys"]
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS]), use_cache=False).logits[0].double().numpy()
    ours = logits(variant).astype(np.float64)
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert np.median(cosine) > 0.9999


@pytest.mark.oracle
@pytest.mark.parametrize("original_format", [True, False], ids=["restored names", "module names"])
def test_what_transformers_saves_is_the_same_checkpoint(
    original_format: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = make_checkpoint("tiny")
    bf16 = to_bf16(source, tmp_path / "bf16", names="transformers")
    model = AutoModelForCausalLM.from_pretrained(bf16, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", save_original_format=original_format)
    for path in bf16.glob("tokenizer*.json"):
        shutil.copy(path, tmp_path / "saved")
    stacked = [name for name in read_tensors(tmp_path / "saved") if name.endswith("gate_up_proj")]
    assert bool(stacked) != original_format
    original, saved = tmp_path / "a.gguf", tmp_path / "b.gguf"
    to_gguf(source, original)
    to_gguf(tmp_path / "saved", saved, experts="mxfp4", dense="q8_0")
    assert_same_values(gguf_tensors(saved), gguf_tensors(original))
    ours, theirs = gguf_keys(saved), gguf_keys(original)
    assert {key: value for key, value in ours.items() if "sampling" not in key} == {
        key: value for key, value in theirs.items() if "sampling" not in key
    }
