"""Activation statistics: equal to those of whole forward passes and of transformers, in bounded memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader
from jsonschema import validate

from dsv4convert.api import convert_gguf, imatrix
from dsv4convert.checkpoint.tokenizer import load_tokenizer
from dsv4convert.containers.imatrix import Imatrix, read_imatrix
from dsv4convert.containers.json_object import schema_path
from dsv4convert.errors import DeviceError, Dsv4Error, FileFormatError, UsageError
from dsv4convert.model.tensors import LAYER_ROWS, Draft, Row, expected_tensors
from dsv4convert.reference import CachedSource, DictSource, Model, WeightSource, devices, importance
from dsv4convert.reference.arithmetic import product
from dsv4convert.reference.importance import (
    ImatrixOptions,
    Passage,
    PlannedEntry,
    SquareSums,
    planned_entries,
    text_chunks,
)
from dsv4convert.reference.model import Flow
from dsv4convert.reference.passing_files import RowFile
from dsv4convert.reference.weights.open import open_source

from ..checkpoints import MakeCheckpoint
from ..command_line import run_cli
from ..v41 import TINY
from .random_model import random_source, random_tensors, random_tokens, save_for_transformers

Array = npt.NDArray[Any]
Statistics = dict[str, tuple[Array, Array]]

# Sums over hundreds of tokens of squares of float32 values that two orders of summation leave 1e-6 apart.
TOLERANCE = 1e-5

SIZE = 150


def chunks_of(source: WeightSource, count: int, size: int = SIZE) -> Array:
    return random_tokens(source.config, count * size, 3).reshape(count, size)


def in_one_pass(source: WeightSource, chunks: Array, folder: Path) -> Statistics:
    """Return the statistics of all chunks, layer by layer, and of the output matrix, as the command collects them."""
    sums, cached = SquareSums(), CachedSource(source, sys.maxsize)
    passage = Passage(Model(cached, observe=sums), cached, chunks, folder)
    passage.begin()
    found: Statistics = {}
    for layer in [*range(source.config.num_hidden_layers), None]:
        if layer is None:
            passage.head()
        else:
            passage.layer(layer)
        found |= {e.name: sums.of(e) for e in entries(source) if e.layer == layer}
        sums.forget()
    passage.close()
    return found


def entries(source: WeightSource) -> list[PlannedEntry]:
    return planned_entries(source.config, source.config.num_hidden_layers, process_output=True)


def in_whole_passes(source: WeightSource, chunks: Array) -> Statistics:
    """Return the statistics of one ordinary forward pass after another."""
    sums = SquareSums()
    model = Model(source, observe=sums)
    for tokens in chunks:
        state = model.new_state()
        model.forward(tokens, state)
        assert state.streams is not None
        assert state.pre is not None
        sums("head.weight", model.head_input(Flow(tokens, tokens < 0, state.streams, state.pre)))
    return {entry.name: sums.of(entry) for entry in entries(source)}


def check_equal(ours: Statistics, theirs: Statistics, tolerance: float = TOLERANCE) -> None:
    assert ours.keys() == theirs.keys()
    for name, (sums, counts) in theirs.items():
        assert np.array_equal(ours[name][1], counts), name
        assert np.abs(ours[name][0] - sums).max() <= tolerance * sums.max(), name


def source_of(name: str) -> WeightSource:
    return random_source(int(name), 36) if name.isdigit() else open_source(TINY[name])


@pytest.mark.parametrize("name", ["0", "1", "2", "tiny-a", "tiny-b"])
def test_one_pass_layer_by_layer_equals_whole_passes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "EXPERT_TOKENS", 50)  # so that an expert takes its tokens in several parts
    source = source_of(name)
    size = min(SIZE, source.config.max_position_embeddings)
    chunks = chunks_of(source, 3, size)
    ours = in_one_pass(source, chunks, tmp_path)
    check_equal(ours, in_whole_passes(source, chunks))
    # Experts meet the tokens that are routed to them, and V4.1's index keys are made of compressed entries.
    others = ("_exps.", "attn_output_a", "indexer.attn_k")
    dense = [counts for name, (_, counts) in ours.items() if not any(part in name for part in others)]
    assert all(counts == [3 * size] for counts in dense)


def test_every_weight_is_read_once_however_many_chunks_there_are(tmp_path: Path) -> None:
    read: Counter[str] = Counter()

    class Counting(DictSource):
        def tensor(self, name: str) -> Array:
            read[name] += 1
            return super().tensor(name)

        def rows(self, name: str, indices: Array) -> Array:
            return super().tensor(name)[indices]

    config = random_source(0, 36).config
    source = Counting(config, random_tensors(config, 36))
    in_one_pass(source, chunks_of(source, 6, 40), tmp_path)
    layers = {name: count for name, count in read.items() if name.startswith("layers.")}
    assert len(layers) > 100
    assert set(layers.values()) == {1}


def test_sums_are_those_of_float64_by_hand() -> None:
    generator = np.random.default_rng(0)
    parts = [generator.standard_normal(shape).astype(np.float32) for shape in ((5, 8), (7, 3, 8))]
    sums = SquareSums()
    for part in parts:
        sums("w", part)
    rows = np.concatenate([part.reshape(-1, 8) for part in parts]).astype(np.float64)
    found, counts = sums.of(PlannedEntry("blk.0.w", 0, ["w", "never multiplied"], 8))
    assert np.allclose(found[0], (rows**2).sum(axis=0), rtol=1e-6)
    assert not found[1].any()
    assert counts.tolist() == [26, 0]


def test_rows_in_a_file_are_added_to_and_zero_where_never_written(tmp_path: Path) -> None:
    file = RowFile(tmp_path, 3)
    rows = np.array([4, 1, 2])
    file.add(rows, np.arange(9, dtype=np.float32).reshape(3, 3))
    file.add(np.array([2]), np.ones((1, 3), np.float32))
    assert file.read(np.array([0, 1, 2, 9])).tolist() == [[0, 0, 0], [3, 4, 5], [7, 8, 9], [0, 0, 0]]
    file.clear()
    assert not file.read(rows).any()
    assert list(tmp_path.iterdir()) == []
    file.close()


# ---- transformers -------------------------------------------------------------------------------------


def modules_of(row: Row) -> tuple[str, str]:
    """Return the submodule that multiplies by a tensor, and what it is: a linear, or the norm of a hyper-connection."""
    assert row.transformers is not None
    module, _, kind = row.transformers.rpartition(".")
    return (module, "linear") if kind == "weight" else (f"{module}.input_norm", "norm")


@pytest.mark.oracle
def test_statistics_are_those_of_transformers(tmp_path: Path) -> None:
    """Hooks on every module that multiplies; what meets the experts is computed by hand from their router's choice."""
    import torch
    from transformers import DeepseekV4ForCausalLM

    source = random_source(0, 36)
    config = source.config
    chunks = random_tokens(config, 300, 36).reshape(2, 150)
    save_for_transformers(source, random_tensors(config, 36), tmp_path)
    oracle = DeepseekV4ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    theirs: Statistics = {}

    def add(name: str, matrices: int, x: Array, matrix: int = 0) -> None:
        sums, counts = theirs.setdefault(name, (np.zeros((matrices, x.shape[-1])), np.zeros(matrices)))
        rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
        sums[matrix] += (rows**2).sum(axis=0)
        counts[matrix] += len(rows)

    def on_experts(layer: int, experts: Any, x: Array, chosen: Array) -> None:
        width = config.moe_intermediate_size
        gate_up, at = experts.gate_up_proj.detach().numpy().astype(np.float64), f"blk.{layer}.ffn_"
        for expert in range(config.n_routed_experts):
            rows = x[(chosen == expert).any(axis=1)].astype(np.float64)
            both = rows @ gate_up[expert].T
            gate = np.minimum(both[:, :width], config.swiglu_limit)
            up = np.clip(both[:, width:], -config.swiglu_limit, config.swiglu_limit)
            for part, values in (("gate", rows), ("up", rows), ("down", gate / (1 + np.exp(-gate)) * up)):
                add(f"{at}{part}_exps.weight", config.n_routed_experts, values, expert)

    for expected in expected_tensors(config, Draft.NONE, 0):
        if expected.layer is None or expected.expert is not None or len(expected.shape) < 2:
            continue
        if not expected.name.endswith((".weight", "_fn")):
            continue
        module, kind = modules_of(next(row for row in LAYER_ROWS if row == expected.row))
        layer = oracle.model.layers[expected.layer]
        name = f"blk.{expected.layer}.{expected.row.gguf}"
        if kind == "linear":
            layer.get_submodule(module).register_forward_pre_hook(
                lambda _m, inputs, name=name: add(name, 1, inputs[0].detach().numpy())
            )
        else:
            layer.get_submodule(module).register_forward_hook(
                lambda _m, _i, out, name=name: add(name, 1, out.detach().numpy().reshape(len(chunks[0]), -1))
            )
    for number, layer in enumerate(oracle.model.layers):
        layer.mlp.experts.register_forward_pre_hook(
            lambda module, inputs, number=number: on_experts(
                number, module, inputs[0].detach().numpy(), inputs[1].numpy()
            )
        )
    with torch.no_grad():
        for tokens in chunks:
            oracle(torch.tensor(tokens)[None], use_cache=False)
    ours = in_one_pass(source, chunks, tmp_path)
    del ours["output.weight"]
    check_equal(ours, theirs)


# ---- the command --------------------------------------------------------------------------------------

WORDS = "the forward pass of a model has streams that layers mix, and experts that few tokens meet. "


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(WORDS * 20)
    return path


def statistics(read: Imatrix) -> Statistics:
    found = {}
    for name, entry in read.entries.items():
        sums = np.fromfile(entry.file, "<f4", entry.values, offset=entry.offset)
        found[name] = sums.reshape(len(entry.counts), entry.columns), np.array(entry.counts)
    return found


def test_the_command_writes_what_readers_of_the_format_expect(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "imatrix.gguf"
    done = run_cli("imatrix", tiny, "--text", text, "-o", out, "--context-size", 64, "--chunks", 3, "--json")
    summary = json.loads(done.out)
    validate(summary, json.loads(schema_path("imatrix.schema.json").read_text()))
    assert (summary["chunks"], summary["context_size"], summary["layers"]) == (3, 64, 4)
    assert summary["bytes"] == out.stat().st_size
    assert os.listdir(tmp_path) == ["imatrix.gguf"]
    reader = GGUFReader(out)
    keys = ("general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
    assert [reader.get_field(key).contents() for key in keys] == ["imatrix", [str(text)], 3, 64]
    names = [tensor.name.rpartition(".")[0] for tensor in reader.tensors]
    assert names == sorted(names)
    found = statistics(read_imatrix(out))
    assert summary["entries"] == len(found)
    ids = load_tokenizer(tiny, 512).encode(text.read_text())
    assert summary["left_over_tokens"] == len(ids) - 3 * 64
    expected = in_whole_passes(open_source(tiny), np.array(ids[: 3 * 64]).reshape(3, 64))
    del expected["output.weight"]
    check_equal(found, expected)
    unmet = {(row["layer"], expert) for row in summary["experts_without_tokens"] for expert in row["experts"]}
    counts = {n: found[f"blk.{n}.ffn_up_exps.weight"][1] for n in range(4)}
    assert unmet == {(n, expert) for n in counts for expert in np.flatnonzero(counts[n] == 0)}
    per_token = open_source(tiny).config.num_experts_per_tok
    assert all(counts[n].sum() == 3 * 64 * per_token for n in counts)


def test_every_chunk_begins_as_the_tokenizer_wants_sequences_to(tiny: Path, text: Path, tmp_path: Path) -> None:
    """llama.cpp's tool has the begin-of-sentence token in place of every chunk's first."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    ids = load_tokenizer(tiny, 512).encode(text.read_text())
    config = open_source(model).config
    chunks, left_over = text_chunks(model, text, config, ImatrixOptions(context_size=50))
    whole = [0, *ids][: chunks.size]
    assert left_over == 1 + len(ids) - len(whole)
    assert chunks[:, 0].tolist() == [0] * len(chunks)
    assert chunks[:, 1:].tolist() == np.array(whole).reshape(-1, 50)[:, 1:].tolist()


def test_a_gguf_and_a_folder_have_the_same_statistics(tiny: Path, text: Path, tmp_path: Path) -> None:
    convert_gguf(tiny, tmp_path / "tiny.gguf", dense="f32", threads=2)
    of_folder = imatrix(tiny, tmp_path / "a", text=text, context_size=40, chunks=2, process_output=True)
    of_file = imatrix(
        tmp_path / "tiny.gguf",
        tmp_path / "b",
        text=text,
        context_size=40,
        chunks=2,
        process_output=True,
        tokenizer=tiny,
    )
    assert of_folder.entries == of_file.entries
    a, b = (statistics(read_imatrix(tmp_path / name)) for name in "ab")
    assert "output.weight" in a
    check_equal(a, b, 0)


def test_the_first_layers_alone_are_possible(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "imatrix.gguf"
    done = run_cli("imatrix", tiny, "--text", text, "-o", out, "--context-size", 32, "--layers", "0-1")
    assert done.code == 0, done.err
    assert "2 layers on" in done.out
    assert {name.split(".")[1] for name in read_imatrix(out).entries} == {"0", "1"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--context-size", 5000], "the text is shorter than a chunk"),
        (["--layers", "1-2"], "--layers must start at layer 0"),
        (["--layers", "0-9"], "number of layers: expected 1 to 4"),
        (["--device", "cuda"], "--device cuda"),
        (["--tokenizer", "nowhere"], "tokenizer.json is missing"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(
    options: list[object], says: str, tiny: Path, text: Path, tmp_path: Path
) -> None:
    done = run_cli("imatrix", tiny, "--text", text, "-o", tmp_path / "out", *options)
    assert says in done.error
    assert list(tmp_path.iterdir()) == []


def test_a_chunk_longer_than_the_models_context_is_refused(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    model = make_checkpoint("tiny", overrides={"max_position_embeddings": 16})
    (tmp_path / "text").write_text(WORDS)
    done = run_cli("imatrix", model, "--text", tmp_path / "text", "-o", tmp_path / "out", "--context-size", 17)
    assert "more tokens than the model's context: expected at most 16" in done.error
    assert os.listdir(tmp_path) == ["text"]


def test_a_gguf_needs_the_folder_of_a_tokenizer(tiny: Path, text: Path, tmp_path: Path) -> None:
    convert_gguf(tiny, tmp_path / "tiny.gguf", threads=2)
    done = run_cli("imatrix", tmp_path / "tiny.gguf", "--text", text, "-o", tmp_path / "out")
    assert "tokenizer.json is missing; pass the folder of a tokenizer.json with --tokenizer" in done.error


def test_texts_that_are_none_are_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in run_cli("imatrix", tiny, "--text", tmp_path / "text", "-o", tmp_path / "out").error
    assert "no such file" in run_cli("imatrix", tiny, "--text", tmp_path / "no", "-o", tmp_path / "out").error
    assert os.listdir(tmp_path) == ["text"]


def test_an_output_without_a_name_is_refused(tiny: Path, text: Path) -> None:
    assert "--out: not a file name" in run_cli("imatrix", tiny, "--text", text, "-o", "").error


def test_older_files_stay_unless_they_are_to_be_replaced(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("precious")
    command = ["imatrix", tiny, "--text", text, "-o", out, "--context-size", 32, "--chunks", 1]
    assert "already exists" in run_cli(*command).error
    assert out.read_text() == "precious"
    assert run_cli(*command, "--overwrite", "--quiet").out == ""
    assert len(read_imatrix(out).entries) > 60
    copy = tmp_path / "text"
    copy.write_text(WORDS * 9)
    command = ["imatrix", tiny, "--text", copy, "-o", copy, "--context-size", 32, "--overwrite"]
    assert "the output would replace a file of the source" in run_cli(*command).error
    assert copy.read_text() == WORDS * 9


@pytest.mark.parametrize("error", [KeyboardInterrupt, FileFormatError("a weight is NaN")], ids=["Ctrl-C", "an error"])
def test_a_run_that_ends_early_leaves_nothing(
    error: Any, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Passage.layer

    def ends(self: Passage, n: int) -> tuple[int, ...]:
        if n == 2:
            raise error
        return layer(self, n)

    monkeypatch.setattr(Passage, "layer", ends)
    command = ["imatrix", tiny, "--text", text, "-o", tmp_path / "out", "--context-size", 32, "--quiet"]
    assert run_cli(*command).code == (130 if error is KeyboardInterrupt else 6)
    assert list(tmp_path.iterdir()) == []


def test_activations_that_are_not_finite_are_refused() -> None:
    with pytest.raises(FileFormatError, match=r"weight layers\.0\.attn\.wq_a\.weight: .* not finite"):
        SquareSums()("layers.0.attn.wq_a.weight", np.array([[1, np.nan]], np.float32))


def test_too_little_disk_is_told_before_anything_is_computed(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "free_bytes", lambda _: 1000)
    done = run_cli("imatrix", tiny, "--text", text, "-o", tmp_path / "out", "--context-size", 32)
    assert "not enough disk space for the hidden states of all chunks" in done.error
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_an_error_in_one_line(tiny: Path, text: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; it lets the output be made and the hidden states not."""
    program = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from dsv4convert.cli import main; main()"
    )
    command = ["imatrix", str(tiny), "--text", str(text), "-o", str(tmp_path / "out"), "--context-size", "64"]
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 10, done.stderr
    assert "cannot be written to (File too large)" in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- memory and devices -------------------------------------------------------------------------------


def test_memory_holds_neither_the_chunks_nor_the_experts(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of 57 MB of experts in float32, and chunks whose hidden states take 25 MB."""
    monkeypatch.setattr(importance, "EXPERT_TOKENS", 32)
    model = make_checkpoint(
        "tiny", ratios=[4], experts=24, mtp=False, overrides={"hidden_size": 512, "moe_intermediate_size": 384}
    )
    source = CachedSource(open_source(model), sys.maxsize)
    peaks = []
    for count in (2, 24):
        sums = SquareSums()
        passage = Passage(Model(source, observe=sums), source, chunks_of(source, count, 128), tmp_path)
        tracemalloc.start()
        passage.begin()
        passage.layer(0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        passage.close()
    assert 24 * 128 * 4 * 512 * 4 > 25e6
    assert peaks[0] < 20e6
    assert peaks[1] < peaks[0] + 24 * 128 * 200  # some bytes a token


def test_products_in_torch_are_float32_products() -> None:
    generator = np.random.default_rng(0)
    x, w = (generator.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 64), (40, 64)))
    ours, theirs = devices.torch_product("cpu")(x, w), product(x, w)
    assert ours.shape == theirs.shape == (2, 3, 40)
    assert np.abs(ours - theirs).max() < 1e-5


def test_a_device_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.chosen_device("auto") == devices.chosen_device("cpu") == "cpu"
    with pytest.raises(DeviceError, match="torch finds no GPU"):
        devices.chosen_device("cuda")
    monkeypatch.setattr(devices, "DRIVER_FILES", (__file__,))
    assert devices.chosen_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.chosen_device("auto") == devices.chosen_device("cuda") == "cuda"
    monkeypatch.setattr(devices, "find_spec", lambda _: None)
    assert devices.chosen_device("auto") == "cpu"
    with pytest.raises(
        DeviceError, match=r"needs the package torch, which is missing; run pip install 'dsv4convert\[gpu\]', or use"
    ):
        devices.chosen_device("cuda")
    with pytest.raises(UsageError, match="--device: unknown"):
        devices.chosen_device("tpu")
    assert issubclass(DeviceError, Dsv4Error)
