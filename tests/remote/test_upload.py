"""Outputs sent to the hub: whole or not at all, each file once, whatever goes wrong, and no secret anywhere."""

from __future__ import annotations

import hashlib
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.cli.report import without_folders

from ..command_line import run_cli
from .hub_server import Hub
from .support import Remote, contents, finished

TARGET = "me/Small-V4-converted"


@pytest.fixture
def hub(tmp_path: Path) -> Remote:
    """Return a running hub without a repository, which takes files."""
    server = Hub(folders=tmp_path / "hub-folders")
    server.start()
    yield Remote(server, tmp_path / "home", {"HF_TOKEN": "hf_secret_token"})
    server.stop()


def dequantize(snapshot: Path, out: Path, *options: object) -> list[object]:
    """Return a conversion to several files that sends them."""
    out.parent.mkdir(exist_ok=True)
    return ["dequantize", snapshot, out, "--max-file-size", "200K", "--upload", TARGET, *options]


def stored(remote: Remote) -> dict[str, bytes]:
    """Return the files that a reader of the repository finds."""
    return contents(remote.hub.repositories[TARGET]["main"]) if TARGET in remote.hub.repositories else {}


def without_card(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != "README.md"}


@pytest.mark.parametrize("part_bytes", [None, 70_000], ids=["whole", "in parts"])
def test_a_folder_is_sent_with_a_card_in_one_commit(
    part_bytes: int | None, hub: Remote, snapshot: Path, tmp_path: Path
) -> None:
    hub.hub.part_bytes = part_bytes
    hub.hub.token = "hf_secret_token"
    out = tmp_path / "out" / "Small-BF16"
    result = hub.run(*dequantize(snapshot, out))
    assert result.code == 0, result.err
    assert "note: uploaded to hf://me/Small-V4-converted@" in result.out
    files = stored(hub)
    assert without_card(files) == contents(out)
    assert len(list(out.glob("*.safetensors"))) > 3
    assert len(hub.hub.commits) == 1
    assert hub.hub.visibility[TARGET] == "private"
    sent = [name.partition("/")[0] for name in hub.hub.received]
    assert part_bytes is not None or len(sent) == len(set(sent)) == len(list(out.glob("*.safetensors")))
    card = files["README.md"].decode()
    for name, content in contents(out).items():
        assert f"| `{name}` | {len(content)} | `{hashlib.sha256(content).hexdigest()}` |" in card
    assert f"dsv4convert dequantize {snapshot.name} Small-BF16 --max-file-size 200K --upload {TARGET}" in card
    assert "somebody/Small-V4@" in card
    for secret in ("hf_secret_token", "secret-signature", str(tmp_path)):
        assert secret not in card + result.out.replace(str(out), "") + result.err
    assert set(hub.hub.authorized) == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        ("{here}/a secret/model", "model"),
        ("a secret/model", "model"),
        ("a secret/../a secret/", "a secret"),
        ("./model", "model"),
        ("--imatrix=a secret/im.gguf", "--imatrix=im.gguf"),
        ("deepseek-ai/DeepSeek-V4-Flash", "deepseek-ai/DeepSeek-V4-Flash"),
        ("s3://bucket/a secret", "s3://bucket/a secret"),
        ("ffn_(up|down)_exps=q4_k", "ffn_(up|down)_exps=q4_k"),
    ],
)
def test_a_card_tells_no_folder_of_this_machine(
    argument: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a secret").mkdir()
    monkeypatch.chdir(tmp_path)
    assert without_folders(argument.format(here=tmp_path)) == kept


def test_a_gguf_is_sent_from_the_hub_to_the_hub_and_a_foreign_card_stays(
    hub: Remote, snapshot: Path, tmp_path: Path
) -> None:
    hub.hub.repositories["somebody/Small-V4"] = {"main": snapshot}
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("# My models\n\nDo not lose this.\n")
    (mine / "other.gguf").write_bytes(b"another model")
    hub.hub.repositories[TARGET] = {"main": mine}
    for name, experts in (("a.gguf", "bf16"), ("b.gguf", "mxfp4")):
        result = hub.run("hf-to-gguf", "somebody/Small-V4", tmp_path / name, "--experts", experts, "--upload", TARGET)
        assert result.code == 0, result.err
    files = stored(hub)
    assert files["a.gguf"] == (tmp_path / "a.gguf").read_bytes()
    assert files["b.gguf"] == (tmp_path / "b.gguf").read_bytes()
    assert files["other.gguf"] == b"another model"
    card = files["README.md"].decode()
    assert card.startswith("# My models\n\nDo not lose this.\n")
    assert card.count("dsv4convert: begin") == 2


def test_files_of_an_older_gguf_of_the_name_are_told_and_stay(hub: Remote, snapshot: Path, tmp_path: Path) -> None:
    options = ["--upload", TARGET, "--overwrite"]
    result = hub.run("hf-to-gguf", snapshot, tmp_path / "a.gguf", "--max-file-size", "300K", *options)
    assert result.code == 0, result.err
    assert "of an older GGUF" not in result.out
    parts = sorted(name for name in stored(hub) if name.endswith(".gguf"))
    assert len(parts) > 8
    assert hub.run("hf-to-gguf", snapshot, tmp_path / "b.gguf", *options).code == 0
    result = hub.run("hf-to-gguf", snapshot, tmp_path / "a.gguf", *options)
    assert result.code == 0, result.err
    named = f"{', '.join(parts[:8])}, …"
    assert f"{len(parts)} files of an older GGUF of this name stayed at hf://{TARGET}: {named}" in result.out
    assert set(parts) < set(stored(hub))


def test_what_is_deleted_here_is_there_and_resume_knows_it(hub: Remote, snapshot: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "Small-BF16"
    arguments = dequantize(snapshot, out, "--delete-uploaded")
    assert run_cli("dequantize", snapshot, tmp_path / "local", "--max-file-size", "200K").code == 0
    result = hub.run(*arguments)
    assert result.code == 0, result.err
    assert list(out.parent.iterdir()) == []
    assert "wrote" not in result.out
    assert "  uploaded, removed here" in result.out
    assert without_card(stored(hub)) == contents(tmp_path / "local")
    received = list(hub.hub.received)
    result = hub.run(*arguments, "--resume")
    assert result.code == 0, result.err
    assert "finished by an earlier run" in result.out
    assert "wrote" not in result.out
    assert (hub.hub.received, len(hub.hub.commits), list(out.parent.iterdir())) == (received, 1, [])


def test_resume_does_not_delete_another_output_that_has_come_to_the_place(
    hub: Remote, snapshot: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "Small-BF16"
    arguments = dequantize(snapshot, out, "--delete-uploaded")
    assert hub.run(*arguments).code == 0
    assert run_cli("dequantize", snapshot, out, "--dtype", "f32", "--max-file-size", "200K").code == 0
    before = contents(out)
    result = hub.run(*arguments, "--resume")
    assert (result.code, contents(out) == before) == (9, True), result.err
    assert "already exists" in result.error


def test_what_differs_there_is_not_deleted_here(hub: Remote, snapshot: Path, tmp_path: Path) -> None:
    """Another content of the same size, in a file of weights and in a small one."""
    out = tmp_path / "out" / "Small-BF16"
    assert hub.run(*dequantize(snapshot, out)).code == 0
    before = contents(out)
    for name in (next(name for name in before if "model-00001-of" in name), "generation_config.json"):
        path = hub.hub.repositories[TARGET]["main"] / name
        kept = path.read_bytes()
        path.write_bytes(bytes(len(kept)))
        result = hub.run(*dequantize(snapshot, out, "--delete-uploaded", "--resume"))
        assert result.code == 9, result.err
        assert f"{name}: already exists on the hub" in result.error
        assert contents(out) == before
        path.write_bytes(kept)


# What is in the way


def test_nothing_is_replaced_or_mixed_unasked(hub: Remote, snapshot: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "Small-BF16"
    assert hub.run(*dequantize(snapshot, out)).code == 0
    again = dequantize(snapshot, tmp_path / "out" / "again")
    assert "already exists on the hub; pass --overwrite to replace it" in hub.run(*again).error
    other = ["dequantize", snapshot, tmp_path / "out" / "other", "--upload", TARGET]
    error = hub.run(*other).error
    assert "already exists on the hub" in error
    (hub.hub.repositories[TARGET]["main"] / "config.json").unlink()
    for path in hub.hub.repositories[TARGET]["main"].glob("*.json"):
        path.unlink()
    error = hub.run(*other).error
    assert "holds weights of another output; pass --overwrite to remove them in the same commit" in error
    assert not (tmp_path / "out" / "again").exists()
    result = hub.run(*other, "--overwrite")
    assert result.code == 0, result.err
    assert without_card(stored(hub)) == contents(tmp_path / "out" / "other")
    assert len(hub.hub.commits) == 2


@pytest.mark.parametrize(
    "address", ["https://me:SECRET@host/a", "me:SECRET@host/a", "hf://me:SECRET@a/b", "hf://a/b?SECRET"]
)
def test_an_address_that_is_refused_is_told_without_its_secrets(address: str, hub: Remote, tiny: Path) -> None:
    result = hub.run("dequantize", tiny, tiny.parent / "never", "--upload", address)
    assert result.code == 2
    assert "SECRET" not in result.err + result.out


def test_wrong_uses_are_one_line(hub: Remote, snapshot: Path, tmp_path: Path) -> None:
    def error(*options: object) -> str:
        return hub.run("dequantize", snapshot, tmp_path / "out", *options).error

    assert "--upload: no such destination: expected OWNER/NAME" in error("--upload", "nowhere")
    assert "--upload: no such destination" in error("--upload", "https://example.org/a")
    assert "--upload: not a folder of a repository" in error("--upload", "hf://me/name/../../x")
    assert "--delete-uploaded is for --upload" in error("--delete-uploaded")
    assert "--upload takes one output" in error("--upload", TARGET, "--draft", "split")
    hub.environment["HF_HUB_OFFLINE"] = "1"
    assert "HF_HUB_OFFLINE forbids sending anything" in error("--upload", TARGET)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_sends_nothing(hub: Remote, snapshot: Path, tmp_path: Path) -> None:
    result = hub.run(*dequantize(snapshot, tmp_path / "out", "--dry-run"))
    assert result.code == 0, result.err
    assert (hub.hub.requests, hub.hub.repositories) == ([], {})


# What goes wrong


def test_broken_and_cut_requests_are_made_again(hub: Remote, snapshot: Path, tmp_path: Path) -> None:
    hub.hub.faults.broken_posts, hub.hub.faults.cut_uploads, hub.hub.faults.lost_commits = 4, 3, 1
    result = hub.run(*dequantize(snapshot, tmp_path / "out"))
    assert result.code == 0, result.err
    assert without_card(stored(hub)) == contents(tmp_path / "out")
    assert len(hub.hub.commits) == 1
    assert len(hub.hub.received) == len(set(hub.hub.received))


def test_a_token_that_expires_ends_the_upload_and_resume_sends_what_is_missing(
    hub: Remote, snapshot: Path, tmp_path: Path
) -> None:
    hub.hub.token = "hf_secret_token"

    def expire(number: int) -> None:
        if number >= 2:  # two may be sent at once, and nobody see that number
            hub.hub.token = "hf_another_token"

    hub.hub.faults.before_upload = expire
    out = tmp_path / "out" / "Small-BF16"
    result = hub.run(*dequantize(snapshot, out))
    assert result.code == 16
    error = result.err.splitlines()[-1]
    assert "the hub refuses the upload: got HTTP 401; has the token expired?" in error
    assert "the output is finished here: run again with --resume" in error
    assert stored(hub) == {}
    before = list(hub.hub.received)
    assert 2 <= len(before) < len(list(out.glob("*.safetensors")))
    hub.environment["HF_TOKEN"] = "hf_another_token"
    result = hub.run(*dequantize(snapshot, out), "--resume")
    assert result.code == 0, result.err
    assert without_card(stored(hub)) == contents(out)
    assert hub.hub.received[: len(before)] == before
    assert len(hub.hub.received) == len(set(hub.hub.received)) == len(list(out.glob("*.safetensors")))
    for path in tmp_path.joinpath("out").rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes()


@pytest.mark.parametrize(
    ("number", "after"),
    [(signal.SIGKILL, 0), (signal.SIGKILL, 3), (signal.SIGINT, 3)],
    ids=["killed at the first", "killed", "Ctrl-C"],
)
def test_a_run_that_ends_in_the_middle_of_sending_shows_nothing_and_goes_on(
    number: signal.Signals, after: int, hub: Remote, snapshot: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "Small-BF16"
    processes: list[Any] = []
    interrupted = threading.Event()

    def interrupt(sent: int) -> None:
        if sent >= after and not interrupted.is_set():
            interrupted.set()
            processes[0].send_signal(number)

    hub.hub.faults.before_upload = interrupt
    processes.append(hub.start(*dequantize(snapshot, out)))
    result = finished(processes[0])
    assert result.code == (130 if number == signal.SIGINT else -9), result.err
    assert stored(hub) == {}
    hub.hub.faults.before_upload = lambda sent: None
    before = set(hub.hub.objects)
    hub.hub.received.clear()
    result = hub.run(*dequantize(snapshot, out), "--resume")
    assert result.code == 0, result.err
    assert without_card(stored(hub)) == contents(out)
    assert not before & set(hub.hub.received)


def test_another_content_there_than_was_sent_is_an_error(hub: Remote, snapshot: Path, tmp_path: Path) -> None:
    hub.hub.faults.wrong_sha = True
    out = tmp_path / "out" / "Small-BF16"
    result = hub.run(*dequantize(snapshot, out, "--delete-uploaded"))
    assert result.code == 16
    assert "the hub has another content than was sent" in result.err.splitlines()[-1]
    assert list(out.glob("*.safetensors"))


def test_a_commit_that_comes_between_is_met_and_its_files_are_not_replaced(
    hub: Remote, snapshot: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    hub.hub.repositories[TARGET] = {"main": mine}

    def commit(number: int) -> None:
        other = tmp_path / "theirs"
        if not other.exists():
            shutil.copytree(mine, other)
            (other / "config.json").write_text("{}")
            hub.hub.repositories[TARGET] = {"main": other}

    hub.hub.faults.before_upload = commit
    result = hub.run(*dequantize(snapshot, tmp_path / "out"))
    assert result.code == 9
    assert "config.json: already exists on the hub" in result.err.splitlines()[-1]
    assert stored(hub) == {"config.json": b"{}"}
