"""Every command, whatever is given to it: success, or one line and a code of ours; never a traceback, never a hang.

The commands and what they take are read off the command line (see ``walk``): a new command, argument or option is
walked without being named here, and one that cannot be walked fails the first test.
"""

from __future__ import annotations

import importlib.abc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.errors import InputOutputError, ReportError

from ..command_line import run_cli
from ..engine.restricted import heed_permissions
from .walk import (
    COMMANDS,
    GIVEN,
    INTERNAL,
    MODELS,
    Walk,
    in_child,
    is_path,
    parameters,
    program,
    strange_paths,
    takes_value,
)

TEXTS_AND_NUMBERS = [
    *("", "a\0b", "a\udc80b", "x" * 5000, "[]", "*", "a=b", "\u0663"),
    *("0", "-1", "1.5", "nan", "1e400", str(2**63), str(-(2**70))),
    *("1,99999999999999999999", "0-99999999", "999999T"),
]
VALUES: list[Any] = [160.0, 2**63, 2**70, -1, 1e308, "many", "a\0b", None, [], {}, [2**70], [["a"]], {"a": [1]}]
CARDS = [
    *("[a, b]", "{a: b}", "[[1, 2], [3]]", "1" * 400, "2026-01-01", "null", ".nan", "!!python/object:os.system x"),
    *('"a\\0b"', "a\0b", "Gr\udcfc\udcdfe"),
]
# Packages that a command can do without, and that can be there and fail to load.
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "matplotlib", "PIL", "llama_cpp", "yaml", "rich")


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    return Walk(tmp_path_factory.mktemp("walk"))


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_command_is_walked_and_succeeds_with_what_is_given(walk: Walk) -> None:
    assert GIVEN.keys() == COMMANDS.keys(), "say in walk.GIVEN what makes the command succeed"
    for name in COMMANDS:
        result = run_cli(*walk.words(name))
        assert (result.code, result.err) == (0, ""), name


def test_what_the_walk_must_find_is_found(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("dsv4convert.api.inspect", broken)
    assert "internal error" in "".join(in_child([walk.words("inspect")]))
    monkeypatch.setattr("dsv4convert.api.inspect", lambda *_, **__: time.sleep(1))
    monkeypatch.setattr("tests.cli.walk.SECONDS", 0.1)
    assert "_SlowError" in "".join(in_child([walk.words("inspect")]))


def test_paths_of_every_kind(command: str, walk: Walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = strange_paths(tmp_path / "strange")
    monkeypatch.chdir(tmp_path)
    names = [name for name, parameter in parameters(command).items() if is_path(parameter)]
    runs = [walk.words(command, **{name: path}) for name in names for path in paths.values()]
    assert in_child(runs, heed_permissions) == []


def test_texts_and_numbers_of_every_kind(
    command: str, walk: Walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [name for name, parameter in parameters(command).items() if takes_value(parameter)]
    runs = [walk.words(command, **{name: value}) for name in names for value in TEXTS_AND_NUMBERS]
    assert in_child(runs) == []


def test_files_of_a_model_of_every_kind(command: str, walk: Walk, tmp_path: Path) -> None:
    for name, value in GIVEN[command].items():
        if value in MODELS:
            source = shutil.copytree(walk.places[str(value).strip("{}")], tmp_path / name)
            runs = damaged(source, lambda: quick(command, walk.words(command, **{name: str(source)})))  # noqa: B023
            assert in_child(runs) == []


def quick(command: str, words: list[str]) -> list[str]:
    """Return the words, with a dry run where there is one."""
    return [*words, "--dry-run"] if "dry_run" in parameters(command) else words


def damaged(source: Path, words: Callable[[], list[str]]) -> Iterator[list[str]]:
    """Yield the words of a command for each of many damaged states of the files in a model's folder."""
    for name, content in damages(source):
        path = source / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(content)
        yield words()
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)


def damages(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name of a file and a content that it should not have."""
    documents = {
        "config.json": ("num_hidden_layers", "vocab_size", "bos_token_id", "rope_theta", "quantization_config"),
        "generation_config.json": ("eos_token_id", "temperature"),
        "tokenizer_config.json": ("bos_token", "chat_template", "added_tokens_decoder"),
        "tokenizer.json": ("model", "added_tokens", "pre_tokenizer"),
    }
    for name, keys in documents.items():
        document = json.loads((source / name).read_text()) if (source / name).exists() else {}
        # Every value under some key, and every key with several of them.
        for number, value in enumerate(VALUES):
            for key in {keys[number % len(keys)], keys[(number + 1) % len(keys)]}:
                yield name, dumped(document | {key: value})
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    token = next(iter(tokenizer["model"]["vocab"]))
    for number, value in enumerate(VALUES):
        vocabulary = tokenizer["model"]["vocab"] | {token: value}
        added = [{**tokenizer["added_tokens"][0], "id": value}]
        damage = {"added_tokens": added} if number % 2 else {"model": tokenizer["model"] | {"vocab": vocabulary}}
        yield "tokenizer.json", dumped(tokenizer | damage)
    keys = ("license", "base_model", "tags", "size_label", "version", "quantized_by")
    for number, text in enumerate(CARDS):
        yield "README.md", f"---\n{keys[number % len(keys)]}: {text}\n---\n".encode(errors="surrogateescape")
    yield "README.md", b"---\n- a\n- b\n---\n"
    for name in ("config.json", "tokenizer.json", "README.md", "chat_template.jinja", "model.safetensors.index.json"):
        for content in (b"", b"\0" * 64, b"\xff\xfe{}", b'{"a\0": 1}', b'{"\\ud800": "\\udc00"}', b"[[]]"):
            yield name, content


def test_files_of_a_model_that_may_not_be_read(command: str, walk: Walk, tmp_path: Path) -> None:
    """They are not missing: the system refused, whichever file it is. Some commands do not read all files."""
    for name, value in GIVEN[command].items():
        if value in MODELS:
            source = shutil.copytree(walk.places[str(value).strip("{}")], tmp_path / name)
            runs = unreadable(source, lambda: walk.words(command, **{name: str(source)}))  # noqa: B023
            assert in_child(runs, heed_permissions, (0, InputOutputError.exit_code)) == []


def unreadable(source: Path, words: Callable[[], list[str]]) -> Iterator[list[str]]:
    """Yield the words of a command while the folder may not be entered, and while each of its files may not be read."""
    for path in (source, *sorted(source.iterdir())):
        mode = path.stat().st_mode
        path.chmod(0)
        yield words()
        path.chmod(mode)


def dumped(document: Any) -> bytes:
    return json.dumps(document).encode()


def test_a_folder_of_files_with_strange_names(command: str, walk: Walk, tmp_path: Path) -> None:
    for name, value in GIVEN[command].items():
        if value in MODELS:
            source = shutil.copytree(walk.places[str(value).strip("{}")], tmp_path / "Gr\udcfc\udcdfe" / name)
            for strange in ("a\udc80b.json", "n" * 255, "model-\udcff.safetensors", "new\nline"):
                (source / strange).touch()
            assert in_child([walk.words(command, **{name: str(source)})]) == []


def test_a_current_folder_that_is_gone(command: str, walk: Walk, tmp_path: Path) -> None:
    names = [name for name, parameter in parameters(command).items() if is_path(parameter)]
    runs = [walk.words(command), *(walk.words(command, **{name: "relative"}) for name in names)]
    assert in_child(runs, partial(leave, tmp_path / "gone")) == []


def leave(gone: Path) -> None:
    """Be in a folder that is gone."""
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()


def test_a_process_of_few_files_in_a_folder_that_is_gone(command: str, walk: Walk, tmp_path: Path) -> None:
    """Python and the libraries that the command loads need some of the files."""
    gone = tmp_path / "gone"
    for shell in ("ulimit -n 20; {}", f"mkdir '{gone}'; cd '{gone}'; rmdir '{gone}'; {{}}"):
        done = program(*walk.words(command), shell=shell, cwd=tmp_path)
        assert done.returncode < INTERNAL, done.stderr
        assert "Traceback" not in done.stderr
        assert done.returncode == 0 or len(done.stderr.splitlines()) == 1, done.stderr


def test_a_report_that_cannot_be_told(command: str, walk: Walk, tmp_path: Path) -> None:
    """The exit code says so, also where stderr takes nothing either, and Python or a library holds text back."""
    for shell in ("{} >&-", "{} >/dev/full 2>/dev/full"):
        done = program(*walk.words(command), shell=shell, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (ReportError.exit_code, ""), done.stderr
        assert "Traceback" not in done.stderr
        assert "2>" in shell or "the work is done" in done.stderr


class Unloadable(importlib.abc.MetaPathFinder):
    """Lets packages fail to load as one does whose libraries are missing."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> None:
        """Fail for the packages."""
        if name.partition(".")[0] in PACKAGES:
            raise OSError(f"lib{name}.so: cannot open shared object file: No such file or directory")


def test_packages_that_do_not_load(command: str, walk: Walk) -> None:
    def break_packages() -> None:
        for name in list(sys.modules):
            if name.partition(".")[0] in PACKAGES:
                del sys.modules[name]
        sys.meta_path.insert(0, Unloadable())

    names = [name for name in parameters(command) if name in ("image", "images", "plot", "text", "dense")]
    more = {
        "image": walk.places["text"],
        "images": walk.places["text"],
        "plot": "{out}.png",
        "text": "a",
        "dense": "q2_k",
    }
    runs = [walk.words(command), *(walk.words(command, **{name: more[name]}) for name in names)]
    assert in_child(runs, break_packages) == []
