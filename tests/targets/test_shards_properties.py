"""Shards of any shape and number of ranks concatenate to the source."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dsv4convert.checkpoint.shards import open_shards
from dsv4convert.synth.tokenizer import SMALLEST_VOCABULARY
from dsv4convert.synth.write import write_synth

from ..oracles import shards as oracle
from .sharding import shard, unshard


@st.composite
def models(draw: st.DrawFn) -> tuple[int, dict[str, int | list[int]]]:
    """Draw a number of ranks, and a config that so many ranks can share."""
    mp = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8]))
    some = st.integers(1, 2)
    groups = mp * draw(some)
    # With one rank blocks may be ragged; more ranks take whole ones.
    unit = 128 if mp > 1 else draw(st.sampled_from([8, 40, 128]))
    ratio = draw(st.sampled_from([0, 4, 128]))
    return mp, {
        "num_hidden_layers": 1,
        "compress_ratios": [ratio],
        "num_nextn_predict_layers": 0,
        "num_hash_layers": draw(st.integers(0, 1)),
        "hidden_size": 32 * draw(st.integers(1, 5)),
        "moe_intermediate_size": 32 * draw(st.integers(1, 5)),
        "vocab_size": mp * draw(st.integers(-(-SMALLEST_VOCABULARY // mp), SMALLEST_VOCABULARY)),
        "o_groups": groups,
        "num_attention_heads": groups,
        "head_dim": unit,
        "qk_rope_head_dim": 8,
        "o_lora_rank": unit,
        "index_n_heads": mp,
        "index_head_dim": unit,
        "q_lora_rank": draw(st.integers(1, 150)),
        "n_routed_experts": mp * draw(some),
        "num_experts_per_tok": 1,
    }


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(model=models(), seed=st.integers(0, 99), expert_dtype=st.sampled_from(["fp4", "fp8"]))
def test_shards_concatenate_to_the_source(
    model: tuple[int, dict[str, int | list[int]]], seed: int, expert_dtype: str
) -> None:
    mp, overrides = model
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_synth(folder / "source", "tiny", overrides=overrides, seed=seed, mtp=False)
        shard(folder / "source", folder / "shards", mp, experts=expert_dtype)
        experts = overrides["n_routed_experts"]
        assert isinstance(experts, int)
        (whole,) = oracle.shards(oracle.load_checkpoint(folder / "source"), experts, 1, expert_dtype == "fp8")
        ranks = [load_file(folder / "shards" / f"model{rank}-mp{mp}.safetensors") for rank in range(mp)]
        joined: dict[str, torch.Tensor] = {}
        for weight in open_shards(folder / "shards").weights.values():
            for key in (weight.name, weight.name.removesuffix(".weight") + ".scale"):
                held = [rank[key] for rank in ranks if key in rank]
                if not held:
                    continue
                if weight.axis is not None:
                    assert len(held) == mp
                    held = [torch.cat([tensor.view(torch.uint8) for tensor in held], weight.axis).view(held[0].dtype)]
                elif weight.expert is None:
                    assert len(held) == mp
                assert all(oracle.bits(tensor) == oracle.bits(held[0]) for tensor in held)
                joined[key] = held[0]
        assert {k: oracle.bits(t) for k, t in joined.items()} == {k: oracle.bits(t) for k, t in whole.items()}
        unshard(folder / "shards", folder / "back")
        back = oracle.load_checkpoint(folder / "back")
        again = oracle.shards(back, experts, 1, False)[0]
        assert {k: oracle.bits(t) for k, t in again.items()} == {k: oracle.bits(t) for k, t in whole.items()}
