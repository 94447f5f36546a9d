"""Machines as data: what one device holds, moves and multiplies. A machine is a TOML file:

    description = "one line"
    kind = "gpu"            # gpu, unified (memory shared with the processor) or cpu
    memory = 141e9          # bytes of one device
    bandwidth = 4.8e12      # bytes a second, as the maker states it
    bf16 = 989e12           # FLOPs a second of dense products in BF16, as the maker states it
    fp8 = 1979e12           # in FP8; where there is none, as in BF16
    link_bandwidth = 450e9  # bytes a second that a device sends to the others
    link_latency = 8e-6     # seconds of a collective operation, however small

Optional, with defaults by kind: the parts of those rates that kernels reach, and what a kernel costs at least.

    usable = 0.9              # part of the memory that a program gets
    bandwidth_share = 0.6
    flops_share = 0.4
    kernel_seconds = 6e-6     # of every operator in every run
    decoded_tile = 1          # tokens of a run that share one decoding of the weights

And how many weights a second products with one token decode, by the ggml type that they are stored in. A type that is
not there is as quick as the bandwidth allows.

    [decoded]
    iq2_xxs = 4e10
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ...containers.toml_files import names_in, parse_toml, read_named
from ...errors import FileFormatError, either
from ...formats.ggml_types import BY_NAME

MAX_HARDWARE_BYTES = 2**16

# What is taken for granted of a kind of machine where its file says nothing.
DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "gpu": {"usable": 0.9, "bandwidth_share": 0.6, "flops_share": 0.085, "kernel_seconds": 6e-6},
    "unified": {"usable": 0.95, "bandwidth_share": 0.6, "flops_share": 0.4, "kernel_seconds": 5e-6},
    "cpu": {"usable": 0.95, "bandwidth_share": 0.6, "flops_share": 0.2, "kernel_seconds": 16e-6},
}
DEFAULT_TILE = 1
RATES = ("bandwidth", "bf16", "fp8", "link_bandwidth")
SECONDS = ("link_latency", "kernel_seconds")
SHARES = ("usable", "bandwidth_share", "flops_share")
TILE, DECODED = "decoded_tile", "decoded"
MAX_TILE = 2**20
# Within these, no time and no sum of bytes runs out of float64's range.
LEAST, MOST = 1e-12, 1e24


@dataclass(frozen=True)
class Hardware:
    """One device of a machine: bytes, rates a second, seconds, and the shares of them that are reached.

    ``decoded`` are the weights of each ggml type that are decoded in a second, once for ``decoded_tile`` tokens.
    """

    name: str
    description: str
    kind: str
    memory: int
    bandwidth: float
    bf16: float
    fp8: float
    link_bandwidth: float
    link_latency: float
    usable: float
    bandwidth_share: float
    flops_share: float
    kernel_seconds: float
    decoded_tile: float = DEFAULT_TILE
    decoded: Mapping[str, float] = field(default_factory=dict)

    @property
    def usable_memory(self) -> int:
        """Return the bytes that a program gets."""
        return int(self.memory * self.usable)

    def as_json(self) -> dict[str, Any]:
        """Return the machine as plain JSON values."""
        return asdict(self)


def hardware_names() -> list[str]:
    """Return the names of the machines that come with the package."""
    return names_in(__package__)


def load_hardware(name: str) -> Hardware:
    """Return the machine called ``name``, or the one in the file of that path (a name that ends in ``.toml``).

    Raises:
        UsageError: no such machine.
        InputMissingError: no such file.
        FileFormatError: malformed; the key is named.
    """
    return parse_hardware(*read_named("--hardware", name, __package__, MAX_HARDWARE_BYTES))


def parse_hardware(name: str, content: bytes, where: object) -> Hardware:
    """Return the machine that a TOML text describes.

    Raises:
        FileFormatError: malformed; the key is named.
    """
    table = parse_toml(content, where)
    kind = table.pop("kind", None)
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise FileFormatError("key kind: unknown", where=where, expected=either(DEFAULTS), got=kind)
    table = {"description": name, "fp8": table.get("bf16"), **DEFAULTS[kind], **table}
    description = table.pop("description")
    if not isinstance(description, str):
        raise FileFormatError("key description: not a text", where=where, got=description)
    values: dict[str, float] = {}
    memory = math.ceil(_number(table.pop("memory", None), "memory", MOST, where))
    for keys, most in ((RATES, MOST), (SECONDS, 1.0), (SHARES, 1.0)):
        for key in keys:
            values[key] = _number(table.pop(key, None), key, most, where)
    values[TILE] = _number(table.pop(TILE, DEFAULT_TILE), TILE, MAX_TILE, where)
    decoded = _decoded(table.pop(DECODED, {}), where)
    for key in table:
        known = ", ".join(("description", "kind", "memory", *RATES, *SECONDS, *SHARES, TILE, DECODED))
        raise FileFormatError(f"unknown key {key!r}", where=where, expected=known)
    return Hardware(name, description, kind, memory, **values, decoded=decoded)


def _decoded(table: object, where: object) -> dict[str, float]:
    """Return the rates of decoding by ggml type."""
    if not isinstance(table, dict):
        raise FileFormatError(f"key {DECODED}: not a table", where=where, expected=f"[{DECODED}]", got=table)
    for kind in table:
        if kind not in BY_NAME:
            raise FileFormatError(f"unknown key {DECODED}.{kind}", where=where, expected=", ".join(BY_NAME))
    return {kind: _number(rate, f"{DECODED}.{kind}", MOST, where) for kind, rate in table.items()}


def _number(value: object, key: str, most: float, where: object) -> float:
    """Return a number from ``LEAST`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not LEAST <= value <= most:
        expected = f"a number from {LEAST:g} to {most:g}"
        raise FileFormatError(f"key {key}", where=where, expected=expected, got="nothing" if value is None else value)
    return float(value)
