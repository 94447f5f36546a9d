"""A small checkpoint whose rows low-bit types fill, and the types that take their library long."""

from __future__ import annotations

# Rows of whole super-blocks.
WHOLE = {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "q_lora_rank": 256,
    "o_lora_rank": 64,
    "num_attention_heads": 2,
    "o_groups": 2,
    "num_experts_per_tok": 1,
}
# Few weights: some types take the library microseconds an element.
SMALL = {"ratios": [4], "experts": 2, "vocab": 384}

# These take tens of microseconds.
SLOW = ("iq1_s", "iq1_m", "iq2_s", "iq2_xs")
