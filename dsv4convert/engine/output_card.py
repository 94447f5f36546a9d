"""The model card that an upload writes: what each output is and where it comes from, between comments of its own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..containers.destinations import WEIGHTS, Sent
from ..containers.sources import mount_of
from ..errors import counted
from ..plan import Plan
from .fingerprint import fingerprint_of

MAX_SHOWN_NOTES = 50
PARTS_NOTE = (
    "A SHA-256 with a number behind it is that of the SHA-256s of so many parts, in which the file was sent: the "
    "composite checksum of the store."
)

# What is said of an output, between comments with its name, and a row of the table of its files.
SECTION = re.compile(r"<!-- dsv4convert: begin (\S+) -->\n(.*?)<!-- dsv4convert: end \1 -->(\n*)", re.DOTALL)
FILE_ROW = re.compile(r"^\| `([^`\n]+)` \| (\d+) \| `([0-9a-f]{64}(?:-\d+)?)` \|$", re.MULTILINE)

# The folders of the hub's cache: models--OWNER--NAME/snapshots/HASH.
SNAPSHOT = re.compile(r"/models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})$")


class OutputCard:
    """What a model card says of one output; ``command`` is what was run, ``fingerprint`` tells it from any other."""

    def __init__(self, plan: Plan, command: str | None) -> None:
        self._plan = plan
        self._command = command
        self._name = _in_comment(plan.output_path().name)
        text = json.dumps(fingerprint_of(plan), sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def files_told(self, card: str) -> dict[str, Sent] | None:
        """Return the files of this very output that a card tells of; None where it tells of another one, or of none."""
        section = _sections(card).get(self._name, "")
        if self.fingerprint not in section:
            return None
        told = {found[1]: Sent(int(found[2]), found[3]) for found in FILE_ROW.finditer(section)}
        files = {file.name: told.get(_cell(file.name)) for file in self._plan.files}
        whole = {name: sent for name, sent in files.items() if sent is not None}
        return whole if len(whole) == len(files) else None

    def text(self, old: str | None, sent: Mapping[str, Sent], notes: tuple[str, ...]) -> str:
        """Return a card with this output's section, in place of an older one of the same name.

        What else an older card says stays as it is, but for sections of outputs whose files are replaced.
        """
        name = self._name
        section = f"<!-- dsv4convert: begin {name} -->\n{self._section(sent, notes)}\n<!-- dsv4convert: end {name} -->"
        if old is None or not old.strip():
            return self._head() + section + "\n"
        has_own = name in _sections(old)

        def renewed(found: re.Match[str]) -> str:
            return section + found[3] if found[1] == name else "" if self._replaces(found[2]) else found[0]

        kept = SECTION.sub(renewed, old)
        return kept if has_own else kept.rstrip() + "\n\n" + section + "\n"

    def _replaces(self, section: str) -> bool:
        """Return whether an older output, which a section is of, has lost files to this one."""
        names = {_cell(file.name) for file in self._plan.files}
        older = {found[1] for found in FILE_ROW.finditer(section)}
        return bool(names & older or (self._plan.is_folder and any(name.endswith(WEIGHTS) for name in older)))

    def _head(self) -> str:
        lines = ["---", "tags:", "- dsv4convert", "- deepseek_v4"]
        repository = _repository(self._plan.source)
        if repository is not None:
            lines += ["base_model:", f"- {repository.partition('@')[0]}"]
        return "\n".join([*lines, "---", "", f"# {_code(self._plan.output_path().name)}", "", ""])

    def _section(self, sent: Mapping[str, Sent], notes: tuple[str, ...]) -> str:
        plan = self._plan
        options = {key: value for key, value in plan.options.items() if value not in (None, False, [], (), {})}
        rows = [
            ("program", f"dsv4convert {__version__}"),
            ("command", self._command),
            ("source", _source_name(plan.source)),
            ("target", plan.target),
            *((key, _shown(value)) for key, value in options.items()),
            ("plan", self.fingerprint),
            *(("left out", f"{entry.what}: {counted(entry.count)} ({entry.reason})") for entry in plan.dropped),
            *(("note", note) for note in notes[:MAX_SHOWN_NOTES]),
        ]
        lines = [f"## {_code(plan.output_path().name)}", "", "| | conversion |", "|---|---|"]
        lines += [f"| {key} | {_code(value)} |" for key, value in rows if value is not None]
        lines += ["", "| file | bytes | SHA-256 |", "|---|---:|---|"]
        for file in plan.files:
            lines.append(f"| {_code(file.name)} | {file.nbytes} | {_code(sent[file.name].sha256)} |")
        if any("-" in sent[file.name].sha256 for file in plan.files):
            lines += ["", PARTS_NOTE]
        return "\n".join(lines)


def _repository(source: Path) -> str | None:
    """Return the repository of the hub that a source is, as OWNER/NAME@COMMIT, also where its cache is read."""
    mount = mount_of(source) or mount_of(source.parent)
    if mount is not None:
        found = re.match(r"hf://([^/]+/[^/@]+(?:@[0-9a-f]{40})?)", mount.address)
        return found[1] if found else None
    cached = SNAPSHOT.search(str(source))
    return f"{cached[1]}/{cached[2]}@{cached[3]}" if cached else None


def _source_name(source: Path) -> str:
    """Return the source as a card names it: no path of this machine."""
    repository = _repository(source)
    if repository is not None:
        return f"hf://{repository}"
    mount = mount_of(source)
    return source.name if mount is None else mount.address


def _shown(value: Any) -> str:
    """Return an option as a card shows it: of a path the name alone."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_shown(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return str(value)


def _code(text: str) -> str:
    return f"`{_cell(text)}`"


def _cell(text: str) -> str:
    """Return text that stays in its cell of a table and is no markup; of paths it keeps the last name alone."""
    text = re.sub(r"(?<![\w:/.])/(?:[^\s/'\"]+/)*([^\s/'\"]+)", r"\1", text)
    return re.sub(r"[`|]|[^ -~]", " ", text.replace("…", "..."))


def _sections(card: str) -> dict[str, str]:
    """Return what a card says of outputs, by their names."""
    return {found[1]: found[2] for found in SECTION.finditer(card)}


def _in_comment(name: str) -> str:
    return re.sub(r"[^\w.+-]|--", "_", name)
