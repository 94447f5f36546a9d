"""Every kind of output verifies, with the right counts of what is exact, rounded and left out."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from dsv4convert.checkpoint import open_folder
from dsv4convert.containers.gguf import open_gguf
from dsv4convert.engine.conversion import execute
from dsv4convert.errors import Dsv4Error, InputMissingError, UsageError
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.verification import verify

from ..checkpoints import MakeCheckpoint
from .conversions import KINDS, Make, convert

# Outputs in which some elements must differ from the source's.
ROUNDED = {"gguf", "gguf-plain", "gguf-f16", "gguf-mtp", "gguf-slice", "gguf-one-layer", "gguf-split", "f16"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_output_verifies(kind: str, small: Path, outputs: Make) -> None:
    report = verify(small, outputs(kind))
    assert report.problems == []
    assert report.ok
    verdicts = report.verdicts()
    assert verdicts["wrong"] == 0
    assert (verdicts["rounded"] > 0) == (kind in ROUNDED)
    assert all(result.compared == result.elements for result in report.results.values())


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_tensor_is_compared_or_left_out(kind: str, small: Path, outputs: Make) -> None:
    report = verify(small, outputs(kind))
    checkpoint = open_folder(small)
    weights = sum(1 + (weight.scale is not None) for weight in checkpoint.weights.values())
    left_out = sum(entry.tensors for entry in report.left_out)
    assert left_out < weights
    if kind.startswith("gguf"):
        assert set(report.results) == set(open_gguf(outputs(kind)).tensors)
    elif "transformers" not in kind and kind != "shards-rank" and not kind.startswith("shards"):
        assert set(report.results) == set(checkpoint.weights)
        assert left_out == 0


@pytest.mark.parametrize("kind", ["gguf", "bf16-transformers", "shards-2"])
def test_a_sample_touches_every_tensor(kind: str, small: Path, outputs: Make) -> None:
    whole = verify(small, outputs(kind))
    report = verify(small, outputs(kind), sample=0.01, seed=5)
    assert report.ok
    assert set(report.results) == set(whole.results)
    assert all(result.compared > 0 for result in report.results.values())
    compared = sum(result.compared for result in report.results.values())
    assert compared < sum(result.compared for result in whole.results.values()) / 2


def test_samples_of_different_seeds_look_elsewhere(small: Path, copy_of: Make) -> None:
    path = copy_of("gguf")
    tensor = open_gguf(path).tensors["blk.0.ffn_up_exps.weight"]
    with path.open("r+b") as file:
        file.seek(tensor.offset + tensor.nbytes // 3)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    found = {verify(small, path, sample=0.2, seed=seed).ok for seed in range(12)}
    assert found == {True, False}


def test_threads_do_not_change_the_report(small: Path, outputs: Make) -> None:
    one, four = (verify(small, outputs("gguf"), threads=n).as_json() for n in (1, 4))
    for report in (one, four):
        del report["seconds"]
    assert one == four


@pytest.mark.parametrize("options", [{"seed": 9}, {"files": 1}, {"files": 7}], ids=["seed", "one_file", "seven_files"])
@pytest.mark.parametrize("kind", ["gguf", "fp8", "shards-2"])
def test_other_checkpoints_verify(
    kind: str, options: dict[str, int], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint("tiny", experts=2, vocab=384, **options)
    assert verify(source, convert(source, kind, tmp_path)).problems == []


@pytest.mark.parametrize("exact", [True, False], ids=["power_of_two_scales", "any_scales"])
@pytest.mark.parametrize("kind", ["gguf", "gguf-plain", "bf16", "f32-transformers", "shards-2"])
def test_base_checkpoints_verify(kind: str, exact: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny", experts=2, vocab=384, variant="base", power_of_two_scales=exact)
    report = verify(source, convert(source, kind, tmp_path))
    assert report.problems == []
    assert report.verdicts()["wrong"] == 0


@pytest.mark.parametrize("variant", ["dspark", "vision"])
@pytest.mark.parametrize("kind", ["gguf", "gguf-port", "bf16", "bf16-transformers", "fp8", "shards-2"])
def test_dspark_and_vision_checkpoints_verify(
    kind: str, variant: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint("tiny", experts=2, vocab=384, variant=variant)
    report = verify(source, convert(source, kind, tmp_path))
    assert report.problems == []
    assert report.verdicts()["wrong"] == 0


PARTS = {"text": "x.gguf", "draft": "dspark-x.gguf", "tower": "mmproj-x.gguf"}


@pytest.fixture(scope="module")
def parts(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return (a vision checkpoint, the folder with its text model, its draft and its tower)."""
    source = make_checkpoint("tiny", experts=2, vocab=384, variant="vision")
    folder = tmp_path_factory.mktemp("parts")
    execute(plan_gguf(source, folder / "x.gguf", GgufOptions(draft="split", mmproj="split")), threads=1)
    return source, folder


@pytest.mark.parametrize("name", PARTS.values(), ids=PARTS.keys())
def test_parts_of_a_model_verify(name: str, parts: tuple[Path, Path]) -> None:
    source, folder = parts
    report = verify(source, folder / name)
    assert report.problems == []
    assert set(report.results) == set(open_gguf(folder / name).tensors)
    assert report.left_out


@pytest.mark.parametrize("name", PARTS.values(), ids=PARTS.keys())
def test_a_flipped_bit_in_a_part_is_caught(name: str, parts: tuple[Path, Path], tmp_path: Path) -> None:
    source, folder = parts
    path = Path(shutil.copy(folder / name, tmp_path / name))
    content = path.read_bytes()
    header = open_gguf(path).parts[0].header_end
    rng = random.Random(name)
    for _ in range(12):
        damaged = bytearray(content)
        damaged[rng.choice([rng.randrange(header), rng.randrange(len(content))])] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert not verifies(source, path)


def verifies(source: Path, path: Path) -> bool:
    try:
        return verify(source, path).ok
    except Dsv4Error:
        return False


def test_a_part_that_the_source_does_not_have_is_a_problem(parts: tuple[Path, Path], small: Path) -> None:
    for name, what in (("dspark-x.gguf", "DSpark draft"), ("mmproj-x.gguf", "vision tower")):
        report = verify(small, parts[1] / name)
        assert [problem.kind for problem in report.problems] == ["file"]
        assert f"contains the {what}, which the source lacks" in report.problems[0].what


def test_experts_rounded_to_mxfp4_verify(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny", experts=2, vocab=384, variant="base")
    execute(plan_gguf(source, tmp_path / "x.gguf", GgufOptions(experts="mxfp4")), threads=1)
    report = verify(source, tmp_path / "x.gguf")
    assert report.problems == []
    assert report.results["blk.0.ffn_up_exps.weight"].rounded > 0


def test_the_slice_is_found_by_its_bytes(small: Path, outputs: Make) -> None:
    assert "layers 1 to 2" in verify(small, outputs("gguf-slice")).notes[0]
    assert "layers 3 to 3" in verify(small, outputs("gguf-one-layer")).notes[0]


def test_a_slice_of_all_layers_is_the_model(small: Path, tmp_path: Path) -> None:
    for name, layers in (("slice", (0, 3)), ("model", None)):
        execute(plan_gguf(small, tmp_path / f"{name}.gguf", GgufOptions(layers=layers)), threads=1)
    assert (tmp_path / "slice.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()
    assert verify(small, tmp_path / "slice.gguf").ok


def test_missing_ranks_are_noted(small: Path, outputs: Make) -> None:
    assert "ranks 0 of 2" in verify(small, outputs("shards-rank")).notes[0]


def test_another_checkpoint_of_the_same_shapes_is_told_apart(
    make_checkpoint: MakeCheckpoint, outputs: Make, small: Path
) -> None:
    other = make_checkpoint("tiny", seed=77, experts=4, vocab=400)
    report = verify(other, outputs("gguf"))
    assert report.verdicts()["wrong"] > 100
    assert not report.ok


def test_a_renamed_source_can_be_verified_by_leaving_its_name_out(small: Path, outputs: Make, tmp_path: Path) -> None:
    renamed = shutil.copytree(small, tmp_path / "another-name")
    report = verify(renamed, outputs("gguf"))
    assert {problem.where for problem in report.problems} <= {"general.name", "general.basename", "general.finetune"}
    assert not report.ok
    ignored = [problem.where for problem in report.problems]
    assert verify(renamed, outputs("gguf"), ignore_keys=ignored).ok


def test_missing_output_and_missing_source_are_errors(small: Path, outputs: Make, tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="nowhere"):
        verify(small, tmp_path / "nowhere")
    with pytest.raises(InputMissingError, match="nowhere"):
        verify(tmp_path / "nowhere", outputs("gguf"))
    with pytest.raises(UsageError):
        verify(small, small)
