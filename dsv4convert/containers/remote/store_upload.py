"""Sending files to a folder in an object store (S3, Google Cloud Storage, Azure), through ``obstore``.

A store has no commit. What tells a reader that an output is whole is therefore sent last: the JSON files, of them the
index last, and the card after all. Of an older output that is overwritten, these are removed before anything else is.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, NotSupportedError

from ...errors import InputMissingError, InputOutputError, OutputExistsError, UsageError
from ..destinations import (
    CARD_NAME,
    MAX_CARD_BYTES,
    Sender,
    Sent,
    SharedDestination,
    other_files_of_gguf,
    other_weights,
)
from ..fetching import MAX_ATTEMPTS, retried
from ..folder_names import CONFIG_NAME, INDEX_NAME
from .stores import error_of, keys_hint, open_store, status_of

# The older card while its output is being replaced: somebody may have written text in it.
OLD_CARD_NAME = "README.before-upload.md"
# Says which run sends files there, until all have arrived: another one keeps away.
MARK_NAME = "dsv4convert-upload.json"
# Metadata of an object; Azure takes no name with hyphens.
SHA256_KEY = "sha256"

# Parts of a file: so many are in memory, of each of the files that are sent at once. A store takes 10,000 parts.
PART_BYTES = 2**23
PARTS_AT_ONCE = 2
MAX_PARTS = 10_000
# A part that fails is sent again by the library, which else would begin the file again.
PART_RETRIES: Any = {"max_retries": 10, "retry_timeout": timedelta(minutes=5)}
PART_TIMEOUT = "600 seconds"
MAX_FILE_ATTEMPTS = 2
NOT_IMPLEMENTED = "501"
ALLOW_HTTP = ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP")

Answer = TypeVar("Answer")


class StoreDestination(SharedDestination):
    """A folder of a bucket, which must be there."""

    def __init__(self, scheme: str, rest: str) -> None:
        if any(part in ("", ".", "..") for part in rest.split("/")):
            raise UsageError(
                "--upload: not a folder in a store", expected=f"{scheme}://BUCKET/PREFIX", got=f"{scheme}://…"
            )
        self._store, prefix, self.address = open_store(scheme, rest)
        # Given options replace those of the environment.
        options: dict[str, Any] = {"client_options": {"timeout": PART_TIMEOUT, "allow_http": allows_http()}}
        if scheme == "s3":  # the store refuses a part whose bytes were changed on their way
            options["checksum_algorithm"] = "SHA256"
        self._sender = open_store(scheme, rest, retry_config=PART_RETRIES, **options)[0]
        self._prefix = f"{prefix}/" if prefix else ""
        self._names: list[str] = []
        self._mark = ""
        self._is_folder = False
        self._overwrite = self._resume = False
        self._has_made_room = False
        self._arrived: set[str] = set()
        self._lock = threading.Lock()

    def _ask(self, question: Callable[[], Answer], most: int = MAX_ATTEMPTS, name: str | None = None) -> Answer:
        """Return the store's answer, asked for again after errors that pass; what it refuses, it may grant later.

        ``name`` is the file that is asked for, None for the folder.

        Raises:
            FileNotFoundError: there is no such object.
            InputOutputError: it cannot be had now.
        """
        where = self.address if name is None else f"{self.address}/{name}"

        def asked() -> Answer:
            try:
                return question()
            except FileNotFoundError:
                raise
            except (BaseError, OSError) as error:
                raise error_of(error, self.address) from None

        try:
            return retried(asked, where, most, doing="sent")
        except InputMissingError as error:
            if error.what == "nothing there":
                raise self._no_bucket() from None
            hint = f"{keys_hint(self.address)}; they must have the right to write"
            raise InputOutputError("the store refuses the upload", where=where, hint=hint) from None

    def _no_bucket(self) -> InputOutputError:
        return InputOutputError("no such bucket", where=self.address, hint=keys_hint(self.address))

    def begin(self, names: list[str], *, is_folder: bool, overwrite: bool, resume: bool, fingerprint: str) -> None:
        """See ``Destination.begin``."""
        self._names, self._is_folder = names, is_folder
        self._overwrite, self._resume = overwrite, resume
        found = self._sizes()
        if not overwrite:
            self._check_free(fingerprint)
            taken = [name for name in names if name in found]
            if taken and not resume:
                raise self._taken(taken[0])
            self._check_no_others(found)
        self._take(fingerprint)

    def _check_free(self, fingerprint: str) -> None:
        """Check that no other run has marked the folder as its own, unless this one is to go on with the same output.

        Raises:
            OutputExistsError: one has.
        """
        there = self._read(MARK_NAME)
        if there is None or (self._resume and fingerprint in there):
            return
        same = fingerprint in there
        raise OutputExistsError(
            f"another run sends {'this' if same else 'another'} output there, or was interrupted",
            where=f"{self.address}/{MARK_NAME}",
            hint="wait for its end"
            + ("; --resume goes on with an interrupted one" if same else ", or name another folder")
            + "; --overwrite takes its place",
        )

    def _take(self, fingerprint: str) -> None:
        """Mark the folder as the one that this run sends files to.

        Raises:
            OutputExistsError: another run did at the same moment.
        """
        self._mark = json.dumps({"output": fingerprint, "run": uuid.uuid4().hex})
        path = self._prefix + MARK_NAME

        def create() -> None:
            try:
                if not (self._overwrite or self._resume):
                    obstore.put(self._store, path, self._mark.encode(), mode="create")
                    return
            except AlreadyExistsError:  # by another run, or by an attempt whose answer was lost
                return
            except (NotSupportedError, GenericError) as error:
                # A put on a condition is not implemented by all stores that speak S3, such as Backblaze's.
                if isinstance(error, GenericError) and status_of(error) != NOT_IMPLEMENTED:
                    raise
            obstore.put(self._store, path, self._mark.encode())

        self._ask_bucket(create, name=MARK_NAME)
        self._check_mark()

    def _check_mark(self) -> None:
        """Check that the folder is still this run's.

        Raises:
            OutputExistsError: another run has taken its place.
        """
        if self._read(MARK_NAME) != self._mark:
            raise OutputExistsError(
                "another run sends files there, which has taken the place of this one",
                where=f"{self.address}/{MARK_NAME}",
                hint="wait for its end, and name another folder or pass --overwrite",
            )

    def abandon(self) -> None:
        """See ``Destination.abandon``."""
        self._remove_mark(most=1)

    def _remove_mark(self, most: int = MAX_ATTEMPTS) -> None:
        """Remove the mark, unless another run has taken this one's place."""
        if self._read(MARK_NAME, most) == self._mark:
            self._delete([MARK_NAME], most)

    def clear(self, fingerprint: str) -> None:
        """See ``Destination.clear``."""
        if fingerprint in (self._read(MARK_NAME) or ""):
            self._delete([OLD_CARD_NAME, MARK_NAME])

    def _check_no_others(self, found: Mapping[str, int]) -> None:
        """Check that no weights are there with which those of a folder would be mixed up.

        Raises:
            OutputExistsError: some are.
        """
        others = self._others(found)
        if others:
            raise OutputExistsError(
                "holds weights of another output",
                where=f"{self.address}/{others[0]}",
                hint="pass --overwrite to remove them, or name another folder",
            )

    def _others(self, found: Mapping[str, int]) -> list[str]:
        return other_weights(found, set(self._names)) if self._is_folder else []

    def _taken(self, name: str) -> OutputExistsError:
        return OutputExistsError(
            "already exists in the store", where=f"{self.address}/{name}", hint="pass --overwrite to replace it"
        )

    def sender(self) -> Sender:
        """See ``SharedDestination.sender``."""
        if self._overwrite:
            with self._lock:
                self._make_room()
        return Sender(self.address, self._mark, self._overwrite)

    def join(self, sender: Sender) -> None:
        """See ``SharedDestination.join``; asks the store, so that keys which are missing here are missed at once."""
        self._mark, self._overwrite, self._has_made_room = sender.mark, sender.overwrite, True
        self._check_mark()

    def send(self, name: str, path: Path, sent: Sent) -> None:
        """See ``Destination.send``; JSON files wait for ``finish``."""
        if not name.endswith(".json"):
            self._send(name, path, sent)

    def _send(self, name: str, path: Path, sent: Sent) -> None:
        """Send a file, if it is not there.

        Raises:
            OutputExistsError: another content is there under its name, and may not be replaced.
        """
        with self._lock:  # what is found here must not be removed by a thread that makes room meanwhile
            there = self._head(name)
            if there == sent:
                self._arrived.add(name)
                return
            self._check_mark()
            if self._overwrite:
                self._make_room()
            elif there is not None:
                raise self._taken(name)
        part_bytes = max(PART_BYTES, -(-sent.size // MAX_PARTS))
        self._ask_bucket(
            lambda: obstore.put(
                self._sender,
                self._prefix + name,
                path,
                attributes={SHA256_KEY: sent.sha256},
                chunk_size=part_bytes,
                max_concurrency=PARTS_AT_ONCE,
            ),
            MAX_FILE_ATTEMPTS,
            name,
        )
        self._arrived.add(name)

    def _head(self, name: str) -> Sent | None:
        """Return what the store says of an object, None where there is none."""
        path = self._prefix + name
        try:
            result = self._ask(lambda: obstore.get(self._store, path, options={"head": True}), name=name)
        except FileNotFoundError:
            return None
        return Sent(result.meta["size"], str(result.attributes.get(SHA256_KEY, "")))

    def _ask_bucket(self, question: Callable[[], Answer], most: int = MAX_ATTEMPTS, name: str | None = None) -> Answer:
        try:
            return self._ask(question, most, name)
        except FileNotFoundError:
            raise self._no_bucket() from None

    def _make_room(self) -> None:
        """Remove what shows an older output to readers, and then its files that are to be replaced; once.

        Files that are the same in the new output stay, and so do all where a run goes on: its first part may have sent
        them.
        """
        if self._has_made_room:
            return
        found = self._sizes()
        if CARD_NAME in found:
            self._put_text(OLD_CARD_NAME, self._read(CARD_NAME) or "")
            self._delete([CARD_NAME])
        ours = {*self._names, INDEX_NAME}.difference(self._arrived)
        shown = [name for name in found if name.endswith(".json") and name in ours]
        self._delete(sorted(shown, key=_last_is_index, reverse=True))
        if not self._resume:
            replaced = set(self._names).intersection(found).difference(shown, self._arrived)
            self._delete(sorted(replaced))
        self._has_made_room = True

    def _delete(self, names: list[str], most: int = MAX_ATTEMPTS) -> None:
        for name in names:
            try:
                self._ask(partial(obstore.delete, self._store, self._prefix + name), most, name)
            except FileNotFoundError:  # by an attempt whose answer was lost
                continue

    def _put_text(self, name: str, text: str) -> None:
        self._ask_bucket(lambda: obstore.put(self._store, self._prefix + name, text.encode()), name=name)

    def finish(self, files: Mapping[str, tuple[Path, Sent]], card: Callable[[str | None], str]) -> str:
        """See ``Destination.finish``."""
        shown = sorted((name for name in files if name.endswith(".json")), key=_last_is_index)
        weights = [name for name in files if name not in shown]
        for name in weights:
            if name not in self._arrived:
                self._send(name, *files[name])
        self._check_mark()
        found = self._sizes()
        if not self._overwrite:
            self._check_no_others(found)
        for name in weights:
            self._check_arrived(name, files[name][1])
        if self._overwrite and self._others(found):
            self._make_room()
            self._delete(self._others(found))
        for name in shown:
            self._send(name, *files[name])
            self._check_arrived(name, files[name][1])
        old = self._read(CARD_NAME)
        set_aside = self._read(OLD_CARD_NAME)
        text = card(set_aside if old is None else old)
        if text != old:
            self._put_text(CARD_NAME, text)
        self._delete([] if set_aside is None else [OLD_CARD_NAME])
        self._remove_mark()
        self.older_files = other_files_of_gguf(found, files)
        return self.address

    def _check_arrived(self, name: str, sent: Sent) -> None:
        """Check that the store says of a file what was sent.

        Raises:
            InputOutputError: it does not.
        """
        there = self._head(name)
        if there != sent:
            raise InputOutputError(
                "the store has another content than was sent",
                where=f"{self.address}/{name}",
                expected=f"{sent.size} bytes, SHA-256 {sent.sha256}",
                got="nothing" if there is None else f"{there.size} bytes, SHA-256 {there.sha256 or 'not told'}",
                hint="do not use what is there",
            )

    def card(self) -> str | None:
        """See ``Destination.card``."""
        return self._read(CARD_NAME)

    def _read(self, name: str, most: int = MAX_ATTEMPTS) -> str | None:
        """Return the text of a card, None where there is none."""

        def read() -> str:
            result = obstore.get(self._store, self._prefix + name)
            if result.meta["size"] > MAX_CARD_BYTES:
                raise InputOutputError(
                    "too large", where=f"{self.address}/{name}", expected=f"at most {MAX_CARD_BYTES} bytes"
                )
            return bytes(result.bytes()).decode(errors="replace")

        try:
            return self._ask(read, most, name)
        except FileNotFoundError:
            return None

    def holds(self, files: Mapping[str, tuple[Path, Sent]]) -> bool:
        """See ``Destination.holds``."""
        return all(self._head(name) == sent for name, (_, sent) in files.items())

    def _sizes(self) -> dict[str, int]:
        """Return the files that are there, with their sizes in bytes."""

        def listed() -> dict[str, int]:
            pages = obstore.list(self._store, self._prefix or None)
            return {entry["path"].removeprefix(self._prefix): entry["size"] for page in pages for entry in page}

        return self._ask_bucket(listed)


def is_set(variable: str) -> bool:
    """Return whether a variable of the environment says yes."""
    return os.environ.get(variable, "").lower() in ("1", "true")


def allows_http() -> bool:
    """Return whether files may be sent without encryption."""
    return any(map(is_set, ALLOW_HTTP))


def _last_is_index(name: str) -> tuple[bool, bool, str]:
    """Return what sorts the config behind other JSON files, and the index behind all."""
    return name == INDEX_NAME, name == CONFIG_NAME, name
