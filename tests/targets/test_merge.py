"""``merge``: the files of a split GGUF become the file that an unsplit conversion makes, with room for little more."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import dsv4convert.engine.consume as consume_module
from dsv4convert.api import convert_gguf, merge, verify, verify_manifest
from dsv4convert.containers.gguf import open_gguf
from dsv4convert.containers.gguf_write import STRING, U16, KeyValue
from dsv4convert.engine.consume import Room
from dsv4convert.engine.conversion import execute
from dsv4convert.engine.manifest import manifest_of
from dsv4convert.engine.names import Identity
from dsv4convert.engine.resources import disk_needed
from dsv4convert.engine.worker import Made, Worker
from dsv4convert.errors import FileFormatError, InputMissingError, ResumeError, UsageError
from dsv4convert.plan import OutputTensor, Segment
from dsv4convert.targets.gguf_tensors import gguf_file
from dsv4convert.targets.merge import key_values, plan_merge, remove_parts

from ..checkpoints import MakeCheckpoint
from ..oracles.llama_cpp import llama_cpp_folder

SPLITS = {
    "bytes": {"max_file_size": "1M"},
    "tensors": {"split_max_tensors": 50},
    "metadata first": {"split_max_tensors": 50, "no_tensor_first_split": True},
    "one tensor": {"split_max_tensors": 1},
}


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    convert_gguf(tiny, path, threads=2)
    return path


@pytest.fixture
def parts(tiny: Path, tmp_path: Path) -> list[Path]:
    return split(tiny, tmp_path / "parts", max_file_size="1M", no_tensor_first_split=True)


def split(source: Path, folder: Path, **options: object) -> list[Path]:
    folder.mkdir()
    convert_gguf(source, folder / "part.gguf", threads=2, **options)  # type: ignore[arg-type]
    return sorted(folder.glob("*.gguf"))


@pytest.mark.parametrize("options", SPLITS.values(), ids=SPLITS)
def test_the_merged_file_is_that_of_an_unsplit_conversion(
    options: dict[str, object], whole: Path, tiny: Path, tmp_path: Path
) -> None:
    paths = split(tiny, tmp_path / "parts", **options)
    before = [path.read_bytes() for path in paths]
    if options.get("no_tensor_first_split"):
        assert [len(part.tensors) for part in open_gguf(paths[0]).parts] == [0, 50, 50, 26]
    summary = merge(paths[-1], tmp_path / "merged.gguf", threads=2)
    assert summary.tensors == 126
    assert (tmp_path / "merged.gguf").read_bytes() == whole.read_bytes()
    assert [path.read_bytes() for path in paths] == before
    assert verify(tiny, tmp_path / "merged.gguf").ok
    assert verify_manifest(tmp_path / "merged.gguf").mismatches == ()


def test_v41_with_its_own_alignment(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("v41-tiny")
    paths = split(source, tmp_path / "parts", max_file_size="1M", engram="i8-row264", engram_last=True)
    convert_gguf(source, tmp_path / "whole.gguf", engram="i8-row264", engram_last=True, threads=2)
    merge(paths[0], tmp_path, threads=2)
    assert (tmp_path / "part.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.llama
def test_splits_of_llama_cpps_program_are_merged_and_cut_alike(whole: Path, tiny: Path, tmp_path: Path) -> None:
    import llama_cpp

    libraries = Path(llama_cpp.__file__).parents[1] / "lib"
    source = llama_cpp_folder()
    program = tmp_path / "gguf-split"
    includes = [source / "common", source / "include", source / "ggml" / "include"]
    subprocess.run(
        ["g++", "-std=c++17", "-O0", str(source / "tools" / "gguf-split" / "gguf-split.cpp"), "-o", str(program),
         *(f"-I{path}" for path in includes), f"-L{libraries}", "-lllama-common", "-lllama", "-lggml", "-lggml-base",
         "-Wl,--allow-shlib-undefined"],
        check=True,
    )  # fmt: skip
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}

    def theirs(*arguments: str | Path) -> None:
        subprocess.run([program, *arguments], check=True, capture_output=True, env=environment)

    theirs("--split", "--split-max-tensors", "50", "--no-tensor-first-split", whole, tmp_path / "theirs")
    merge(tmp_path / "theirs-00001-of-00004.gguf", tmp_path / "merged.gguf")
    assert (tmp_path / "merged.gguf").read_bytes() == whole.read_bytes()
    cut = open_gguf(tmp_path / "theirs-00001-of-00004.gguf")
    paths = split(tiny, tmp_path / "parts", split_max_tensors=50, no_tensor_first_split=True)
    ours = open_gguf(paths[0])
    assert [list(part.tensors) for part in ours.parts] == [list(part.tensors) for part in cut.parts]
    assert [dict(part.metadata) for part in ours.parts] == [dict(part.metadata) for part in cut.parts]
    # Theirs keeps the keys of the split, with a count of 0, in what it merges.
    theirs("--merge", paths[0], tmp_path / "theirs.gguf")
    merged, expected = open_gguf(tmp_path / "merged.gguf"), open_gguf(tmp_path / "theirs.gguf")
    assert expected.metadata["split.count"] == 0
    assert key_values(merged) == key_values(expected)
    for (name, mine), other in zip(merged.tensors.items(), expected.tensors.values(), strict=True):
        assert (mine.name, mine.type, mine.shape) == (other.name, other.type, other.shape)
        ranges = [
            path.read_bytes()[tensor.offset :][: tensor.nbytes]
            for path, tensor in ((tmp_path / "merged.gguf", mine), (tmp_path / "theirs.gguf", other))
        ]
        assert ranges[0] == ranges[1], name


def test_what_cannot_be_merged_is_said(whole: Path, parts: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "merged.gguf"
    with pytest.raises(UsageError, match="not one of several files of a split GGUF"):
        merge(whole, out)
    with pytest.raises(UsageError, match=r"must end in \.gguf"):
        merge(parts[0], tmp_path / "merged.bin")
    with pytest.raises(UsageError, match="would replace a file of the source"):
        merge(parts[0], parts[1], overwrite=True)
    parts[2].rename(tmp_path / "away")
    with pytest.raises(InputMissingError, match="part-00003-of-"):
        merge(parts[0], out)
    assert not out.exists()


def test_a_later_file_with_metadata_of_its_own_is_refused(tmp_path: Path) -> None:
    for number in range(2):
        keys = [KeyValue("general.name", STRING, str(number)), KeyValue("split.no", U16, number)]
        keys += [KeyValue("split.count", U16, 2), KeyValue("split.tensors.count", U16, 0)]
        file = gguf_file(f"part-{number + 1:05d}-of-00002.gguf", list[OutputTensor](), keys, 32)
        (tmp_path / file.name).write_bytes(file.header)
    with pytest.raises(FileFormatError, match=r"part-00002-of-00002.gguf: key 'general.name' differs"):
        merge(tmp_path / "part-00001-of-00002.gguf", tmp_path / "merged.gguf")


# ---- without twice the disk ---------------------------------------------------------------------------


def test_parts_are_deleted_only_when_asked_and_at_the_end(whole: Path, parts: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "merged.gguf"
    assert not merge(parts[0], out, delete_parts=True, dry_run=True).resumed_bytes
    assert all(path.exists() for path in parts)
    merge(parts[0], out, delete_parts=True)
    assert out.read_bytes() == whole.read_bytes()
    assert list(parts[0].parent.iterdir()) == []  # the manifest of the set goes with it
    assert verify_manifest(out).mismatches == ()


def test_what_is_no_manifest_stays_when_parts_are_deleted(parts: list[Path], tmp_path: Path) -> None:
    manifest = manifest_of(parts[0])
    manifest.write_text("somebody else's")
    merge(parts[0], tmp_path / "merged.gguf", delete_parts=True)
    assert list(parts[0].parent.iterdir()) == [manifest]
    assert manifest.read_text() == "somebody else's"


def test_room_for_two_parts_is_enough(parts: list[Path], tmp_path: Path) -> None:
    largest = max(sum(t.nbytes for t in part.tensors.values()) for part in open_gguf(parts[0]).parts)
    plan = plan_merge(parts[0], tmp_path / "merged.gguf", delete_parts=True)
    headers = plan.nbytes - sum(tensor.nbytes for tensor in plan.files[0].tensors)
    assert disk_needed(plan) == 2 * largest + headers < plan.nbytes
    assert disk_needed(plan_merge(parts[0], tmp_path / "merged.gguf")) == plan.nbytes


@pytest.mark.parametrize("threads", [1, 4])
def test_no_more_than_that_lies_on_the_disk_twice(
    threads: int, whole: Path, parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However quick the disk is: what is written waits for what is cut, and not for the next record."""
    out = tmp_path / "merged.gguf"
    plan = plan_merge(parts[0], out, delete_parts=True)
    lock = threading.Lock()
    twice, most = 0, 0
    run, cut = Worker.run, consume_module._cut

    def counted_run(worker: Worker, segment: Segment, *arguments: Any) -> Made:
        nonlocal twice, most
        with lock:
            twice += segment.nbytes
            most = max(most, twice)
        return run(worker, segment, *arguments)

    def counted_cut(*arguments: Any) -> int:
        nonlocal twice
        with lock:
            twice -= (freed := cut(*arguments))
        return freed

    monkeypatch.setattr(Worker, "run", counted_run)
    monkeypatch.setattr(consume_module, "_cut", counted_cut)
    execute(plan, threads=threads, record_seconds=60)
    assert out.read_bytes() == whole.read_bytes()
    assert most <= disk_needed(plan) < plan.nbytes


def test_room_is_given_in_the_order_of_the_segments() -> None:
    """The thread of a later segment can come first: were it let through, nothing that it waits for could be cut."""
    room = Room(10)
    first, second = room.ask(6), room.ask(6)
    passed = threading.Event()

    def take_second() -> None:
        room.take(second, lambda: False)
        passed.set()

    threading.Thread(target=take_second, daemon=True).start()
    assert not passed.wait(0.2)
    room.take(first, lambda: False)  # at once
    assert not passed.wait(0.2)
    assert room.wanted.is_set()
    room.give_back(1, 0)  # nothing was cut, and nothing more will be
    assert passed.wait(10)


def test_a_tensor_that_no_room_is_enough_for_does_not_wait_for_ever(
    whole: Path, parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "merged.gguf"
    monkeypatch.setattr("dsv4convert.engine.run.room_needed", lambda plan: 1)
    execute(plan_merge(parts[0], out, delete_parts=True), threads=4, record_seconds=60)
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("after", [False, True], ids=["before the cut", "after the cut"])
@pytest.mark.parametrize("number", range(5))
def test_a_run_that_dies_around_a_cut_goes_on(
    number: int, after: bool, whole: Path, parts: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "merged.gguf"
    child = os.fork()
    if not child:
        try:
            real, seen = consume_module._cut, []

            def dying(path: Path, nbytes: int, known: Identity | None) -> int:
                freed = real(path, nbytes, known) if after else 0
                if len(seen) == number:
                    os._exit(9)
                seen.append(path)
                return freed if after else real(path, nbytes, known)

            consume_module._cut = dying
            execute(plan_merge(parts[0], out, delete_parts=True), threads=2, record_seconds=0.0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    cut = [path for path, keep in plan_merge(parts[0], out, delete_parts=True).consumes if path.stat().st_size == keep]
    assert len(cut) == number + after
    if cut:
        with pytest.raises(FileFormatError, match="extends past the end of the file"):
            open_gguf(parts[0])  # nothing takes what was cut for whole
        with pytest.raises(ResumeError, match="used up by an interrupted run"):
            merge(parts[0], out, delete_parts=True, fresh=True)
        with pytest.raises(ResumeError, match="used up by an interrupted run"):
            merge(parts[0], tmp_path / "another.gguf", delete_parts=True)
        assert not list(tmp_path.glob("another*"))
    with pytest.raises(ResumeError, match="pass --resume"):
        merge(parts[0], out, delete_parts=True)
    merge(parts[0], out, delete_parts=True, resume=True)
    assert out.read_bytes() == whole.read_bytes()
    assert not any(path.exists() for path in parts)
    assert verify_manifest(out).mismatches == ()


def test_a_run_that_dies_before_it_removes_the_parts_finishes_the_job(
    whole: Path, parts: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "merged.gguf"
    execute(plan_merge(parts[0], out, delete_parts=True), threads=1)
    assert all(path.exists() for path in parts)
    summary = merge(parts[0], out, delete_parts=True, resume=True)
    assert summary.resumed_bytes == out.stat().st_size
    assert out.read_bytes() == whole.read_bytes()
    assert not any(path.exists() for path in parts)


@pytest.mark.parametrize("removed", [1, 3, 5])
def test_a_run_that_dies_while_it_removes_the_parts_goes_on(
    removed: int, whole: Path, parts: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "merged.gguf"
    execute(plan_merge(parts[0], out, delete_parts=True), threads=1)
    for path in parts[-removed:]:
        path.unlink()
    merge(parts[0], out, delete_parts=True, resume=True)
    assert out.read_bytes() == whole.read_bytes()
    assert not any(path.exists() for path in parts)


def test_a_run_that_dies_after_the_last_removal_has_done_its_work(
    whole: Path, parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # parts/NAME, which is gone, could be a repository of the hub by its form
    source, out = parts[0].relative_to(tmp_path), Path("merged.gguf")
    merge(source, out, delete_parts=True)
    assert merge(source, out, delete_parts=True, resume=True).resumed_bytes == out.stat().st_size
    with pytest.raises(UsageError, match="exclude each other"):
        merge(source, out, delete_parts=True, resume=True, fresh=True)
    for other in ({"delete_parts": True}, {"resume": True}, {"delete_parts": True, "resume": True, "dry_run": True}):
        with pytest.raises(InputMissingError):
            merge(source, out, **other)  # type: ignore[arg-type]
    for broken in (lambda: shutil.copy(whole, out), lambda: manifest_of(out).unlink()):
        merged = out.read_bytes()
        if broken():
            with out.open("ab") as file:
                file.write(b"\0")
        with pytest.raises((InputMissingError, FileFormatError)):
            merge(source, out, delete_parts=True, resume=True)
        out.write_bytes(merged)


def test_the_output_of_other_files_is_not_taken_for_that_of_the_missing_ones(parts: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "merged.gguf"
    merge(parts[0], out, delete_parts=True)
    other = parts[0].with_name(parts[0].name.replace("part-", "other-"))
    with pytest.raises(InputMissingError, match="no such file"):
        merge(other, out, delete_parts=True, resume=True)


def test_a_dry_run_removes_no_part(parts: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "merged.gguf"
    execute(plan_merge(parts[0], out, delete_parts=True), threads=1)
    parts[-1].unlink()
    with pytest.raises(InputMissingError):
        merge(parts[0], out, delete_parts=True, resume=True, dry_run=True)
    assert all(path.exists() for path in parts[:-1])


@pytest.mark.parametrize("size", [100, 10_000_000], ids=["small", "large"])
def test_what_takes_the_name_of_a_part_is_neither_cut_nor_removed(
    size: int, parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thesis, out = b"t" * size, tmp_path / "merged.gguf"
    away = tmp_path / "away"
    real = consume_module._cut

    def swapping(path: Path, nbytes: int, known: Identity | None) -> int:
        if path == parts[2]:
            path.rename(away)
            path.write_bytes(thesis)
        return real(path, nbytes, known)

    monkeypatch.setattr(consume_module, "_cut", swapping)
    with pytest.raises(FileFormatError, match=f"{parts[2]}: changed during the conversion, and is not used up"):
        merge(parts[0], out, delete_parts=True)
    assert parts[2].read_bytes() == thesis
    away.rename(parts[2])
    monkeypatch.undo()
    plan = plan_merge(parts[0], out, delete_parts=True)
    execute(plan, resume=True)
    parts[2].rename(away)
    parts[2].write_bytes(thesis)
    with pytest.raises(FileFormatError, match=f"{parts[2]}: not the file that was used up, and left in place"):
        remove_parts(plan)
    assert parts[2].read_bytes() == thesis
    parts[2].unlink()
    merge(parts[0], out, delete_parts=True, resume=True)
    assert not any(path.exists() for path in parts)


def test_parts_that_hold_tensors_are_not_removed_for_a_missing_one(
    whole: Path, parts: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "merged.gguf"
    shutil.copy(whole, out)
    parts[-1].unlink()
    with pytest.raises(InputMissingError, match="no such file"):
        merge(parts[0], out, delete_parts=True, resume=True)
    assert all(path.stat().st_size > 10_000 for path in parts[:-1])


def test_an_error_after_a_cut_keeps_the_work(
    whole: Path, parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "merged.gguf"
    with monkeypatch.context() as patch:
        patch.setattr("dsv4convert.engine.conversion.check_unchanged", _refuse)
        with pytest.raises(FileFormatError, match="changed"):
            merge(parts[0], out, delete_parts=True)
    merge(parts[0], out, delete_parts=True, resume=True)
    assert out.read_bytes() == whole.read_bytes()


def _refuse(*_: object) -> None:
    raise FileFormatError("changed")


@pytest.mark.parametrize("kind", ["symlink", "hard link"])
def test_a_file_with_another_name_is_not_used_up(kind: str, parts: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    shutil.move(parts[1], other)
    if kind == "symlink":
        parts[1].symlink_to(other)
    else:
        os.link(other, parts[1])
    with pytest.raises(UsageError, match="--delete-parts: the file is a link or has a second name"):
        merge(parts[0], tmp_path / "merged.gguf", delete_parts=True)
    merge(parts[0], tmp_path / "merged.gguf")
    assert other.stat().st_size > 100_000


def test_killed_at_any_moment_a_merge_goes_on(whole: Path, tiny: Path, tmp_path: Path) -> None:
    paths = split(tiny, tmp_path / "parts", split_max_tensors=1)
    out = tmp_path / "merged.gguf"
    codes = []
    runs = 100
    for run in range(runs):
        child = os.fork()
        if not child:
            try:
                merge(paths[0], out, delete_parts=True, resume=True, threads=2)
                os._exit(0)
            finally:
                os._exit(1)
        if run < runs - 1:  # the last may take its time, on a machine that is busy
            time.sleep(0.004 * run)
            os.kill(child, signal.SIGKILL)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        if codes[-1] != -signal.SIGKILL:
            break
    assert codes[-1] == 0
    assert len(codes) > 2
    assert out.read_bytes() == whole.read_bytes()
    assert not any(path.exists() for path in paths)
