"""Our GGUF beside llama.cpp's own conversion: the same tensors, types, shapes, bytes and keys, and the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from dsv4convert.containers.gguf import read_gguf_part
from dsv4convert.engine.conversion import execute
from dsv4convert.errors import UsageError
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions

from ..checkpoints import MakeCheckpoint
from ..oracles.llama_cpp import convert
from ..reference.test_llama import llama_logits as logits

pytestmark = pytest.mark.llama

# The template is ours and says more than llama.cpp's.
OWN_VALUE_KEYS = {"tokenizer.chat_template"}

# Dimensions that no published model has, and that leave ragged scale blocks everywhere.
ODD = {
    "hidden_size": 224,
    "moe_intermediate_size": 160,
    "q_lora_rank": 160,
    "o_lora_rank": 96,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "vocab_size": 800,
}
CASES: dict[str, dict[str, Any]] = {
    "seed 0": {"seed": 0},
    "seed 1": {"seed": 1},
    "odd shapes": {"seed": 2, "overrides": {**ODD, "num_hidden_layers": 5, "compress_ratios": [4, 0, 128, 4, 128, 0]}},
    "no hash layers, one expert per token": {
        "seed": 3,
        "overrides": {"num_hash_layers": 0, "num_experts_per_tok": 1, "routed_scaling_factor": 2.5},
    },
    "five files": {"seed": 4, "files": 5},
}


@pytest.fixture(scope="module", params=list(CASES))
def pair(
    request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Return (llama.cpp's file, our file) of one checkpoint."""
    source = make_checkpoint("tiny", **CASES[request.param])
    folder = tmp_path_factory.mktemp("pair")
    execute(plan_gguf(source, folder / "ours.gguf", GgufOptions(draft="split")), threads=2)
    convert(source, folder / "theirs.gguf")
    return folder / "theirs.gguf", folder / "ours.gguf"


@pytest.fixture(scope="module", params=["seed 0", "odd shapes"])
def mtp_pair(
    request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Return (llama.cpp's MTP file, ours)."""
    source = make_checkpoint("tiny", **CASES[request.param])
    folder = tmp_path_factory.mktemp("mtp")
    execute(plan_gguf(source, folder / "ours.gguf", GgufOptions(draft="only")), threads=2)
    convert(source, folder / "theirs.gguf", "--mtp")
    return folder / "theirs.gguf", folder / "ours.gguf"


def assert_same_tensors(theirs: GGUFReader, ours: GGUFReader) -> None:
    expected = {tensor.name: tensor for tensor in theirs.tensors}
    found = {tensor.name: tensor for tensor in ours.tensors}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].tensor_type == tensor.tensor_type, name
        assert list(found[name].shape) == list(tensor.shape), name
        assert np.array_equal(found[name].data.view(np.uint8), tensor.data.view(np.uint8)), name


def assert_superset_of_keys(theirs: GGUFReader, ours: GGUFReader) -> None:
    for key, entry in theirs.fields.items():
        if key.startswith("GGUF."):  # the reader's own, of the header
            continue
        assert key in ours.fields
        assert ours.fields[key].types == entry.types, key
        if key not in OWN_VALUE_KEYS:
            assert ours.fields[key].contents() == entry.contents(), key


def test_tensors_equal_llama_cpps_byte_for_byte(pair: tuple[Path, Path]) -> None:
    assert_same_tensors(GGUFReader(pair[0]), GGUFReader(pair[1]))


def test_keys_are_a_superset_of_llama_cpps(pair: tuple[Path, Path]) -> None:
    assert_superset_of_keys(GGUFReader(pair[0]), GGUFReader(pair[1]))


def test_mtp_file_equals_llama_cpps(mtp_pair: tuple[Path, Path]) -> None:
    theirs, ours = GGUFReader(mtp_pair[0]), GGUFReader(mtp_pair[1])
    assert_same_tensors(theirs, ours)
    assert_superset_of_keys(theirs, ours)


def test_llama_cpp_computes_the_same_from_both(pair: tuple[Path, Path]) -> None:
    tokens = [0, *np.random.default_rng(7).integers(5, 300, 200).tolist()]
    theirs, ours = (logits(path, tokens) for path in pair)
    assert np.isfinite(ours).all()
    assert ours.std() > 0.01
    assert np.array_equal(ours.argmax(axis=1), theirs.argmax(axis=1))


@pytest.mark.parametrize("limits", [{"split_max_bytes": 1_000_000}, {"split_max_tensors": 1}], ids=["bytes", "tensors"])
def test_llama_cpp_loads_split_files(limits: dict[str, int], make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny", seed=1)
    tokens = [0, *range(5, 105)]
    execute(plan_gguf(source, tmp_path / "whole.gguf", GgufOptions()), threads=2)
    plan = plan_gguf(source, tmp_path / "split.gguf", GgufOptions(**limits))
    execute(plan, threads=2)
    assert len(plan.files) > 2
    assert np.array_equal(logits(tmp_path / plan.files[0].name, tokens), logits(tmp_path / "whole.gguf", tokens))


@pytest.mark.parametrize("limit", [1, 7])
def test_splits_by_number_of_tensors_are_cut_as_in_llama_cpp(
    limit: int, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint("tiny", seed=1)
    (tmp_path / "theirs").mkdir()
    convert(source, tmp_path / "theirs" / "model.gguf", "--split-max-tensors", str(limit))
    plan = plan_gguf(source, tmp_path / "ours" / "model.gguf", GgufOptions(split_max_tensors=limit))
    (tmp_path / "ours").mkdir()
    execute(plan, threads=2)
    theirs = sorted((tmp_path / "theirs").glob("*.gguf"))
    assert [file.name for file in plan.files] == [path.name for path in theirs]
    assert len(theirs) > 3
    # The order of tensors is each converter's own, the number in each file is not.
    ours = [read_gguf_part(tmp_path / "ours" / path.name) for path in theirs]
    expected = [read_gguf_part(path) for path in theirs]
    assert [len(part.tensors) for part in ours] == [len(part.tensors) for part in expected]
    assert {name for part in ours for name in part.tensors} == {name for part in expected for name in part.tensors}
    for part, other in zip(ours, expected, strict=True):
        for key in ("split.no", "split.count", "split.tensors.count"):
            assert (part.types[key], part.metadata[key]) == (other.types[key], other.metadata[key])


@pytest.mark.parametrize("limit", [0, -1])
def test_a_split_into_files_without_tensors_is_refused(
    limit: int, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"--split-max-tensors.*1 or more"):
        plan_gguf(make_checkpoint("tiny"), tmp_path / "x.gguf", GgufOptions(split_max_tensors=limit))


@pytest.mark.parametrize(
    ("dense", "experts"),
    [("bf16", "bf16"), ("f32", "f32"), ("f16", "f16"), ("q8_0", "q8_0"), ("f32", "mxfp4")],
)
def test_llama_cpp_runs_other_types(make_checkpoint: MakeCheckpoint, tmp_path: Path, dense: str, experts: str) -> None:
    source = make_checkpoint("tiny", seed=0)
    tokens = [0, *range(5, 105)]
    execute(plan_gguf(source, tmp_path / "default.gguf", GgufOptions()), threads=2)
    execute(plan_gguf(source, tmp_path / "other.gguf", GgufOptions(dense=dense, experts=experts)), threads=2)
    default, other = logits(tmp_path / "default.gguf", tokens), logits(tmp_path / "other.gguf", tokens)
    cosines = (default * other).sum(1) / np.linalg.norm(default, axis=1) / np.linalg.norm(other, axis=1)
    # Q8_0 rounding of the weights and of llama.cpp's activations is all that may differ.
    assert np.median(cosines) > 0.999


def test_llama_cpp_loads_a_slice(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    execute(plan_gguf(make_checkpoint("tiny"), tmp_path / "slice.gguf", GgufOptions(layers=(1, 2))), threads=2)
    assert np.isfinite(logits(tmp_path / "slice.gguf", [0, *range(5, 55)])).all()
