"""Conversions from, and to, a server whose link and connections are limited: what share of the link is used.

    python benchmarks/remote.py --save benchmarks/results/remote.json
    python benchmarks/remote.py --upload --save benchmarks/results/remote_upload.json

The server (``limited_server.py``) is several processes on this machine. Each connection carries at most so many bytes
a second, all of them together at most as many as the link carries, and an answer begins after a delay. The share is
counted from the first request to the last byte, planning and headers included, and for the median second; bytes are
counted as sent, which shows that none is sent twice. A reference of every link is what bare sockets get from the
server, by ranges of the same size. Sources are a folder on a web server (http) or in a store (s3); with ``--upload``
the source is on this machine and the output goes to the store, each file while the next is made.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from limited_server import BUCKET, KEYS, LimitedServer, Limits, Traffic, limited_server, streams
from side_by_side import Contender, circumstances, compile_package, make_flash_slice, remove, run_once, save

from dsv4convert.containers.fetching import BLOCK_BYTES, CONNECTIONS

# By name: MB/s of the link and of a connection, and seconds before an answer.
LINKS = {
    f"{link} MB/s, {connection} a connection": Limits(link * 1e6, connection * 1e6, 0.03)
    for link, connection in ((32, 2), (200, 10), (200, 100), (400, 100), (800, 100))
} | {"no limit": Limits(0, 0, 0)}
COMMANDS = {
    "dequantize": ("dequantize", ["--draft", "drop"]),
    "hf-to-gguf": ("hf-to-gguf", []),
    "shard --mp 2": ("shard", ["--mp", "2"]),
}
SCHEMES = ("http", "s3")
BARE = "bare sockets"


def traffic_row(traffic: Traffic, limits: Limits) -> dict[str, Any]:
    """Return what went over a link, and what share of it that is."""
    rate = traffic.sent / traffic.seconds
    row: dict[str, Any] = {
        "sent_bytes": traffic.sent,
        "seconds_from_first_request_to_last_byte": round(traffic.seconds, 2),
        "megabytes_per_second": round(rate / 1e6, 1),
        "connections_opened": traffic.connections,
    }
    if limits.link:
        row["share_of_link"] = round(rate / limits.link, 3)
        row["share_of_link_in_median_second"] = round(traffic.in_median_second / limits.link, 3)
    return row


def measure(
    name: str, source: str, folder: Path, server: LimitedServer, threads: int, upload: str | None = None
) -> dict[str, Any]:
    """Convert once; return what it took."""
    command, options = COMMANDS[name]
    target = folder / "out"
    place = target / "model.gguf" if command == "hf-to-gguf" else target / "model"
    line = [sys.executable, "-m", "dsv4convert", command, source, str(place), "--quiet", *options]
    line += [] if upload is None else ["--max-file-size", "500M"] if command != "shard" else []
    line += [] if upload is None else ["--upload", upload, "--overwrite"]
    line += ["--threads", str(threads)] if threads else []
    environment = {"HF_HUB_OFFLINE": "0", "AWS_ENDPOINT_URL": server.url, **KEYS}
    server.link.traffic()
    used = run_once(Contender(name, line, target, environment=environment, makes_folder_first=True))
    remove(target)
    return {
        "command": name,
        **traffic_row(server.link.traffic(), server.link.limits),
        "seconds": round(used.seconds, 2),
        "processor_seconds": round(used.processor_seconds, 2),
        "peak_mebibytes": round(used.peak_bytes / 2**20),
    }


def report(row: dict[str, Any]) -> None:
    """Print a row."""
    cells = [
        f"{row['link']:<28} {row['from']:<6} {row['command']:<14}",
        f"{row['seconds_from_first_request_to_last_byte']:6.1f} s",
        f"{row['megabytes_per_second']:7.1f} MB/s",
    ]
    if "share_of_link" in row:
        cells.append(f"{row['share_of_link']:5.3f} of the link")
        cells.append(f"{row['share_of_link_in_median_second']:5.3f} in the median second")
    cells.append(f"{row['connections_opened']} connections")
    if "seconds" in row:
        cells += [f"{row['processor_seconds']:5.1f} s of processors", f"{row['peak_mebibytes']} MiB"]
    print("  ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/dsv4convert-bench-remote"))
    parser.add_argument("--experts", type=int, default=8, help="routed experts a layer: the size of the source")
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--commands", nargs="+", choices=[BARE, *COMMANDS], default=[BARE, *COMMANDS])
    parser.add_argument("--from", nargs="+", choices=SCHEMES, default=["http"], dest="schemes")
    parser.add_argument("--upload", action="store_true", help="from this machine to the store, instead")
    parser.add_argument("--processes", type=int, default=4, help="of the server")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    source = arguments.folder / f"flash-slice-{arguments.experts}"
    make_flash_slice(source, arguments.experts)
    compile_package()
    files = sorted(source.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    nbytes = sum(path.stat().st_size for path in files)
    print(f"{nbytes / 1e9:.2f} GB", flush=True)
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        report(row)

    for link in arguments.links:
        limits = LINKS[link]
        # Objects that are sent are known to one process.
        with limited_server(source, limits, 1 if arguments.upload else arguments.processes) as server:
            if BARE in arguments.commands and not arguments.upload:
                traffic = streams(server, files[-1].name, CONNECTIONS, arguments.processes, BLOCK_BYTES)
                add({"link": link, "from": "http", "command": BARE, **traffic_row(traffic, limits)})
            for scheme in ["folder"] if arguments.upload else arguments.schemes:
                address = {"http": server.url, "s3": f"s3://{BUCKET}/source", "folder": str(source)}[scheme]
                for name in (name for name in arguments.commands if name != BARE):
                    for number in range(arguments.rounds):
                        upload = f"s3://{BUCKET}/{name.partition(' ')[0]}-{number}" if arguments.upload else None
                        row = measure(name, address, arguments.folder, server, arguments.threads, upload)
                        add({"link": link, "from": scheme, **row})
    shutil.rmtree(arguments.folder)
    if arguments.save is not None:
        facts = {"source_bytes": nbytes, "server_processes": arguments.processes, "results": rows}
        save({**circumstances(), **facts}, arguments.save)


if __name__ == "__main__":
    main()
