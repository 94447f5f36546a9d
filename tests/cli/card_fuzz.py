"""Model cards and chat templates as nobody would write them, for the fuzzer: seeded, each case by its number."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

KEYS = (
    "name",
    "model_name",
    "version",
    "basename",
    "size_label",
    "finetune",
    "author",
    "organization",
    "description",
    "url",
    "doi",
    "license",
    "license_name",
    "license_link",
    "tags",
    "pipeline_tag",
    "language",
    "languages",
    "base_model",
    "base_models",
    "datasets",
    "dataset",
    "model_type",
    "model_creator",
    "library_name",
    "model-index",
    "?",
    "<<",
    "-",
)
VALUES = (
    "a",
    "DeepSeek-V4",
    "deepseek-ai/DeepSeek-V4-Flash",
    "a/b/c",
    "/",
    "../../x",
    "./",
    "-",
    "--",
    "7b",
    "x-7b1",
    "x-\u00b2b",
    "1.10",
    "4",
    "no",
    "yes",
    "null",
    "~",
    "2024-13-45",
    "2024-01-01",
    "0x" + "f" * 5000,
    "1" * 5000,
    "1e999",
    ".nan",
    "12:30:45",
    "!!python/object/apply:os.system [x]",
    "!!binary aGk=",
    "!!binary x",
    "!!set {a, b}",
    "!foo bar",
    "&a b",
    "*a",
    "[]",
    "{}",
    "[a, b]",
    "[1, null, [x]]",
    "[[a]]",
    "{a: 1}",
    "{name: x, version: 2}",
    "[{name: [1]}]",
    "[{name: x, organization: y}]",
    "https://huggingface.co/a/b",
    "https://huggingface.co/a/b-",
    "http://",
    '"\\ud800"',
    '"\\0"',
    '"\\x07"',
    "'",
    '"',
    "[",
    "{",
    "]",
    "|\n  text\n  more",
    ">-\n  folded",
    "\t",
    "x" * 3000,
    "\u6a21\u578b-7B",
    "\U0001f600",
    "con:",
    "a: b: c",
    "@x",
    "`x",
    "%x",
    "Flash/../../../secret/planted",
    "a b  c",
    "  ",
    "#",
    "- x",
    "?",
    "\u2028",
    "\x85",
    "x-8x7B-Instruct",
    "A-7m-v",
    "v1.0-q4_0",
)
GAPS = (" ", " ", " ", "", "\n  ", "\n- ")
HEADS = ("---\n", "---\r\n", "\ufeff---\n", "--- \n", "----\n", "\n---\n", "")
ENDS = ("---\n# A model\n", "---", "", "...\n", "---\r\n")

TEMPLATES = (
    "{{ messages }}",
    "",
    "\ufeffx",
    "a\r\nb\rc",
    "{% broken",
    "\x00",
    "x" * 2000,
    "{{ '\u6a21' }}",
    "\ud7ff",
    " ",
)
NAMES = ("rag", "tool_use", "default", "a.b", "a b", "\u6a21", "-", ".hidden", "UPPER", "x" * 60)


def write_card(folder: Path, number: int) -> None:
    """Give a folder the README.md of case ``number``, and now and then a generation config or a processor's file."""
    chance = random.Random(number)
    lines = [f"{chance.choice(KEYS)}:{chance.choice(GAPS)}{chance.choice(VALUES)}" for _ in range(chance.randrange(6))]
    if chance.random() < 0.03:
        lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]" for n in range(9)]
    if chance.random() < 0.03:
        lines = ["a: " + "[" * chance.choice((10, 20, 5000))]
    text = chance.choice(HEADS[:2] if chance.random() < 0.8 else HEADS) + "\n".join(lines) + "\n" + chance.choice(ENDS)
    content = text.encode("utf-8", "surrogatepass")
    if chance.random() < 0.1:
        content = text.encode("latin-1", "replace")
    if chance.random() < 0.1 and content:
        place = chance.randrange(len(content))
        content = content[:place] + bytes([chance.randrange(256)]) + content[place + 1 :]
    (folder / "README.md").write_bytes(content)
    if chance.random() < 0.2:
        value = chance.choice(("1", "-1", '"x"', "[1]", "null", "1e400", "true", "1" * 400, "0.5", "{"))
        key = chance.choice(("temperature", "top_k", "top_p", "sequence", "repetition_penalty", "mirostat"))
        (folder / "generation_config.json").write_text(f'{{"{key}": {value}}}')


def write_templates(folder: Path, number: int) -> None:
    """Give a folder the chat templates of case ``number``, in any of the places where they may be."""
    chance = random.Random(number)
    extra = folder / "additional_chat_templates"
    if extra.is_dir():
        shutil.rmtree(extra)
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    if chance.random() < 0.5:
        (folder / "chat_template.jinja").write_bytes(chance.choice(TEMPLATES).encode("utf-8", "surrogatepass"))
    if chance.random() < 0.6:
        extra.mkdir()
        for name in chance.sample(NAMES, chance.randrange(4)):
            content = chance.choice(TEMPLATES).encode()
            (extra / f"{name}.jinja").write_bytes(b"\xff" + content if chance.random() < 0.2 else content)
    if chance.random() < 0.2:
        (folder / "chat_template.json").write_text(
            json.dumps({"chat_template": chance.choice((*TEMPLATES, 3, [], {}))})
        )
    path = folder / "tokenizer_config.json"
    settings = {key: value for key, value in json.loads(path.read_text()).items() if key != "chat_template"}
    if chance.random() < 0.6:
        entry = {"name": chance.choice(NAMES), "template": chance.choice(TEMPLATES)}
        stated = (
            chance.choice(TEMPLATES),
            [entry],
            [entry, entry],
            [{"name": 3}],
            7,
            None,
            {},
            [entry, {"name": "default"}],
        )
        settings["chat_template"] = chance.choice(stated)
    path.write_text(json.dumps(settings))
