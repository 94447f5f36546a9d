"""The codecs as Triton kernels, and the pipeline that feeds them."""

from __future__ import annotations
