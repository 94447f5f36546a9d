"""Images of V4.1 and of V4's Vision-Exp: the resizing, the vision tower, and the aligner that makes embeddings.

An image is a span of tokens. In V4.1 it has a start, rows of the aligner's grid each with a newline, and an end; all
of them have the image token's id, and the embeddings tell them apart. In Vision-Exp rows go in pairs, column by
column, an odd last one with pads; pads at the end make whole blocks of four, and pads before the start put what
follows it on a multiple of four positions, for that is how many tokens its compressor takes. No token id is known for
such a span: `IMAGE` stands for it.
"""

# numpy's arithmetic on arrays of any dtype is typed Any.
# mypy: disable-error-code=no-any-return

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..containers.folder_names import CONFIG_NAME
from ..containers.untrusted import open_regular
from ..errors import (
    CHECK_NAME,
    ConfigError,
    FileFormatError,
    UnsupportedError,
    UsageError,
    missing_package,
    not_read,
)
from ..model.config import ModelConfig, Version
from ..model.tensors import vision_size
from .arithmetic import product, rms_norm, silu, softmax
from .parameters import Parameters
from .weights.protocol import Array

# The tower's own, not the text model's.
TOWER_EPSILON = 1e-6
# What fills the canvas around an image of another shape.
GREY = (127, 127, 127)
# Tokens of a span besides those of its rows.
DELIMITERS = 2
# What stands for an image in a list of token ids, whatever id the model has for it.
IMAGE = -1
# Vision-Exp's spans begin before a multiple of so many positions.
COMPRESSED_TOKENS = 4
# Queries of a head that are scored at a time: 9216 patches of the largest image make 36 MiB.
QUERY_BLOCK = 1024


class ImagePlan(NamedTuple):
    """The pixels that an image is resized to, the rows and columns of tokens that they make, and the span's tokens.

    The pads before the start of a span of Vision-Exp, which its position asks for, are not among the tokens.
    """

    height: int
    width: int
    rows: int
    columns: int
    tokens: int


class _Sizes(NamedTuple):
    """What the sizes of images are made of; ``step`` is how many rows go together."""

    patch: int
    merged: int
    step: int

    def planned(self, height: int, width: int) -> ImagePlan:
        """Return the plan of so many pixels."""
        rows, columns = (math.ceil(side // self.patch / self.merged) for side in (height, width))
        return ImagePlan(height, width, rows, columns, len(span_order(rows, columns, self.step)))

    def largest(self, height: int, width: int, most: int) -> tuple[int, int]:
        """Return the height and width of the largest image of the same shape within ``most`` tokens.

        With w columns and r·w rows, w is the root of r·w·(w + 1) + 2 = most.
        """
        cell = self.patch * self.merged
        shape = height / width
        w = math.sqrt((most - DELIMITERS) / shape + 0.25) - 0.5
        if w < 1:
            return self._whole((most - DELIMITERS) // 2) * cell, cell
        if w * shape < self.step:
            return self.step * cell, ((most - DELIMITERS) // self.step - 1) * cell
        scale = min(math.floor(w) * cell / width, self._whole(math.floor(w * shape)) * cell / height)
        return math.floor(height * scale / self.patch) * self.patch, math.floor(width * scale / self.patch) * self.patch

    def _whole(self, rows: int) -> int:
        return rows - rows % self.step


def span_order(rows: int, columns: int, step: int) -> Array:
    """Return what each token of a span is, as an index into the grid [rows · columns], start, end, newline and pad.

    >>> span_order(1, 2, 1).tolist(), span_order(1, 2, 2).tolist()
    ([2, 0, 1, 4, 3], [2, 0, 5, 1, 5, 4, 5, 5, 5, 3])
    """
    start, end, newline, pad = range(rows * columns, rows * columns + 4)
    grid = np.full((rows + -rows % step, columns + 1), pad)
    grid[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    grid[:rows, columns] = newline
    # Column by column through the rows that go together.
    lines = grid.reshape(-1, step, columns + 1).transpose(0, 2, 1).reshape(-1)
    pads = -len(lines) % COMPRESSED_TOKENS if step > 1 else 0
    return np.concatenate([[start], lines, [pad] * pads, [end]]).astype(np.int64)


def plan_image(width: int, height: int, config: ModelConfig) -> ImagePlan:
    """Return how an image of ``width`` x ``height`` pixels is resized.

    It gets at least ``min_pixels``, sides rounded up to whole patches, and where that makes more than
    ``max_image_tokens``, the largest size of its shape that does not.

    Raises:
        ConfigError: a size in the config is none, or leaves no room for an image of this shape.
    """
    is_v41 = config.version is Version.V41
    step = 1 if is_v41 else 2
    sizes = _Sizes(vision_size(config, "vision_patch_size"), vision_size(config, "vision_downsample_ratio"), step)
    widest, least = _widest(config), vision_size(config, "vision_min_pixels")
    # Vision-Exp keeps room for the pads before the start.
    unused = 0 if is_v41 else COMPRESSED_TOKENS - 1
    most = vision_size(config, "vision_max_n_token") - unused
    smallest = len(span_order(1, 1, step))
    if most < smallest:
        raise ConfigError(
            "key vision_max_n_token: no room for an image",
            where=CONFIG_NAME,
            expected=f"at least {smallest + unused}",
            got=most + unused,
        )
    if widest is not None and width > height * widest:
        width = max(1, int(height * widest))
    if width * height < least:
        ratio = (least / (width * height)) ** 0.5
        width, height = int(width * ratio), int(height * ratio)
    plan = sizes.planned(*(math.ceil(side / sizes.patch) * sizes.patch for side in (height, width)))
    allowed = most
    while plan.tokens > most:
        plan = sizes.planned(*sizes.largest(height, width, allowed))
        allowed -= 1
    if not plan.height or not plan.width:
        raise ConfigError(
            "key vision_max_n_token: no room for an image of this shape",
            where=CONFIG_NAME,
            expected="more than it says",
            got=most + unused,
        )
    return plan


def read_image(path: Path, config: ModelConfig) -> tuple[Array, ImagePlan]:
    """Return an image's pixels, float32 [3, height, width] from -1 to 1, resized as planned.

    Raises:
        DeviceError: the package Pillow is not installed.
        InputMissingError, InputOutputError, FileFormatError: there is no such file, it cannot be read, or is no image.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise missing_package("--image", "Pillow", "vision") from None
    try:
        opened = open_regular(path)
    except OSError as error:
        raise not_read(path, error, CHECK_NAME) from None
    try:
        with opened, Image.open(opened) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        is_known = not isinstance(error, UnidentifiedImageError)  # whose text names an object of Python's
        reason = error if is_known else "no format that Pillow knows"
        raise FileFormatError(f"not a readable image ({reason})", where=path) from None
    plan = plan_image(image.width, image.height, config)
    size, widest = (plan.width, plan.height), _widest(config)
    if widest is not None and image.width >= widest * image.height:
        resized = image.resize(size)
    else:
        resized = ImageOps.pad(image, size, color=GREY)
    pixels = np.asarray(resized, np.float32).transpose(2, 0, 1)
    return (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5), plan


def embed_image(p: Parameters, path: Path) -> Array:
    """Return the embeddings [tokens, D] of an image's span, without the pads before its start.

    Raises:
        UnsupportedError: the model has no vision tower.
        DeviceError, InputMissingError, FileFormatError: as for ``read_image``.
    """
    if not p.source.has("vision.patch_embed.proj.weight"):
        raise UnsupportedError(
            "the model has no vision tower",
            expected="a checkpoint of DeepSeek-V4.1 or Vision-Exp with vision.* tensors",
        )
    pixels, plan = read_image(path, p.config)
    patch = int(p.config.flat["vision_patch_size"])
    x = tower(p, pixels)
    grid = align(p, x.reshape(plan.height // patch, plan.width // patch, -1))
    names = ["image_start", "image_end", "image_newline", *(["image_pad"] if not p.is_v41 else [])]
    table = np.concatenate([grid.reshape(-1, grid.shape[-1]), [p.weight(name) for name in names]])
    embeddings: Array = table[span_order(plan.rows, plan.columns, 1 if p.is_v41 else 2)]
    return embeddings


def tower(p: Parameters, pixels: Array) -> Array:
    """Return the vision tower's output [patches, vd] of pixels [3, height, width], patches in reading order."""
    flat = p.config.flat
    patch, heads = int(flat["vision_patch_size"]), vision_size(p.config, "vision_n_heads")
    rows, columns = pixels.shape[1] // patch, pixels.shape[2] // patch
    patches = pixels.reshape(3, rows, patch, columns, patch).transpose(1, 3, 0, 2, 4).reshape(rows * columns, -1)
    x = p.project(patches, "vision.patch_embed.proj.weight") + p.weight("vision.patch_embed.proj.bias")
    turn = _turns(rows, columns, x.shape[1] // heads // 2, _above_zero(p.config, "vision_rope_theta"))
    for n in range(int(flat["vision_n_layers"])):
        at = f"vision.blocks.{n}."
        x = x + _attention(p, rms_norm(x, p.weight(f"{at}norm1.weight"), TOWER_EPSILON), turn, heads, f"{at}attn.")
        gate, up = np.split(
            p.project(rms_norm(x, p.weight(f"{at}norm2.weight"), TOWER_EPSILON), f"{at}mlp.w1.weight"), 2, axis=1
        )
        x = x + p.project(silu(gate) * up, f"{at}mlp.w2.weight")
    return rms_norm(x, p.weight("vision.norm.weight"), TOWER_EPSILON)


def _widest(config: ModelConfig) -> float | None:
    """Return the largest ratio of width to height, None where there is no limit."""
    return None if config.flat.get("vision_max_wh_ratio") is None else _above_zero(config, "vision_max_wh_ratio")


def _above_zero(config: ModelConfig, key: str) -> float:
    value = config.flat.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(
            f"key {key} is missing or not a number", where=CONFIG_NAME, expected="a number above 0", got=value
        )
    return float(value)


def align(p: Parameters, x: Array) -> Array:
    """Return the embeddings [rows, columns, D] that squares of the tower's output [h, w, vd] make.

    A square's values go by channel, then by row and column; squares at the edges are filled up with zeros.
    """
    r = int(p.config.flat["vision_downsample_ratio"])
    h, w, vd = x.shape
    x = np.pad(x, [(0, -h % r), (0, -w % r), (0, 0)])
    rows, columns = x.shape[0] // r, x.shape[1] // r
    x = x.reshape(rows, r, columns, r, vd).transpose(0, 2, 4, 1, 3).reshape(rows, columns, vd * r * r)
    y = gelu(p.project(x, "aligner.w1.weight") + p.weight("aligner.w1.bias"))
    return p.project(y, "aligner.w2.weight") + p.weight("aligner.w2.bias")


def gelu(x: Array) -> Array:
    """Return x·Φ(x), with the error function itself."""
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return (x * (0.5 + 0.5 * erf(x.astype(np.float64) * 0.5**0.5))).astype(np.float32)


def _turns(rows: int, columns: int, r: int, theta: float) -> Array:
    """Return e^{i·angle} [patches, r]: the first half of the pairs turns by the row, the second by the column."""
    f = 1 / np.float32(theta) ** (np.arange(0, r, 2, dtype=np.float32) / np.float32(r))
    row, column = np.divmod(np.arange(rows * columns, dtype=np.int64), columns)
    angle = np.concatenate([row.astype(np.float32)[:, None] * f, column.astype(np.float32)[:, None] * f], axis=1)
    return np.exp(1j * angle.astype(np.float64)).astype(np.complex64)


def _turned(x: Array, turn: Array) -> Array:
    """Return ``x`` [patches, d] turned; elements i and i + d/2 make a pair."""
    half = x.shape[1] // 2
    z = (x[:, :half] + 1j * x[:, half:]) * turn
    return np.concatenate([z.real, z.imag], axis=1).astype(np.float32)


def _attention(p: Parameters, x: Array, turn: Array, heads: int, at: str) -> Array:
    """Return full attention's output [patches, vd], head by head."""
    d = x.shape[1] // heads
    qkv = p.project(x, f"{at}wqkv.weight") + p.weight(f"{at}wqkv.bias")
    q, k, v = (part.reshape(len(x), heads, d) for part in np.split(qkv, 3, axis=1))
    o = np.empty_like(q)
    for head in range(heads):
        turned_q, turned_k = _turned(q[:, head], turn) * np.float32(d**-0.5), _turned(k[:, head], turn)
        for a in range(0, len(x), QUERY_BLOCK):
            scores = turned_q[a : a + QUERY_BLOCK] @ turned_k.T
            o[a : a + QUERY_BLOCK, head] = softmax(scores, axis=1) @ v[:, head]
    return product(o.reshape(len(x), -1), p.weight(f"{at}wo.weight")) + p.weight(f"{at}wo.bias")


def with_images(tokens: Sequence[int], images: Sequence[Array], p: Parameters) -> tuple[list[int], list[Array]]:
    """Return ``tokens`` with each image token repeated for the tokens of its image's span, and the spans' embeddings.

    Image tokens are those with the model's own id and ``IMAGE``. Spans of Vision-Exp get their pads here.

    Raises:
        UsageError: there are more or fewer image tokens than images.
    """
    image_token = p.config.flat.get("image_token_id", IMAGE)
    found = sum(token in (image_token, IMAGE) for token in tokens)
    if found != len(images):
        of_id = "" if image_token == IMAGE else f" of id {image_token}"
        raise UsageError(
            "images and image tokens of the prompt",
            expected=f"{len(images)}{of_id}, one for each --image",
            got=found,
            hint="write image among the --tokens",
        )
    left = iter(images)
    placed: list[int] = []
    spans: list[Array] = []
    for token in tokens:
        if token not in (image_token, IMAGE):
            placed.append(token)
            continue
        span = next(left)
        if not p.is_v41:
            pads = (-len(placed) - 1) % COMPRESSED_TOKENS
            span = np.concatenate([np.repeat(p.weight("image_pad")[None], pads, axis=0), span])
        placed += [image_token] * len(span)
        spans.append(span)
    return placed, spans
