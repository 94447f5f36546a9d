"""llama.cpp on our GGUF against the numpy forward pass of the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dsv4convert.engine.conversion import execute
from dsv4convert.reference import Model
from dsv4convert.reference.weights.open import open_source
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions

from ..checkpoints import MakeCheckpoint
from ..oracles.llama_cpp import convert

pytestmark = pytest.mark.llama

Array = npt.NDArray[Any]


def llama_logits(path: Path, tokens: list[int]) -> Array:
    from llama_cpp import Llama

    size = len(tokens)
    threads = {"n_threads": 1, "n_threads_batch": 1}  # more wait for each other, spinning, where tests share processors
    model = Llama(str(path), n_ctx=size + 8, n_batch=size, logits_all=True, verbose=False, **threads)
    model.eval(tokens)
    return np.array(model.scores[:size], np.float64)


def cosines(a: Array, b: Array) -> Array:
    result: Array = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return result


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("types", "least"),
    # llama.cpp rounds activations to Q8_0 for quantised weights; with float32 only its F16 cache remains.
    [({}, 0.999), ({"dense": "f32", "experts": "f32"}, 0.99999)],
    ids=["default types", "float32"],
)
def test_llama_cpp_computes_what_the_reference_does(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, seed: int, types: dict[str, str], least: float
) -> None:
    """The tiny checkpoints' routers have clear margins, so that rounding moves logits and few choices."""
    path = tmp_path / "model.gguf"
    execute(plan_gguf(make_checkpoint("tiny", seed=seed), path, GgufOptions(**types)), threads=2)
    tokens = [0, *np.random.default_rng(seed).integers(5, 400, 199).tolist()]
    ours = Model(open_source(path)).forward(tokens)
    theirs = llama_logits(path, tokens)
    assert np.median(cosines(ours.astype(np.float64), theirs)) > least


def test_llama_cpps_own_conversion_is_read_like_ours(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny")
    convert(source, tmp_path / "theirs.gguf")
    execute(plan_gguf(source, tmp_path / "ours.gguf", GgufOptions()), threads=2)
    tokens = np.random.default_rng(0).integers(0, 512, 150)
    ours, theirs = (Model(open_source(tmp_path / f"{name}.gguf")).forward(tokens) for name in ("ours", "theirs"))
    assert np.array_equal(ours, theirs)
