"""Processes for which the system is another one: with mounts of their own, fewer rights, or calls that are refused."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

# linux/prctl.h, linux/capability.h, linux/seccomp.h, linux/filter.h
PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 22, 24, 38
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER = 1, 2, 3
CAPABILITY_VERSION_3 = 0x20080522
SECCOMP_MODE_FILTER, SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW = 2, 0x00050000, 0x7FFF0000
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBER_OFFSET, SECOND_ARGUMENT_OFFSET = 0, 24  # of struct seccomp_data; the low word, on little-endian machines
F_OFD_SETLK = 37

SYSTEM_CALLS: Mapping[str, Mapping[str, int]] = {
    "x86_64": {"flock": 73, "fcntl": 72, "rename": 82, "link": 86, "renameat": 264, "linkat": 265, "renameat2": 316},
    "aarch64": {"flock": 32, "fcntl": 25, "linkat": 37, "renameat": 38, "renameat2": 276},
}
RENAMES = ("rename", "renameat", "renameat2")
LINKS = ("link", "linkat")


def refuse_calls(number: int, *names: str) -> None:
    """Let the kernel answer these calls of this process and its children with an error; of fcntl, only locks.

    Names that this machine does not have are left out.
    """
    table = SYSTEM_CALLS[platform.machine()]
    answer = struct.pack("HBBI", RETURN, 0, 0, SECCOMP_RET_ERRNO | number)
    program = struct.pack("HBBI", LOAD_WORD, 0, 0, NUMBER_OFFSET)
    for name in names:
        if name == "fcntl":
            program += struct.pack("HBBI", JUMP_IF_EQUAL, 0, 4, table[name])
            program += struct.pack("HBBI", LOAD_WORD, 0, 0, SECOND_ARGUMENT_OFFSET)
            program += struct.pack("HBBI", JUMP_IF_EQUAL, 0, 1, F_OFD_SETLK)
            program += answer
            program += struct.pack("HBBI", LOAD_WORD, 0, 0, NUMBER_OFFSET)
        elif name in table:
            program += struct.pack("HBBI", JUMP_IF_EQUAL, 0, 1, table[name]) + answer
    program += struct.pack("HBBI", RETURN, 0, 0, SECCOMP_RET_ALLOW)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program) // 8, ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def drop_capabilities(*capabilities: int) -> None:
    """Take rights from root in this process and what it runs, so that permissions and owners count."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None)
        for capability in capabilities:
            if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
                raise OSError("a capability cannot be dropped")


def command(*arguments: object) -> list[str]:
    """Return the program with arguments, as a list."""
    return [sys.executable, "-m", "dsv4convert", *map(str, arguments)]


def run(
    *arguments: object, before: Callable[[], None] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own, after ``before`` has been called in it."""
    return _run(command(*arguments), before, cwd)


def run_in_namespace(
    mounts: str, *arguments: object, cwd: Path, mapped: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run the program where ``mounts``, lines of a shell, have been carried out in mount namespace of its own.

    ``mapped`` makes a user namespace too, as an ordinary user has to.
    """
    script = f"set -e\n{mounts}\nexec {shlex.join(command(*arguments))}"
    return _run([*_unshare(mapped), "bash", "-c", script], None, cwd)


def can_mount(mounts: str, folder: Path, mapped: bool = False) -> bool:
    """Return whether ``mounts`` can be carried out in a namespace."""
    return not subprocess.run(
        [*_unshare(mapped), "bash", "-ec", mounts], cwd=folder, capture_output=True, check=False
    ).returncode


def _unshare(mapped: bool) -> list[str]:
    return ["unshare", "--mount"] if os.geteuid() == 0 and not mapped else ["unshare", "--mount", "--map-root-user"]


@cache
def environment() -> dict[str, str]:
    """Return the environment in which a process finds this repository."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def _run(words: list[str], before: Callable[[], None] | None, cwd: Path | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        preexec_fn=before,
        env=environment(),
        cwd=cwd,
    )


def without_flock() -> None:
    """Be on a file system without flock, as Lustre without its option is."""
    refuse_calls(errno.ENOSYS, "flock")


def without_locks() -> None:
    """Be on a file system without any locks, as NFS without a lock daemon is."""
    refuse_calls(errno.ENOLCK, "flock", "fcntl")


def without_renames() -> None:
    """Be on a file system that makes files and lets none change its name."""
    refuse_calls(errno.EPERM, *RENAMES, *LINKS)


def heed_permissions() -> None:
    """Let permissions count for this thread and what it starts, as they do for users other than root."""
    if os.geteuid() != 0:
        return
    drop_capabilities(CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)
    libc = ctypes.CDLL(None, use_errno=True)
    header = ctypes.create_string_buffer(struct.pack("Ii", CAPABILITY_VERSION_3, 0))
    sets = ctypes.create_string_buffer(6 * 4)  # effective, permitted, inheritable of the first 32, then of the rest
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")
