"""Ranges of one file by several libraries over as many connections: obstore, s3fs, fsspec's http, the hub's client.

    python -m venv /tmp/libraries && /tmp/libraries/bin/pip install -e '.[stores]' s3fs aiohttp
    /tmp/libraries/bin/python benchmarks/remote_libraries.py --save benchmarks/results/remote_libraries.json

s3fs, aiohttp and fsspec are needed here alone. Each contender is a process that takes a file by blocks as a conversion
does: a thread for each connection asks for the next block and copies it into a buffer of its own. ``through`` is what
takes the bytes: a library as its pages show it, or the transports of this package. Bare sockets are the reference, and
the server (``limited_server.py``) is several processes on this machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from limited_server import BUCKET, KEYS, Limits, head_size, limited_server, stream
from side_by_side import Contender, circumstances, run_once, save

BLOCK_BYTES = 2 * 2**20
NAME = "model.safetensors"
Fetch = Callable[[int, int, memoryview], None]  # begin, end, and where the bytes go


def through_obstore_s3(url: str, size: int) -> Fetch:
    from obstore.store import S3Store

    store = S3Store(BUCKET, endpoint=url, client_options={"allow_http": True})
    return _obstore_get(store, NAME)


def through_obstore_http(url: str, size: int) -> Fetch:
    from obstore.store import HTTPStore

    return _obstore_get(HTTPStore.from_url(url, client_options={"allow_http": True}), NAME)


def _obstore_get(store: Any, key: str) -> Fetch:
    import obstore

    def fetch(begin: int, end: int, view: memoryview) -> None:
        view[:] = memoryview(obstore.get_range(store, key, start=begin, end=end))

    return fetch


def through_s3fs(url: str, size: int) -> Fetch:
    import s3fs

    files = s3fs.S3FileSystem(
        endpoint_url=url, config_kwargs={"max_pool_connections": 64, "retries": {"total_max_attempts": 1}}
    )
    return _fsspec_cat(files, f"{BUCKET}/{NAME}")


def through_fsspec_http(url: str, size: int) -> Fetch:
    import fsspec

    return _fsspec_cat(fsspec.filesystem("http"), f"{url}/{NAME}")


def _fsspec_cat(files: Any, path: str) -> Fetch:
    def fetch(begin: int, end: int, view: memoryview) -> None:
        view[:] = files.cat_file(path, start=begin, end=end)

    return fetch


def through_ours_s3(url: str, size: int) -> Fetch:
    from dsv4convert.containers.remote.stores import StoreRanges, open_store

    store, _, address = open_store("s3", BUCKET)
    return _transport(StoreRanges(store, NAME, address, "e_tag", '"same"'), address)


def through_ours_http(url: str, size: int) -> Fetch:
    from dsv4convert.containers.remote.http import HttpRanges

    address = f"{url}/{NAME}"
    return _transport(HttpRanges(address, address, size, ("ETag", '"same"')), address)


def _transport(transport: Any, address: str) -> Fetch:
    from dsv4convert.containers.fetching import Stream

    def fetch(begin: int, end: int, view: memoryview) -> None:
        with Stream(transport, address, begin, end) as pieces:
            pieces.read_into(view)

    return fetch


THROUGH: dict[str, tuple[str, Callable[[str, int], Fetch] | None]] = {
    "bare sockets": ("http", None),
    "obstore, S3": ("s3", through_obstore_s3),
    "s3fs": ("s3", through_s3fs),
    "this package, S3 (obstore)": ("s3", through_ours_s3),
    "obstore, http": ("http", through_obstore_http),
    "fsspec, http (aiohttp)": ("http", through_fsspec_http),
    "this package, http": ("http", through_ours_http),
}
# By name: MB/s of the link and of a connection, seconds before an answer; and connections.
LINKS = {
    "no limit": Limits(0, 0, 0),
    "400 MB/s, 100 a connection": Limits(400e6, 100e6, 0.03),
    "800 MB/s, 100 a connection": Limits(800e6, 100e6, 0.03),
}


def take(name: str, url: str, connections: int) -> None:
    """Take the whole file; what a contender's process does."""
    through = THROUGH[name][1]
    if through is None:
        stream(url, NAME, connections, 0, 1, BLOCK_BYTES)
        return
    size = head_size(*url.removeprefix("http://").split(":"), NAME)
    fetch, blocks, lock = through(url, size), iter(range(0, size, BLOCK_BYTES)), threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        buffer = memoryview(bytearray(BLOCK_BYTES))
        try:
            while not errors:
                with lock:
                    begin = next(blocks, None)
                if begin is None:
                    return
                end = min(begin + BLOCK_BYTES, size)
                fetch(begin, end, buffer[: end - begin])
        except Exception as error:  # noqa: BLE001 - raised by the main thread
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/dsv4convert-bench-libraries"))
    parser.add_argument("--megabytes", type=int, default=4000)
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--through", nargs="+", choices=THROUGH, default=list(THROUGH))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=4, help="of the server")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--take", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.take:
        take(arguments.take[0], arguments.take[1], int(arguments.take[2]))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    piece = os.urandom(10**6)
    with (arguments.folder / NAME).open("wb") as file:
        for _ in range(arguments.megabytes):
            file.write(piece)
    rows = []
    for link in arguments.links:
        with limited_server(arguments.folder, LINKS[link], arguments.processes) as server:
            for connections in arguments.connections:
                for name in arguments.through:
                    row = measure(name, link, connections, server, arguments)
                    rows.append(row)
                    cells = [
                        f"{link:<28} {connections:>3} connections  {name:<38}",
                        f"{row['megabytes_per_second']:7.1f} MB/s",
                        f"{row['processor_seconds_per_gigabyte']:5.2f} s of processors a GB",
                        f"{row['peak_mebibytes']} MiB",
                        f"{row['connections_opened']} opened",
                    ]
                    print("  ".join(cells), flush=True)
    shutil.rmtree(arguments.folder)
    if arguments.save is not None:
        names = ("obstore", "s3fs", "fsspec", "aiohttp", "aiobotocore", "huggingface_hub", "httpx2")
        facts: dict[str, Any] = {"versions": {name: version(name) for name in names}, "block_bytes": BLOCK_BYTES}
        save({**circumstances(), **facts, "file_bytes": arguments.megabytes * 10**6, "results": rows}, arguments.save)


def measure(name: str, link: str, connections: int, server: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Have a contender take the file ``rounds`` times; return the round of the median rate."""
    line = [sys.executable, __file__, "--take", name, server.url, str(connections)]
    environment = {"HF_HUB_OFFLINE": "0", "AWS_ENDPOINT_URL": server.url, **KEYS}
    found = []
    for _ in range(arguments.rounds):
        server.link.traffic()
        used = run_once(Contender(name, line, arguments.folder / "none", environment=environment))
        traffic = server.link.traffic()
        found.append((traffic.sent / traffic.seconds, traffic, used))
    found.sort(key=lambda each: each[0])
    rate, traffic, used = found[len(found) // 2]
    return {
        "link": link,
        "connections": connections,
        "through": name,
        "protocol": THROUGH[name][0],
        "sent_bytes": traffic.sent,
        "connections_opened": traffic.connections,
        "megabytes_per_second": round(rate / 1e6, 1),
        "all_megabytes_per_second": [round(each[0] / 1e6, 1) for each in found],
        "processor_seconds_per_gigabyte": round(used.processor_seconds / (traffic.sent / 1e9), 2),
        "peak_mebibytes": round(max(each[2].peak_bytes for each in found) / 2**20),
    }


if __name__ == "__main__":
    main()
