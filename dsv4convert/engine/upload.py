"""Sending the files of an output elsewhere: each while the next is made, shown as whole when all is done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..containers.destinations import CARD_NAME, WEIGHTS, Destination, Sent, open_destination
from ..containers.presence import is_file
from ..containers.sources import mount_of
from ..errors import InputOutputError, RunInterruptedError, UsageError
from ..plan import Plan
from .fingerprint import fingerprint_of
from .journal import journal_path
from .manifest import is_of, manifest_path, remove_manifest
from .outputs import os_errors

# Files that are sent at once: the hub's library sends the parts of a file one after another.
SENDERS = 4
POLL_SECONDS = 0.1
MAX_SHOWN_NOTES = 50
FINISHED_HINT = "the output is finished here: run again with --resume"

# In a card: what is said of an output, between comments with its name, and a row of the table of its files.
SECTION = re.compile(r"<!-- dsv4convert: begin (\S+) -->\n(.*?)<!-- dsv4convert: end \1 -->(\n*)", re.DOTALL)
FILE_ROW = re.compile(r"^\| `([^`\n]+)` \| (\d+) \| `([0-9a-f]{64})` \|$", re.MULTILINE)

# The folders of the hub's cache: models--OWNER--NAME/snapshots/HASH.
SNAPSHOT = re.compile(r"/models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})$")


@dataclass(frozen=True)
class Upload:
    """Where to send an output: OWNER/NAME on the hub, or the address of a folder in a store.

    ``delete`` removes the local files once they are there. ``command`` is what the model card says was run.
    """

    address: str
    delete: bool = False
    command: str | None = None


class Uploading:
    """One output on its way; ``file_done`` may be called by any thread, the rest by the one that runs the plan."""

    def __init__(self, plan: Plan, upload: Upload, *, overwrite: bool = False, resume: bool = False) -> None:
        if any(file.name == CARD_NAME for file in plan.files):
            raise UsageError(f"--upload: the output has a {CARD_NAME} of its own", where=plan.output_path())
        self._plan = plan
        self._upload = upload
        self._destination: Destination = open_destination(upload.address)
        self._overwrite, self._resume = overwrite, resume
        self._fingerprint = _fingerprint(plan)
        self._name = _in_comment(plan.output_path().name)
        self._has_begun = False
        self._sent: dict[str, Sent] = {}
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[tuple[str, Path] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._error: Exception | None = None

    def begin(self) -> None:
        """Make sure that the destination takes the files, before any of them is made.

        Raises:
            Dsv4Error: see ``Destination.begin``.
        """
        if self._has_begun:
            return
        self._destination.begin(
            [file.name for file in self._plan.files],
            is_folder=self._plan.is_folder,
            overwrite=self._overwrite,
            resume=self._resume,
        )
        self._has_begun = True

    def file_done(self, index: int, path: Path) -> None:
        """Send a file that is whole, under whichever name it has now."""
        if not self._threads:
            self._threads = [threading.Thread(target=self._send_all, daemon=True) for _ in range(SENDERS)]
            for thread in self._threads:
                thread.start()
        self._waiting.put((self._plan.files[index].name, path))

    def settle(self) -> None:
        """Wait for the files that are being sent; those that wait keep waiting, since names are about to change."""
        self.close()
        self._join()

    def close(self) -> None:
        """Send nothing more; what is being sent ends by itself, and nobody takes it for whole."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()
        for _ in self._threads:
            self._waiting.put(None)

    def _join(self) -> None:
        for thread in self._threads:
            while thread.is_alive():
                thread.join(POLL_SECONDS)
        self._threads = []

    def finish(self, notes: tuple[str, ...]) -> str:
        """Send what is left of the finished output, show all of it to readers, and return its address.

        Raises:
            RunInterruptedError: Ctrl-C.
            Dsv4Error: see ``Destination``; the local output stays.
        """
        try:
            return self._finish(notes)
        except KeyboardInterrupt:
            raise RunInterruptedError("interrupted", where=self._destination.address, hint=FINISHED_HINT) from None
        except InputOutputError as error:
            raise error.with_changes(hint=f"{error.hint}; {FINISHED_HINT}" if error.hint else FINISHED_HINT) from None

    def _finish(self, notes: tuple[str, ...]) -> str:
        self.begin()
        paths = {file.name: path for file, path in zip(self._plan.files, self._plan.final_paths(), strict=True)}
        for index, file in enumerate(self._plan.files):
            if file.name not in self._sent and self._error is None:
                self.file_done(index, paths[file.name])
        for _ in self._threads:
            self._waiting.put(None)
        self._join()
        if self._error is not None:
            raise self._error
        files = {name: (paths[name], self._sent[name]) for name in paths}
        address = self._destination.finish(files, lambda old: self._card(old, notes))
        if self._upload.delete:
            self._delete()
        return address

    def was_finished(self) -> bool:
        """Return whether an earlier run has sent this very output, and deleted it here or was about to.

        What is left of it here goes; another output that has come to its place stays, and is in the way.
        """
        if not (self._upload.delete and self._resume) or os.path.lexists(journal_path(self._plan)):
            return False
        section = _sections(self._destination.card() or "").get(self._name, "")
        if self._fingerprint not in section:
            return False
        told = {found[1]: Sent(int(found[2]), found[3]) for found in FILE_ROW.finditer(section)}
        files: dict[str, tuple[Path, Sent]] = {}
        for file, path in zip(self._plan.files, self._plan.final_paths(), strict=True):
            sent = told.get(_cell(file.name))
            if sent is None or (is_file(path) and _sent(path) != sent):
                return False
            files[file.name] = path, sent
        if is_file(manifest_path(self._plan)) and not is_of(self._plan, fingerprint_of(self._plan)):
            return False
        if not self._destination.holds(files):
            return False
        self._delete()
        return True

    def _send_all(self) -> None:
        while (task := self._waiting.get()) is not None:
            name, path = task
            try:
                if self._error is None:
                    sent = _sent(path)
                    self._destination.send(name, path, sent)
                    with self._lock:
                        self._sent[name] = sent
            except Exception as error:  # noqa: BLE001 - handed to the main thread, which raises it at the end
                with self._lock:
                    self._error = self._error or error

    def _delete(self) -> None:
        """Remove the local files, the manifest last: while it is there, it says whose they are."""
        output = self._plan.output_path()
        with os_errors(output, "removed"):
            if is_file(manifest_path(self._plan)):
                for path in self._plan.final_paths():
                    path.unlink(missing_ok=True)
                if self._plan.is_folder:
                    with contextlib.suppress(OSError):  # something else is in it, and stays
                        output.rmdir()
        remove_manifest(manifest_path(self._plan))

    # ---- the model card

    def _card(self, old: str | None, notes: tuple[str, ...]) -> str:
        """Return the model card: this output's section in place of an older one of the same name.

        What else an older card says stays as it is, but for sections of outputs whose files are replaced.
        """
        name = self._name
        section = f"<!-- dsv4convert: begin {name} -->\n{self._section(notes)}\n<!-- dsv4convert: end {name} -->"
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

    def _section(self, notes: tuple[str, ...]) -> str:
        plan = self._plan
        options = {key: value for key, value in plan.options.items() if value not in (None, False, [], (), {})}
        rows = [
            ("program", f"dsv4convert {__version__}"),
            ("command", self._upload.command),
            ("source", _source_name(plan.source)),
            ("target", plan.target),
            *((key, _shown(value)) for key, value in options.items()),
            ("plan", self._fingerprint),
            *(("left out", f"{entry.what}: {entry.count} tensors ({entry.reason})") for entry in plan.dropped),
            *(("note", note) for note in notes[:MAX_SHOWN_NOTES]),
        ]
        lines = [f"## {_code(plan.output_path().name)}", "", "| | conversion |", "|---|---|"]
        lines += [f"| {key} | {_code(value)} |" for key, value in rows if value is not None]
        lines += ["", "| file | bytes | SHA-256 |", "|---|---:|---|"]
        for file in plan.files:
            lines.append(f"| {_code(file.name)} | {file.nbytes} | {_code(self._sent[file.name].sha256)} |")
        return "\n".join(lines)


def _fingerprint(plan: Plan) -> str:
    """Return what tells this output from any other: program, source and plan."""
    text = json.dumps(fingerprint_of(plan), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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


def _sent(path: Path) -> Sent:
    with os_errors(path, "read"):
        return Sent.of(path)


def _code(text: str) -> str:
    return f"`{_cell(text)}`"


def _cell(text: str) -> str:
    """Return text that stays in its cell of a table and is no markup; of paths it keeps the last name alone."""
    text = re.sub(r"(?<![\w:/.])/(?:[^\s/'\"]+/)*([^\s/'\"]+)", r"\1", text)
    return re.sub(r"[`|]|[^ -~]", " ", text)


def _sections(card: str) -> dict[str, str]:
    """Return what a card says of outputs, by their names."""
    return {found[1]: found[2] for found in SECTION.finditer(card)}


def _in_comment(name: str) -> str:
    return re.sub(r"[^\w.+-]|--", "_", name)
