"""Progress for programs: lines of JSON on stderr."""

from __future__ import annotations

import io
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import dsv4convert
from dsv4convert.cli.report import progress_display
from dsv4convert.containers.json_object import schema_path
from dsv4convert.engine.monitor import Step, StepListener, Waiting

from ..command_line import run_cli


class Steps(StepListener):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def __call__(self, done: int, total: int) -> None:
        self.steps.append(Step(done))

    def step(self, step: Step, total: int) -> None:
        self.steps.append(step)


def progress_lines(error: str) -> list[dict[str, Any]]:
    """Return the lines of JSON, each of which keeps to its schema."""
    schema = json.loads(schema_path("progress.schema.json").read_text())
    lines = [json.loads(line) for line in error.splitlines()]
    for line in lines:
        jsonschema.validate(line, schema)
    return lines


@pytest.mark.parametrize("more", [[], ["--quiet"], ["--json"]], ids=["alone", "quiet", "json"])
def test_lines_count_up_to_the_last_one(more: list[str], tiny: Path, tmp_path: Path) -> None:
    result = run_cli("hf-to-gguf", tiny, tmp_path / "model.gguf", "--progress", "json", *more)
    assert result.code == 0
    lines = progress_lines(result.err)
    assert [line["done"] for line in lines] == sorted(line["done"] for line in lines)
    assert [line["event"] for line in lines] == ["progress"] * (len(lines) - 1) + ["finished"]
    assert lines[-1]["done"] == lines[-1]["total"] == (tmp_path / "model.gguf").stat().st_size
    if more == ["--json"]:
        json.loads(result.out)


def test_lines_name_the_file_and_what_threads_wait_for(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_display(True, form="json") as told:
        assert isinstance(told, StepListener)
        told.step(Step(5, (2, 3), "model.gguf", Waiting(0.25, 0.5, 0.0, 0.25)), 10)
        told.step(Step(10, (5, 5), "model.gguf"), 10)  # too soon after the first one
        told(10, 10)
        told(10, 10)
    first, last = progress_lines(capsys.readouterr().err)
    assert (first["done"], first["file"], first["event"]) == (5, "model.gguf", "progress")
    assert first["waiting"] == {"processor": 0.25, "disk": 0.5, "network": 0.0, "other": 0.25}
    assert (last["done"], last["file"], last["event"]) == (10, None, "finished")


def test_a_bar_is_not_drawn_for_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_display(False, "verifying") as told:
        assert isinstance(told, StepListener)
        for done in range(10_000):
            told.step(Step(done, file="model.gguf"), 10_000)
        told(10_000, 10_000)
    assert 2 < screen.getvalue().count("verifying") < 100


@pytest.mark.parametrize(
    ("waiting", "says"),
    [
        (Waiting(0.8, 0.2, 0, 0), "computing"),
        (Waiting(0.2, 0.8, 0, 0), "waiting for the disk"),
        (Waiting(0.2, 0.2, 0.6, 0), "waiting for the network"),
    ],
)
def test_a_bar_says_the_file_the_rate_and_what_is_waited_for(
    waiting: Waiting, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich import console

    screen = io.StringIO()
    wide = partial(console.Console, file=screen, force_terminal=True, width=200)
    monkeypatch.setattr(console, "Console", lambda **options: wide())
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    with progress_display(False) as told:
        assert isinstance(told, StepListener)
        told.step(Step(5_000_000, (5_000_000,), "model-[1].gguf", waiting), 10_000_000)
    shown = screen.getvalue()
    assert f"converting model-[1].gguf, {says}" in shown
    assert "5.0/10.0 MB" in shown


def test_a_conversion_is_watched_for_it(tiny: Path, tmp_path: Path) -> None:
    told = Steps()
    dsv4convert.shard(tiny, tmp_path / "out", mp=2, threads=2, progress=told)
    last = [step for step in told.steps if step.threads][-1]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert last.file in names
    assert sum(last.threads) == last.done


def test_other_long_commands_have_lines_too(tiny: Path, tmp_path: Path) -> None:
    assert run_cli("hf-to-gguf", tiny, tmp_path / "model.gguf", "-q").code == 0
    for command in (
        ("verify", tiny, tmp_path / "model.gguf"),
        ("verify", "--manifest", tmp_path / "model.gguf"),
        ("check", tiny),
    ):
        result = run_cli(*command, "--progress", "json", "-q")
        assert result.code == 0
        lines = progress_lines(result.err)
        assert lines[-1]["event"] == "finished"
        assert lines[-1]["done"] == lines[-1]["total"] > 1000


def test_verify_and_check_name_the_file_that_they_read(tiny: Path, tmp_path: Path) -> None:
    dsv4convert.shard(tiny, tmp_path / "out", mp=2)
    outputs = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    sources = {path.name for path in tiny.glob("*.safetensors")}
    verified, listed, checked = Steps(), Steps(), Steps()
    assert dsv4convert.verify(tiny, tmp_path / "out", threads=2, progress=verified).ok
    assert dsv4convert.verify_manifest(tmp_path / "out", progress=listed).ok
    assert not dsv4convert.check(tiny, progress=checked).findings
    for told, names in ((verified, outputs), (listed, outputs), (checked, sources)):
        first, *between, last = told.steps
        assert (first.done, first.file, last.file) == (0, None, None)
        assert names <= {step.file for step in between}
        assert [step.done for step in between] == sorted(step.done for step in between)
    if sys.platform == "linux":
        assert any(step.waiting for step in verified.steps)
        assert any(step.waiting for step in checked.steps)


def test_a_checksum_of_one_large_file_is_told_of_by_tensor(tiny: Path, tmp_path: Path) -> None:
    dsv4convert.convert_gguf(tiny, tmp_path / "model.gguf")
    told = Steps()
    assert dsv4convert.verify_manifest(tmp_path / "model.gguf", progress=told).ok
    assert len({step.done for step in told.steps}) > 10


def test_an_error_is_a_line_of_text_after_them(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("")
    result = run_cli("dequantize", tiny, tmp_path / "out", "--progress", "json")
    assert result.code == 9
    assert result.err.splitlines()[-1].startswith("error: ")


def test_a_dry_run_has_no_lines(tiny: Path, tmp_path: Path) -> None:
    result = run_cli("dequantize", tiny, tmp_path / "out", "--progress", "json", "--dry-run")
    assert (result.code, result.err) == (0, "")
