"""Sending files to a repository of the hub, through ``huggingface_hub``.

The content of each file goes to the hub's store while the next is made; no reader sees it there. One commit at the end
names all of them: a reader takes the whole output or none of it, whatever is interrupted when.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars

from ...errors import InputMissingError, InputOutputError, OutputExistsError, UsageError
from ..destinations import (
    CARD_NAME,
    MAX_CARD_BYTES,
    Destination,
    Sent,
    other_files_of_gguf,
    other_weights,
    shown_address,
)
from ..fetching import retried
from ..presence import is_file
from ..sources import RemoteFile
from .hub import LOGIN_AGAIN, REPOSITORY, HubRanges, ask

CONFLICT = 412

Answer = TypeVar("Answer")


class HubDestination(Destination):
    """A repository OWNER/NAME, or a folder in it; one that is not there is made, and is private."""

    def __init__(self, text: str) -> None:
        found = REPOSITORY.fullmatch(text)
        if found is None or found[2]:
            raise UsageError(
                "--upload: not a repository of the hub", expected="OWNER/NAME[/FOLDER]", got=shown_address(text)
            )
        if constants.HF_HUB_OFFLINE:
            raise UsageError(
                "--upload: HF_HUB_OFFLINE forbids sending anything", where=text, hint="unset HF_HUB_OFFLINE"
            )
        self._repository, folder = found[1], (found[3] or "").strip("/")
        if any(part in ("", ".", "..") for part in folder.split("/")) and folder:
            raise UsageError("--upload: not a folder of a repository", got=text)
        self._prefix = f"{folder}/" if folder else ""
        self.address = f"hf://{self._repository}" + (f"/{folder}" if folder else "")
        self._api = HfApi()
        self._is_folder = False
        self._overwrite = False
        self._stored: dict[str, CommitOperationAdd] = {}
        disable_progress_bars()

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        """Return the hub's answer, asked for again after errors that pass; what it refuses, it may grant later.

        Raises:
            InputOutputError: it cannot be had now.
        """

        def unwrapped() -> Answer:
            try:
                return question()
            except RuntimeError as error:  # the library's own around an error of a file's upload
                raise error.__cause__ or error from None

        try:
            answer: Answer = retried(lambda: ask(unwrapped, self.address), self.address, doing="sent")
        except (InputMissingError, InputOutputError) as error:
            refused = isinstance(error, InputMissingError)
            raise InputOutputError(
                "the hub refuses the upload" if refused else error.what,
                where=self.address,
                got=error.got,
                hint=f"{LOGIN_AGAIN}; the token must have the right to write" if refused else error.hint,
            ) from None
        return answer

    def _info(self) -> Any:
        return self._ask(lambda: self._api.model_info(self._repository, files_metadata=True))

    def _entries(self, info: Any) -> dict[str, Any]:
        """Return the files of the folder by name."""
        entries = {str(entry.rfilename): entry for entry in info.siblings or ()}
        return {name.removeprefix(self._prefix): e for name, e in entries.items() if name.startswith(self._prefix)}

    def begin(self, names: list[str], *, is_folder: bool, overwrite: bool, resume: bool, fingerprint: str) -> None:
        """See ``Destination.begin``."""
        self._is_folder, self._overwrite = is_folder, overwrite
        if not self._ask(lambda: self._api.repo_exists(self._repository)):
            self._ask(lambda: self._api.create_repo(self._repository, private=True, exist_ok=True))
            return
        entries = self._entries(self._info())
        taken = [name for name in names if name in entries and name != CARD_NAME]
        if not overwrite:
            if taken and not resume:
                raise self._taken(taken[0])
            self._check_no_others(entries, set(names))

    def _check_no_others(self, entries: Mapping[str, Any], names: set[str]) -> None:
        """Check that no weights are there with which those of a folder would be mixed up.

        Raises:
            OutputExistsError: some are.
        """
        others = self._others(entries, names)
        if others:
            raise OutputExistsError(
                "holds weights of another output",
                where=f"{self.address}/{others[0]}",
                hint="pass --overwrite to remove them in the same commit, or name another repository or a folder in it",
            )

    def _others(self, entries: Mapping[str, Any], names: set[str]) -> list[str]:
        return other_weights(entries, names) if self._is_folder else []

    def _taken(self, name: str) -> OutputExistsError:
        return OutputExistsError(
            "already exists on the hub", where=f"{self.address}/{name}", hint="pass --overwrite to replace it"
        )

    def send(self, name: str, path: Path, sent: Sent) -> None:
        """See ``Destination.send``."""
        operation = self._operation(name, path, sent)
        self._ask(lambda: self._api.preupload_lfs_files(self._repository, [operation]))
        if operation.path_or_fileobj == b"":  # what the store has now; small files go with the commit
            self._stored[name] = operation

    def _operation(self, name: str, path: Path, sent: Sent) -> CommitOperationAdd:
        operation = CommitOperationAdd(self._prefix + name, str(path))
        operation.upload_info.sha256 = bytes.fromhex(sent.sha256)  # or the library would read the file for it
        return operation

    def finish(self, files: Mapping[str, tuple[Path, Sent]], card: Callable[[str | None], str]) -> str:
        """See ``Destination.finish``."""
        for name, (path, sent) in files.items():
            if name not in self._stored:
                self.send(name, path, sent)
        while True:
            info = self._info()
            entries = self._entries(info)
            new = [name for name, file in files.items() if not _holds(entries.get(name), *file)]
            if not self._overwrite:
                changed = [name for name in new if name in entries and name != CARD_NAME]
                if changed:
                    raise self._taken(changed[0])
                self._check_no_others(entries, set(files))
            others = self._others(entries, set(files))
            old = self._read_card(info)
            text = card(old)
            if not new and not others and text == old:
                break
            operations = [self._stored.get(name) or self._operation(name, *files[name]) for name in new]
            operations += [CommitOperationDelete(self._prefix + name) for name in others]
            operations.append(CommitOperationAdd(self._prefix + CARD_NAME, text.encode()))
            if self._commit(operations, str(info.sha)):
                info = self._info()
                break
        entries = self._entries(info)
        self._check_arrived(files, entries)
        self.older_files = other_files_of_gguf(entries, files)
        return f"hf://{self._repository}@{info.sha}" + (f"/{self._prefix.rstrip('/')}" if self._prefix else "")

    def _commit(self, operations: list[Any], parent: str) -> bool:
        """Commit on top of ``parent``; return False where another commit came between, which may be this very one.

        An answer that is lost on its way is met by looking at the repository again.
        """

        def commit() -> bool:
            try:
                self._api.create_commit(
                    self._repository,
                    operations,
                    commit_message="Upload with dsv4convert",
                    parent_commit=parent,
                )
            except HfHubHTTPError as error:
                if error.response.status_code == CONFLICT:
                    return False
                raise
            return True

        return self._ask(commit)

    def _check_arrived(self, files: Mapping[str, tuple[Path, Sent]], entries: Mapping[str, Any]) -> None:
        """Check that the hub says of each file what was sent.

        Raises:
            InputOutputError: it does not.
        """
        for name, (path, sent) in files.items():
            if not _holds(entries.get(name), path, sent):
                raise InputOutputError(
                    "the hub has another content than was sent",
                    where=f"{self.address}/{name}",
                    expected=f"{sent.size} bytes, SHA-256 {sent.sha256}",
                    hint="do not use what is there",
                )

    def card(self) -> str | None:
        """See ``Destination.card``."""
        return self._read_card(self._info()) if self._ask(lambda: self._api.repo_exists(self._repository)) else None

    def _read_card(self, info: Any) -> str | None:
        entry = self._entries(info).get(CARD_NAME)
        if entry is None or not entry.size:
            return None
        place = f"{self.address}/{CARD_NAME}"
        if entry.size > MAX_CARD_BYTES:
            raise InputOutputError("too large", where=place, expected=f"at most {MAX_CARD_BYTES} bytes")
        ranges = HubRanges(self._repository, self._prefix + CARD_NAME, str(info.sha), place, entry.size)
        content = bytearray(entry.size)
        RemoteFile(place, entry.size, str(info.sha), ranges).read_into(0, memoryview(content))
        return content.decode(errors="replace")

    def holds(self, files: Mapping[str, tuple[Path, Sent]]) -> bool:
        """See ``Destination.holds``."""
        if not self._ask(lambda: self._api.repo_exists(self._repository)):
            return False
        entries = self._entries(self._info())
        return all(_holds(entries.get(name), path, sent) for name, (path, sent) in files.items())


def _holds(entry: Any, path: Path, sent: Sent) -> bool:
    """Return whether a file of a repository has the content that was sent: by SHA-256, or by git's hash."""
    if entry is None or entry.size != sent.size:
        return False
    if entry.lfs is not None:
        return str(entry.lfs.sha256) == sent.sha256
    if not is_file(path):
        return True
    content = path.read_bytes()
    return str(entry.blob_id) == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
