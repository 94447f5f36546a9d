"""Loads model-parallel shards rank by rank with torch.distributed on CPU, and runs one split layer of each kind.

python docs/examples/load_shards.py                       a tiny checkpoint, two ranks
python docs/examples/load_shards.py CHECKPOINT SHARDS     your own, as many ranks as there are shards

Every rank loads its own file only, strictly: a tensor that is missing, too many or of the wrong shape is
an error. Then a column-parallel linear (wq_b), a row-parallel one (wo_b, with an all-reduce) and an
expert-parallel MoE are computed on the ranks together and held against the whole checkpoint. Products are
taken in float64, so that only the order of the sums is left to differ.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

TOKENS = 6
TOLERANCE = 1e-12

# Which dimension of a tensor the ranks share; whatever matches neither is on every rank whole.
SPLIT_ROWS = re.compile(r"(.*\.)?(embed|head|wq_b|wo_a|weights_proj)\.(weight|scale)|.*\.attn_sink")
SPLIT_COLUMNS = re.compile(r".*\.wo_b\.(weight|scale)")
EXPERT = re.compile(r".*\.ffn\.experts\.(\d+)\..*")
# Stored as FP8 with scales in the checkpoint, as BF16 in the shards.
WO_A = re.compile(r".*\.attn\.wo_a\.(weight|scale)")

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E2M1 = torch.cat([E2M1, -E2M1])


def skeleton(checkpoint: Path, n_experts: int, rank: int, mp: int) -> nn.Module:
    """Return a module with a place of the right shape and dtype for each tensor of a rank, and no data."""
    model = nn.Module()
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                shape, dtype = list(part.get_shape()), file.get_tensor(name).dtype
                expert = EXPERT.fullmatch(name)
                if expert is not None:
                    if int(expert[1]) // (n_experts // mp) != rank:
                        continue
                    if dtype == torch.int8:  # two FP4 codes a byte: the shards call them so
                        dtype = torch.float4_e2m1fn_x2
                if WO_A.fullmatch(name):
                    if name.endswith(".scale"):
                        continue
                    dtype = torch.bfloat16
                if SPLIT_ROWS.fullmatch(name):
                    shape[0] //= mp
                elif SPLIT_COLUMNS.fullmatch(name):
                    shape[1] //= mp
                declare(model, name, torch.empty(shape, dtype=dtype, device="meta"))
    return model


def declare(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Register a buffer under a dotted name."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(model, part):
            model.add_module(part, nn.Module())
        model = getattr(model, part)
    model.register_buffer(leaf, tensor)


def values(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return a linear's weight as float64: codes times the scale of their block."""
    weight, scale = tensors[f"{name}.weight"], tensors.get(f"{name}.scale")
    if scale is None:
        return weight.double()
    if weight.dtype in (torch.int8, torch.float4_e2m1fn_x2):
        packed = weight.view(torch.uint8).int()
        decoded = E2M1[torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)]
        return decoded * scale.float().double().repeat_interleave(32, 1)
    spread = scale.float().double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return weight.float().double() * spread[: weight.shape[0], : weight.shape[1]]


def expert_mlp(tensors: dict[str, torch.Tensor], name: str, x: torch.Tensor, limit: float) -> torch.Tensor:
    """Return w2(silu(w1 x) * w3 x), both factors clamped."""
    gate = (x @ values(tensors, f"{name}.w1").T).clamp(max=limit)
    up = (x @ values(tensors, f"{name}.w3").T).clamp(-limit, limit)
    return (nn.functional.silu(gate) * up) @ values(tensors, f"{name}.w2").T


def moe(
    tensors: dict[str, torch.Tensor], layer: str, x: torch.Tensor, config: dict[str, float], experts: range
) -> torch.Tensor:
    """Return what ``experts`` add to the routed output of a layer; every rank routes all tokens alike."""
    scores = nn.functional.softplus(x @ values(tensors, f"{layer}.ffn.gate").T).sqrt()
    chosen = (scores + tensors[f"{layer}.ffn.gate.bias"]).topk(int(config["num_experts_per_tok"]), dim=-1).indices
    weights = scores.gather(1, chosen)
    weights = weights / weights.sum(-1, keepdim=True) * config["routed_scaling_factor"]
    out = torch.zeros_like(x)
    for expert in experts:
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        if len(token):
            y = expert_mlp(tensors, f"{layer}.ffn.experts.{expert}", x[token], config["swiglu_limit"])
            out.index_add_(0, token, y * weights[token, slot, None])
    return out


def check(rank: int, what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Say on rank 0 how far a result is from the whole model's; stop if it is not the same."""
    error = ((got - expected).norm() / expected.norm()).item()
    if not error <= TOLERANCE:
        raise SystemExit(f"rank {rank}: {what}: off by {error:.1e}")
    if rank == 0:
        print(f"{what:<52} {list(got.shape)}  relative difference {error:.1e}")


def run(rank: int, mp: int, checkpoint: Path, shards: Path, meeting_place: Path) -> None:
    """Be one rank."""
    dist.init_process_group("gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=mp)
    config = json.loads((shards / "config.json").read_text())
    n_experts = config["n_routed_experts"]

    # Strict as safetensors.torch.load_model, and without a copy: the file's tensors take the places.
    model = skeleton(checkpoint, n_experts, rank, mp)
    wanted = {name: place.dtype for name, place in model.named_buffers()}
    model.load_state_dict(load_file(shards / f"model{rank}-mp{mp}.safetensors"), strict=True, assign=True)
    mine = dict(model.named_buffers())
    if wrong := [name for name, tensor in mine.items() if tensor.dtype != wanted[name]]:
        raise SystemExit(f"rank {rank}: {wrong[0]}: expected {wanted[wrong[0]]}, got {mine[wrong[0]].dtype}")
    print(f"rank {rank}: {len(mine)} tensors, {sum(tensor.nbytes for tensor in mine.values())} bytes")
    dist.barrier()

    # The whole model, only to compare with.
    whole: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        whole.update(load_file(path))
    layer = f"layers.{config['num_hidden_layers'] - 1}"
    torch.manual_seed(0)

    # Column-parallel: every rank makes the queries of its own heads; the outputs lie side by side.
    weight = values(whole, f"{layer}.attn.wq_b")
    x = torch.randn(TOKENS, weight.shape[1], dtype=torch.float64)
    local = x @ values(mine, f"{layer}.attn.wq_b").T
    parts = [torch.empty_like(local) for _ in range(mp)]
    dist.all_gather(parts, local)
    check(rank, "column-parallel wq_b, outputs side by side", torch.cat(parts, 1), x @ weight.T)

    # Row-parallel: every rank takes its own columns of the input; the outputs are summed.
    weight = values(whole, f"{layer}.attn.wo_b")
    x = torch.randn(TOKENS, weight.shape[1], dtype=torch.float64)
    total = x.chunk(mp, dim=1)[rank] @ values(mine, f"{layer}.attn.wo_b").T
    dist.all_reduce(total)
    check(rank, "row-parallel wo_b, outputs summed", total, x @ weight.T)

    # Expert-parallel: every rank runs its own experts on the tokens routed to them; the outputs are summed.
    x = torch.randn(TOKENS, config["hidden_size"], dtype=torch.float64)
    each = n_experts // mp
    total = moe(mine, layer, x, config, range(rank * each, (rank + 1) * each))
    dist.all_reduce(total)
    check(rank, "expert-parallel MoE, outputs summed", total, moe(whole, layer, x, config, range(n_experts)))
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        if len(sys.argv) == 3:
            checkpoint, shards = Path(sys.argv[1]), Path(sys.argv[2])
        else:
            checkpoint, shards = Path(name) / "tiny", Path(name) / "tiny-mp2"
            program = [sys.executable, "-m", "dsv4convert"]
            subprocess.run([*program, "synth", checkpoint, "--preset", "tiny", "--quiet"], check=True)
            subprocess.run([*program, "shard", checkpoint, shards, "--mp", "2", "--quiet"], check=True)
        mp = len(list(shards.glob("model*-mp*.safetensors")))
        arguments = (mp, checkpoint, shards, Path(name) / "meeting")
        torch.multiprocessing.spawn(run, arguments, nprocs=mp)


if __name__ == "__main__":
    main()
