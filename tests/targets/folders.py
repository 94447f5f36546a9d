"""Copies of small checkpoints to damage, and conversions without the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dsv4convert.checkpoint import open_folder
from dsv4convert.engine.conversion import Summary, execute
from dsv4convert.engine.loss import refuse_loss
from dsv4convert.errors import InventoryError
from dsv4convert.targets.dequantize import plan_dequantize
from dsv4convert.targets.repack import plan_repack, summarize_repack

from ..command_line import run_cli

Edit = Callable[[np.ndarray[Any, Any]], None]


class Editable:
    """A checkpoint folder whose tensors can be changed where they lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def edit(self, name: str, change: Edit) -> None:
        """Change the bytes [rows, row bytes] of a weight, or of its scale if ``name`` ends in ``.scale``."""
        weight = open_folder(self.folder).weights[name.removesuffix(".scale").removesuffix(".weight") + ".weight"]
        stored = weight.scale if name.endswith(".scale") else weight.stored
        assert stored is not None
        with stored.file.open("r+b") as file:
            file.seek(stored.offset)
            rows = np.frombuffer(bytearray(file.read(stored.nbytes)), np.uint8).reshape(stored.shape[0], -1)
            change(rows)
            file.seek(stored.offset)
            file.write(rows.tobytes())

    def edit_config(self, **changes: Any) -> None:
        """Set keys of config.json."""
        path = self.folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusals(source: Path, folder: Path) -> dict[str, str]:
    """Return what each command that reads every weight of a folder says of one that cannot be read."""
    commands: dict[str, list[Any]] = {
        "hf-to-gguf": [folder / "a.gguf"],
        "shard": [folder / "s", "--mp", "2"],
        "dequantize": [folder / "d"],
        "repack": [folder / "r", "--experts", "fp8"],
        "forward": ["--tokens", "1,2,3,4,5,6"],
        "check": [],
    }
    said: dict[str, str] = {}
    for command, options in commands.items():
        result = run_cli(command, source, *options)
        assert result.code == InventoryError.exit_code, (command, result.out, result.err)
        said[command] = result.error
    return said


def dequantize(source: Path, out: Path, *, strict: bool = False, overwrite: bool = False, **options: Any) -> Summary:
    hook = refuse_loss if strict else None
    return execute(plan_dequantize(source, out, **options), threads=2, overwrite=overwrite, before_finish=hook)


def repack(source: Path, out: Path, *, require_lossless: bool = False, **options: Any) -> Any:
    hook = refuse_loss if require_lossless else None
    plan = plan_repack(source, out, **options)
    return summarize_repack([plan], execute(plan, threads=2, before_finish=hook))
