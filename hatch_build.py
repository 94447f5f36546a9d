"""Builds the compiled codecs: C to one shared library per processor level, with clang from PyPI's ziglang.

``pip install`` runs it as hatchling's build hook. ``python hatch_build.py`` builds the libraries for this machine
into the package's folder, as an editable install does. DSV4CONVERT_TARGET=x86_64, aarch64 or none builds a wheel for
another machine, or one without compiled codecs. A platform that is no target, or a failing build, gives a package of
pure Python and a warning: numpy serves there, slower.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a program
    BuildHookInterface = object

ROOT = Path(__file__).parent
FOLDER = ROOT / "dsv4convert" / "formats" / "compiled"
SOURCE = FOLDER / "segments.c"  # includes the others

TARGET_VARIABLE = "DSV4CONVERT_TARGET"
NO_TARGET = "none"

# The levels of each machine, by name: zig's processor and what else the compiler is told. Processors of x86_64_v4
# have registers of 512 bits; clang leaves half of each unused unless it is told, which costs a third of the speed.
LEVELS: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "x86_64_v2": ["-mcpu=x86_64_v2"],
        "x86_64_v3": ["-mcpu=x86_64_v3"],
        "x86_64_v4": ["-mcpu=x86_64_v4", "-mprefer-vector-width=512"],
    },
    "aarch64": {"aarch64": ["-mcpu=generic"]},
}

# Rounding is numpy's: no contraction to fused multiply-adds, no fast-math. The library needs no other, not even
# libc, so that one file serves every distribution; zig's target names an old glibc all the same.
FLAGS = (
    "-O3",
    "-std=c11",
    "-ffp-contract=off",
    "-ffreestanding",
    "-nostdlib",
    "-fPIC",
    "-shared",
    "-s",
    "-Wall",
    "-Wextra",
    "-Werror",
)
ZIG_TARGET = "{machine}-linux-gnu.2.17"
TAG = "py3-none-manylinux_2_17_{machine}.manylinux2014_{machine}.musllinux_1_1_{machine}"


def target_machine() -> str | None:
    """Return the machine to build for, or None where only numpy serves.

    Raises:
        ValueError: DSV4CONVERT_TARGET names none.
    """
    wanted = os.environ.get(TARGET_VARIABLE)
    if wanted is None:
        machine = platform.machine()
        return machine if platform.system() == "Linux" and machine in LEVELS else None
    if wanted != NO_TARGET and wanted not in LEVELS:
        raise ValueError(f"{TARGET_VARIABLE}: expected {', '.join(LEVELS)} or {NO_TARGET}, got {wanted!r}")
    return None if wanted == NO_TARGET else wanted


def source_digest() -> str:
    """Return the CRC-32 of all C sources, in the order of their names."""
    return f"{zlib.crc32(b''.join(path.read_bytes() for path in sorted(FOLDER.glob('*.c')))):08x}"


def build_libraries(machine: str, folder: Path) -> list[Path]:
    """Compile the sources for each level of a machine into ``folder`` and return the files.

    Raises:
        RuntimeError: ziglang is not installed.
        subprocess.CalledProcessError: the compiler failed.
    """
    if importlib.util.find_spec("ziglang") is None:
        raise RuntimeError("ziglang is not installed")
    digest = source_digest()
    files = []
    with tempfile.TemporaryDirectory() as cache:
        for level, options in LEVELS[machine].items():
            made = Path(cache, level + ".so")
            command = [sys.executable, "-m", "ziglang", "cc", "-target", ZIG_TARGET.format(machine=machine)]
            command += [*options, *FLAGS, f'-DSOURCE_DIGEST="{digest}"', "-o", str(made), str(SOURCE)]
            environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
            subprocess.run(command, check=True, env=environment)
            file = folder / f"codecs-{level}.so"
            # Renamed over the old file, which a running program may have loaded.
            fresh = file.with_suffix(".new")
            fresh.write_bytes(made.read_bytes())
            files.append(fresh.replace(file))
    return files


def _not_served() -> str:
    return f"no compiled codecs for {platform.system()} on {platform.machine()}"


class CodecsBuildHook(BuildHookInterface):  # type: ignore[misc]
    """Adds the libraries to a wheel, or builds them in place for an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        machine = target_machine()
        if machine is None:
            if TARGET_VARIABLE not in os.environ:
                self.app.display_warning(f"{_not_served()}; numpy serves, slower")
            return
        if version == "editable":
            folder = FOLDER
        else:
            self._temporary = tempfile.TemporaryDirectory()  # until the wheel has its files
            folder = Path(self._temporary.name)
        try:
            files = build_libraries(machine, folder)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if TARGET_VARIABLE in os.environ:
                raise
            self.app.display_warning(f"the compiled codecs were not built ({error}); numpy serves, slower")
            return
        build_data["pure_python"] = False
        build_data["tag"] = TAG.format(machine=machine)
        if version != "editable":
            place = FOLDER.relative_to(ROOT).as_posix()
            build_data["force_include"].update({str(file): f"{place}/{file.name}" for file in files})


if __name__ == "__main__":
    here = target_machine()
    if here is None:
        raise SystemExit(_not_served())
    for built in build_libraries(here, FOLDER):
        sys.stdout.write(f"{built}\n")
