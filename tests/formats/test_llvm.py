"""What builds the compiled codecs: loops that carry values, and calls that refuse what the code was not made for."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("llvmlite")

from dsv4convert.formats import compiled_kernels, llvm
from dsv4convert.formats.llvm import I32, I64, Builder, Kernel, constant

KERNELS = [value for value in vars(compiled_kernels).values() if isinstance(value, Kernel)]


def a_sum(v: Builder) -> list:
    """Sum values[i] * i over a range."""

    def step(i, total):
        value = v.b.zext(v.load("values", i), I64)
        return [v.b.add(total, v.b.mul(value, i))]

    return v.loop(v["stop"], step, [I64(0)], start=v["start"])[0]


A_SUM = Kernel("a_sum", {"values": "u4", "start": "n", "stop": "n"}, a_sum)
VALUES = np.arange(100, 110, dtype=np.uint32)


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (3, 10), (0, 1), (0, 0), (5, 5), (7, 3), (0, -1)])
def test_a_loop_runs_as_often_as_a_range(start: int, stop: int) -> None:
    assert A_SUM(VALUES, start, stop) == sum(int(VALUES[i]) * i for i in range(start, stop))


def test_a_loop_in_a_loop_carries_what_the_inner_one_left() -> None:
    def build(v: Builder):
        def outer(i, total):
            return v.loop(i, lambda j, total: [v.b.add(total, v.b.mul(i, j))], [total])

        return v.loop(v["n"], outer, [I64(0)])[0]

    kernel = Kernel("nested", {"n": "n"}, build)
    for n in range(6):
        assert kernel(n) == sum(i * j for i in range(n) for j in range(i))


def test_results_are_signed() -> None:
    assert Kernel("negative", {"n": "n"}, lambda v: v.b.neg(v["n"]))(7) == -7


def test_vectors_are_loaded_and_stored_wherever_they_lie() -> None:
    def build(v: Builder) -> None:
        lanes = v.load("values", I64(1), 4)
        v.store(v.b.add(lanes, constant(lanes, 5)), "out", I64(3))

    out = np.zeros(8, np.uint32)
    Kernel("unaligned", {"values": "u4", "out": "u4"}, build)(VALUES, out)
    assert out.tolist() == [0, 0, 0, 106, 107, 108, 109, 0]


@pytest.mark.parametrize("reduction", ["umax", "umin", "add"])
def test_reductions(reduction: str) -> None:
    kernel = Kernel(
        "reduced", {"values": "u4"}, lambda v: v.b.zext(v.reduce(reduction, v.load("values", I64(0), 8)), I64)
    )
    expected = {"umax": max, "umin": min, "add": sum}[reduction]
    assert kernel(VALUES) == expected(VALUES[:8].tolist())


def test_flags_are_counted() -> None:
    def build(v: Builder):
        lanes = v.load("values", I64(0), 8)
        return v.count(v.b.icmp_unsigned(">", lanes, v.splat(I32(104), 8)))

    assert Kernel("counted", {"values": "u4"}, build)(VALUES) == 3


@pytest.mark.parametrize(
    "wrong", [VALUES.astype(np.uint16), VALUES.astype(np.int32), VALUES[::2], np.zeros((2, 4), np.uint32).T]
)
def test_an_array_that_the_code_was_not_made_for_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="a_sum: expected a contiguous array of uint32"):
        A_SUM(wrong, 0, 1)


def test_too_few_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        A_SUM(VALUES, 0)


def test_threads_that_come_first_together_get_one_function() -> None:
    kernel = Kernel("a_sum", {"values": "u4", "start": "n", "stop": "n"}, a_sum)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: kernel(VALUES, 0, 10), range(64))) == {A_SUM(VALUES, 0, 10)}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_kernel_rounds_as_numpy_and_calls_nothing_but_instructions(kernel: Kernel) -> None:
    text = kernel.as_llvm()
    assert not re.search(r"\b(fast|reassoc|contract|nnan|ninf|nsz|arcp|afn)\b", text)
    assert all(name.startswith("llvm.") for name in re.findall(r'^declare .*@"?([^"(]+)', text, re.MULTILINE))


SMAPS = """\
7f0000000000-7f0000001000 r--p 00000000 fe:00 42                         /lib/libllvmlite.so
Size:                  4 kB
Rss:                   4 kB
Anonymous:             0 kB
VmFlags: rd mr mw me sd
7f0000001000-7f0000003000 r-xp 00001000 fe:00 42                         /lib/libllvmlite.so
Anonymous:             0 kB
7f0000003000-7f0000004000 r--p 00003000 fe:00 42                         /lib/libllvmlite.so
Anonymous:             4 kB
7f0000004000-7f0000005000 rw-p 00004000 fe:00 42                         /lib/libllvmlite.so
Anonymous:             0 kB
7f0000005000-7f0000006000 rw-p 00000000 00:00 0
Anonymous:             0 kB
7f0000006000-7f0000007000 r-xp 00000000 fe:00 43                         /lib/other of them.so
Anonymous:             0 kB
"""


def test_only_pages_that_nobody_can_have_written_are_let_go_of() -> None:
    expected = [(0x7F0000000000, 0x7F0000001000), (0x7F0000001000, 0x7F0000003000)]
    assert list(llvm.unwritten_ranges(SMAPS.splitlines(keepends=True), "libllvmlite")) == expected


def test_letting_go_of_the_compiler_shrinks_the_process_and_harms_nothing() -> None:
    program = """
import numpy as np
from dsv4convert.formats import compiled, compiled_kernels as kernels
from dsv4convert.formats.llvm import release_compiler

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssFile:"))

values, out = np.arange(1000, dtype=np.uint16), np.empty(1000, np.uint32)
kernels.bf16_to_f32.compile()
before = resident()
compiled.prepare(["fp4_to_fp8", "no codec of this name", "f16_to_q8_0", "copy"])
after = resident()
assert before - after > 20_000, (before, after)
assert kernels.fp4_to_fp8._function and kernels.fp4_to_fp8_scales._function
kernels.bf16_to_f32(values, out, 1000)
assert (out == values.astype(np.uint32) << 16).all()
kernels.f32_to_bf16.compile()  # with the compiler back
release_compiler()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_where_nothing_says_what_is_mapped_nothing_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*arguments, **options):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", nowhere)
    llvm.release_compiler()
