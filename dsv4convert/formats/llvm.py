"""Building a function for the processor at hand: loops and vectors in, a callable out.

Importing this module imports llvmlite. A function is built in SSA form by hand, so that LLVM needs no passes
to make good code of it: a kernel is ready in some ten milliseconds, and nothing is kept between runs.
No operation carries a fast-math flag: each rounds as numpy's.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from llvmlite import binding, ir

from dsv4convert.formats.base import Array

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
POINTER = ir.PointerType()

# What a parameter may be: the address of elements of one of numpy's types, or a 64-bit integer.
ELEMENTS = {"u1": I8, "u2": I16, "u4": I32, "i8": I64, "f4": F32}
INTEGER = "n"

Value = Any  # of llvmlite, which has no types
Body = Callable[..., "Sequence[Value] | None"]


class Builder:
    """A function being built: the instructions that kernels need, and loops with carried values.

    Addresses are parameters, by name; offsets count elements of their type. Nothing is checked here.
    """

    def __init__(self, parameters: dict[str, str], builder: Any, arguments: Sequence[Value]) -> None:
        self.b = builder
        self._kinds = parameters
        self._arguments = dict(zip(parameters, arguments, strict=True))

    def __getitem__(self, name: str) -> Value:
        """Return an integer parameter."""
        return self._arguments[name]

    def address(self, name: str, offset: Value) -> Value:
        return self.b.gep(self._arguments[name], [offset], source_etype=ELEMENTS[self._kinds[name]])

    def load(self, name: str, offset: Value, lanes: int = 0) -> Value:
        """Load one element, or a vector of ``lanes``."""
        kind = ELEMENTS[self._kinds[name]]
        kind = ir.VectorType(kind, lanes) if lanes else kind
        return self.b.load(self.address(name, offset), typ=kind, align=1)

    def store(self, value: Value, name: str, offset: Value) -> None:
        """Store an element or a vector, of whatever type, at an offset that counts elements of the parameter's."""
        self.b.store(value, self.address(name, offset), align=1)

    def loop(self, stop: Value, body: Body, carried: Sequence[Value] = (), start: Value = None) -> list[Value]:
        """Call ``body(i, *carried)`` for start <= i < stop; what it returns is carried on, at last to the caller."""
        b = self.b
        start = I64(0) if start is None else start
        before = b.block
        inside, after = b.append_basic_block("loop"), b.append_basic_block("after")
        b.cbranch(b.icmp_signed("<", start, stop), inside, after)
        b.position_at_end(inside)
        index = b.phi(I64)
        index.add_incoming(start, before)
        inner = [b.phi(value.type) for value in carried]
        for phi, value in zip(inner, carried, strict=True):
            phi.add_incoming(value, before)
        results = body(index, *inner) or ()
        following = b.add(index, I64(1))
        last = b.block
        index.add_incoming(following, last)
        for phi, value in zip(inner, results, strict=True):
            phi.add_incoming(value, last)
        b.cbranch(b.icmp_signed("<", following, stop), inside, after)
        b.position_at_end(after)
        outer = [b.phi(value.type) for value in carried]
        for phi, value, result in zip(outer, carried, results, strict=True):
            phi.add_incoming(value, before)
            phi.add_incoming(result, last)
        return outer

    def splat(self, scalar: Value, lanes: int) -> Value:
        vector = ir.VectorType(scalar.type, lanes)
        one = self.b.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
        return self.shuffle(one, one, [0] * lanes)

    def shuffle(self, first: Value, second: Value, order: Sequence[int]) -> Value:
        return self.b.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(order)), list(order)))

    def smaller(self, first: Value, second: Value) -> Value:
        """Return the smaller of two signed integers."""
        return self.b.select(self.b.icmp_signed("<", first, second), first, second)

    def larger(self, first: Value, second: Value) -> Value:
        """Return the larger of two signed integers."""
        return self.b.select(self.b.icmp_signed(">", first, second), first, second)

    def umax(self, first: Value, second: Value) -> Value:
        """Return the larger of unsigned integers, lane by lane."""
        return self.b.select(self.b.icmp_unsigned(">", first, second), first, second)

    def umin(self, first: Value, second: Value) -> Value:
        """Return the smaller of unsigned integers, lane by lane."""
        return self.b.select(self.b.icmp_unsigned("<", first, second), first, second)

    def reduce(self, name: str, value: Value) -> Value:
        """Return one of LLVM's reductions of an integer vector (add, or, umax, umin)."""
        scalar, lanes = value.type.element, value.type.count
        module = self.b.module
        full = f"llvm.vector.reduce.{name}.v{lanes}i{scalar.width}"
        function = module.globals.get(full)
        if function is None:
            function = ir.Function(module, ir.FunctionType(scalar, [value.type]), full)
        return self.b.call(function, [value])

    def count(self, flags: Value) -> Value:
        """Return how many of a vector of flags are set, as a 64-bit integer."""
        return self.b.zext(self.b.ctpop(self.b.bitcast(flags, ir.IntType(flags.type.count))), I64)


def constant(like: Value, value: float) -> Value:
    """Return a constant of the type of ``like``; a vector has it in all lanes."""
    kind = like.type
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def resized(kind: Any, like: Value) -> Any:
    """Return the type with elements ``kind`` and as many lanes as ``like``."""
    return ir.VectorType(kind, like.type.count) if isinstance(like.type, ir.VectorType) else kind


class Kernel:
    """A function of numpy arrays and integers, compiled for this processor when it is first called.

    ``parameters`` gives each a key of ``ELEMENTS`` or ``INTEGER``; ``build`` emits the body and returns an
    integer of 64 bits, which a call returns signed, or None. A call lets other threads run.
    """

    def __init__(self, name: str, parameters: dict[str, str], build: Callable[[Builder], Value]) -> None:
        self.name = name
        self._parameters = parameters
        self._build = build
        self._lock = threading.Lock()
        self._function: Callable[..., int] | None = None
        self._engine: Any = None

    def __call__(self, *arguments: Array | int) -> int:
        """Run the function.

        Raises ValueError for an array of another type or with gaps: the caller is wrong, not the user's file.
        """
        function = self._function or self.compile()
        values = [
            argument if kind == INTEGER else _address(self.name, argument, kind)
            for argument, kind in zip(arguments, self._parameters.values(), strict=True)
        ]
        return function(*values)

    @property
    def is_compiled(self) -> bool:
        """Return whether the machine code is there."""
        return self._function is not None

    def as_llvm(self) -> str:
        """Return the function in LLVM's assembly language, as it is before LLVM sees it."""
        module = ir.Module(self.name)
        kinds = [I64 if kind == INTEGER else POINTER for kind in self._parameters.values()]
        function = ir.Function(module, ir.FunctionType(I64, kinds), self.name)
        # Inputs, tables and outputs never overlap.
        for argument in function.args:
            if argument.type is POINTER:
                argument.add_attribute("noalias")
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        result = self._build(Builder(self._parameters, builder, function.args))
        builder.ret(I64(0) if result is None else result)
        return str(module)

    def compile(self) -> Callable[..., int]:
        """Return the function's machine code, made now if it was not before."""
        with self._lock:
            if self._function is None:
                module = binding.parse_assembly(self.as_llvm())
                module.verify()
                self._engine = binding.create_mcjit_compiler(module, target_machine())
                self._engine.finalize_object()
                kinds = [ctypes.c_int64 if kind == INTEGER else ctypes.c_void_p for kind in self._parameters.values()]
                address = self._engine.get_function_address(self.name)
                self._function = ctypes.CFUNCTYPE(ctypes.c_int64, *kinds)(address)
            return self._function


def check_compiler() -> None:
    """Compile and run a function of one instruction.

    Raises:
        RuntimeError: LLVM knows no code for this processor, or is older than our assembly language.
    """
    probe = Kernel("probe", {"values": "u1"}, lambda v: v.b.zext(v.load("values", I64(0)), I64))
    if probe(np.full(1, 42, np.uint8)) != 42:
        raise RuntimeError("compiled code gives wrong results")


def release_compiler() -> None:
    """Let go of the pages of LLVM's own code and tables until it compiles again, when they are read anew.

    They are some 60 MiB, or 110 where its file was just written and lies in memory in large pieces: most of
    what compiled codecs would otherwise add to a conversion's memory. What was written to stays.
    """
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    try:
        with open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
            ranges = list(unwritten_ranges(file, "libllvmlite"))
    except OSError:  # no such file: then the pages stay
        return
    for begin, end in ranges:
        libc.madvise(begin, end - begin, _MADV_DONTNEED)


_MADV_DONTNEED = 4


def unwritten_ranges(smaps: Iterable[str], name: str) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a file's mappings that cannot be written to and hold no page that ever was."""
    here: tuple[int, int] | None = None
    for line in smaps:
        key, *rest = line.split(maxsplit=5)
        if not key.endswith(":"):
            begin, end = (int(part, 16) for part in key.split("-"))
            here = (begin, end) if "w" not in rest[0] and len(rest) == 5 and name in rest[4] else None
        elif here is not None and line.startswith("Anonymous:") and rest[0] == "0":
            yield here


def target_machine() -> Any:
    """Return LLVM's code generator for this processor.

    Raises:
        RuntimeError: LLVM knows none.
    """
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3, jit=True
    )


def _address(name: str, array: Any, kind: str) -> int:
    if array.dtype != np.dtype(kind) or not array.flags.c_contiguous:
        raise ValueError(f"{name}: expected a contiguous array of {np.dtype(kind)}, got {array.dtype}")
    return int(array.__array_interface__["data"][0])
