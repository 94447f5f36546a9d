"""What low-bit types cost, by the forward pass and by llama.cpp, on a model whose choices no rounding changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dsv4convert.api import convert_gguf, load_model
from dsv4convert.containers.gguf import open_gguf
from dsv4convert.formats.ggml_types import QUANTISED
from dsv4convert.reference.compare import logits_difference

from ..checkpoints import MakeCheckpoint
from ..command_line import run_cli
from ..low_bit import CLEAR, SLOW
from ..oracles.ggml_quantize import Asked, quantise
from .test_llama import cosines, llama_logits

pytest.importorskip("llama_cpp")

# From the best to the worst, with so much more divergence at every step.
LEAST_STEP = 4 / 3
BY_QUALITY = ("q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k")
TOKENS = 192


@pytest.fixture(scope="module")
def source(make_checkpoint: MakeCheckpoint) -> Path:
    """Return a checkpoint with FP8 experts, hash-routed, whose indexers choose all entries."""
    return make_checkpoint("tiny", **CLEAR)


@pytest.fixture(scope="module")
def tokens(source: Path) -> list[int]:
    vocabulary = load_model(source).config.vocab_size
    return [int(token) for token in np.random.default_rng(3).integers(0, vocabulary, TOKENS)]


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns the checkpoint with experts of a type, once."""
    folder = tmp_path_factory.mktemp("types")

    def convert(kind: str) -> Path:
        path = folder / f"{kind}.gguf"
        if not path.exists():
            convert_gguf(source, path, experts=kind, importance="weights", threads=2)
        return path

    return convert


def test_compare_tells_what_a_low_bit_file_costs(
    source: Path, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    path = converted("q2_k")
    asked = ["--tokens", ",".join(map(str, range(7, 57)))]
    done = run_cli("compare", source, path, *asked, "--tolerance", "inf", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["logits"]
    logits = []
    for number, model in enumerate((source, path)):
        out = tmp_path / f"{number}.npy"
        assert run_cli("forward", model, *asked, "--logits", out).code == 0
        logits.append(np.load(out).astype(np.longdouble))
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in logits)
    kl = (p * np.log(p / q)).sum(axis=1)
    assert found["positions"] == 50
    assert found["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-9)
    assert found["kl_max"] == pytest.approx(float(kl.max()), rel=1e-9)
    assert found["argmax_agreement"] == np.mean(p.argmax(axis=1) == q.argmax(axis=1))
    assert 0.001 < found["kl_mean"] < 1
    printed = run_cli("compare", source, path, *asked, "--tolerance", "inf").out
    assert f"argmax agrees in {found['argmax_agreement']:.2%}; KL(A||B) mean {found['kl_mean']:.3g}" in printed
    assert run_cli("compare", source, path, *asked, "--json").code == 12


@pytest.mark.llama
def test_fewer_bits_diverge_more_in_the_forward_pass_and_in_llama_cpp(
    source: Path, converted: Callable[[str], Path], tokens: list[int]
) -> None:
    ours, theirs = [], []
    logits = load_model(source).forward(tokens)
    for kind in BY_QUALITY:
        path = converted(kind)
        ours.append(logits_difference(logits, load_model(path).forward(tokens)).kl_mean)
        theirs.append(logits_difference(logits, llama_logits(path, tokens)).kl_mean)
    for kl in (ours, theirs):
        assert all(worse > better * LEAST_STEP for better, worse in pairwise(kl)), (ours, theirs)


@pytest.mark.llama
@pytest.mark.parametrize("kind", QUANTISED)
def test_llama_cpp_runs_every_type(kind: str, source: Path, tokens: list[int], tmp_path: Path) -> None:
    """Its logits are those of the forward pass on the same file, but for the activations that it rounds to Q8."""
    path = tmp_path / "model.gguf"
    name = "blk.0.attn_kv.weight" if kind in SLOW else "blk.0.ffn_down_exps.weight"
    convert_gguf(source, path, tensor_type=[f"{name}={kind}"], importance="weights", threads=2)
    assert open_gguf(path).tensors[name].type == kind
    ours, theirs = load_model(path).forward(tokens[:64]), llama_logits(path, tokens[:64])
    assert np.median(cosines(ours.astype(np.float64), theirs)) > 0.999


Q3_K_M = 12  # llama.cpp's number of the file type


@pytest.mark.llama
def test_protected_types_diverge_less_than_llama_cpps_own_choice_of_no_smaller_size(
    make_checkpoint: MakeCheckpoint, tokens: list[int], tmp_path: Path
) -> None:
    """Nine tenths of the elements are those of experts; of the published models it is more."""
    few = {**CLEAR["overrides"], "num_experts_per_tok": 4, "index_n_heads": 2}
    source = make_checkpoint("tiny", **{**CLEAR, "experts": 48, "overrides": few})
    wide, theirs, ours = (tmp_path / f"{name}.gguf" for name in ("wide", "theirs", "ours"))
    convert_gguf(source, wide, dense="f32", experts="f32", threads=2)
    quantise(Asked(wide, theirs, {}, file_type=Q3_K_M))
    convert_gguf(source, ours, recipe="q2_k_s", tensor_type=["ffn_down_exps=q3_k"], threads=2)
    assert ours.stat().st_size < theirs.stat().st_size
    logits = load_model(source).forward(tokens)
    kl_ours, kl_theirs = (
        logits_difference(logits, load_model(path).forward(tokens)).kl_mean for path in (ours, theirs)
    )
    assert kl_ours < kl_theirs * 0.9
