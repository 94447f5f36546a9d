"""Names of the files in a checkpoint folder."""

from __future__ import annotations

import re

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# What a folder holds beside config and weights that the weights are of no use without.
AUXILIARY_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
)

SHARD_NAME = re.compile(r"model(\d{1,9})-mp(\d{1,9})\.safetensors")


def shard_name(rank: int, mp: int) -> str:
    """Return the file name of a rank's shard.

    >>> shard_name(3, 8)
    'model3-mp8.safetensors'
    """
    return f"model{rank}-mp{mp}.safetensors"
