"""Reads the headers of GGUF v3 files, single or split: key-values and where the tensors lie, and no weights.

A file is magic, version, two counts, the key-values, the tensor infos, zeros up to the alignment, and the
data. No length is believed before it is compared with what is left of the file and with a limit, so that
memory stays bounded whatever the file says.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import FileFormatError, InputMissingError, UsageError, not_read
from ..formats.ggml_types import GGML_TYPES, GgmlType
from .presence import is_folder
from .untrusted import file_size, open_regular

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 2**20
ALIGNMENT_KEY = "general.alignment"

# Limits of this reader. A V4-Pro header takes 8 MB, a quarter of a million of texts among them.
MAX_HEADER_BYTES = 128 * 2**20
MAX_ELEMENTS = 4 * 2**20  # of all arrays of a file together
MAX_KEYS = 2**16
MAX_TENSORS = 2**18
MAX_KEY_BYTES = 2**16 - 1  # the format's own limit

# ggml's own limits: GGML_MAX_NAME counts the closing zero, GGML_MAX_DIMS, and sizes are int64.
MAX_TENSOR_NAME_BYTES = 64 - 1
MAX_DIMS = 4
MAX_INT64 = 2**63 - 1

CHUNK_BYTES = 2**20
U64_BYTES = 8

SPLIT_NAME = "{stem}-{number:05d}-of-{count:05d}.gguf"
SPLIT_FILE = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"


STRING, ARRAY, BOOL = 8, 9, 7
# Scalar value types by number: name and little-endian struct code. A bool is read as a byte and checked.
SCALARS: dict[int, tuple[str, str]] = {
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    4: ("u32", "I"),
    5: ("i32", "i"),
    6: ("f32", "f"),
    BOOL: ("bool", "B"),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}


class GgufTensor(NamedTuple):
    """A tensor where it lies: ``nbytes`` of ggml type ``type`` at ``offset`` from the start of ``file``.

    ``shape`` is row-major (the file lists the fastest dimension first).
    """

    name: str
    type: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufPart:
    """One file of a model: its own key-values and tensors, and the bytes that are neither.

    ``types`` names the value type of each key: "u32", "str", "[i32]". The header ends at ``header_end``;
    zeros fill the file up to ``data_start`` and between tensors; ``data_end`` is the last tensor's end.
    """

    path: Path
    metadata: Mapping[str, Any] = field(repr=False)
    types: Mapping[str, str] = field(repr=False)
    tensors: Mapping[str, GgufTensor] = field(repr=False)
    alignment: int
    header_end: int
    data_start: int
    data_end: int
    nbytes: int

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of every byte range outside the header and the tensors: zeros, as written."""
        position = self.header_end
        for tensor in self.tensors.values():
            if tensor.offset > position:
                yield position, tensor.offset
            position = tensor.offset + tensor.nbytes
        if self.nbytes > position:
            yield position, self.nbytes


@dataclass(frozen=True)
class GgufModelFile:
    """A GGUF model in one file or in splits.

    ``metadata`` and ``types`` are those of the first file, ``tensors`` are those of all files in order.
    """

    parts: tuple[GgufPart, ...]
    tensors: Mapping[str, GgufTensor] = field(repr=False)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Return the key-values of the model."""
        return self.parts[0].metadata

    @property
    def types(self) -> Mapping[str, str]:
        """Return the value types of the model's key-values."""
        return self.parts[0].types

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the paths of the files, in order."""
        return tuple(part.path for part in self.parts)

    @property
    def architecture(self) -> str | None:
        """Return ``general.architecture``, or None where it is missing or no text."""
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else None


def open_gguf(path: Path, *, allow_cut: bool = False) -> GgufModelFile:
    """Open the GGUF model at ``path``: a file, any file of a split set, or a folder that holds one model.

    ``allow_cut`` accepts files of a split set that end with their header, where the data begin.

    Raises:
        InputMissingError: no such file, or a file of the set is missing.
        UsageError: a folder with several models.
        FileFormatError: a malformed file, or files that do not belong together.
    """
    path = _choose(path) if is_folder(path) else path
    found = SPLIT_FILE.fullmatch(path.name)
    if found is None or int(found["count"]) < 2:
        part = read_gguf_part(path)
        count = part.metadata.get(SPLIT_COUNT, 1)
        if count not in (0, 1):
            raise FileFormatError(
                "renamed file of a split model",
                where=path,
                expected=f"NAME-00001-of-{count:05d}.gguf" if isinstance(count, int) else "a number of files",
                hint="restore the original name, so that the other files can be found",
            )
        return GgufModelFile((part,), part.tensors)
    return _open_split(path, found["stem"], int(found["count"]), allow_cut)


def is_gguf(path: Path) -> bool:
    """Return whether ``path`` is a GGUF file by name or magic, or a folder that holds one, and no checkpoint."""
    if is_folder(path):
        return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))
    if path.suffix == ".gguf":
        return True
    try:
        with open_regular(path) as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _choose(folder: Path) -> Path:
    """Return the first file of the only GGUF model in ``folder``."""
    models: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.glob("*.gguf")):
        found = SPLIT_FILE.fullmatch(path.name)
        models.setdefault((found["stem"], found["count"]) if found else (path.name, ""), path)
    if not models:
        raise InputMissingError("no .gguf file", where=folder)
    if len(models) > 1:
        names = ", ".join(path.name for path in models.values())
        raise UsageError(
            f"several GGUF models in one folder: {names}"[:300], where=folder, hint="pass one of the files"
        )
    return next(iter(models.values()))


def _open_split(path: Path, stem: str, count: int, allow_cut: bool) -> GgufModelFile:
    parts: list[GgufPart] = []
    tensors: dict[str, GgufTensor] = {}
    for number in range(count):
        name = SPLIT_NAME.format(stem=stem, number=number + 1, count=count)
        part = read_gguf_part(path.with_name(name), allow_cut=allow_cut)
        for key, expected in ((SPLIT_NO, number), (SPLIT_COUNT, count)):
            if part.metadata.get(key) != expected:
                raise FileFormatError(
                    f"key {key} contradicts the file name",
                    where=part.path,
                    expected=expected,
                    got=part.metadata.get(key, "no such key"),
                )
        for tensor in part.tensors.values():
            if tensor.name in tensors:
                raise FileFormatError(
                    f"duplicate tensor {tensor.name!r}",
                    where=part.path,
                    got=f"also in {tensors[tensor.name].file.name}",
                )
            tensors[tensor.name] = tensor
        if len(tensors) > MAX_TENSORS:
            raise FileFormatError("too many tensors", where=part.path, expected=f"at most {MAX_TENSORS}")
        parts.append(part)
    for part in parts:
        if part.metadata.get(SPLIT_TENSORS) != len(tensors):
            raise FileFormatError(
                f"key {SPLIT_TENSORS} contradicts the number of tensors in the files",
                where=part.path,
                expected=len(tensors),
                got=part.metadata.get(SPLIT_TENSORS, "no such key"),
            )
    return GgufModelFile(tuple(parts), tensors)


def paths_of_set(path: Path) -> list[Path]:
    """Return the paths of the split set that ``path`` is one file of by its name, none where it is none."""
    found = SPLIT_FILE.fullmatch(path.name)
    count = 0 if found is None else int(found["count"])
    stem = "" if found is None else found["stem"]
    return [path.with_name(SPLIT_NAME.format(stem=stem, number=n + 1, count=count)) for n in range(count)]


def read_gguf_part(path: Path, *, allow_cut: bool = False) -> GgufPart:
    """Read the header of one GGUF file, whatever set it belongs to; ``allow_cut`` as for ``open_gguf``.

    Raises:
        InputMissingError, InputOutputError: the file is not there, or cannot be read.
        FileFormatError: not a GGUF v3 file, truncated, or malformed.
    """
    try:
        with open_regular(path) as file:
            return _Header(path, file, allow_cut).read()
    except OSError as error:
        raise not_read(path, error) from None


class _Header:
    """The header of one file, read front to back through a window of a few chunks."""

    def __init__(self, path: Path, file: BinaryIO, allow_cut: bool) -> None:
        self.path = path
        self.allow_cut = allow_cut
        self.file = file
        self.size = file_size(file)
        self.limit = min(self.size, MAX_HEADER_BYTES)
        self.window = b""
        self.at = 0  # position in the window
        self.start = 0  # position of the window in the file
        self.elements_left = MAX_ELEMENTS

    def read(self) -> GgufPart:
        magic = self.take(len(MAGIC), "the magic")
        if magic != MAGIC:
            raise self.error("not a GGUF file", expected=MAGIC, got=magic)
        version = self.number("I", "the version")
        if version != VERSION:
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
            raise self.error(
                "big-endian GGUF is not supported" if swapped == VERSION else "unsupported version of GGUF",
                expected=VERSION,
                got=version,
            )
        n_tensors = self.count("Q", MAX_TENSORS, "the number of tensors")
        n_keys = self.count("Q", MAX_KEYS, "the number of keys")
        metadata: dict[str, Any] = {}
        types: dict[str, str] = {}
        for number in range(n_keys):
            key = self.text(f"key {number}", MAX_KEY_BYTES)
            if not key:
                raise self.error(f"key {number} has no name")
            if key in metadata:
                raise self.error(f"duplicate key {key!r}")
            types[key], metadata[key] = self.value(f"key {key!r}")
        alignment = self.alignment(metadata, types)
        infos = [self.tensor_info(number) for number in range(n_tensors)]
        header_end = self.start + self.at
        data_start = -(-header_end // alignment) * alignment
        tensors, data_end = self.place(infos, alignment, data_start)
        return GgufPart(self.path, metadata, types, tensors, alignment, header_end, data_start, data_end, self.size)

    def error(self, what: str, expected: object = None, got: object = None, hint: str | None = None) -> FileFormatError:
        return FileFormatError(what, where=self.path, expected=expected, got=got, hint=hint)

    def need(self, nbytes: int, what: str) -> None:
        """See to it that the window holds ``nbytes`` more bytes."""
        have = len(self.window) - self.at
        if nbytes <= have:
            return
        position = self.start + self.at
        if position + nbytes > self.limit:
            if position + nbytes > self.size:
                raise self.error(
                    f"{what} extends past the end of the file",
                    expected=f"at most {self.size - position} bytes",
                    got=nbytes,
                    hint="the file is truncated or corrupt",
                )
            raise self.error(f"{what}: the header is too long", expected=f"at most {MAX_HEADER_BYTES} bytes")
        more = self.file.read(min(max(nbytes - have, CHUNK_BYTES), self.limit - position - have))
        if len(more) < nbytes - have:
            raise self.error(f"{what}: the file shrank while being read")
        self.window = self.window[self.at :] + more
        self.start, self.at = position, 0

    def take(self, nbytes: int, what: str) -> bytes:
        self.need(nbytes, what)
        self.at += nbytes
        return self.window[self.at - nbytes : self.at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def count(self, code: str, most: int, what: str) -> int:
        value: int = self.number(code, what)
        if value > most:
            raise self.error(f"{what} is out of range", expected=f"at most {most}", got=value)
        return value

    def text(self, what: str, most: int | None = None) -> str:
        length: int = self.number("Q", what)
        if most is not None and length > most:
            raise self.error(f"{what}: too long", expected=f"at most {most} bytes", got=length)
        return self.decode(self.take(length, what), what)

    def decode(self, data: bytes, what: str) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what}: not UTF-8 (byte {error.start})") from None

    def value(self, what: str) -> tuple[str, Any]:
        """Read a value with its type in front; return the type's name and the value."""
        kind: int = self.number("I", what)
        if kind == STRING:
            return "str", self.text(what)
        if kind == ARRAY:
            return self.array(what)
        name, code = self.scalar(kind, what)
        return name, self.checked(kind, (self.number(code, what),), what)[0]

    def scalar(self, kind: int, what: str) -> tuple[str, str]:
        if kind not in SCALARS:
            raise self.error(f"{what}: unknown value type", expected=f"at most {max(SCALARS)}", got=kind)
        return SCALARS[kind]

    def checked(self, kind: int, values: tuple[Any, ...], what: str) -> list[Any]:
        if kind != BOOL:
            return list(values)
        if any(value > 1 for value in values):
            raise self.error(f"{what}: not a boolean", expected="0 or 1", got=max(values))
        return [bool(value) for value in values]

    def array(self, what: str) -> tuple[str, list[Any]]:
        kind: int = self.number("I", what)
        length: int = self.number("Q", what)
        if kind == ARRAY:
            raise self.error(f"{what}: nested arrays are not supported")
        name, code = ("str", "Q") if kind == STRING else self.scalar(kind, what)
        item = struct.calcsize("<" + code)
        position = self.start + self.at
        if length * item > self.size - position:
            raise self.error(
                f"{what}: more elements than the file has bytes",
                expected=f"at most {(self.size - position) // item}",
                got=length,
            )
        if length > self.elements_left:
            raise self.error(f"{what}: too many elements", expected=f"at most {self.elements_left}", got=length)
        self.elements_left -= length
        if kind == STRING:
            return "[str]", self.texts(length, what)
        values = struct.unpack(f"<{length}{code}", self.take(length * item, what))
        return f"[{name}]", self.checked(kind, values, what)

    def texts(self, length: int, what: str) -> list[str]:
        """Read many short texts; the loop looks into the window itself, for vocabularies are long."""
        values: list[str] = []
        window, at = self.window, self.at
        unpack_length = struct.Struct("<Q").unpack_from
        for number in range(length):
            end = at + U64_BYTES
            if end <= len(window):
                nbytes = unpack_length(window, at)[0]
                if end + nbytes <= len(window):
                    try:
                        values.append(window[end : end + nbytes].decode())
                    except UnicodeDecodeError as error:
                        raise self.error(f"{what}, element {number}: not UTF-8 (byte {error.start})") from None
                    at = end + nbytes
                    continue
            self.at = at
            values.append(self.text(f"{what}, element {number}"))
            window, at = self.window, self.at
        self.at = at
        return values

    def alignment(self, metadata: Mapping[str, Any], types: Mapping[str, str]) -> int:
        value = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        if types.get(ALIGNMENT_KEY, "u32") != "u32" or value & (value - 1) or not 0 < value <= MAX_ALIGNMENT:
            raise self.error(
                f"key {ALIGNMENT_KEY!r}",
                expected=f"a power of two of at most {MAX_ALIGNMENT}, u32",
                got=value,
            )
        return int(value)

    def tensor_info(self, number: int) -> tuple[str, GgmlType, tuple[int, ...], int, int]:
        """Read an entry; return name, type, row-major shape, offset in the data and size in bytes."""
        name = self.text(f"name of tensor {number}", MAX_TENSOR_NAME_BYTES)
        what = f"tensor {name!r}"
        n_dims: int = self.number("I", what)
        if not 1 <= n_dims <= MAX_DIMS:
            raise self.error(f"{what}: number of dimensions", expected=f"1 to {MAX_DIMS}", got=n_dims)
        dims = struct.unpack(f"<{n_dims}Q", self.take(n_dims * U64_BYTES, what))
        elements = 1
        for length in dims:
            elements *= length
            if not 0 < elements <= MAX_INT64:
                raise self.error(
                    f"{what}: dimensions", expected="1 or more, their product within 63 bits", got=list(dims)
                )
        code: int = self.number("I", what)
        kind = GGML_TYPES.get(code)
        if kind is None:
            raise self.error(f"{what}: unknown type", got=code)
        if dims[0] % kind.elements:
            raise self.error(
                f"{what}: row length", expected=f"a multiple of {kind.elements} ({kind.name})", got=dims[0]
            )
        offset: int = self.number("Q", what)
        return name, kind, tuple(reversed(dims)), offset, elements // kind.elements * kind.nbytes

    def place(
        self, infos: list[tuple[str, GgmlType, tuple[int, ...], int, int]], alignment: int, data_start: int
    ) -> tuple[dict[str, GgufTensor], int]:
        """Check that the tensors follow one another, as ggml demands; return them and the last one's end."""
        tensors: dict[str, GgufTensor] = {}
        position = end = 0
        for name, kind, shape, offset, nbytes in infos:
            if name in tensors:
                raise self.error(f"duplicate tensor {name!r}")
            if offset != position:
                raise self.error(
                    f"tensor {name!r}: gap or overlap before the tensor",
                    expected=f"offset {position}",
                    got=offset,
                )
            end = offset + nbytes
            if data_start + end > self.size and not (self.allow_cut and self.size == data_start):
                raise self.error(
                    f"tensor {name!r}: the data extends past the end of the file",
                    expected=f"{data_start + end} bytes",
                    got=self.size,
                    hint="copy or download the file again",
                )
            tensors[name] = GgufTensor(name, kind.name, shape, self.path, data_start + offset, nbytes)
            position = -(-end // alignment) * alignment
        return tensors, data_start + end
