"""Carrying out a plan, whatever it makes: checks, journal, run, manifest, names, and a summary of it all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import Dsv4Error, InputOutputError, ResumeError, RunInterruptedError, SpaceError, UsageError
from ..formats.backend import Codecs, default_codecs
from ..formats.base import Tally
from ..plan import Dropped, Plan
from .dry_run import DryRun, foresee
from .fingerprint import check_same, check_unchanged, fingerprint
from .journal import Journal, journal_path
from .manifest import finished_before, manifest_path, write_manifest
from .outputs import Outputs
from .resources import check_space, default_threads
from .run import RECORD_SECONDS, RunReport, peak_memory_bytes, run_plan
from .worker import TILE_BYTES

RESUME_HINT = "the finished work is kept: run again with --resume"


@dataclass(frozen=True)
class Summary:
    """What a conversion wrote and left out, and what it took.

    ``counted`` lists the tensors in which elements were NaN, out of range or rounded. ``dry_run`` is given for a run
    that only planned: nothing was written, and ``files`` and ``tensors`` are those that would be.
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
    dry_run: DryRun | None = field(default=None, kw_only=True)

    def as_json(self) -> dict[str, Any]:
        """Return the summary as plain JSON values; of a dry run, what it found."""
        if self.dry_run is not None:
            return self.dry_run.as_json()
        values = {key: value for key, value in self.__dict__.items() if key not in ("report", "dry_run")}
        values["files"] = [{"path": path, "bytes": size} for path, size in self.files]
        values["dropped"] = [asdict(entry) for entry in self.dropped]
        values["notes"], values["counted"] = list(self.notes), list(self.counted)
        return values


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


def summarize_dry_run(plan: Plan, threads: int | None = None) -> Summary:
    """Return the summary of a run that only plans: nothing is read but headers, and nothing is written."""
    threads = default_threads() if threads is None else threads
    nothing = RunReport((), Tally(), 0, 0.0, threads, "", resumed_bytes=0)
    return replace(summarize(plan, nothing), written_bytes=0, dry_run=foresee(plan, threads))


def _start(plan: Plan, outputs: Outputs, journal: Journal, mark: dict[str, Any], overwrite: bool, fresh: bool) -> None:
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
        return default_codecs(), TILE_BYTES
    if device != "cuda":
        raise UsageError("--device: unknown", expected="cpu or cuda", got=device)
    from ..formats.triton.pipeline import cuda_codecs, preferred_tile_bytes, require_cuda

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
            {"file": tensor.file, "tensor": tensor.name, **asdict(tensor.tally)} for tensor in report.flagged
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
