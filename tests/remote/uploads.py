"""What tests of files that the workers of a cluster send to a store have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4convert.engine.cluster_bridge import MAKE
from dsv4convert.engine.cluster_worker import NewFile, make_file
from dsv4convert.engine.conversion import Summary, execute
from dsv4convert.engine.upload import Upload, Uploading
from dsv4convert.plan import Plan
from dsv4convert.targets.dequantize import plan_dequantize

from ..clusters import HereCluster
from .store_server import StoreServer

PREFIX = "mine/Small-V4"
TARGET = f"s3://models/{PREFIX}"
INDEX = "model.safetensors.index.json"


def without_card(store: StoreServer) -> dict[str, bytes]:
    return {name: content for name, content in store.contents(PREFIX).items() if name != "README.md"}


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def plan_of(source: Path, folder: Path) -> Plan:
    folder.mkdir(exist_ok=True)
    return plan_dequantize(source, folder / "Small-BF16", max_file_bytes=200_000)


def made(piece: Any) -> Any:
    return MAKE[type(piece)](piece)


def failing_after(count: int, error: Exception) -> Callable[[NewFile], Any]:
    """Return what makes so many files or parts, and then fails."""
    made = 0

    def make(file: NewFile) -> Any:
        nonlocal made
        made += 1
        if made > count:
            raise error
        return make_file(file)

    return make


def carry_out(
    plan: Plan, make: Callable[..., Any] = made, *, delete: bool = True, target: str = TARGET, **options: Any
) -> tuple[HereCluster, Summary]:
    """Have the files made by tasks, in this process, and the upload finished."""
    cluster = HereCluster(make)
    wanted = {name: options[name] for name in ("overwrite", "resume") if name in options}
    uploading = Uploading(plan, Upload(target, delete), **wanted)
    with uploading.abandoned_with_the_run():
        summary = execute(plan, cluster=cluster, uploading=uploading, record_seconds=0.05, **options)
    uploading.finish(summary.notes, cluster)
    return cluster, summary
