"""The functions of the C sources on AArch64, emulated by QEMU: for machines that are not AArch64 themselves."""

from __future__ import annotations

import importlib.util
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv4convert.formats.compiled.library import FOLDER, INTEGER, Function

MACHINE = "aarch64"
_QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
_SOURCE = Path(__file__).with_name("emulated.c")
_FLAGS = ("-O3", "-std=c11", "-ffp-contract=off", "-static")  # of hatch_build.py, less those of a library


def available() -> bool:
    """True where QEMU and the compiler are installed."""
    return _QEMU is not None and importlib.util.find_spec("ziglang") is not None


class Emulator:
    """A process that runs named functions of the C sources."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        program = folder / "emulated"
        functions = ", ".join(f"FUNCTION({name})" for name in names)
        compiler = [sys.executable, "-m", "ziglang", "cc", "-target", f"{MACHINE}-linux-musl", "-mcpu=generic"]
        options = [*_FLAGS, f"-DFUNCTIONS={functions}", "-I", str(FOLDER), "-o", str(program), str(_SOURCE)]
        subprocess.run([*compiler, *options], check=True)
        self._numbers = {name: number for number, name in enumerate(names)}
        self._process = subprocess.Popen([str(_QEMU), str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def run(self, name: str, arguments: Sequence[Any]) -> int:
        """Run a function; arrays among the arguments come back as it left them."""
        assert self._process.stdin is not None
        request = [struct.pack("<qq", self._numbers[name], len(arguments))]
        arrays = [argument for argument in arguments if isinstance(argument, np.ndarray)]
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                request += [struct.pack("<q", argument.nbytes), argument.tobytes()]
            else:
                request.append(struct.pack("<qq", -1, argument))
        self._process.stdin.write(b"".join(request))
        self._process.stdin.flush()
        (result,) = struct.unpack("<q", self._read(8))
        for array in arrays:
            made = np.frombuffer(self._read(array.nbytes), np.uint8)
            if array.flags.writeable:
                array.reshape(-1).view(np.uint8)[:] = made
            else:  # a table
                assert made.tobytes() == array.tobytes()
        return int(result)

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        assert len(data) == size, "the emulated program has ended"
        return data


class EmulatedFunction(Function):
    """A function of the C sources in an emulator, which takes the library's place."""

    def __init__(self, library: Any, name: str, parameters: str) -> None:
        self.name = name
        self._emulator: Emulator = library
        self._parameters = [None if kind == INTEGER else np.dtype(kind) for kind in parameters.split()]

    def __call__(self, *arguments: Any) -> int:
        """Run the function after the checks that a call of the library makes."""
        for argument, dtype in zip(arguments, self._parameters, strict=True):
            if dtype is not None:
                self._address(argument, dtype)
        return self._emulator.run(self.name, arguments)
