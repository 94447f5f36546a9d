"""The types that the port ds4 (DwarfStar) reads, by a tensor's name: it stops at any other.

Source: the layout checks of the port, and descriptions of its V4.1 files. Names and keys of V4 are llama.cpp's, those
of V4.1 stand in ``ds4_v41``.
"""

from __future__ import annotations

from typing import NamedTuple

from ..containers.gguf_write import BOOL, STRING, KeyValue

# What the config of a checkpoint with a vision tower is called.
VISION_VARIANT = "vision-exp"

# Attention's projections and shared experts, which follow --dense.
DENSE = ("attn_q_a.", "attn_q_b.", "attn_kv.", "attn_output_a.", "attn_output_b.", "ffn_gate_shexp.", "ffn_up_shexp.",
         "ffn_down_shexp.")  # fmt: skip
GATE, UP, EXPERTS = "ffn_gate_exps.", "ffn_up_exps.", "_exps."


class Ds4Types(NamedTuple):
    """The types of one version's tensors.

    ``by_name`` says what tensors are, the usual type first, whose name below the block begins so; ``dense`` those of
    attention and shared experts, ``experts`` those of the routed ones.
    """

    by_name: tuple[tuple[str, tuple[str, ...]], ...]
    dense: tuple[str, ...]
    experts: tuple[str, ...]

    def type_of(self, name: str) -> str | None:
        """Return the type of a tensor by its name, None where the llama.cpp layout's holds, or --dense, --experts.

        >>> V4.type_of("blk.3.hc_attn_fn.weight"), V4.type_of("blk.3.attn_norm.weight")
        ('f16', None)
        """
        return next((types[0] for start, types in self.by_name if _base(name).startswith(start)), None)

    def allowed(self, name: str) -> tuple[str, ...]:
        """Return the types that a tensor may have; none where the layout's own is the only one.

        >>> V4.allowed("blk.3.attn_kv.weight"), V4.allowed("blk.3.attn_norm.weight")
        (('q8_0', 'q4_k'), ())
        """
        base = _base(name)
        if EXPERTS in base:
            return self.experts
        if base.startswith(DENSE):
            return self.dense
        return next((types for start, types in self.by_name if base.startswith(start)), ())


def vision_keys(architecture: str) -> list[KeyValue]:
    """Return the keys by which the port knows the text model of a checkpoint with a vision tower."""
    return [
        KeyValue(f"{architecture}.checkpoint_variant", STRING, VISION_VARIANT),
        KeyValue(f"{architecture}.vision.sidecar_required", BOOL, True),
    ]


def _base(name: str) -> str:
    """Return a tensor's name without its block."""
    return name.split(".", 2)[2] if name.startswith("blk.") else name


V4 = Ds4Types(
    by_name=(
        ("token_embd", ("f16",)),
        ("output.weight", ("q8_0", "q4_k")),
        ("output_hc_fn", ("f16",)),
        ("hc_attn_fn", ("f16",)),
        ("hc_ffn_fn", ("f16",)),
        ("attn_compressor_ape", ("f16",)),
        ("attn_compressor_kv", ("f16",)),
        ("attn_compressor_gate", ("f16",)),
        ("indexer_compressor_ape", ("f16",)),
        ("indexer_compressor_kv", ("f16",)),
        ("indexer_compressor_gate", ("f16",)),
        ("indexer.attn_q_b", ("f16", "q4_k")),
        ("indexer.proj", ("f16",)),
        ("ffn_gate_inp", ("f16",)),
    ),
    dense=("q8_0", "q4_k"),
    experts=("mxfp4", "q4_k", "q2_k", "iq2_xxs"),
)
V41 = Ds4Types(
    by_name=(
        ("token_embd", ("f16",)),
        ("output.weight", ("q8_0",)),
        ("hc_attn_fn", ("f16",)),
        ("hc_ffn_fn", ("f16",)),
        ("attn_compressor_kv", ("f16",)),
        ("attn_compressor_gate", ("f16",)),
        ("indexer.attn_k.", ("f16",)),
        ("indexer.attn_q_b", ("f16",)),
        ("indexer.proj", ("f16",)),
        ("ffn_gate_inp", ("f32",)),
        ("engram_q_norm", ("f32",)),
        ("engram_k_norm", ("f32",)),
        ("engram_kv", ("f16",)),
    ),
    dense=("q8_0", "q4_k"),
    experts=("iq2_xxs", "q2_k", "q4_k"),
)
