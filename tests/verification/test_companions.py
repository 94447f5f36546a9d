"""``verify`` beside a source whose own files are malformed: an error or a finding that names the file, and no fault."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
        if output in READ.get(name, ()):
            assert result.code in (4, 6, 8), (output, result)
            assert result.error.startswith(f"{source / name}: ")
        else:
            assert result.code in (0, 12), (output, result)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
@pytest.mark.parametrize("name", [name for name in READ if name in AUXILIARY_FILES])
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
def test_a_normalisation_that_is_not_three_numbers_is_refused(
    name: str, value: object, source: Path, made: Path
) -> None:
    (source / name).write_text(json.dumps({"image_std": value}))
    for command in (("verify", source, made / "mmproj-text.gguf"), ("hf-to-gguf", source, "--mmproj", "only")):
        result = run_cli(*command, "--quiet")
        assert result.code == 4
        assert result.error.startswith(f"{source / name}: key image_std: expected a list of 3 numbers")


def test_a_normalisation_that_the_file_lacks_is_a_finding(source: Path, made: Path) -> None:
    (source / "preprocessor_config.json").write_text('{"media_proc_cfg": {"image_mean": [0.25, 0.5, 0.75]}}')
    result = run_cli("verify", source, made / "mmproj-text.gguf", "--ignore-key", "general.name")
    assert result.code == 12
    assert "clip.vision.image_mean" in result.out


@pytest.mark.parametrize(
    ("front_matter", "message"),
    [
        ("name: [a]", "key name: expected a string"),
        ("version: {a: 1}", "key version: expected a string"),
        ("license: [1, 2]", "key license: expected a string or a list of strings"),
        ("tags: &a [*a]", "alias"),
        ("a: &a [x, x]\nb: [*a, *a]", "alias"),
    ],
)
def test_front_matter_that_no_reader_can_use_is_refused(
    front_matter: str, message: str, source: Path, made: Path
) -> None:
    (source / "README.md").write_text(f"---\n{front_matter}\n---\n")
    for command in (("verify", source, made / "text.gguf"), ("hf-to-gguf", source, made / "again.gguf", "--dry-run")):
        result = run_cli(*command, "--quiet")
        assert result.code == 6
        assert result.error.startswith(f"{source / 'README.md'}: front matter: {message}")
