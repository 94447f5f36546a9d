"""Outputs that could never get their name are refused before any work, on mounts, overlays and in others' folders."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from ..command_line import run_cli
from .restricted import (
    CAP_DAC_OVERRIDE,
    CAP_FOWNER,
    can_mount,
    command,
    drop_capabilities,
    run,
    run_in_namespace,
    without_renames,
)

EXISTS = 9
OVERLAY = "mount -t tmpfs -o size={size} tmpfs top; mkdir top/upper top/work; \
mount -t overlay -o lowerdir=lower,upperdir=top/upper,workdir=top/work overlay merged"
SMALL, LARGE = "12m", "64m"
OWNER, OTHER_OWNER = 1001, 1002


@pytest.fixture
def base(fast_tmp: Path) -> Path:
    """Return a folder with the mount points that the tests use."""
    for name in ("lower", "top", "merged", "mounted"):
        (fast_tmp / name).mkdir()
    return fast_tmp


def needs(mounts: str, base: Path, mapped: bool = False) -> None:
    if not can_mount(mounts, base, mapped):
        pytest.skip("this machine does not permit these mounts in a namespace")


def needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files to other users")


def convert(source: Path, out: Path | str, *options: str) -> list[object]:
    """Return the arguments of a conversion to a file or, where the name does not say so, to a folder."""
    return ["hf-to-gguf" if str(out).endswith(".gguf") else "dequantize", source, out, *options]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- mount points


def test_a_mounted_file_is_refused_before_any_work(tiny: Path, base: Path) -> None:
    (base / "older").write_bytes(b"older")
    (base / "lower/model.gguf").write_bytes(b"")
    mounts = "mount --bind older lower/model.gguf"
    needs(mounts, base)
    done = run_in_namespace(mounts, *convert(tiny, "lower/model.gguf", "--overwrite"), cwd=base)
    assert done.returncode == EXISTS
    assert "lower/model.gguf: a mount point cannot be replaced; choose another name" in done.stderr
    assert contents(base / "lower") == {"model.gguf": b""}
    assert (base / "older").read_bytes() == b"older"


def test_a_mounted_folder_is_refused_before_any_work_and_in_the_plan(tiny: Path, base: Path) -> None:
    mounts = "mount -t tmpfs tmpfs mounted"
    needs(mounts, base)
    done = run_in_namespace(mounts, *convert(tiny, "mounted"), cwd=base)
    assert done.returncode == EXISTS
    assert "mounted: a mount point cannot be replaced; choose a name inside the mount point, or copy" in done.stderr
    assert sorted(path.name for path in base.iterdir()) == ["lower", "merged", "mounted", "top"]
    planned = run_in_namespace(mounts, *convert(tiny, "mounted", "--dry-run"), cwd=base)
    assert planned.returncode == 0
    assert "note: mounted: a mount point cannot be replaced; choose a name inside the mount point" in planned.stdout
    inside = run_in_namespace(mounts, *convert(tiny, "mounted/bf16"), cwd=base)
    assert inside.returncode == 0, inside.stderr


@pytest.mark.parametrize("name", ["model.gguf", "bf16"])
def test_a_read_only_file_system_is_named_and_no_output_that_is_not_there(name: str, tiny: Path, base: Path) -> None:
    mounts = f"mount -t tmpfs -o size={LARGE} tmpfs mounted"
    freeze = "mount -o remount,ro mounted"
    needs(f"{mounts}; {freeze}", base)
    older = shlex.join(command(*convert(tiny, f"mounted/{name}")))
    for before, options, message in (
        (mounts, (), f"mounted/{name}.journal: cannot be opened"),
        (f"{mounts}; {older}", ("--overwrite",), r"mounted/\S+: could not be replaced"),
    ):
        made = convert(tiny, f"mounted/{name}", *options)
        done = run_in_namespace(f"{before}; {freeze}", *made, cwd=base)
        assert done.returncode != 0
        expected = rf"error: {message} \(Read-only file system\); choose another folder for the output\n"
        assert re.fullmatch(expected, done.stderr), done.stderr


# ---- overlays


def test_a_folder_in_a_lower_layer_is_refused_before_any_work(tiny: Path, base: Path) -> None:
    assert run_cli(*convert(tiny, base / "lower/bf16")).code == 0
    before = contents(base / "lower")
    mounts = OVERLAY.format(size=LARGE)
    needs(mounts, base)
    done = run_in_namespace(mounts, *convert(tiny, "merged/bf16", "--overwrite"), cwd=base)
    assert done.returncode == EXISTS, done.stderr
    assert "merged/bf16: lies in a lower layer of an overlay" in done.stderr
    assert contents(base / "lower") == before


def test_a_new_folder_over_lower_layers_is_made_and_replaced(tiny: Path, base: Path) -> None:
    mounts = OVERLAY.format(size=LARGE)
    needs(mounts, base)
    first = shlex.join(command(*convert(tiny, "merged/bf16", "--quiet")))
    for before in (mounts, f"{mounts}\n{first}"):
        done = run_in_namespace(before, *convert(tiny, "merged/bf16", "--overwrite"), cwd=base)
        assert done.returncode == 0, done.stderr


def test_a_file_in_a_lower_layer_is_replaced_without_being_copied(tiny: Path, base: Path) -> None:
    """The upper layer has room for the new file alone."""
    (base / "lower/model.gguf").write_bytes(os.urandom(2**25))
    mounts = OVERLAY.format(size=SMALL)
    needs(mounts, base)
    done = run_in_namespace(mounts, *convert(tiny, "merged/model.gguf", "--overwrite"), cwd=base)
    assert done.returncode == 0, done.stderr


def test_an_overlay_that_renames_no_folder_is_found_out_before_any_work(tiny: Path, base: Path) -> None:
    """Without extended attributes in the upper layer, as containers without root can have it."""
    mounts = OVERLAY.format(size=LARGE)
    rename = shlex.join([sys.executable, "-c", "import os; os.mkdir('merged/1'); os.rename('merged/1', 'merged/2')"])
    needs(mounts, base, mapped=True)
    if can_mount(f"{mounts}; {rename}", base, mapped=True):
        pytest.skip("overlays of this machine rename folders without extended attributes")
    done = run_in_namespace(mounts, *convert(tiny, "merged/bf16"), cwd=base, mapped=True)
    assert done.returncode == EXISTS, done.stderr
    assert "what is made in this folder cannot be renamed" in done.stderr
    assert "convert to another file system and copy the finished output" in done.stderr
    done = run_in_namespace(mounts, *convert(tiny, "merged/model.gguf"), cwd=base, mapped=True)
    assert done.returncode == 0, done.stderr


# ---- others' folders


@pytest.mark.parametrize("name", ["model.gguf", "bf16"])
@pytest.mark.parametrize("theirs", ["", ".manifest.json"], ids=["output", "manifest"])
def test_an_output_of_another_user_in_a_sticky_folder_is_refused_before_any_work(
    name: str, theirs: str, tiny: Path, base: Path
) -> None:
    needs_root()
    folder = base / "sticky"
    folder.mkdir()
    assert run_cli(*convert(tiny, folder / name)).code == 0
    before = contents(folder)
    os.chown(folder, OWNER, OWNER)
    os.chmod(folder, 0o1777)
    os.chown(folder / (name + theirs), OTHER_OWNER, OTHER_OWNER)
    done = run(
        *convert(tiny, folder / name, "--overwrite"), before=partial(drop_capabilities, CAP_FOWNER, CAP_DAC_OVERRIDE)
    )
    assert done.returncode == EXISTS, done.stderr
    assert f"{folder / (name + theirs)}: could not be replaced (Operation not permitted)" in done.stderr
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["model.gguf", "bf16"])
def test_a_folder_that_lets_no_name_change_is_found_out_before_any_work(name: str, tiny: Path, base: Path) -> None:
    done = run(*convert(tiny, base / "lower" / name), before=without_renames)
    assert done.returncode == EXISTS, done.stderr
    assert f"{base / 'lower'}: what is made in this folder cannot be renamed (Operation not permitted)" in done.stderr
    assert list((base / "lower").iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("name", ["model.gguf", "bf16"])
def test_what_a_killed_trial_left_goes_and_anything_else_under_its_name_stays(
    name: str, kind: str, tiny: Path, base: Path
) -> None:
    trial = base / "lower" / f"{name}.trial"
    make: Callable[[], object] = trial.touch if kind == "file" else trial.mkdir
    make()
    assert run_cli(*convert(tiny, base / "lower" / name)).code == 0
    assert not trial.exists()
    make()
    thesis = trial if kind == "file" else trial / "thesis"
    thesis.write_bytes(b"three years of work")
    done = run_cli(*convert(tiny, base / "lower" / name, "--overwrite"))
    assert done.code == EXISTS
    assert f"{trial}: already exists and is not of dsv4convert" in done.error
    assert thesis.read_bytes() == b"three years of work"
