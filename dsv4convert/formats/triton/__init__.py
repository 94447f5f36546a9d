"""The codecs as Triton kernels, for tensors that are on the GPU already."""

from __future__ import annotations
