"""Weight sources on files: the same checkpoint in every layout computes the same."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dsv4convert.checkpoint import open_folder
from dsv4convert.engine.conversion import execute
from dsv4convert.errors import FileFormatError, InputMissingError, InventoryError, UnsupportedError
from dsv4convert.formats.ggml_types import BY_NAME
from dsv4convert.reference import DictSource, Model, WeightSource
from dsv4convert.reference.weights.open import HfSource, open_source
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.targets.shard_tensors import ShardOptions
from dsv4convert.targets.shards import plan_shards

from ...checkpoints import MakeCheckpoint
from ...command_line import run_cli
from ...low_bit import SMALL, WHOLE
from ...oracles.gguf_bytes import RawGguf

Array = npt.NDArray[Any]

# What Q8_0 costs on the tiny checkpoint, as the relative RMSE of the median position: measured 0.009.
Q8_0_COST = 0.02


def tokens(length: int = 150) -> Array:
    return np.random.default_rng(1).integers(0, 512, length)


def to_gguf(source: Path, out: Path, **options: Any) -> WeightSource:
    execute(plan_gguf(source, out, GgufOptions(**options)), threads=2)
    return open_source(out)


def relative(ours: Array, theirs: Array) -> Array:
    return np.sqrt(np.mean((ours - theirs) ** 2, axis=1) / np.mean(theirs**2, axis=1))


@pytest.fixture(scope="module")
def expected(tiny: Path) -> Array:
    return Model(open_source(tiny)).forward(tokens())


def test_a_folder_decodes_to_the_weights_in_memory(tiny: Path) -> None:
    source = open_source(tiny)
    assert isinstance(source, HfSource)
    names = open_folder(tiny).weights
    memory = DictSource(source.config, {name: source.tensor(name) for name in names})
    assert np.array_equal(Model(source).forward(tokens(40)), Model(memory).forward(tokens(40)))
    for name, weight in names.items():
        assert source.tensor(name).shape == weight.shape
        if len(weight.shape) == 2:
            rows = np.array([weight.shape[0] - 1, 0])
            assert np.array_equal(source.rows(name, rows), memory.rows(name, rows)), name


@pytest.mark.parametrize(("dense", "experts"), [("f32", "mxfp4"), ("f32", "bf16"), ("f32", "f32"), ("bf16", "f16")])
def test_a_gguf_with_exact_types_computes_the_same_bits(
    tiny: Path, expected: Array, tmp_path: Path, dense: str, experts: str
) -> None:
    source = to_gguf(tiny, tmp_path / "exact.gguf", dense=dense, experts=experts)
    assert np.array_equal(Model(source).forward(tokens()), expected)


def test_the_default_gguf_differs_by_what_q8_0_costs(tiny: Path, expected: Array, tmp_path: Path) -> None:
    error = relative(Model(to_gguf(tiny, tmp_path / "default.gguf")).forward(tokens()), expected)
    assert 0.001 < np.median(error) < Q8_0_COST


def test_the_other_dialect_computes_the_same_bits_mtp_included(tiny: Path, expected: Array, tmp_path: Path) -> None:
    port = to_gguf(tiny, tmp_path / "port.gguf", dialect="deepseek-v4")
    assert np.array_equal(Model(port).forward(tokens()), expected)
    assert np.array_equal(mtp_logits(port, open_source(tiny)), mtp_logits(open_source(tiny), open_source(tiny)))


def test_a_split_gguf_computes_the_same_bits(tiny: Path, expected: Array, tmp_path: Path) -> None:
    plan = plan_gguf(tiny, tmp_path / "s.gguf", GgufOptions(dense="f32", split_max_bytes=2_000_000))
    execute(plan, threads=2)
    assert len(plan.files) > 2
    for path in (tmp_path, tmp_path / plan.files[1].name):
        assert np.array_equal(Model(open_source(path)).forward(tokens()), expected)


def mtp_logits(source: WeightSource, trunk: WeightSource) -> Array:
    model = Model(trunk)
    state = model.new_state()
    model.prefill(tokens(30), state)
    assert state.streams is not None
    return Model(source).mtp(state.streams[:-1], tokens(30)[1:])


def test_the_mtp_file_holds_the_mtp_and_no_trunk(tiny: Path, tmp_path: Path) -> None:
    mtp = to_gguf(tiny, tmp_path / "mtp.gguf", draft="only", dense="f32")
    trunk = open_source(tiny)
    assert np.array_equal(mtp_logits(mtp, trunk), mtp_logits(trunk, trunk))
    with pytest.raises(InventoryError, match=r"mtp.gguf: no weight layers\.0\.hc_attn_base"):
        Model(mtp).forward([1, 2])


def test_a_slice_computes_what_the_layers_compute(tiny: Path, tmp_path: Path) -> None:
    source = to_gguf(tiny, tmp_path / "slice.gguf", layers=(0, 1), dense="f32")
    first_two = Model(open_source(tiny), layers=2).forward(tokens(40))
    assert np.array_equal(Model(source).forward(tokens(40)), first_two)


def test_the_config_survives_the_gguf(tiny: Path, tmp_path: Path) -> None:
    ours, theirs = to_gguf(tiny, tmp_path / "a.gguf").config, open_source(tiny).config
    for key in ("compress_ratios", "num_hash_layers", "yarn", "routed_scaling_factor", "swiglu_limit", "vocab_size"):
        assert getattr(ours, key) == getattr(theirs, key)
    assert np.float32(ours.rms_norm_eps) == np.float32(theirs.rms_norm_eps)


def to_shards(source: Path, out: Path, mp: int, **options: Any) -> WeightSource:
    execute(plan_shards(source, out, ShardOptions(mp=mp, **options)).plan, threads=2)
    return open_source(out)


@pytest.mark.parametrize(("mp", "expert_dtype"), [(1, "fp4"), (2, "fp4"), (2, "fp8"), (8, "fp4")], ids=str)
def test_shards_compute_the_same_bits(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, mp: int, expert_dtype: str
) -> None:
    tiny = make_checkpoint("tiny", overrides={"o_groups": 8})
    whole = open_source(tiny)
    shards = to_shards(tiny, tmp_path / "shards", mp, experts=expert_dtype)
    assert np.array_equal(Model(shards).forward(tokens()), Model(whole).forward(tokens()))
    assert np.array_equal(mtp_logits(shards, whole), mtp_logits(whole, whole))
    with pytest.raises(InventoryError, match=r"shards: no weight layers\.9\.attn_norm\.weight"):
        shards.tensor("layers.9.attn_norm.weight")


def test_rows_of_shards_come_from_their_rank(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    tiny = make_checkpoint("tiny", overrides={"o_groups": 8})
    whole, shards = open_source(tiny), to_shards(tiny, tmp_path / "shards", 4)
    rows = np.array([511, 3, 128, 127, 129, 3, 300])
    for name in ("embed.weight", "head.weight", "layers.0.ffn.gate.tid2eid"):
        assert np.array_equal(shards.rows(name, rows), whole.rows(name, rows)), name
    rows = np.array([159, 0, 7])
    name = "layers.2.attn.wo_b.weight"  # divided along its columns
    assert np.array_equal(shards.rows(name, rows), whole.rows(name, rows))


@pytest.mark.parametrize("variant", ["base", "dspark", "vision"])
def test_the_trunk_of_every_variant_runs(make_checkpoint: MakeCheckpoint, variant: str) -> None:
    logits = Model(open_source(make_checkpoint("tiny", variant=variant))).forward(tokens(40))
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1


def test_memory_does_not_grow_with_the_number_of_experts(make_checkpoint: MakeCheckpoint) -> None:
    peaks = []
    for experts in (8, 64):
        source = open_source(make_checkpoint("tiny", experts=experts))
        tracemalloc.start()
        Model(source).forward(tokens(4))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_a_missing_file_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="nowhere: no such file or folder"):
        open_source(tmp_path / "nowhere")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="expected deepseek4, deepseek-v4 or deepseek41, got 'llama'"):
        open_source(tmp_path / "llama.gguf")


def test_a_gguf_without_a_key_is_refused_by_the_key(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "bare.gguf", "deepseek4")
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FileFormatError, match=r"key deepseek4\.context_length is missing"):
        open_source(tmp_path / "bare.gguf")


@pytest.mark.parametrize("kind", ["q8_1", "q8_k", "i8", "i16", "f64"])
def test_types_that_no_weights_have_are_one_line_in_every_command(
    kind: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint("tiny", overrides=WHOLE, **SMALL)
    path = tmp_path / "model.gguf"
    execute(plan_gguf(source, path, GgufOptions()), threads=2)
    raw = RawGguf.read(path)
    name, ggml = "blk.0.attn_kv.weight", BY_NAME[kind]
    info = raw.info(name)
    info.kind = ggml.number
    info.data = bytes(math.prod(info.dims[1:]) * ggml.row_bytes(info.dims[0]))
    raw.write(path)
    shown = json.loads(run_cli("inspect", path, "--json").out)
    assert kind in {use["encoding"] for use in shown["encodings"]}
    for command in (["forward", path, "--tokens", "1,2"], ["compare", source, path, "--tokens", "1,2"]):
        done = run_cli(*command)
        assert (done.code, done.err.count("\n")) == (5, 1), done.err
        assert f"tensor {name}: {kind} is not decoded" in done.err
    done = run_cli("verify", source, path)
    assert done.code == 12
    assert any(name in line and kind in line for line in done.out.splitlines()), done.out
