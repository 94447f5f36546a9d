"""The process between a run and Ray: it submits tasks for the run and passes their results on.

Ray ends a process of its cluster whose head is lost, as it likes and when it likes. This one may be ended so; the run,
which has the journal, sees it end and says so in one line.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from ..errors import DeviceError, Dsv4Error, InputOutputError
from .cluster_worker import FinalError, FinishedFile, NewFile, Piece, make_file, make_piece, send_file

WORKERS = re.compile(r"ray(?::(?P<count>[1-9]\d{0,3})|(?P<here>:auto)|://(?P<address>[^\s/]+:\d+))?")

HERE = "ray:auto"

# How often a task is begun again whose worker or machine died, or whose reads or writes failed.
RETRIES = 10

ANSWER_SECONDS = 5.0
LOOK_SECONDS = 3.0  # how often to look for machines that joined or left, and for the head
LOST_SECONDS = 20.0  # for so long the head may be gone, as while it is restarted with its state

# The least that Ray takes; results of tasks are a few KiB.
OBJECT_STORE_BYTES = 80 * 2**20

CANNOT_REACH = "the Ray cluster cannot be reached"
REACH_HINT = (
    "check that it runs, that Ray and Python have the same versions there and here, and that RAY_AUTH_MODE=token is "
    "set here too if it wants a token"
)


AnyPiece = Piece | NewFile | FinishedFile
MAKE: Mapping[type[AnyPiece], Callable[[Any], Any]] = {
    Piece: make_piece,
    NewFile: make_file,
    FinishedFile: send_file,
}


class Submit(NamedTuple):
    """A task for the cluster, best on machine ``node``."""

    number: int
    node: str
    piece: AnyPiece


class Done(NamedTuple):
    """What became of a task: what its function returned, or raised."""

    number: int
    made: Any


class Nodes(NamedTuple):
    """The machines of the cluster, each with its number of processors."""

    processors: Mapping[str, int]


def serve(descriptor: int) -> None:
    """Join the cluster that the other end names, then carry out its tasks until it closes.

    What is sent back is ``Nodes`` now and then, a ``Done`` for each task, or the error that ended all.
    """
    connection = Connection(descriptor)
    sending = threading.Lock()

    def send(message: Nodes | Done | Exception) -> None:
        with sending, suppress(OSError):  # the run may be gone
            connection.send(message)

    try:
        address = _join(connection.recv())
        send(_nodes())
        threading.Thread(target=_watch, args=(address, send), daemon=True).start()
        with suppress(EOFError, OSError):
            while True:
                _submit(connection.recv(), send)
    except Exception as error:  # noqa: BLE001 - said by the run
        send(error)
    leaving = threading.Thread(target=_leave, daemon=True)
    leaving.start()
    leaving.join(ANSWER_SECONDS)
    os._exit(0)  # Ray waits for a head that is lost


def _join(workers: str) -> str:
    """Join the cluster that ``workers`` names, or start one on this machine; return the address of its head.

    Raises:
        DeviceError: it cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a conversion reports to nobody
    named = WORKERS.fullmatch(workers)
    is_local = named is None or not (named["address"] or named["here"])
    if is_local:  # Ray's processes then listen at 127.0.0.1 alone; read when Ray is imported, here and in its processes
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    head = ""
    if named is not None and named["address"]:
        options["address"], head = workers, named["address"]
    elif named is not None and named["here"]:
        options["address"], head = "auto", address_here()
    else:
        count = int(named["count"]) if named is not None and named["count"] else len(os.sched_getaffinity(0))
        options |= {"address": "local", "num_cpus": count, "include_dashboard": False}
        options |= {"object_store_memory": OBJECT_STORE_BYTES}
    try:
        if head:
            _knock(head)
        ray.init(**options)
    except (OSError, RuntimeError, ValueError) as error:
        got = str(error).strip().split("\n")[0]
        raise DeviceError(CANNOT_REACH, where=workers, got=got, hint=REACH_HINT) from None
    return named["address"] if named is not None and named["address"] else ray.get_runtime_context().gcs_address


def address_here() -> str:
    """Return the address of the cluster that ``RAY_ADDRESS`` names, empty where it names none."""
    named = os.environ.get("RAY_ADDRESS", "")
    return "" if named == "auto" else named


def _leave() -> None:
    import ray

    with suppress(Exception):  # the cluster may be gone
        ray.shutdown()


def _knock(address: str) -> None:
    """Check that something listens at HOST:PORT, since Ray itself would wait for minutes.

    Raises:
        OSError: nothing does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, min(int(port), 65535)), timeout=ANSWER_SECONDS).close()


def _nodes() -> Nodes:
    import ray

    return Nodes({node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]})


def _watch(address: str, send: Any) -> None:
    """Tell the run of the cluster's machines, and when its head is lost."""
    answered = time.monotonic()
    while True:
        time.sleep(LOOK_SECONDS)
        try:
            _knock(address)
            answered = time.monotonic()
            send(_nodes())
        except Exception as error:  # noqa: BLE001 - Ray's own errors are of many classes
            if time.monotonic() - answered > LOST_SECONDS:
                send(InputOutputError("the head of the Ray cluster was lost", where=address, got=error))
                return


@cache
def _remote(make: Any) -> Any:
    """Return a worker's function as Ray knows it; made once, since each new one is pickled and sent to the cluster."""
    import ray

    return ray.remote(num_cpus=1, max_retries=RETRIES, retry_exceptions=[InputOutputError])(make)


def _submit(task: Submit, send: Any) -> None:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    near = NodeAffinitySchedulingStrategy(task.node, soft=True)
    make = _remote(MAKE[type(task.piece)])
    reference = make.options(scheduling_strategy=near).remote(task.piece)
    reference.future().add_done_callback(partial(_pass_on, task.number, send))


def _pass_on(number: int, send: Any, future: Any) -> None:
    error = future.exception()
    if error is None:
        send(Done(number, future.result()))
        return
    cause = getattr(error, "cause", None)
    if isinstance(cause, FinalError):
        send(Done(number, cause.args[0]))
    elif isinstance(cause, Dsv4Error):
        send(Done(number, cause))
    elif cause is not None:
        send(Done(number, RuntimeError(f"{type(cause).__name__}: {cause}")))
    else:  # of Ray: the worker died too often, or the cluster is lost
        said = str(error).strip().split("\n")[0] or type(error).__name__
        send(Done(number, InputOutputError(f"a task was given up by Ray, after up to {RETRIES} retries", got=said)))
