"""Measured routing: how often each expert was chosen, from a JSON file or from an importance matrix of llama.cpp's.

The JSON file has, by trunk layer, a list with a count for each expert: ``{"3": [812, 4, …], "4": […]}``. Layers that
are not there are taken to route uniformly. An importance matrix in its GGUF form counts the tokens of each expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..containers.gguf import is_gguf
from ..containers.imatrix import read_imatrix
from ..containers.json_object import read_json_object
from ..errors import FileFormatError, named_by_user
from ..model.config import ModelConfig
from .operators import Routing

# 61 layers of 384 counts take 300 KB.
MAX_COUNTS_BYTES = 16 * 2**20
# More tokens than any corpus has; JSON's 1e400 is infinite, and a share of infinity is no number.
MAX_COUNT = 10**18


def read_routing(path: Path, config: ModelConfig) -> Routing:
    """Return how tokens were routed.

    Raises:
        InputMissingError: no such file.
        FileFormatError: malformed, or counts that do not fit the model; names the layer.
    """
    counts: dict[int, Sequence[float]] = {}
    if is_gguf(path):
        entries = read_imatrix(path).entries
        for layer in range(config.num_hidden_layers):
            entry = entries.get(f"blk.{layer}.ffn_gate_exps.weight")
            if entry is not None and len(entry.counts) == config.n_routed_experts:
                counts[layer] = _checked(list(entry.counts), layer, config, path)
    else:
        with named_by_user():
            document = read_json_object(path, MAX_COUNTS_BYTES, error=FileFormatError, hint="is it a file of counts?")
        # Only the plain spelling counts: "01" would be layer 1 a second time.
        layers = {str(layer): layer for layer in range(config.num_hidden_layers)}
        for key, values in document.items():
            if key not in layers:
                raise FileFormatError(
                    f"key {key!r}: no layer", where=path, expected=f"0 to {config.num_hidden_layers - 1}"
                )
            counts[layers[key]] = _checked(values, layers[key], config, path)
    if not counts:
        raise FileFormatError(
            "no counts of experts", where=path, expected=f"lists of {config.n_routed_experts} counts by layer"
        )
    return Routing(counts)


def _checked(values: Any, layer: int, config: ModelConfig, path: Path) -> Sequence[float]:
    """Return the counts of a layer's experts: as many as it has, none negative, and not all zero."""
    experts = config.n_routed_experts
    if not isinstance(values, list) or len(values) != experts:
        got = len(values) if isinstance(values, list) else type(values).__name__
        raise FileFormatError(f"layer {layer}: not a list of counts", where=path, expected=f"{experts} counts", got=got)
    if (
        any(isinstance(n, bool) or not isinstance(n, (int, float)) or not 0 <= n <= MAX_COUNT for n in values)
        or sum(values) <= 0
    ):
        expected = f"numbers from 0 to {MAX_COUNT:.0e}, not all 0"
        raise FileFormatError(f"layer {layer}: counts of experts", where=path, expected=expected)
    return values
