"""Turns what a user types into token ids: a list of ids, a text, or a conversation; and ids into text."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from ..checkpoint.tokenizer import TOKENIZER_NAME, Tokenizer, load_tokenizer
from ..containers.gguf import is_gguf, open_gguf
from ..containers.json_object import read_json
from ..containers.presence import is_file
from ..errors import FileFormatError, TokenizerError, UsageError, missing_package, named_by_user
from ..model.config import CHAT_TEMPLATES, Version
from .vision import IMAGE

# What stands for an image in a list of token ids.
IMAGE_WORD = "image"

# Below 2^63, in which arrays hold ids.
MAX_ID_DIGITS = 18

# A conversation of the longest context takes a few MiB.
MAX_CHAT_BYTES = 64 * 2**20

# A tokenizer that only the chosen pre-tokenizer name would tell apart still encodes and decodes.
UNNAMED_PRE = "unnamed"


def parse_tokens(text: str) -> list[int]:
    """Return the ids of a list such as ``1, 2, 3``, with ``vision.IMAGE`` for the word ``image``.

    >>> parse_tokens("0, image,5")
    [0, -1, 5]

    Raises:
        UsageError: not a list of numbers from 0.
    """
    parts = text.replace(",", " ").split()
    if not all(part == IMAGE_WORD or (part.isdecimal() and len(part) <= MAX_ID_DIGITS) for part in parts):
        raise UsageError("--tokens: not a list of token ids", expected="a list such as 1,2,3", got=repr(text[:100]))
    return [IMAGE if part == IMAGE_WORD else int(part) for part in parts]


def find_tokenizer(model: Path, vocab_size: int, folder: Path | None = None) -> Tokenizer | None:
    """Return the tokenizer in ``folder``, or the model's own; None where it has none that can be read.

    Raises:
        TokenizerError: ``folder`` was given and its tokenizer cannot be read.
    """
    if folder is not None:
        return load_tokenizer(folder, vocab_size, UNNAMED_PRE)
    if is_gguf(model):
        return _gguf_tokenizer(model)
    if not is_file(model / TOKENIZER_NAME):
        return None
    try:
        return load_tokenizer(model, vocab_size, UNNAMED_PRE)
    except TokenizerError:
        return None


def _gguf_tokenizer(model: Path) -> Tokenizer | None:
    """Return the vocabulary of a GGUF, which can decode; encoding needs the tokenizer.json."""
    file = open_gguf(model)
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    types = file.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(types, list) or len(tokens) != len(types):
        return None
    return Tokenizer(
        model=str(file.metadata.get("tokenizer.ggml.model", "")),
        pre=str(file.metadata.get("tokenizer.ggml.pre", "")),
        tokens=tuple(tokens),
        token_types=tuple(types),
        merges=(),
        special_ids={},
        add_special={},
        chat_templates={},
        path=file.files[0],
    )


def encode_text(text: str, tokenizer: Tokenizer | None) -> list[int]:
    """Return the ids of ``text``, with a begin-of-sentence token where the tokenizer adds one.

    Raises:
        UsageError: there is no tokenizer that can encode, or the text is not UTF-8.
        DeviceError, TokenizerError: as for ``Tokenizer.encode``.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("the text is not UTF-8", hint="check the encoding of the terminal") from None
    if tokenizer is None or tokenizer.path.name != TOKENIZER_NAME:
        raise UsageError(
            f"{TOKENIZER_NAME} is missing",
            hint="pass its folder with --tokenizer, or token ids with --tokens",
        )
    ids = tokenizer.encode(text)
    if tokenizer.add_special.get("bos") and tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id, *ids]
    return ids


def encode_chat(path: Path, tokenizer: Tokenizer | None, version: Version) -> list[int]:
    """Return the ids of the prompt that a conversation makes, through our chat template of the model's version.

    The file holds a list of messages, or an object with ``messages`` and what else the template takes
    (``tools``, ``enable_thinking``).

    Raises:
        InputMissingError, FileFormatError: the file is not there, or holds no conversation.
        DeviceError: the package jinja2 is not installed.
        UsageError, TokenizerError: as for ``encode_text``.
    """
    inputs = _read_chat(path)
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise missing_package("--chat", "jinja2", "text", "use --text") from None

    def refuse(message: str) -> None:
        raise TemplateError(message)

    source = resources.files("dsv4convert.model").joinpath(CHAT_TEMPLATES[version]).read_text(encoding="utf-8")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    inputs.setdefault("add_generation_prompt", True)
    try:
        prompt = environment.from_string(source).render(**inputs)
    except (TemplateError, TypeError, ValueError) as error:
        raise FileFormatError(f"conversation not accepted by the chat template ({error})", where=path) from None
    # The prompt spells out its begin-of-sentence token.
    if tokenizer is not None:
        bos = tokenizer.bos_token_id
        bos_text = tokenizer.tokens[bos] if bos is not None else ""
        if bos_text and prompt.startswith(bos_text) and tokenizer.add_special.get("bos"):
            prompt = prompt.removeprefix(bos_text)
    return encode_text(prompt, tokenizer)


def _read_chat(path: Path) -> dict[str, Any]:
    with named_by_user():
        document = read_json(path, MAX_CHAT_BYTES, error=FileFormatError, hint=None)
    inputs = {"messages": document} if isinstance(document, list) else document
    messages = inputs.get("messages") if isinstance(inputs, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise FileFormatError(
            "not a conversation", where=path, expected="a list of messages, or an object with messages"
        )
    return dict(inputs)
