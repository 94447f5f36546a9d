"""How model parallelism divides a model: which rank holds what, and which numbers of ranks divide it."""

from __future__ import annotations

from ..errors import UsageError
from .config import ModelConfig
from .tensors import Split

OUTPUT_GROUPS = "o_groups"

DRAFT_EXPERTS = "draft_n_routed_experts"

# What MP must divide, whatever the tensors hold: fields of a ModelConfig, with the config's keys.
DIVIDED_KEYS = (
    ("vocab_size", "vocab_size"),
    ("num_attention_heads", "num_attention_heads"),
    ("index_n_heads", "index_n_heads"),
    (OUTPUT_GROUPS, OUTPUT_GROUPS),
    ("n_routed_experts", "n_routed_experts"),
    (DRAFT_EXPERTS, "dspark_n_routed_experts"),
)

# The config keys whose product a split dimension is.
DIMENSION_KEYS = {
    "V": "vocab_size",
    "H": "num_attention_heads",
    "Hd": "num_attention_heads * head_dim",
    "G*o_lora": "o_groups * o_lora_rank",
    "Hi": "index_n_heads",
    "Hi*di": "index_n_heads * index_head_dim",
}

SPLIT_AXIS = {Split.ROWS: 0, Split.COLUMNS: 1, Split.RUNS: 0, Split.EXPERT: None, Split.COPY: None}


def check_divides(
    config: ModelConfig, mp: int, where: object, output_mp: int | None = None, *, has_draft: bool = True
) -> None:
    """Check that ``mp`` ranks can share vocabulary, heads, groups and experts; ``output_mp`` share the groups, or all.

    Without ``has_draft`` nothing is asked of a draft's experts.

    Raises:
        UsageError: they cannot; names the config key and both numbers.
    """
    if mp < 1:
        raise UsageError("--mp: not a number of ranks", expected="1 or more", got=mp)
    for field, key in DIVIDED_KEYS:
        if field == DRAFT_EXPERTS and not has_draft:
            continue
        value = getattr(config, field)
        ranks = output_mp if key == OUTPUT_GROUPS and output_mp is not None else mp
        if value % ranks:
            raise UsageError(
                f"key {key}: {value} cannot be divided among {ranks} ranks",
                where=where,
                expected=f"a divisor of {value} for {'--mp' if ranks == mp else '--o-proj-tp'}",
                got=ranks,
            )


def check_blocks(name: str, symbol: str, length: int, block: int, mp: int, where: object) -> None:
    """Check that ``mp`` ranks can share a dimension of ``length`` whose every ``block`` elements share a scale.

    ``symbol`` is the dimension's name in the tables.

    Raises:
        UsageError: they cannot; names the config keys and the numbers.
    """
    # One rank takes a ragged last block as it is.
    if mp > 1 and length % (block * mp):
        blocks = -(-length // block)
        raise UsageError(
            f"keys {DIMENSION_KEYS.get(symbol, symbol)}: the {length} of tensor {name} are {blocks} blocks of {block}, "
            f"which cannot be divided among {mp} ranks",
            where=where,
            expected=f"whole blocks of {block} for every rank",
            got=f"{length / mp:g} elements each",
        )


def local_shape(shape: tuple[int, ...], split: Split, mp: int) -> tuple[int, ...]:
    """Return the shape of one rank's part of a weight."""
    if split is Split.RUNS:
        return (run_length(shape[0], mp), *shape[1:])
    axis = SPLIT_AXIS[split]
    return shape if axis is None else (*shape[:axis], shape[axis] // mp, *shape[axis + 1 :])


def run_length(rows: int, mp: int) -> int:
    """Return the rows of a table that each of ``mp`` ranks has, those included that fill up the last ones.

    >>> run_length(384016682, 4)
    96004171
    """
    return -(-rows // mp)


def expert_rank(expert: int, n_experts: int, mp: int) -> int:
    """Return the rank that holds a routed expert."""
    return expert // (n_experts // mp)
