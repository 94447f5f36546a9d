"""Which GGUF files each variant gives, what they are called, and what is left out of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dsv4convert.cli import app
from dsv4convert.errors import ConfigError, UnsupportedError, UsageError
from dsv4convert.plan import Plan
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.verification import verify

from ...checkpoints import MakeCheckpoint
from .conversions import gguf_keys, gguf_tensors, to_gguf


def plan(source: Path, out: Path, **options: Any) -> Plan:
    return plan_gguf(source, out, GgufOptions(**options))


def dropped(made: Plan) -> dict[str, tuple[str, int]]:
    return {entry.what: (entry.reason, entry.count) for entry in made.dropped}


@pytest.mark.parametrize(
    ("variant", "options", "names"),
    [
        (None, {}, ["m.gguf"]),
        (None, {"draft": "split"}, ["m.gguf", "mtp-m.gguf"]),
        ("base", {"draft": "split"}, ["m.gguf", "mtp-m.gguf"]),
        ("dspark", {"draft": "split"}, ["m.gguf", "dspark-m.gguf"]),
        ("dspark", {"draft": "only"}, ["m.gguf"]),
        ("vision", {"draft": "split", "mmproj": "split"}, ["m.gguf", "dspark-m.gguf", "mmproj-m.gguf"]),
        ("vision", {"draft": "split", "mmproj": "only"}, ["dspark-m.gguf", "mmproj-m.gguf"]),
        ("vision", {"draft": "only", "mmproj": "only"}, ["dspark-m.gguf", "mmproj-m.gguf"]),
        ("vision", {"mmproj": "only"}, ["m.gguf"]),
    ],
)
def test_files_and_their_names(
    variant: str | None, options: dict[str, str], names: list[str], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    made = plan(make_checkpoint("tiny", variant=variant), tmp_path / "m.gguf", **options)
    assert [file.name for file in made.files] == names


def test_names_in_a_folder_follow_the_convention(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = shutil.copytree(make_checkpoint("tiny", variant="vision"), tmp_path / "DeepSeek-V4-Flash-Vision-Exp")
    (tmp_path / "out").mkdir()
    made = plan(source, tmp_path / "out", draft="split", mmproj="split")
    assert [file.name for file in made.files] == [
        "DeepSeek-V4-Flash-8x2.6M-Vision-Exp-MXFP4_MOE.gguf",
        "dspark-DeepSeek-V4-Flash-Vision-Exp-MXFP4_MOE.gguf",
        "mmproj-DeepSeek-V4-Flash-Vision-Exp-BF16.gguf",
    ]


def test_what_is_left_out_by_default_is_said_with_its_reason(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    left_out = dropped(plan(make_checkpoint("tiny", variant="vision"), tmp_path / "m.gguf"))
    assert left_out == {
        "ffn.gate.bias": ("unused: hash layers route text by tid2eid and images by bias_vl", 2),
        "mtp.* (3 draft layers)": ("--draft drop (the default); --draft split writes a file of its own", 244),
        "the vision tower": ("--mmproj drop (the default); --mmproj split writes a file of its own", 35),
    }


def test_nothing_but_routers_biases_is_left_out_of_three_files(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny", variant="vision")
    assert dropped(plan(source, tmp_path / "m.gguf", draft="split", mmproj="split")) == {
        "ffn.gate.bias": ("unused: hash layers route text by tid2eid and images by bias_vl", 2),
        "ffn.gate.bias_vl": ("the draft routes text only", 3),
    }


def test_routers_biases_for_images_are_in_the_text_model(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    to_gguf(make_checkpoint("tiny", variant="vision"), tmp_path / "m.gguf")
    found = gguf_tensors(tmp_path / "m.gguf")
    assert [f"blk.{n}.exp_probs_b_vl.bias" in found for n in range(4)] == [True] * 4
    assert [f"blk.{n}.exp_probs_b.bias" in found for n in range(4)] == [False, False, True, True]
    assert not [name for name in found if name.startswith(("v.", "mm."))]


def test_markov_head_is_neither_embedding_nor_head(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    to_gguf(make_checkpoint("tiny", variant="dspark"), tmp_path / "m.gguf", draft="only")
    found = gguf_tensors(tmp_path / "m.gguf")
    assert found["markov_w1.weight"][:2] == ("BF16", [32, 512])
    assert found["conf_proj.weight"][:2] == ("BF16", [192, 1])
    assert not found.keys() & {"token_embd.weight", "output.weight"}


def test_the_draft_names_its_target_layers_and_noise_token(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    to_gguf(make_checkpoint("tiny", variant="dspark"), tmp_path / "m.gguf", draft="only")
    keys = gguf_keys(tmp_path / "m.gguf")
    assert keys["general.architecture"] == "dflash"
    assert keys["dflash.target_layers"] == [2, 3, 4]  # outputs of layers 1 to 3
    assert keys["dflash.block_size"] == 5
    assert keys["dflash.block_count"] == 3
    assert keys["tokenizer.ggml.mask_token_id"] == 511


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("dspark", {"draft": "split"}),
        ("vision", {"draft": "split", "mmproj": "split"}),
        ("vision", {"draft": "split", "mmproj": "split", "dense": "f32", "experts": "q8_0"}),
        ("base", {"draft": "split"}),
    ],
)
def test_every_file_verifies(
    variant: str, options: dict[str, str], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint("tiny", variant=variant)
    summary = to_gguf(source, tmp_path / "m.gguf", **options)
    assert len(summary.files) == len([value for value in options.values() if value == "split"]) + 1
    for path, _ in summary.files:
        report = verify(source, Path(path), ignore_keys=["general.name"])
        assert report.problems == [], path


def test_damage_to_a_draft_or_a_tower_is_found(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny", variant="vision")
    to_gguf(source, tmp_path / "m.gguf", draft="split", mmproj="split")
    for name in ("dspark-m.gguf", "mmproj-m.gguf"):
        path = tmp_path / name
        data = bytearray(path.read_bytes())
        data[-200] ^= 0x40
        path.write_bytes(data)
        assert not verify(source, path, ignore_keys=["general.name"]).ok, name


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        (None, {"mmproj": "split"}, "--mmproj split: the checkpoint has no vision tower"),
        ("dspark", {"mmproj": "only"}, "--mmproj only: the checkpoint has no vision tower"),
        ("dspark", {"draft": "keep"}, "--draft keep is not supported by dialect llama.cpp"),
        ("dspark", {"draft": "split", "layers": (0, 1)}, "--draft split cannot be combined with --layers"),
        (
            "vision",
            {"mmproj": "split", "dialect": "deepseek-v4"},
            "--mmproj split is not supported by dialect deepseek-v4",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(
    variant: str | None, options: dict[str, Any], message: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        plan(make_checkpoint("tiny", variant=variant), tmp_path / "m.gguf", **options)


def test_a_checkpoint_without_a_draft_has_none_to_split(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--draft split: the checkpoint has no draft"):
        plan(make_checkpoint("tiny", mtp=False), tmp_path / "m.gguf", draft="split")


def test_mtp_is_another_spelling_of_draft(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    for spelling in ("--mtp", "--draft"):
        out = tmp_path / f"{spelling}.gguf"
        arguments = ["hf-to-gguf", str(make_checkpoint("tiny")), str(out), spelling, "only", "--name", "x", "-q"]
        assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (tmp_path / "--mtp.gguf").read_bytes() == (tmp_path / "--draft.gguf").read_bytes()


def changed(source: Path, out: Path, **keys: Any) -> Path:
    shutil.copytree(source, out)
    raw = json.loads((out / "config.json").read_text()) | keys
    (out / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return out


@pytest.mark.parametrize(
    ("options", "keys", "kind", "message"),
    [
        ({"draft": "only"}, {"dspark_block_size": None}, ConfigError, "key dspark_block_size is missing"),
        ({"draft": "only"}, {"dspark_target_layer_ids": "x"}, ConfigError, "key dspark_target_layer_ids"),
        ({"draft": "only"}, {"dspark_noise_token_id": -1}, ConfigError, "key dspark_noise_token_id"),
        ({"mmproj": "only"}, {"vision_n_heads": None}, ConfigError, "key vision_n_heads is missing"),
        ({"mmproj": "only"}, {"vision_min_pixels": 0}, ConfigError, "key vision_min_pixels"),
        ({"mmproj": "only"}, {"vision_max_n_token": 385}, UnsupportedError, "key vision_max_n_token"),
    ],
)
def test_a_key_that_a_file_needs_is_named(
    options: dict[str, str],
    keys: dict[str, Any],
    kind: type[Exception],
    message: str,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    source = changed(make_checkpoint("tiny", variant="vision"), tmp_path / "source", **keys)
    with pytest.raises(kind, match=message):
        plan(source, tmp_path / "m.gguf", **options)
