"""Gives the tensors of a re-saved folder their official names, and cuts stacks of experts into experts.

Understood are a ``model.`` prefix, transformers' module names with experts single or stacked, and the
V3-style names, in any mixture: transformers itself writes mixtures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache

from ..containers.safetensors import Stored
from ..errors import InventoryError
from ..model.tensors import (
    DRAFT_PREFIX,
    MODEL_PREFIX,
    RESAVED_LAYER_NAMES,
    RESAVED_SCALE_SUFFIXES,
    RESAVED_TOP_NAMES,
    STACKED_EXPERTS,
    V3_COMPONENT_ALIASES,
    is_vision_name,
    scale_name,
)
from .int4 import ZERO
from .packed import unpacked_forms

V3_COMPONENT = re.compile(r"(?<![^.])(?:" + "|".join(V3_COMPONENT_ALIASES) + r")(?![^.])")
_LAYER = r"((?:layers|mtp)\.\d+\.)"
_STACK = (
    rf"(?:mlp|ffn)\.experts\.({'|'.join(STACKED_EXPERTS)})"
    rf"(\.weight|{'|'.join(map(re.escape, RESAVED_SCALE_SUFFIXES))})?"
)
LAYER_NAME = re.compile(_LAYER + "(.+)")
STACK_NAME, STACK_REST = re.compile(_LAYER + _STACK), re.compile(_STACK)
STACK_MARK = "_proj"  # in the name of every stack, and of few other tensors
STACK_DIMENSIONS = 3


def official_name(name: str) -> str:
    """Return the official name of a tensor; that of a stack of experts, and an unknown one, stays.

    >>> official_name("model.layers.3.self_attn.q_a_proj.weight_scale_inv")
    'layers.3.attn.wq_a.scale'
    """
    bare = name.removeprefix(MODEL_PREFIX)
    layer = LAYER_NAME.fullmatch(bare)
    return _official_rest(bare) if layer is None else layer[1] + _official_rest(layer[2], in_layer=True)


@lru_cache(maxsize=2**13)  # of a layer, which has the names of the other layers
def _official_rest(rest: str, *, in_layer: bool = False) -> str:
    """Return the official name of a tensor, or the rest of it behind the layer's prefix."""
    if (STACK_REST.fullmatch(rest) is not None) if in_layer else is_vision_name(rest):
        return rest
    table = RESAVED_LAYER_NAMES if in_layer else RESAVED_TOP_NAMES
    if rest in table:
        return table[rest]
    for suffix in (*RESAVED_SCALE_SUFFIXES, ZERO):
        weight = table.get(rest.removesuffix(suffix) + ".weight") if rest.endswith(suffix) else None
        if weight is not None:
            return zero_name(weight) if suffix == ZERO else scale_name(weight)
    return V3_COMPONENT.sub(lambda alias: V3_COMPONENT_ALIASES[alias[0]], rest)


def zero_name(weight_name: str) -> str:
    """Return the name of the zero points that belong to a weight."""
    return weight_name.removesuffix(".weight") + ZERO


def official_tensors(stored: Mapping[str, Stored], n_experts: Callable[[bool], int]) -> dict[str, Stored]:
    """Return tensors by official name; a stack of experts becomes a tensor for each matrix in it.

    Weights in forms of ModelOpt and compressed-tensors are pairs, and triples (see ``unpacked_forms``).

    ``n_experts`` gives the experts of a layer of the trunk (False) and of the draft (True).

    Raises:
        InventoryError: two tensors that mean the same, or a stack that cannot be cut.
    """
    tensors: dict[str, Stored] = {}
    stored = unpacked_forms(stored)
    for name, tensor in stored.items():
        stack = STACK_NAME.fullmatch(name.removeprefix(MODEL_PREFIX)) if STACK_MARK in name else None
        if stack is None:
            found = {official_name(name): tensor}
        else:
            experts = n_experts(stack[1].startswith(DRAFT_PREFIX))
            found = _cut(name, stack, tensor, _stack_height(stack, stored, name), experts)
        for official, place in found.items():
            if official in tensors:
                raise InventoryError(
                    f"tensor {official}: stored under two names",
                    where=tensor.file,
                    got=name if name != official else None,
                )
            tensors[official] = place
    return tensors


def _stack_height(stack: re.Match[str], stored: Mapping[str, Stored], name: str) -> int | None:
    """Return the rows of the stacked weight that the scales ``name`` belong to, None for a weight."""
    suffix = stack[3]
    if suffix is None or suffix == ".weight":
        return None
    stem = name.removesuffix(suffix)
    weight = stored.get(stem) or stored.get(stem + ".weight")
    if weight is None or len(weight.shape) != STACK_DIMENSIONS:
        raise InventoryError(f"tensor {name}: a scale without its weight", where=stored[name].file)
    return weight.shape[1]


def _cut(name: str, stack: re.Match[str], tensor: Stored, weight_rows: int | None, n_experts: int) -> dict[str, Stored]:
    """Return the matrices of a stack [experts, rows, columns], whose rows may be those of two weights."""
    parts = STACKED_EXPERTS[stack[2]]
    shape = tensor.shape
    if len(shape) != STACK_DIMENSIONS or shape[0] != n_experts or shape[1] % len(parts) or not shape[1]:
        raise InventoryError(
            f"tensor {name}: not a stack of {n_experts} experts",
            where=tensor.file,
            expected=f"[{n_experts}, rows of {' and '.join(parts)}, columns]",
            got=list(shape),
            hint="do config.json and the weights belong together?",
        )
    rows = shape[1] // len(parts)
    if weight_rows is not None and len(parts) > 1:
        # Only a scale block that ends where the first weight ends says which weight it belongs to.
        height = weight_rows // shape[1]
        if weight_rows % shape[1] or height & (height - 1):
            raise InventoryError(
                f"tensor {name}: scale blocks that may lie across {' and '.join(parts)}",
                where=tensor.file,
                expected=f"blocks of a power of two that divide {weight_rows // len(parts)} rows",
                got=f"{shape[1]} rows of scales for {weight_rows}",
                hint="store the experts one by one",
            )
    nbytes = tensor.nbytes // (n_experts * len(parts))
    found: dict[str, Stored] = {}
    for expert in range(n_experts):
        for number, part in enumerate(parts):
            official = f"{stack[1]}ffn.experts.{expert}.{part}"
            offset = tensor.offset + (expert * len(parts) + number) * nbytes
            place = Stored(tensor.file, tensor.dtype, (rows, shape[2]), offset, nbytes)
            found[official if weight_rows is None else scale_name(official)] = place
    return found
