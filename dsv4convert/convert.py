"""The conversions, end to end: a source folder and options become a plan, and a plan becomes files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from .checkpoint.folder import Checkpoint, open_folder
from .checkpoint.weights import Encoding
from .config import read_json_object
from .engine.files import Outputs, free_bytes
from .engine.journal import Journal, check_same, check_unchanged, fingerprint, journal_path
from .engine.run import (
    RECORD_SECONDS,
    RunReport,
    choose_backend,
    peak_memory_bytes,
    run_plan,
)
from .engine.tiles import COPY_TILE_BYTES, TILE_BYTES
from .errors import (
    ConfigError,
    Dsv4Error,
    InputOutputError,
    ResumeError,
    RunInterruptedError,
    SpaceError,
    UsageError,
)
from .formats.backend import Codecs
from .formats.base import Tally
from .layouts.gguf import FILE_PREFIX, GgufModel, GgufOptions, Kind, gguf_files, gguf_models
from .layouts.gguf_metadata import (
    KeyValue,
    ParameterCounts,
    default_output_name,
    dspark_metadata,
    file_type,
    mmproj_metadata,
    model_metadata,
)
from .layouts.names import Draft
from .layouts.segments import MXFP4
from .manifest import finished_before, manifest_path, write_manifest
from .model_card import read_model_card
from .plan import Dropped, OutputFile, Plan
from .tokenizer import Tokenizer, load_tokenizer

RESUME_HINT = "the finished work is kept: run again with --resume"

# Files that say how images are prepared, and the object of each that may hold it.
PROCESSOR_FILES = (("preprocessor_config.json", "media_proc_cfg"), ("processor_config.json", "image_processor"))

# Memory of the interpreter and its libraries, compiled codecs among them; of a segment of the plan with its
# digest; and of one worker: tiles, scratch and output. Measured on V4-Pro's headers and on slices, rounded up.
BASE_MEMORY_BYTES = 170 * 2**20
SEGMENT_MEMORY_BYTES = 2**10
WORKER_MEMORY_BYTES = 6 * TILE_BYTES + 2 * COPY_TILE_BYTES


@dataclass(frozen=True)
class Summary:
    """What a conversion wrote and left out, and what it took.

    ``counted`` lists the tensors in which elements were NaN, out of range or rounded.
    """

    target: str
    source: str
    files: tuple[tuple[str, int], ...]
    tensors: int
    dropped: tuple[Dropped, ...]
    notes: tuple[str, ...]
    counted: tuple[dict[str, Any], ...]
    read_bytes: int
    written_bytes: int
    resumed_bytes: int
    seconds: float
    bytes_per_second: float
    peak_memory_bytes: int
    threads: int
    backend: str
    report: RunReport = field(repr=False, compare=False)

    def as_json(self) -> dict[str, Any]:
        """Return the summary as plain JSON values."""
        values = {key: value for key, value in self.__dict__.items() if key != "report"}
        values["files"] = [{"path": path, "bytes": size} for path, size in self.files]
        values["dropped"] = [asdict(entry) for entry in self.dropped]
        return values


def plan_gguf(
    source: Path,
    out: Path | None,
    options: GgufOptions,
    *,
    tokenizer_pre: str | None = None,
    name: str | None = None,
) -> Plan:
    """Plan ``hf-to-gguf``: every output file of the GGUF of ``source``.

    ``out`` is a file name, a folder to put conventionally named files in, or None for the current folder.

    Raises:
        Dsv4Error: whatever is wrong with the source, the options or the names.
    """
    checkpoint = open_folder(source)
    models, dropped = gguf_models(checkpoint, options)
    describe = _Describer(source, checkpoint.config.vocab_size, tokenizer_pre, name, options.dialect)
    files: list[OutputFile] = []
    folder = _output_folder(out)
    for model in models:
        counts = model.parameters()
        default = default_output_name(
            model.config, describe.card, counts, experts=model.main_type, prefix=FILE_PREFIX[model.kind], name=name
        )
        stem = _stem(out, default, model, len(models))
        files += gguf_files(model.tensors, describe.metadata(model, counts), stem, options.split_max_bytes)
    return Plan(
        target="gguf",
        source=source,
        destination=folder,
        is_folder=False,
        files=tuple(files),
        dropped=dropped,
        options={**asdict(options), "tokenizer_pre": tokenizer_pre, "name": name},
        source_bytes=checkpoint.nbytes,
        notes=(*checkpoint.notes, *_draft_note(checkpoint), *_rounding_note(checkpoint, options)),
    )


class _Describer:
    """Makes the key-values of every kind of file from what lies in the source folder beside its weights."""

    def __init__(
        self, source: Path, vocab_size: int, tokenizer_pre: str | None, name: str | None, dialect: str
    ) -> None:
        self.card = read_model_card(source)
        self._source = source
        self._vocab_size = vocab_size
        self._tokenizer_pre = tokenizer_pre
        self._name = name
        self._dialect = dialect

    def metadata(self, model: GgufModel, counts: ParameterCounts) -> list[KeyValue]:
        kind = file_type(model.main_type)
        if model.kind is Kind.MMPROJ:
            normalisation = _image_normalisation(self._source)
            return mmproj_metadata(
                model.config, self.card, counts=counts, file_type=kind, name=self._name, **normalisation
            )
        if model.kind is Kind.DSPARK:
            return dspark_metadata(
                model.config,
                self._tokenizer,
                self.card,
                counts=counts,
                file_type=kind,
                chat_template=self._template,
                name=self._name,
            )
        return model_metadata(
            model.config,
            self._tokenizer,
            self.card,
            counts=counts,
            file_type=kind,
            block_count=model.block_count,
            chat_template=self._template,
            mtp=model.kind is Kind.MTP,
            name=self._name,
            dialect=self._dialect,
        )

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._source, self._vocab_size, self._tokenizer_pre)

    @cached_property
    def _template(self) -> str:
        return resources.files(__package__).joinpath("chat_template.jinja").read_text(encoding="utf-8")


def _image_normalisation(source: Path) -> dict[str, list[float]]:
    """Return mean and deviation of pixels by which images are normalised, where a processor's file says them.

    Raises:
        ConfigError: such a file is malformed.
    """
    found: dict[str, list[float]] = {}
    for name, nested in PROCESSOR_FILES:
        path = source / name
        if not path.is_file():
            continue
        settings = read_json_object(path)
        inner = settings.get(nested)
        settings |= inner if isinstance(inner, dict) else {}
        for key in ("image_mean", "image_std"):
            value = settings.get(key)
            if value is None:
                continue
            if not isinstance(value, list) or not all(type(item) in (int, float) for item in value):
                raise ConfigError(f"key {key}: no list of numbers", where=path, got=value)
            found[key] = value
    return found


def _output_folder(out: Path | None) -> Path:
    if out is None:
        return Path()
    return out if out.is_dir() else out.parent


def _stem(out: Path | None, default: str, model: GgufModel, n_models: int) -> str:
    """Return the file name without ``.gguf``: the one asked for, or the conventional one."""
    if out is None or out.is_dir():
        return default.removesuffix(".gguf")
    if out.suffix != ".gguf":
        raise UsageError("the output is no .gguf name and no folder that is there", where=out, hint="end it in .gguf")
    return (FILE_PREFIX[model.kind] if n_models > 1 else "") + out.stem


def _draft_note(checkpoint: Checkpoint) -> tuple[str, ...]:
    if checkpoint.draft is Draft.DSPARK:
        return (f"the draft is DSpark with {checkpoint.n_draft} stages, whatever num_nextn_predict_layers says",)
    return ()


def _rounding_note(checkpoint: Checkpoint, options: GgufOptions) -> tuple[str, ...]:
    """Return what MXFP4 means for experts that are not FP4; from an FP4 origin nothing is lost, as counts show."""
    held = {weight.encoding for weight in checkpoint.weights.values() if weight.expert is not None}
    if options.experts != MXFP4.name or held <= {Encoding.FP4}:
        return ()
    others = ", ".join(sorted(encoding.value for encoding in held - {Encoding.FP4}))
    return (f"--experts {MXFP4.name} rounds {others} experts: every element that changes is counted",)


def default_threads() -> int:
    """Return the number of worker threads: the processors that this process may use, at most 16.

    More threads than that only wait for the disk.
    """
    return max(1, min(16, len(os.sched_getaffinity(0))))


def memory_needed(plan: Plan, threads: int) -> int:
    """Return the bytes of memory that carrying out ``plan`` with ``threads`` workers takes at most."""
    segments = sum(len(tensor.segments) for file in plan.files for tensor in file.tensors)
    return BASE_MEMORY_BYTES + segments * SEGMENT_MEMORY_BYTES + threads * WORKER_MEMORY_BYTES


def memory_available() -> int:
    """Return the bytes of memory that the system says can be had."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2**63


def check_space(plan: Plan, already: int = 0) -> None:
    """Check that the disk holds the output, ``already`` bytes of which are there.

    Raises:
        SpaceError: it does not.
    """
    free = free_bytes(plan.destination)
    if free < plan.nbytes - already:
        raise SpaceError(
            "no room on the disk for the output",
            where=plan.destination,
            expected=f"{plan.nbytes - already} bytes free",
            got=free,
            hint="free some space or give another folder",
        )


def execute(
    plan: Plan,
    *,
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    fresh: bool = False,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
    before_finish: Callable[[RunReport], None] | None = None,
    record_seconds: float = RECORD_SECONDS,
) -> Summary:
    """Carry out a plan; nothing appears under an output's name unless all of it is right.

    The finished output comes with a manifest of checksums. A run that ends early, however it ends,
    leaves its work and a journal beside the output; ``resume`` goes on from there, ``fresh`` discards it.

    Raises:
        OutputExistsError: an output is there and ``overwrite`` is false.
        LockedError: another run is writing this output.
        ResumeError: an interrupted run is there and neither ``resume`` nor ``fresh`` was given, or it
            cannot go on.
        SpaceError: no room.
        Dsv4Error: see ``run_plan``.
    """
    threads = default_threads() if threads is None else threads
    codecs, tile_bytes = device_codecs(device, plan)
    outputs = Outputs(plan)
    path = journal_path(plan)
    mark = fingerprint(plan)
    if not path.exists():
        if resume and finished_before(plan, mark):
            report = RunReport((), Tally(), plan.nbytes, 0.0, threads, codecs.name, resumed_bytes=plan.nbytes)
            return summarize(plan, report)
        outputs.check_absent(overwrite)
    with contextlib.closing(outputs), Journal(path, forget=fresh) as journal:
        if journal.is_new:
            _start(plan, outputs, journal, mark, overwrite, fresh)
        elif resume:
            _go_on(plan, outputs, journal, mark)
        else:
            raise ResumeError(
                "an interrupted run left work here",
                where=path,
                hint="give --resume to go on with it, or --fresh to start over",
            )
        manifest = manifest_path(plan)

        def last_look(report: RunReport) -> None:
            check_unchanged(plan, mark)
            if before_finish is not None:
                before_finish(report)

        try:
            report = run_plan(
                plan,
                outputs,
                threads=threads,
                codecs=codecs,
                tile_bytes=tile_bytes,
                progress=progress,
                recorder=journal,
                record_seconds=record_seconds,
                before_finish=last_look,
            )
            write_manifest(manifest, plan, report, mark)
        except KeyboardInterrupt:
            raise RunInterruptedError("interrupted", where=plan.output_path(), hint=RESUME_HINT) from None
        except (RunInterruptedError, SpaceError, InputOutputError) as error:
            raise type(error)(
                error.what,
                where=error.where,
                expected=error.expected,
                got=error.got,
                hint=(f"{error.hint}; " if error.hint else "") + RESUME_HINT,
            ) from None
        except Dsv4Error:
            outputs.discard()
            journal.remove()
            raise
        journal.remove()
    return summarize(plan, report)


def _start(
    plan: Plan, outputs: Outputs, journal: Journal, mark: dict[str, Any], overwrite: bool, fresh: bool
) -> None:
    """Begin a run from nothing; what cannot even begin leaves nothing behind, and older work as it was."""
    had_work = journal.has_content
    try:
        outputs.check_absent(overwrite)
        if not fresh:
            outputs.check_no_work()
        check_space(plan, outputs.allocated_bytes())
    except BaseException:
        if not had_work:
            journal.remove()
        raise
    try:
        journal.begin(mark)
        outputs.create()
        journal.note_inodes(outputs.inodes())
    except BaseException:
        outputs.discard()
        journal.remove()
        raise


def _go_on(plan: Plan, outputs: Outputs, journal: Journal, mark: dict[str, Any]) -> None:
    """Take over the work of an interrupted run.

    Files that are not the very ones which that run wrote (a disk was changed, an older output has the
    name) count only if every finished segment has its checksum.
    """
    check_same(journal.fingerprint or {}, mark, journal.path)
    journal.check_plan(plan)
    started = journal.started_files()
    outputs.reopen(started, journal.complete_files(plan))
    check_space(plan, outputs.allocated_bytes())
    inodes = outputs.inodes()
    known = journal.inodes or []
    for index in sorted(started):
        if known[index : index + 1] != inodes[index : index + 1]:
            journal.check_bytes(plan, index, outputs.paths[index])
    journal.go_on()
    journal.note_inodes(inodes)


def device_codecs(device: str, plan: Plan) -> tuple[Codecs, int]:
    """Return the codecs of ``device`` ("cpu" or "cuda") and the tile size in bytes that suits them.

    Raises:
        UsageError: another device.
        DeviceError: no GPU, or no torch and triton.
    """
    if device == "cpu":
        return choose_backend(plan), TILE_BYTES
    if device != "cuda":
        raise UsageError("--device: unknown", expected="cpu or cuda", got=device)
    from .engine.cuda import cuda_codecs, preferred_tile_bytes, require_cuda

    require_cuda()
    return cuda_codecs(), preferred_tile_bytes()


def summarize(plan: Plan, report: RunReport) -> Summary:
    """Return the summary of a finished run."""
    return Summary(
        target=plan.target,
        source=str(plan.source),
        files=tuple((str(path), file.nbytes) for path, file in zip(plan.final_paths(), plan.files, strict=True)),
        tensors=plan.n_tensors,
        dropped=plan.dropped,
        notes=plan.notes,
        counted=tuple(
            {"file": tensor.file, "tensor": tensor.name, **asdict(tensor.tally)} for tensor in report.flagged()
        ),
        read_bytes=plan.source_bytes,
        written_bytes=plan.nbytes,
        resumed_bytes=report.resumed_bytes,
        seconds=report.seconds,
        bytes_per_second=(plan.nbytes - report.resumed_bytes) / report.seconds if report.seconds else 0.0,
        peak_memory_bytes=peak_memory_bytes(),
        threads=report.threads,
        backend=report.backend,
        report=report,
    )
