"""Activation statistics for low-bit types: an importance matrix of what meets each matrix of a model on a text.

All chunks of the text pass a layer before the next one is read, and all of their tokens meet an expert before the
next one is read: every weight is read once, however long the text is. Between layers the chunks' hidden states lie in
files without names. Memory holds a chunk, the attention of one layer or one expert, and some bytes a token.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..containers.gguf import is_gguf, open_gguf
from ..containers.imatrix import ImatrixFile, begins_imatrix, imatrix_file
from ..containers.sources import shown
from ..containers.untrusted import read_whole
from ..engine.conversion import check_sources_stay
from ..engine.manifest import check_outside_outputs
from ..engine.outputs import FileOutputs, free_bytes, os_errors, write_all
from ..engine.run import peak_memory_bytes
from ..errors import FileFormatError, SpaceError, UsageError, named_by_user
from ..model.config import ModelConfig
from ..model.tensors import Draft, expected_tensors, gguf_name, is_multiplied
from ..plan import OutputFile, Plan
from .attention import LayerState, Shared
from .devices import chosen_device, product_on
from .experts import route, routed_expert, routed_rows, shared_expert
from .hyper_connections import connect, enter
from .model import Flow, Model, ignore
from .passing_files import F32, ArrayFile, RowFile
from .prompt import encode_text, find_tokenizer
from .weights.open import open_source
from .weights.protocol import Array, CachedSource

# Calibration texts have some MiB; the tokenizer takes the whole of one.
MAX_TEXT_BYTES = 2**30
# Tokens that an expert takes at a time: with V4-Pro's widths, [4096, 7168 + 3·3072] float32 are 270 MB.
EXPERT_TOKENS = 4096

OUTPUT_MATRIX = "head.weight"


@dataclass(frozen=True)
class ImatrixSummary:
    """What was collected.

    ``experts_without_tokens`` lists the experts that no token met, by layer; low-bit types take all of their columns
    alike. ``left_over_tokens`` are those behind the last whole chunk.
    """

    model: str
    text: str
    path: str
    bytes: int
    entries: int
    layers: int
    chunks: int
    context_size: int
    left_over_tokens: int
    device: str
    experts_without_tokens: tuple[tuple[int, tuple[int, ...]], ...]
    seconds: float
    peak_memory_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Return the summary as plain JSON values (schemas/imatrix.schema.json)."""
        unmet = [{"layer": layer, "experts": list(experts)} for layer, experts in self.experts_without_tokens]
        return {**asdict(self), "experts_without_tokens": unmet}


@dataclass(frozen=True)
class ImatrixOptions:
    """How statistics are collected.

    The text is cut into at most ``chunks`` chunks of ``context_size`` tokens. ``layers`` runs only so many layers,
    ``process_output`` includes the output matrix, and ``tokenizer`` is the folder of a tokenizer that is not the
    model's. ``device`` is auto, cpu or cuda.
    """

    context_size: int
    chunks: int | None = None
    layers: int | None = None
    process_output: bool = False
    tokenizer: Path | None = None
    device: str = "auto"


def collect_imatrix(
    path: Path,
    text: Path,
    out: Path,
    options: ImatrixOptions,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ImatrixSummary:
    """Run the model at ``path`` over the text file ``text`` and write the importance matrix ``out``.

    ``progress`` is called with the bytes of hidden states that have passed and that will pass.

    Raises:
        UsageError: options out of range, a text of less than a chunk, no tokenizer that encodes, or an output that
            would replace an input.
        OutputExistsError: ``out`` is there and ``overwrite`` is false, or something took its name meanwhile.
        SpaceError: no room for the output and for hidden states.
        FileFormatError: an activation is not finite, or the text is not UTF-8.
        Dsv4Error: what is at ``path`` is not a readable model.
    """
    started = time.monotonic()
    _check_positive("--context-size", options.context_size)
    _check_positive("--chunks", options.chunks)
    if not out.name:  # an empty --out, or a folder such as "/"
        raise UsageError("--out: not a file name", expected="a .gguf file", got=out)
    device = chosen_device(options.device)
    source = CachedSource(open_source(path), sys.maxsize)
    sums = SquareSums()
    model = Model(source, layers=options.layers, observe=sums, product=product_on(device))
    entries = planned_entries(model.config, model.n_layers, process_output=options.process_output)
    chunks, left_over = text_chunks(path, text, model.config, options)
    file = imatrix_file(
        {entry.name: (len(entry.matrices), entry.columns) for entry in entries},
        datasets=[str(text)],
        chunks=len(chunks),
        chunk_size=options.context_size,
    )
    output = OutputFile(out.name, file.header, (), file.nbytes)
    plan = Plan("imatrix", path, out.parent, is_folder=False, files=(output,), dropped=(), options={}, source_bytes=0)
    outputs = FileOutputs(plan)
    inputs = [text, *(open_gguf(path).files if is_gguf(path) else ())]
    others = () if options.tokenizer is None else (options.tokenizer,)
    check_outside_outputs(out)
    with contextlib.closing(outputs):
        outputs.look()
        check_sources_stay(plan, {"source": [os.path.abspath(name) for name in inputs]}, outputs, others)
        outputs.check_absent(overwrite)
        outputs.check_own_work(begins_imatrix)
        passage = Passage(model, source, chunks, plan.destination, progress)
        with contextlib.closing(passage):
            _check_space(plan, passage.nbytes)
            try:
                outputs.create()
                unmet = _run(passage, sums, entries, file, outputs.descriptor(0), out, options.process_output)
                outputs.finish()
            except BaseException:
                outputs.discard()
                raise
    return ImatrixSummary(
        model=shown(path),
        text=str(text),
        path=str(out),
        bytes=file.nbytes,
        entries=len(entries),
        layers=model.n_layers,
        chunks=len(chunks),
        context_size=options.context_size,
        left_over_tokens=left_over,
        device=device,
        experts_without_tokens=unmet,
        seconds=time.monotonic() - started,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _check_positive(option: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UsageError(f"{option}: out of range", expected="1 or more", got=value)


# ---- what is collected --------------------------------------------------------------------------------


class PlannedEntry(NamedTuple):
    """An entry of the matrix: its GGUF name, its layer, and the official names of the matrices it is about."""

    name: str
    layer: int | None
    matrices: list[str]
    columns: int


def planned_entries(config: ModelConfig, layers: int, *, process_output: bool) -> list[PlannedEntry]:
    """Return the entries of a model's first ``layers`` layers, and that of the output matrix if it is asked for.

    llama.cpp's tool takes the matrices of blocks, too, and the output matrix only when told to.
    """
    entries: dict[str, PlannedEntry] = {}
    for expected in expected_tensors(config, Draft.NONE, 0):
        row, layer = expected.row, expected.layer
        is_wanted = layer < layers if layer is not None else process_output and expected.name == OUTPUT_MATRIX
        if is_wanted and is_multiplied(row) and row.gguf is not None:
            name = gguf_name(row.gguf, layer)
            entry = entries.setdefault(name, PlannedEntry(name, layer, [], expected.shape[-1]))
            entry.matrices.append(expected.name)
    return list(entries.values())


@dataclass
class SquareSums:
    """Sums of squares of what meets each column of a matrix, float64, and the rows summed; by the matrix's name."""

    sums: dict[str, Array] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def __call__(self, name: str, x: Array) -> None:
        """Add the rows ``x`` [..., columns] that are multiplied by the matrix ``name``.

        Raises:
            FileFormatError: one of them is not finite.
        """
        rows = x.reshape(-1, x.shape[-1])
        squares = np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        if not np.isfinite(squares).all():
            raise FileFormatError(
                f"weight {name}: what it is multiplied with is not finite",
                hint="dsv4convert check MODEL finds NaN and infinite weights",
            )
        self.sums[name] = self.sums.get(name, 0) + squares
        self.counts[name] = self.counts.get(name, 0) + len(rows)

    def of(self, entry: PlannedEntry) -> tuple[Array, Array]:
        """Return an entry's sums [matrices, columns] and counts [matrices], both float32, zero for what met nothing."""
        sums = np.zeros((len(entry.matrices), entry.columns), F32)
        counts = np.zeros(len(entry.matrices), F32)
        for number, name in enumerate(entry.matrices):
            if name in self.sums:
                sums[number], counts[number] = self.sums[name], self.counts[name]
        return sums, counts

    def forget(self) -> None:
        """Begin anew."""
        self.sums.clear()
        self.counts.clear()


def _run(
    passage: Passage,
    sums: SquareSums,
    entries: list[PlannedEntry],
    file: ImatrixFile,
    descriptor: int,
    out: Path,
    process_output: bool,
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Pass all layers and write each one's entries; return the experts that no token met, by layer."""
    unmet: list[tuple[int, tuple[int, ...]]] = []

    def write(layer: int | None) -> None:
        for entry in entries:
            if entry.layer == layer:
                for values, offset in zip(sums.of(entry), file.places[entry.name], strict=True):
                    with os_errors(out, "written"):
                        write_all(descriptor, np.ascontiguousarray(values).data, offset)
        sums.forget()

    passage.begin()
    for n in range(passage.model.n_layers):
        missed = passage.layer(n)
        if missed:
            unmet.append((n, missed))
        write(n)
    if process_output:
        passage.head()
        write(None)
    return tuple(unmet)


# ---- the text and the output --------------------------------------------------------------------------


def text_chunks(path: Path, text: Path, config: ModelConfig, options: ImatrixOptions) -> tuple[Array, int]:
    """Return the text's whole chunks [chunks, context size], and how many tokens are left over.

    As llama.cpp's tool does, the first token of a chunk is replaced by the begin-of-sentence token where the tokenizer
    adds one.

    Raises:
        UsageError: less than a chunk of text, or no tokenizer for it.
        FileFormatError: the text is not UTF-8.
    """
    with named_by_user():
        content = read_whole(text, MAX_TEXT_BYTES)
    try:
        decoded = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError("the text is not UTF-8", where=text, got=f"byte {error.start}: {error.reason}") from None
    tokenizer = find_tokenizer(path, config.vocab_size, options.tokenizer)
    try:
        ids = encode_text(decoded, tokenizer)
    except UsageError as error:
        raise error.with_changes(hint="pass the folder of a tokenizer.json with --tokenizer") from None
    size = options.context_size
    count = len(ids) // size
    if options.chunks is not None:
        count = min(count, options.chunks)
    if not count:
        raise UsageError(
            "the text is shorter than a chunk",
            where=text,
            expected=f"at least {size} tokens (--context-size)",
            got=len(ids),
        )
    chunks = np.array(ids[: count * size], np.int64).reshape(count, size)
    if tokenizer is not None and tokenizer.add_special.get("bos") and tokenizer.bos_token_id is not None:
        chunks[:, 0] = tokenizer.bos_token_id
    return chunks, len(ids) - count * size


def _check_space(plan: Plan, nbytes: int) -> None:
    free = free_bytes(plan.destination)
    if free < plan.nbytes + nbytes:
        raise SpaceError(
            "not enough disk space for the hidden states of all chunks",
            where=plan.destination,
            expected=f"{plan.nbytes + nbytes} bytes free",
            got=free,
            hint="use fewer --chunks or another folder",
        )


# ---- the chunks' way through the layers ---------------------------------------------------------------


class Passage:
    """The chunks [C, T] of a text on their way through a model, their hidden states in files of ``folder``.

    ``source`` is the model's, and keeps the weights that one step uses again and again. ``progress`` is called with
    the bytes of streams that have passed a layer, and those of all layers.
    """

    def __init__(
        self,
        model: Model,
        source: CachedSource,
        chunks: Array,
        folder: Path,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model = model
        self._progress = progress
        self._source = source
        self._chunks = chunks
        with contextlib.ExitStack() as stack:
            # Chunks before and behind a step, and the input and the output of the experts.
            self._before, self._behind = (stack.enter_context(contextlib.closing(ArrayFile(folder))) for _ in range(2))
            width = model.config.hidden_size
            self._inputs, self._outputs = (
                stack.enter_context(contextlib.closing(RowFile(folder, width))) for _ in range(2)
            )
            self._files = stack.pop_all()

    @property
    def nbytes_of_streams(self) -> int:
        """Return the bytes of all chunks' streams."""
        return int(self._chunks.size) * self.model.config.hc_mult * self.model.config.hidden_size * F32.itemsize

    @property
    def nbytes(self) -> int:
        """Return about how many bytes the files take: all streams twice, and one input and output a token."""
        return 2 * self.nbytes_of_streams + 2 * int(self._chunks.size) * self.model.config.hidden_size * F32.itemsize

    def close(self) -> None:
        """Close the files, with which they are gone."""
        self._files.close()

    def begin(self) -> None:
        """Embed all chunks."""
        for tokens in self._chunks:
            self._before.put(_arrays(self.model.begin(tokens, self.model.new_state(), ignore)))

    def layer(self, n: int) -> tuple[int, ...]:
        """Pass layer ``n``, and return the experts that no token met."""
        at = f"layers.{n}.ffn."
        experts, weights = self._attend(n, at)
        self._source.forget()
        met = self._meet_experts(n, experts, weights, at)
        self._join(at)
        self._source.forget()
        return tuple(sorted(set(range(self.model.config.n_routed_experts)) - met))

    def head(self) -> None:
        """Show the observer what the output matrix would be multiplied with."""
        for number, arrays in enumerate(self._before.take()):
            x_TD = self.model.head_input(self._flow(number, arrays))
            self.model.parameters.see(OUTPUT_MATRIX, x_TD)

    def _flow(self, number: int, arrays: dict[str, Array]) -> Flow:
        """Return a chunk with what was kept of it."""
        tokens = self._chunks[number]
        flow = Flow(tokens, np.zeros(len(tokens), bool), arrays["streams"], arrays["pre"])
        flow.rows = {int(name.removeprefix(ROWS)): rows for name, rows in arrays.items() if name.startswith(ROWS)}
        flow.shared = Shared(**{part.name: arrays.get(part.name) for part in fields(Shared)})
        return flow

    def _tell(self, n: int, part: float) -> None:
        """Tell what part of layer ``n`` has passed."""
        if self._progress is not None:
            nbytes = self.nbytes_of_streams
            self._progress(int((n + part) * nbytes), self.model.n_layers * nbytes)

    def _attend(self, n: int, at: str) -> tuple[Array, Array]:
        """Pass the attention of layer ``n``, and return the experts of all tokens [N, K] and their weights [N, K]."""
        p, size = self.model.parameters, self._chunks.shape[1]
        routes: list[tuple[Array, Array]] = []
        for number, arrays in enumerate(self._before.take()):
            flow = self._flow(number, arrays)
            self.model.attend(flow, n, LayerState.empty(p.config, n), ignore)
            entrance = enter(p, flow.streams, flow.pre, f"layers.{n}.hc_ffn", f"layers.{n}.ffn_norm.weight", ignore)
            self._inputs.write(number * size, entrance.x)
            routes.append(route(p, entrance.x, flow.tokens, flow.image, at, ignore))
            flow.pre = entrance.own
            self._behind.put({**_arrays(flow, behind=n), "post": entrance.post, "mix": entrance.mix})
            self._tell(n, (number + 1) / len(self._chunks) / 2)
        experts, weights = zip(*routes, strict=True)
        return np.concatenate(experts), np.concatenate(weights)

    def _meet_experts(self, n: int, experts: Array, weights: Array, at: str) -> set[int]:
        """Add what every expert makes of its tokens to the output, and return the experts that had any."""
        met = set()
        done = 0
        self._outputs.clear()
        for expert, rows, weight in routed_rows(experts, weights):
            for first in range(0, len(rows), EXPERT_TOKENS):
                part = slice(first, first + EXPERT_TOKENS)
                x = self._inputs.read(rows[part])
                self._outputs.add(rows[part], routed_expert(self.model.parameters, x, weight[part], expert, at))
            self._source.forget()
            met.add(expert)
            done += len(rows)
            self._tell(n, 0.5 + done / experts.size / 2)
        return met

    def _join(self, at: str) -> None:
        """Let the output of the routed experts and of the shared one join the streams."""
        size = self._chunks.shape[1]
        for number, arrays in enumerate(self._behind.take()):
            rows = np.arange(number * size, (number + 1) * size)
            y = self._outputs.read(rows) + shared_expert(self.model.parameters, self._inputs.read(rows), at)
            arrays["streams"] = connect(arrays["streams"], y, arrays.pop("post"), arrays.pop("mix"))
            self._before.put(arrays)


ROWS = "rows."


def _arrays(flow: Flow, behind: int = -1) -> dict[str, Array]:
    """Return what is to be kept of a chunk; the rows of n-gram tables up to layer ``behind`` are not."""
    shared = {part.name: getattr(flow.shared, part.name) for part in fields(Shared)}
    return {
        "streams": flow.streams,
        "pre": flow.pre,
        **{name: value for name, value in shared.items() if value is not None},
        **{f"{ROWS}{layer}": rows for layer, rows in flow.rows.items() if layer > behind},
    }
