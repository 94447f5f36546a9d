"""Where the larger products of the forward pass are computed: in numpy, or in torch on a GPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..errors import DeviceError, check_choice, missing_package
from .arithmetic import product
from .parameters import Product
from .weights.protocol import Array

AUTO, CPU, CUDA = "auto", "cpu", "cuda"
DEVICES = (AUTO, CPU, CUDA)

# Files of the drivers that torch calls "cuda", so that torch is not imported where there is no GPU.
DRIVER_FILES = ("/dev/nvidiactl", "/dev/kfd")


def chosen_device(device: str) -> str:
    """Return cpu or cuda; ``auto`` is cuda where torch finds a GPU.

    Raises:
        UsageError: an unknown device.
        DeviceError: cuda was asked for, and torch is not installed or finds no GPU.
    """
    check_choice("--device", device, DEVICES)
    if device == CPU or (device == AUTO and not any(Path(file).exists() for file in DRIVER_FILES)):
        return CPU
    if find_spec("torch") is None:
        if device == AUTO:
            return CPU
        raise missing_package("--device cuda", "torch", "gpu", "use --device cpu")
    import torch

    if torch.cuda.is_available():
        return CUDA
    if device == AUTO:
        return CPU
    raise DeviceError("--device cuda: torch finds no GPU", hint="use --device cpu")


def product_on(device: str) -> Product:
    """Return the function that multiplies on a device; anything but "cpu" is a device of torch.

    Products are float32 on every device: TF32, which rounds inputs to 10 bits, stays off.
    """
    return product if device == CPU else torch_product(device)


def torch_product(device: str) -> Product:
    """Return the product x·wᵀ as torch computes it on ``device``, from and to arrays in the main memory."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False

    def multiply(x: Array, w: Array) -> Array:
        rows = torch.from_numpy(np.ascontiguousarray(x.reshape(-1, x.shape[-1]))).to(device)
        y: Array = (rows @ torch.from_numpy(np.ascontiguousarray(w)).to(device).T).cpu().numpy()
        return y.reshape(*x.shape[:-1], len(w))

    return multiply
