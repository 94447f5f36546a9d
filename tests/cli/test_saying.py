"""Output for people never costs the work; what the system refuses is one line, whatever the command."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..command_line import run_cli

REPORT, NOTE = 17, "progress could not be shown"
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2  # linux/prctl.h and linux/capability.h


def program(*arguments: object, shell: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a shell that closes or fills its outputs."""
    words = " ".join(f"'{word}'" for word in (sys.executable, "-m", "dsv4convert", *map(str, arguments)))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        ["bash", "-c", shell.format(words)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=cwd,
        **options,
    )


@pytest.mark.parametrize(
    ("shell", "code"),
    [
        pytest.param("{} >/dev/full", REPORT, id="stdout full"),
        pytest.param("{} >&-", REPORT, id="stdout closed"),
        pytest.param("{} 2>&-", 0, id="stderr closed"),
        pytest.param("{} 2>/dev/full", 0, id="stderr full"),
        pytest.param("{} --quiet >&- 2>&-", 0, id="both closed, quiet"),
        pytest.param("{} >/dev/full 2>/dev/full", REPORT, id="both full"),
    ],
)
def test_the_work_is_done_whoever_cannot_be_told(tiny: Path, tmp_path: Path, shell: str, code: int) -> None:
    done = program("hf-to-gguf", tiny, tmp_path / "model.gguf", shell=shell, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "model.gguf.manifest.json"]
    assert "Traceback" not in done.stderr
    if code and "2>" not in shell:
        assert "the work is done" in done.stderr


def test_a_reader_that_has_enough_ends_the_command_quietly(tiny: Path, tmp_path: Path) -> None:
    done = program("inspect", tiny, "--json", shell="{} | head -c 10", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_progress_that_cannot_be_written_is_dropped_and_noted(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsv4convert.cli import report

    calls = []

    def fails(done: int, total: int) -> None:
        calls.append(done)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "_plain_lines", lambda: fails)
    result = run_cli("hf-to-gguf", tiny, tmp_path / "model.gguf")
    assert result.code == 0
    assert f"note: {NOTE} (No space left on device)" in result.out
    assert len(calls) == 1


# ---- what the system refuses of a user's input

COMMANDS: dict[str, list[str]] = {
    "hf-to-gguf": ["{path}", "{out}.gguf"],
    "shard": ["{path}", "{out}", "--mp", "2"],
    "unshard": ["{path}", "{out}"],
    "dequantize": ["{path}", "{out}"],
    "repack": ["{path}", "{out}", "--experts", "fp8"],
    "requantize": ["{path}", "{out}"],
    "mend": ["{path}", "{out}", "--reindex"],
    "mlx": ["{path}", "{out}"],
    "verify": ["{tiny}", "{path}"],
    "inspect": ["{path}"],
    "estimate": ["{path}"],
    "forward": ["{path}", "--tokens", "1,2"],
    "compare": ["{tiny}", "{path}", "--tokens", "1,2"],
    "synth": ["{path}/below"],
}


def arguments(command: str, path: str, tiny: Path, out: str) -> list[str]:
    return [command, *(word.format(path=path, tiny=tiny, out=out) for word in COMMANDS[command])]


PATHS = {
    "too long": "n" * 300,
    "a NUL": "a\0b",
    "half a surrogate pair": "a\udc80b",
    "no such folder": "nowhere/at/all",
    "a file for a folder": "/proc/self/status/model",
    "a loop of links": "loop",
}


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("command", COMMANDS)
def test_paths_that_cannot_be_are_one_line(
    command: str, kind: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    source = shutil.copytree(tiny, tmp_path / "source")  # since synth writes below it
    for result in (
        run_cli(*arguments(command, PATHS[kind], tiny, "out")),
        run_cli(*arguments(command, str(source), tiny, PATHS[kind])),
    ):
        # Linux takes any bytes but NUL and / in a name, so some of these are outputs like others.
        assert result.code == 0 or result.error
        assert result.code < 70
    assert run_cli(*arguments(command, PATHS["a NUL"], tiny, "out")).code > 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_current_folder_that_is_gone_is_one_line(command: str, tiny: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    words = arguments(command, "model", tiny, "out")
    done = program(*words, shell=f"cd '{gone}' && rmdir '{gone}' && {{}}", cwd=tmp_path)
    assert 0 < done.returncode < 70, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def heed_permissions() -> None:
    """Take from root, in a child and what it runs, the capabilities that open every folder."""
    if os.geteuid() == 0:
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_folders_that_may_not_be_entered_are_one_line(command: str, tiny: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    shutil.copytree(tiny, locked)
    locked.chmod(0)
    words = arguments(command, str(locked), tiny, str(tmp_path / "out"))
    done = program(*words, shell="{}", cwd=Path("/"), preexec_fn=heed_permissions)
    locked.chmod(0o700)
    assert 0 < done.returncode < 70, done.stderr
    assert f"{locked}" in done.stderr
    assert "permission denied" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_few_open_files_are_one_line_or_enough(command: str, tiny: Path, tmp_path: Path) -> None:
    words = arguments(command, str(tiny) if command != "unshard" else "nowhere", tiny, str(tmp_path / "out"))
    if command == "synth":
        words = ["synth", str(tmp_path / "made")]
    done = program(*words, shell="ulimit -n 20; {}", cwd=tmp_path)
    assert done.returncode < 70, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1, done.stderr


NUMBERS = [160.0, 2**70, -1, 1e400, "many", None, [], {}]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "bos_token_id", "rope_theta"])
def test_numbers_out_of_range_are_one_line(key: str, value: object, tiny: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {key: value}))
    for command in ("hf-to-gguf", "shard", "dequantize", "inspect", "forward"):
        result = run_cli(*arguments(command, str(source), tiny, str(tmp_path / command)))
        assert result.code < 70
        assert result.code == 0 or result.error


# ---- what was given instead of a checkpoint


def test_a_folder_of_shards_is_named_with_what_to_do(tiny: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    assert run_cli("shard", tiny, shards, "--mp", "2").code == 0
    for words in (["hf-to-gguf"], ["dequantize"], ["repack", "--experts", "fp8"]):
        error = run_cli(words[0], shards, tmp_path / "out", *words[1:]).error
        assert "a folder of shards: model0-mp2.safetensors and 1 more" in error
        assert "run unshard first" in error


@pytest.mark.parametrize("command", ["hf-to-gguf", "dequantize", "shard"])
def test_a_file_instead_of_a_folder_is_named(command: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    error = run_cli(*arguments(command, str(tmp_path / "model.gguf"), tiny, str(tmp_path / "out"))).error
    assert "a GGUF file cannot be converted; pass the folder of the safetensors checkpoint" in error
    error = run_cli(*arguments(command, str(tiny / "config.json"), tiny, str(tmp_path / "out"))).error
    assert f"a file, not a folder; pass its folder, {tiny}" in error


def test_a_hub_id_that_may_not_be_fetched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = run_cli("hf-to-gguf", "deepseek-ai/DeepSeek-V4-Flash", "out.gguf").error
    assert "hf://deepseek-ai/DeepSeek-V4-Flash: no such folder here, nor in the hub's cache" in error


def test_a_snapshot_of_the_hubs_cache_is_named_after_its_repository(tiny: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--somebody--Small-V4" / "snapshots" / ("0123456789" * 4)
    shutil.copytree(tiny, snapshot)
    result = run_cli("hf-to-gguf", snapshot, "--dry-run")
    assert result.code == 0
    assert "Small-8x2.6M-V4" in result.out
    assert "0123456789" not in result.out


def test_options_of_the_program_are_named_with_their_place(tiny: Path) -> None:
    error = run_cli("hf-to-gguf", tiny, "--debug").error
    assert "--debug belongs before the command; use" in error
    assert "--debug hf-to-gguf ..." in error
