"""``verify`` beside a source whose own files are malformed: an error or a finding that names the file, and no fault."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.containers.gguf import open_gguf
from dsv4convert.targets.companions import AUXILIARY_FILES

from ..checkpoints import MakeCheckpoint
from ..command_line import Result, run_cli
from .conversions import SMALL

OUTPUTS = ("text.gguf", "mmproj-text.gguf", "dspark-text.gguf", "bf16", "mp2")
GGUFS = OUTPUTS[:3]

MALFORMED = {
    "empty": b"",
    "cut": b"{",
    "a list": b"[]",
    "null": b"null",
    "no UTF-8": b'{"a": "\xff"}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "duplicate key": b'{"a": 1, "a": 2}',
    "NaN": b'{"a": NaN}',
    "deep": b'{"a": ' * 100_000,
    "half a pair": b'{"a": "\\ud800"}',
}

# Companions that are read, and not only copied or compared; which outputs need them.
READ = {
    "preprocessor_config.json": ("mmproj-text.gguf",),
    "processor_config.json": ("mmproj-text.gguf",),
    "config.json": OUTPUTS,
    "generation_config.json": OUTPUTS,
    "tokenizer.json": ("text.gguf", "dspark-text.gguf"),
    "tokenizer_config.json": ("text.gguf", "dspark-text.gguf"),
    "chat_template.json": ("text.gguf", "dspark-text.gguf"),
}

# Those of them that no conversion is refused for: what cannot be used is noted.
NOTED = ("preprocessor_config.json", "processor_config.json", "generation_config.json")

# What is no JSON and read as such all the same.
READ_AS_MEANT = ("byte order mark",)

# Keys of companions, to be given values of other types.
KEYS = {
    "preprocessor_config.json": ("image_mean", "image_std", "media_proc_cfg"),
    "processor_config.json": ("image_mean", "image_std", "image_processor"),
    "generation_config.json": ("temperature", "top_k", "sequence", "repetition_penalty"),
    "tokenizer_config.json": ("bos_token", "add_bos_token", "chat_template", "extra_special_tokens"),
    "chat_template.json": ("chat_template",),
    "config.json": ("_name_or_path", "model_type", "architectures", "torch_dtype"),
}
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, "x", [], {}, ["x"], [1, 2, 3], [1, 2], [None], [10**400] * 3, [[1]], {"a": 1}, 10**40,
)  # fmt: skip


@pytest.fixture(scope="module")
def vision(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("tiny", variant="vision", **SMALL)


@pytest.fixture(scope="module")
def made(vision: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    gguf = ("hf-to-gguf", vision, folder / "text.gguf", "--draft", "split", "--mmproj", "split")
    for command in (gguf, ("dequantize", vision, folder / "bf16"), ("shard", vision, folder / "mp2", "--mp", 2)):
        assert run_cli(*command, "--quiet").code == 0
    return folder


@pytest.fixture
def source(vision: Path, tmp_path: Path) -> Path:
    """Return the source with weights linked and all other files copied."""

    def copy(original: str, to: str) -> None:
        (os.symlink if original.endswith(".safetensors") else shutil.copy)(original, to)

    return shutil.copytree(vision, tmp_path / "source", copy_function=copy)


def verify(source: Path, output: Path) -> Result:
    return run_cli("verify", source, output, "--quiet", "--ignore-key", "general.name")


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_whole_source_verifies(source: Path, made: Path, output: str) -> None:
    assert verify(source, made / output) == Result(0, "", "")


@pytest.mark.parametrize("content", MALFORMED)
@pytest.mark.parametrize("name", [name for name in ("config.json", *AUXILIARY_FILES) if name.endswith(".json")])
def test_a_malformed_companion_is_an_error_where_it_is_read(name: str, content: str, source: Path, made: Path) -> None:
    (source / name).write_bytes(MALFORMED[content])
    for output in OUTPUTS:
        result = verify(source, made / output)
        if (
            output in READ.get(name, ())
            and name not in NOTED
            and not (content in READ_AS_MEANT and name not in ("config.json", "tokenizer.json"))
        ):
            assert result.code in (4, 6, 8), (output, result)
            assert result.error.startswith(f"{source / name}: ")
        else:
            assert result.code in (0, 12), (output, result)


@pytest.mark.parametrize("content", sorted(set(MALFORMED) - {*READ_AS_MEANT}))
@pytest.mark.parametrize("name", NOTED)
def test_settings_that_cannot_be_used_are_noted(name: str, content: str, source: Path, tmp_path: Path) -> None:
    (source / name).write_bytes(MALFORMED[content])
    out = tmp_path / "out.gguf"
    result = run_cli("hf-to-gguf", source, out, "--mmproj", "split", "--json")
    assert result.code == 0, result.err
    assert any(note.startswith(f"{name}: not used: ") for note in json.loads(result.out)["notes"])
    for path in tmp_path.glob("*.gguf"):
        assert run_cli("verify", source, path).code == 0


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
@pytest.mark.parametrize("name", [name for name in READ if name in AUXILIARY_FILES and name not in NOTED])
def test_a_companion_that_is_no_file_is_an_error_where_it_is_read(
    name: str, make: Callable[[Path], None], source: Path, made: Path
) -> None:
    (source / name).unlink(missing_ok=True)
    make(source / name)
    for output in set(READ[name]) & set(GGUFS):
        result = verify(source, made / output)
        assert result.code == 3, (output, result)
        assert result.error.startswith(f"{source / name}: cannot be read")


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in KEYS.items() for key in keys])
def test_a_value_of_another_type_is_no_fault_of_the_program(name: str, key: str, source: Path, made: Path) -> None:
    path = source / name
    document = json.loads(path.read_text()) if path.exists() else {}
    for value in VALUES:
        path.write_text(json.dumps({**document, key: value}))
        verify(source, made / READ[name][0])  # an internal error would fail in there
        run_cli("hf-to-gguf", source, made / "again.gguf", "--mmproj", "split", "--dry-run")


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("value", [3, "x", [], [1, 2], [1, 2, 3, 4], [1, 2, True], [1, 2, None], [1, 2, 1e39]])
def test_a_normalisation_that_is_not_three_numbers_is_noted(
    name: str, value: object, source: Path, tmp_path: Path
) -> None:
    (source / name).write_text(json.dumps({"image_std": value}))
    result = run_cli("hf-to-gguf", source, tmp_path / "m.gguf", "--mmproj", "only", "--json")
    assert f"{name}: key image_std not used: not a list of 3 numbers" in json.loads(result.out)["notes"]
    assert run_cli("verify", source, tmp_path / "m.gguf").code == 0


def test_a_normalisation_that_the_file_lacks_is_a_finding(source: Path, made: Path) -> None:
    (source / "preprocessor_config.json").write_text('{"media_proc_cfg": {"image_mean": [0.25, 0.5, 0.75]}}')
    result = run_cli("verify", source, made / "mmproj-text.gguf", "--ignore-key", "general.name")
    assert result.code == 12
    assert "clip.vision.image_mean" in result.out


@pytest.mark.parametrize(
    ("front_matter", "message"),
    [
        ("name: [a]", "keys not used, whose values have no usable form: name"),
        ("version: {a: 1}", "keys not used, whose values have no usable form: version"),
        ("license: [1, [2]]", "keys not used, whose values have no usable form: license"),
        ("base_model: [[a]]", "keys not used, whose values have no usable form: base_model"),
        ("tags: &a [*a]", "not used: front matter has an alias"),
        ("a: &a [x, x]\nb: [*a, *a]", "not used: front matter has an alias"),
        ("a: [", "not used: front matter is not valid YAML"),
        ("a: !!python/name:os.system x", "not used: front matter is not valid YAML"),
        ("a: " + "[" * 5000, "not used: front matter is nested too deeply"),
        ("- a", "not used: front matter is no object"),
        ("a: \u00e9".encode("latin-1"), "not used: not valid UTF-8"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_front_matter_that_no_reader_can_use_is_noted(
    front_matter: str | bytes, message: str, source: Path, tmp_path: Path
) -> None:
    content = front_matter.encode() if isinstance(front_matter, str) else front_matter
    (source / "README.md").write_bytes(b"---\n" + content + b"\n---\n")
    result = run_cli("hf-to-gguf", source, tmp_path / "out.gguf", "--json")
    assert any(note.startswith(f"README.md: {message}") for note in json.loads(result.out)["notes"]), result.out
    assert run_cli("verify", source, tmp_path / "out.gguf").code == 0


@pytest.mark.parametrize(
    "front_matter", ["size_label: Flash/../../../planted", "name: a/../../b", "basename: ..", "version: " + "9" * 400]
)
def test_no_card_leads_out_of_the_folder(front_matter: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "c" / "out"
    out.mkdir(parents=True)
    (source / "README.md").write_text(f"---\n{front_matter}\n---\n")
    assert run_cli("hf-to-gguf", source, out, "--quiet").code == 0
    (made,) = out.glob("*.gguf")
    assert made.parent == out
    assert not list(tmp_path.glob("*.gguf")) + list(tmp_path.glob("a/**/planted*"))
    assert run_cli("verify", source, made).code == 0


def test_templates_in_files_are_named_and_go_before_those_of_the_config(source: Path, tmp_path: Path) -> None:
    (source / "chat_template.jinja").write_text("main")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (source / "additional_chat_templates" / "rag-2.jinja").write_text("retrieval")
    (source / "additional_chat_templates" / "bad.jinja").write_bytes(b"\xff")
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "another"}))
    out = tmp_path / "out.gguf"
    notes = json.loads(run_cli("hf-to-gguf", source, out, "--json").out)["notes"]
    assert any(note.startswith("additional_chat_templates/bad.jinja: not used: not valid UTF-8") for note in notes)
    assert any("chat templates are those of chat_template.jinja" in note for note in notes)
    keys = open_gguf(out).metadata
    assert keys["tokenizer.chat_template"] == "main"
    assert keys["tokenizer.chat_template.tool_use"] == "tools"
    assert keys["tokenizer.chat_template.rag_2"] == "retrieval"
    assert keys["tokenizer.chat_templates"] == ["rag_2", "tool_use"]
    assert run_cli("verify", source, out).code == 0


HANDMADE = {
    "byte order mark": b"\xef\xbb\xbf%s",
    "line ends": b"\r\n%s\r\n",
    "comments": b"// above\n/* and\n more */ %s // behind",
}


@pytest.mark.parametrize("form", [*HANDMADE, "commas"])
def test_json_as_people_write_it_is_read_and_shards_have_it_plain(form: str, source: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"):
        content = (source / name).read_bytes()
        if form == "commas":
            content = content.rstrip().removesuffix(b"}").rstrip() + b",\n}"
        else:
            content = HANDMADE[form] % content
        (source / name).write_bytes(content)
    assert run_cli("hf-to-gguf", source, tmp_path / "out.gguf", "--quiet").code == 0
    assert run_cli("verify", source, tmp_path / "out.gguf").code == 0
    assert run_cli("shard", source, tmp_path / "mp1", "--mp", "1", "--quiet").code == 0
    json.loads((tmp_path / "mp1" / "config.json").read_text("utf-8"))
    assert run_cli("verify", source, tmp_path / "mp1").code == 0


def test_json_that_is_none_names_the_position(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text('{\n  // the width\n  "hidden_size": 7,\n  "x" 3\n}')
    error = run_cli("dequantize", source, tmp_path / "d").error
    assert "line 4 column 7" in error
