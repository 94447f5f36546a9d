"""The bytes of a model's caches: window, compressed entries, index keys and compressor states, layer by layer.

Who computes decides how they are held:

    f32        the reference forward pass: float32, only what there is
    published  the published kernels' roundings, packed: codes, their scales, and the rotary part where it stays BF16
    bf16       the published inference code's own buffers
    f16, q8_0  llama.cpp: cells in multiples of 256, room for one batch besides the window, a cell in a type of ggml's

The states of compressors are float32 everywhere. All heads share one key, which is the value too, so model
parallelism divides none of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..errors import UsageError, check_choice
from ..formats.ggml_types import BY_NAME
from .config import ModelConfig, Version

KV_TYPES = ("published", "bf16", "f16", "q8_0", "f32")
LLAMA_CPP_TYPES = ("f16", "q8_0")

WINDOW, ENTRIES, INDEX_KEYS, STATES = "window", "compressed entries", "index keys", "compressor states"
NGRAM_CONTEXT = "n-gram context"

# The ratio whose compressor overlaps blocks and, in V4, has an indexer: its channels count twice.
OVERLAPPING_RATIO = 4

BF16_BYTES = 2
F32_BYTES = 4
# A token that the next ones make n-grams with: its id as int64, and whether it belongs to an image.
CONTEXT_TOKEN_BYTES = 9

# llama.cpp: cells of a cache come in multiples of this, and a window has room for a batch computed at once.
CELLS = 256
DEFAULT_UBATCH = 512

# What a sequence is taken to have where nobody says, as far as the model allows it.
DEFAULT_CONTEXT = 128 * 1024

# The blocks that share a scale byte in the published roundings: V4's kv without its rotary part, V4.1's window kv and
# compressed kv, and the indexer's keys.
KV_BLOCK, WINDOW_BLOCK_V41, ENTRY_BLOCK_V41, INDEX_BLOCK = 64, 32, 16, 32


class CachePart(NamedTuple):
    """One array of a layer's caches for one sequence: ``rows`` of ``row_bytes`` bytes.

    ``layer`` is a trunk layer, or a draft layer where ``is_draft``; None where all layers share the array.
    """

    layer: int | None
    is_draft: bool
    kind: str
    rows: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        """Return the bytes of the array."""
        return self.rows * self.row_bytes


def cache_bytes(config: ModelConfig, tokens: int, kv: str, *, n_draft: int = 0, ubatch: int = DEFAULT_UBATCH) -> int:
    """Return the bytes of all caches of one sequence of ``tokens`` tokens, held as ``kv`` says.

    ``n_draft`` is the number of draft layers that run too, ``ubatch`` the tokens that llama.cpp computes at once.

    Raises:
        UsageError: an unknown ``kv``, or heads that the type's blocks do not fill.
    """
    return sum(part.nbytes for part in cache_parts(config, tokens, kv, n_draft=n_draft, ubatch=ubatch))


def cache_parts(
    config: ModelConfig, tokens: int, kv: str, *, n_draft: int = 0, ubatch: int = DEFAULT_UBATCH
) -> Iterator[CachePart]:
    """Yield the arrays of all layers' caches for one sequence; see ``cache_bytes``.

    Raises:
        UsageError: as for ``cache_bytes``.
    """
    check_choice("--kv", kv, KV_TYPES)
    d, di, W = config.head_dim, config.index_head_dim, config.sliding_window  # noqa: N806
    in_llama_cpp = kv in LLAMA_CPP_TYPES
    widths = {kind: row_bytes(config, kind, kv) for kind in (WINDOW, ENTRIES, INDEX_KEYS)}
    window = _padded(min(_padded(tokens), W + ubatch)) if in_llama_cpp else min(tokens, W)

    def entries(ratio: int) -> int:
        return _padded(-(-_padded(tokens) // ratio)) if in_llama_cpp else tokens // ratio

    def states(layer: int, ratio: int, width: int) -> CachePart:
        c = 2 if ratio == OVERLAPPING_RATIO else 1
        if kv == "f32":
            # Keys and scores of the tokens that wait for their block, and of the half block that overlaps.
            return CachePart(layer, False, STATES, 2 * (tokens % ratio * c + ratio), width * F32_BYTES)
        return CachePart(layer, False, STATES, 2 * c * ratio, c * width * F32_BYTES)

    if config.engram is not None:
        yield CachePart(None, False, NGRAM_CONTEXT, min(tokens, config.engram.max_ngram_size - 1), CONTEXT_TOKEN_BYTES)
    for layer in range(config.num_hidden_layers):
        yield CachePart(layer, False, WINDOW, window, widths[WINDOW])
        ratio = config.compress_ratios[layer]
        if not ratio or (config.version is Version.V41 and layer not in config.kv_source_layer_ids):
            continue
        yield CachePart(layer, False, ENTRIES, entries(ratio), widths[ENTRIES])
        # Ratio 1 weighs nothing, so nothing waits; the reference keeps its empty block all the same.
        if ratio > 1 or kv == "f32":
            yield states(layer, ratio, d)
        if config.version is Version.V41:
            yield CachePart(layer, False, INDEX_KEYS, entries(ratio), widths[INDEX_KEYS])
        elif ratio == OVERLAPPING_RATIO:
            yield CachePart(layer, False, INDEX_KEYS, entries(ratio), widths[INDEX_KEYS])
            yield states(layer, ratio, di)
    for layer in range(n_draft):
        yield CachePart(layer, True, WINDOW, window, widths[WINDOW])


def _padded(cells: int) -> int:
    """Return a number of llama.cpp's cells, rounded up to a whole multiple."""
    return -(-cells // CELLS) * CELLS


def row_bytes(config: ModelConfig, kind: str, kv: str) -> int:
    """Return the bytes of one row of a cache of ``kind``, window, compressed entries or index keys.

    Raises:
        UsageError: heads that the type's blocks do not fill.
    """
    width = config.index_head_dim if kind == INDEX_KEYS else config.head_dim
    if kv == "f32":
        return width * F32_BYTES
    if kv == "bf16":
        return width * BF16_BYTES
    if kv in LLAMA_CPP_TYPES:
        to = BY_NAME[kv]
        if width % to.elements:
            raise UsageError(
                f"--kv {kv}: its blocks do not fill a row of {width}", expected=f"rows of a multiple of {to.elements}"
            )
        return to.row_bytes(width)
    if kind == INDEX_KEYS:  # e2m1 with e8m0 scales
        return -(-width // 2) + -(-width // INDEX_BLOCK)
    if config.version is Version.V41:
        if kind == WINDOW:  # e4m3 with e8m0 scales
            return width + -(-width // WINDOW_BLOCK_V41)
        return -(-width // 2) + -(-width // ENTRY_BLOCK_V41)  # e2m1 with e4m3 scales
    rotary = config.qk_rope_head_dim
    return width - rotary + -(-(width - rotary) // KV_BLOCK) + rotary * BF16_BYTES  # e4m3 with e8m0 scales, BF16
