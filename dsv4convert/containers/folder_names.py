"""Names of the files in a checkpoint folder."""

from __future__ import annotations

import re

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# What a folder holds besides config and weights that the weights are of no use without.
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


def file_names(count: int) -> list[str]:
    """Return the names of a folder's safetensors files, of which there are so many.

    >>> file_names(1), file_names(2)[1]
    (['model.safetensors'], 'model-00002-of-00002.safetensors')
    """
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def shard_name(rank: int, mp: int) -> str:
    """Return the file name of a rank's shard.

    >>> shard_name(3, 8)
    'model3-mp8.safetensors'
    """
    return f"model{rank}-mp{mp}.safetensors"
