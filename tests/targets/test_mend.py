"""``mend``: what stays is shared with the source and never written; what changes is written anew, and verified."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsv4convert
from dsv4convert.containers.safetensors import read_header
from dsv4convert.engine import links, outputs
from dsv4convert.engine.conversion import execute
from dsv4convert.engine.manifest import manifest_of, read_manifest
from dsv4convert.engine.worker import Worker
from dsv4convert.errors import (
    FileFormatError,
    InputOutputError,
    InventoryError,
    ResumeError,
    UnsupportedError,
    UsageError,
)
from dsv4convert.targets.mend import Mends, plan_mend

from ..checkpoints import MakeCheckpoint
from ..command_line import run_cli
from .folders import Editable
from .test_drafts import tensors

INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """Return a copy of a checkpoint in three files, the last of which holds the draft and more."""
    return shutil.copytree(make_checkpoint("tiny", files=3), tmp_path / "source")


def state(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Return content, inode number and time of change of the files of a folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        status = path.stat()
        found[path.name] = (path.read_bytes(), status.st_ino, status.st_mtime_ns)
    return found


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def shared_with(out: Path, source: Path) -> set[str]:
    """Return the names of files of ``out`` that are files of ``source``."""
    theirs = {path.stat().st_ino for path in source.iterdir()}
    return {path.name for path in out.iterdir() if path.stat().st_ino in theirs}


def made_by(out: Path) -> dict[str, str]:
    return {entry["name"]: entry["made_by"] for entry in read_manifest(manifest_of(out))["files"] if "made_by" in entry}


def check(source: Path, out: Path, *options: object) -> None:
    for words in (("verify", source, out, *options), ("verify", "--manifest", out)):
        result = run_cli(*words)
        assert result.code == 0, result.err


def test_files_of_weights_that_stay_are_hard_links_and_nothing_else_is(source: Path, tmp_path: Path) -> None:
    before = state(source)
    out = tmp_path / "out"
    summary = dsv4convert.mend(source, out, drop_draft=True)
    assert state(source) == before
    assert shared_with(out, source) == {path.name for path in weights(source)[:2]}
    assert made_by(out) == dict.fromkeys(sorted(shared_with(out, source)), "hard link")
    assert summary.links == {"hard link": 2}
    assert summary.shared_bytes == sum(path.stat().st_size for path in weights(source)[:2])
    assert summary.as_json()["links"] == {"hard link": 2}
    assert tensors(out) == {name: data for name, data in tensors(source).items() if not name.startswith("mtp.")}
    check(source, out)


def test_the_config_and_the_tokenizer_are_the_outputs_own(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    (source / "notes.txt").write_text("mine")
    out = tmp_path / "out"
    summary = dsv4convert.mend(source, out, reindex=True)
    for name in ("config.json", "tokenizer.json", "README.md"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
        assert (out / name).stat().st_ino != (source / name).stat().st_ino
    assert "not taken over: notes.txt" in summary.notes


def test_an_output_on_another_file_system_is_a_copy(source: Path, fast_tmp: Path) -> None:
    if fast_tmp.stat().st_dev == source.stat().st_dev:
        pytest.skip("one file system")
    summary = dsv4convert.mend(source, fast_tmp / "out", reindex=True)
    assert summary.links == {"copy": 3}
    assert set(made_by(fast_tmp / "out").values()) == {"copy"}
    assert tensors(fast_tmp / "out") == tensors(source)
    check(source, fast_tmp / "out")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EMLINK, errno.EXDEV, errno.EOPNOTSUPP])
def test_a_file_that_cannot_be_linked_is_copied(
    number: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    assert dsv4convert.mend(source, tmp_path / "out", reindex=True).links == {"copy": 3}
    check(source, tmp_path / "out")


def test_a_full_disk_while_linking_is_an_error(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(dsv4convert.SpaceError, match=r"model-00001-of-00003\.safetensors: cannot be linked"):
        dsv4convert.mend(source, tmp_path / "out", reindex=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_where_blocks_can_be_shared_no_file_is_linked(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shared(path: Path, output: int) -> bool:
        os.pwrite(output, path.read_bytes(), 0)
        return True

    monkeypatch.setattr(outputs, "reflink", shared)
    runs: list[object] = []
    monkeypatch.setattr(Worker, "run", lambda *arguments: runs.append(arguments))
    out = tmp_path / "out"
    assert dsv4convert.mend(source, out, reindex=True).links == {"reflink": 3}
    assert not runs  # nothing is written a second time
    assert set(made_by(out).values()) == {"reflink"}
    assert shared_with(out, source) == set()
    check(source, out)


def test_a_reflink_that_the_file_system_refuses_is_none(source: Path, tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        made = links.reflink(weights(source)[0], file.fileno())
    assert made == bool((tmp_path / "a").stat().st_size)


def test_a_snapshot_of_links_is_linked_by_its_files(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in source.iterdir():
        (snapshot / path.name).symlink_to(path)
    dsv4convert.mend(snapshot, tmp_path / "out", reindex=True)
    assert shared_with(tmp_path / "out", source) == {path.name for path in weights(source)}
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


# ---- steps


def _lists_another_file(index: dict[str, Any]) -> None:
    index["weight_map"]["embed.weight"] = "model-00003-of-00003.safetensors"


def _lists_a_file_that_is_not_there(index: dict[str, Any]) -> None:
    index["weight_map"]["embed.weight"] = "model-00004-of-00003.safetensors"


def _lists_less(index: dict[str, Any]) -> None:
    del index["weight_map"]["embed.weight"]


@pytest.mark.parametrize("damage", [_lists_another_file, _lists_a_file_that_is_not_there, _lists_less])
def test_an_index_is_made_of_the_headers(
    damage: Callable[[dict[str, Any]], None], source: Path, tmp_path: Path
) -> None:
    good = json.loads((source / INDEX).read_text())
    bad = json.loads((source / INDEX).read_text())
    damage(bad)
    (source / INDEX).write_text(json.dumps(bad))
    assert run_cli("mend", source, tmp_path / "out", "--prune-config").code > 0
    dsv4convert.mend(source, tmp_path / "out", reindex=True)
    assert json.loads((tmp_path / "out" / INDEX).read_text()) == good
    assert shared_with(tmp_path / "out", source) == {path.name for path in weights(source)}
    check(source, tmp_path / "out", "--index", "headers")


def test_a_missing_index_of_files_with_any_name_is_made(source: Path, tmp_path: Path) -> None:
    (source / INDEX).unlink()
    for number, path in enumerate(weights(source)):
        path.rename(source / f"part-{number}.safetensors")
    dsv4convert.mend(source, tmp_path / "out", reindex=True)
    assert [path.name for path in weights(tmp_path / "out")] == [f"part-{number}.safetensors" for number in range(3)]
    assert dsv4convert.open_checkpoint(tmp_path / "out").n_tensors == len(tensors(source))


def test_files_are_numbered_anew_where_one_goes(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    whole = make_checkpoint("tiny", files=2)
    dsv4convert.dequantize(whole, tmp_path / "bf16", draft="split")
    source = tmp_path / "source"
    shutil.copytree(tmp_path / "bf16", source)
    (source / "model.safetensors").rename(source / "a.safetensors")
    shutil.copy(tmp_path / "bf16-draft" / "model.safetensors", source / "b.safetensors")
    shutil.copy(tmp_path / "bf16-draft" / "config.json", source)
    out = tmp_path / "out"
    dsv4convert.mend(source, out, reindex=True, drop_draft=True)
    assert [path.name for path in weights(out)] == ["model.safetensors"]
    assert not (out / INDEX).exists()
    assert (out / "model.safetensors").stat().st_ino == (source / "a.safetensors").stat().st_ino
    check(source, out, "--index", "headers")


def test_a_draft_that_is_not_whole_can_be_dropped(source: Path, tmp_path: Path) -> None:
    last = weights(source)[-1]
    content = last.read_bytes()
    last.write_bytes(content.replace(b'"mtp.0.enorm.weight"', b'"mtp.0.gone!.weight"', 1))
    (source / INDEX).write_text((source / INDEX).read_text().replace("mtp.0.enorm.weight", "mtp.0.gone!.weight"))
    summary = dsv4convert.mend(source, tmp_path / "out", drop_draft=True)
    assert "a draft that is not whole" in summary.dropped[0].reason
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    check(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("preset", "options"),
    [("tiny", {}), ("tiny", {"variant": "dspark"}), ("v41-tiny", {})],
    ids=["MTP", "DSpark", "V4.1"],
)
@pytest.mark.parametrize("of", ["a whole model", "a draft alone"])
def test_a_draft_comes_back(
    of: str, preset: str, options: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    whole = make_checkpoint(preset, files=3, **options)
    dsv4convert.mend(whole, tmp_path / "trunk", drop_draft=True)
    donor = whole
    if of == "a draft alone":
        donor = tmp_path / "draft"
        dsv4convert.shard(whole, tmp_path / "shards", mp=1)
        dsv4convert.unshard(tmp_path / "shards", donor, draft="only", wo_a="fp8")
    out = tmp_path / "out"
    dsv4convert.mend(tmp_path / "trunk", out, graft_draft=donor)
    drafts = {name: data for name, data in tensors(donor).items() if name.startswith("mtp.")}
    assert tensors(out) == tensors(whole) | drafts
    assert json.loads((out / "config.json").read_text()) == json.loads((whole / "config.json").read_text())
    check(tmp_path / "trunk", out, "--graft-draft", donor)
    if donor == whole:
        check(whole, out)
    assert run_cli("verify", tmp_path / "trunk", out).code > 0


def test_a_draft_takes_the_place_of_another(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    ours, theirs = make_checkpoint("tiny", files=3), make_checkpoint("tiny", variant="dspark", files=3)
    with pytest.raises(UsageError, match="pass --drop-draft as well to replace it"):
        dsv4convert.mend(ours, tmp_path / "out", graft_draft=theirs)
    summary = dsv4convert.mend(ours, tmp_path / "out", drop_draft=True, graft_draft=theirs)
    found = tensors(tmp_path / "out")
    assert {k: v for k, v in found.items() if k.startswith("mtp.")} == {
        k: v for k, v in tensors(theirs).items() if k.startswith("mtp.")
    }
    assert {k: v for k, v in found.items() if not k.startswith("mtp.")} == {
        k: v for k, v in tensors(ours).items() if not k.startswith("mtp.")
    }
    assert [entry.what for entry in summary.dropped] == ["mtp.*"]
    assert dsv4convert.open_checkpoint(tmp_path / "out").draft.value == "DSpark"
    check(ours, tmp_path / "out", "--graft-draft", theirs)
    assert not any("draft's experts" in note for note in summary.notes)


def test_a_draft_with_experts_of_another_type_is_noted(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    ours, theirs = make_checkpoint("tiny"), make_checkpoint("tiny", variant="base")
    summary = dsv4convert.mend(ours, tmp_path / "out", drop_draft=True, graft_draft=theirs)
    assert any("the draft's experts are fp8, the model's fp4" in note for note in summary.notes)
    check(ours, tmp_path / "out", "--graft-draft", theirs)


def test_a_draft_that_does_not_fit_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    ours = make_checkpoint("tiny", mtp=False)
    other_size = make_checkpoint("tiny", overrides={"hidden_size": 192})
    with pytest.raises(InventoryError, match=r"tensor mtp\.0\..*: wrong shape"):
        dsv4convert.mend(ours, tmp_path / "out", graft_draft=other_size)
    with pytest.raises(InventoryError, match="no draft layers to take"):
        dsv4convert.mend(make_checkpoint("tiny"), tmp_path / "out", graft_draft=ours)
    with pytest.raises(InventoryError, match="the draft belongs to another architecture"):
        dsv4convert.mend(ours, tmp_path / "out", graft_draft=make_checkpoint("v41-tiny"))
    with pytest.raises(UsageError, match="the draft is that of the source itself"):
        dsv4convert.mend(ours, tmp_path / "out", graft_draft=ours)
    assert not list(tmp_path.iterdir())


def test_keys_of_what_is_not_there_go(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = tmp_path / "bf16"
    dsv4convert.dequantize(make_checkpoint("tiny"), source, draft="drop")
    path = source / "config.json"
    idle = {
        "vision_n_layers": 2, "vision_dim": 64, "quantization_config": {"quant_method": "fp8"}, "expert_dtype": "fp4",
        "dspark_block_size": 5, "num_nextn_predict_layers": 1,
    }  # fmt: skip
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | idle))
    dsv4convert.mend(source, tmp_path / "out", prune_config=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"num_nextn_predict_layers": 0}
    check(source, tmp_path / "out")
    assert run_cli("verify", source, source).code > 0


def test_keys_of_what_is_there_stay(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    for number, options in enumerate(({"variant": "vision"}, {}, {"preset": "v41-tiny"})):
        source, out = make_checkpoint(**options), tmp_path / str(number)
        dsv4convert.mend(source, out, prune_config=True)
        assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
        check(source, out)


# ---- names


def test_transformers_names_are_those_of_dequantize(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    tiny = make_checkpoint("tiny", files=2)
    dsv4convert.dequantize(tiny, tmp_path / "official", max_file_size="2M")
    dsv4convert.dequantize(tiny, tmp_path / "stacked", names="transformers")
    dsv4convert.mend(tmp_path / "official", tmp_path / "renamed", rename="transformers")
    assert tensors(tmp_path / "renamed") == tensors(tmp_path / "stacked")
    check(tmp_path / "official", tmp_path / "renamed")
    dsv4convert.mend(tmp_path / "stacked", tmp_path / "back", rename="official")
    assert tensors(tmp_path / "back") == tensors(tmp_path / "official")
    check(tmp_path / "stacked", tmp_path / "back")


@pytest.mark.parametrize("variant", [None, "base", "vision", "dspark"])
def test_scaled_weights_keep_their_bytes_under_either_name(
    variant: str | None, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    overrides = {"moe_intermediate_size": 128, "hidden_size": 256} if variant == "base" else None
    source = make_checkpoint("tiny", variant=variant, files=2, layers=3, experts=4, overrides=overrides)
    summary = dsv4convert.mend(source, tmp_path / "named", rename="transformers")
    names = tensors(tmp_path / "named")
    assert "model.layers.1.mlp.experts.gate_up_proj_scale_inv" in names
    assert "model.layers.1.self_attn.q_a_proj.weight_scale_inv" in names
    check(source, tmp_path / "named")
    dsv4convert.mend(tmp_path / "named", tmp_path / "back", rename="official")
    nameless = (".bias_vl", "vision.", "aligner.", "image_") if variant == "vision" else ()
    kept = {n: data for n, data in tensors(source).items() if not any(part in n for part in nameless)}
    kept = {n: d for n, d in kept.items() if variant != "vision" or not n.endswith("layers.0.ffn.gate.bias")}
    assert tensors(tmp_path / "back").keys() <= kept.keys()
    assert tensors(tmp_path / "back") == {n: kept[n] for n in tensors(tmp_path / "back")}
    assert bool(summary.dropped) == (variant == "vision")
    if variant is None:
        for folder in (source, tmp_path / "named"):
            dsv4convert.convert_gguf(folder, tmp_path / f"{folder.name}.gguf", name="model")
        assert (tmp_path / "named.gguf").read_bytes() == (tmp_path / f"{source.name}.gguf").read_bytes()


def test_the_only_expert_of_a_stack_is_a_matrix_again(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny", layers=1, experts=1, mtp=False, files=1)
    for before, after, names in (
        (source, "named", "transformers"),
        (tmp_path / "named", "again", "transformers"),
        (tmp_path / "named", "back", "official"),
    ):
        dsv4convert.mend(before, tmp_path / after, rename=names)
        check(source, tmp_path / after)
    shapes = {
        folder: {n: t.shape for n, t in read_header(tmp_path / folder / "model.safetensors").items()}
        for folder in ("named", "again", "back")
    }
    assert shapes["again"] == shapes["named"]
    assert shapes["named"]["model.layers.0.mlp.experts.down_proj"] == (1, 160, 48)
    assert shapes["back"]["layers.0.ffn.experts.0.w2.weight"] == (160, 48)


def test_names_that_are_right_already_leave_every_file(source: Path, tmp_path: Path) -> None:
    assert dsv4convert.mend(source, tmp_path / "out", rename="official").links == {"hard link": 3}


def test_what_cannot_be_renamed_is_said(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"transformers has no modules for DeepSeek-V4\.1"):
        dsv4convert.mend(make_checkpoint("v41-tiny"), tmp_path / "out", rename="transformers")
    with pytest.raises(UnsupportedError, match="cannot be stacked, an expert's rows end inside a scale block"):
        dsv4convert.mend(make_checkpoint("tiny", variant="base"), tmp_path / "out", rename="transformers")
    with pytest.raises(UsageError, match="--rename: unknown"):
        dsv4convert.mend(make_checkpoint("tiny"), tmp_path / "out", rename="v3")
    with pytest.raises(UsageError, match="nothing to mend"):
        dsv4convert.mend(make_checkpoint("tiny"), tmp_path / "out")


# ---- the source is never touched


def test_an_older_output_of_links_can_be_replaced_by_any_command(source: Path, tmp_path: Path) -> None:
    before, out = state(source), tmp_path / "out"
    dsv4convert.mend(source, out, reindex=True)
    dsv4convert.mend(source, out, drop_draft=True, overwrite=True)
    dsv4convert.mend(source, out, reindex=True, overwrite=True)
    assert run_cli("dequantize", source, out).code == 9
    assert run_cli("dequantize", source, out, "--overwrite", "--quiet").code == 0
    assert state(source) == before
    check(source, out)


def test_a_link_back_to_the_source_is_still_refused(source: Path, tmp_path: Path) -> None:
    before, out = state(source), tmp_path / "out"
    out.mkdir()
    (out / "config.json").symlink_to(source / "config.json")
    with pytest.raises(UsageError, match="would replace a file of the source"):
        dsv4convert.mend(source, out, reindex=True, overwrite=True)
    assert state(source) == before


def failing_look(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs look at so many segments of shared files, then fail as a bad disk would."""
    look, count = Worker.look, 0

    def failing(self: Worker, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise InputOutputError("cannot be read (a bad block)", where="the test")
        return look(self, *arguments)

    monkeypatch.setattr(Worker, "look", failing)


def interrupted(source: Path, tmp_path: Path) -> Path:
    """Leave a run that died over its second shared file; return the output's name."""
    out = tmp_path / "out"
    first = len(read_header(weights(source)[0]))
    with pytest.MonkeyPatch.context() as patch:
        failing_look(first + 5, patch)
        with pytest.raises(InputOutputError, match="--resume"):
            execute(plan_mend(source, out, Mends(reindex=True)), threads=1)
    return out


def test_an_interrupted_run_goes_on_with_its_links(source: Path, tmp_path: Path) -> None:
    before = state(source)
    out = interrupted(source, tmp_path)
    summary = dsv4convert.mend(source, out, reindex=True, resume=True)
    assert 0 < summary.resumed_bytes < summary.written_bytes
    assert summary.links == {"hard link": 3}
    again = dsv4convert.mend(source, out, reindex=True, resume=True)
    assert again.resumed_bytes == again.written_bytes
    assert again.links == {"hard link": 3}
    assert state(source) == before
    check(source, out)


@pytest.mark.parametrize("number", [0, 1, 2], ids=["seen", "half seen", "not seen"])
def test_a_file_with_names_of_others_is_never_written(number: int, source: Path, tmp_path: Path) -> None:
    out = interrupted(source, tmp_path)
    partial = tmp_path / "out.partial" / weights(source)[number].name
    mine = tmp_path / "mine"
    shutil.copy(partial, mine)
    content = mine.read_bytes()
    partial.unlink()
    os.link(mine, partial)
    with pytest.raises(ResumeError, match="not the file of the interrupted run"):
        dsv4convert.mend(source, out, reindex=True, resume=True)
    assert mine.read_bytes() == content
    dsv4convert.mend(source, out, reindex=True, fresh=True)
    assert mine.read_bytes() == content
    check(source, out)


def test_work_of_links_is_discarded_without_the_source(source: Path, tmp_path: Path) -> None:
    before = state(source)
    out = interrupted(source, tmp_path)
    dsv4convert.dequantize(source, out, fresh=True)
    assert state(source) == before
    check(source, out)


def test_a_file_that_changes_while_it_is_linked_is_an_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_mend(source, tmp_path / "out", Mends(reindex=True))
    with weights(source)[1].open("ab") as file:
        file.write(b"more")
    with pytest.raises(FileFormatError, match=r"model-00002-of-00003\.safetensors: changed during the conversion"):
        execute(plan)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["layers.0.attn.wq_a.weight", "mtp.0.attn.wq_a.weight"], ids=["shared", "written"])
def test_strict_reads_what_is_shared_too(name: str, editable: Callable[..., Editable], tmp_path: Path) -> None:
    source = editable(files=3)

    def spoil(rows: np.ndarray[Any, Any]) -> None:
        rows[0, 0] = 0x7F  # NaN of e4m3

    source.edit(name, spoil)
    loose = dsv4convert.mend(source.folder, tmp_path / "loose", reindex=True)
    assert [entry["tensor"] for entry in loose.counted] == [name]
    result = run_cli("mend", source.folder, tmp_path / "strict", "--reindex", "--strict")
    assert result.code > 0
    assert "not finite" in result.error or "NaN" in result.error
    assert not (tmp_path / "strict").exists()


def test_a_dry_run_says_what_would_be_shared(source: Path, tmp_path: Path) -> None:
    summary = dsv4convert.mend(source, tmp_path / "out", reindex=True, dry_run=True)
    assert summary.dry_run is not None
    assert "3 files of the source can be shared" in summary.notes
    assert summary.dry_run.disk_needed < 2**17
    result = run_cli("mend", source, tmp_path / "out", "--reindex", "--dry-run")
    assert "note: 3 files of the source can be shared" in result.out
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
