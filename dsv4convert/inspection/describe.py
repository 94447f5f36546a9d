"""Describes a checkpoint folder, a GGUF or a folder of shards, from headers alone.

A description does not stop at the first thing that is wrong: whatever can be read is described, and what
does not belong or is not there is listed. Only files that cannot be read at all end in an error.
"""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.folder import BY_INDEX
from ..checkpoint.shards import is_shard_folder
from ..containers.gguf import is_gguf
from ..containers.presence import exists, is_file, is_folder
from ..errors import InputMissingError
from ..model.mlx_names import is_mlx
from .description import Description
from .folder import describe_folder, readable_headers
from .gguf import describe_gguf
from .mlx import describe_mlx
from .shards import describe_shards


def inspect_path(path: Path, index: str = BY_INDEX) -> Description:
    """Describe what there is at ``path``: a checkpoint folder, one in MLX's layout, a GGUF or a folder of shards.

    Raises:
        InputMissingError: nothing there, or nothing that is one of them.
        FileFormatError: a file with a header that cannot be read.
        UnsupportedError: another architecture.
    """
    if not exists(path):
        raise InputMissingError("no such file or folder", where=path)
    if is_file(path) and path.suffix == ".safetensors":
        path = path.parent
    if is_shard_folder(path):
        return describe_shards(path)
    if is_gguf(path):
        return describe_gguf(path)
    if is_folder(path):
        headers = readable_headers(path, index)
        if headers is not None and is_mlx(headers[0]):
            return describe_mlx(path, headers)
        return describe_folder(path, index, headers)
    raise InputMissingError(
        "neither a checkpoint folder nor a GGUF", where=path, hint="pass a folder with config.json or a .gguf file"
    )
