"""Where finished files are sent: a repository of the hub, or a folder in an object store.

Nothing here imports a network library.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError, missing_package
from .folder_names import INDEX_NAME
from .gguf import SPLIT_FILE
from .sources import ADDRESS, HUB_ID

READ_BYTES = 2**20
CARD_NAME = "README.md"
# A card is some KiB of text, and a table of a line for each file.
MAX_CARD_BYTES = 2**22
WEIGHTS = (".safetensors", INDEX_NAME)
EXPECTED = "OWNER/NAME, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"


@dataclass(frozen=True)
class Sent:
    """A file as it was sent: its size in bytes and the hex SHA-256 of its content."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Sent:
        """Return what a file on this disk is.

        Raises:
            OSError: it cannot be read.
        """
        digest, size = hashlib.sha256(), 0
        with path.open("rb", buffering=0) as file:
            while piece := file.read(READ_BYTES):
                digest.update(piece)
                size += len(piece)
        return cls(size, digest.hexdigest())


@dataclass(frozen=True)
class SentPart:
    """A part of a file as it was sent: size in bytes, hex SHA-256, and what the store calls it."""

    size: int
    sha256: str
    etag: str


def sent_in_parts(parts: Iterable[SentPart]) -> Sent:
    """Return a file that was sent in parts.

    Nobody has read all of it, so its checksum is the one of its parts' checksums, which S3 calls composite, with the
    number of parts behind it.

    >>> sent_in_parts([SentPart(3, "ab" * 32, "a"), SentPart(4, "cd" * 32, "b")]).sha256
    'a6a96ccb5233f068bf41343ffd5984bf8d4d7e591f1e4bdb12bda296534409b8-2'
    """
    parts = list(parts)
    digest = hashlib.sha256(b"".join(bytes.fromhex(part.sha256) for part in parts))
    return Sent(sum(part.size for part in parts), f"{digest.hexdigest()}-{len(parts)}")


@dataclass(frozen=True)
class Sender:
    """What another process needs to send files for a run, whose mark is ``mark`` (see ``SharedDestination.join``)."""

    address: str
    mark: str
    overwrite: bool

    def open(self) -> Destination:
        """Return the destination, for ``Destination.send`` alone.

        Raises:
            Dsv4Error: see ``SharedDestination.join``.
        """
        destination = open_destination(self.address)
        assert isinstance(destination, SharedDestination)  # one gave this away
        destination.join(self)
        return destination


class Destination(ABC):
    """A place elsewhere for the files of one output, which no reader takes for whole before they all are there.

    ``address`` is what to call it. ``older_files``, once all is shown, are GGUF files of an older output of the same
    name that stay there. Every method raises Dsv4Error: InputOutputError where the run may go on later.
    """

    address: str
    older_files: Sequence[str] = ()

    @abstractmethod
    def begin(self, names: list[str], *, is_folder: bool, overwrite: bool, resume: bool, fingerprint: str) -> None:
        """Make sure that files may be sent under ``names``, and make the place where it is not there.

        ``is_folder``: they are a checkpoint, with which other weights in the same place would be mixed up.
        ``fingerprint`` tells the output from any other.

        Raises:
            OutputExistsError: files of another output are there, or another run sends some, and ``overwrite`` is false.
        """

    def abandon(self) -> None:  # noqa: B027 - most have nothing to undo
        """Undo ``begin``, of a run that has sent nothing and will not."""

    def clear(self, fingerprint: str) -> None:  # noqa: B027 - as above
        """Remove what a run of this output has left that ended when all had arrived."""

    @abstractmethod
    def send(self, name: str, path: Path, sent: Sent) -> None:
        """Send a file so that no reader takes the output for whole; content that is there already is not sent again."""

    @abstractmethod
    def finish(self, files: Mapping[str, tuple[Path, Sent]], card: Callable[[str | None], str]) -> str:
        """Show readers all files together, and return an address of exactly these.

        ``card`` returns the text of README.md, of which the older one, if any, is its argument.

        Raises:
            OutputExistsError: files of another output came meanwhile.
        """

    @abstractmethod
    def card(self) -> str | None:
        """Return the README.md that is there, None where there is none."""

    @abstractmethod
    def holds(self, files: Mapping[str, tuple[Path, Sent]]) -> bool:
        """Return whether all files are there as they were sent. Their paths need not exist here any more.

        The hub tells of small files no SHA-256: of one that is not here any more, their size has to do.
        """


def other_weights(found: Iterable[str], names: Container[str]) -> list[str]:
    """Return the files, of those ``found`` in a folder, that readers would mix up with a checkpoint of ``names``."""
    return [name for name in found if "/" not in name and name.endswith(WEIGHTS) and name not in names]


def other_files_of_gguf(found: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the GGUF files, of those ``found`` in a folder, that are named as a file or part of a GGUF of ``names``.

    >>> other_files_of_gguf(["a.gguf", "a-00001-of-00002.gguf", "b.gguf", "c/a.gguf"], ["a.gguf"])
    ['a-00001-of-00002.gguf']
    """
    ours = set(names)
    stems = {_gguf_stem(name) for name in ours} - {None}
    return sorted(name for name in found if name not in ours and _gguf_stem(name) in stems)


def _gguf_stem(name: str) -> str | None:
    part = SPLIT_FILE.fullmatch(name)
    return part["stem"] if part else name.removesuffix(".gguf") if name.endswith(".gguf") else None


def shown_address(text: str) -> str:
    """Return an address that is refused without what can be a password or a signature in it.

    >>> [shown_address(text) for text in ("https://me:pass@host/a?sig=1", "s3:KEY:SECRET@b", "me/name@main")]
    ['…@host/a?…', '…@b', 'me/name@main']
    """
    user, at, rest = text.rpartition("@")
    return re.sub(r"[?#].*", "?…", f"…@{rest}" if at and ":" in user else text, flags=re.DOTALL)


class SharedDestination(Destination):
    """A destination to which other processes can send files of a run, too."""

    @abstractmethod
    def sender(self) -> Sender:
        """Return what other processes need to send files from now on; of an older output they are gone then."""

    @abstractmethod
    def join(self, sender: Sender) -> None:
        """Send files for the run that gave ``sender`` away.

        Raises:
            OutputExistsError: another run has taken its place.
        """


class PartsDestination(SharedDestination):
    """A destination to which several processes can send the parts of one file.

    Parts are numbered from 1 on; readers see nothing of them before ``finish_parts``.
    """

    @abstractmethod
    def begin_parts(self, name: str) -> str | None:
        """Begin a file that is sent in parts, and return what its upload is called; None where it is to be sent whole.

        That is where the store takes no parts with checksums, and where a run goes on and something is there under the
        file's name: it may have been sent whole. Parts that lie there of earlier uploads of this file are dropped.

        Raises:
            OutputExistsError: another content is there under its name, and may not be replaced.
        """

    @abstractmethod
    def send_part(self, name: str, upload: str, number: int, path: Path, sent: Sent) -> SentPart:
        """Send a part, in place of an earlier one of this number."""

    @abstractmethod
    def parts_there(self, name: str, upload: str) -> Mapping[int, tuple[int, str]] | None:
        """Return size and ``SentPart.etag`` of the parts that have arrived; None without such an upload."""

    @abstractmethod
    def finish_parts(self, name: str, upload: str, parts: Sequence[SentPart]) -> None:
        """Make a file of all its parts.

        Raises:
            OutputExistsError: another content came under its name meanwhile, or another run took the place of this one.
        """


def open_destination(address: str) -> Destination:
    """Return the destination of an address: a repository of the hub, or a folder in an object store.

    Nothing is asked of it yet.

    Raises:
        UsageError: no address that files can be sent to.
        DeviceError: the packages for it are not installed.
    """
    found = ADDRESS.fullmatch(address)
    scheme, rest = (found[1], found[2].strip("/")) if found else ("hf", address)
    if (found is None and HUB_ID.fullmatch(address) is None) or scheme in ("http", "https"):
        raise UsageError("--upload: no such destination", expected=EXPECTED, got=shown_address(address))
    package, extra = ("huggingface_hub", "hub") if scheme == "hf" else ("obstore", "stores")
    try:
        if scheme == "hf":
            from .remote.hub_upload import HubDestination

            return HubDestination(rest)
        from .remote.store_upload import StoreDestination

        if scheme == "s3" and importlib.util.find_spec("boto3") is not None:
            from .remote.part_upload import PartsStoreDestination

            return PartsStoreDestination(rest)
        return StoreDestination(scheme, rest)
    except ImportError:
        raise missing_package("--upload", package, extra, where=f"{scheme}://…") from None
