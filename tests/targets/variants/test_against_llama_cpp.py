"""0731, Vision-Exp, their drafts and the tower beside llama.cpp's conversions; llama.cpp running the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from dsv4convert.engine.conversion import execute
from dsv4convert.reference import Model
from dsv4convert.reference.weights.open import open_source
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions

from ...checkpoints import MakeCheckpoint
from ...oracles.llama_cpp import convert, llama_cpp_folder
from ...reference.test_llama import cosines
from ..test_gguf_against_llama_cpp import ODD, assert_same_tensors, assert_superset_of_keys, logits
from .conversions import VARIANTS, gguf_keys

pytestmark = pytest.mark.llama

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "dspark": {"variant": "dspark"},
    "dspark, odd shapes": {"variant": "dspark", "overrides": ODD, "seed": 1},
    "vision": {"variant": "vision"},
    "vision, odd shapes": {"variant": "vision", "overrides": {**ODD, "vision_n_layers": 4}, "seed": 2, "files": 3},
}
# What is asked of us, and of llama.cpp's converter; {source} is the checkpoint.
FILES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "text": ({}, []),
    "draft": ({"draft": "only"}, ["--dspark", "--target-model-dir", "{source}"]),
    "mmproj": ({"mmproj": "only"}, ["--mmproj"]),
}
CASES = [(name, file) for name in CHECKPOINTS for file in FILES if file != "mmproj" or name.startswith("vision")]


@pytest.mark.parametrize(("name", "file"), CASES, ids=[f"{name}: {file}" for name, file in CASES])
def test_file_equals_llama_cpps(name: str, file: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny", **CHECKPOINTS[name])
    options, theirs = FILES[file]
    execute(plan_gguf(source, tmp_path / "ours.gguf", GgufOptions(**options)), threads=2)
    convert(source, tmp_path / "theirs.gguf", *(option.format(source=source) for option in theirs))
    ours, reference = GGUFReader(tmp_path / "ours.gguf"), GGUFReader(tmp_path / "theirs.gguf")
    assert_same_tensors(reference, ours)
    assert_superset_of_keys(reference, ours)
    if file != "text":
        assert ours.fields.keys() == reference.fields.keys()


def test_the_mmproj_files_name_is_llama_cpps(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny", variant="vision")
    out = tmp_path / "theirs"
    out.mkdir()
    convert(source, out, "--mmproj")
    plan = plan_gguf(source, tmp_path, GgufOptions(mmproj="only"))
    assert [path.name for path in out.iterdir()] == [file.name for file in plan.files]


def test_draft_prefixes_are_those_that_llama_cpp_looks_for(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    text = (llama_cpp_folder() / "common" / "download.cpp").read_text()
    for variant, prefix in ((None, "mtp-"), ("dspark", "dspark-")):
        plan = plan_gguf(make_checkpoint("tiny", variant=variant), tmp_path, GgufOptions(draft="only"))
        assert plan.files[0].name.startswith(prefix)
        assert f'"{prefix}"' in text


@pytest.mark.parametrize("name", VARIANTS)
def test_llama_cpp_computes_what_the_reference_does(name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    execute(plan_gguf(make_checkpoint("tiny", **VARIANTS[name]), tmp_path / "m.gguf", GgufOptions()), threads=2)
    tokens = [0, *np.random.default_rng(5).integers(5, 400, 150).tolist()]
    theirs = logits(tmp_path / "m.gguf", tokens).astype(np.float64)
    ours = Model(open_source(tmp_path / "m.gguf")).forward(tokens).astype(np.float64)
    assert np.isfinite(theirs).all()
    # llama.cpp rounds activations to Q8_0 for quantised weights.
    assert np.median(cosines(ours, theirs)) > 0.999


@pytest.mark.parametrize("name", ["dspark", "vision"])
def test_llama_cpp_loads_the_draft(name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Its tensors are all found; running it takes a target model beside it, which its Python binding cannot give."""
    import llama_cpp

    plan = plan_gguf(make_checkpoint("tiny", variant=name), tmp_path / "d.gguf", GgufOptions(draft="only"))
    execute(plan, threads=2)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(tmp_path / "d.gguf").encode(), llama_cpp.llama_model_default_params()
    )
    assert model
    assert llama_cpp.llama_model_n_layer(model) == 3
    llama_cpp.llama_model_free(model)


def test_mean_and_deviation_of_pixels_come_from_a_processors_file(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    import shutil

    source = shutil.copytree(make_checkpoint("tiny", variant="vision"), tmp_path / "source")
    (source / "preprocessor_config.json").write_text('{"image_mean": [0.25, 0.5, 0.75], "image_std": [1, 0.5, 2.0]}')
    (source / "processor_config.json").write_text('{"image_processor": {"image_std": [0.125, 0.25, 0.5]}}')
    execute(plan_gguf(source, tmp_path / "ours.gguf", GgufOptions(mmproj="only")), threads=2)
    convert(source, tmp_path / "theirs.gguf", "--mmproj")
    ours = gguf_keys(tmp_path / "ours.gguf")
    assert ours["clip.vision.image_std"] == [0.125, 0.25, 0.5]
    assert ours == gguf_keys(tmp_path / "theirs.gguf")
