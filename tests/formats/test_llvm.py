"""What builds the compiled codecs: loops that carry values, and calls that refuse what the code was not made for."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("llvmlite")

from dsv4convert.formats import compiled_kernels
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
