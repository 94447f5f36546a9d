"""The build hook: what it builds for which machine, and what becomes of a machine or a compiler that it cannot use."""

from __future__ import annotations

import importlib.util
import struct
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from dsv4convert.formats.compiled.library import _X86_64_FLAGS, FOLDER

ROOT = Path(__file__).parents[1]
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


@pytest.fixture
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_level_that_is_built_can_be_chosen(hook: ModuleType) -> None:
    assert list(hook.LEVELS["x86_64"]) == list(_X86_64_FLAGS)
    assert list(hook.LEVELS["aarch64"]) == ["aarch64"]


def test_the_compiler_is_told_to_round_as_numpy(hook: ModuleType) -> None:
    flags = [*hook.FLAGS, *(flag for levels in hook.LEVELS.values() for options in levels.values() for flag in options)]
    assert "-ffp-contract=off" in flags
    assert not [flag for flag in flags if "fast" in flag or "unsafe" in flag]


def test_a_machine_that_is_served_has_its_libraries(hook: ModuleType) -> None:
    """The tests of the compiled codecs are skipped without them, so a build that failed would pass unseen."""
    machine = hook.target_machine()
    if machine is None:
        pytest.skip("a package of pure Python is meant here")
    missing = [level for level in hook.LEVELS[machine] if not (FOLDER / f"codecs-{level}.so").is_file()]
    assert missing == [], "run python hatch_build.py"


@pytest.mark.parametrize("machine", ELF_MACHINES)
def test_libraries_are_for_their_machine_and_the_same_each_time(hook: ModuleType, machine: str, tmp_path: Path) -> None:
    pytest.importorskip("ziglang")
    built = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        files = hook.build_libraries(machine, folder)
        assert [file.name for file in files] == [f"codecs-{level}.so" for level in hook.LEVELS[machine]]
        assert sorted(folder.iterdir()) == sorted(files)
        built.append([file.read_bytes() for file in files])
    assert built[0] == built[1]
    assert {struct.unpack_from("<H", data, 18)[0] for data in built[0]} == {ELF_MACHINES[machine]}


@pytest.mark.parametrize(
    ("system", "machine", "target"),
    [
        ("Linux", "x86_64", "x86_64"),
        ("Linux", "aarch64", "aarch64"),
        ("Linux", "riscv64", None),
        ("Darwin", "x86_64", None),
        ("Windows", "AMD64", None),
    ],
)
def test_the_target_is_this_machine_where_it_is_served(
    hook: ModuleType, system: str, machine: str, target: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(hook.TARGET_VARIABLE, raising=False)
    monkeypatch.setattr(hook.platform, "system", lambda: system)
    monkeypatch.setattr(hook.platform, "machine", lambda: machine)
    assert hook.target_machine() == target


def test_the_target_can_be_named(hook: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, target in (("aarch64", "aarch64"), ("x86_64", "x86_64"), ("none", None)):
        monkeypatch.setenv(hook.TARGET_VARIABLE, name)
        assert hook.target_machine() == target
    monkeypatch.setenv(hook.TARGET_VARIABLE, "sparc")
    with pytest.raises(ValueError, match="DSV4CONVERT_TARGET: expected x86_64, aarch64 or none, got 'sparc'"):
        hook.target_machine()


class FakeApp:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def display_warning(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def run_hook(hook: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Run the hook; return what it told hatchling and its warnings."""

    def run(target: str = "wheel") -> tuple[dict, list[str]]:
        plugin = object.__new__(type("Plugin", (hook.CodecsBuildHook,), {"target_name": target, "app": FakeApp()}))
        data: dict = {"force_include": {}}
        plugin.initialize("standard", data)
        return data, plugin.app.warnings

    monkeypatch.delenv(hook.TARGET_VARIABLE, raising=False)
    return run


PURE = {"force_include": {}}


def test_a_machine_that_is_not_served_gets_a_pure_wheel_and_a_warning(hook, run_hook, monkeypatch) -> None:
    monkeypatch.setattr(hook.platform, "machine", lambda: "riscv64")
    assert run_hook() == (PURE, ["no compiled codecs for Linux on riscv64; numpy serves, slower"])


@pytest.mark.parametrize(
    "error", [RuntimeError("ziglang is not installed"), subprocess.CalledProcessError(1, "zig"), OSError("disk full")]
)
def test_a_failing_build_gives_a_pure_wheel_and_a_warning(hook, run_hook, monkeypatch, error) -> None:
    def fail(machine: str, folder: Path) -> list[Path]:
        raise error

    monkeypatch.setattr(hook.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(hook, "build_libraries", fail)
    assert run_hook() == (PURE, [f"the compiled codecs were not built ({error}); numpy serves, slower"])
    # Who names a machine wants its libraries.
    monkeypatch.setenv(hook.TARGET_VARIABLE, "x86_64")
    with pytest.raises(type(error)):
        run_hook()


def test_no_ziglang_is_told(hook, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(hook.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="ziglang is not installed"):
        hook.build_libraries("x86_64", tmp_path)


def test_a_wheel_is_for_its_machine_and_holds_every_level(hook, run_hook, monkeypatch) -> None:
    pytest.importorskip("ziglang")
    monkeypatch.setenv(hook.TARGET_VARIABLE, "aarch64")
    data, warnings = run_hook()
    assert warnings == []
    assert data["pure_python"] is False
    assert data["tag"] == "py3-none-manylinux_2_17_aarch64.manylinux2014_aarch64.musllinux_1_1_aarch64"
    assert list(data["force_include"].values()) == ["dsv4convert/formats/compiled/codecs-aarch64.so"]


def test_an_sdist_holds_no_library(run_hook) -> None:
    assert run_hook("sdist") == (PURE, [])
