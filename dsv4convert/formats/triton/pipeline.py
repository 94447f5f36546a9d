"""Codecs on an NVIDIA GPU for the engine: host arrays in, host arrays out, copies beside kernels.

A call cuts its tile into chunks of rows. Each chunk goes through one of a few slots with a stream of its
own: copy to the device, kernel, copy back. While one slot computes, the next one's input travels in and
the previous one's output travels out, on the two copy engines of the GPU; a worker thread has its own
slots, so threads overlap as well. Copies overlap only from and to page-locked memory: arrays of a
``PinnedScratch`` are that already, others pass through page-locked staging buffers.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import DeviceError
from ..backend import Codecs, default_codecs
from ..base import FP8_TILE, Array, ArrayU8, Block, Scratch, Tally

MIB = 2**20
# Source plus output bytes of a tile: enough chunks to fill the slots, and few launches.
TILE_BYTES = 64 * MIB
CHUNK_BYTES = 16 * MIB
# One travels in, one computes, one travels out.
SLOTS = 3
# Below this a tile is converted on the host sooner than it would reach the device.
WORTH_THE_WAY_BYTES = 256 * 2**10

INSTALL_HINT = "install it with: pip install 'dsv4convert[gpu]'"

# A kernel is compiled at its first launch, by one thread.
_LAUNCH_LOCK = threading.Lock()


def require_cuda() -> None:
    """Check that a GPU can be used.

    Raises:
        DeviceError: torch or triton is missing, or there is no usable NVIDIA GPU; says which.
    """
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            raise DeviceError(f"--device cuda needs {package}, which is not installed", hint=INSTALL_HINT)
    import torch

    if torch.version.cuda is None:
        raise DeviceError(
            f"--device cuda needs a torch with CUDA, and torch {torch.__version__} is built without",
            hint="install torch from a CUDA index, or leave --device out",
        )
    if not torch.cuda.is_available():
        raise DeviceError(
            "--device cuda needs an NVIDIA GPU, and torch finds none",
            hint="check nvidia-smi and CUDA_VISIBLE_DEVICES, or leave --device out",
        )


def preferred_tile_bytes() -> int:
    """Return how many source and output bytes a tile should have."""
    return TILE_BYTES


@cache
def cuda_codecs() -> Codecs:
    """Return the codecs with those that have a kernel on the GPU, the others on the host.

    Raises:
        DeviceError: as ``require_cuda``.
    """
    require_cuda()
    return codecs_on("cuda")


def codecs_on(device: str) -> Codecs:
    """Return the codecs on a torch device; "cpu" runs the kernels in Triton's interpreter, for tests."""
    return CudaCodecs(device, default_codecs()).over_host()


class PinnedScratch(Scratch):
    """Arena whose buffers are page-locked, so that the GPU copies from and to them directly."""

    def _allocate(self, size: int) -> npt.NDArray[np.uint8]:
        import torch

        buffer: npt.NDArray[np.uint8] = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        return buffer

    def array(self, key: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Return a page-locked array of undefined content; the next call with ``key`` hands out the same memory."""
        kind = np.dtype(dtype)
        size = kind.itemsize * int(np.prod(shape, dtype=np.int64))
        buffer = self._buffers.get(key)
        if buffer is None or buffer.size < size:
            buffer = self._buffers[key] = self._allocate(max(size, 1))
        return buffer[:size].view(kind).reshape(shape)


def scratch_for(codecs: Codecs) -> Scratch:
    """Return the arena that suits the codecs: page-locked for those of a GPU."""
    if codecs.name != "cuda":
        return Scratch()
    import torch

    return PinnedScratch() if torch.cuda.is_available() else Scratch()


class Rows(NamedTuple):
    """A host array of a tile; one row of it belongs to ``per`` rows of the tile."""

    array: Array
    per: int


Kernel = Callable[[list[Any], list[Any], Any], None]


class CudaCodecs:
    """The codecs that have kernels, with the signatures of their numpy twins; one pipeline a thread."""

    def __init__(self, device: str, host: Codecs) -> None:
        self._device = device
        self._host = host
        self._thread = threading.local()

    def over_host(self) -> Codecs:
        """Return the host's codecs with those that have kernels in their place."""
        return replace(
            self._host,
            name="cuda",
            fp8_to_bf16=self.fp8_to_bf16,
            fp4_to_bf16=self.fp4_to_bf16,
            fp4_to_mxfp4=self.fp4_to_mxfp4,
            fp4_to_fp8=self.fp4_to_fp8,
            fp8_to_q8_0=self.fp8_to_q8_0,
        )

    def fp8_to_bf16(
        self, weight: ArrayU8, scale: Array, block: Block, out: Array, scratch: Scratch, tally: Tally
    ) -> None:
        """Decode e4m3; as ``formats.e4m3.fp8_to_bf16``."""
        if _stays(weight, scale, out):
            return self._host.fp8_to_bf16(weight, scale, block, out, scratch, tally)
        from .bf16 import fp8_to_bf16

        def kernel(inputs: list[Any], outputs: list[Any], counts: Any) -> None:
            fp8_to_bf16(inputs[0], inputs[1], block, outputs[0], None, counts)

        return self._run(kernel, [Rows(weight, 1), Rows(scale, block[0])], [Rows(out, 1)], block[0], tally)

    def fp4_to_bf16(
        self, packed: ArrayU8, scale: Array, block: Block, out: Array, scratch: Scratch, tally: Tally
    ) -> None:
        """Decode packed e2m1; as ``formats.e2m1.fp4_to_bf16``."""
        if _stays(packed, scale, out):
            return self._host.fp4_to_bf16(packed, scale, block, out, scratch, tally)
        from .bf16 import fp4_to_bf16

        def kernel(inputs: list[Any], outputs: list[Any], counts: Any) -> None:
            fp4_to_bf16(inputs[0], inputs[1], block, outputs[0], None, counts)

        return self._run(kernel, [Rows(packed, 1), Rows(scale, block[0])], [Rows(out, 1)], block[0], tally)

    def fp4_to_mxfp4(self, packed: ArrayU8, scale: ArrayU8, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
        """Rearrange packed e2m1; as ``formats.mxfp4.fp4_to_mxfp4``."""
        if _stays(packed, scale, out):
            return self._host.fp4_to_mxfp4(packed, scale, out, scratch, tally)
        from .mxfp4 import fp4_to_mxfp4

        def kernel(inputs: list[Any], outputs: list[Any], counts: Any) -> None:
            fp4_to_mxfp4(inputs[0], inputs[1], outputs[0], None, counts)

        return self._run(kernel, [Rows(packed, 1), Rows(scale, 1)], [Rows(out, 1)], 1, tally)

    def fp4_to_fp8(
        self,
        packed: ArrayU8,
        scale: ArrayU8,
        out: ArrayU8,
        out_scale: ArrayU8,
        scratch: Scratch,
        tally: Tally,
        side: int = FP8_TILE,
        /,
    ) -> None:
        """Re-encode packed e2m1; as ``formats.e2m1.fp4_to_fp8``. The kernel has tiles of 128 only."""
        if side != FP8_TILE or _stays(packed, scale, out):
            return self._host.fp4_to_fp8(packed, scale, out, out_scale, scratch, tally, side)
        from .fp8 import fp4_to_fp8

        def kernel(inputs: list[Any], outputs: list[Any], counts: Any) -> None:
            fp4_to_fp8(inputs[0], inputs[1], outputs[0], outputs[1], None, counts)

        outputs = [Rows(out, 1), Rows(out_scale, FP8_TILE)]
        return self._run(kernel, [Rows(packed, 1), Rows(scale, 1)], outputs, FP8_TILE, tally)

    def fp8_to_q8_0(
        self, weight: ArrayU8, scale: Array, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally
    ) -> None:
        """Quantise e4m3 to Q8_0; as ``formats.q8_0.fp8_to_q8_0``."""
        if _stays(weight, scale, out):
            return self._host.fp8_to_q8_0(weight, scale, block, out, scratch, tally)
        from .q8_0 import fp8_to_q8_0

        def kernel(inputs: list[Any], outputs: list[Any], counts: Any) -> None:
            fp8_to_q8_0(inputs[0], inputs[1], block, outputs[0], None, counts)

        return self._run(kernel, [Rows(weight, 1), Rows(scale, block[0])], [Rows(out, 1)], block[0], tally)

    def _run(self, kernel: Kernel, inputs: list[Rows], outputs: list[Rows], step: int, tally: Tally) -> None:
        pipeline = getattr(self._thread, "pipeline", None)
        if pipeline is None:
            pipeline = self._thread.pipeline = CudaPipeline(self._device)
        pipeline.run(kernel, inputs, outputs, step, tally)


def _stays(*arrays: Array) -> bool:
    """Return whether a tile is converted on the host: too small, or not in one piece."""
    whole = all(array.flags.c_contiguous for array in arrays)
    return not whole or sum(array.nbytes for array in arrays) < WORTH_THE_WAY_BYTES


class CudaPipeline:
    """The slots of one thread; ``run`` returns when the outputs are complete."""

    def __init__(self, device: str, slots: int = SLOTS, chunk_bytes: int | None = None) -> None:
        self._slots = [_Slot(device) for _ in range(slots)]
        self._chunk_bytes = chunk_bytes or CHUNK_BYTES

    def run(self, kernel: Kernel, inputs: list[Rows], outputs: list[Rows], step: int, tally: Tally) -> None:
        """Fill ``outputs`` chunk by chunk of a multiple of ``step`` rows.

        ``kernel`` gets the device tensors of the inputs and of the outputs, and a ``DeviceTally``.
        """
        rows = inputs[0].array.shape[0]
        everything = sum(part.array.nbytes for part in (*inputs, *outputs))
        per_chunk = max(1, self._chunk_bytes * rows // max(everything, 1) // step) * step
        try:
            for number, first in enumerate(range(0, rows, per_chunk)):
                slot = self._slots[number % len(self._slots)]
                slot.finish(tally)
                last = min(first + per_chunk, rows)
                sources = [_cut(part, first, last) for part in inputs]
                targets = [_cut(part, first, last) for part in outputs]
                slot.start(kernel, sources, targets)
            for slot in self._slots:
                slot.finish(tally)
        except BaseException:
            for slot in self._slots:
                slot.abandon()
            raise


def _cut(part: Rows, first: int, last: int) -> Array:
    """Return the rows that belong to rows first..last of the tile."""
    return part.array[first // part.per : -(-last // part.per)]


class _Slot:
    """A stream with its buffers; holds at most one chunk between ``start`` and ``finish``."""

    def __init__(self, device: str) -> None:
        import torch

        from .scalar import COUNTERS, DeviceTally

        self._device = torch.device(device)
        self._stream = torch.cuda.Stream() if self._device.type == "cuda" else None
        self._counts = DeviceTally(self._device)
        self._host_counts = torch.zeros(COUNTERS, dtype=torch.int64, pin_memory=self._stream is not None)
        self._buffers: dict[tuple[str, int], Any] = {}
        self._pending: list[tuple[Any, Array]] | None = None
        if self._stream is not None:
            # The zeros of the counters come from the default stream.
            torch.cuda.current_stream().synchronize()

    def start(self, kernel: Kernel, inputs: list[Array], outputs: list[Array]) -> None:
        """Enqueue a chunk: in, kernel, out."""
        import torch

        staged = [self._stage_in(number, array) for number, array in enumerate(inputs)]
        with torch.cuda.stream(self._stream):  # of None: the stream stays as it is
            on_device = [
                self._buffer("device in", number, array).copy_(source, non_blocking=True)
                for number, (array, source) in enumerate(zip(inputs, staged, strict=True))
            ]
            made = [self._buffer("device out", number, array) for number, array in enumerate(outputs)]
            with _LAUNCH_LOCK:
                kernel(
                    [_typed(tensor, array) for tensor, array in zip(on_device, inputs, strict=True)],
                    [_typed(tensor, array) for tensor, array in zip(made, outputs, strict=True)],
                    self._counts,
                )
            self._pending = []
            for number, (array, source) in enumerate(zip(outputs, made, strict=True)):
                target = _pinned(array)
                if target is None:
                    target = self._buffer("staged out", number, array)
                    self._pending.append((target, array))
                target.copy_(source, non_blocking=True)
            self._host_counts.copy_(self._counts.counters, non_blocking=True)

    def finish(self, tally: Tally) -> None:
        """Wait for the chunk, if there is one; its output is complete and its counts are added then."""
        if self._pending is None:
            return
        if self._stream is not None:
            self._stream.synchronize()
        for staged, array in self._pending:
            np.copyto(array.reshape(-1).view(np.uint8), staged.numpy())
        self._pending = None
        counts = Tally(*self._host_counts.tolist())
        if counts != Tally():
            tally.add(counts)
            self._clear_counts()

    def abandon(self) -> None:
        """Wait for the chunk and forget it, after an error."""
        if self._stream is not None:
            self._stream.synchronize()
        self._pending = None
        self._clear_counts()

    def _clear_counts(self) -> None:
        import torch

        with torch.cuda.stream(self._stream):
            self._counts.counters.zero_()

    def _stage_in(self, number: int, array: Array) -> Any:
        """Return the bytes of an input in page-locked memory, as a tensor."""
        pinned = _pinned(array)
        if pinned is not None:
            return pinned
        staged = self._buffer("staged in", number, array)
        np.copyto(staged.numpy(), array.reshape(-1).view(np.uint8))
        return staged

    def _buffer(self, use: str, number: int, array: Array) -> Any:
        """Return this slot's uint8 tensor for a use, as long as ``array`` has bytes; kept and grown."""
        import torch

        buffer = self._buffers.get((use, number))
        if buffer is None or buffer.numel() < array.nbytes:
            on_host = use.startswith("staged")
            buffer = torch.empty(
                max(array.nbytes, 1),
                dtype=torch.uint8,
                device="cpu" if on_host else self._device,
                pin_memory=on_host and self._device.type == "cuda",
            )
            self._buffers[use, number] = buffer
        return buffer[: array.nbytes]


def _typed(tensor: Any, like: Array) -> Any:
    """Return a byte tensor with the dtype and the shape of a host array."""
    import torch

    dtype = {"u1": torch.uint8, "u2": torch.uint16, "f4": torch.float32}[like.dtype.str[1:]]
    return tensor.view(dtype).view(like.shape)


def _pinned(array: Array) -> Any:
    """Return the bytes of an array as a tensor if they are page-locked, else None."""
    import torch

    if not array.flags.writeable or not array.nbytes:
        return None
    tensor = torch.from_numpy(array.reshape(-1).view(np.uint8))
    return tensor if tensor.is_pinned() else None
