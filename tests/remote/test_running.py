"""forward, compare, imatrix and mend by address: the results of the same files here, each byte fetched at most once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ..command_line import run_cli
from ..packed import PACK_QUANTIZED, int4, repacked
from ..v41 import TINY
from .store_server import StoreServer
from .support import REPOSITORY, Remote, contents

TOKENS = ["--tokens", "0,17,5,17,300,301"]
Make = Callable[[Path, Path], Path]


def split_gguf(tiny: Path, to: Path) -> Path:
    result = run_cli("hf-to-gguf", tiny, to / "model.gguf", "--max-file-size", "300K")
    assert result.code == 0, result.err
    return sorted(to.glob("model-00001-of-*.gguf"))[0]


def shards(tiny: Path, to: Path) -> Path:
    assert run_cli("shard", tiny, to / "shards", "--mp", "2").code == 0
    return to / "shards"


MODELS: dict[str, Make] = {
    "checkpoint": lambda tiny, to: tiny,
    "V4.1": lambda tiny, to: TINY["tiny-a"],
    "INT4": lambda tiny, to: repacked(tiny, to, int4(32, zeros=True), quantization=PACK_QUANTIZED),
    "split GGUF": split_gguf,
    "shards": shards,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, snapshot: Path, remote: Remote, tmp_path: Path) -> tuple[Path, str]:
    """Return a model here, and its address on the hub that ``remote`` talks to."""
    place = tmp_path / "made"
    place.mkdir()
    made = MODELS[request.param](snapshot, place)
    folder = made.parent if made.is_file() else made
    remote.hub.repositories["somebody/Model"] = {"main": folder}
    return made, "hf://somebody/Model" + (f"/{made.name}" if made.is_file() else "")


def check_fetched_once(remote: Remote, folder: Path, repository: str = "somebody/Model") -> None:
    """Check that no byte of a weight was sent twice, and some were sent."""
    weights = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".gguf")]
    counts = [
        remote.hub.times_sent(f"{repository}/{path.relative_to(folder)}", path.stat().st_size) for path in weights
    ]
    assert counts
    assert max(map(max, counts)) == 1


@pytest.mark.parametrize("options", [[], ["--generate", "2"]], ids=["prompt", "generated"])
def test_forward_is_that_of_the_local_model(
    options: list[str], model: tuple[Path, str], remote: Remote, tmp_path: Path
) -> None:
    here, address = model
    result = remote.run("forward", address, *TOKENS, *options, "--json", "--logits", tmp_path / "remote.npy")
    assert result.code == 0, result.err
    local = run_cli("forward", here, *TOKENS, *options, "--json", "--logits", tmp_path / "local.npy")
    assert json.loads(result.out) == json.loads(local.out)
    assert (tmp_path / "remote.npy").read_bytes() == (tmp_path / "local.npy").read_bytes()
    check_fetched_once(remote, here.parent if here.is_file() else here)


def test_what_a_run_reads_twice_is_fetched_once(remote: Remote, snapshot: Path, tmp_path: Path) -> None:
    recorded = ["--goldens", tmp_path / "remote", "--record-last", "2"]
    result = remote.run("forward", REPOSITORY, *TOKENS, *recorded, "--logits", tmp_path / "remote.npy")
    assert result.code == 0, result.err
    local = run_cli("forward", snapshot, *TOKENS, "--goldens", tmp_path / "local", "--record-last", "2")
    assert local.code == 0, local.err
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    check_fetched_once(remote, snapshot, REPOSITORY)
    remote.hub.forget()
    result = remote.run("compare", tmp_path / "local", REPOSITORY)
    assert result.code == 0, result.err
    check_fetched_once(remote, snapshot, REPOSITORY)


@pytest.mark.parametrize("model", ["checkpoint", "split GGUF"], indirect=True)
def test_compare_takes_addresses_and_names_them(model: tuple[Path, str], remote: Remote, tmp_path: Path) -> None:
    here, address = model
    result = remote.run("compare", address, here, "--random", "9", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["worst"] is not None
    assert document["a"].startswith("hf://somebody/Model@")
    assert {block["rmse"] for block in document["blocks"] if "rmse" in block} == {0}  # choices of experts have none
    check_fetched_once(remote, here.parent if here.is_file() else here)


@pytest.mark.parametrize("model", ["V4.1", "INT4", "split GGUF"], indirect=True)
def test_an_importance_matrix_is_that_of_the_local_model(
    model: tuple[Path, str], remote: Remote, snapshot: Path, tmp_path: Path
) -> None:
    here, address = model
    text = tmp_path / "text.txt"
    text.write_text("Every byte is fetched once, however many chunks the text has. " * 20)
    options = ["--text", text, "--context-size", "32", "--chunks", "3", "--tokenizer"]
    result = remote.run("imatrix", address, "-o", tmp_path / "remote.gguf", *options, f"hf://{REPOSITORY}", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["model"].startswith("hf://somebody/Model@")
    local = run_cli("imatrix", here, "-o", tmp_path / "local.gguf", *options, snapshot)
    assert local.code == 0, local.err
    assert (tmp_path / "remote.gguf").read_bytes() == (tmp_path / "local.gguf").read_bytes()
    check_fetched_once(remote, here.parent if here.is_file() else here)


def test_cache_downloads_a_model_that_is_run(remote: Remote, snapshot: Path) -> None:
    local = run_cli("forward", snapshot, *TOKENS).out
    result = remote.run("forward", REPOSITORY, *TOKENS, "--cache")
    assert (result.code, result.out) == (0, local), result.err
    remote.hub.forget()
    assert remote.run("forward", REPOSITORY, *TOKENS).out == local
    assert not remote.hub.sent


def test_models_and_goldens_in_a_store_are_run(remote: Remote, snapshot: Path, tmp_path: Path) -> None:
    obstore = pytest.importorskip("obstore")
    pytest.importorskip("moto")
    assert run_cli("forward", snapshot, *TOKENS, "--goldens", tmp_path / "goldens").code == 0
    gguf = split_gguf(snapshot, tmp_path)
    server = StoreServer()
    server.start()
    try:
        for folder, name in ((snapshot, "hf"), (tmp_path / "goldens", "goldens"), (tmp_path, "gguf")):
            for path in folder.iterdir():
                if path.is_file():
                    obstore.put(server.store(), f"{name}/{path.name}", path)
        remote.environment |= server.environment
        for address, here in (("s3://models/hf", snapshot), (f"s3://models/gguf/{gguf.name}", gguf)):
            result = remote.run("forward", address, *TOKENS)
            assert (result.code, result.out) == (0, run_cli("forward", here, *TOKENS).out), result.err
        result = remote.run("compare", "s3://models/goldens", "s3://models/hf")
        assert result.code == 0, result.err
        result = remote.run("compare", "s3://models/goldens", "s3://models/nothing")
        assert "s3://models/nothing: nothing there" in result.error
    finally:
        server.stop()


def test_a_folder_is_mended_from_its_address(remote: Remote, snapshot: Path, tmp_path: Path) -> None:
    options = ["--drop-draft", "--rename", "transformers"]
    result = remote.run("mend", REPOSITORY, tmp_path / "remote", *options)
    assert result.code == 0, result.err
    assert run_cli("mend", snapshot, tmp_path / "local", *options).code == 0
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    check_fetched_once(remote, snapshot, REPOSITORY)


def test_a_graft_from_an_address_goes_on_after_an_interruption(remote: Remote, snapshot: Path, tmp_path: Path) -> None:
    without = tmp_path / "without"
    assert run_cli("mend", snapshot, without, "--drop-draft").code == 0
    out = tmp_path / "out"
    arguments = ["mend", without, out / "mended", "--graft-draft", REPOSITORY]
    out.mkdir()
    result = remote.interrupted(*arguments, folder=out)
    assert result.code == 130, result.err
    result = remote.run(*arguments, "--resume")
    assert result.code == 0, result.err
    assert run_cli("mend", without, tmp_path / "local", "--graft-draft", snapshot).code == 0
    assert contents(out / "mended") == contents(tmp_path / "local")


def test_what_uses_its_source_up_needs_it_here(remote: Remote, snapshot: Path, tmp_path: Path) -> None:
    gguf = split_gguf(snapshot, tmp_path)
    remote.hub.repositories[REPOSITORY] = {"main": Path(shutil.copytree(tmp_path, tmp_path.parent / "hub"))}
    address = f"hf://{REPOSITORY}/{gguf.name}"
    error = remote.run("merge", address, tmp_path / "one.gguf", "--delete-parts").error
    assert "--delete-parts needs the files on this machine; download them first" in error


def test_an_address_of_another_file_is_told_its_folder(remote: Remote, snapshot: Path) -> None:
    """By its address: the place in which it is mounted goes with the run."""
    folder = f"hf://{REPOSITORY}@{snapshot.name}"
    error = remote.run("forward", f"hf://{REPOSITORY}/config.json", *TOKENS).error
    assert error == f"{folder}/config.json: a file, not a folder; pass its folder, {folder}"
