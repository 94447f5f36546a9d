"""Output for people never costs the work; what the system refuses is one line, whatever the command."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.errors import InputOutputError, ReportError, SpaceError, VerifyError
from dsv4convert.verification import verify
from dsv4convert.verification.report import TENSOR, Report

from ..command_line import run_cli
from ..engine.restricted import heed_permissions
from .walk import program

REPORT, NOTE = ReportError.exit_code, "progress could not be shown"


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])
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
def test_the_work_is_done_whoever_cannot_be_told(
    tiny: Path, tmp_path: Path, shell: str, code: int, buffered: bool
) -> None:
    shell = shell if buffered else f"export PYTHONUNBUFFERED=1; {shell}"
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


def test_a_difference_counts_more_than_a_report_that_cannot_be_told(tiny: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    assert run_cli("hf-to-gguf", tiny, gguf).code == 0
    with gguf.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    for words in (("verify", tiny, gguf), ("verify", gguf, "--manifest")):
        done = program(*words, shell="{} >/dev/full", cwd=tmp_path)
        assert done.returncode == VerifyError.exit_code
        assert "differs from the" in done.stderr


def test_a_page_or_a_picture_that_cannot_be_written_does_not_cost_what_was_found(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf, page, plot = tmp_path / "model.gguf", tmp_path / "page.html", tmp_path / "plot.png"
    assert run_cli("hf-to-gguf", tiny, gguf).code == 0
    compared = ["compare", tiny, gguf, "--tokens", "1,2", "--plot", plot, "--overwrite", "--tolerance"]
    for words, code in (
        (["verify", tiny, gguf, "--report", page, "--overwrite"], 0),
        (["inspect", gguf, "--report", page, "--overwrite"], 0),
        ([*compared, "1"], 0),
        ([*compared, "0"], VerifyError.exit_code),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("dsv4convert.engine.outputs.write_all", full_disk)
            lost = run_cli(*words, "--json")
        assert lost.code == (code or SpaceError.exit_code)
        assert "cannot be written (No space left on device)" in lost.err
        good = run_cli(*words, "--json")
        assert good.code == code
        assert json.loads(lost.out).keys() == json.loads(good.out).keys()
    page.unlink()
    words = ["verify", tiny, gguf, "--report", page]
    assert program(*words, shell="{} >&-", cwd=tmp_path).returncode == REPORT
    assert page.exists()


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- results beside an output


def test_results_replace_no_input_and_no_older_file_unasked(tiny: Path, tmp_path: Path) -> None:
    chat, plot, older = tmp_path / "chat.json", tmp_path / "plot.png", tmp_path / "logits.npy"
    text = '[{"role": "user", "content": "hi"}]'
    chat.write_text(text)
    for words in (("forward", tiny, "--chat", chat, "--logits", chat, "--overwrite"),
                  ("compare", tiny, tiny, "--chat", chat, "--plot", chat, "--overwrite")):  # fmt: skip
        assert "the output would replace a file of the source" in run_cli(*words).error
    assert chat.read_text() == text
    for path, words in ((older, ("forward", tiny, "--logits")), (plot, ("compare", tiny, tiny, "--plot"))):
        path.write_text("three years of work")
        error = run_cli(*words, path, "--tokens", "1,2").error
        assert f"{path}: already exists; pass --overwrite" in error
        assert path.read_text() == "three years of work"
        assert run_cli(*words, path, "--tokens", "1,2", "--overwrite").code == 0
        assert path.read_bytes()[1:6] in (b"NUMPY", b"PNG\r\n")
        assert sorted(tmp_path.glob(f"{path.name}*")) == [path]


def test_an_importance_matrix_is_no_place_for_the_conversion(tiny: Path, tmp_path: Path) -> None:
    matrix, text = tmp_path / "imatrix.gguf", tmp_path / "text"
    text.write_text("the cat sat on the mat " * 20)
    assert run_cli("imatrix", tiny, "--text", text, "-o", matrix, "--context-size", "8", "--chunks", "1").code == 0
    before = matrix.read_bytes()
    error = run_cli("hf-to-gguf", tiny, matrix, "--imatrix", matrix, "--overwrite").error
    assert "the output would replace a file of the source" in error
    assert matrix.read_bytes() == before


# ---- what the system refuses of a user's input; ``test_every_command`` has all commands and all kinds


def test_a_folder_that_may_not_be_entered_is_named(tiny: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    shutil.copytree(tiny, locked)
    locked.chmod(0)
    words = ["hf-to-gguf", locked, tmp_path / "out.gguf"]
    done = program(*words, shell="{}", cwd=Path("/"), preexec_fn=heed_permissions)
    locked.chmod(0o700)
    assert done.returncode == InputOutputError.exit_code
    assert done.stderr.startswith(f"error: {locked}")
    assert "permission denied" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


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
    more = ["--mp", "2"] if command == "shard" else []
    error = run_cli(command, tmp_path / "model.gguf", tmp_path / "out", *more).error
    assert "a GGUF file cannot be converted; pass the folder of the safetensors checkpoint" in error
    error = run_cli(command, tiny / "config.json", tmp_path / "out", *more).error
    assert f"a file, not a folder; pass its folder, {tiny}" in error


def test_a_gguf_in_place_of_a_checkpoint_is_told_by_the_command_itself(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    assert "model.gguf: check reads no GGUF files; pass the folder" in run_cli("check", model).error
    result = run_cli("verify", model, tiny)
    assert (result.code, "SOURCE comes first: expected verify SOURCE OUT" in result.error) == (2, True)


def test_what_verify_and_unshard_cannot_take_is_told_with_what_they_can(tiny: Path, tmp_path: Path) -> None:
    assert run_cli("shard", tiny, tmp_path / "shards", "--mp", "2").code == 0
    result = run_cli("verify", tmp_path / "shards", tiny)
    assert (result.code, "SOURCE is a folder of shards; pass the checkpoint that was converted" in result.error) == (
        2,
        True,
    )
    file = tmp_path / "shards" / "model0-mp2.safetensors"
    for command, message in (
        (["verify", tiny, file], f"neither a GGUF file nor a folder; pass its folder, {file.parent}"),
        (["unshard", file, tmp_path / "out"], f"a file, not a folder; pass its folder, {file.parent}"),
    ):
        result = run_cli(*command)
        assert (result.code, result.error) == (3, f"{file}: {message}")


def test_a_gguf_in_a_checkpoints_folder_leaves_the_folder_what_it_is(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    assert run_cli("hf-to-gguf", folder, folder).code == 0
    assert "same within 1e-05" in run_cli("compare", tiny, folder, "--random", "4").out
    assert "\nverified\n" in run_cli("verify", tiny, folder).out
    assert ": checkpoint folder, " in run_cli("inspect", folder).out
    assert ": checkpoint folder of DeepSeek-V4" in run_cli("estimate", folder).out
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert ": GGUF, " in run_cli("inspect", folder).out


@pytest.mark.parametrize(
    "arguments",
    [
        ("hf-to-gguf", "TINY", "OUT/a.gguf", "--recipe", "nope.toml"),
        ("estimate", "TINY", "--hardware", "nope.toml"),
        ("estimate", "TINY", "--routing", "nope.json"),
        ("imatrix", "TINY", "-o", "OUT/a.gguf", "--text", "nope.txt"),
        ("forward", "TINY", "--chat", "nope.json"),
    ],
    ids=["recipe", "hardware", "routing", "text", "chat"],
)
def test_of_a_file_that_an_option_names_the_name_is_to_be_checked(
    arguments: tuple[str, ...], tiny: Path, tmp_path: Path
) -> None:
    places = {"TINY": str(tiny), "OUT": str(tmp_path)}
    result = run_cli(*(places.get(word, word.replace("OUT/", f"{tmp_path}/")) for word in arguments))
    assert result.code == 3
    assert result.error.endswith(f"{arguments[-1]}: no such file; check the name")


@pytest.mark.parametrize(
    ("command", "options"),
    [("hf-to-gguf", []), ("forward", ["--tokens", "1,2"]), ("synth", [])],
    ids=["hf-to-gguf", "forward", "synth"],
)
def test_layers_the_wrong_way_round_are_an_error_of_usage(
    command: str, options: list[str], tiny: Path, tmp_path: Path
) -> None:
    paths = {"hf-to-gguf": [tiny, tmp_path / "a.gguf"], "forward": [tiny], "synth": [tmp_path / "out"]}[command]
    result = run_cli(command, *paths, *options, "--layers", "3-0")
    assert result.code == 2
    assert result.error == "--layers: the first layer is behind the last: expected a range such as 0-3, got 3-0"


@pytest.mark.parametrize("address", ["ftp://host/folder", "file:///tmp/folder"])
@pytest.mark.parametrize("command", ["inspect", "check", "estimate"])
def test_an_address_of_an_unknown_kind_is_an_error_of_usage(command: str, address: str) -> None:
    result = run_cli(command, address)
    assert result.code == 2
    assert "no such address can be read: expected hf://OWNER/NAME, https://HOST/FOLDER, s3://BUCKET" in result.error
    assert f"got {address.partition('://')[0]}://…; download the files and pass their folder" in result.error


def test_an_importance_matrix_at_an_address_is_refused_as_one(tiny: Path, tmp_path: Path) -> None:
    for command in (
        ["hf-to-gguf", tiny, tmp_path / "a.gguf"],
        ["hf-to-gguf", tiny, "--list-recipes"],
        ["verify", tiny, tiny],
    ):
        result = run_cli(*command, "--imatrix", "https://localhost/imatrix.gguf")
        assert result.code == 2
        assert result.error.startswith("https://localhost/imatrix.gguf: an address, where an importance matrix on this")


def test_a_folder_named_like_an_address_is_read(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ftp:").mkdir()
    Path("ftp:/model").symlink_to(tiny)
    assert run_cli("inspect", "ftp:/model").code == 0


@pytest.mark.parametrize("option", ["--max-file-size", "--fit"])
def test_a_size_without_its_unit_is_asked_for(option: str, tiny: Path, tmp_path: Path) -> None:
    result = run_cli("hf-to-gguf", tiny, tmp_path / "a.gguf", option, "96")
    assert result.code == 2
    assert result.error == f"{option}: 96 bytes: expected a number with a unit, such as 96G"


def test_a_pre_tokenizer_that_nothing_here_knows_is_noted(tiny: Path, tmp_path: Path) -> None:
    note = "note: --tokenizer-pre foo is not checked: llama.cpp loads no file with a name that it does not know"
    assert note in run_cli("hf-to-gguf", tiny, tmp_path / "a.gguf", "--tokenizer-pre", "foo").out
    known = run_cli("hf-to-gguf", tiny, tmp_path / "b.gguf", "--tokenizer-pre", "joyai-llm")
    assert (known.code, "--tokenizer-pre" in known.out) == (0, False)
    assert "note: " not in run_cli("verify", tiny, tmp_path / "b.gguf").out


def test_the_demo_says_that_its_file_does_not_stay() -> None:
    out = run_cli("demo").out
    assert "wrote" not in out
    assert "MB  removed when the demo ends\n" in out


def test_a_demo_that_is_not_verified_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def another(source: Path, out: Path, **options: Any) -> Report:
        report = verify(source, out, **options)
        report.problem(TENSOR, "tensor output.weight", "3 of 4 elements are wrong")
        return report

    monkeypatch.setattr("dsv4convert.api.verify", another)
    result = run_cli("demo")
    assert result.code == VerifyError.exit_code
    assert result.error.endswith("the output differs from the source: tensor output.weight: 3 of 4 elements are wrong")
    assert "all as they must be" not in result.out


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


def test_a_result_in_a_folder_that_is_missing_is_told_before_the_model_runs(tiny: Path, tmp_path: Path) -> None:
    for words in (["forward", tiny, "--logits"], ["compare", tiny, tiny, "--plot"]):
        result = run_cli(*words, tmp_path / "absent" / "result.png", "--tokens", "no tokens")
        assert "absent: output folder is missing; create the folder first" in result.error


def test_a_picture_of_an_estimate_replaces_no_input_and_no_older_file_unasked(tiny: Path, tmp_path: Path) -> None:
    plot, routing = tmp_path / "plot.png", tmp_path / "routing.png"
    plot.write_text("three years of work")
    routing.write_text("{}")
    assert f"{plot}: already exists; pass --overwrite" in run_cli("estimate", tiny, "--plot", plot).error
    assert plot.read_text() == "three years of work"
    assert run_cli("estimate", tiny, "--plot", plot, "--overwrite").code == 0
    assert plot.read_bytes()[:4] == b"\x89PNG"
    for option in ("--routing", "--hardware", "--recipe"):
        words = ["estimate", tiny, "--plot", routing, option, routing, "--overwrite"]
        assert "the output would replace a file of the source" in run_cli(*words).error
    for words in (["estimate", tiny], ["compare", tiny, tiny, "--tokens", "no tokens"]):
        assert "--plot: not a picture format" in run_cli(*words, "--plot", tmp_path / "plot.txt").error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "routing.png"]


def test_a_page_or_a_picture_replaces_no_file_of_a_split_set_and_no_second_input(tiny: Path, tmp_path: Path) -> None:
    assert run_cli("hf-to-gguf", tiny, tmp_path / "part.gguf", "--split-max-tensors", "50").code == 0
    first, second, *_ = sorted(tmp_path.glob("part-*.gguf"))
    for name in ("page.html", "plot.png", "logits.npy"):
        (tmp_path / name).hardlink_to(second)
    page, plot, logits = (tmp_path / name for name in ("page.html", "plot.png", "logits.npy"))
    for words in (
        ["inspect", first, "--report", page],
        ["estimate", first, "--plot", plot],
        ["forward", first, "--tokens", "1", "--logits", logits],
        ["compare", first, tiny, "--tokens", "1", "--plot", plot],
        ["verify", tiny, tiny, "--imatrix", second, "--report", page],
        ["verify", tiny, tiny, "--ggml-lib", second, "--report", page],
    ):
        assert "the output would replace a file of the source" in run_cli(*words, "--overwrite").error


def test_results_lie_in_no_finished_output(tiny: Path, tmp_path: Path) -> None:
    """A manifest lists all that is in a folder: what comes later would be a difference."""
    out, text = tmp_path / "bf16", tmp_path / "text"
    text.write_text("the cat sat on the mat " * 20)
    assert run_cli("dequantize", tiny, out).code == 0
    for words in (
        ["inspect", out, "--report", out / "page.html"],
        ["estimate", out, "--plot", out / "plot.png"],
        ["forward", tiny, "--tokens", "1", "--logits", out / "logits.npy"],
        ["forward", tiny, "--tokens", "1", "--goldens", out / "goldens"],
        ["compare", tiny, out, "--tokens", "1", "--plot", out / "plot.png"],
        ["imatrix", tiny, "--text", text, "--context-size", "8", "-o", out / "imatrix.gguf"],
    ):
        assert "the file would lie in a finished output" in run_cli(*words).error
    assert run_cli("verify", "--manifest", out).code == 0
    assert run_cli("inspect", out, "--report", tmp_path / "page.html").code == 0


def test_an_importance_matrix_takes_nobody_elses_temporary_file(tiny: Path, tmp_path: Path) -> None:
    text, out, partial = (tmp_path / name for name in ("text", "m.gguf", "m.gguf.partial"))
    text.write_text("the cat sat on the mat " * 20)
    words = ["imatrix", tiny, "--text", text, "--context-size", "8", "--chunks", "1", "-o", out]
    for content in (b"three years of work", b"\0" * 100):
        partial.write_bytes(content)
        assert f"{partial}: already exists and is not unfinished work of this command" in run_cli(*words).error
        assert partial.read_bytes() == content
    partial.unlink()
    assert run_cli(*words).code == 0
    assert run_cli(*words, "--process-output", "--overwrite").code == 0
    out.rename(partial)  # as a killed run of the command leaves it, or the older file that it was to replace
    assert run_cli(*words).code == 0
    tokenizer = shutil.copytree(tiny, tmp_path / "tokenizer") / "tokenizer.json"
    words[-1] = tokenizer
    error = run_cli(*words, "--tokenizer", tokenizer.parent, "--overwrite").error
    assert "the output would replace a file of the source" in error


def test_goldens_that_cannot_be_made_leave_the_older_ones(tiny: Path, tmp_path: Path) -> None:
    goldens = tmp_path / "goldens"
    words = ["forward", tiny, "--layers", "0-0", "--goldens", goldens]
    assert run_cli(*words, "--tokens", "1,2").code == 0
    before = {path.name: path.read_bytes() for path in goldens.iterdir()}
    assert "goldens: already exists; pass --overwrite" in run_cli(*words, "--tokens", "3").error
    assert run_cli(*words, "--tokens", "3", "--record-last", "5", "--overwrite", "--activation-rounding").code == 0
    assert run_cli(*words, "--tokens", "99999999", "--overwrite").code != 0
    assert {path.name for path in goldens.iterdir()} == before.keys()
    (goldens / "thesis.tex").write_text("three years of work")
    assert "not replaced: contains thesis.tex" in run_cli(*words, "--tokens", "3", "--overwrite").error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["goldens"]
