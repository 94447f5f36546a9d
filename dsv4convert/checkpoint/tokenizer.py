"""Reads tokenizer.json and tokenizer_config.json into the token lists that a GGUF file carries."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..containers.folder_names import CONFIG_NAME
from ..containers.json_object import read_optional_json_object
from ..containers.presence import exists
from ..containers.untrusted import read_whole
from ..errors import TokenizerError, missing_package, noted

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
CHAT_TEMPLATE_JSON_NAME = "chat_template.json"
TEMPLATES_FOLDER = "additional_chat_templates"
TEMPLATE_SUFFIX = ".jinja"
DEFAULT_TEMPLATE = "default"
MAX_TEMPLATES = 256

# The published tokenizer.json is 6 MiB; ten times that is no tokenizer of this model.
MAX_TOKENIZER_BYTES = 32 * 2**20

# llama.cpp's name for "byte-level BPE, as GPT-2 introduced it".
GGML_MODEL_BPE = "gpt2"

# The regular expressions of the published pre_tokenizer section, in order. llama.cpp runs the same three
# under the name joyai-llm, after the first model that came with this tokenizer without a BOS token.
JOYAI_LLM_PATTERNS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
PATTERNS_BY_PRE: dict[str, tuple[str, ...]] = {"joyai-llm": JOYAI_LLM_PATTERNS}

# The roles a special token can have, in the order llama.cpp's converter looks for them.
SPECIAL_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

# Added tokens that some tokenizers forget to mark as special; llama.cpp's converter knows them by their look.
CONTROL_TEXTS = frozenset({"<pad>", "<mask>", "<2mass>", "[@BOS@]"})
CONTROL_BRACKETS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))

# SentencePiece writes a space as U+2581; llama.cpp wants plain spaces in tokens that it matches literally.
SENTENCEPIECE_SPACE = "\u2581"

# Byte-level BPE shows a byte that has no printable character as the character 256 places up.
BYTE_LEVEL_OFFSET = 256


class TokenType(IntEnum):
    """The token types of ``tokenizer.ggml.token_type`` that a byte-level BPE uses."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE vocabulary as a GGUF file holds it.

    ``tokens`` and ``token_types`` have one entry per row of the embedding. ``special_ids`` and
    ``add_special`` go by role ("bos", "eos", "pad"...). ``chat_templates`` are those of the folder, by
    name; "default" is the one without a name. ``notes`` say what of them could not be used.
    """

    model: str
    pre: str
    tokens: tuple[str, ...] = field(repr=False)
    token_types: tuple[int, ...] = field(repr=False)
    merges: tuple[str, ...] = field(repr=False)
    special_ids: Mapping[str, int]
    add_special: Mapping[str, bool]
    chat_templates: Mapping[str, str] = field(repr=False)
    path: Path
    notes: tuple[str, ...] = ()

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens, padding included."""
        return len(self.tokens)

    @property
    def bos_token_id(self) -> int | None:
        """Return the id of the begin-of-sentence token."""
        return self.special_ids.get("bos")

    @property
    def eos_token_id(self) -> int | None:
        """Return the id of the end-of-sentence token."""
        return self.special_ids.get("eos")

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``; special tokens in it count as such, none is added.

        Raises:
            DeviceError: the package ``tokenizers`` is not installed.
            TokenizerError: that package cannot read the file.
        """
        return [int(i) for i in _backend(self.path).encode(text, add_special_tokens=False).ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; padding is left out, incomplete UTF-8 becomes U+FFFD.

        Raises:
            TokenizerError: an id outside the vocabulary.
        """
        to_byte = unicode_to_bytes()
        text = bytearray()
        for token_id in ids:
            if not 0 <= token_id < len(self.tokens):
                raise TokenizerError(
                    "token id outside the vocabulary", expected=f"0-{len(self.tokens) - 1}", got=token_id
                )
            token, kind = self.tokens[token_id], self.token_types[token_id]
            if kind == TokenType.NORMAL:
                text += bytes(to_byte[c] for c in token)
            elif kind != TokenType.UNUSED:
                text += token.encode("utf-8")
        return text.decode("utf-8", "replace")


@lru_cache(maxsize=1)
def bytes_to_unicode() -> dict[int, str]:
    """Return the byte-level alphabet: the printable character that stands for each byte.

    Bytes that are visible Latin-1 characters stand for themselves; the others, in order, for the
    characters from U+0100 on (GPT-2's alphabet).
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {byte: chr(byte) for byte in visible}
    hidden = (byte for byte in range(256) if byte not in alphabet)
    alphabet.update({byte: chr(BYTE_LEVEL_OFFSET + i) for i, byte in enumerate(hidden)})
    return alphabet


@lru_cache(maxsize=1)
def unicode_to_bytes() -> dict[str, int]:
    """Return the inverse of ``bytes_to_unicode``."""
    return {char: byte for byte, char in bytes_to_unicode().items()}


def load_tokenizer(folder: Path, vocab_size: int, pre: str | None = None) -> Tokenizer:
    """Read the tokenizer of ``folder`` and pad it to ``vocab_size`` tokens.

    ``pre`` names llama.cpp's pre-tokenizer; None recognises it by the file's ``pre_tokenizer`` section.
    Token types, padding and special ids follow llama.cpp's converter.

    Raises:
        TokenizerError: a file that is missing or malformed, an unknown kind of tokenizer, a vocabulary
            that is larger than ``vocab_size`` or gives one id to two tokens.
    """
    path = folder / TOKENIZER_NAME
    document = _read_json(path, required=True)
    settings = _read_json(folder / TOKENIZER_CONFIG_NAME, required=False)
    model = _section(document, "model", path)
    _check_kind(document, model, path)
    if pre is None:
        pre = recognise_pre(document, path)
    vocab = _vocab(model, path)
    added = _added_tokens(document, path)
    tokens, types = _token_lists(vocab, added, _special_texts(settings, added), vocab_size, path)
    templates, notes = _chat_templates(folder, settings)
    special_ids = _special_ids(settings, added, _read_json(folder / CONFIG_NAME, required=False))
    for role, token_id in special_ids.items():
        if not 0 <= token_id < vocab_size:
            raise TokenizerError(
                f"{role} token outside the vocabulary",
                where=path,
                expected=f"0-{vocab_size - 1}",
                got=token_id,
            )
    return Tokenizer(
        model=GGML_MODEL_BPE,
        pre=pre,
        tokens=tokens,
        token_types=types,
        merges=_merges(model, path),
        special_ids=special_ids,
        add_special=_add_special(document, settings),
        chat_templates=templates,
        path=path,
        notes=notes,
    )


def recognise_pre(document: Mapping[str, Any], where: object) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a parsed tokenizer.json.

    Raises:
        TokenizerError: the section is none that we know, or text is normalised before it.
    """
    steps = _flatten(document.get("pre_tokenizer"), "pretokenizers")
    normalizers = _flatten(document.get("normalizer"), "normalizers")
    hint = "name llama.cpp's pre-tokenizer with --tokenizer-pre if it has one for this tokenizer"
    if normalizers:
        raise TokenizerError(
            "unknown tokenizer: a normalizer changes the text first",
            where=where,
            expected="no normalizer",
            got=" + ".join(_kind(step) for step in normalizers)[:200],
            hint=hint,
        )
    for pre, patterns in PATTERNS_BY_PRE.items():
        if len(steps) != len(patterns) + 1 or not _is_plain_byte_level(steps[-1]):
            continue
        if all(_is_isolating_split(step, p) for step, p in zip(steps, patterns, strict=False)):
            return pre
    raise TokenizerError(
        "unknown pre-tokenizer",
        where=where,
        expected=f"that of {', '.join(PATTERNS_BY_PRE)} (Split + Split + Split + ByteLevel)",
        got=(" + ".join(_kind(step) for step in steps) or "none")[:200],
        hint=hint,
    )


def _flatten(step: object, key: str) -> list[Mapping[str, Any]]:
    """Return the steps of a (nested) Sequence as one list."""
    if not isinstance(step, dict):
        return []
    if step.get("type") == "Sequence" and isinstance(step.get(key), list):
        return [inner for part in step[key] for inner in _flatten(part, key)]
    return [step]


def _kind(step: Mapping[str, Any]) -> str:
    pattern = step.get("pattern")
    if step.get("type") == "Split" and isinstance(pattern, dict):
        return f"Split({next(iter(pattern.values()), '')!s})"
    return str(step.get("type"))


def _is_isolating_split(step: Mapping[str, Any], pattern: str) -> bool:
    return (
        step.get("type") == "Split"
        and step.get("pattern") == {"Regex": pattern}
        and step.get("behavior") == "Isolated"
        and step.get("invert") is False
    )


def _is_plain_byte_level(step: Mapping[str, Any]) -> bool:
    return step.get("type") == "ByteLevel" and step.get("add_prefix_space") is False and step.get("use_regex") is False


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    if required and not exists(path):
        raise TokenizerError(f"{path.name} is missing", where=path.parent, hint="is the download complete?")
    return read_optional_json_object(path, MAX_TOKENIZER_BYTES, error=TokenizerError)


def _section(document: Mapping[str, Any], key: str, where: object) -> Mapping[str, Any]:
    section = document.get(key)
    if not isinstance(section, dict):
        raise TokenizerError(f"key {key} is missing or not an object", where=where)
    return section


def _check_kind(document: Mapping[str, Any], model: Mapping[str, Any], where: object) -> None:
    decoder = document.get("decoder")
    decoder_kind = decoder.get("type") if isinstance(decoder, dict) else None
    kind = str(model.get("type"))
    if kind != "BPE" or decoder_kind != "ByteLevel" or model.get("byte_fallback"):
        raise TokenizerError(
            "unknown kind of tokenizer",
            where=where,
            expected="BPE with a ByteLevel decoder",
            got=f"{kind} with {decoder_kind or 'no'} decoder"[:200],
            hint="the published DeepSeek-V4 tokenizer.json is byte-level BPE",
        )


def _vocab(model: Mapping[str, Any], where: object) -> dict[str, int]:
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise TokenizerError("key model.vocab is missing, empty or not an object", where=where)
    for token, token_id in vocab.items():
        if type(token_id) is not int or token_id < 0:
            raise TokenizerError(
                f"token {token[:60]!r}: no usable id", where=where, expected="an integer from 0", got=token_id
            )
    alphabet = unicode_to_bytes()
    if missing := [char for char in alphabet if char not in vocab]:
        raise TokenizerError(
            "not a byte-level vocabulary",
            where=where,
            expected="a token for each of the 256 bytes",
            got=f"none for byte {alphabet[missing[0]]:#04x}",
        )
    return vocab


@dataclass(frozen=True)
class _AddedToken:
    id: int
    text: str
    special: bool


def _added_tokens(document: Mapping[str, Any], where: object) -> list[_AddedToken]:
    entries = document.get("added_tokens", [])
    if not isinstance(entries, list):
        raise TokenizerError("key added_tokens: not a list", where=where)
    added = []
    for i, entry in enumerate(entries):
        token_id = entry.get("id") if isinstance(entry, dict) else None
        text = entry.get("content") if isinstance(entry, dict) else None
        if type(token_id) is not int or token_id < 0 or not isinstance(text, str):
            raise TokenizerError(f"key added_tokens[{i}]: expected an integer id and a string content", where=where)
        added.append(_AddedToken(token_id, text, bool(entry.get("special", False))))
    return added


def _special_texts(settings: Mapping[str, Any], added: Iterable[_AddedToken]) -> set[str]:
    """Return the texts that are special, by their own flag or by a role that the settings give them."""
    texts = {token.text for token in added if token.special}
    texts.update(text for role in SPECIAL_ROLES if (text := _role_text(settings, role)) is not None)
    extra = settings.get("additional_special_tokens", settings.get("extra_special_tokens"))
    if isinstance(extra, list):
        texts.update(text for entry in extra if (text := _text_of(entry)) is not None)
    return texts


def _text_of(entry: object) -> str | None:
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _role_text(settings: Mapping[str, Any], role: str) -> str | None:
    return _text_of(settings.get(f"{role}_token"))


def _token_lists(
    vocab: Mapping[str, int], added: Iterable[_AddedToken], special: set[str], vocab_size: int, where: object
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return (tokens, types) by id; ids that no token has are padding, as in llama.cpp's converter."""
    # Filled id by id only after the range check: a forged id must not allocate.
    largest = max(max(vocab.values()), max((token.id for token in added), default=0))
    if largest >= vocab_size:
        raise TokenizerError(
            "tokenizer larger than the vocabulary",
            where=where,
            expected=f"ids below vocab_size {vocab_size}",
            got=largest,
            hint="is this the tokenizer of this model?",
        )
    by_id: list[str | None] = [None] * vocab_size
    types = [int(TokenType.UNUSED)] * vocab_size
    normal_type = int(TokenType.NORMAL)  # members of an enumeration are slow to compare a hundred thousand times
    for text, token_id in vocab.items():
        if (other := by_id[token_id]) is not None:
            raise TokenizerError(f"duplicate id {token_id}: {other[:60]!r} and {text[:60]!r}", where=where)
        by_id[token_id] = text
        types[token_id] = normal_type
    seen: dict[str, int] = {}
    for token in added:
        known = vocab.get(token.text, seen.get(token.text, token.id))
        if known != token.id:
            raise TokenizerError(f"token {token.text[:60]!r} has two ids", where=where, expected=known, got=token.id)
        if (other := by_id[token.id]) not in (None, token.text):
            raise TokenizerError(f"duplicate id {token.id}: {str(other)[:60]!r} and {token.text[:60]!r}", where=where)
        seen[token.text] = token.id
        by_id[token.id] = token.text
    for text, token_id in seen.items():
        if text in special or _looks_special(text):
            types[token_id] = int(TokenType.CONTROL)
        else:
            types[token_id] = int(TokenType.USER_DEFINED)
            by_id[token_id] = text.replace(SENTENCEPIECE_SPACE, " ")
    tokens = tuple(f"[PAD{i}]" if token is None else token for i, token in enumerate(by_id))
    normal = [text for text, kind in zip(tokens, types, strict=True) if kind == normal_type]
    if foreign := set("".join(normal)) - unicode_to_bytes().keys():
        text = next(text for text in normal if foreign & set(text))
        raise TokenizerError(f"token {text[:60]!r}: characters outside the byte-level alphabet", where=where)
    _check_encodable(tokens, "token", where)
    return tokens, tuple(types)


def _looks_special(text: str) -> bool:
    return text in CONTROL_TEXTS or any(text.startswith(a) and text.endswith(b) for a, b in CONTROL_BRACKETS)


def _check_encodable(texts: Iterable[str], what: str, where: object) -> None:
    """Refuse halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(f"a {what} holds half a surrogate pair ({error.reason})", where=where) from None


def _merges(model: Mapping[str, Any], where: object) -> tuple[str, ...]:
    """Return the merges as "left right", from either of the forms that tokenizer.json has known."""
    merges = model.get("merges")
    if not isinstance(merges, list) or not merges:
        raise TokenizerError("key model.merges is missing, empty or not a list", where=where)
    if all(isinstance(merge, str) for merge in merges):
        lines = merges
    else:
        for i, pair in enumerate(merges):
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
                raise TokenizerError(f"key model.merges[{i}]: neither a string nor a pair of strings", where=where)
        # A space inside a part would end it; the byte-level alphabet has a character for it.
        space = chr(ord(" ") + BYTE_LEVEL_OFFSET)
        lines = [f"{a.replace(' ', space)} {b.replace(' ', space)}" for a, b in merges]
    for i, line in enumerate(lines):
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise TokenizerError(
                f"key model.merges[{i}]: not two parts",
                where=where,
                expected="'left right'",
                got=repr(line[:60]),
            )
    _check_encodable(lines, "merge", where)
    return tuple(lines)


def _special_ids(
    settings: Mapping[str, Any], added: Iterable[_AddedToken], config: Mapping[str, Any]
) -> dict[str, int]:
    """Return the special-token ids by role: tokenizer_config.json names texts, config.json gives ids."""
    id_of: dict[str, int] = {}
    for token in added:
        id_of.setdefault(token.text, token.id)
    named = {role: id_of[text] for role in SPECIAL_ROLES if (text := _role_text(settings, role)) in id_of and text}
    given = {role: i for role in SPECIAL_ROLES if type(i := config.get(f"{role}_token_id")) is int}
    return named | {role: i for role, i in given.items() if role not in named}


def _add_special(document: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, bool]:
    """Return which special tokens go around a text; the post-processor has the last word, as in llama.cpp."""
    add: dict[str, bool] = {}
    for step in _flatten(document.get("post_processor"), "processors"):
        kind = step.get("type")
        if kind == "ByteLevel":
            add.setdefault("bos", False)
            add.setdefault("eos", False)
        elif kind == "TemplateProcessing":
            single = step.get("single")
            names = [_special_token_of(part) for part in single] if isinstance(single, list) else []
            if len(names) > 1 and names[0] is not None:
                add["bos"] = names[0] == _role_text(settings, "bos")
            if len(names) > 1 and names[-1] is not None:
                add["eos"] = names[-1] == _role_text(settings, "eos")
    for role in SPECIAL_ROLES:
        value = settings.get(f"add_{role}_token")
        if isinstance(value, bool):
            add.setdefault(role, value)
    return add


def _special_token_of(part: object) -> str | None:
    token = part.get("SpecialToken") if isinstance(part, dict) else None
    text = token.get("id") if isinstance(token, dict) else None
    return text if isinstance(text, str) else None


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return (the chat templates that come with the tokenizer, by name, notes); "default" is the main one.

    As transformers has it: templates in files of their own leave those of tokenizer_config.json unread. A named
    template that cannot be used is left out with a note; letters and digits are kept of names, as in llama.cpp.

    Raises:
        TokenizerError: the main template's file is not valid UTF-8, or too large.
        InputMissingError, InputOutputError: one cannot be read.
    """
    notes: list[str] = []
    in_files: list[tuple[str, str]] = []
    path = folder / CHAT_TEMPLATE_NAME
    if os.path.lexists(path):
        in_files.append((DEFAULT_TEMPLATE, _read_template(path)))
    try:
        named = sorted((folder / TEMPLATES_FOLDER).glob(f"*{TEMPLATE_SUFFIX}"))[:MAX_TEMPLATES]
    except OSError:
        named = []
    for path in named:
        with noted(f"{TEMPLATES_FOLDER}/{path.name}", notes):
            in_files.append((path.name.removesuffix(TEMPLATE_SUFFIX), _read_template(path)))
    stated = _stated_templates(settings.get("chat_template"))
    if not stated and not in_files:
        legacy = _read_json(folder / CHAT_TEMPLATE_JSON_NAME, required=False).get("chat_template")
        stated = _stated_templates(legacy if isinstance(legacy, str) else None)
    if in_files and stated and dict(stated) != dict(in_files):
        notes.append(f"chat templates are those of {CHAT_TEMPLATE_NAME} and its like, not {TOKENIZER_CONFIG_NAME}'s")
    found: dict[str, str] = {}
    for name, template in in_files or stated:
        plain = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
        if not plain or plain in found or not _is_utf8(template):
            notes.append(f"chat template {name[:60]!r}: not used: no name, one that is taken, or no UTF-8")
        else:
            found[plain] = template
    return found, tuple(notes)


def _stated_templates(value: object) -> list[tuple[str, str]]:
    """Return (name, template) of what tokenizer_config.json has for chat_template."""
    if isinstance(value, str):
        return [(DEFAULT_TEMPLATE, value)]
    entries = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    pairs = [(entry.get("name"), entry.get("template")) for entry in entries]
    return [(name, template) for name, template in pairs if isinstance(name, str) and isinstance(template, str)]


def _read_template(path: Path) -> str:
    try:
        text = read_whole(path, MAX_TOKENIZER_BYTES, error=TokenizerError).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"not valid UTF-8 ({error})", where=path) from None
    # As Python's text files are read, and so by transformers: one kind of line end.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@lru_cache(maxsize=1)
def _backend(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError:
        otherwise = "give forward and compare token ids, with --tokens"
        raise missing_package("turning text into tokens", "tokenizers", "text", otherwise) from None
    content = read_whole(path, MAX_TOKENIZER_BYTES, error=TokenizerError)
    try:
        return Backend.from_buffer(content)
    except Exception as error:  # noqa: BLE001 - the binding raises bare Exception
        raise TokenizerError(f"not readable by the package tokenizers ({error})", where=path) from None
