"""Orbax and MaxText on checkpoints of ``maxtext``: what they restore, what each leaf has to be, and what it computes.

MaxText's functions come out of its wheel, which the variable DSV4CONVERT_MAXTEXT_WHEEL names; without it those tests
are skipped, and without Orbax (the extra ``maxtext``) all. Its model needs MaxText installed, which wants Python 3.12.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsv4convert
from dsv4convert.errors import FileFormatError
from dsv4convert.verification import orbax_read_back
from dsv4convert.verification.orbax_read_back import read_back

from ..checkpoints import MakeCheckpoint
from ..command_line import run_cli
from ..oracles.maxtext import MaxText
from ..oracles.plain_folders import Array, exact_values, read_folder
from ..oracles.zarr3 import read_leaves

orbax: Any = pytest.importorskip("orbax.checkpoint")

WHEEL = "DSV4CONVERT_MAXTEXT_WHEEL"
RATIOS = [0, 4, 128, 4, 128, 4]  # two pairs of layers that MaxText scans

# Both sides compute in float32, in another order; logits have a standard deviation of about 1.
TOLERANCE = 2e-5


def shape_in_the_model(key: str, config: dict[str, Any], pairs: int | None) -> tuple[int, ...] | None:
    """Return the shape that a leaf has in MaxText's model, None where it is that of the transposed tensor."""
    heads, size, groups = config["num_attention_heads"], config["head_dim"], config["o_groups"]
    width, inner, experts = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    shapes = {
        "token_embedder-embedding": (config["vocab_size"], width),
        "logits_dense-kernel": (width, config["vocab_size"]),
        "mhc_norm-scale": (config["hc_mult"] * width,),
        "wq_b-kernel": (config["q_lora_rank"], heads, size),
        "wkv-kernel": (width, 1, size),
        "o_a_proj-kernel": (groups, heads * size // groups, config["o_lora_rank"]),
        "MoeBlock_0-wi_0": (experts, width, inner),
        "MoeBlock_0-wi_1": (experts, width, inner),
        "MoeBlock_0-wo": (experts, inner, width),
    }
    found = next((shape for name, shape in shapes.items() if key.endswith(name)), None)
    if found is not None and pairs is not None:
        found = (found[0], pairs, *found[1:])
    return found


@pytest.mark.parametrize(
    ("variant", "scan", "dtype"),
    [
        (None, False, "bf16"),
        (None, True, "bf16"),
        (None, False, "f32"),
        (None, True, "f32"),
        ("base", True, "bf16"),
        ("vision", False, "bf16"),
    ],
)
def test_every_leaf_is_what_maxtexts_own_functions_make(
    variant: str | None, scan: bool, dtype: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    if not os.environ.get(WHEEL):
        pytest.skip(f"{WHEEL} names no wheel of MaxText")
    source = make_checkpoint("tiny", ratios=RATIOS, variant=variant)
    dsv4convert.convert_maxtext(source, tmp_path / "out", dtype=dtype, scan=scan)
    tensors = official_values(source)
    config = json.loads((source / "config.json").read_text())
    model = MaxText(Path(os.environ[WHEEL]), config, scan=scan)
    leaves = read_leaves(tmp_path / "out")
    assert leaves.keys() == {"params." + key.replace("-", ".") for key in model.sources}
    for key in model.sources:
        found = leaves["params." + key.replace("-", ".")]
        pairs = (len(RATIOS) - config["num_hash_layers"]) // 2 if "scanned_blocks" in key else None
        shape = shape_in_the_model(key, config, pairs)
        wanted = model.leaf(key, shape or transposed_shape(model.sources[key], tensors, found.shape), tensors)
        assert found.shape == wanted.shape, key
        assert np.array_equal(found.astype(np.float64), wanted.astype(np.float64)), key
        is_f32 = any(name in key for name in ("alpha", "beta", "-hc_", "sinks", "position_bias", "gate-bias"))
        kind = "int32" if "tid2eid" in key else "float32" if is_f32 or dtype == "f32" else "bfloat16"
        assert str(found.dtype) == kind, key


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["layers", "scanned"])
def test_maxtexts_model_computes_the_reference_logits(
    scan: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """By its own loader, with the files of parameters as they are; without YaRN, which MaxText 0.2.5 does not have."""
    names = ("configs.pyconfig", "common.checkpointing", "layers.quantizations", "models.models")
    pyconfig, checkpointing, quantizations, models = (pytest.importorskip(f"maxtext.{name}") for name in names)
    maxtext_utils, max_utils = (pytest.importorskip(f"maxtext.utils.{name}") for name in ("maxtext_utils", "max_utils"))
    import jax

    source, out = make_checkpoint("tiny", ratios=RATIOS, overrides={"rope_scaling": None}), tmp_path / "out"
    dsv4convert.convert_maxtext(source, out, scan=scan)
    tokens = np.random.default_rng(1).integers(0, 490, 300)
    settings = ["dtype=float32", "weight_dtype=float32", "matmul_precision=highest", "float32_gate_logits=true"]
    settings += ["attention=dot_product", "sparse_matmul=false", "megablox=false", "hardware=cpu"]
    settings += [f"max_target_length={len(tokens)}", f"max_prefill_predict_length={len(tokens)}"]
    settings += ["run_name=test", "per_device_batch_size=1", "enable_checkpointing=false"]
    settings += ["skip_jax_distributed_system=true", f"base_output_directory={tmp_path}"]
    config = pyconfig.initialize(["test", str(out / "maxtext.yml"), f"load_parameters_path={out}/0/items", *settings])
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    model = models.transformer_as_linen(config, mesh, quant=quantizations.configure_quantization(config))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        max_utils.unbox_logicallypartioned(maxtext_utils.get_abstract_param(model, config)),
    )
    assert len(jax.tree.leaves(wanted)) == len(read_leaves(out))
    weights = checkpointing.load_params_from_path(config.load_parameters_path, wanted, 8)
    inputs = (tokens[None].astype(np.int32), np.arange(len(tokens), dtype=np.int32)[None])
    with mesh:
        found = model.apply(
            weights,
            *inputs,
            decoder_segment_ids=np.ones_like(inputs[1]),
            enable_dropout=False,
            rngs={"params": jax.random.key(0)},
            mutable=["intermediates"],
        )[0]
    logits = dsv4convert.load_model(source).forward(tokens.tolist())
    assert logits.std() > 0.5
    assert np.abs(np.asarray(found)[0] - logits).max() < TOLERANCE


def official_values(source: Path) -> dict[str, Array]:
    """Return the tensors of a folder without scales."""
    raw = read_folder(source)
    values = {
        name: tensor.values
        if tensor.dtype == "I64"
        else exact_values(tensor, raw.get(name.removesuffix("weight") + "scale"))
        for name, tensor in raw.items()
        if not name.endswith(".scale") and not name.startswith(("mtp.", "vision.", "aligner."))
    }
    return {name: value.view(np.int64) if value.dtype == np.int64 else value for name, value in values.items()}


def transposed_shape(sources: Any, tensors: dict[str, Array], found: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a leaf whose hook transposes a matrix, or leaves a tensor as it is."""
    if not isinstance(sources, list):
        return tensors[sources].T.shape
    shape = tensors[sources[0]].T.shape
    return (shape[0], len(sources), *shape[1:]) if len(found) == len(shape) + 1 else found


@pytest.mark.parametrize("scan", [False, True], ids=["layers", "scanned"])
def test_orbax_restores_every_leaf(scan: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """By the interface of its releases so far, and by the one that MaxText uses, into the types of a model."""
    import jax

    dsv4convert.convert_maxtext(make_checkpoint("tiny", ratios=RATIOS), tmp_path / "out", scan=scan)
    leaves = read_leaves(tmp_path / "out")
    handler = orbax.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
    with orbax.Checkpointer(handler) as checkpointer:
        check_restored(checkpointer.restore(tmp_path / "out" / "0" / "items"), leaves, None)
    v1 = getattr(orbax, "v1", None)
    if v1 is None:
        pytest.skip("an Orbax without the interface that MaxText uses")
    metadata = v1.metadata(tmp_path / "out" / "0", checkpointable_name="items").metadata
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=device), metadata)
    restored = v1.load(tmp_path / "out" / "0", wanted, checkpointable_name="items")
    check_restored(restored, leaves, np.dtype(np.float32))


def check_restored(restored: Any, leaves: dict[str, Array], dtype: np.dtype[Any] | None) -> None:
    found = dict(orbax_read_back._flat(restored))
    assert found.keys() == leaves.keys()
    for name, leaf in leaves.items():
        value = np.asarray(found[name])
        assert value.dtype == (dtype or leaf.dtype), name
        assert np.array_equal(value, leaf.astype(value.dtype)), name


def test_the_command_reads_back(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    done = run_cli("maxtext", make_checkpoint("tiny"), tmp_path / "out", "--check", "--json")
    (note,) = (note for note in json.loads(done.out)["notes"] if "Orbax" in note)
    leaves = len(list((tmp_path / "out" / "0" / "items").glob("*/zarr.json")))
    assert note == f"read back with Orbax {orbax.__version__}: {leaves} leaves, each as its file has it"


@pytest.mark.parametrize("limit", [0, 10**9], ids=["chunk by chunk", "whole"])
def test_what_orbax_reads_otherwise_is_found(
    limit: int, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orbax_read_back, "RESTORE_BYTES", limit)
    dsv4convert.convert_maxtext(make_checkpoint("tiny"), tmp_path / "out")
    assert "leaves, each as its file has it" in read_back(tmp_path / "out")
    leaf = tmp_path / "out" / "0" / "items" / "params.params.decoder.layers_1.mlp.MoeBlock_0.wi_0"
    data = bytearray((leaf / "0.0.0").read_bytes())
    data[:32] = data[16:32] + data[:16]  # two experts change places in the index
    (leaf / "0.0.0").write_bytes(data)
    with pytest.raises(FileFormatError, match=r"MoeBlock_0.wi_0: Orbax reads something else"):
        read_back(tmp_path / "out")
