"""What is somebody else's stays, whatever happens while a run lasts or between a kill and the next run."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.engine import locks, names, outputs
from dsv4convert.engine.conversion import execute
from dsv4convert.engine.fingerprint import fingerprint_of
from dsv4convert.engine.journal import Journal, journal_path
from dsv4convert.engine.manifest import manifest_path
from dsv4convert.engine.outputs import outputs_of, partial_path, replaced_path
from dsv4convert.errors import Dsv4Error, InputOutputError, LockedError, OutputExistsError, ResumeError, UsageError
from dsv4convert.plan import Plan
from dsv4convert.targets.dequantize import plan_dequantize
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions

from .histories import KILL, NEVER_SECONDS, Deed, World
from .plans import PLANS, contents, failing_after, interrupt, leftovers
from .test_journal import line

THESIS = b"three years of work"


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Plan:
    return PLANS[request.param](tiny, tmp_path)


def names_of(plan: Plan) -> list[str]:
    return [file.name for file in plan.files]


def put(plan: Plan) -> Path:
    """Put something of somebody else's where the output will be; return the file that must stay."""
    path = plan.output_path()
    if plan.is_folder:
        path.mkdir()
        path /= "thesis.tex"
    path.write_bytes(THESIS)
    return path


def during(action: Callable[[], object]) -> Callable[[object], None]:
    """Return a hook that acts while all files still have their temporary names."""
    return lambda report: (action(), None)[1]


@pytest.fixture(params=["renameat2", "links", "neither"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the system have all means, hard links only, or nothing but a plain rename."""
    if request.param != "renameat2":

        def refuse(*args: object) -> None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr(names, "_renameat2", refuse)
    if request.param == "neither":

        def no_links(*args: object, **options: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", no_links)
    return str(request.param)


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
def test_what_takes_the_name_during_a_run_stays(plan: Plan, system: str, overwrite: bool) -> None:
    path: list[Path] = []
    with pytest.raises(OutputExistsError, match="appeared or changed during the conversion") as caught:
        execute(plan, threads=2, overwrite=overwrite, before_finish=during(lambda: path.append(put(plan))))
    assert "run again with --resume" in str(caught.value)
    assert path[0].read_bytes() == THESIS
    # With the stranger out of the way, nothing is lost of the work either.
    shutil.rmtree(path[0].parent) if plan.is_folder else path[0].unlink()
    assert execute(plan, threads=2, resume=True).resumed_bytes == sum(
        tensor.nbytes for file in plan.files for tensor in file.tensors
    )
    assert leftovers(plan.destination.parent if plan.is_folder else plan.destination) == []


def test_what_takes_the_name_after_a_kill_stays(plan: Plan, system: str) -> None:
    interrupt(plan, 5)
    path = put(plan)
    with pytest.raises(OutputExistsError, match="appeared or changed"):
        execute(plan, threads=2, resume=True)
    assert path.read_bytes() == THESIS


def test_an_older_output_that_changes_during_the_run_stays(plan: Plan, system: str) -> None:
    execute(plan, threads=2)
    old = plan.output_path() / "config.json" if plan.is_folder else plan.final_paths()[-1]

    def change() -> None:
        old.unlink()
        old.write_bytes(THESIS)

    with pytest.raises(OutputExistsError, match="appeared or changed"):
        execute(plan, threads=2, overwrite=True, before_finish=during(change))
    assert old.read_bytes() == THESIS


def test_an_older_output_is_replaced_where_asked(plan: Plan, system: str) -> None:
    execute(plan, threads=2)
    good = contents(plan)
    first = plan.final_paths()[0]
    first.write_bytes(b"old")
    execute(plan, threads=2, overwrite=True)
    assert contents(plan) == good
    assert leftovers(plan.destination.parent if plan.is_folder else plan.destination) == []


@pytest.mark.parametrize("of_another_disk", [False, True], ids=["all of one disk", "the older output of another disk"])
def test_an_older_output_is_known_again_when_its_disk_has_another_number(plan: Plan, of_another_disk: bool) -> None:
    """Numbers of devices change when a machine restarts."""
    execute(plan, threads=2)
    good = contents(plan)
    plan.final_paths()[0].write_bytes(b"old")
    interrupt(plan, 3, overwrite=True)
    journal = journal_path(plan)
    facts = [json.loads(text.partition(b" ")[2]) for text in journal.read_bytes().splitlines()]
    for fact in facts:
        if "replaces" in fact:
            fact["replaces"] = [[device + 1, *others] for device, *others in fact["replaces"]]
            fact["held"] = {name: [device + 1, *others] for name, (device, *others) in fact["held"].items()}
            fact["device"] += not of_another_disk
    journal.write_bytes(b"".join(line(fact) for fact in facts))
    if of_another_disk:
        with pytest.raises(OutputExistsError, match="appeared or changed"):
            execute(plan, threads=2, overwrite=True, resume=True)
        assert plan.final_paths()[0].read_bytes() == b"old"
    else:
        assert execute(plan, threads=2, overwrite=True, resume=True).resumed_bytes > 0
        assert contents(plan) == good
        assert leftovers(plan.destination.parent if plan.is_folder else plan.destination) == []


@pytest.mark.parametrize("how", [{}, {"fresh": True}, {"overwrite": True}, {"resume": True}], ids=str)
@pytest.mark.parametrize("which", [journal_path, manifest_path], ids=["journal", "manifest"])
def test_files_under_our_names_that_are_not_ours_stay(
    plan: Plan, which: Callable[[Plan], Path], how: dict[str, bool]
) -> None:
    which(plan).write_bytes(THESIS)
    with pytest.raises(OutputExistsError, match=r"not a (journal|manifest) of dsv4convert"):
        execute(plan, threads=2, **how)  # type: ignore[arg-type]
    assert which(plan).read_bytes() == THESIS
    assert not plan.output_path().exists()


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
@pytest.mark.parametrize("which", [journal_path, manifest_path], ids=["journal", "manifest"])
def test_folders_pipes_and_links_under_our_names_are_refused_at_once(
    plan: Plan, which: Callable[[Plan], Path], kind: str, tmp_path: Path
) -> None:
    path = which(plan)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        (tmp_path / "mine").write_bytes(THESIS)
        path.symlink_to(tmp_path / "mine")
    with pytest.raises(OutputExistsError, match="not a regular file"):
        execute(plan, threads=2, overwrite=True)
    assert os.path.lexists(path)
    assert kind != "link" or (tmp_path / "mine").read_bytes() == THESIS


def test_a_manifest_that_appears_during_the_run_stays(plan: Plan) -> None:
    with pytest.raises(OutputExistsError, match="not a manifest of dsv4convert"):
        execute(plan, threads=2, before_finish=during(lambda: manifest_path(plan).write_bytes(THESIS)))
    assert manifest_path(plan).read_bytes() == THESIS


def test_a_replaced_name_that_is_not_ours_stays(plan: Plan) -> None:
    execute(plan, threads=2)
    stranger = replaced_path(plan.output_path())
    interrupt(plan, 3, overwrite=True)
    if plan.is_folder:
        stranger.mkdir()
        (stranger / "thesis").write_bytes(THESIS)
    else:
        stranger.write_bytes(THESIS)
    if plan.is_folder or len(plan.files) == 1:
        execute(plan, threads=2, resume=True)
    else:  # the old first part of a split needs this very name
        with pytest.raises(Dsv4Error, match="cannot be renamed"):
            execute(plan, threads=2, resume=True)
    kept = stranger / "thesis" if plan.is_folder else stranger
    assert kept.read_bytes() == THESIS


def test_an_older_file_that_is_edited_in_place_stays(tiny: Path, tmp_path: Path, system: str) -> None:
    plan = PLANS["dequantize"](tiny, tmp_path)
    execute(plan, threads=2)
    old = plan.output_path() / "config.json"

    def edit() -> None:
        with old.open("r+b") as file:
            file.write(THESIS)

    with pytest.raises(OutputExistsError, match="appeared or changed"):
        execute(plan, threads=2, overwrite=True, before_finish=during(edit))
    assert old.read_bytes().startswith(THESIS)


@pytest.mark.parametrize("killed_after", [0, 2])
def test_what_is_put_into_a_replaced_folder_stays_under_any_name(
    killed_after: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the older folder was being removed; somebody then put a file there that a checkpoint could have."""
    plan = PLANS["dequantize"](tiny, tmp_path)
    execute(plan, threads=2)
    good = contents(plan)

    class Killed(BaseException):
        pass

    unlink, left = os.unlink, killed_after

    def dies(path: str, **options: int) -> None:
        nonlocal left
        if "dir_fd" in options:
            left -= 1
            if left < 0:
                raise Killed
        unlink(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "unlink", dies)
    with pytest.raises(Killed):
        execute(plan, threads=2, overwrite=True)
    monkeypatch.undo()
    folder = partial_path(plan.destination)
    mine = {"notes.json", "LICENSE", "generation_config.json"}
    for name in mine:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(THESIS)
    execute(plan, threads=2, resume=True)
    assert contents(plan) == good
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == dict.fromkeys(mine, THESIS)


def test_nothing_is_made_for_a_name_that_is_taken_already(plan: Plan) -> None:
    interrupt(plan, 5)
    path = put(plan)
    with failing_after(0), pytest.raises(OutputExistsError, match="appeared or changed"):
        execute(plan, threads=2, resume=True)
    assert path.read_bytes() == THESIS


def test_a_folder_that_gave_its_name_back_is_discarded_whole(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is swapped between the last look and the rename; what is discarded then is the work and nothing else."""
    plan = PLANS["dequantize"](tiny, tmp_path)
    root = partial_path(plan.destination)
    take_final_name = outputs.take_final_name

    def swap(path: Path, *arguments: Any) -> None:
        if path == root:
            (root / "config.json").rename(tmp_path / "moved")
            (root / "config.json").write_bytes(THESIS)
        take_final_name(path, *arguments)

    monkeypatch.setattr(outputs, "take_final_name", swap)
    work = outputs_of(plan)
    work.look()
    work.create()
    with pytest.raises(InputOutputError, match="no longer the file that was written"):
        work.finish()
    assert not plan.destination.exists()
    work.discard()
    work.close()
    assert {path.name: path.read_bytes() for path in root.iterdir()} == {"config.json": THESIS}


# ---- the work itself


@pytest.mark.parametrize("trick", ["in place", "another file", "a stale copy"])
def test_work_that_is_not_as_it_was_left_is_refused(plan: Plan, trick: str) -> None:
    paths = outputs_of(plan).paths
    stale = plan.source.parent / "stale"
    shutil.rmtree(stale, ignore_errors=True)
    interrupt(plan, 30)
    with Journal(journal_path(plan)) as journal:
        index = next(file for file, tensor, segment in journal.finished() if plan.files[file].tensors)
        task = next(entry.task for key, entry in journal.finished().items() if key[0] == index)
    path = paths[index]
    data = bytearray(path.read_bytes())
    data[task.offset] ^= 1
    if trick == "in place":
        with path.open("r+b") as file:
            file.write(data)
    elif trick == "another file":
        path.unlink()
        path.write_bytes(data)
    else:
        other = path.with_name("copy")
        other.write_bytes(data)
        os.replace(other, path)
    with pytest.raises(ResumeError, match="differs from what the interrupted run wrote"):
        execute(plan, threads=2, resume=True)
    assert not plan.output_path().exists() or plan.is_folder is False


def test_a_temporary_file_that_was_replaced_gets_no_name(plan: Plan) -> None:
    """Moved away, with eight bytes of garbage in its place."""
    path = outputs_of(plan).paths[0]

    def replace() -> None:
        path.rename(path.with_name("moved"))
        path.write_bytes(b"garbage!")

    with pytest.raises(InputOutputError, match="no longer the file that was written"):
        execute(plan, threads=2, before_finish=during(replace))
    assert not os.path.lexists(plan.output_path())


def test_a_temporary_file_that_was_cut_gets_no_name(plan: Plan) -> None:
    path = outputs_of(plan).paths[0]
    with pytest.raises(InputOutputError, match="the size differs from what was written"):
        execute(plan, threads=2, before_finish=during(lambda: os.truncate(path, 8)))
    assert not os.path.lexists(plan.output_path())


def test_a_second_run_without_the_first_ones_journal_is_refused(plan: Plan) -> None:
    """The journal of a living run was removed by hand: its files are locked all the same."""

    def second() -> None:
        journal_path(plan).unlink()
        with pytest.raises(LockedError, match="another run is writing this output"):
            execute(plan, threads=2, fresh=True)

    execute(plan, threads=2, before_finish=during(second))
    assert set(contents(plan))


def test_resume_and_fresh_exclude_each_other(plan: Plan) -> None:
    interrupt(plan, 5)
    with pytest.raises(UsageError, match="--resume and --fresh"):
        execute(plan, resume=True, fresh=True)
    execute(plan, threads=2, resume=True)


# ---- splits


@pytest.mark.parametrize("dies_before", range(8))
def test_a_split_is_never_a_mixture(
    dies_before: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between any two renames: with the first part there, all parts are of one run."""
    old = plan_gguf(tiny, tmp_path / "model.gguf", GgufOptions(split_max_bytes=1_500_000), name="old")
    execute(old, threads=2)
    before = {path.name: path.read_bytes() for path in old.final_paths()}
    new = plan_gguf(tiny, tmp_path / "model.gguf", GgufOptions(split_max_bytes=1_500_000, dense="q8_0"))
    assert names_of(new) == names_of(old)
    (tmp_path / "whole").mkdir()
    good = plan_gguf(tiny, tmp_path / "whole" / "model.gguf", GgufOptions(split_max_bytes=1_500_000, dense="q8_0"))
    execute(good, threads=2)
    after = {path.name: path.read_bytes() for path in good.final_paths()}
    real, left = names._renameat2, dies_before

    class Killed(BaseException):
        pass

    def counting(*args: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(names, "_renameat2", counting)
    died = False
    try:
        execute(new, threads=2, overwrite=True)
    except Killed:
        died = True
    monkeypatch.setattr(names, "_renameat2", real)
    now = {path.name: path.read_bytes() for path in new.final_paths() if path.exists()}
    if names_of(new)[0] in now and died:
        assert any(all(now[name] == run[name] for name in now) for run in (before, after))
    if died:
        execute(new, threads=2, overwrite=True, resume=True)
    assert leftovers(tmp_path) == []
    assert contents(new) == contents(good)


def test_the_later_parts_have_their_names_for_good_before_the_first(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power loss undoes what the folder's fsync has not made durable, in any order."""
    plan = PLANS["split gguf"](tiny, tmp_path)
    execute(plan, threads=2)
    steps: list[str] = []
    sync_folder, take_final_name, rename_new = outputs.sync_folder, outputs.take_final_name, outputs.rename_new

    def noting(name: str, function: Callable[..., None], path: int) -> Callable[..., None]:
        return lambda *arguments: (steps.append(f"{name} {arguments[path].name}"), function(*arguments))[1]

    monkeypatch.setattr(outputs, "sync_folder", noting("sync", sync_folder, 0))
    monkeypatch.setattr(outputs, "take_final_name", noting("name", take_final_name, 1))
    monkeypatch.setattr(outputs, "rename_new", noting("leave", rename_new, 0))
    execute(plan, threads=2, overwrite=True)
    first, *others = names_of(plan)
    sync = f"sync {tmp_path.name}"
    order = [f"leave {first}", sync, *(f"name {name}" for name in reversed(others)), sync, f"name {first}", sync]
    assert steps[steps.index(order[0]) :][: len(order)] == order


# ---- the source


@pytest.mark.parametrize("name", ["", ".partial", ".journal", ".manifest.json", ".manifest.json.partial", ".replaced"])
@pytest.mark.parametrize("link", ["hard", "folder"])
def test_no_name_that_is_written_may_be_a_file_of_the_source(name: str, link: str, tiny: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny, tmp_path / "source")
    weights = next(source.glob("*.safetensors"))
    good = weights.read_bytes()
    if link == "hard":
        (tmp_path / "out").mkdir()
        os.link(weights, tmp_path / "out" / f"model.gguf{name}")
    else:
        weights.rename(source / f"model.gguf{name}")
        weights.symlink_to(f"model.gguf{name}")
        (tmp_path / "out").symlink_to(source)
    plan = plan_gguf(source, tmp_path / "out" / "model.gguf", GgufOptions())
    for how in ({"overwrite": True}, {"fresh": True}, {"overwrite": True, "fresh": True}):
        with pytest.raises(UsageError, match="the output would replace a file of the source"):
            execute(plan, threads=2, **how)  # type: ignore[arg-type]
    assert weights.read_bytes() == good


# ---- what could never be renamed


@pytest.mark.parametrize("length", [240, 250])
def test_a_name_without_room_for_its_suffixes_is_refused(length: int, tiny: Path, tmp_path: Path) -> None:
    name = "m" * (length - 5)
    gguf = plan_gguf(tiny, tmp_path / f"{name}.gguf", GgufOptions())
    folder = plan_dequantize(tiny, tmp_path / f"{name}-bf16", max_file_bytes=10**9)
    for plan in (gguf, folder):
        with pytest.raises(OutputExistsError, match=rf"too long .* expected at most \d+ bytes, got {length}"):
            execute(plan, threads=2)
    assert list(tmp_path.iterdir()) == []


def test_mount_points_are_refused(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(plan, threads=2)
    good = contents(plan)
    monkeypatch.setattr(names, "_is_mount_point", lambda path: True)
    with pytest.raises(OutputExistsError, match="mount point"):
        execute(plan, threads=2, overwrite=True)
    assert contents(plan) == good


def test_a_mounted_folder_is_known_for_one() -> None:
    assert names._is_mount_point(Path("/proc"))
    assert not names._is_mount_point(Path("/proc/self"))


def test_an_output_that_is_a_link_to_a_folder_names_its_target(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "bf16").symlink_to(tmp_path / "real")
    with pytest.raises(OutputExistsError, match=r"is a link; pass the target of the link, .*/real"):
        execute(PLANS["dequantize"](tiny, tmp_path), threads=2)


# ---- locks


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_flock_another_lock_holds(plan: Plan, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "_flock", refuse)
    with Journal(journal_path(plan)), pytest.raises(LockedError, match="another run is writing this output"):
        execute(plan, threads=2)
    execute(plan, threads=2)


def test_without_any_lock_a_lock_file_holds(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks, "_flock", refuse)
    monkeypatch.setattr(locks, "_description_lock", refuse)
    lock_file = journal_path(plan).with_suffix(".lock")
    with Journal(journal_path(plan)):
        assert lock_file.read_text().startswith("dsv4convert lock\n")
        with pytest.raises(LockedError, match=f"got process {os.getpid()} on "):
            execute(plan, threads=2)
    execute(plan, threads=2)
    assert not lock_file.exists()


def test_the_lock_file_of_a_dead_process_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.lock"
    held = locks.LockFile(path)
    lines = path.read_text().split("\n")
    held.release()
    path.write_text("\n".join([lines[0], "4194305", *lines[2:]]))  # beyond the largest process number
    locks.LockFile(path).release()
    path.write_text("\n".join([lines[0], lines[1], lines[2], "another boot", ""]))
    locks.LockFile(path).release()
    path.write_text("\n".join([lines[0], lines[1], "another-host", lines[3], ""]))
    with pytest.raises(LockedError, match="another-host"):
        locks.LockFile(path)
    path.write_bytes(THESIS)
    with pytest.raises(OutputExistsError, match="not a lock of dsv4convert"):
        locks.LockFile(path)
    assert path.read_bytes() == THESIS


def test_without_locks_at_all_a_run_can_be_asked_to_take_none(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(locks, "_flock", refuse)
    with pytest.raises(LockedError, match="--no-lock"):
        execute(plan, threads=2)
    assert leftovers(plan.destination.parent if plan.is_folder else plan.destination) == []
    execute(plan, threads=2, lock=False)


@pytest.mark.parametrize("fails_at", range(1, 4))
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_lock_that_fails_on_a_later_file_leaves_nothing_behind(
    fails_at: int, number: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PLANS["split gguf"](tiny, tmp_path)
    real, calls = locks._flock, 0

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at + 1:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks, "_flock", failing)
        with pytest.raises(Dsv4Error):
            execute(plan, threads=2)
    assert list(tmp_path.iterdir()) == []
    execute(plan, threads=2)


def test_partial_names_of_strangers_stay(plan: Plan) -> None:
    path = partial_path(plan.output_path())
    os.mkfifo(path)
    with pytest.raises(Dsv4Error):
        execute(plan, threads=2, fresh=True)
    assert path.is_fifo()


@pytest.mark.parametrize("shape", ["file", "split", "folder"])
def test_a_fresh_run_that_dies_as_it_discards_older_work_goes_on(shape: str, tmp_path: Path) -> None:
    """The older work can be of another plan, or an older output that was just replaced: nothing in it is like ours."""
    resumed = 0
    for call in range(30, 1000):  # the new journal begins later
        world = World(tmp_path / str(call), shape)
        with failing_after(1), pytest.raises(InputOutputError):
            execute(world.planned("old"), threads=1, record_seconds=NEVER_SECONDS)
        theirs = partial_path(world.plan.output_path()).with_name("theirs.partial")
        theirs.write_bytes(THESIS)
        child = os.fork()  # so that the dead run's files are closed
        if not child:
            try:
                os._exit(0 if world.run({call: Deed(KILL)}, fresh=True) == "done" else 9)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not code:
            break
        assert code == 9
        journal = journal_path(world.plan)
        begun = journal.exists() and fingerprint_of(world.plan)["plan"].encode() in journal.read_bytes()
        ended = world.run({}, resume=True)
        assert ended == "done" or not begun, f"before call {call}: {ended}"
        assert theirs.read_bytes() == THESIS
        resumed += begun
    assert resumed > 10
