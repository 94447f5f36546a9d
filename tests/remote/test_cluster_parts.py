"""Files that several workers of a cluster send to a store in parts: the bytes of one machine, whatever fails."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv4convert import api
from dsv4convert.containers.destinations import SentPart, sent_in_parts
from dsv4convert.containers.fetching import MAX_ATTEMPTS
from dsv4convert.containers.remote import part_upload
from dsv4convert.containers.remote.part_upload import PartsStoreDestination
from dsv4convert.containers.remote.store_upload import ALLOW_HTTP
from dsv4convert.engine import cluster_parts
from dsv4convert.engine.cluster_parts import cut_into_parts
from dsv4convert.engine.cluster_worker import NewFile, make_file
from dsv4convert.engine.journal import Journal
from dsv4convert.engine.upload import Upload, Uploading
from dsv4convert.errors import InputOutputError, OutputExistsError
from dsv4convert.plan import OutputFile, Plan
from dsv4convert.targets.dequantize import plan_dequantize

from ..checkpoints import MakeCheckpoint
from ..clusters import close_ray, needs_ray, processes, wait_for
from .hub_server import Hub
from .store_server import StoreServer
from .support import Remote, contents, finished
from .uploads import PREFIX, TARGET, carry_out, failing_after, left, without_card

pytest.importorskip("obstore")
pytest.importorskip("moto")

PART_BYTES = 50_000
NAME = "model.safetensors"
LOST = InputOutputError("the Ray cluster was lost")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_parts.cut_into_parts, "__defaults__", (PART_BYTES,))
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return what one machine makes: one file of weights."""
    folder = tmp_path_factory.mktemp("whole") / "Small-BF16"
    api.dequantize(tiny, folder)
    return contents(folder)


def plan_of(source: Path, folder: Path) -> Plan:
    folder.mkdir(exist_ok=True)
    return plan_dequantize(source, folder / "Small-BF16")


def weights(plan: Plan) -> int:
    return next(number for number, file in enumerate(plan.files) if file.name.endswith(".safetensors"))


def uploads(store: StoreServer) -> list[Any]:
    """Return the uploads that are begun and not ended."""
    return client()._asked("list_multipart_uploads").get("Uploads", [])  # type: ignore[no-any-return]


def client() -> PartsStoreDestination:
    return PartsStoreDestination(TARGET.removeprefix("s3://"))


def test_parts_are_all_of_a_file_and_begin_with_segments(tiny: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny, tmp_path / "out")
    file = plan.files[weights(plan)]
    parts = cut_into_parts(plan, weights(plan))
    assert len(parts) > 5
    assert [part.begin for part in parts] == [0, *(part.end for part in parts[:-1])]
    assert parts[-1].end == file.nbytes
    assert all(part.end - part.begin >= PART_BYTES for part in parts[:-1])
    for part in parts:
        segments = [file.tensors[task.tensor].segments[task.segment] for task in part.tasks]
        assert all(
            part.begin <= task.offset <= task.offset + segment.nbytes <= part.end
            for task, segment in zip(part.tasks, segments, strict=True)
        )
    assert sum(len(part.tasks) for part in parts) == sum(len(tensor.segments) for tensor in file.tensors)


def test_no_file_has_more_parts_than_a_store_takes(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_parts, "MAX_PARTS", 4)
    plan = plan_of(tiny, tmp_path / "out")
    assert 1 < len(cut_into_parts(plan, weights(plan))) <= 4


@pytest.mark.parametrize("header", [PART_BYTES - 1, PART_BYTES, 3 * PART_BYTES])
def test_a_header_larger_than_a_part_has_segments_behind_it(header: int, tiny: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny, tmp_path / "out")
    number = weights(plan)
    file = plan.files[number]
    shift = header - len(file.header)
    tensors = tuple(tensor._replace(offset=tensor.offset + shift) for tensor in file.tensors)
    larger = OutputFile(file.name, file.header + b" " * shift, tensors, file.nbytes + shift)
    files = tuple(larger if index == number else one for index, one in enumerate(plan.files))
    parts = cut_into_parts(replace(plan, files=files), number)
    assert all(part.tasks for part in parts)
    assert parts[0].begin == 0
    assert parts[0].end > header
    assert parts[-1].end == larger.nbytes


def test_several_make_and_send_one_file(
    store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    plan = plan_of(tiny, tmp_path / "out")
    cluster, summary = carry_out(plan)
    assert without_card(store) == whole
    assert left(tmp_path / "out") == []
    parts = cut_into_parts(plan, weights(plan))
    assert {piece.part.number for piece in cluster.pieces} == set(range(1, len(parts) + 1))
    assert set(cluster.nodes) == {"one", "other"}
    assert summary.written_bytes == sum(map(len, whole.values()))
    assert uploads(store) == []
    made = [SentPart(0, hashlib.sha256(whole[NAME][part.begin : part.end]).hexdigest(), "") for part in parts]
    card = store.contents(PREFIX)["README.md"].decode()
    assert f"| `{NAME}` | {len(whole[NAME])} | `{sent_in_parts(made).sha256}` |" in card
    assert "composite checksum" in card


def test_what_was_sent_and_deleted_is_known_again(
    store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    carry_out(plan_of(tiny, tmp_path / "out"))
    uploading = Uploading(plan_of(tiny, tmp_path / "out"), Upload(TARGET, delete=True), resume=True)
    assert uploading.was_finished()
    store.store().put(f"{PREFIX}/{NAME}", whole[NAME])  # the same bytes, but not as they were sent
    assert not uploading.was_finished()


@pytest.mark.parametrize("count", range(0, 9, 2))
def test_a_run_goes_on_with_the_parts_that_are_missing(
    count: int, store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    plan = plan_of(tiny, tmp_path / "out")
    with pytest.raises(InputOutputError, match="--resume"):
        carry_out(plan, failing_after(count, LOST))
    assert NAME not in store.contents(PREFIX)
    assert len(uploads(store)) == 1
    cluster, summary = carry_out(plan, resume=True)
    assert len(cluster.pieces) == len(cut_into_parts(plan, weights(plan))) - count
    assert without_card(store) == whole
    assert left(tmp_path / "out") == []
    assert (summary.resumed_bytes > 0) == (count > 0)


def interrupted(plan: Plan, count: int = 4) -> None:
    with pytest.raises(InputOutputError):
        carry_out(plan, failing_after(count, LOST))


def test_an_upload_that_the_store_has_dropped_is_begun_again(
    store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    plan = plan_of(tiny, tmp_path / "out")
    interrupted(plan)
    client()._drop(NAME, uploads(store)[0]["UploadId"])
    cluster, _ = carry_out(plan, resume=True)
    assert len(cluster.pieces) == len(cut_into_parts(plan, weights(plan)))
    assert without_card(store) == whole


def test_a_journal_with_an_upload_of_no_file_of_the_plan(
    store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    plan = plan_of(tiny, tmp_path / "out")
    interrupted(plan)
    with Journal(tmp_path / "out" / "Small-BF16.journal") as journal:
        journal.note_upload(len(plan.files), "another")
    carry_out(plan, resume=True)
    assert without_card(store) == whole


def test_a_part_with_another_content_is_made_again(
    store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    plan = plan_of(tiny, tmp_path / "out")
    interrupted(plan)
    upload = uploads(store)[0]["UploadId"]
    there = client().parts_there(NAME, upload)
    assert there is not None
    client()._asked("upload_part", Key=f"{PREFIX}/{NAME}", UploadId=upload, PartNumber=min(there), Body=b"x" * 50_000)
    cluster, _ = carry_out(plan, resume=True)
    assert len(cluster.pieces) == len(cut_into_parts(plan, weights(plan))) - 3
    assert without_card(store) == whole


def test_a_run_killed_between_the_file_and_its_note(
    store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tiny, tmp_path / "out")
    noted = Journal.note_sent

    def killed(journal: Journal, files: Any) -> None:
        if files:
            raise InputOutputError("killed")
        noted(journal, files)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "note_sent", killed)
        with pytest.raises(InputOutputError, match="killed"):
            carry_out(plan)
    assert store.contents(PREFIX)[NAME] == whole[NAME]
    cluster, _ = carry_out(plan, resume=True)
    assert cluster.pieces == []
    assert without_card(store) == whole


def test_a_run_killed_before_it_noted_a_file_that_was_sent_whole(
    store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tiny, tmp_path / "out")

    def killed(piece: NewFile) -> Any:
        make_file(piece)
        raise LOST

    with monkeypatch.context() as patch:
        patch.setattr(PartsStoreDestination, "begin_parts", lambda self, name: None)
        with pytest.raises(InputOutputError, match="--resume"):
            carry_out(plan, killed)
    assert store.contents(PREFIX)[NAME] == whole[NAME]
    cluster, _ = carry_out(plan, resume=True)
    assert [piece.part for piece in cluster.pieces] == [None]
    assert store.received.count(f"{PREFIX}/{NAME}") == 1
    assert without_card(store) == whole


@pytest.mark.parametrize("comes", ["before", "meanwhile"])
def test_another_content_under_its_name_is_not_replaced(
    comes: str, store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    plan = plan_of(tiny, tmp_path / "out")

    def make(file: NewFile) -> Any:
        store.store().put(f"{PREFIX}/{NAME}", b"another")
        return make_file(file)

    if comes == "before":
        interrupted(plan)
        client()._drop(NAME, uploads(store)[0]["UploadId"])
        store.store().put(f"{PREFIX}/{NAME}", b"another")
    with pytest.raises(OutputExistsError, match="already exists in the store"):
        carry_out(plan, make, resume=comes == "before")
    assert store.contents(PREFIX)[NAME] == b"another"
    carry_out(plan, overwrite=True, resume=True)
    assert without_card(store) == whole


def test_a_worker_of_a_run_whose_place_was_taken_sends_nothing(
    store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    plan = plan_of(tiny, tmp_path / "out")
    kept: list[NewFile] = []

    def keep(file: NewFile) -> Any:
        kept.append(file)
        raise LOST

    with pytest.raises(InputOutputError):
        carry_out(plan, keep)
    carry_out(plan, resume=True)
    before = len(store.writes)
    with pytest.raises(OutputExistsError, match="another run"):
        make_file(kept[0])
    assert len(store.writes) == before


def test_uploads_of_runs_that_start_over_are_dropped(
    store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    plan = plan_of(tiny, tmp_path / "out")
    interrupted(plan)
    carry_out(plan, fresh=True, overwrite=True)
    assert uploads(store) == []
    assert without_card(store) == whole


@pytest.mark.parametrize("drops", [True, False], ids=["drops uploads", "keeps them"])
def test_a_store_without_checksums_of_parts_gets_whole_files(
    drops: bool,
    store: StoreServer,
    tiny: Path,
    tmp_path: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store.status = lambda method, key: 405 if method == "DELETE" and key.endswith(NAME) and not drops else None
    asked = PartsStoreDestination._asked

    def silent(self: PartsStoreDestination, operation: str, **options: Any) -> Any:
        answer = asked(self, operation, **options)
        answer.pop("ChecksumAlgorithm", None)
        return answer

    monkeypatch.setattr(PartsStoreDestination, "_asked", silent)
    cluster, _ = carry_out(plan_of(tiny, tmp_path / "out"))
    assert [piece.part for piece in cluster.pieces] == [None]
    assert without_card(store) == whole
    assert len(uploads(store)) == (0 if drops else 1)


@pytest.mark.parametrize("status", [403, 500])
def test_a_store_that_fails_ends_the_run_which_goes_on_later(
    status: int, store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    plan, sent = plan_of(tiny, tmp_path / "out"), []

    def fails(method: str, key: str) -> int | None:
        if key.endswith(NAME):
            sent.append(key)
        return status if len(sent) > 5 else None

    store.status = fails
    with pytest.raises(InputOutputError, match="refuses the upload" if status == 403 else "cannot be sent") as caught:
        carry_out(plan)
    assert "--resume" in str(caught.value)
    store.status = lambda method, key: None
    carry_out(plan, resume=True)
    assert without_card(store) == whole


def test_answers_that_are_lost_are_asked_for_again(
    store: StoreServer, tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    numbers = iter(range(10_000))
    store.status = lambda method, key: 503 if key.endswith(NAME) and next(numbers) % 3 else None
    carry_out(plan_of(tiny, tmp_path / "out"))
    assert without_card(store) == whole
    assert uploads(store) == []


@pytest.mark.parametrize("status", [400, 405, 501])
def test_a_store_that_takes_no_uploads_of_parts_gets_whole_files(
    status: int,
    store: StoreServer,
    tiny: Path,
    tmp_path: Path,
    whole: dict[str, bytes],
) -> None:
    asked: list[str] = []

    def refuses(method: str, key: str) -> int | None:
        asked.append(f"{method} {key}")
        return status if asked.count(f"POST {PREFIX}/{NAME}") == 1 and method == "POST" else None

    store.status = refuses
    cluster, _ = carry_out(plan_of(tiny, tmp_path / "out"))
    assert [piece.part for piece in cluster.pieces] == [None]
    assert without_card(store) == whole


@pytest.mark.parametrize(
    ("code", "status", "lasts"),
    [
        ("EntityTooSmall", 400, True),
        ("ExpiredToken", 400, True),
        ("PermanentRedirect", 301, True),
        ("BadDigest", 400, False),
        ("RequestTimeout", 400, False),
        ("SlowDown", 503, False),
        ("TooManyRequests", 429, False),
        ("", 408, False),
    ],
)
def test_answers_that_do_not_pass_are_not_asked_for_again(
    code: str, status: int, lasts: bool, store: StoreServer
) -> None:
    from botocore.exceptions import ClientError

    asked = 0

    def refused() -> None:
        nonlocal asked
        asked += 1
        with client()._errors():
            answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
            raise ClientError(answer, "UploadPart")

    with pytest.raises(InputOutputError, match=f"HTTP status {status}"):
        client()._ask(refused)
    assert asked == (1 if lasts else MAX_ATTEMPTS)


CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "no upload": ("UploadId", lambda answer: answer.pop("UploadId", None)),
    "no etag of a part": ("ETag", lambda answer: answer.pop("ETag", None)),
    "no part number": ("PartNumber", lambda answer: [part.pop("PartNumber") for part in answer.get("Parts", ())]),
    "no size": ("Size", lambda answer: [part.pop("Size") for part in answer.get("Parts", ())]),
    "no marker": ("NextPartNumberMarker", lambda answer: answer.pop("NextPartNumberMarker", None)),
    "the same marker": ("NextPartNumberMarker", lambda answer: answer.update(NextPartNumberMarker=0)),
    "no checksum in base64": ("ChecksumSHA256", lambda answer: answer.update(ChecksumSHA256="=!-2")),
}
OPERATIONS = {
    "no upload": ["create_multipart_upload"],
    "no etag of a part": ["upload_part"],
    "no checksum in base64": ["head_object"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_answers_without_meaning_end_a_run(
    change: str, store: StoreServer, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, changed = CHANGES[change]
    plan = plan_of(tiny, tmp_path / "out")
    lists_parts = change not in OPERATIONS
    if lists_parts:
        interrupted(plan)
    asked = PartsStoreDestination._asked

    def strange(self: PartsStoreDestination, operation: str, **options: Any) -> Any:
        answer = asked(self, operation, **options)
        if operation in OPERATIONS.get(change, ["list_parts"]):
            answer.update({"IsTruncated": True} if lists_parts else {})
            changed(answer)
        return answer

    monkeypatch.setattr(PartsStoreDestination, "_asked", strange)
    with pytest.raises(InputOutputError, match=f"no meaningful {key}"):
        carry_out(plan, resume=lists_parts)


def test_a_file_that_goes_away_while_it_is_looked_at_is_not_there(
    store: StoreServer, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry_out(plan_of(tiny, tmp_path / "out"))
    asked = PartsStoreDestination._asked

    def removed(self: PartsStoreDestination, operation: str, **options: Any) -> Any:
        store.store().delete(f"{PREFIX}/{NAME}")
        return asked(self, operation, **options)

    monkeypatch.setattr(PartsStoreDestination, "_asked", removed)
    assert client()._head(NAME) is None


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("AWS_PROFILE", "none-of-that-name", "ProfileNotFound"),
        ("AWS_ENDPOINT_URL_S3", "no-address", "ValueError"),
        ("AWS_SECRET_ACCESS_KEY", None, "PartialCredentialsError"),
    ],
)
def test_keys_and_places_without_sense_are_errors_of_one_line(
    name: str, value: str | None, what: str, store: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = client()
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    part_upload._client_of.cache_clear()
    try:
        with pytest.raises(InputOutputError, match=f"no parts of files .{what}"):
            place.parts_there(NAME, "some")
    finally:
        part_upload._client_of.cache_clear()


@pytest.mark.parametrize("name", ALLOW_HTTP)
def test_each_variable_that_allows_http_does_so_for_parts(
    name: str, store: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(InputOutputError, match="https"):
        client().parts_there(NAME, "some")
    monkeypatch.setenv(name, "true")
    assert client().parts_there(NAME, "some") is None


@needs_ray
def test_workers_and_the_run_are_killed(
    store: StoreServer, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint("tiny", experts=256)
    monkeypatch.undo()  # parts are as large as those of users
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    token = close_ray(monkeypatch)
    out = tmp_path / "out" / "Small-F32"
    out.parent.mkdir()
    store.before_upload = lambda number: time.sleep(0.5)
    remote = Remote(Hub(), tmp_path / "home", store.environment)
    line = ("dequantize", source, out, "--dtype", "f32", "--quiet")
    upload = ("--upload", TARGET, "--delete-uploaded", "--workers", "ray:2")

    def kill_worker() -> bool:
        for process in processes(token, b"ray::make_"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
                return True
        return False

    def parts() -> int:
        return sum(write.startswith("PUT") and write.endswith(NAME) for write in store.writes)

    run = remote.start(*line, *upload)
    for count in (1, 2):
        wait_for(lambda count=count: parts() >= count)
        wait_for(kill_worker)
    wait_for(lambda: '"part"' in out.with_name("Small-F32.journal").read_text())
    run.kill()
    run.communicate()
    wait_for(lambda: not processes(token, b"ray"))
    assert NAME not in store.contents(PREFIX)
    result = finished(remote.start(*line, *upload, "--resume"))
    assert result.code == 0, result.err
    alone = tmp_path / "alone"
    assert finished(Remote(Hub(), tmp_path / "home").start("dequantize", source, alone, *line[3:])).code == 0
    assert without_card(store) == contents(alone)
    assert (alone / NAME).stat().st_size > 3 * cluster_parts.PART_BYTES
    assert left(out.parent) == []
