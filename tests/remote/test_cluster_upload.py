"""Files that the workers of a cluster send to a store: the bytes of one machine, whatever dies or fails meanwhile."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from dsv4convert import api
from dsv4convert.containers.destinations import Sender
from dsv4convert.engine import cluster_worker
from dsv4convert.engine.cluster_bridge import MAKE
from dsv4convert.engine.cluster_upload import send_files
from dsv4convert.engine.cluster_worker import FinishedFile, NewFile, make_file
from dsv4convert.engine.conversion import execute
from dsv4convert.engine.upload import Upload, Uploading
from dsv4convert.errors import DeviceError, Dsv4Error, InputOutputError, OutputExistsError, ResumeError, SpaceError
from dsv4convert.html_report.figures import human_bytes

from ..clusters import HereCluster, close_ray, head, needs_ray, processes, wait_for
from ..command_line import run_cli
from .hub_server import Hub
from .store_server import SECRET, StoreServer, serving
from .support import Remote, contents, finished
from .uploads import INDEX, PREFIX, TARGET, carry_out, failing_after, left, plan_of, without_card

pytest.importorskip("obstore")
pytest.importorskip("moto")

# ---- without Ray: what a worker does with a file, and what the run notes ----------------------------------


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return what one machine makes."""
    folder = tmp_path_factory.mktemp("whole") / "Small-BF16"
    api.dequantize(tiny, folder, max_file_size="200K")
    return contents(folder)


def test_nothing_lies_here_and_the_index_comes_last(
    store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    cluster, summary = carry_out(plan_of(tiny, tmp_path / "out"))
    assert without_card(store) == whole
    assert left(tmp_path / "out") == []
    assert {piece.name for piece in cluster.pieces} == {name for name in whole if name.endswith(".safetensors")}
    received = [key.removeprefix(f"{PREFIX}/") for key in store.received if not key.endswith("-upload.json")]
    assert received[-3:] == ["config.json", INDEX, "README.md"]
    assert len(received) == len(whole) + 1
    assert summary.written_bytes == sum(map(len, whole.values()))


@pytest.mark.parametrize("delete", [True, False], ids=["deleted", "kept"])
def test_googles_store_too(
    delete: bool, tiny: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for store in serving(StoreServer("gs"), monkeypatch):
        carry_out(plan_of(tiny, tmp_path / "out"), delete=delete, target=TARGET.replace("s3:", "gs:"))
        assert without_card(store) == whole


@pytest.mark.parametrize(("names", "count"), [("a", "1 file"), ("ab", "2 files")], ids=["one", "several"])
def test_files_to_send_are_told_with_their_number(
    names: str, count: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    cluster = HereCluster()
    cluster.note = told.append
    monkeypatch.setattr(cluster, "carry_out", lambda *_: None)
    send_files(cluster, Sender(TARGET, "", overwrite=False), {name: (tmp_path / name, 1) for name in names})
    assert told == [f"all is made: workers send {count} to {TARGET}"]


def test_fewer_files_than_workers_are_told_of(
    store: StoreServer, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # of boto3: no parts
    told: list[str] = []
    cluster = HereCluster()
    cluster.note = told.append
    uploading = Uploading(plan := plan_of(tiny, tmp_path / "out"), Upload(TARGET, delete=True))
    execute(plan, cluster=cluster, uploading=uploading)
    assert told == []
    files = sum(file.name.endswith(".safetensors") for file in plan.files)
    cluster.processors = {"one": files + 1}
    execute(plan, cluster=cluster, uploading=uploading, fresh=True)
    assert f"{files} files for {files + 1} workers: a smaller --max-file-size" in told[0]


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails first"])
def test_files_that_stay_here_too_are_sent_by_workers(
    fails: bool, store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    plan = plan_of(tiny, tmp_path / "out")
    pieces: list[Any] = []

    def make(piece: Any) -> Any:
        pieces.append(piece)
        return MAKE[type(piece)](piece)

    if fails:
        store.status = lambda method, key: 403 if "00003" in key else None
        with pytest.raises(InputOutputError, match=f"refuses the upload on machine {os.uname().nodename}.*--resume"):
            carry_out(plan, make, delete=False)
        store.status = lambda method, key: None
    carry_out(plan, make, delete=False, resume=True)
    assert without_card(store) == contents(plan.output_path()) == whole
    assert left(tmp_path / "out") == ["Small-BF16", "Small-BF16.manifest.json"]
    weights = {name for name in whole if name.endswith(".safetensors")}
    assert {piece.name for piece in pieces if isinstance(piece, FinishedFile)} == weights
    assert len(store.received) == len({*store.received})  # each once


@pytest.mark.parametrize("count", range(0, 5, 2))
def test_a_run_goes_on_with_the_files_that_are_missing(
    count: int, store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    plan = plan_of(tiny, tmp_path / "out")
    with pytest.raises(InputOutputError, match="--resume"):
        carry_out(plan, failing_after(count, InputOutputError("the Ray cluster was lost")))
    assert len(without_card(store)) == count + 1  # and the mark
    assert left(tmp_path / "out") == ["Small-BF16.journal"]
    with pytest.raises(ResumeError, match="--resume"):
        carry_out(plan)
    with pytest.raises(ResumeError, match="its files went elsewhere"):
        execute(plan, threads=1, resume=True)
    cluster, summary = carry_out(plan, resume=True)
    files = [name for name in whole if name.endswith(".safetensors")]
    assert len(cluster.pieces) == len(files) - count
    assert without_card(store) == whole
    assert left(tmp_path / "out") == []
    assert (summary.resumed_bytes > 0) == (count > 0)


@pytest.mark.parametrize("how", ["torn", "gone", "another content"])
def test_what_the_journal_tells_is_looked_at(
    how: str, store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    plan = plan_of(tiny, tmp_path / "out")
    with pytest.raises(InputOutputError):
        carry_out(plan, failing_after(2, InputOutputError("the Ray cluster was lost")))
    journal = tmp_path / "out" / "Small-BF16.journal"
    if how == "torn":
        journal.write_bytes(journal.read_bytes()[:-30])  # in the last segment of the second file
    else:
        key = next(
            entry["path"] for page in store.store().list(PREFIX) for entry in page if "safetensors" in entry["path"]
        )
        store.store().delete(key)
        if how == "another content":
            store.store().put(key, b"another")
    if how == "another content":
        with pytest.raises(OutputExistsError, match="already exists in the store"):
            carry_out(plan, resume=True)
        store.store().delete(key)
    cluster, _ = carry_out(plan, resume=True)
    assert len(cluster.pieces) == sum(name.endswith(".safetensors") for name in whole) - 1
    assert without_card(store) == whole


def test_a_store_that_fails_ends_the_run_which_goes_on_later(
    store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    plan = plan_of(tiny, tmp_path / "out")
    store.status = lambda method, key: 403 if "00003" in key else None
    with pytest.raises(InputOutputError, match="the store refuses the upload") as caught:
        carry_out(plan)
    assert "--resume" in str(caught.value)
    store.status = lambda method, key: 403 if key.endswith(INDEX) else None
    with pytest.raises(InputOutputError, match="the store refuses the upload") as caught:
        carry_out(plan, resume=True)
    assert "--resume" in str(caught.value)
    assert INDEX not in store.contents(PREFIX)
    store.status = lambda method, key: None
    cluster, _ = carry_out(plan, resume=True)
    assert cluster.pieces == []
    assert without_card(store) == whole
    assert left(tmp_path / "out") == []


def test_another_output_there_is_replaced_when_told(
    store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    names = sorted(name for name in whole if name.endswith(".safetensors"))
    for name in (names[0], "old.safetensors", INDEX):
        store.store().put(f"{PREFIX}/{name}", b"older")
    plan = plan_of(tiny, tmp_path / "out")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        carry_out(plan)
    assert left(tmp_path / "out") == []
    carry_out(plan, overwrite=True)
    assert without_card(store) == whole


def test_a_worker_of_a_run_whose_place_was_taken_sends_nothing(
    store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    plan = plan_of(tiny, tmp_path / "out")
    kept: list[NewFile] = []

    def keep(file: NewFile) -> Any:
        kept.append(file)
        raise InputOutputError("the Ray cluster was lost")

    with pytest.raises(InputOutputError):
        carry_out(plan, keep)
    carry_out(plan, resume=True)
    before = len(store.writes)
    with pytest.raises(OutputExistsError, match="another run"):
        make_file(kept[0])
    assert len(store.writes) == before
    assert without_card(store) == whole


def test_a_disk_without_room_for_a_file(
    store: StoreServer, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plan = plan_of(tiny, tmp_path / "out")

    def make(file: NewFile) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            return make_file(file)

    with pytest.raises(SpaceError, match=r"no room for a file of \d+ bytes .*TMPDIR.*--max-file-size"):
        carry_out(plan, make)


@pytest.mark.parametrize("workers", [pytest.param(True, marks=needs_ray), False], ids=["workers", "threads"])
def test_a_dry_run_asks_for_room_where_the_files_are_made(
    workers: bool, store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    options = ("--max-file-size", "200K", "--upload", TARGET, "--delete-uploaded", "--dry-run")
    options += ("--workers", "ray:2") if workers else ()
    told = json.loads(run_cli("dequantize", tiny, tmp_path / "out", *options, "--json").out)
    weights = [len(content) for name, content in whole.items() if name.endswith(".safetensors")]
    total = sum(map(len, whole.values()))
    assert told["disk_needed"] == (total - sum(weights) if workers else total)
    assert told["worker_disk_needed"] == (max(weights) if workers else 0)
    shown = run_cli("dequantize", tiny, tmp_path / "out", *options).out
    room = f"each worker needs {human_bytes(max(weights))} of its machine's disk, in TMPDIR or /tmp"
    assert (room in shown) == workers
    assert not any(tmp_path.iterdir())


def test_no_room_here_is_needed_for_what_workers_send(
    store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv4convert.engine.resources.free_bytes", lambda folder: 0)
    with pytest.raises(SpaceError, match="not enough disk space"):
        carry_out(plan_of(tiny, tmp_path / "out"), delete=False)
    carry_out(plan_of(tiny, tmp_path / "out"))
    assert without_card(store) == whole


@pytest.mark.parametrize(
    ("lacks", "error", "said"),
    [
        (
            "keys",
            InputOutputError,
            "cannot be sent .* on machine .*keys are in the environment in which Ray",
        ),
        (
            "packages",
            DeviceError,
            r"--upload needs the package obstore, which is missing on machine .*pip install 'dsv4convert\[stores\]'",
        ),
    ],
)
def test_a_machine_that_cannot_send_is_told_of_before_it_works(
    lacks: str,
    error: type[Dsv4Error],
    said: str,
    store: StoreServer,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worked = []

    def make(file: NewFile) -> Any:
        with monkeypatch.context() as patch:
            if lacks == "keys":
                patch.delenv("AWS_ACCESS_KEY_ID")
                patch.delenv("AWS_SECRET_ACCESS_KEY")
                patch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")  # where those of a machine of Amazon's are
            else:
                patch.setitem(sys.modules, "dsv4convert.containers.remote.store_upload", None)
            patch.setattr(cluster_worker, "fill_file", lambda *_: worked.append(file.name))
            return make_file(file)

    with pytest.raises(error, match=said) as caught:
        carry_out(plan_of(tiny, tmp_path / "out"), make)
    assert os.uname().nodename in str(caught.value)
    assert worked == []


# ---- with Ray ------------------------------------------------------------------------------------------------


@needs_ray
@pytest.mark.parametrize("delete", [True, False], ids=["deleted", "kept"])
def test_two_workers_send_what_one_machine_makes(
    delete: bool, store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out" / "Small-BF16"
    out.parent.mkdir()
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # with a short name, which sockets need
        remote = Remote(Hub(), tmp_path / "home", store.environment | {"RAY_TMPDIR": folder})
        options = ("--max-file-size", "200K", "--upload", TARGET, "--workers", "ray:2")
        result = remote.run("dequantize", tiny, out, *options, *["--delete-uploaded"][: int(delete)])
        assert result.code == 0, result.err
        logs = [path for path in Path(folder).rglob("*") if path.is_file() and path.stat().st_size]
        assert len(logs) > 3
        assert not any(SECRET.encode() in path.read_bytes() for path in logs)
    assert f"uploaded to {TARGET}" in result.out
    assert without_card(store) == whole
    assert left(out.parent) == ([] if delete else ["Small-BF16", "Small-BF16.manifest.json"])
    assert delete or contents(out) == whole


@needs_ray
@pytest.mark.parametrize("delete", [True, False], ids=["deleted", "kept"])
def test_workers_and_the_run_are_killed(
    delete: bool,
    store: StoreServer,
    slow: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token = close_ray(monkeypatch)
    out = tmp_path / "out" / "model.gguf"
    out.parent.mkdir()
    remote = Remote(Hub(), tmp_path / "home", store.environment)
    types = ("--dense", "q4_0", "--experts", "iq4_nl", "--output-type", "f32", "--max-file-size", "2M", "--quiet")
    line = ("hf-to-gguf", slow, out, *types, "--upload", TARGET, "--workers", "ray:2")
    line += ("--delete-uploaded",) if delete else ()

    def sent() -> int:
        return sum(key.endswith(".gguf") for key in store.received)

    def kill_worker() -> bool:
        for process in processes(token, b"ray::make_"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
                return True
        return False

    run = remote.start(*line)
    for _ in range(2):
        wait_for(kill_worker)
    wait_for(lambda: sent() > 0)
    run.kill()
    run.communicate()
    wait_for(lambda: not processes(token, b"ray"))
    assert not any(name in ("README.md", INDEX) for name in store.contents(PREFIX))
    result = finished(remote.start(*line, "--resume"))
    assert result.code == 0, result.err
    alone = tmp_path / "alone"
    alone.mkdir()
    assert finished(Remote(Hub(), tmp_path / "home").start("hf-to-gguf", slow, alone / "model.gguf", *types)).code == 0
    assert without_card(store) == {path.name: path.read_bytes() for path in alone.glob("*.gguf")}
    assert len(without_card(store)) > 3
    assert (left(out.parent) == []) == delete


@needs_ray
def test_no_weight_goes_through_the_run_when_a_head_is_lost_either(
    store: StoreServer,
    slow: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token = close_ray(monkeypatch)
    of_workers = StoreServer()  # the same bucket by another address, which the workers alone know
    of_workers.start(shares=True)
    remote = Remote(Hub(), tmp_path / "home", store.environment)
    out = tmp_path / "out" / "model.gguf"
    out.parent.mkdir()
    types = ("--dense", "q4_0", "--experts", "iq4_nl", "--output-type", "f32", "--max-file-size", "2M", "--quiet")
    line = ("hf-to-gguf", slow, out, *types, "--upload", TARGET, "--delete-uploaded", "--workers", "ray:auto")

    def start_head(port: int | None = None) -> int:
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", of_workers.endpoint)
            return head(tmp_path / "head.log", port)

    try:
        port = start_head()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        run = remote.start(*line)
        wait_for(lambda: of_workers.received)
        for process in processes(token, b"ray"):
            if process != run.pid:
                os.kill(process, signal.SIGKILL)
        _, said = run.communicate(timeout=120)
        assert run.returncode == 16, said
        assert said.endswith("run again with --resume\n")
        assert said.count("\n") == 1
        start_head(port)
        run = remote.start(*line, "--resume")
        _, said = run.communicate(timeout=120)
        assert (run.returncode, said) == (0, "")
    finally:
        for process in processes(token, b"ray"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        of_workers.stop()
    assert store.received == [f"{PREFIX}/README.md"]
    sent = without_card(store)
    assert {f"{PREFIX}/{name}" for name in sent} == {*of_workers.received}
    alone = tmp_path / "alone"
    alone.mkdir()
    assert finished(Remote(Hub(), tmp_path / "home").start("hf-to-gguf", slow, alone / "model.gguf", *types)).code == 0
    assert sent == {path.name: path.read_bytes() for path in alone.glob("*.gguf")}
    assert left(out.parent) == []
