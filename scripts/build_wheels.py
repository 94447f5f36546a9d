"""Build the sdist and all wheels into dist/: Linux on x86-64 and AArch64 with compiled codecs, and one of pure Python.

    pip install build
    python scripts/build_wheels.py

Any Linux machine that ziglang serves builds for all of them. Each wheel is made from the sdist and then checked: its
tag, and that its libraries are for its machine and need no other library.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"

# Target of hatch_build.py: the libraries that its wheel holds, and their e_machine in the ELF header.
WHEELS = {
    "x86_64": (("x86_64_v2", "x86_64_v3", "x86_64_v4"), 62),
    "aarch64": (("aarch64",), 183),
    "none": ((), 0),
}
_ELF_MACHINE_OFFSET = 18


def build(source: Path, kind: str, out: Path, target: str) -> Path:
    """Run the build frontend and return what it made."""
    before = set(out.iterdir()) if out.is_dir() else set()
    subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", "--outdir", str(out), str(source)],
        check=True,
        env={**os.environ, "DSV4CONVERT_TARGET": target},
    )
    (made,) = set(out.iterdir()) - before
    return made


def check_wheel(wheel: Path, target: str) -> None:
    """Exit with a message if a wheel is not what its target says."""
    levels, machine = WHEELS[target]
    tag = f"manylinux_2_17_{target}" if levels else "py3-none-any"
    if tag not in wheel.name:
        raise SystemExit(f"{wheel.name}: expected the tag {tag}")
    with zipfile.ZipFile(wheel) as archive:
        libraries = {name.rsplit("/", 1)[-1]: name for name in archive.namelist() if name.endswith(".so")}
        expected = {f"codecs-{level}.so" for level in levels}
        if set(libraries) != expected:
            raise SystemExit(f"{wheel.name}: expected the libraries {sorted(expected)}, got {sorted(libraries)}")
        for name, member in libraries.items():
            data = archive.read(member)
            (found,) = struct.unpack_from("<H", data, _ELF_MACHINE_OFFSET)
            if found != machine:
                raise SystemExit(f"{wheel.name}: {name}: expected ELF machine {machine}, got {found}")
            if b"GLIBC_" in data or b"libc.so" in data:
                raise SystemExit(f"{wheel.name}: {name} needs a C library, so the tag does not hold")


def main() -> None:
    DIST.mkdir(exist_ok=True)
    for old in DIST.glob("dsv4convert-*"):
        old.unlink()
    sdist = build(ROOT, "sdist", DIST, "none")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (source,) = Path(folder).iterdir()
        for target in WHEELS:
            check_wheel(build(source, "wheel", DIST, target), target)
    for made in sorted(DIST.iterdir()):
        sys.stdout.write(f"{made.relative_to(ROOT)}  {made.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
