"""Caches: their bytes equal the arrays that the reference forward pass holds, and those that llama.cpp allocates."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsv4convert
from dsv4convert.api import load_model
from dsv4convert.model.cache_bytes import KV_TYPES, cache_bytes, cache_parts
from dsv4convert.model.config import parse_config
from dsv4convert.reference import Model, State

from ..reference.random_model import SHAPES, random_config, random_source
from ..v41 import TINY, published_config


def arrays(state: State) -> Iterator[tuple[int | None, str, Any]]:
    """Yield all arrays that a state keeps for the next tokens, with their layer."""
    for number, layer in enumerate(state.layers):
        yield number, "window", layer.window
        if layer.keys is not None:
            yield number, "index keys", layer.keys
        for compressor, kind in ((layer.compressor, "compressed entries"), (layer.indexer, "index keys")):
            if compressor is None:
                continue
            yield number, kind, compressor.entries
            for array in (
                compressor.pending_k,
                compressor.pending_s,
                compressor.previous_k,
                compressor.previous_s,
            ):
                yield number, "compressor states", array
    if len(state.context):
        yield None, "n-gram context", state.context
        yield None, "n-gram context", state.context_image


def check(model: Model, state: State, tokens: int) -> None:
    held: dict[tuple[int | None, str], int] = {}
    for layer, kind, array in arrays(state):
        held[layer, kind] = held.get((layer, kind), 0) + array.nbytes
    told: dict[tuple[int | None, str], int] = {}
    for part in cache_parts(model.config, tokens, "f32"):
        told[part.layer, part.kind] = told.get((part.layer, part.kind), 0) + part.nbytes
    assert told == held
    assert cache_bytes(model.config, tokens, "f32") == sum(held.values())


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_caches_are_those_that_the_forward_pass_holds(shape: int) -> None:
    model = Model(random_source(shape, 1))
    state, done = model.new_state(), 0
    for count in (1, 2, 1, 3, 120, 1, 5, 1):
        model.forward(np.arange(count) % model.config.vocab_size, state, last_only=True)
        done += count
        check(model, state, done)


@pytest.mark.parametrize("name", TINY)
def test_caches_of_v41_are_those_that_the_forward_pass_holds(name: str) -> None:
    model = load_model(TINY[name])
    state, done = model.new_state(), 0
    for count in (1, 1, 1, 2, 40, 1, 1):
        model.forward(np.arange(3, 3 + count), state, last_only=True)
        done += count
        check(model, state, done)


def test_a_draft_has_windows_only() -> None:
    model = Model(random_source(0, 1))
    state = model.new_mtp_state()
    tokens = np.arange(30)
    main = model.new_state()
    model.forward(tokens, main)
    assert main.streams is not None
    model.mtp(main.streams, tokens, state)
    parts = [part for part in cache_parts(model.config, 30, "f32", n_draft=1) if part.is_draft]
    assert [part.nbytes for part in parts] == [state.layers[0].window.nbytes]


# Bytes of one token's entry at the published widths: 448 e4m3 with 7 scales and 64 BF16; 512 e4m3 with 16 scales,
# 512 e2m1 with 32 scales; 128 e2m1 with 4 scales.
def test_rows_of_the_published_roundings() -> None:
    rows = {
        (version, part.kind): part.row_bytes
        for version, raw in (
            ("V4", random_config(0) | {"head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}),
            ("V4.1", published_config()),
        )
        for part in cache_parts(parse_config(raw, version), 256, "published")
    }
    assert rows["V4", "window"] == rows["V4", "compressed entries"] == 448 + 7 + 128
    assert rows["V4", "index keys"] == rows["V4.1", "index keys"] == 64 + 4
    assert rows["V4.1", "window"] == 512 + 16
    assert rows["V4.1", "compressed entries"] == 256 + 32


def test_the_longest_context_is_the_last_that_fits(tiny: Path) -> None:
    for kv in KV_TYPES:
        base = dsv4convert.estimate(tiny, context=1000, kv=kv)
        found = dsv4convert.estimate(tiny, context=1000, kv=kv, memory=base.need.total)
        assert found.need.free == 0
        assert found.need.fits
        longest = found.need.longest_context
        assert longest is not None
        assert longest >= 1000
        for context, fits in ((longest, True), (longest + 1, False)):
            assert dsv4convert.estimate(tiny, context=context, kv=kv, memory=base.need.total).need.fits is fits
        short = dsv4convert.estimate(tiny, context=1000, kv=kv, memory=base.need.total - 1)
        assert not short.need.fits
        assert short.need.free == -1


def test_caches_grow_with_the_batch(tiny: Path) -> None:
    one, nine = (dsv4convert.estimate(tiny, context=500, batch=batch) for batch in (1, 9))
    assert nine.caches.nbytes == 9 * one.caches.nbytes
    assert nine.need.caches == nine.caches.nbytes


READ_LOG = """
import sys
from llama_cpp import Llama
for kind in (1, 8):
    print("== with", kind, file=sys.stderr)
    Llama(sys.argv[1], n_ctx=int(sys.argv[2]), n_ubatch=256, type_k=kind, type_v=kind, flash_attn=True, swa_full=False)
"""
BUFFER = re.compile(r"(?:KV|state) buffer size = +([0-9.]+) MiB")


@pytest.mark.llama
@pytest.mark.parametrize("context", [300, 3000])
def test_caches_are_those_that_llama_cpp_allocates(context: int, tiny: Path, tmp_path: Path) -> None:
    dsv4convert.convert_gguf(tiny, tmp_path / "model.gguf")
    command = [sys.executable, "-c", READ_LOG, str(tmp_path / "model.gguf"), str(context)]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    for kv, told in zip(("f16", "q8_0"), log.split("== with ")[1:], strict=True):
        # Sizes are told in hundredths of a MiB.
        sizes = [float(size) for size in BUFFER.findall(told)]
        assert len(sizes) > 4, told
        wanted = dsv4convert.estimate(tmp_path / "model.gguf", context=context, kv=kv, chunk=256).caches.nbytes
        assert sum(sizes) == pytest.approx(wanted / 2**20, abs=0.005 * len(sizes))
