"""Conversions of a folder on a web server whose link and connections are limited: what share of the link is used.

    python benchmarks/remote.py --save benchmarks/results/remote.json

The server is a process of its own on this machine. Each connection sends at most so many bytes a second, all of them
together at most as many as the link carries, and an answer begins after a delay. The share is counted from the first
request to the last byte, planning and headers included, and for the median second; bytes are counted as sent, which
shows that none is sent twice.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import shutil
import statistics
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from side_by_side import Contender, circumstances, make_flash_slice, remove, run_once, save

PIECE_BYTES = 2**16
# MB/s of the link, MB/s of a connection, seconds before an answer.
LINKS = {
    "32 MB/s, 2 a connection": (32, 2, 0.03),
    "200 MB/s, 10 a connection": (200, 10, 0.03),
    "400 MB/s, 100 a connection": (400, 100, 0.03),
}
COMMANDS = {
    "dequantize": ("dequantize", ["--draft", "drop"]),
    "hf-to-gguf": ("hf-to-gguf", []),
    "shard --mp 2": ("shard", ["--mp", "2"]),
}


class Link:
    """Bytes that all connections send together, and when the first was asked for and the last one sent."""

    def __init__(self, rate: float, connection_rate: float, delay: float) -> None:
        self.rate, self.connection_rate, self.delay = rate, connection_rate, delay
        self.lock = threading.Lock()
        self.free_at = 0.0
        self.sent = 0
        self.sent_in_second: dict[int, int] = {}
        self.first: float | None = None
        self.last = 0.0

    def reserve(self, count: int) -> float:
        """Return when ``count`` bytes are over the link."""
        with self.lock:
            self.free_at = max(time.monotonic(), self.free_at) + count / self.rate
            return self.free_at

    def note(self, count: int) -> None:
        with self.lock:
            self.sent += count
            self.last = time.monotonic()
            second = int(self.last - (self.first or 0.0))
            self.sent_in_second[second] = self.sent_in_second.get(second, 0) + count


class Handler(BaseHTTPRequestHandler):
    """Files by ranges, as slowly as the link and the connection want it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    folder: Path
    link: Link

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        link = self.link
        if link.first is None:
            link.first = time.monotonic()
        time.sleep(link.delay)
        path = self.folder / Path(self.path).name
        size = path.stat().st_size if path.is_file() else 0
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        begin, end = (int(asked[1]), int(asked[2]) + 1) if asked else (0, size)
        self.send_response(404 if not path.is_file() else 206 if asked else 200)
        self.send_header("ETag", '"same"')
        self.send_header("Content-Length", str(end - begin))
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD" or not path.is_file():
            return
        free_at = time.monotonic()
        with path.open("rb") as file:
            file.seek(begin)
            for at in range(begin, end, PIECE_BYTES):
                piece = file.read(min(PIECE_BYTES, end - at))
                free_at = max(free_at + len(piece) / link.connection_rate, link.reserve(len(piece)))
                time.sleep(max(0.0, free_at - time.monotonic()))
                self.wfile.write(piece)
                link.note(len(piece))


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def serve(folder: Path, limits: tuple[float, float, float], pipe: Connection) -> None:
    """Serve a folder until told to end; then tell what was sent, and in how many seconds."""
    rate, connection_rate, delay = limits
    Handler.folder, Handler.link = folder, Link(rate * 1e6, connection_rate * 1e6, delay)
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pipe.send(server.server_address[1])
    pipe.recv()
    link = Handler.link
    pipe.send((link.sent, link.last - (link.first or 0.0), statistics.median(link.sent_in_second.values())))


def measure(name: str, source: Path, folder: Path, limits: tuple[float, float, float], threads: int) -> dict[str, Any]:
    """Convert from a limited server once; return what it took."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(source, limits, theirs), daemon=True)
    server.start()
    command, options = COMMANDS[name]
    target = folder / "out"
    place = target / "model.gguf" if command == "hf-to-gguf" else target / "model"
    line = [sys.executable, "-m", "dsv4convert", command, f"http://127.0.0.1:{ours.recv()}", str(place), "--quiet"]
    line += [*options, *(["--threads", str(threads)] if threads else [])]
    environment = {"HF_HUB_OFFLINE": "0"}
    used = run_once(Contender(name, line, target, environment=environment, makes_folder_first=True))
    remove(target)
    ours.send(None)
    sent, busy, median = ours.recv()
    server.join()
    return {
        "command": name,
        "sent_bytes": sent,
        "seconds_from_first_request_to_last_byte": round(busy, 2),
        "seconds": round(used.seconds, 2),
        "share_of_link": round(sent / busy / (limits[0] * 1e6), 3),
        "share_of_link_in_median_second": round(median / (limits[0] * 1e6), 3),
        "peak_mebibytes": round(used.peak_bytes / 2**20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/dsv4convert-bench-remote"))
    parser.add_argument("--experts", type=int, default=8, help="routed experts a layer: the size of the source")
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    source = arguments.folder / f"flash-slice-{arguments.experts}"
    make_flash_slice(source, arguments.experts)
    nbytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    print(f"{nbytes / 1e9:.2f} GB", flush=True)
    rows = []
    for link in arguments.links:
        for name in arguments.commands:
            row = {"link": link} | measure(name, source, arguments.folder, LINKS[link], arguments.threads)
            rows.append(row)
            print(
                f"{link:<28} {name:<14} {row['seconds']:6.1f} s  {row['share_of_link']:5.2f} of the link, "
                f"{row['share_of_link_in_median_second']:5.2f} in the median second  "
                f"{row['sent_bytes'] / nbytes:5.3f} of the source's bytes sent  {row['peak_mebibytes']} MiB",
                flush=True,
            )
    shutil.rmtree(arguments.folder)
    if arguments.save is not None:
        save({**circumstances(), "source_bytes": nbytes, "results": rows}, arguments.save)


if __name__ == "__main__":
    main()
