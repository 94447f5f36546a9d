"""Writing safetensors: the header as bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from json.encoder import encode_basestring_ascii

from ..errors import UsageError
from ..plan import align_up
from .safetensors import HEADER_LENGTH_BYTES, MAX_HEADER_BYTES, METADATA_KEY

# The payload starts at a multiple of this, so that a mapped file gives aligned tensors.
HEADER_ALIGNMENT = 8

# What transformers asks of a file before it loads it.
PYTORCH_METADATA = {"format": "pt"}

# Made once: json.dumps makes an encoder for every call.
compact_json = json.JSONEncoder(separators=(",", ":")).encode
# What it makes of names, of which there are so many.
json_string = encode_basestring_ascii


def safetensors_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[int]]:
    """Return the head of a file that holds ``tensors`` in the given order, and each one's offset in the file.

    ``tensors`` are (name, safetensors dtype, shape, bytes). The format allows no gaps, so a caller that wants
    aligned tensors gives the widest elements first (``safetensors_file`` does).

    Raises:
        UsageError: more tensors than a header may list.
    """
    # Written piece by piece: the generic encoder needs a dict and three lists per tensor.
    parts = [f"{compact_json(METADATA_KEY)}:{compact_json(dict(metadata))}"] if metadata else []
    starts: list[int] = []
    position = 0
    shapes: dict[tuple[int, ...], str] = {}  # of which there are few
    for name, dtype, shape, nbytes in tensors:
        end = position + nbytes
        if shape not in shapes:
            shapes[shape] = ",".join(map(str, shape))
        parts.append(
            f'{json_string(name)}:{{"dtype":"{dtype}","shape":[{shapes[shape]}],"data_offsets":[{position},{end}]}}'
        )
        starts.append(position)
        position = end
    text = ("{" + ",".join(parts) + "}").encode()
    text = text.ljust(align_up(len(text), HEADER_ALIGNMENT))
    if len(text) > MAX_HEADER_BYTES:
        raise UsageError(
            "too many tensors for one safetensors file",
            expected=f"a header of at most {MAX_HEADER_BYTES} bytes",
            got=len(text),
            hint="use a smaller --max-file-size",
        )
    header = len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text
    return header, [len(header) + start for start in starts]
