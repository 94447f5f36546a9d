"""Sending the files of an output elsewhere: each while the next is made, shown as whole when all is done."""

from __future__ import annotations

import contextlib
import os
import queue
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..containers.destinations import (
    CARD_NAME,
    Destination,
    PartsDestination,
    Sender,
    Sent,
    SharedDestination,
    open_destination,
)
from ..containers.presence import is_file
from ..errors import Dsv4Error, InputOutputError, RunInterruptedError, UsageError, counted, some
from ..plan import OutputFile, Plan
from .fingerprint import fingerprint_of
from .journal import journal_path
from .manifest import is_of, manifest_path, remove_manifest
from .output_card import OutputCard
from .outputs import os_errors

if TYPE_CHECKING:
    from .cluster import Cluster

# Files that are sent at once: the hub's library sends the parts of a file one after another.
SENDERS = 4
POLL_SECONDS = 0.1
# Older files that a note names.
MAX_NAMED = 8
FINISHED_HINT = "the output is finished here: run again with --resume"
SENT_HINT = "what has arrived is kept: run again with --resume"


@dataclass(frozen=True)
class Upload:
    """Where to send an output: OWNER/NAME on the hub, or the address of a folder in a store.

    ``delete`` removes the local files once they are there. ``command`` is what the model card says was run.
    """

    address: str
    delete: bool = False
    command: str | None = None


def is_made_here(file: OutputFile) -> bool:
    """Return whether the run makes a file where workers send the others: a header alone, or one that is shown last."""
    return not file.tensors or file.name.endswith(".json")


class Uploading:
    """One output on its way; ``file_done`` may be called by any thread, the rest by the one that runs the plan."""

    def __init__(self, plan: Plan, upload: Upload, *, overwrite: bool = False, resume: bool = False) -> None:
        if any(file.name == CARD_NAME for file in plan.files):
            raise UsageError(f"--upload: the output has a {CARD_NAME} of its own", where=plan.output_path())
        self._plan = plan
        self._upload = upload
        self._destination: Destination = open_destination(upload.address)
        self._overwrite, self._resume = overwrite, resume
        self._card = OutputCard(plan, upload.command)
        self._has_begun = self._is_sending = False
        self._sent: dict[str, Sent] = {}
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[tuple[str, Path] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._error: Exception | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None  # where workers send the files: those of this run
        self._made_here: dict[str, Path] = {}

    @property
    def address(self) -> str:
        """Return what to call the destination."""
        return self._destination.address

    @property
    def takes_senders(self) -> bool:
        """Return whether the workers of a cluster can send the files."""
        return isinstance(self._destination, SharedDestination)

    @property
    def takes_parts(self) -> PartsDestination | None:
        """Return the destination, where several workers can send one file."""
        return self._destination if isinstance(self._destination, PartsDestination) else None

    def lend(self) -> tuple[Sender, Path]:
        """Return what workers send files with, and a folder for those that are made here and sent at the end.

        Only where the destination takes their files.
        """
        assert isinstance(self._destination, SharedDestination)
        self._is_sending = True
        self._scratch = tempfile.TemporaryDirectory(prefix="dsv4convert-")
        return self._destination.sender(), Path(self._scratch.name)

    def holds(self, name: str, sent: Sent) -> bool:
        """Return whether a file that was sent is there."""
        return self._destination.holds({name: (Path(name), sent)})

    def were_sent(self, sent: Mapping[str, Sent], made_here: Mapping[str, Path]) -> None:
        """Note the files that workers have sent, and where the others are."""
        self._sent.update(sent)
        self._made_here.update(made_here)

    @property
    def deletes(self) -> bool:
        """Whether the local files go once all have arrived."""
        return self._upload.delete

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
            fingerprint=self._card.fingerprint,
        )
        self._has_begun = True

    def file_done(self, index: int, path: Path) -> None:
        """Send a file that is whole, under whichever name it has now."""
        self._is_sending = True
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

    @contextlib.contextmanager
    def abandoned_with_the_run(self) -> Iterator[None]:
        """Leave no trace of a run that fails before it has sent anything; as far as that can be done at once."""
        try:
            yield
        except BaseException:
            if self._has_begun and not self._is_sending:
                with contextlib.suppress(Dsv4Error):
                    self._destination.abandon()
            raise

    def _join(self) -> None:
        for thread in self._threads:
            while thread.is_alive():
                thread.join(POLL_SECONDS)
        self._threads = []

    def finish(self, notes: tuple[str, ...], cluster: Cluster | None = None) -> list[str]:
        """Send what is left of the finished output, show all of it to readers, and return what there is to say of it.

        The workers of a ``cluster`` send the files where they can.

        Raises:
            RunInterruptedError: Ctrl-C.
            Dsv4Error: see ``Destination``; the local output stays.
        """
        hint = FINISHED_HINT if self._scratch is None else SENT_HINT
        try:
            return self._finish(notes, cluster)
        except KeyboardInterrupt:
            raise RunInterruptedError("interrupted", where=self._destination.address, hint=hint) from None
        except InputOutputError as error:
            raise error.with_changes(hint=f"{error.hint}; {hint}" if error.hint else hint) from None

    def _finish(self, notes: tuple[str, ...], cluster: Cluster | None) -> list[str]:
        self.begin()
        paths = {file.name: path for file, path in zip(self._plan.files, self._plan.final_paths(), strict=True)}
        paths |= self._made_here
        if cluster is not None and isinstance(self._destination, SharedDestination) and self._scratch is None:
            from .cluster_upload import send_files

            self._is_sending = True
            files = {file.name: (paths[file.name], file.nbytes) for file in self._plan.files}
            weights = {name: file for name, file in files.items() if not name.endswith(".json")}
            self._sent |= send_files(cluster, self._destination.sender(), weights)
        for index, file in enumerate(self._plan.files):
            if file.name not in self._sent and self._error is None:
                self.file_done(index, paths[file.name])
        for _ in self._threads:
            self._waiting.put(None)
        self._join()
        if self._error is not None:
            raise self._error
        sent = {name: (paths[name], self._sent[name]) for name in paths}
        address = self._destination.finish(sent, lambda old: self._card.text(old, self._sent, notes))
        if self._scratch is not None:
            self._scratch.cleanup()
            with os_errors(journal_path(self._plan), "removed"):
                journal_path(self._plan).unlink(missing_ok=True)
        elif self._upload.delete:
            self._delete()
        said = [f"uploaded to {address}"]
        older = self._destination.older_files
        if older:
            said.append(
                f"{counted(len(older), 'file')} of an older GGUF of this name stayed at "
                f"{self._destination.address}: {some(older, MAX_NAMED)}"
            )
        return said

    def was_finished(self) -> bool:
        """Return whether an earlier run has sent this very output, and deleted it here or was about to.

        What is left of it here goes; another output that has come to its place stays, and is in the way.
        """
        if not (self._upload.delete and self._resume) or os.path.lexists(journal_path(self._plan)):
            return False
        told = self._card.files_told(self._destination.card() or "")
        if told is None:
            return False
        paths = self._plan.final_paths()
        files = {file.name: (path, told[file.name]) for file, path in zip(self._plan.files, paths, strict=True)}
        if any(is_file(path) and _sent(path) != sent for path, sent in files.values()):
            return False
        if is_file(manifest_path(self._plan)) and not is_of(self._plan, fingerprint_of(self._plan)):
            return False
        if not self._destination.holds(files):
            return False
        self._destination.clear(self._card.fingerprint)
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


def _sent(path: Path) -> Sent:
    with os_errors(path, "read"):
        return Sent.of(path)
