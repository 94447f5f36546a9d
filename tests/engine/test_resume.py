"""An interrupted run: what it keeps, when it may go on, and when it may not."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.engine import fingerprint as fingerprint_module
from dsv4convert.engine.conversion import execute
from dsv4convert.engine.journal import Journal, journal_path
from dsv4convert.engine.manifest import check_manifest, manifest_path
from dsv4convert.engine.names import is_same_file
from dsv4convert.engine.outputs import PAGE_BYTES, FileOutputs, open_file, outputs_of
from dsv4convert.engine.worker import Worker
from dsv4convert.errors import InputOutputError, OutputExistsError, ResumeError, RunInterruptedError
from dsv4convert.plan import Plan
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions

from ..command_line import run_cli
from .plans import PLANS, contents, failing_after, interrupt, leftovers

AFTER = 40


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Plan:
    return PLANS[request.param](tiny, tmp_path)


@pytest.fixture
def good(request: pytest.FixtureRequest, plan: Plan, tiny: Path, tmp_path: Path) -> dict[str, bytes]:
    (tmp_path.parent / "whole").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=tmp_path.parent / "whole"))
    whole = PLANS[request.node.callspec.params["plan"]](tiny, folder)
    execute(whole, threads=2)
    return contents(whole)


@pytest.fixture
def gguf(tiny: Path, tmp_path: Path) -> Plan:
    return PLANS["gguf"](tiny, tmp_path)


def made_again(plan: Plan, **options: object) -> set[tuple[str, int]]:
    """Resume ``plan``; return (file, offset) of every segment that a worker made."""
    made = set()
    run = Worker.run

    def noting(self: Worker, segment: object, output: int, path: Path, offset: int) -> object:
        made.add((path.name, offset))
        return run(self, segment, output, path, offset)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "run", noting)
        execute(plan, threads=2, resume=True, **options)  # type: ignore[arg-type]
    return made


def test_a_failed_run_keeps_its_work_and_says_how_to_go_on(plan: Plan) -> None:
    error = interrupt(plan, AFTER)
    assert "a bad block" in str(error)
    assert "(while making tensor " in str(error)
    assert str(error).endswith("the finished work is kept: run again with --resume")
    assert not any(path.exists() for path in plan.final_paths())
    assert leftovers(plan.output_path().parent)


def test_resume_makes_exactly_what_was_not_finished(plan: Plan, good: dict[str, bytes]) -> None:
    interrupt(plan, AFTER)
    with Journal(journal_path(plan)) as journal:
        finished = {(plan.files[e.task.file].name, e.task.offset) for e in journal.finished().values()}
    assert len(finished) == AFTER
    everything = set()
    for file in plan.files:
        for tensor in file.tensors:
            offset = tensor.offset
            for segment in tensor.segments:
                everything.add((file.name, offset))
                offset += segment.nbytes
    made = {(name.removesuffix(".partial"), offset) for name, offset in made_again(plan)}
    assert made == everything - finished
    assert contents(plan) == good
    assert leftovers(plan.output_path().parent) == []
    assert check_manifest(plan.output_path()).ok


def test_resume_says_how_many_bytes_it_did_not_make_again(gguf: Plan) -> None:
    interrupt(gguf, AFTER)
    with Journal(journal_path(gguf)) as journal:
        finished = sum(gguf.files[f].tensors[t].segments[s].nbytes for f, t, s in journal.finished())
    assert execute(gguf, threads=2, resume=True).resumed_bytes == finished > 0


def test_resume_may_be_interrupted_again(plan: Plan, good: dict[str, bytes]) -> None:
    for _ in range(3):
        interrupt(plan, 20, resume=True)
    execute(plan, threads=2, resume=True)
    assert contents(plan) == good


@pytest.mark.parametrize("pages", [0, 1, 2])
def test_a_kill_while_a_header_is_written_does_not_end_resuming(plan: Plan, good: dict[str, bytes], pages: int) -> None:
    """A kill ends a write after any page of it."""
    header, nbytes = max((file.header for file in plan.files), key=len), pages * PAGE_BYTES
    assert len(header) > nbytes
    process = os.fork()
    if not process:
        real = os.pwrite

        def die(descriptor: int, data: Any, offset: int) -> int:
            if bytes(data) == header:
                real(descriptor, header[:nbytes], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(descriptor, data, offset)

        os.pwrite = die
        with contextlib.suppress(BaseException):
            execute(plan, threads=1)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
    execute(plan, threads=2, resume=True)
    assert contents(plan) == good


def test_work_without_a_journal_next_to_a_finished_output_is_named(plan: Plan, good: dict[str, bytes]) -> None:
    """A run that replaces its own output, killed when it had work, and again as it began anew."""
    execute(plan, threads=2)
    interrupt(plan, 3, overwrite=True)
    journal_path(plan).unlink()
    with pytest.raises(ResumeError, match=r"\.partial: unfinished work .*pass --fresh"):
        execute(plan, threads=2, resume=True, overwrite=True)
    assert contents(plan) == good
    execute(plan, threads=2, fresh=True, overwrite=True)
    assert contents(plan) == good
    assert leftovers(plan.output_path().parent) == []


def test_counts_of_an_interrupted_run_are_in_the_summary_of_the_next(tiny: Path, tmp_path: Path) -> None:
    make = lambda out: plan_gguf(tiny, out, GgufOptions(experts="q8_0"))  # noqa: E731
    (tmp_path / "whole").mkdir()
    whole = execute(make(tmp_path / "whole" / "model.gguf"), threads=2)
    interrupt(make(tmp_path / "model.gguf"), 100)
    resumed = execute(make(tmp_path / "model.gguf"), threads=2, resume=True)
    assert resumed.resumed_bytes > 0
    assert [{**c} for c in resumed.counted] == [{**c} for c in whole.counted]


def test_without_resume_or_fresh_the_work_is_left_alone(plan: Plan) -> None:
    interrupt(plan, AFTER)
    before = journal_path(plan).read_bytes()
    with pytest.raises(
        ResumeError, match=r"left work here; pass --resume to continue the interrupted run, or --fresh to start over"
    ):
        execute(plan, threads=1)
    assert journal_path(plan).read_bytes() == before


def test_fresh_starts_over(plan: Plan, good: dict[str, bytes]) -> None:
    interrupt(plan, AFTER)
    assert execute(plan, threads=2, fresh=True).resumed_bytes == 0
    assert contents(plan) == good
    assert leftovers(plan.output_path().parent) == []


def test_fresh_starts_over_with_other_options(tiny: Path, tmp_path: Path) -> None:
    from dsv4convert.targets.dequantize import plan_dequantize

    interrupt(plan_dequantize(tiny, tmp_path / "out", max_file_bytes=2_000_000), AFTER)
    other = plan_dequantize(tiny, tmp_path / "out", dtype="f32")
    execute(other, threads=2, fresh=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {file.name for file in other.files}


def test_resume_with_nothing_to_resume_is_a_plain_run(plan: Plan, good: dict[str, bytes]) -> None:
    assert execute(plan, threads=2, resume=True).resumed_bytes == 0
    assert contents(plan) == good


def test_resume_of_a_finished_output_does_nothing_and_succeeds(plan: Plan) -> None:
    execute(plan, threads=2)
    before = {path: path.stat().st_mtime_ns for path in plan.final_paths()}
    assert execute(plan, threads=2, resume=True).resumed_bytes == plan.nbytes
    assert {path: path.stat().st_mtime_ns for path in plan.final_paths()} == before


def test_resume_does_not_take_another_output_for_its_own(tiny: Path, gguf: Plan, tmp_path: Path) -> None:
    execute(plan_gguf(tiny, tmp_path / "model.gguf", GgufOptions(dense="bf16")), threads=2)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        execute(gguf, threads=2, resume=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param({"dense": "bf16"}, "--dense was not given and is bf16 now; pass the same", id="another type"),
        pytest.param({"layers": (0, 1)}, r"--layers was not given and is \[0, 1\] now", id="other layers"),
    ],
)
def test_another_option_is_refused_and_named(tiny: Path, tmp_path: Path, change: dict[str, object], says: str) -> None:
    interrupt(plan_gguf(tiny, tmp_path / "model.gguf", GgufOptions()), AFTER)
    with pytest.raises(ResumeError, match=says) as caught:
        execute(plan_gguf(tiny, tmp_path / "model.gguf", GgufOptions(**change)), resume=True)  # type: ignore[arg-type]
    assert "--fresh" in str(caught.value)


def test_options_that_are_not_given_again_are_named_as_they_are_given(tiny: Path, tmp_path: Path) -> None:
    interrupt(plan_gguf(tiny, tmp_path / "model.gguf", GgufOptions(dense="q4_0", output="q8_0")), AFTER)
    with pytest.raises(ResumeError) as caught:
        execute(plan_gguf(tiny, tmp_path / "model.gguf", GgufOptions()), resume=True)
    said = "--dense was q4_0 and is not given now; --output-type was q8_0 and is not given now"
    assert f"{said}; pass the same options" in str(caught.value)
    assert "ggml" not in str(caught.value)


def test_another_version_of_the_program_is_refused_and_named(gguf: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(gguf, AFTER)
    monkeypatch.setattr(fingerprint_module, "__version__", "99.0")
    with pytest.raises(ResumeError, match=r"program was dsv4convert .*, is dsv4convert 99\.0"):
        execute(gguf, resume=True)


def test_a_changed_source_file_is_refused_and_named(tiny: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny, tmp_path / "source")
    out = tmp_path / "model.gguf"
    interrupt(plan_gguf(source, out, GgufOptions()), AFTER)
    shard = sorted(source.glob("*.safetensors"))[1]
    os.utime(shard, ns=(0, 12345))
    with pytest.raises(ResumeError, match=f"source file {shard.name} changed"):
        execute(plan_gguf(source, out, GgufOptions()), resume=True)


def test_a_changed_config_is_refused(tiny: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny, tmp_path / "source")
    out = tmp_path / "model.gguf"
    interrupt(plan_gguf(source, out, GgufOptions()), AFTER)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with pytest.raises(ResumeError, match="the source's config, tokenizer or tensors changed"):
        execute(plan_gguf(source, out, GgufOptions()), resume=True)


def test_a_source_that_changes_during_the_run_is_not_believed(tiny: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny, tmp_path / "source")
    plan = plan_gguf(source, tmp_path / "model.gguf", GgufOptions())
    shard = sorted(source.glob("*.safetensors"))[0]
    run, first = Worker.run, True

    def touching(self: Worker, segment: object, output: int, path: Path, offset: int) -> object:
        nonlocal first
        if first:
            os.utime(shard, ns=(0, 12345))
        first = False
        return run(self, segment, output, path, offset)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "run", touching)
        result = run_cli("hf-to-gguf", source, plan.final_paths()[0])
    assert result.code == 6
    assert f"{shard.name}: changed during the conversion" in result.error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("damage", ["gone", "shorter"])
def test_a_temporary_file_that_is_not_as_it_was_left_is_refused(gguf: Plan, damage: str) -> None:
    interrupt(gguf, AFTER)
    partial = outputs_of(gguf).paths[0]
    if damage == "gone":
        partial.unlink()
    else:
        os.truncate(partial, 1000)
    with pytest.raises(ResumeError, match="missing or changed") as caught:
        execute(gguf, resume=True)
    assert partial.name in str(caught.value)


def test_work_that_was_moved_to_another_disk_goes_on(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    interrupt(PLANS["gguf"](tiny, tmp_path / "a"), AFTER)
    for path in (tmp_path / "a").iterdir():
        shutil.copy(path, tmp_path / "b")
    assert execute(PLANS["gguf"](tiny, tmp_path / "b"), threads=1, resume=True).resumed_bytes > 0
    assert check_manifest(tmp_path / "b" / "model.gguf").ok


def test_moved_work_with_other_bytes_is_refused(tiny: Path, tmp_path: Path) -> None:
    plan = PLANS["gguf"](tiny, tmp_path)
    interrupt(plan, AFTER)
    partial = outputs_of(plan).paths[0]
    data = bytearray(partial.read_bytes())
    data[plan.files[0].tensors[0].offset] ^= 1
    partial.with_name("other").write_bytes(data)
    os.replace(partial.with_name("other"), partial)
    name = plan.files[0].tensors[0].name
    with pytest.raises(ResumeError, match=f"tensor {name} differs from what the interrupted run wrote"):
        execute(plan, resume=True)


def test_an_older_output_is_not_taken_for_a_finished_file(tiny: Path, tmp_path: Path) -> None:
    plan = PLANS["gguf"](tiny, tmp_path)
    final = plan.final_paths()[0]
    segments = sum(len(tensor.segments) for tensor in plan.files[0].tensors)
    final.write_bytes(bytes(plan.nbytes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileOutputs, "finish", _bad_disk)
        with pytest.raises(InputOutputError):
            execute(plan, threads=1, overwrite=True)
    with Journal(journal_path(plan)) as journal:
        assert len(journal.finished()) == segments
    outputs_of(plan).paths[0].unlink()
    with pytest.raises(ResumeError, match="missing or changed"):
        execute(plan, resume=True, overwrite=True)
    assert final.read_bytes() == bytes(plan.nbytes)


def _bad_disk(self: FileOutputs) -> None:
    raise InputOutputError("cannot be renamed (a bad block)", where="the test")


def test_a_failed_run_of_a_folder_leaves_a_stranger_in_the_temporary_folder_alone(tiny: Path, tmp_path: Path) -> None:
    plan = PLANS["dequantize"](tiny, tmp_path)
    stranger = tmp_path / "bf16.partial" / "thesis.txt"
    stranger.parent.mkdir()
    stranger.write_text("mine")
    with pytest.raises(ResumeError, match="unfinished work"):
        execute(plan)
    with pytest.raises(OutputExistsError, match=r"thesis\.txt"):
        execute(plan, fresh=True)
    assert stranger.read_text() == "mine"
    assert leftovers(tmp_path) == ["bf16.partial"]


def test_a_temporary_folder_that_is_a_link_is_not_followed(tiny: Path, tmp_path: Path) -> None:
    plan = PLANS["dequantize"](tiny, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "bf16.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputExistsError, match="not a working folder of dsv4convert"):
        execute(plan, fresh=True)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_folder_under_the_name_of_the_replaced_one_is_not_lost(tiny: Path, tmp_path: Path) -> None:
    plan = PLANS["dequantize"](tiny, tmp_path)
    (tmp_path / "bf16.replaced").mkdir()
    (tmp_path / "bf16.replaced" / "mine").write_text("mine")
    with pytest.raises(OutputExistsError, match="rename or remove that file"):
        execute(plan)
    assert (tmp_path / "bf16.replaced" / "mine").read_text() == "mine"


def test_an_old_output_stays_until_its_successor_is_whole(plan: Plan, good: dict[str, bytes]) -> None:
    execute(plan, threads=2)
    old = {path: path.read_bytes() for path in plan.final_paths()}
    interrupt(plan, AFTER, overwrite=True)
    assert {path: path.read_bytes() for path in plan.final_paths()} == old
    execute(plan, threads=2, overwrite=True, resume=True)
    assert contents(plan) == good
    assert leftovers(plan.output_path().parent) == []


@pytest.mark.parametrize(
    ("command", "out", "options"),
    [
        ("hf-to-gguf", "model.gguf", ()),
        ("shard", "shards", ("--mp", "2")),
        ("dequantize", "bf16", ()),
        ("repack", "fp8", ("--experts", "fp8")),
        ("mend", "mended", ("--rename", "transformers")),
    ],
)
def test_every_converting_command_resumes(
    command: str, out: str, options: tuple[str, ...], tiny: Path, tmp_path: Path
) -> None:
    arguments = (command, tiny, tmp_path / out, *options, "--threads", "1", "--json")
    with failing_after(AFTER):
        result = run_cli(*arguments)
    assert result.code == 16
    assert "--resume" in result.error
    assert not (tmp_path / out).exists()
    assert run_cli(*arguments).code == 13
    resumed = run_cli(*arguments, "--resume")
    assert resumed.code == 0
    assert json.loads(resumed.out)["resumed_bytes"] > 0
    assert run_cli("verify", "--manifest", tmp_path / out).code == 0
    assert leftovers(tmp_path) == []


def test_the_manifest_of_a_failed_run_is_not_there(gguf: Plan) -> None:
    interrupt(gguf, AFTER)
    assert not manifest_path(gguf).exists()


def test_ctrl_c_while_files_are_made_leaves_nothing_that_no_journal_speaks_of(
    plan: Plan, good: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made_and_stopped(path: Path, flags: int) -> int:
        descriptor = open_file(path, flags)
        if flags & os.O_EXCL and path == outputs_of(plan).paths[-1]:
            os.close(descriptor)
            raise KeyboardInterrupt
        return descriptor

    with monkeypatch.context() as patch:
        patch.setattr("dsv4convert.engine.outputs.open_file", made_and_stopped)
        with pytest.raises(RunInterruptedError, match="run again with --resume"):
            execute(plan, threads=1)
    execute(plan, threads=1, resume=True)
    assert contents(plan) == good
    assert leftovers(plan.destination.parent) == []


def test_ctrl_c_as_a_file_is_looked_at_leaves_nothing(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(path: Path, known: int) -> bool:
        if path == outputs_of(plan).paths[-1] and stops:
            stops.pop()
            raise KeyboardInterrupt
        return is_same_file(path, known)

    stops = [True]
    monkeypatch.setattr("dsv4convert.engine.outputs.is_same_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        execute(plan, threads=1)
    assert leftovers(plan.output_path().parent) == []
