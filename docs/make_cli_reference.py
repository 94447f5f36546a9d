"""Writes docs/cli.md from the program's own commands: python docs/make_cli_reference.py."""

from __future__ import annotations

from pathlib import Path

import click

from dsv4convert.cli import PROGRAM, app
from dsv4convert.cli.help import HELP_OPTION, description, panels, usage
from dsv4convert.cli.llama_cpp import LLAMA_CPP_OPTIONS
from dsv4convert.cli.parsing import OPTIONS, Command
from dsv4convert.errors import Dsv4Error

HERE = Path(__file__).resolve().parent
INTRODUCTION = """# The command line

Made by `python docs/make_cli_reference.py` from the program's own help; a test keeps it so.

Every error is one line on stderr that says what is wrong, where, what was expected, what was found and
what to do next; `dsv4convert --debug COMMAND ...` shows the traceback behind it. Progress goes to stderr
(a bar on a terminal, a line every ten seconds elsewhere), results to stdout: tables on a terminal, plain aligned
text elsewhere, and exact numbers with `--json`.

The same option has the same name and values in every command:

| option | meaning |
|---|---|
| `--draft keep|drop|only|split` | MTP layers or DSpark stages: with the model, left out, alone, or apart |
| `--experts TYPE`, `--dense TYPE` | number format of the routed experts, and of the dense linear layers |
| `--dtype TYPE` | number format of all weights (`dequantize`, `maxtext`) |
| `--max-file-size SIZE` | maximum size of an output file: `700K`, `5GB`, `45G`; units are decimal, or binary: `45GiB` |
| `--layers FIRST-LAST` | both included: `0-3`, or `5` for one layer; `forward`, `compare` and `synth` start at 0 |
| `--strict` | fail on NaN, infinity and tensors of zeros, otherwise notes; in some commands on changed elements |

## Completion

`dsv4convert --show-completion bash|zsh|fish` prints a script that completes commands, options, paths, and the values of
options with fixed choices, such as `--draft`:

    echo 'eval "$(dsv4convert --show-completion bash)"' >> ~/.bashrc
    echo 'eval "$(dsv4convert --show-completion zsh)"' >> ~/.zshrc
    dsv4convert --show-completion fish > ~/.config/fish/completions/dsv4convert.fish
"""


def reference() -> str:
    """Return the text of docs/cli.md."""
    context = app.make_context(PROGRAM, [], resilient_parsing=True)
    sections = [f"## Before the command\n\n    {usage(app, context)}\n\n{_rows(panels(app, context)[OPTIONS])}\n"]
    for name in app.list_commands(context):
        command = app.get_command(context, name)
        assert isinstance(command, Command)
        sections.append(_section(command, click.Context(command, parent=context, info_name=name)))
    return "\n".join([_escaped_tables(INTRODUCTION), *sections, _llama_cpp(), _exit_codes()])


def _section(command: Command, context: click.Context) -> str:
    lines = [f"## {command.name}", "", description(command), "", f"    {usage(command, context)}", ""]
    for title, rows in panels(command, context).items():
        shown = _rows(rows)
        if shown:
            lines += [f"{title}:", "", shown, ""]
    return "\n".join([*lines, f"Example: `{command.example}`"]) + "\n"


def _rows(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"- `{flags}`: {sentence}" for flags, sentence in rows if (flags, sentence) != HELP_OPTION)


def _llama_cpp() -> str:
    rows = [f"| `{option}` | {answer} |" for option, answer in LLAMA_CPP_OPTIONS.items()]
    head = "Options of llama.cpp's `convert_hf_to_gguf.py` that `hf-to-gguf` answers with the one to use instead:"
    return "\n".join(["## Coming from llama.cpp", "", head, "", "| option | answer |", "|---|---|", *rows, ""])


def _exit_codes() -> str:
    public = (kind for kind in _subclasses(Dsv4Error) if not kind.__name__.startswith("_"))
    kinds = sorted(public, key=lambda kind: kind.exit_code)
    rows = [f"| {kind.exit_code} | {(kind.__doc__ or '').splitlines()[0]} |" for kind in kinds]
    return "\n".join(
        ["## Exit codes", "", "| code | meaning |", "|---|---|", "| 0 | Done. |", *rows, "| 70 | A bug of ours. |", ""]
    )


def _escaped_tables(text: str) -> str:
    """Return Markdown in which the bars between the values of an option do not end a table's cell."""
    lines = text.splitlines()
    return (
        "\n".join(
            "`".join(part.replace("|", "\\|") if i % 2 else part for i, part in enumerate(line.split("`")))
            if line.startswith("|")
            else line
            for line in lines
        )
        + "\n"
    )


def _subclasses(kind: type[Dsv4Error]) -> list[type[Dsv4Error]]:
    return [k for direct in kind.__subclasses__() for k in (direct, *_subclasses(direct))]


if __name__ == "__main__":
    (HERE / "cli.md").write_text(reference(), encoding="utf-8")
