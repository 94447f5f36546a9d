"""Repositories of the hub, through ``huggingface_hub``: names, revisions, tokens, endpoints and its cache are its own.

A revision is resolved to a commit once, and everything is read of that commit. The hub redirects to a store for the
bytes of large files; the token stays with the hub.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

from ...errors import Dsv4Error, InputMissingError, InputOutputError, UsageError
from ..fetching import TransientError, retried
from ..sources import RemoteFile
from . import Listing, check_names
from .http import DENIED, TRANSIENT_STATUSES, HttpRanges, origin

DEFAULT_REVISION = "main"
LOGIN = "check the name; a private or gated repository needs access and a token: hf auth login, or HF_TOKEN"
PAGE = re.compile(r"/([\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve)/([^/]+)(?:/(.*))?)?/?")
REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([^/]+(?:/pr/\d+)?))?(?:/(.+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
LOGIN_AGAIN = "has the token expired? hf auth login, or HF_TOKEN"
# The name may be a mistyped folder's, and the machine have no network: not to be waited for as long as a run would.
FIRST_ATTEMPTS = 5
# What a conversion has no use for.
UNUSED_SUFFIXES = (".bin", ".pt", ".pth", ".onnx", ".h5", ".msgpack", ".png", ".jpg", ".pdf", ".svg", ".gif")

Answer = TypeVar("Answer")


def repository_of_page(url: str) -> str | None:
    """Return the repository that a page of the hub's own host shows, as OWNER/NAME[@REVISION][/PATH]; else None."""
    if origin(url)[:2] not in (origin(constants.ENDPOINT)[:2], ("https", "huggingface.co")):
        return None
    found = PAGE.fullmatch(urlsplit(url).path)
    if found is None:
        return None
    return found[1] + (f"@{found[2]}" if found[2] else "") + (f"/{found[3]}" if found[3] else "")


def list_hub(text: str, *, cache: bool = False) -> Listing:
    """Return the files of OWNER/NAME[@REVISION][/PATH]; what the hub's cache holds of them is read there.

    ``cache`` downloads what is missing into that cache first.

    Raises:
        UsageError: no such name.
        InputMissingError: there is no such repository or revision, or the hub cannot be reached.
        FileFormatError: the hub names files that no folder can hold.
    """
    found = REPOSITORY.fullmatch(text)
    if found is None:
        raise UsageError("not a repository of the hub", where=f"hf://{text}", expected="OWNER/NAME[@REVISION][/PATH]")
    repository, revision, inside = found[1], found[2] or DEFAULT_REVISION, (found[3] or "").strip("/")
    name = f"hf://{repository}" + (f"@{found[2]}" if found[2] else "")
    if constants.HF_HUB_OFFLINE:
        return _offline(repository, revision, inside, name)
    look = partial(HfApi().model_info, repository, revision=revision, files_metadata=True)
    info = retried(lambda: ask(look, name), name, FIRST_ATTEMPTS)
    commit = str(info.sha)
    if COMMIT.fullmatch(commit) is None:
        raise InputMissingError("the hub gives no commit for the revision", where=name, got=commit[:60])
    address = f"hf://{repository}@{commit}"
    siblings = {str(entry.rfilename): entry for entry in info.siblings or ()}
    check_names([str(entry.rfilename) for entry in info.siblings or ()], name)
    focus, prefix = (inside, "") if inside in siblings else (None, f"{inside}/" if inside else "")
    if focus is not None and "/" in focus:
        folder, _, focus = focus.rpartition("/")
        prefix = f"{folder}/"
    wanted = {
        path.removeprefix(prefix): entry
        for path, entry in siblings.items()
        if path.startswith(prefix) and not path.endswith(UNUSED_SUFFIXES)
    }
    if not wanted:
        raise InputMissingError("no such file or folder in the repository", where=f"{name}/{inside}")
    if cache:
        _download(repository, revision, commit, [prefix + path for path in wanted], name)
    cached = {path: where for path in wanted if (where := _in_cache(repository, prefix + path, commit)) is not None}
    parts = (f"models--{repository.replace('/', '--')}", "snapshots", commit, *filter(None, prefix.split("/")))
    if len(cached) == len(wanted):
        some = next(iter(cached))
        return Listing(address, commit, focus=focus, local=cached[some].parents[some.count("/")])
    files = {}
    for path, entry in wanted.items():
        if not isinstance(entry.size, int) or entry.size < 0:
            raise InputMissingError("the hub gives no size", where=f"{name}/{path}")
        place = f"{address}/{prefix}{path}"
        files[path] = RemoteFile(
            place, entry.size, commit, HubRanges(repository, prefix + path, commit, place, entry.size)
        )
    return Listing(address + (f"/{prefix.rstrip('/')}" if prefix else ""), commit, files, parts, focus, cached=cached)


def _offline(repository: str, revision: str, inside: str, name: str) -> Listing:
    """Return what the hub's cache holds, where HF_HUB_OFFLINE forbids asking the hub."""
    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise InputMissingError(
            "no such folder here, nor in the hub's cache, and HF_HUB_OFFLINE forbids fetching it",
            where=name,
            hint="check the name, or unset HF_HUB_OFFLINE",
        ) from None
    return Listing(name, folder.name, local=folder / inside if inside else folder)


def _in_cache(repository: str, name: str, commit: str) -> Path | None:
    found = try_to_load_from_cache(repository, name, revision=commit)
    return Path(found) if isinstance(found, str) else None


def _download(repository: str, revision: str, commit: str, names: list[str], address: str) -> None:
    """Download files into the hub's cache, under the revision's own name: it can then be found without the hub.

    Raises:
        InputMissingError: the revision moved from the commit meanwhile.
    """
    patterns = list(map(_literal, names))
    download = partial(snapshot_download, repository, revision=revision, allow_patterns=patterns)
    folder = retried(lambda: ask(download, address), address)
    if Path(folder).name != commit:
        raise InputMissingError(
            "the revision moved while it was looked at",
            where=address,
            expected=commit,
            got=Path(folder).name,
            hint="run again",
        )


def _literal(name: str) -> str:
    """Return the pattern that matches a name alone."""
    return re.sub(r"[\[\]*?]", lambda found: f"[{found[0]}]", name)


def ask(question: Callable[[], Answer], address: str) -> Answer:
    """Return the library's answer, its errors as ours: without URLs, which may hold secrets.

    Raises:
        TransientError: the question may be asked again.
        InputMissingError: there is no such thing, or no access to it.
        InputOutputError: the answer is none that a hub gives.
    """
    try:
        return question()
    except GatedRepoError:
        raise InputMissingError("the repository is gated", where=address, hint=LOGIN) from None
    except RepositoryNotFoundError:
        raise InputMissingError(
            "no such folder here, and no such repository on the hub", where=address, hint=LOGIN
        ) from None
    except RevisionNotFoundError:
        raise InputMissingError("the repository has no such revision", where=address, hint="check the name") from None
    except HFValidationError:
        raise UsageError("not a repository of the hub", where=address, expected="OWNER/NAME") from None
    except OfflineModeIsEnabled:
        raise InputMissingError(
            "HF_HUB_OFFLINE forbids asking the hub", where=address, hint="unset HF_HUB_OFFLINE"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in TRANSIENT_STATUSES:
            raise TransientError(f"HTTP status {status}") from None
        if status in DENIED:
            raise InputMissingError("the hub refuses access", where=address, got=f"HTTP {status}", hint=LOGIN) from None
        raise InputMissingError("the hub refuses the request", where=address, got=f"HTTP {status}") from None
    except (httpx2.TransportError, OSError) as error:
        raise TransientError(f"the hub cannot be reached, {type(error).__name__}") from None
    except (httpx2.RequestError, httpx2.InvalidURL, ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputOutputError(  # the library takes for granted what the server sends
            "the hub's answer cannot be understood",
            where=address,
            got=type(error).__name__,
            hint="is HF_ENDPOINT a hub? hf download may say more",
        ) from None


class HubRanges(HttpRanges):
    """Ranges of one file of a commit. Where its bytes are is asked once, and again when that place has expired."""

    def __init__(self, repository: str, name: str, commit: str, address: str, size: int) -> None:
        super().__init__(hf_hub_url(repository, name, revision=commit), address, size)
        self._place: str | None = None
        self._lock = threading.Lock()

    def url(self) -> str:
        """Return the store's URL, or the hub's own where it sends the file itself."""
        with self._lock:
            if self._place is None:
                self._place = self._resolve()
            return self._place

    def secret(self, url: str) -> Mapping[str, str]:
        """Return the token's header for a URL of the hub itself."""
        return _credentials() if origin(url) == origin(self._url) else {}

    def _resolve(self) -> str:
        try:
            return ask(self._location, self._address)
        except InputMissingError as error:  # it was there when the run began
            raise InputOutputError(error.what, where=self._address, got=error.got, hint=LOGIN_AGAIN) from None

    def _location(self) -> str:
        location = str(get_hf_file_metadata(self._url, timeout=30.0).location)
        if origin(location)[0] != "https" and origin(self._url)[0] == "https":
            raise InputOutputError("the hub redirects from https to http", where=self._address)
        return location

    def denied(self, url: str, status: int) -> Dsv4Error | TransientError:
        """Return the error of a refusal: the store's address has expired, or the token has.

        Other threads may be refused by the same address, and one of them may have asked for the next one already.
        """
        with self._lock:
            if self._place == url:
                self._place = None
        if origin(url) != origin(self._url):
            return TransientError(f"HTTP status {status}")
        return InputOutputError(
            "the hub refuses access", where=self._address, got=f"HTTP status {status}", hint=LOGIN_AGAIN
        )


def _credentials() -> dict[str, str]:
    headers: dict[str, Any] = build_hf_headers()
    return {name: value for name, value in headers.items() if name.lower() in ("authorization", "user-agent")}
