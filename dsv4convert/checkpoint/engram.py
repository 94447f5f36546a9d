"""Computes the token map of V4.1's n-gram tables from tokenizer.json.

The map is defined by the ``tokenizers`` package: two ids are one where their decoded texts, normalised with
its Unicode tables, are alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..containers.folder_names import CONFIG_NAME
from ..containers.presence import exists
from ..containers.untrusted import read_whole
from ..errors import DeviceError, TokenizerError, missing_package
from ..model.config import ModelConfig
from ..model.engram import EngramConstants, engram_constants
from .tokenizer import MAX_TOKENIZER_BYTES, TOKENIZER_NAME

# Decoded bytes that are no UTF-8 show as this; the token's own spelling then stands for it.
REPLACEMENT = "\ufffd"
# A text that is nothing but space keeps one: this stands in for it while spaces at the ends go.
KEPT_SPACE = "\ue000"


def read_engram_constants(folder: Path, config: ModelConfig) -> EngramConstants:
    """Return the constants of the n-gram tables of the checkpoint in ``folder``.

    Raises:
        DeviceError: the package ``tokenizers`` is not installed.
        TokenizerError: tokenizer.json is missing or unreadable, or has ids beyond the vocabulary.
        ConfigError: the config has no tables, or the map or the tables have another size than it says.
    """
    if config.engram is None:
        raise ValueError("a config without engram tables has no constants")
    return engram_constants(config.engram, read_token_map(folder, config.vocab_size), folder / CONFIG_NAME)


def token_map_notes(folder: Path, config: ModelConfig) -> tuple[str, ...]:
    """Check that a folder's tokenizer is the one that its n-gram tables are for; notes say where that is not known.

    Raises:
        ConfigError: as for ``read_engram_constants``: the model would look up the wrong rows.
    """
    if config.engram is None or not exists(folder / TOKENIZER_NAME):
        return ()
    try:
        read_engram_constants(folder, config)
    except (DeviceError, TokenizerError) as error:
        return (f"whether the tokenizer belongs to the n-gram tables was not checked ({error.what})",)
    return ()


def read_token_map(folder: Path, vocab_size: int) -> npt.NDArray[np.int32]:
    """Return the token map, int32 [vocab_size], of the tokenizer in ``folder``.

    Raises:
        DeviceError, TokenizerError: as for ``read_engram_constants``.
    """
    from hashlib import sha256

    path = folder / TOKENIZER_NAME
    if not exists(path):
        raise TokenizerError(f"{path.name} is missing", where=folder, hint="is the download complete?")
    text = read_whole(path, MAX_TOKENIZER_BYTES, error=TokenizerError)
    key = sha256(text).hexdigest(), vocab_size
    if key not in _MAPS:
        _MAPS[key] = _token_map(text, path, vocab_size)
    return _MAPS[key]


# By digest of tokenizer.json and size of the vocabulary: one for each model that a program opens.
_MAPS: dict[tuple[str, int], npt.NDArray[np.int32]] = {}


def _token_map(text: bytes, path: Path, vocab_size: int) -> npt.NDArray[np.int32]:
    """Return the map: keys of texts numbered in the order in which ids first have them."""
    backend, normalizer = _backend(text, path)
    numbers: dict[str, int] = {}
    mapped = np.empty(vocab_size, np.int32)
    texts = backend.decode_batch([[token] for token in range(vocab_size)], skip_special_tokens=False)
    for token, decoded in enumerate(texts):
        if REPLACEMENT in decoded:
            key = backend.id_to_token(token) or decoded
        else:
            key = normalizer.normalize_str(decoded) or decoded
        mapped[token] = numbers.setdefault(key, len(numbers))
    mapped.flags.writeable = False
    return mapped


def _backend(text: bytes, path: Path) -> tuple[Any, Any]:
    """Return the tokenizer and the normaliser of its texts."""
    try:
        from tokenizers import Regex, Tokenizer, normalizers
    except ImportError:
        raise missing_package("the token map of the engram tables", "tokenizers", "text") from None
    try:
        backend = Tokenizer.from_buffer(text)
    except Exception as error:  # noqa: BLE001 - the binding raises bare Exception
        raise TokenizerError(f"not readable by the package tokenizers ({error})", where=path) from None
    steps = [
        normalizers.NFKC(),
        normalizers.NFD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        normalizers.Replace(Regex(r"^ $"), KEPT_SPACE),
        normalizers.Strip(),
        normalizers.Replace(KEPT_SPACE, " "),
    ]
    return backend, normalizers.Sequence(steps)
