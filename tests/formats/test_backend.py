"""The choice of backend, and what all codecs owe the engine: threads, reused arenas, no allocation per tile."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dsv4convert.formats import backend
from dsv4convert.formats.backend import (
    CODEC_NAMES,
    Codecs,
    compiled_available,
    compiled_codecs,
    default_codecs,
    numpy_codecs,
)
from dsv4convert.formats.base import Scratch, Tally
from dsv4convert.formats.compiled.library import library_path, source_digest


def test_compiled_codecs_can_be_switched_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(backend.COMPILED_VARIABLE, raising=False)
    monkeypatch.setattr(backend, "library_path", lambda: Path("codecs-x86_64_v3.so"))
    assert compiled_available()
    assert backend.describe_codecs() == "compiled codecs (x86_64_v3)"
    monkeypatch.setenv(backend.COMPILED_VARIABLE, "0")
    assert not compiled_available()
    assert default_codecs() is numpy_codecs()
    assert backend.describe_codecs() == "numpy codecs (DSV4CONVERT_COMPILED=0)"


def test_numpy_serves_where_no_library_is_built(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "library_path", lambda: None)
    assert not compiled_available()
    assert default_codecs() is numpy_codecs()
    assert backend.describe_codecs() == "numpy codecs (the compiled ones are not built for this machine)"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"no library" * 100, "invalid ELF header"), (b"", "file too short")],
    ids=["no library", "empty"],
)
def test_a_library_that_does_not_load_costs_a_warning_and_speed(content: bytes, reason: str, tmp_path: Path):
    damaged = tmp_path / "codecs-x86_64_v3.so"
    damaged.write_bytes(content)
    check_that_numpy_serves(damaged, reason)


@pytest.mark.skipif(library_path() is None, reason="the compiled codecs are not built for this machine")
def test_a_library_of_other_sources_is_not_used(tmp_path: Path):
    """Its structures may be other ones, and the run would end in a crash or in wrong bytes."""
    built, older = library_path(), tmp_path / "codecs-x86_64_v3.so"
    assert built is not None
    digest = source_digest(built.parent).encode()
    assert built.read_bytes().count(digest) == 1
    older.write_bytes(built.read_bytes().replace(digest, digest[::-1]))
    check_that_numpy_serves(older, "built from other sources: install the package again")


def check_that_numpy_serves(damaged: Path, reason: str):
    program = (
        "import sys, warnings; from pathlib import Path; warnings.simplefilter('error')\n"
        "from dsv4convert.formats import backend\n"
        "from dsv4convert.formats.compiled import library\n"
        f"library.library_path = lambda: Path({str(damaged)!r})\n"
        "try: backend.compiled_codecs()\n"
        "except RuntimeWarning as warning: message = str(warning)\n"
        f"assert 'the compiled codecs do not load' in message and {reason!r} in message, message\n"
        "warnings.simplefilter('ignore'); sys.exit(backend.compiled_codecs().name != 'numpy')"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_choosing_numpy_loads_no_library():
    program = (
        "import sys; from dsv4convert.formats.backend import compiled_available, describe_codecs, numpy_codecs;"
        "numpy_codecs(); compiled_available(); describe_codecs();"
        "sys.exit('dsv4convert.formats.compiled.twins' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_every_codec_but_three_is_compiled():
    """One that a library lacks is numpy's, which makes the same bytes many times slower."""
    compiled, plain = compiled_codecs(), numpy_codecs()
    same = {name for name in CODEC_NAMES if getattr(compiled, name) is getattr(plain, name)}
    assert same == {"mxfp4_to_f32", "q8_0_to_f32", "i64_to_i32"}
    assert len(CODEC_NAMES) > 30


def tile(name: str, rows: int, columns: int, seed: int) -> tuple[list, list[np.ndarray]]:
    """Ordinary inputs of a codec, as weights have them, and its outputs."""
    rng = np.random.default_rng(seed)
    source, target = name.split("_to_")
    if source == "nvfp4":
        columns = -(-columns // 64) * 64  # whole blocks
    groups = columns // 32
    x = (rng.standard_normal((rows, columns)) * 0.02).astype(np.float32)
    if source == "fp8":
        codes = rng.integers(0, 0x7F, (rows, columns), dtype=np.uint8)
        shape = (-(-rows // 128), -(-columns // 128))
        inputs = [codes, rng.integers(113, 120, shape, dtype=np.uint8), (128, 128)]
    elif source == "fp4":
        inputs = [
            rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8),
            rng.integers(113, 120, (rows, groups), dtype=np.uint8),
        ]
        if target in ("nvfp4", "nvfp4_scales"):
            inputs.append(121)
        if target in ("fp8_scales", "nvfp4_scales"):
            del inputs[0]
        elif target not in ("mxfp4", "fp8", "nvfp4"):
            inputs.append((1, 32))
    elif source == "nvfp4":
        inputs = [
            rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8),
            rng.integers(0, 0x7F, (rows, columns // 16), dtype=np.uint8),
        ]
    else:
        inputs = [{"f32": x, "bf16": (x.view(np.uint32) >> 16).astype(np.uint16), "f16": x.astype(np.float16)}[source]]
        if target in ("fp8", "fp8_scales"):
            inputs.append((128, 128))
    tiles = ((-(-rows // 128), -(-columns // 128)), np.uint8)
    outputs = {
        "f32": [((rows, columns), np.float32)],
        "bf16": [((rows, columns), np.uint16)],
        "f16": [((rows, columns), np.float16)],
        "fp8": [((rows, columns), np.uint8), *([tiles] if source == "fp4" else [])],
        "fp8_scales": [tiles],
        "fp4": [((rows, columns // 2), np.uint8)],
        "fp4_scales": [((rows, groups), np.uint8)],
        "nvfp4": [((rows, columns // 2), np.uint8)],
        "nvfp4_scales": [((rows, groups * 2), np.uint8)],
        "mxfp4": [((rows, groups * 17), np.uint8)],
        "ggml": [((rows, columns // 64 * 36), np.uint8)],
        "q8_0": [((rows, groups * 34), np.uint8)],
    }[target]
    return inputs, [np.full(shape, 7, dtype) for shape, dtype in outputs]


TILE_CODECS = [name for name in CODEC_NAMES if name not in ("i64_to_i32", "mxfp4_to_f32", "q8_0_to_f32")]


@pytest.mark.parametrize("name", TILE_CODECS)
def test_backends_agree_bit_for_bit_on_ordinary_weights(name: str):
    results = []
    for codecs in (numpy_codecs(), compiled_codecs()):
        inputs, outputs = tile(name, 200, 416, seed=1)
        tally = Tally()
        getattr(codecs, name)(*inputs, *outputs, Scratch(), tally)
        results.append(([out.tobytes() for out in outputs], tally))
    assert results[0] == results[1]


@pytest.mark.parametrize("name", TILE_CODECS)
def test_a_large_tile_leaves_nothing_behind_for_a_small_one(codecs: Codecs, name: str):
    scratch = Scratch()
    inputs, outputs = tile(name, 300, 512, seed=2)
    getattr(codecs, name)(*inputs, *outputs, scratch, Tally())
    inputs, outputs = tile(name, 3, 96, seed=3)
    getattr(codecs, name)(*inputs, *outputs, scratch, Tally())
    _, fresh = tile(name, 3, 96, seed=3)
    getattr(codecs, name)(*inputs, *fresh, Scratch(), Tally())
    for left, right in zip(outputs, fresh, strict=True):
        np.testing.assert_array_equal(left.view(np.uint8), right.view(np.uint8))


@pytest.mark.parametrize("name", TILE_CODECS)
def test_cutting_a_tensor_into_tiles_changes_nothing(codecs: Codecs, name: str):
    inputs, whole = tile(name, 300, 384, seed=4)
    total = Tally()
    getattr(codecs, name)(*inputs, *whole, Scratch(), total)
    pieces = [np.full_like(out, 9) for out in whole]
    counted, scratch = Tally(), Scratch()
    for start in range(0, 300, 128):
        part = slice(start, start + 128)
        cut = [_rows(argument, part, 300) for argument in inputs]
        getattr(codecs, name)(*cut, *[_rows(out, part, 300) for out in pieces], scratch, counted)
    for left, right in zip(pieces, whole, strict=True):
        np.testing.assert_array_equal(left.view(np.uint8), right.view(np.uint8))
    assert counted == total


def _rows(argument, part: slice, rows: int):
    if isinstance(argument, tuple | int):
        return argument
    if argument.shape[0] == rows:
        return argument[part]
    return argument[part.start // 128 : part.start // 128 + 1]


@pytest.mark.parametrize("name", [name for name in TILE_CODECS if name not in ("f32_to_f16", "bf16_to_f16")])
def test_an_output_with_gaps_is_refused_or_filled(codecs: Codecs, name: str):
    inputs, outputs = tile(name, 64, 128, seed=6)
    getattr(codecs, name)(*inputs, *outputs, Scratch(), Tally())
    gapped = [np.full((out.shape[0], 2 * out.shape[1]), 9, out.dtype)[:, : out.shape[1]] for out in outputs]
    with contextlib.suppress(ValueError):
        getattr(codecs, name)(*inputs, *gapped, Scratch(), Tally())
        for left, right in zip(gapped, outputs, strict=True):
            np.testing.assert_array_equal(left, right)


# Conversions that checkpoints need in bulk, and the bytes of temporary memory that a tile of theirs may
# take beside the arena, as a share of the elements.
BULK = [
    "fp8_to_f32",
    "fp8_to_bf16",
    "fp8_to_q8_0",
    "fp4_to_bf16",
    "fp4_to_f32",
    "fp4_to_mxfp4",
    "fp4_to_nvfp4",
    "fp4_to_fp8",
]


@pytest.mark.parametrize("name", BULK)
def test_a_tile_in_the_steady_state_allocates_next_to_nothing(codecs: Codecs, name: str):
    rows, columns = 256, 2048
    inputs, outputs = tile(name, rows, columns, seed=5)
    scratch = Scratch()
    for _ in range(2):
        getattr(codecs, name)(*inputs, *outputs, scratch, Tally())
    held = scratch.nbytes
    tracemalloc.start()
    getattr(codecs, name)(*inputs, *outputs, scratch, Tally())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert scratch.nbytes == held
    assert peak < rows * columns / 2


@pytest.mark.parametrize("name", ["fp8_to_bf16", "fp8_to_q8_0", "fp4_to_mxfp4", "fp4_to_fp8", "bf16_to_q8_0"])
def test_threads_with_their_own_arenas_do_not_disturb_each_other(codecs: Codecs, name: str):
    def run(seed: int) -> list[bytes]:
        inputs, outputs = tile(name, 150, 512, seed)
        scratch = Scratch()
        for _ in range(20):
            getattr(codecs, name)(*inputs, *outputs, scratch, Tally())
        return [out.tobytes() for out in outputs]

    alone = [run(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == alone
