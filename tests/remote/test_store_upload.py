"""Outputs sent to a store: the index and the card last, each file once, whatever goes wrong, and no secret anywhere."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.engine.journal import Journal
from dsv4convert.engine.outputs import JOURNAL_SUFFIX

from ..command_line import run_cli
from .hub_server import Hub
from .store_server import MARK, SECRET, StoreServer
from .support import REPOSITORY, Remote, contents, finished

obstore = pytest.importorskip("obstore")
pytest.importorskip("moto")

PREFIX = "mine/Small-V4"
TARGET = f"s3://models/{PREFIX}"
INDEX = "model.safetensors.index.json"


@dataclass
class Store:
    """A store, and the program that sends files to it."""

    server: StoreServer
    remote: Remote

    def stored(self) -> dict[str, bytes]:
        """Return the files that a reader of the folder finds, without the mark of a run."""
        return {name: content for name, content in self.server.contents(PREFIX).items() if name != MARK}

    def without_card(self) -> dict[str, bytes]:
        return {name: content for name, content in self.stored().items() if name != "README.md"}

    def put(self, name: str, content: bytes) -> None:
        obstore.put(self.server.store(), f"{PREFIX}/{name}", content)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Yield a running store with an empty bucket."""
    server = StoreServer()
    server.start()
    yield Store(server, Remote(Hub(), tmp_path / "home", server.environment))
    server.stop()


def dequantize(snapshot: Path, out: Path, *options: object) -> list[object]:
    """Return a conversion to several files that sends them."""
    out.parent.mkdir(exist_ok=True)
    return ["dequantize", snapshot, out, "--max-file-size", "200K", "--upload", TARGET, *options]


def test_a_folder_is_sent_with_the_index_and_the_card_last(store: Store, snapshot: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "Small-BF16"
    result = store.remote.run(*dequantize(snapshot, out))
    assert result.code == 0, result.err
    assert f"note: uploaded to {TARGET}" in result.out
    assert store.without_card() == contents(out)
    received = [key.removeprefix(f"{PREFIX}/") for key in store.server.received]
    assert len(received) == len(set(received)) == len(contents(out)) + 1 > 6
    assert received[-3:] == ["config.json", INDEX, "README.md"]
    assert all(not name.endswith(".json") for name in received[: len(list(out.glob("*.safetensors")))])
    card = store.stored()["README.md"].decode()
    for name, content in contents(out).items():
        digest = hashlib.sha256(content).hexdigest()
        assert f"| `{name}` | {len(content)} | `{digest}` |" in card
        told = obstore.get(store.server.store(), f"{PREFIX}/{name}", options={"head": True})
        assert told.attributes["sha256"] == digest
    for path in [*out.iterdir(), *out.parent.glob(".*")]:
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()
    for secret in (SECRET, str(tmp_path)):
        assert secret not in card + result.out.replace(str(out), "") + result.err
    assert run_cli("dequantize", snapshot, tmp_path / "local", "--max-file-size", "200K").code == 0
    assert contents(tmp_path / "local") == contents(out)


def test_a_gguf_is_sent_in_parts_and_strangers_files_stay(store: Store, snapshot: Path, tmp_path: Path) -> None:
    store.put("README.md", b"# My models\n\nDo not lose this.\n")
    store.put("other.gguf", b"another model")
    store.put("sub/model.safetensors", b"deeper")
    for name, experts in (("a.gguf", "bf16"), ("b.gguf", "mxfp4"), ("b.gguf", "bf16")):
        out = tmp_path / experts / name
        out.parent.mkdir(exist_ok=True)
        result = store.remote.run("hf-to-gguf", snapshot, out, "--experts", experts, "--upload", TARGET, "--overwrite")
        assert result.code == 0, result.err
        assert store.stored()[name] == out.read_bytes()
    files = store.stored()
    assert files["other.gguf"] == b"another model"
    assert files["sub/model.safetensors"] == b"deeper"
    card = files["README.md"].decode()
    assert card.startswith("# My models\n\nDo not lose this.\n")
    assert card.count("dsv4convert: begin") == 2
    assert sorted(files) == ["README.md", "a.gguf", "b.gguf", "other.gguf", "sub/model.safetensors"]


def test_files_of_an_older_gguf_of_the_name_are_told_and_stay(store: Store, snapshot: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "a-00001-of-00002.gguf", "b.gguf", "sub/a.gguf"):
        store.put(name, b"older")
    options = ["--upload", TARGET, "--overwrite"]
    result = store.remote.run("hf-to-gguf", snapshot, tmp_path / "a.gguf", *options, "--delete-uploaded", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert f"1 file of an older GGUF of this name stayed at {TARGET}: a-00001-of-00002.gguf" in document["notes"]
    assert document["deleted"] is True
    assert store.stored()["a-00001-of-00002.gguf"] == b"older"


def test_a_large_file_goes_in_parts_that_a_store_takes(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsv4convert.containers.remote import store_upload

    for name, value in store.server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(store_upload, "PART_BYTES", 5 * 2**20)
    destination = store_upload.StoreDestination("s3", f"models/{PREFIX}")
    path = tmp_path / "large.gguf"
    path.write_bytes(bytes(range(256)) * (2**20 // 256) * 12)
    sent = store_upload.Sent.of(path)
    destination.begin(["large.gguf"], is_folder=False, overwrite=False, resume=False, fingerprint="f")
    destination.send("large.gguf", path, sent)
    destination.send("large.gguf", path, sent)
    assert store.server.received == [f"{PREFIX}/large.gguf"]
    assert sum(write.startswith("PUT") for write in store.server.writes) == 3
    assert destination.finish({"large.gguf": (path, sent)}, lambda old: "card") == TARGET
    assert store.stored() == {"large.gguf": path.read_bytes(), "README.md": b"card"}


def test_what_is_deleted_here_is_there_and_resume_knows_it(store: Store, snapshot: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "Small-BF16"
    arguments = dequantize(snapshot, out, "--delete-uploaded")
    assert run_cli("dequantize", snapshot, tmp_path / "local", "--max-file-size", "200K").code == 0
    result = store.remote.run(*arguments)
    assert result.code == 0, result.err
    assert list(out.parent.iterdir()) == []
    assert "wrote" not in result.out
    assert store.without_card() == contents(tmp_path / "local")
    writes = list(store.server.writes)
    result = store.remote.run(*arguments, "--resume")
    assert result.code == 0, result.err
    assert "finished by an earlier run" in result.out
    assert (store.server.writes, list(out.parent.iterdir())) == (writes, [])


def test_a_mark_that_an_interrupted_run_left_at_its_end_goes(store: Store, snapshot: Path, tmp_path: Path) -> None:
    """All had arrived, and was not yet deleted here."""
    out = tmp_path / "out" / "Small-BF16"
    marks: list[bytes] = []
    store.server.before_upload = lambda number: marks.append(store.server.contents(PREFIX)[MARK])
    assert store.remote.run(*dequantize(snapshot, out)).code == 0
    store.server.before_upload = lambda number: None
    store.put(MARK, marks[0])
    result = store.remote.run(*dequantize(snapshot, out, "--delete-uploaded", "--resume"))
    assert result.code == 0, result.err
    assert "finished by an earlier run" in result.out
    assert MARK not in store.server.contents(PREFIX)
    assert not out.exists()


def test_what_differs_there_is_not_deleted_here(store: Store, snapshot: Path, tmp_path: Path) -> None:
    """Of the same size: an object that somebody replaced, and another model in the same place."""
    out = tmp_path / "out" / "Small-BF16"
    assert store.remote.run(*dequantize(snapshot, out)).code == 0
    before = contents(out)
    name = next(name for name in before if "model-00001-of" in name)
    kept = store.stored()[name]
    store.put(name, bytes(len(kept)))
    again = dequantize(snapshot, out, "--delete-uploaded", "--resume")
    result = store.remote.run(*again)
    assert result.code == 9
    assert f"{name}: already exists in the store" in result.error
    assert contents(out) == before
    other = shutil.copytree(snapshot, tmp_path / "other")
    for path in other.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    result = store.remote.run(*dequantize(other, tmp_path / "out" / "Other-BF16", "--overwrite"))
    assert result.code == 0, result.err
    assert store.remote.run(*again).code == 9
    assert contents(out) == before


def test_a_card_forgets_outputs_whose_files_are_replaced(store: Store, snapshot: Path, tmp_path: Path) -> None:
    store.put("README.md", b"# Mine\n")
    for name, options in (("a", ()), ("b", ("--dtype", "f32", "--overwrite"))):
        result = store.remote.run(*dequantize(snapshot, tmp_path / "out" / name, *options))
        assert result.code == 0, result.err
    result = store.remote.run("hf-to-gguf", snapshot, tmp_path / "c.gguf", "--upload", TARGET)
    assert result.code == 0, result.err
    card = store.stored()["README.md"].decode()
    assert card.startswith("# Mine\n")
    assert re.findall("begin (.+) -->", card) == ["b", "c.gguf"]
    assert re.findall("^## .*", card, re.MULTILINE) == ["## `b`", "## `c.gguf`"]


# What is in the way


def test_nothing_is_replaced_or_mixed_unasked(store: Store, snapshot: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "Small-BF16"
    assert store.remote.run(*dequantize(snapshot, out)).code == 0
    writes = list(store.server.writes)
    again = dequantize(snapshot, tmp_path / "out" / "again")
    assert "already exists in the store; pass --overwrite to replace it" in store.remote.run(*again).error
    for name in store.stored():
        if name.endswith(".json"):
            obstore.delete(store.server.store(), f"{PREFIX}/{name}")
    other = ["dequantize", snapshot, tmp_path / "out" / "other", "--upload", TARGET]
    error = store.remote.run(*other).error
    assert "holds weights of another output; pass --overwrite to remove them, or name another folder" in error
    assert [write for write in store.server.writes if ".json" not in write] == [
        write for write in writes if ".json" not in write
    ]
    assert not (tmp_path / "out" / "again").exists()


def test_an_older_output_loses_its_index_first_and_its_stale_weights_at_the_end(
    store: Store, snapshot: Path, tmp_path: Path
) -> None:
    store.put("README.md", b"# Mine\n")
    assert store.remote.run(*dequantize(snapshot, tmp_path / "out" / "Small-BF16")).code == 0
    store.put("notes.txt", b"mine")
    store.server.writes.clear()
    whole = ["dequantize", snapshot, tmp_path / "out" / "other", "--upload", TARGET, "--overwrite"]
    result = store.remote.run(*whole)
    assert result.code == 0, result.err
    files = store.without_card()
    assert files.pop("notes.txt") == b"mine"
    assert files == contents(tmp_path / "out" / "other")
    assert store.stored()["README.md"].startswith(b"# Mine\n")
    writes = [write.replace(f"{PREFIX}/", "") for write in store.server.writes]
    assert writes[:4] == ["PUT README.before-upload.md", "DELETE README.md", f"DELETE {INDEX}", "DELETE config.json"]
    weights = [i for i, write in enumerate(writes) if "safetensors" in write and INDEX not in write]
    assert min(weights) > 3
    stale = [i for i in weights if writes[i].startswith("DELETE model-")]
    assert len(stale) > 3
    assert max(weights) in stale
    assert writes.index("PUT config.json") > max(weights)


@pytest.mark.parametrize("which", [0, -1], ids=["the first", "the last"])
def test_files_that_are_the_same_in_an_older_output_stay(
    which: int, store: Store, snapshot: Path, tmp_path: Path
) -> None:
    """All but one: what has been found to be there already is not removed with what is replaced."""
    assert store.remote.run(*dequantize(snapshot, tmp_path / "out" / "Small-BF16")).code == 0
    weights = sorted(name for name in store.stored() if name.endswith(".safetensors"))
    store.put(weights[which], b"other weights")
    result = store.remote.run(*dequantize(snapshot, tmp_path / "again" / "Small-BF16", "--overwrite"))
    assert result.code == 0, result.err
    assert store.without_card() == contents(tmp_path / "again" / "Small-BF16")


@pytest.mark.parametrize("other", ["config.json", INDEX, "tokenizer_config.json"])
def test_json_files_that_are_the_same_in_an_older_output_stay(
    other: str, store: Store, snapshot: Path, tmp_path: Path
) -> None:
    """One differs, which comes after others that have been found to be there already."""
    assert store.remote.run(*dequantize(snapshot, tmp_path / "out" / "Small-BF16")).code == 0
    store.put(other, b"{}")
    result = store.remote.run(*dequantize(snapshot, tmp_path / "again" / "Small-BF16", "--overwrite"))
    assert result.code == 0, result.err
    assert store.without_card() == contents(tmp_path / "again" / "Small-BF16")


def test_a_mark_of_another_run_stays(store: Store, snapshot: Path, tmp_path: Path) -> None:
    """Which takes the place of one that is about to end."""

    def take(number: int) -> None:
        if INDEX in store.server.contents(PREFIX):  # the card comes
            store.put(MARK, b"another run")

    store.server.before_upload = take
    assert store.remote.run(*dequantize(snapshot, tmp_path / "out" / "Small-BF16")).code == 0
    assert store.server.contents(PREFIX)[MARK] == b"another run"


def test_wrong_uses_are_one_line(store: Store, snapshot: Path, tmp_path: Path) -> None:
    def error(*options: object) -> str:
        return store.remote.run("dequantize", snapshot, tmp_path / "out", "--upload", *options).error

    assert "--upload: not a folder in a store: expected s3://BUCKET/PREFIX" in error("s3://models/../other")
    assert "--upload: no such destination: expected OWNER/NAME, s3://BUCKET/PREFIX" in error("ftp://models/a")
    assert "not an address in a store" in error("s3://key:secret@models/a")
    assert "secret" not in error("s3://key:secret@models/a")
    assert "no such bucket; check the address, and the store's keys in the environment (AWS_" in error("s3://nothing/a")
    assert "the store cannot be opened (GenericError); check the address, and" in error("az://container/a")
    assert "AWS_" not in error("az://container/a")
    assert "(AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY)" in error("az://container/a")
    store.remote.environment |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    unreachable = error(TARGET)
    assert "cannot be sent (" in unreachable
    assert SECRET not in unreachable
    assert not (tmp_path / "out").exists()


# Two runs


def test_a_second_run_keeps_away_until_the_first_has_sent_all(store: Store, snapshot: Path, tmp_path: Path) -> None:
    """Also while the first one has sent nothing yet."""
    seen: list[str] = []
    other = ["hf-to-gguf", snapshot, tmp_path / "other.gguf", "--upload", TARGET]

    def look(number: int) -> None:
        if not number:
            seen.append(store.remote.run(*other).error)
            seen.append(store.remote.run(*other, "--resume").error)
            seen.append(store.remote.run(*dequantize(snapshot, tmp_path / "again" / "Small-BF16")).error)

    store.server.before_upload = look
    out = tmp_path / "out" / "Small-BF16"
    result = store.remote.run(*dequantize(snapshot, out))
    assert result.code == 0, result.err
    place = f"{TARGET}/{MARK}: another run sends"
    assert seen[0] == seen[1]
    assert f"{place} another output there, or was interrupted; wait for its end, or name another folder" in seen[0]
    assert f"{place} this output there, or was interrupted; wait for its end; --resume goes on" in seen[2]
    assert MARK not in store.server.contents(PREFIX)
    assert store.without_card() == contents(out)
    assert not (tmp_path / "other.gguf").exists()
    assert store.remote.run(*other).code == 0


@pytest.mark.parametrize("options", [["--overwrite"], ["--overwrite", "--resume"]], ids=" ".join)
def test_a_run_of_an_output_that_another_one_is_making_takes_no_place(
    options: list[str], store: Store, snapshot: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "Small-BF16"
    again = dequantize(snapshot, out, *options)
    store.put(MARK, b"of the other run")
    with Journal(out.with_name(f"{out.name}{JOURNAL_SUFFIX}")):
        assert store.remote.run(*again).code == 14
    assert store.server.contents(PREFIX) == {MARK: b"of the other run"}


def test_a_store_without_conditions_keeps_runs_apart_too(store: Store, snapshot: Path, tmp_path: Path) -> None:
    """As Backblaze's and Alibaba's are, which answer 501."""
    seen: list[str] = []
    store.server.conditions = False
    other = ["hf-to-gguf", snapshot, tmp_path / "other.gguf", "--upload", TARGET]
    store.server.before_upload = lambda number: None if number else seen.append(store.remote.run(*other).error)
    result = store.remote.run(*dequantize(snapshot, tmp_path / "out" / "Small-BF16"))
    assert result.code == 0, result.err
    assert f"{TARGET}/{MARK}: another run sends another output there" in seen[0]
    assert MARK not in store.server.contents(PREFIX)
    assert store.without_card() == contents(tmp_path / "out" / "Small-BF16")


def test_a_run_whose_place_was_taken_sends_nothing_more(store: Store, snapshot: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out" / "Small-BF16", tmp_path / "other" / "Small-BF16"
    taken: list[int] = []

    def take(number: int) -> None:
        if number == 3 and not taken:
            taken.append(store.remote.run(*dequantize(snapshot, other, "--dtype", "f32", "--overwrite")).code)

    store.server.before_upload = take
    result = store.remote.run(*dequantize(snapshot, out))
    assert taken == [0]
    assert result.code == 9
    assert "another run sends files there, which has taken the place of this one" in result.err.splitlines()[-1]
    assert all(store.stored()[name] == content for name, content in contents(other).items() if name.endswith(".json"))
    card = store.stored()["README.md"].decode()
    assert "| dtype | `f32` |" in card


def test_a_run_that_ends_before_it_sends_leaves_no_mark(store: Store, remote: Remote, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    remote.environment |= store.server.environment
    result = remote.interrupted("hf-to-gguf", REPOSITORY, out / "a.gguf", "--upload", TARGET, folder=out)
    assert result.code == 130, result.err
    assert store.server.contents(PREFIX) == {}


def test_a_dry_run_sends_nothing(store: Store, snapshot: Path, tmp_path: Path) -> None:
    result = store.remote.run(*dequantize(snapshot, tmp_path / "out", "--dry-run"))
    assert result.code == 0, result.err
    assert store.server.writes == []


# What goes wrong


def test_requests_that_fail_are_made_again(store: Store, snapshot: Path, tmp_path: Path) -> None:
    broken = iter([503, 500, 429, 503, 503])
    store.server.status = lambda method, key: next(broken, None)
    result = store.remote.run(*dequantize(snapshot, tmp_path / "out"))
    assert result.code == 0, result.err
    assert store.without_card() == contents(tmp_path / "out")
    assert len(store.server.received) == len(set(store.server.received))


def test_keys_that_expire_end_the_upload_and_resume_sends_the_rest(
    store: Store, snapshot: Path, tmp_path: Path
) -> None:
    store.server.status = lambda method, key: 403 if len(store.server.received) >= 2 else None
    out = tmp_path / "out" / "Small-BF16"
    result = store.remote.run(*dequantize(snapshot, out))
    assert result.code == 16
    error = result.err.splitlines()[-1]
    assert re.search(r"//models/\S+/model-0000\d-of-\d+\.safetensors: the store refuses the upload", error)
    assert "the output is finished here: run again with --resume" in error
    assert SECRET not in result.err
    assert not [name for name in store.stored() if name.endswith((".json", ".md"))]
    store.server.status = lambda method, key: None
    result = store.remote.run(*dequantize(snapshot, out), "--resume")
    assert result.code == 0, result.err
    assert store.without_card() == contents(out)
    assert len(store.server.received) == len(set(store.server.received))


@pytest.mark.parametrize(
    ("number", "after", "overwrite"),
    [
        *((signal.SIGKILL, after, False) for after in (0, 3, 10)),
        *((signal.SIGKILL, after, True) for after in (1, 9)),
        (signal.SIGINT, 3, False),
    ],
)
def test_a_run_that_ends_in_the_middle_shows_no_index_and_goes_on(
    number: signal.Signals, after: int, overwrite: bool, store: Store, snapshot: Path, tmp_path: Path
) -> None:
    store.put("README.md", b"# Mine\n")
    out = tmp_path / "out" / "Small-BF16"
    options = ["--overwrite"] if overwrite else []
    if overwrite:
        older = ["repack", snapshot, tmp_path / "older", "--experts", "fp8", "--upload", TARGET]
        result = store.remote.run(*older)
        assert result.code == 0, result.err
    store.server.writes.clear()
    store.server.received.clear()
    processes: list[Any] = []
    interrupted = threading.Event()
    held = threading.Event()

    def interrupt(sent: int) -> None:
        if sent >= after:
            if not interrupted.is_set():
                interrupted.set()
                processes[0].send_signal(number)
            held.wait(10 if number == signal.SIGKILL else 0)

    store.server.before_upload = interrupt
    processes.append(store.remote.start(*dequantize(snapshot, out, *options)))
    result = finished(processes[0])
    held.set()
    assert result.code == (130 if number == signal.SIGINT else -9), result.err
    if INDEX in store.stored():  # then all that it names is there
        assert all(store.stored().get(name) == content for name, content in contents(out).items())
    store.server.before_upload = lambda sent: None
    result = store.remote.run(*dequantize(snapshot, out, *options), "--resume")
    assert result.code == 0, result.err
    assert store.without_card() == contents(out)
    assert store.stored()["README.md"].startswith(b"# Mine\n")


def test_a_file_that_arrived_is_not_sent_again(store: Store, snapshot: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "Small-BF16"
    store.server.status = lambda method, key: 403 if key.endswith(INDEX) else None
    assert store.remote.run(*dequantize(snapshot, out, "--overwrite")).code == 16
    received = list(store.server.received)
    assert len(received) == len(contents(out)) - 1
    store.server.status = lambda method, key: None
    assert store.remote.run(*dequantize(snapshot, out, "--overwrite", "--resume")).code == 0
    assert store.server.received == [*received, f"{PREFIX}/{INDEX}", f"{PREFIX}/README.md"]


def test_another_content_there_than_was_sent_is_an_error(store: Store, snapshot: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "Small-BF16"
    replaced: list[str] = []

    def replace(number: int) -> None:
        received = [key for key in store.server.received if "model-00001-of" in key]
        if received and not replaced:
            replaced.append(received[0])
            obstore.put(store.server.store(), received[0], b"other", attributes={"sha256": "0"})

    store.server.before_upload = replace
    result = store.remote.run(*dequantize(snapshot, out, "--delete-uploaded"))
    assert result.code == 16, result.err
    assert "the store has another content than was sent" in result.err.splitlines()[-1]
    assert not [name for name in store.stored() if name.endswith((".json", ".md"))]
    assert list(out.glob("*.safetensors"))
    store.server.before_upload = lambda number: None
    result = store.remote.run(*dequantize(snapshot, out, "--resume"))
    assert result.code == 9
    assert "already exists in the store" in result.err.splitlines()[-1]
