"""MLX itself on folders of ``mlx``: its decoding, bit for bit, and mlx-vlm's models against the reference forward.

Needs the extra ``mlx``; without it these tests are skipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsv4convert
from dsv4convert.checkpoint.engram import read_token_map
from dsv4convert.formats import e2m1, e4m3
from dsv4convert.formats.base import Scratch, Tally

from ..checkpoints import MakeCheckpoint

mx: Any = pytest.importorskip("mlx.core")

Array = np.ndarray
GROUP = 32
ALL_BYTES = np.arange(256, dtype=np.uint8)
NAN_SCALE = 255

# Both sides compute in float32, in another order; logits have a standard deviation of about 1.
TOLERANCE = 2e-5


def bits(values: Any) -> Array:
    return np.array(values.view(mx.uint16 if values.dtype == mx.bfloat16 else mx.uint32))


@pytest.mark.parametrize(
    ("mode", "to", "decode"),
    [
        ("mxfp4", "bfloat16", e2m1.fp4_to_bf16),
        ("mxfp4", "float32", e2m1.fp4_to_f32),
        ("mxfp8", "bfloat16", e4m3.fp8_to_bf16),
        ("mxfp8", "float32", e4m3.fp8_to_f32),
    ],
)
def test_mlx_decodes_every_code_with_every_scale_as_we_do(mode: str, to: str, decode: Any) -> None:
    code_bits = int(mode[-1])
    width = GROUP * code_bits // 8
    groups = len(ALL_BYTES) // width
    codes = np.tile(ALL_BYTES.reshape(groups, width), (256, 1))
    scales = np.repeat(ALL_BYTES, groups).reshape(-1, 1)
    ours = np.empty((len(codes), GROUP), np.uint16 if to == "bfloat16" else np.float32)
    decode(codes, scales, (1, GROUP), ours, Scratch(), Tally())
    ours = ours.view(np.uint16 if to == "bfloat16" else np.uint32)
    words, dtype = mx.array(codes.view(np.uint32)), getattr(mx, to)
    made = mx.dequantize(words, mx.array(scales), group_size=GROUP, bits=code_bits, mode=mode, dtype=dtype)
    theirs = bits(made)
    shift = 16 if to == "bfloat16" else 0
    magnitudes = (np.stack([ours, theirs]).astype(np.uint32) << np.uint32(shift)) & np.uint32(0x7FFFFFFF)
    nan = magnitudes > 0x7F800000
    real = np.repeat(scales != NAN_SCALE, GROUP, axis=1)
    # MLX takes the scale 255, which is NaN, for infinity in BF16; no published checkpoint has one.
    assert np.array_equal(nan[0][real], nan[1][real])
    assert np.array_equal(ours[real & ~nan[0]], theirs[real & ~nan[0]])
    assert nan[0][~real].all()


@pytest.mark.parametrize("preset", ["tiny", "v41-tiny"])
def test_mlx_reads_a_folder_and_decodes_what_dequantize_writes(
    preset: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint(preset)
    dsv4convert.convert_mlx(source, tmp_path / "mlx")
    dsv4convert.convert_mlx(source, tmp_path / "bf16", dense="bf16")
    dsv4convert.dequantize(source, tmp_path / "floats", draft="drop")
    dsv4convert.convert_mlx(tmp_path / "floats", tmp_path / "plain")
    packed, half, plain = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("mlx", "bf16", "plain"))
    modules = [name.removesuffix(".scales") for name in packed if name.endswith(".scales")]
    assert plain.keys() == packed.keys() - {f"{path}.scales" for path in modules}
    for name, wanted in plain.items():
        for weights in (packed, half):
            found = weights[name]
            if (scales := weights.get(f"{name.removesuffix('weight')}scales")) is not None:
                code_bits = found.shape[-1] // scales.shape[-1]
                found = mx.dequantize(
                    found, scales, group_size=GROUP, bits=code_bits, mode=f"mxfp{code_bits}", dtype=mx.bfloat16
                )
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
            assert bool(mx.array_equal(found.view(mx.uint8), wanted.view(mx.uint8))), name


# Positions that are chosen of more than index_topk, so that both sides agree on what is chosen.
MODELS = {
    "v4": ("tiny", {}),
    "v4 with a tower": ("tiny", {"variant": "vision"}),
    "v4, FP8 experts": ("tiny", {"variant": "base"}),
    "v4.1": ("v41-tiny", {"overrides": {"index_topk": 8}}),
}


@pytest.mark.parametrize("dense", ["mxfp8", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_mlx_vlm_computes_the_reference_logits(
    model: str, dense: str, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = pytest.importorskip("mlx_vlm.utils")
    preset, options = MODELS[model]
    source, out = make_checkpoint(preset, **options), tmp_path / "out"
    dsv4convert.convert_mlx(source, out, dense=dense)
    config = json.loads((source / "config.json").read_text())
    vocabulary = config.get("text_config", config)["vocab_size"]
    if preset == "v41-tiny":
        from mlx_vlm.models.deepseek_v41 import engram, language

        # Its models of V4.1 round activations, which makes near ties fall either way.
        for module in (engram, language):
            for name in [name for name in vars(module) if name.startswith("fake_quant_")]:
                monkeypatch.setattr(module, name, lambda values: values)
        # The synthetic vocabulary is larger than its tokenizer; of a published model the tokenizer alone tells the map.
        (out / "engram_token_map.json").write_text(json.dumps(read_token_map(source, vocabulary).tolist()))
    loaded = utils.load_model(out)
    loaded.set_dtype(mx.float32)
    tokens = np.random.default_rng(0).integers(0, vocabulary - 20, 40).tolist()
    found = loaded.language_model(mx.array([tokens]), cache=loaded.make_cache()).logits
    logits = dsv4convert.load_model(source).forward(tokens)
    assert logits.std() > 0.5
    assert np.abs(np.array(found.astype(mx.float32))[0] - logits).max() < TOLERANCE


@pytest.mark.parametrize("preset", ["tiny", "v41-tiny"])
def test_affine8_is_what_mlx_quantises_the_bf16_folder_to(
    preset: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint(preset)
    dsv4convert.convert_mlx(source, tmp_path / "affine", dense="affine8")
    dsv4convert.convert_mlx(source, tmp_path / "bf16", dense="bf16")
    packed, plain = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("affine", "bf16"))
    paths = [name.removesuffix(".biases") for name in packed if name.endswith(".biases")]
    assert len(paths) > 20
    for path in paths:
        weight = plain[f"{path}.weight"]
        group = weight.shape[-1] // packed[f"{path}.scales"].shape[-1]
        parts = mx.quantize(weight, group_size=group, bits=8)
        for part, made in zip(("weight", "scales", "biases"), parts, strict=True):
            found = packed[f"{path}.{part}"]
            assert (found.dtype, found.shape) == (made.dtype, made.shape), path
            assert bool(mx.array_equal(found.view(mx.uint8), made.view(mx.uint8))), (path, part)


@pytest.mark.parametrize("model", ["v4", "v4.1"])
def test_mlx_vlm_loads_affine8(model: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    utils = pytest.importorskip("mlx_vlm.utils")
    preset, options = MODELS[model]
    source, out = make_checkpoint(preset, **options), tmp_path / "out"
    dsv4convert.convert_mlx(source, out, dense="affine8")
    config = json.loads((source / "config.json").read_text())
    vocabulary = config.get("text_config", config)["vocab_size"]
    if preset == "v41-tiny":
        (out / "engram_token_map.json").write_text(json.dumps(read_token_map(source, vocabulary).tolist()))
    loaded = utils.load_model(out)
    loaded.set_dtype(mx.float32)
    tokens = np.random.default_rng(0).integers(0, vocabulary - 20, 40).tolist()
    found = np.array(loaded.language_model(mx.array([tokens]), cache=loaded.make_cache()).logits.astype(mx.float32))[0]
    logits = dsv4convert.load_model(source).forward(tokens)
    cosines = (found * logits).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(logits, axis=1)
    assert np.median(cosines) > 0.99  # what eight bits leave
