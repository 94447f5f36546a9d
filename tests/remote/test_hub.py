"""Repositories of the hub as sources: the bytes of a local conversion, each fetched once, whatever goes wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsv4convert.containers.fetching import TransientError
from dsv4convert.containers.remote import hub
from dsv4convert.containers.remote.hub import HubRanges
from dsv4convert.errors import InputOutputError

from ..checkpoint.test_meaning import edit_bytes
from ..command_line import run_cli
from .hub_server import commit_of
from .support import REPOSITORY, Remote, contents, finished

CONVERSIONS = {
    "gguf": ("hf-to-gguf", "out.gguf"),
    "gguf weighed by all rows": (
        "hf-to-gguf",
        "out.gguf",
        "--dense",
        "q4_0",
        "--experts",
        "q4_0",
        "--importance",
        "weights",
    ),
    "shards": ("shard", "out", "--mp", "2"),
    "dequantize": ("dequantize", "out"),
    "repack": ("repack", "out", "--experts", "fp8"),
}
GGUF = CONVERSIONS["gguf"]
SCALAR_BYTES = 4


def conversion(kind: tuple[str, ...], source: object, folder: Path) -> list[object]:
    folder.mkdir(exist_ok=True)
    command, out, *options = kind
    return [command, source, folder / out, *options]


@pytest.fixture(scope="session")
def local(snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Return the files of each conversion of the local checkpoint."""
    made = {}
    for name, kind in CONVERSIONS.items():
        folder = tmp_path_factory.mktemp("local") / name
        result = run_cli(*conversion(kind, snapshot, folder))
        assert result.code == 0, result.err
        made[name] = contents(folder / kind[1])
    return made


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_from_the_hub_makes_the_local_bytes_and_fetches_each_byte_once(
    name: str, remote: Remote, snapshot: Path, local: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    kind = CONVERSIONS[name]
    result = remote.run(*conversion(kind, REPOSITORY, tmp_path / "out"))
    assert result.code == 0, result.err
    assert contents(tmp_path / "out" / kind[1]) == local[name]
    weights = list(snapshot.glob("*.safetensors"))
    assert weights
    for path in weights:
        counts = remote.hub.times_sent(f"{REPOSITORY}/{path.name}", path.stat().st_size)
        assert max(counts) == 1
        # Without a draft, a GGUF leaves bytes where they are.
        assert name.startswith("gguf") or min(counts) == 1
    assert run_cli("verify", "--manifest", tmp_path / "out" / kind[1]).code == 0 or not name.startswith("gguf")


def test_only_headers_and_small_files_are_read_by_what_needs_no_more(remote: Remote, snapshot: Path) -> None:
    weights = [path.name for path in snapshot.glob("*.safetensors")]
    for command in (("inspect",), ("estimate",), ("hf-to-gguf", "--dry-run"), ("hf-to-gguf", "--list-recipes")):
        remote.hub.forget()
        result = remote.run(command[0], f"hf://{REPOSITORY}@main", *command[1:], "--json")
        assert result.code == 0, result.err
        for name in weights:
            ((begin, end),) = remote.hub.sent[f"{REPOSITORY}/{name}"]
            assert (begin, end) == (0, 2**18)
        assert "models--" not in result.out
        assert "hf://" in result.out or "--list-recipes" in command


def test_check_and_verify_read_the_hub(remote: Remote, snapshot: Path, tmp_path: Path) -> None:
    assert run_cli(*conversion(GGUF, snapshot, tmp_path)).code == 0
    assert json.loads(remote.run("check", REPOSITORY, "--json").out)["verdict"] == "ok"
    result = remote.run("verify", REPOSITORY, tmp_path / "out.gguf", "--json")
    assert json.loads(result.out)["verdict"] == "ok", result.out


def nvfp4(folder: Path) -> None:
    """Have unused tensors, scales of activations, between those that are used."""
    made = folder.parent / "nvfp4"
    assert run_cli("repack", folder, made, "--experts", "nvfp4").code == 0
    shutil.rmtree(folder)
    made.rename(folder)


def damaged(folder: Path) -> None:
    edit_bytes(folder, "embed.weight", lambda content: content.view("<u2").__setitem__(slice(-2, None), 0x7F80))
    edit_bytes(folder, "layers.1.ffn.experts.3.w2.weight", lambda content: content.__setitem__(-1, 0xFF), scale=True)
    for matrix in ("w1", "w2", "w3"):
        edit_bytes(folder, f"layers.2.ffn.experts.5.{matrix}.weight", lambda content: content.fill(0))


@pytest.mark.parametrize("change", [None, damaged, nvfp4], ids=["published", "damaged", "nvfp4"])
def test_check_asks_for_many_tensors_at_once_and_for_each_byte_once(
    change: Callable[[Path], None] | None, remote: Remote, snapshot: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checked"
    shutil.copytree(snapshot, folder)
    if change is not None:
        change(folder)
    remote.hub.repositories["somebody/Checked"] = {"main": folder}
    found = json.loads(remote.run("check", "somebody/Checked", "--json").out)
    local = json.loads(run_cli("check", folder, "--json").out)
    for report in (found, local):
        del report["path"], report["seconds"]
    assert found == local
    assert found["tensors"] > 400
    weights = {path: f"somebody/Checked/{path.name}" for path in folder.glob("*.safetensors")}
    # NVFP4's global scales, of four bytes each, are read when the folder is opened.
    runs = [run for name in weights.values() for run in remote.hub.sent[name] if run[1] - run[0] > SCALAR_BYTES]
    assert len(runs) < 30
    assert all(max(remote.hub.times_sent(name, path.stat().st_size)) == 1 for path, name in weights.items())


def test_verify_compares_a_grafted_draft_with_its_repository(remote: Remote, snapshot: Path, tmp_path: Path) -> None:
    trunk, out = tmp_path / "trunk", tmp_path / "out"
    assert run_cli("mend", snapshot, trunk, "--drop-draft").code == 0
    assert run_cli("mend", trunk, out, "--graft-draft", snapshot).code == 0
    result = remote.run("verify", trunk, out, "--graft-draft", REPOSITORY, "--json")
    assert json.loads(result.out)["verdict"] == "ok", result.out


# What goes wrong


def test_a_thousand_cut_connections_change_nothing(
    remote: Remote, local: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    remote.hub.faults.cut, remote.hub.faults.most_cuts = 0.9, 1000
    result = remote.run(*conversion(CONVERSIONS["dequantize"], REPOSITORY, tmp_path))
    assert result.code == 0, result.err
    assert remote.hub.cuts == 1000
    assert contents(tmp_path / "out") == local["dequantize"]


def test_busy_and_broken_answers_and_expired_addresses_are_asked_again(
    remote: Remote, local: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    # One connection may meet them all, and its tenth failure in a row would end the run.
    remote.hub.faults.busy, remote.hub.faults.broken, remote.hub.faults.expiring = 0.07, 0.07, 1
    result = remote.run(*conversion(GGUF, REPOSITORY, tmp_path))
    assert result.code == 0, result.err
    assert contents(tmp_path / "out.gguf") == local["gguf"]


def test_an_address_that_expires_under_all_threads_at_once_is_asked_for_again(
    remote: Remote, local: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    with remote.held_at_work(tmp_path):
        process = remote.start(*conversion(GGUF, REPOSITORY, tmp_path), "--threads", 16)
        remote.wait_for_work()
        remote.hub.faults.expiring = 40
    result = finished(process)
    assert result.code == 0, result.err
    assert contents(tmp_path / "out.gguf") == local["gguf"]


def test_a_thread_that_is_late_to_be_refused_neither_ends_the_run_nor_drops_the_new_address() -> None:
    places = ["https://store.example/old", "https://store.example/new"]

    class Ranges(HubRanges):
        def _resolve(self) -> str:
            return places.pop(0)

    ranges = Ranges(REPOSITORY, "model.safetensors", "0" * 40, f"hf://{REPOSITORY}", 1)
    old = ranges.url()
    for _ in range(2):
        assert isinstance(ranges.denied(old, 403), TransientError)
        assert ranges.secret(old) == {}
    assert ranges.url() == "https://store.example/new"
    assert isinstance(ranges.denied(old, 403), TransientError)
    assert ranges.url() == "https://store.example/new"


def test_a_hub_that_stays_broken_ends_the_run_in_one_line(remote: Remote, tmp_path: Path) -> None:
    remote.hub.faults.broken = 1.0
    result = remote.run(*conversion(GGUF, REPOSITORY, tmp_path))
    assert result.code == 16
    assert f"hf://{REPOSITORY}: cannot be fetched (HTTP status 503): got 5 failures in a row" in result.error


def test_a_restarted_server_is_met_again(remote: Remote, local: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    with remote.held_at_work(tmp_path):
        process = remote.start(*conversion(GGUF, REPOSITORY, tmp_path))
        remote.wait_for_work()
    remote.hub.stop()
    remote.hub.start()
    result = finished(process)
    assert result.code == 0, result.err
    assert contents(tmp_path / "out.gguf") == local["gguf"]


def test_an_interrupted_run_goes_on_and_a_moved_branch_is_an_error(
    remote: Remote, snapshot: Path, local: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    arguments = conversion(GGUF, REPOSITORY, tmp_path / "out")
    result = remote.interrupted(*arguments, folder=tmp_path / "out")
    assert result.code == 130, result.err
    other = Path(shutil.copytree(snapshot, tmp_path / "other"))
    (other / "README.md").write_text("# another revision\n")
    remote.hub.repositories[REPOSITORY] = {"main": other, "before": snapshot}
    result = remote.run(*arguments, "--resume")
    assert result.code == 13
    commit = commit_of(snapshot)
    assert f"the source moved to another revision: expected {commit}, got {commit_of(other)}" in result.error
    result = remote.run(*conversion(GGUF, f"{REPOSITORY}@{commit}", tmp_path / "out"), "--resume")
    assert result.code == 0, result.err
    assert contents(tmp_path / "out" / "out.gguf") == local["gguf"]


def test_a_branch_that_moves_during_a_run_does_not_mix_revisions(
    remote: Remote, snapshot: Path, local: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    with remote.held_at_work(tmp_path / "out"):
        process = remote.start(*conversion(GGUF, REPOSITORY, tmp_path / "out"))
        remote.wait_for_work()
        other = Path(shutil.copytree(snapshot, tmp_path / "other"))
        for path in other.glob("*.safetensors"):
            content = bytearray(path.read_bytes())
            content[-1000:] = bytes(1000)
            path.write_bytes(content)
        remote.hub.repositories[REPOSITORY] = {"main": other, "before": snapshot}
    result = finished(process)
    assert result.code == 0, result.err
    assert contents(tmp_path / "out" / "out.gguf") == local["gguf"]


# Secrets and names


def test_the_token_goes_to_the_hub_alone_and_into_no_file(remote: Remote, tmp_path: Path) -> None:
    remote.hub.token = "hf_secret_token"
    error = remote.run("inspect", REPOSITORY).error
    assert "no such repository on the hub; check the name; a private or gated repository needs" in error
    remote.environment["HF_TOKEN"] = "hf_secret_token"
    arguments = conversion(GGUF, REPOSITORY, tmp_path / "out")
    with remote.held_at_work(tmp_path / "out"):
        process = remote.start(*arguments)
        remote.wait_for_work()
        remote.hub.token, remote.hub.faults.expiring = "hf_another_token", 100
    result = finished(process)
    assert result.code == 16
    error = result.err.splitlines()[-1]  # after progress
    assert "the token expired? hf auth login, or HF_TOKEN; the finished work is kept: run again with --resume" in error
    printed = result.err + result.out
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    remote.hub.faults.expiring = 0
    remote.environment["HF_TOKEN"] = "hf_another_token"
    result = remote.run(*arguments, "--resume")
    assert result.code == 0, result.err
    printed += result.err + result.out
    written += b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert set(remote.hub.authorized) == {"127.0.0.1"}
    for secret in ("hf_secret_token", "hf_another_token", "secret-signature"):
        assert secret not in printed
        assert secret.encode() not in written


@pytest.mark.parametrize(
    "name",
    ["../outside.json", "/etc/outside.json", "a/../../b.json", "a\\b.json", "a\nb.json", "config.json/b", "x" * 300],
    ids=["above", "absolute", "above inside", "backslash", "newline", "below a file", "long"],
)
def test_names_that_leave_the_folder_are_refused(name: str, remote: Remote, tmp_path: Path) -> None:
    remote.hub.extra_names.append(name)
    result = remote.run("inspect", REPOSITORY)
    assert result.code == 6
    assert "the server gives a file name that is not a plain one" in result.error


def around(handler: Any, *asked: str) -> None:
    handler.refuse(302, {"Location": handler.path})


def nowhere(handler: Any, *asked: str) -> None:
    handler.refuse(302, {"Location": "http://[bad"})


def a_list(handler: Any, *asked: str) -> None:
    handler.send_json([1, 2])


def files_that_are_none(handler: Any, *asked: str) -> None:
    handler.send_json({"id": REPOSITORY, "sha": "0" * 40, "siblings": [1, {"name": "x"}]})


@pytest.mark.parametrize(
    ("method", "answer"),
    [("resolve", around), ("resolve", nowhere), ("info", a_list), ("info", files_that_are_none)],
    ids=["redirects without end", "redirects nowhere", "a list", "files that are none"],
)
@pytest.mark.parametrize("options", [[], ["--cache"]], ids=["", "cache"])
def test_answers_of_no_hub_are_one_line(
    method: str, answer: Callable[..., None], options: list[str], remote: Remote, tmp_path: Path
) -> None:
    assert remote.hub.server is not None
    setattr(remote.hub.server.RequestHandlerClass, method, answer)
    result = remote.run(*conversion(GGUF, REPOSITORY, tmp_path), *options)
    assert result.code == 16
    assert "the hub's answer cannot be understood: got " in result.err.splitlines()[-1]


def test_the_token_is_not_for_a_place_that_another_thread_gave_up(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "https://store.example/x?Signature=secret"
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, timeout: SimpleNamespace(location=place))
    monkeypatch.setattr(hub, "hf_hub_url", lambda *args, **kw: "https://huggingface.co/o/n/resolve/0/x")
    ranges = hub.HubRanges("o/n", "x", "0", "hf://o/n/x", 9)
    url = ranges.url()
    ranges.denied(ranges.url(), 403)
    assert ranges.secret(url) == {}
    assert ranges.secret("https://huggingface.co/o/n/resolve/0/x")["authorization"] == "Bearer hf_token"


def test_the_hub_may_not_lead_away_from_https(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = SimpleNamespace(location="http://192.0.2.1/x?Signature=secret")
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, timeout: metadata)
    monkeypatch.setattr(hub, "hf_hub_url", lambda *args, **kw: "https://huggingface.co/o/n/resolve/0/x")
    with pytest.raises(InputOutputError, match=r"^hf://o/n/x: the hub redirects from https to http$"):
        hub.HubRanges("o/n", "x", "0", "hf://o/n/x", 9).url()


# The hub's cache


def test_cache_keeps_what_is_fetched_and_a_second_run_reads_it(
    remote: Remote, local: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    result = remote.run(*conversion(GGUF, REPOSITORY, tmp_path / "a"), "--cache", "--dry-run")
    assert result.code == 0, result.err
    assert max(end for runs in remote.hub.sent.values() for _, end in runs) <= 2**18
    result = remote.run(*conversion(GGUF, REPOSITORY, tmp_path / "a"), "--cache")
    assert result.code == 0, result.err
    cached = remote.home / "hub" / f"models--{REPOSITORY.replace('/', '--')}" / "snapshots"
    assert (next(cached.iterdir()) / "config.json").is_file()
    remote.hub.forget()
    result = remote.run(*conversion(GGUF, REPOSITORY, tmp_path / "b"))
    assert result.code == 0, result.err
    assert not remote.hub.sent
    remote.hub.stop()
    remote.environment["HF_HUB_OFFLINE"] = "1"
    result = remote.run(*conversion(GGUF, REPOSITORY, tmp_path / "c"))
    assert result.code == 0, result.err
    for folder in "abc":
        assert contents(tmp_path / folder / "out.gguf") == local["gguf"]


def test_files_that_the_cache_has_are_read_there_and_the_others_fetched(
    remote: Remote, local: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    assert remote.run(*conversion(GGUF, REPOSITORY, tmp_path / "a"), "--cache").code == 0
    (cached,) = (remote.home / "hub").glob("models--*/snapshots/*")
    gone = sorted(cached.glob("*.safetensors"))[0]
    gone.unlink()
    remote.hub.forget()
    result = remote.run(*conversion(GGUF, REPOSITORY, tmp_path / "b"))
    assert result.code == 0, result.err
    assert set(remote.hub.sent) == {f"{REPOSITORY}/{gone.name}"}
    assert contents(tmp_path / "b" / "out.gguf") == local["gguf"]


def test_what_is_not_there_is_one_line(remote: Remote) -> None:
    assert "no such folder here, and no such repository on the hub" in remote.run("inspect", "some/where").error
    assert "the repository has no such revision" in remote.run("inspect", f"{REPOSITORY}@old").error
    assert "no such file or folder in the repository" in remote.run("inspect", f"hf://{REPOSITORY}/sub").error
    remote.environment["HF_HUB_OFFLINE"] = "1"
    assert "nor in the hub's cache, and HF_HUB_OFFLINE forbids" in remote.run("inspect", REPOSITORY).error
