"""``--list-recipes`` and ``--fit``: sizes from headers alone equal the files, and the largest that fits is chosen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dsv4convert.api import convert_gguf, list_recipes
from dsv4convert.errors import FileFormatError, UsageError
from dsv4convert.targets.recipes import parse_recipe, recipe_names

from ..checkpoints import MakeCheckpoint
from ..command_line import run_cli
from ..low_bit import SMALL, WHOLE, write_imatrix

HERE_LISTED = [name for name in recipe_names() if not name.startswith("ds4-")]


@pytest.fixture(scope="module")
def whole(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("tiny", overrides=WHOLE, **SMALL)


def test_the_list_is_sorted_and_complete(whole: Path) -> None:
    sizes = list_recipes(whole)
    assert sorted(recipe.name for recipe in sizes.recipes) == HERE_LISTED
    listed = [recipe.nbytes or 0 for recipe in sizes.recipes]
    assert listed == sorted(listed)
    assert listed[0] > 0
    assert (sizes.context, sizes.fit, sizes.chosen) == (4096, None, None)


@pytest.mark.llama
@pytest.mark.parametrize("recipe", HERE_LISTED)
def test_sizes_are_those_that_the_conversion_plans(recipe: str, whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    listed = {entry.name: entry.nbytes for entry in list_recipes(whole).recipes}
    summary = convert_gguf(whole, tmp_path / "model.gguf", recipe=recipe, importance="weights", dry_run=True)
    assert summary.dry_run is not None
    assert listed[recipe] == summary.dry_run.disk_needed


@pytest.mark.llama
def test_sizes_are_those_of_the_files_to_the_byte(whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    imatrix = tmp_path / "imatrix.gguf"
    write_imatrix(
        imatrix,
        {"output.weight": np.ones((1, 256), np.float32)},
        {"output.weight": np.ones(1, int)},
        datasets=["t"],
        chunks=1,
        chunk_size=1,
    )
    for number, (recipe, options) in enumerate(
        [
            ("q2_k_s", {}),
            ("q4_k_m", {"imatrix": imatrix, "name": "Another name"}),
            ("mxfp4-q8", {"draft": "split", "max_file_size": "1M"}),
            ("q6_k", {"split_max_tensors": 5, "layers": "0-0"}),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        listed = {entry.name: entry.nbytes for entry in list_recipes(whole, **options).recipes}
        convert_gguf(whole, folder, recipe=recipe, threads=2, **options)
        assert listed[recipe] == sum(path.stat().st_size for path in folder.glob("*.gguf")), recipe


def test_what_needs_importance_is_chosen_with_it_only(whole: Path) -> None:
    sizes = {entry.name: entry for entry in list_recipes(whole).recipes}
    small = sizes["iq2_xxs"]
    assert small.nbytes is not None
    assert "--imatrix" in (small.obstacle or "")
    room = small.nbytes + list_recipes(whole).cache_bytes
    assert list_recipes(whole, fit=room, importance="weights").chosen == "iq2_xxs"
    assert list_recipes(whole, fit=room).chosen is None
    with pytest.raises(UsageError, match=r"--fit: no recipe fits.*iq2_xxs fits, and needs --imatrix"):
        convert_gguf(whole, fit=room, dry_run=True)


def test_where_all_that_fits_needs_importance_nothing_is_said_to_be_missing(whole: Path) -> None:
    with pytest.raises(
        UsageError, match=r"--fit: no recipe fits without importance: got \S+; \S+ fits, and needs --imatrix"
    ):
        convert_gguf(whole, dialect="ds4", fit="1T", dry_run=True)


def test_the_cache_counts_and_depends_on_the_context(whole: Path) -> None:
    long, short = (list_recipes(whole, context=context).cache_bytes for context in (4096, 3072))
    assert short < long
    sizes = {entry.name: entry.nbytes or 0 for entry in list_recipes(whole).recipes}
    room = sizes["q2_k_s"] + long
    assert list_recipes(whole, fit=room).chosen == "q2_k_s"
    assert list_recipes(whole, fit=room - 1).chosen is None
    assert list_recipes(whole, fit=room - 1, context=3072).chosen is not None
    missing = {entry.name: entry.missing_bytes for entry in list_recipes(whole, fit=room - 1).recipes}
    assert missing["q2_k_s"] == 1
    assert missing["q2_k"] == sizes["q2_k"] + long - room + 1


def test_fp4_experts_gain_nothing_from_larger_types(whole: Path, make_checkpoint: MakeCheckpoint) -> None:
    sizes = list_recipes(whole, fit="1T")
    assert sizes.chosen == "mxfp4-q8"
    assert {entry.name for entry in sizes.recipes if "MXFP4" in (entry.obstacle or "")} >= {"q5_k_m", "q6_k"}
    base = make_checkpoint("tiny", overrides=WHOLE, variant="base", **SMALL)
    assert list_recipes(base, fit="1T").chosen == "q6_k"


def test_a_conversion_takes_the_recipe_that_fits(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    summary = convert_gguf(whole, out, fit="1TiB", context=512, threads=1)
    assert summary.notes[0] == "--fit 1TiB: recipe mxfp4-q8, with a KV cache for 512 tokens"
    convert_gguf(whole, tmp_path / "same.gguf", recipe="mxfp4-q8", threads=1)
    assert out.read_bytes() == (tmp_path / "same.gguf").read_bytes()


def test_a_recipe_that_does_not_fit_says_what_is_missing(whole: Path, tmp_path: Path) -> None:
    (entry,) = [entry for entry in list_recipes(whole).recipes if entry.name == "q6_k"]
    assert entry.nbytes is not None
    room = entry.nbytes + list_recipes(whole).cache_bytes - 7
    with pytest.raises(UsageError, match=r"--fit: recipe q6_k does not fit: 7 bytes are missing"):
        convert_gguf(whole, tmp_path / "model.gguf", recipe="q6_k", fit=room)
    done = run_cli("hf-to-gguf", whole, tmp_path / "model.gguf", "--recipe", "q6_k", "--fit", room)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert not list(tmp_path.iterdir())


def test_recipes_for_another_dialect_are_not_listed(make_checkpoint: MakeCheckpoint) -> None:
    names = {entry.name: entry for entry in list_recipes(make_checkpoint("v41-tiny"), dialect="ds4").recipes}
    assert {"ds4-q2", "ds4-q2-q4", "q6_k"} <= names.keys()
    assert names["q6_k"].nbytes is None
    assert "not supported by dialect ds4" in (names["q6_k"].obstacle or "")


def test_the_command_lists_and_stops(whole: Path, tmp_path: Path) -> None:
    done = run_cli("hf-to-gguf", whole, "--list-recipes", "--fit", "1G", "--context", "1000")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].startswith("KV cache for 1,000 tokens: ")
    assert [line.split()[0] for line in lines[3:]] == [entry.name for entry in list_recipes(whole).recipes]
    assert [line.split()[0] for line in lines if " chosen " in line] == ["mxfp4-q8"]
    document = json.loads(run_cli("hf-to-gguf", whole, "--list-recipes", "--json").out)
    assert document == list_recipes(whole).as_json()
    refused = run_cli("hf-to-gguf", whole, "--list-recipes", "--tensor-type", "ffn=q4_k")
    assert (refused.code, refused.out) == (2, "")
    assert "--list-recipes and --tensor-type exclude each other" in refused.err
    assert "--context: out of range" in run_cli("hf-to-gguf", whole, "--list-recipes", "--context", "1M").err
    assert "--context is for --fit" in run_cli("hf-to-gguf", whole, tmp_path, "--context", "5").err


def test_a_recipe_with_an_integer_that_python_does_not_read_is_malformed() -> None:
    with pytest.raises(FileFormatError, match="not a TOML file"):
        parse_recipe("mine", b"description = " + b"9" * 5000, "mine.toml")


def test_rows_that_name_no_tensor_are_told(whole: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    rows = ('match = "ffn_down_exps"\nlayers = "90-99"', 'match = "no_such_tensor"', 'match = "ffn_up_exps"')
    recipe.write_text("".join(f'[[tensor]]\n{row}\ntype = "q2_k"\n' for row in rows))
    notes = convert_gguf(whole, recipe=str(recipe), dry_run=True).notes
    assert [note for note in notes if "names no tensor" in note] == [
        "row 1 of the recipe names no tensor: ffn_down_exps in layers 90-99",
        "row 2 of the recipe names no tensor: no_such_tensor",
    ]
