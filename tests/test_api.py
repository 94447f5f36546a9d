"""The public functions: what importing costs, what type checkers see, and that they are the command line's own."""

from __future__ import annotations

import ast
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

import dsv4convert
from dsv4convert.cli import app
from dsv4convert.model.config import Version
from tests.command_line import run_cli
from tests.type_checks import type_check
from tests.v41 import TINY

ROOT = Path(__file__).resolve().parents[1]


def test_importing_the_package_loads_nothing_else() -> None:
    program = "import sys; before = set(sys.modules); import dsv4convert; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(done.stdout.split()) <= {"dsv4convert", "__future__"}


def test_every_public_name_can_be_had_and_is_listed_for_type_checkers() -> None:
    tree = ast.parse((ROOT / "dsv4convert" / "__init__.py").read_text())
    declared = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert declared - {"annotations", "import_module"} == set(dsv4convert.__all__) - {"__version__"}
    for name in dsv4convert.__all__:
        assert getattr(dsv4convert, name) is getattr(dsv4convert, name)
    assert set(dsv4convert.__all__) <= set(dir(dsv4convert))


def test_every_error_class_is_public() -> None:
    from dsv4convert import errors

    classes = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert classes == {name for name in dsv4convert.__all__ if name.endswith("Error")}


def test_no_module_has_the_name_of_a_public_function() -> None:
    """Importing a submodule binds its name in the package: it would take the function's place."""
    modules = {module.name for module in pkgutil.iter_modules(dsv4convert.__path__)}
    assert not modules & set(dsv4convert.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'convert'"):
        _ = dsv4convert.convert  # type: ignore[attr-defined]


USER_SCRIPT = """
import dsv4convert
from dsv4convert.verification import prepare

def progress(done: int, total: int) -> None: ...

summary = dsv4convert.convert_gguf("in", "out.gguf", dense="bf16", progress=progress)
reveal_type(summary)
reveal_type(dsv4convert.shard("in", "out", mp=2))
reveal_type(dsv4convert.unshard("in", "out"))
reveal_type(dsv4convert.dequantize("in", "out", strict=True))
reveal_type(dsv4convert.repack("in", "out"))
reveal_type(dsv4convert.verify("in", "out"))
reveal_type(dsv4convert.verify_manifest("out"))
reveal_type(dsv4convert.inspect("in"))
reveal_type(dsv4convert.estimate("in", memory="128GiB"))
reveal_type(dsv4convert.open_checkpoint("in"))
reveal_type(dsv4convert.load_model("in"))
reveal_type(dsv4convert.LossyError("x").exit_code)
dsv4convert.convert_gguf("in", splitting="x")
"""


@pytest.mark.slow
def test_a_strict_type_checker_sees_the_true_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text(USER_SCRIPT)
    lines = [line.split(": ", 1)[1] for line in type_check(script)]
    revealed = [line.split('"')[1].split(".")[-1] for line in lines if "Revealed type" in line]
    assert revealed == [
        "Summary", "ShardSummary", "Summary", "Summary", "RepackSummary", "Report", "ManifestReport", "Description",
        "Estimate", "Checkpoint", "Model", "int",
    ]  # fmt: skip
    assert [line for line in lines if line.startswith("error")] == [
        'error: Unexpected keyword argument "splitting" for "convert_gguf"  [call-arg]'
    ]


def test_the_command_prints_the_summary_that_the_function_returns(tiny: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
    out = tmp_path / "1" / "model.gguf"
    summary = dsv4convert.convert_gguf(tiny, out, experts="q8_0", threads=1).as_json()
    done = run_cli("hf-to-gguf", tiny, tmp_path / "2" / "model.gguf", "--experts", "q8_0", "--threads", "1", "--json")
    printed = json.loads(done.out)
    for varying in ("files", "seconds", "bytes_per_second", "peak_memory_bytes"):
        del summary[varying], printed[varying]
    assert printed == summary
    assert out.read_bytes() == (tmp_path / "2" / "model.gguf").read_bytes()


COMMANDS = {
    "hf-to-gguf": dsv4convert.convert_gguf,
    "merge": dsv4convert.merge,
    "shard": dsv4convert.shard,
    "unshard": dsv4convert.unshard,
    "dequantize": dsv4convert.dequantize,
    "repack": dsv4convert.repack,
    "requantize": dsv4convert.requantize,
    "mend": dsv4convert.mend,
    "mlx": dsv4convert.convert_mlx,
    "maxtext": dsv4convert.convert_maxtext,
    "verify": dsv4convert.verify,
    "inspect": dsv4convert.inspect,
    "check": dsv4convert.check,
    "estimate": dsv4convert.estimate,
}
# Options about printing (the keyword ``progress`` is a function), those that have functions of their own, and a field
# of the keyword ``upload``.
NO_KEYWORDS = {
    "delete_uploaded",
    "quiet",
    "as_json",
    "help",
    "manifest",
    "list_recipes",
    "show_operators",
    "report",
    "overwrite_page",
    "progress",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_keywords_are_the_options_with_the_same_defaults(name: str) -> None:
    command = app.get_command(click.Context(app), name)
    assert command is not None
    options = [option for option in command.params if isinstance(option, click.Option) and not option.hidden]
    required = {option.name: option for option in options if option.required}
    keywords = {
        keyword: parameter.default
        for keyword, parameter in inspect.signature(COMMANDS[name]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and keyword != "progress"
    }
    if "lock" in keywords:  # an option can only switch it off
        assert keywords.pop("lock") is True
        options = [option for option in options if option.name != "no_lock"]
    assert keywords.keys() == {option.name for option in options} - NO_KEYWORDS
    arguments = ["in"] if name in ("inspect", "check", "estimate") else ["in", "out"]
    for option in required.values():
        arguments += [option.opts[0], option.type.choices[0] if isinstance(option.type, click.Choice) else "1"]
    given = command.make_context(name, arguments).params
    for keyword in keywords.keys() - required.keys():
        default = None if given[keyword] == () else given[keyword]
        assert (None if keywords[keyword] == () else keywords[keyword]) == default, keyword


def test_progress_counts_up_to_the_total(tiny: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    out = tmp_path / "model.gguf"
    summary = dsv4convert.convert_gguf(tiny, out, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (summary.written_bytes, summary.written_bytes)
    assert seen == sorted(seen)
    checked: list[tuple[int, int]] = []
    assert dsv4convert.verify(tiny, out, progress=lambda done, total: checked.append((done, total))).ok
    assert checked == sorted(checked)
    assert len({total for _, total in checked}) == 1
    assert dsv4convert.verify_manifest(out, progress=lambda done, total: checked.append((done, total))).ok
    assert checked[-1] == (out.stat().st_size, out.stat().st_size)


def test_a_dry_run_writes_nothing_and_says_what_it_would(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    conversions = (
        dsv4convert.shard(tiny, out, mp=2, dry_run=True),
        dsv4convert.dequantize(tiny, out, dry_run=True),
        dsv4convert.repack(tiny, out, dry_run=True),
        dsv4convert.convert_gguf(tiny, tmp_path / "model.gguf", dry_run=True),
    )
    for summary in conversions:
        assert summary.dry_run is not None
        assert summary.written_bytes == 0
        assert summary.dry_run.disk_needed == sum(file.bytes for file in summary.dry_run.files) > 0
        assert json.loads(json.dumps(summary.as_json()))["target"] == summary.target
    assert not list(tmp_path.iterdir())


def test_shards_go_there_and_back(tiny: Path, tmp_path: Path) -> None:
    summary = dsv4convert.shard(tiny, tmp_path / "shards", mp=2)
    assert summary.costs.mp == 2
    assert summary.as_json()["costs"]["mp"] == 2
    dsv4convert.unshard(tmp_path / "shards", tmp_path / "joined", max_file_size="1GB")
    assert dsv4convert.inspect(tmp_path / "joined").tensors
    assert (
        dsv4convert.open_checkpoint(tmp_path / "joined").weights.keys()
        == dsv4convert.open_checkpoint(str(tiny)).weights.keys()
    )


def test_checkpoints_of_every_version_open() -> None:
    checkpoint = dsv4convert.open_checkpoint(TINY["tiny-a"])
    assert checkpoint.config.version is Version.V41
    assert "layers.0.engram.embed.weight" in checkpoint.weights


def test_one_text_or_rank_stands_for_a_list_of_one(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    one = dsv4convert.convert_gguf(tiny, out, name="Other", tensor_type="ffn_down_exps=q8_0")
    several = dsv4convert.convert_gguf(tiny, tmp_path / "b.gguf", name="Other", tensor_type=["ffn_down_exps=q8_0"])
    assert [size for _, size in one.files] == [size for _, size in several.files]
    assert [problem.where for problem in dsv4convert.verify(tiny, out).problems] == ["general.name"]
    assert dsv4convert.verify(tiny, out, ignore_key="general.name").ok
    shards = dsv4convert.shard(tiny, tmp_path / "shards", mp=2, rank=1)
    assert Path(shards.files[0][0]).name == "model1-mp2.safetensors"


def test_an_empty_list_of_ranks_is_not_all_of_them(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(dsv4convert.UsageError, match="--rank is empty"):
        dsv4convert.shard(tiny, tmp_path / "shards", mp=2, rank=[])


def test_strict_refuses_rounding_and_leaves_no_output(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(dsv4convert.LossyError, match="--strict"):
        dsv4convert.dequantize(tiny, tmp_path / "f16", dtype="f16", strict=True)
    assert not list(tmp_path.iterdir())


def test_a_model_is_the_same_from_every_layout(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    dsv4convert.convert_gguf(tiny, out, dense="bf16")
    tokens = [0, 17, 5]
    logits = dsv4convert.load_model(tiny).forward(tokens)
    for cached in (False, True):
        assert (dsv4convert.load_model(out, cached=cached).forward(tokens) == logits).all()


def test_layers_of_a_model_are_a_range_from_the_first(tiny: Path) -> None:
    assert dsv4convert.load_model(tiny, layers="0-1").n_layers == 2
    with pytest.raises(dsv4convert.UsageError, match="--layers must start at layer 0"):
        dsv4convert.load_model(tiny, layers="1-2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "--threads: out of range: expected 1 to 256, got 0"),
        ({"dense": "q3"}, "--dense: unknown"),
        ({"experts": "q3"}, "--experts: unknown"),
        ({"dialect": "ollama"}, "--dialect: unknown"),
        ({"draft": "hide"}, "--draft hide is not supported by dialect llama.cpp"),
        ({"mmproj": "hide"}, "--mmproj: unknown"),
        ({"max_file_size": "lots"}, "--max-file-size: not a size"),
        ({"max_file_size": 0}, "--max-file-size: not a size"),
        ({"max_file_size": -1}, "--max-file-size: not a size"),
        ({"layers": "3-"}, "--layers: not a range"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_bad_option_is_a_usage_error(tiny: Path, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(dsv4convert.UsageError) as raised:
        dsv4convert.convert_gguf(tiny, tmp_path / "model.gguf", **options)  # type: ignore[arg-type]
    assert message in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_keyword_that_no_conversion_has_is_told_with_its_name(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^dequantize\(\): got an unexpected keyword argument 'thread'$"):
        dsv4convert.dequantize(tiny, tmp_path / "out", thread=2)  # type: ignore[call-arg]
    assert inspect.signature(dsv4convert.dequantize).parameters["threads"].annotation == "int | None"
