"""Sources at an address, of which workers read their ranges themselves: the bytes of a local conversion."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.containers import sources
from dsv4convert.engine import cluster_worker
from dsv4convert.engine.cluster_worker import Piece, make_piece
from dsv4convert.engine.conversion import execute
from dsv4convert.errors import Dsv4Error
from dsv4convert.targets.dequantize import plan_dequantize

from ..clusters import HereCluster, close_ray, head, needs_ray, processes
from .hub_server import Hub
from .store_server import BUCKET, StoreServer
from .support import REPOSITORY, Remote, contents
from .test_cluster_upload import TARGET, left, whole, without_card  # noqa: F401 - a fixture
from .test_hub import CONVERSIONS, conversion, local  # noqa: F401 - a fixture

pytest.importorskip("obstore")
pytest.importorskip("moto")

SOURCE = "theirs/Small-V4"


def put_source(store: StoreServer, folder: Path) -> None:
    for path in folder.iterdir():
        store.store().put(f"{SOURCE}/{path.name}", path.read_bytes())


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ("address", "nothing there on machine .*its keys are in the environment in which Ray was started"),
        ("revision", "changed since the run looked at it; run again with --fresh"),
        ("package", r"needs the package obstore, which is missing on machine .*pip install 'dsv4convert\[stores\]'"),
    ],
)
def test_a_machine_that_does_not_see_the_source_is_told_of(
    lacks: str,
    said: str,
    store: StoreServer,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_source(store, tiny)

    def make(piece: Piece) -> Any:
        ((root, (address, revision)),) = piece.work.mounts.items()
        told = f"{address}/other" if lacks == "address" else address, "0" if lacks == "revision" else revision
        with monkeypatch.context() as patch:
            if lacks == "package":
                patch.setitem(sys.modules, "dsv4convert.containers.remote.stores", None)
            return make_piece(replace(piece, work=replace(piece.work, mounts={root: told})))

    cluster_worker._mounted.cache_clear()
    plan = plan_dequantize(sources.local_path(f"s3://{BUCKET}/{SOURCE}"), tmp_path / "out")
    with pytest.raises(Dsv4Error, match=said):
        execute(plan, cluster=HereCluster(make))


@needs_ray
@pytest.mark.parametrize("name", ["gguf", "shards"])
def test_workers_read_the_hub(
    name: str,
    remote: Remote,
    local: dict[str, dict[str, bytes]],  # noqa: F811
    tmp_path: Path,
) -> None:
    kind = CONVERSIONS[name]
    result = remote.run(*conversion(kind, REPOSITORY, tmp_path / "out"), "--workers", "ray:2")
    assert result.code == 0, result.err
    assert contents(tmp_path / "out" / kind[1]) == local[name]


@needs_ray
def test_from_store_to_store_workers_read_each_byte_once(
    store: StoreServer,
    tiny: Path,
    whole: dict[str, bytes],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token = close_ray(monkeypatch)
    put_source(store, tiny)
    of_workers = StoreServer()  # the same bucket by another address, which the workers alone know
    of_workers.start(shares=True)
    (tmp_path / "out").mkdir()
    try:
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", of_workers.endpoint)
            patch.setenv("RAY_TMPDIR", "/tmp")  # sockets need short names
            patch.setenv("TMPDIR", str(tmp_path))
            port = head(tmp_path / "head.log")
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        options = ("--max-file-size", "200K", "--upload", TARGET, "--delete-uploaded", "--workers", "ray:auto")
        run = Remote(Hub(), tmp_path / "home", store.environment)
        result = run.run("dequantize", f"s3://{BUCKET}/{SOURCE}", tmp_path / "out" / "Small-BF16", *options)
        assert result.code == 0, result.err
    finally:
        for process in processes(token, b"ray"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        of_workers.stop()
    assert without_card(store) == whole
    assert left(tmp_path / "out") == []
    assert list(tmp_path.glob("dsv4convert-*")) == []
    for path in tiny.glob("*.safetensors"):
        header_bytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        by_workers, by_run = (times_read(server, path) for server in (of_workers, store))
        assert set(by_workers[:header_bytes]) == {0}
        assert set(by_workers[header_bytes:]) == {1}
        assert max(by_run) == 1  # the header, and small tensors that a plan looks at


def times_read(server: StoreServer, path: Path) -> bytearray:
    """Return how often each byte of a file of the source was asked for."""
    counts = bytearray(path.stat().st_size)
    for key, asked in server.reads:
        if key == f"{SOURCE}/{path.name}":
            for number in asked:
                counts[number] += 1
    return counts
