"""Writes a small seeded byte-level BPE tokenizer with the published pre-tokenizer and special tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from ..checkpoint.tokenizer import JOYAI_LLM_PATTERNS, TOKENIZER_CONFIG_NAME, TOKENIZER_NAME, bytes_to_unicode
from ..errors import UsageError

GENERATION_CONFIG_NAME = "generation_config.json"

BOS_TEXT = "<｜begin▁of▁sentence｜>"
EOS_TEXT = "<｜end▁of▁sentence｜>"
PAD_TEXT = "<｜▁pad▁｜>"

# Ids 0, 1, 2 as published; they are part of the vocabulary and special.
LEADING_SPECIAL_TEXTS = (BOS_TEXT, EOS_TEXT, PAD_TEXT)

# Published added tokens, in the published order. None of these is flagged special there.
PROMPT_TEXTS = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
    "<｜latest_reminder｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜search▁begin｜>",
    "<｜search▁end｜>",
    "<｜extracted_url｜>",
    "<｜read_url｜>",
)
# Added tokens of V4.1 that its prompts need besides.
V41_TEXTS = ("<｜System｜>", "<｜deepseek_image｜>")
OTHER_TEXTS = (
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<|EOT|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
    "<｜begin▁sys｜>",
    "<｜end▁sys｜>",
    "<dsml:",
    "</dsml:",
)
# Published tokens with other flags, so that every kind of entry occurs: (text, special).
ODD_TEXTS = (("<｜end_of_query｜>", True), ("<｜/table>｜", False))

SMALLEST_VOCABULARY = 320
# From here on there is room for the tokens that no prompt of ours needs.
ALL_TEXTS_VOCABULARY = 512
# Enough for text of a few languages to come out in pieces; the rest of a large vocabulary is padding.
MOST_MERGES = 4096
# A few rows stay without a token, as when a published embedding is rounded up.
PADDING_ROWS = 3

SAMPLE_TEXT = """\
the of and to in is that for it as was with be by on not he his but at are this
have from or had an they which one you were all her she there would their we him
been has when who will no more if out so up said what its about than into them
can only other time new some could these two may first then do any like my now
over such our man me even most made after also did many off before must well
back through years much where your way down should because long each just state
those people too mr how little good world make very weather city temperature
sunny humidity tool search query model tensor expert layer token memory value
list return import class function while else print string number true false null
name type object array
是 的 一 不 在 人 有 我 他 这 中 大 来 上 国 和 说 们 为 到 世界 著名 温泉 天气 北京 今天
深度 求索 公司 助手 可以 吗
что это как на и не для с он мы über für und nicht ist été être
pour dans qui que les des été niño señor año
"""
WORDS = tuple(SAMPLE_TEXT.split())

TOKENIZER_CONFIG: dict[str, Any] = {
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": BOS_TEXT,
    "clean_up_tokenization_spaces": False,
    "eos_token": EOS_TEXT,
    "legacy": True,
    "model_max_length": 1048576,
    "pad_token": EOS_TEXT,
    "sp_model_kwargs": {},
    "unk_token": None,
    "tokenizer_class": "PreTrainedTokenizerFast",
}

ROLE_KEYS = ("bos_token", "eos_token", "pad_token")

GENERATION_CONFIG: dict[str, Any] = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 1.0,
    "transformers_version": "4.46.3",
}


def write_synth_tokenizer(folder: Path, vocab_size: int, seed: int, *, v41: bool = False) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json into ``folder``.

    ``v41``: with the tokens of V4.1, which was published without the last of these files.

    The tokenizer has at most ``vocab_size`` tokens (the last rows stay unused); BOS is 0 and EOS is 1.
    ``seed`` chooses which merges there are, and their order.

    Raises:
        UsageError: ``vocab_size`` has no room for the bytes and the special tokens.
    """
    documents = {
        TOKENIZER_NAME: synth_tokenizer_document(vocab_size, seed, v41=v41),
        TOKENIZER_CONFIG_NAME: _published_settings(),
        GENERATION_CONFIG_NAME: GENERATION_CONFIG,
    }
    if v41:
        del documents[GENERATION_CONFIG_NAME]
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, ensure_ascii=False, indent=2), encoding="utf-8")


def synth_tokenizer_document(vocab_size: int, seed: int, *, v41: bool = False) -> dict[str, Any]:
    """Return the content of a synthetic tokenizer.json.

    Raises:
        UsageError: ``vocab_size`` has no room for the bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            "vocabulary too small for a tokenizer", expected=f"at least {SMALLEST_VOCABULARY}", got=vocab_size
        )
    entries = [(text, False) for text in PROMPT_TEXTS + (V41_TEXTS if v41 else ())]
    if vocab_size >= ALL_TEXTS_VOCABULARY:
        entries += [(text, False) for text in OTHER_TEXTS]
    entries += ODD_TEXTS
    vocab = {text: i for i, text in enumerate(LEADING_SPECIAL_TEXTS)}
    for char in sorted(bytes_to_unicode().values()):
        vocab[char] = len(vocab)
    room = vocab_size - len(vocab) - len(entries) - PADDING_ROWS
    merges = _merges(vocab, min(room, MOST_MERGES), random.Random(seed))
    added = [_added_token(i, text, special=True) for i, text in enumerate(LEADING_SPECIAL_TEXTS)]
    added += [_added_token(len(vocab) + i, text, special=special) for i, (text, special) in enumerate(entries)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": published_pre_tokenizer(),
        "post_processor": _byte_level(add_prefix_space=True, trim_offsets=False),
        "decoder": _byte_level(add_prefix_space=True, trim_offsets=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def published_pre_tokenizer() -> dict[str, Any]:
    """Return the pre_tokenizer section of the published tokenizer.json."""
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in JOYAI_LLM_PATTERNS
    ]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*splits, last]}


def _byte_level(*, add_prefix_space: bool, trim_offsets: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": trim_offsets,
        "use_regex": True,
    }


def _added_token(token_id: int, text: str, *, special: bool) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        # As published: special tokens are matched in the raw text, the others in the normalised one.
        "normalized": not special,
        "special": special,
    }


def _merges(vocab: dict[str, int], count: int, rng: random.Random) -> list[str]:
    """Grow ``vocab`` by ``count`` tokens, spelling out words from the left, then joining random tokens."""
    alphabet = bytes_to_unicode()
    spellings = [(" " + word, word) for word in WORDS]
    words = [form for pair in spellings for form in pair]
    rng.shuffle(words)
    merges: list[str] = []

    def add(left: str, right: str) -> None:
        if left + right not in vocab and len(merges) < count:
            vocab[left + right] = len(vocab)
            merges.append(f"{left} {right}")

    for word in words:
        chars = [alphabet[byte] for byte in word.encode("utf-8")]
        for end in range(1, len(chars)):
            add("".join(chars[:end]), chars[end])
    letters = [alphabet[byte] for byte in b"abcdefghijklmnopqrstuvwxyz"]
    stems = list(letters)
    while len(merges) < count:
        left, right = rng.choice(stems), rng.choice(letters)
        add(left, right)
        stems.append(left + right)
    return merges


def _published_settings() -> dict[str, Any]:
    """Return tokenizer_config.json as published, where texts with a role are written out as objects."""
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {
        key: {"__type": "AddedToken", "content": value, **flags} if key in ROLE_KEYS else value
        for key, value in TOKENIZER_CONFIG.items()
    }
