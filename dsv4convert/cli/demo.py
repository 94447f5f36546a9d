"""The demo command: a tiny checkpoint, converted and read back, on any machine."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import typer

from ..errors import VerifyError
from ..html_report.figures import human_bytes
from .parsing import TRY, command, option


@command("demo", panel=TRY, example="dsv4convert demo")
@option("--seed", type=click.IntRange(0), metavar="N", default=0, help="Random seed of the weights.")
def demo(seed: int) -> None:
    """Make a tiny checkpoint in a temporary folder, convert it, and read it back."""
    from ..api import convert_gguf, verify
    from ..containers.gguf import open_gguf
    from ..synth.write import write_synth
    from .report import print_summary

    with tempfile.TemporaryDirectory(prefix="dsv4convert-demo-") as name:
        folder = Path(name)
        made = write_synth(folder / "checkpoint", "tiny", seed=seed)
        typer.echo(
            f"1. made a DeepSeek-V4 checkpoint of {made.tensors} tensors, {human_bytes(made.payload_bytes)}, "
            f"in {made.files} safetensors files"
        )
        typer.echo("2. converted it:")
        out = folder / "model.gguf"
        print_summary(convert_gguf(folder / "checkpoint", out, threads=2), gone="removed when the demo ends")
        model = open_gguf(out)
        kinds: dict[str, int] = {}
        for tensor in model.tensors.values():
            kinds[tensor.type] = kinds.get(tensor.type, 0) + 1
        typer.echo(
            f"3. read it back: {model.metadata['general.architecture']}, {len(model.metadata)} keys, "
            + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        )
        report = verify(folder / "checkpoint", out, threads=1)
        if not report.ok:
            raise VerifyError(f"the output differs from the source: {report.problems[0]}", where=out)
        typer.echo("4. compared every tensor with its source: all as they must be")
