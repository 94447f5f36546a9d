"""The published way to divide a checkpoint, slow and whole in memory, in torch: what the streamed shards must equal.

Written from the description of the layout alone: it shares no code with dsv4convert.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file

TILE = 128
FP4_GROUP = 32
FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP4_VALUES = torch.cat([FP4_VALUES, -FP4_VALUES])

SPLIT_ROWS = r"embed|head|attn\.wq_b|attn\.indexer\.wq_b|attn\.wo_a|attn\.attn_sink|attn\.indexer\.weights_proj"
ROWS = re.compile(rf"(?:(?:layers|mtp)\.\d+\.)?(?:{SPLIT_ROWS})(?:\.weight|\.scale)?")
COLUMNS = re.compile(r"(?:layers|mtp)\.\d+\.attn\.wo_b\.(?:weight|scale)")
EXPERT = re.compile(r"(?:layers|mtp)\.\d+\.ffn\.experts\.(\d+)\.")
UNUSED = re.compile(r"mtp\.\d+\.(?:emb\..*|head\.weight)")


def load_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def shards(tensors: dict[str, torch.Tensor], experts: int, mp: int, fp8: bool) -> list[dict[str, torch.Tensor]]:
    """Return what each of ``mp`` ranks holds."""
    tensors = {name: tensor for name, tensor in tensors.items() if not UNUSED.fullmatch(name)}
    for name in [name for name in tensors if name.endswith("attn.wo_a.weight")]:
        scale = tensors.pop(name.replace(".weight", ".scale"), None)
        if scale is not None:
            tensors[name] = (tensors[name].float() * spread(scale.float(), tensors[name].shape)).bfloat16()
    for name in [name for name in tensors if EXPERT.match(name) and tensors[name].dtype == torch.int8]:
        scale_name = name.replace(".weight", ".scale")
        if fp8:
            tensors[name], tensors[scale_name] = fp4_to_fp8(tensors[name], tensors[scale_name])
        else:
            tensors[name] = tensors[name].view(torch.float4_e2m1fn_x2)
    ranks: list[dict[str, torch.Tensor]] = [{} for _ in range(mp)]
    for name, tensor in tensors.items():
        expert = EXPERT.match(name)
        for rank in range(mp):
            if expert:
                if int(expert[1]) // (experts // mp) == rank:
                    ranks[rank][name] = tensor
            elif ROWS.fullmatch(name):
                ranks[rank][name] = tensor.chunk(mp, dim=0)[rank]
            elif COLUMNS.fullmatch(name):
                ranks[rank][name] = tensor.chunk(mp, dim=1)[rank]
            else:
                ranks[rank][name] = tensor
    return ranks


def spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return each block's scale on each of its elements."""
    return scale.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)[: shape[0], : shape[1]]


def fp4_to_fp8(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return e4m3 codes and the e8m0 scale of each tile: its largest FP4 scale / 2^6."""
    nibbles = packed.view(torch.uint8).int()
    codes = torch.stack([nibbles & 15, nibbles >> 4], dim=-1).flatten(1)
    rows, columns = codes.shape
    exponents = scale.view(torch.uint8).int()
    out = torch.empty(rows, columns)
    tiles = torch.empty(-(-rows // TILE), -(-columns // TILE), dtype=torch.uint8)
    for i in range(0, rows, TILE):
        for j in range(0, columns, TILE):
            groups = exponents[i : i + TILE, j // FP4_GROUP : (j + TILE) // FP4_GROUP]
            tile = max(int(groups.max()) - 6, 0)
            tiles[i // TILE, j // TILE] = tile
            lift = torch.ldexp(torch.ones(groups.shape), groups - tile).repeat_interleave(FP4_GROUP, 1)
            values = FP4_VALUES[codes[i : i + TILE, j : j + TILE]]
            out[i : i + TILE, j : j + TILE] = values * lift
    return out.to(torch.float8_e4m3fn), tiles.view(torch.float8_e8m0fnu)


def bits(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """Return dtype, shape and bytes of a tensor: what equality bit for bit compares."""
    flat = tensor.contiguous().reshape(-1)
    return str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()
