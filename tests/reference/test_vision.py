"""Images: V4.1's resizing by its results, its tower against torch's modules; Vision-Exp's against llama.cpp."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from dsv4convert.api import load_model
from dsv4convert.cli import app
from dsv4convert.engine.conversion import execute
from dsv4convert.errors import ConfigError, FileFormatError, InputMissingError, UnsupportedError, UsageError
from dsv4convert.model.tensors import vision_dims
from dsv4convert.reference import Model
from dsv4convert.reference.parameters import Parameters
from dsv4convert.reference.vision import (
    IMAGE,
    align,
    embed_image,
    gelu,
    plan_image,
    read_image,
    span_order,
    tower,
    with_images,
)
from dsv4convert.reference.weights.protocol import DictSource
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions

from ..checkpoints import MakeCheckpoint
from ..oracles.mtmd import run_with_image
from ..v41 import TINY

IMAGE_TOKEN = 510
# What an image is embedded with before its tower's blocks.
TOWER = ("vision.patch_embed.proj.weight", "vision.patch_embed.proj.bias")

# (width, height) and what a port of the published processing makes of it: height, width, rows, columns.
PLANS = [
    ((640, 480), (490, 644, 12, 16)),
    ((1, 1), (546, 546, 13, 13)),
    ((544, 544), (546, 546, 13, 13)),
    ((4000, 3000), (1134, 1512, 27, 36)),
    ((3000, 4000), (1512, 1134, 36, 27)),
    ((10, 5000), (12166, 28, 290, 1)),
    ((5000, 10), (28, 12166, 1, 290)),
    ((1344, 1344), (1302, 1302, 31, 31)),
    ((1330, 1300), (1260, 1302, 30, 31)),
    ((100, 20000), (8400, 42, 200, 1)),
    ((20000, 100), (84, 16800, 2, 400)),
    ((777, 333), (364, 840, 9, 20)),
    ((1920, 1080), (966, 1708, 23, 41)),
]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(TINY["tiny-a"], cached=True)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
    path = tmp_path / "picture.png"
    image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(("size", "expected"), PLANS, ids=lambda value: "x".join(map(str, value)))
def test_images_are_resized_as_published(
    model: Model, size: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    plan = plan_image(*size, model.config)
    assert plan[:4] == expected
    assert plan.tokens == plan.rows * (plan.columns + 1) + 2 <= 1024


@pytest.mark.oracle
def test_tower_and_aligner_equal_torch(model: Model) -> None:
    import torch
    from torch.nn import functional

    def w(name: str) -> Any:
        return torch.tensor(model.source.tensor(name), dtype=torch.float64)

    flat = model.config.flat
    heads, vd, rows, columns = flat["vision_n_heads"], flat["vision_dim"], 4, 5
    pixels = np.random.default_rng(1).uniform(-1, 1, (3, rows * 14, columns * 14)).astype(np.float32)
    x = functional.conv2d(
        torch.tensor(pixels, dtype=torch.float64)[None],
        w("vision.patch_embed.proj.weight").reshape(vd, 3, 14, 14),
        w("vision.patch_embed.proj.bias"),
        stride=14,
    )
    x = x.flatten(2)[0].T
    d = vd // heads
    f = flat["vision_rope_theta"] ** (-torch.arange(0, d // 2, 2, dtype=torch.float64) / (d // 2))
    row = torch.arange(rows).repeat_interleave(columns)[:, None] * f
    column = torch.arange(columns).repeat(rows)[:, None] * f
    angle = torch.cat([row, column], dim=1)
    cos, sin = (torch.cat([part, part], dim=1)[None] for part in (angle.cos(), angle.sin()))

    def turned(t: Any) -> Any:
        return t * cos + torch.cat([-t[..., d // 2 :], t[..., : d // 2]], dim=-1) * sin

    for n in range(flat["vision_n_layers"]):
        at = f"vision.blocks.{n}."
        h = functional.rms_norm(x, (vd,), w(f"{at}norm1.weight"), 1e-6)
        qkv = functional.linear(h, w(f"{at}attn.wqkv.weight"), w(f"{at}attn.wqkv.bias"))
        q, k, v = qkv.reshape(rows * columns, 3, heads, d).permute(1, 2, 0, 3)
        o = functional.scaled_dot_product_attention(turned(q)[None], turned(k)[None], v[None])[0]
        o = o.transpose(0, 1).reshape(rows * columns, vd)
        x = x + functional.linear(o, w(f"{at}attn.wo.weight"), w(f"{at}attn.wo.bias"))
        h = functional.rms_norm(x, (vd,), w(f"{at}norm2.weight"), 1e-6)
        gate, up = functional.linear(h, w(f"{at}mlp.w1.weight")).chunk(2, dim=1)
        x = x + functional.linear(functional.silu(gate) * up, w(f"{at}mlp.w2.weight"))
    x = functional.rms_norm(x, (vd,), w("vision.norm.weight"), 1e-6)
    ours = tower(model.parameters, pixels)
    assert relative(ours, x.numpy()) <= 1e-5

    padded = functional.pad(x.T.reshape(1, vd, rows, columns), (0, 1, 0, 2))
    y = functional.unfold(padded, 3, stride=3)[0].T
    y = functional.gelu(functional.linear(y, w("aligner.w1.weight"), w("aligner.w1.bias")))
    y = functional.linear(y, w("aligner.w2.weight"), w("aligner.w2.bias"))
    aligned = align(model.parameters, ours.reshape(rows, columns, vd))
    assert aligned.shape == (2, 2, model.config.hidden_size)
    assert relative(aligned.reshape(4, -1), y.numpy()) <= 1e-5


def relative(ours: Any, theirs: Any) -> float:
    return float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))


def test_gelu_is_the_exact_one() -> None:
    assert gelu(np.array([0, 1, -1], np.float32)) == pytest.approx([0, 0.8413447, -0.1586553], abs=1e-6)


def test_pixels_are_centred_on_grey(model: Model, picture: Path) -> None:
    pixels, plan = read_image(picture, model.config)
    assert pixels.shape == (3, plan.height, plan.width)
    assert np.abs(pixels).max() <= 1
    # The plan is 714 x 434 pixels, of which the image fills 714 x 428: grey lines remain above and below.
    assert np.allclose(pixels[:, 0], 127 / 127.5 - 1, atol=1e-6)


def test_an_image_is_a_span_of_delimiters_rows_and_newlines(model: Model, picture: Path) -> None:
    embedding = embed_image(model.parameters, picture)
    _, plan = read_image(picture, model.config)
    assert len(embedding) == plan.tokens
    tensor = model.source.tensor
    assert np.array_equal(embedding[0], tensor("image_start"))
    assert np.array_equal(embedding[-1], tensor("image_end"))
    for row in range(plan.rows):
        assert np.array_equal(embedding[(row + 1) * (plan.columns + 1)], tensor("image_newline"))


def test_image_tokens_take_the_embeddings_another_bias_and_no_engram(model: Model, picture: Path) -> None:
    image = embed_image(model.parameters, picture)
    tokens, (placed,) = with_images([5, IMAGE_TOKEN, 7, 8], [image], model.parameters)
    assert len(tokens) == len(image) + 3
    assert placed is image
    assert with_images([5, IMAGE, 7, 8], [image], model.parameters)[0] == tokens
    trace: dict[str, Any] = {}
    model.forward(tokens, images=[image], last_only=True, record=trace.__setitem__)
    inside = slice(1, 1 + len(image))
    assert np.array_equal(trace["embed"][inside], image)
    before = np.repeat(trace["embed"][:, None], model.config.hc_mult, axis=1)
    assert np.array_equal(trace["layers.0.engram.streams"][inside], before[inside])
    assert not np.array_equal(trace["layers.0.engram.streams"][-1], before[-1])
    biased = trace["layers.0.ffn.gate.affinity"] + model.source.tensor("layers.0.ffn.gate.bias_vl")
    best = np.sort(np.argsort(-biased[inside], axis=1)[:, :2], axis=1)
    assert np.array_equal(np.sort(trace["layers.0.ffn.gate.experts"][inside], axis=1), best)


def test_images_and_image_tokens_must_fit(model: Model, picture: Path) -> None:
    image = embed_image(model.parameters, picture)
    with pytest.raises(UsageError, match="expected 1 of id 510, one for each --image, got 0"):
        with_images([5, 7], [image], model.parameters)
    with pytest.raises(UsageError, match="tokens of the images"):
        model.forward([5, IMAGE_TOKEN], images=[image])


def test_what_is_no_image_is_refused(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    with pytest.raises(InputMissingError, match="no such file"):
        read_image(tmp_path / "none.png", model.config)
    path = tmp_path / "text.png"
    path.write_text("no picture")
    with pytest.raises(FileFormatError, match=r"not a readable image \(no format that Pillow knows\)"):
        read_image(path, model.config)
    os.mkfifo(tmp_path / "pipe.png")  # opened plainly, it would wait for a writer
    with pytest.raises(InputMissingError, match=r"cannot be read \(not a regular file\)"):
        read_image(tmp_path / "pipe.png", model.config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vision_max_n_token": 3}, "vision_max_n_token: no room for an image: expected at least 4, got 3"),
        ({"vision_min_pixels": None}, "vision_min_pixels: not a size of the vision tower"),
        ({"vision_min_pixels": -1}, "vision_min_pixels: not a size of the vision tower"),
        ({"vision_max_n_token": "many"}, "vision_max_n_token: not a size of the vision tower"),
        ({"vision_rope_theta": None}, "vision_rope_theta is missing or not a number"),
        ({"vision_max_wh_ratio": "wide"}, "vision_max_wh_ratio is missing or not a number"),
        ({"vision_max_wh_ratio": 0}, "vision_max_wh_ratio is missing or not a number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sizes_of_a_config_that_are_none_are_refused(
    model: Model, picture: Path, change: dict[str, Any], says: str
) -> None:
    config = replace(model.config, flat=model.config.flat | change)
    parameters = Parameters(DictSource(config, {name: model.source.tensor(name) for name in TOWER}))
    with pytest.raises(ConfigError, match=says):
        embed_image(parameters, picture)


@pytest.mark.parametrize("most", range(4, 30))
def test_an_image_of_any_shape_has_a_plan_or_is_refused(model: Model, most: int) -> None:
    config = replace(model.config, flat=model.config.flat | {"vision_max_n_token": most})
    for width, height in ((1, 1), (9000, 1), (1, 9000), (640, 480), (50, 4000)):
        plan = plan_image(width, height, config)
        assert plan.tokens <= most
        assert plan.height > 0 < plan.width


def test_heads_that_do_not_divide_the_tower_are_refused(model: Model) -> None:
    config = replace(model.config, flat=model.config.flat | {"vision_n_heads": 3})
    with pytest.raises(ConfigError, match=r"vision_n_heads: does not fit .* to divide vision_dim 64, got 3"):
        vision_dims(config)


def test_a_model_without_a_tower_takes_no_image(tiny: Path, picture: Path) -> None:
    with pytest.raises(UnsupportedError, match="no vision tower"):
        embed_image(load_model(tiny).parameters, picture)


def test_an_image_without_a_file_says_how_to_name_one() -> None:
    result = CliRunner().invoke(app, ["forward", str(TINY["tiny-a"]), "--tokens", "5,image,7"])
    assert "an image among the --tokens has no file; pass --image FILE once for each" in str(result.exception)


def test_the_command_takes_images(picture: Path) -> None:
    arguments = ["forward", str(TINY["tiny-a"]), "--tokens", f"5,{IMAGE_TOKEN},7", "--image", str(picture), "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    document = json.loads(result.stdout)
    assert document["tokens"].count(IMAGE_TOKEN) > 100
    assert len(document["positions"]) == len(document["tokens"])


# ---- Vision-Exp: spans of pairs of rows, seen whole ----------------------------------------------------

# (width, height): the span's tokens as llama.cpp lays them out, from rows and columns of the grid.
VISION_EXP_SIZES = [(640, 480), (84, 84), (10, 5000), (5000, 10), (1330, 1300), (777, 333), (420, 42), (42, 420)]


@pytest.fixture(scope="module")
def vision_exp(make_checkpoint: MakeCheckpoint) -> Model:
    return load_model(make_checkpoint("tiny", variant="vision"), cached=True)


@pytest.mark.parametrize("size", VISION_EXP_SIZES, ids=lambda size: "x".join(map(str, size)))
def test_spans_of_vision_exp_are_whole_blocks_that_leave_room_for_pads(
    vision_exp: Model, size: tuple[int, int]
) -> None:
    plan = plan_image(*size, vision_exp.config)
    assert plan.height % 14 == plan.width % 14 == 0
    assert plan.tokens % 4 == 2
    assert plan.tokens <= 384 - 3
    lines = (plan.rows + plan.rows % 2) * (plan.columns + 1)
    assert plan.tokens == 1 + lines + lines // 2 % 2 * 2 + 1


def test_rows_of_vision_exp_go_in_pairs(vision_exp: Model) -> None:
    start, end, newline, pad = range(6, 10)
    order = [start, 0, 2, 1, 3, newline, newline, 4, pad, 5, pad, newline, pad, end]
    assert span_order(3, 2, 2).tolist() == order
    for tokens, pads in [([IMAGE], 3), ([5, IMAGE], 2), ([5, 6, 7, IMAGE], 0), ([5, 6, 7, 8, IMAGE], 3)]:
        image = np.zeros((6, vision_exp.config.hidden_size), np.float32)
        placed, (span,) = with_images(tokens, [image], vision_exp.parameters)
        assert placed == [*tokens[:-1], *[IMAGE] * (pads + 6)]
        assert np.array_equal(span[:pads], np.repeat(vision_exp.source.tensor("image_pad")[None], pads, axis=0))


def test_an_image_of_vision_exp_is_seen_whole_by_its_tokens(vision_exp: Model) -> None:
    """The last token of a long span changes the first, and none before; text after it sees its window."""
    rng = np.random.default_rng(2)
    image = rng.standard_normal((190, vision_exp.config.hidden_size)).astype(np.float32)
    other = image.copy()
    other[-1] += 1
    tokens = [5, 6, 7, *[IMAGE] * len(image), 8, 9]

    def kept(x: Any) -> Any:
        trace: dict[str, Any] = {}
        vision_exp.forward(tokens, images=[x], record=trace.__setitem__)
        return trace["layers.0.attn.output"]

    changed = (kept(image) != kept(other)).any(axis=1)
    assert not changed[:3].any()
    assert changed[3:].all()


@pytest.mark.llama
@pytest.mark.parametrize(("before", "size"), [("a", (230, 150)), ("a b c d e", (640, 480))], ids=["short", "longer"])
def test_images_of_vision_exp_are_what_llama_cpp_makes_of_them(
    make_checkpoint: MakeCheckpoint, vision_exp: Model, tmp_path: Path, before: str, size: tuple[int, int]
) -> None:
    """Pixels of the planned size, so that nobody resizes; float32, so that llama.cpp rounds little.

    The longer span is longer than the window.
    """
    image = pytest.importorskip("PIL.Image")
    plan = plan_image(*size, vision_exp.config)
    pixels = np.random.default_rng(3).integers(0, 256, (plan.height, plan.width, 3), np.uint8)
    image.fromarray(pixels).save(tmp_path / "picture.png")
    options = GgufOptions(mmproj="split", dense="f32", experts="f32")
    execute(plan_gguf(make_checkpoint("tiny", variant="vision"), tmp_path / "model.gguf", options), threads=2)
    (tower_file,) = tmp_path.glob("mmproj-*.gguf")
    theirs = run_with_image(tmp_path / "model.gguf", tower_file, pixels, before, "f g")
    embedded = embed_image(vision_exp.parameters, tmp_path / "picture.png")
    tokens, spans = with_images([*theirs.before, IMAGE, *theirs.after], [embedded], vision_exp.parameters)
    assert theirs.embeddings.shape == spans[0].shape
    assert relative(spans[0], theirs.embeddings) <= 5e-4
    logits = vision_exp.forward(tokens, images=spans, last_only=True)[0]
    assert logits @ theirs.logits / np.linalg.norm(logits) / np.linalg.norm(theirs.logits) > 0.9999
