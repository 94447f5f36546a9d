"""Carrying out a plan, whatever it makes: checks, journal, run, manifest, names, and a summary of it all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..containers.presence import is_file, is_folder
from ..containers.sources import shown
from ..errors import (
    Dsv4Error,
    InputOutputError,
    OutputExistsError,
    ResumeError,
    RunInterruptedError,
    SpaceError,
    UsageError,
)
from ..formats.backend import default_codecs
from ..formats.base import Tally
from ..plan import Dropped, Plan
from .consume import check_whole
from .fingerprint import check_same, check_unchanged, fingerprint_of
from .journal import Journal, journal_path
from .manifest import (
    check_claimed,
    check_outside_outputs,
    check_replaceable,
    finished_before,
    links_in,
    manifest_path,
    write_manifest,
)
from .monitor import Step
from .names import Identity
from .outputs import (
    Outputs,
    check_new_file,
    check_no_partial,
    os_errors,
    outputs_of,
    partial_path,
    replaced_path,
    trial_path,
)
from .resources import check_free, check_space, default_threads, disk_needed
from .run import RECORD_SECONDS, RunReport, peak_memory_bytes, run_plan

if TYPE_CHECKING:
    from .cluster import Cluster
    from .dry_run import DryRun
    from .upload import Uploading

RESUME_HINT = "the finished work is kept: run again with --resume"
# Errors after which a run can go on.
KEEPING = (RunInterruptedError, SpaceError, InputOutputError, OutputExistsError)


@dataclass(frozen=True)
class Summary:
    """What a conversion wrote and left out, and what it took.

    ``counted`` lists the tensors in which elements were NaN, out of range or rounded. ``dry_run`` is given for a run
    that only planned: nothing was written, and ``files`` and ``tensors`` are those that would be. ``deleted`` says that
    the files were removed here after they had been uploaded.
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
    deleted: bool = field(default=False, kw_only=True)

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
    watch: Callable[[Step], None] | None = None,
    before_finish: Callable[[RunReport], None] | None = None,
    record_seconds: float = RECORD_SECONDS,
    lock: bool = True,
    inputs: Iterable[Path] = (),
    uploading: Uploading | None = None,
    cluster: Cluster | None = None,
) -> Summary:
    """Carry out a plan; nothing appears under an output's name unless all of it is right.

    The finished output comes with a manifest of checksums. A run that ends early, however it ends,
    leaves its work and a journal next to the output; ``resume`` goes on from there, ``fresh`` discards it.
    ``lock`` False leaves out the locks, for file systems where even a lock file fails. ``inputs`` are files that the
    plan was made with besides its source; none of them may be written either. ``uploading`` sends each file that is
    whole, or none where workers can do that; ``Uploading.finish`` has the others sent. A ``cluster`` has the work done
    by its processes, in place of ``threads`` of this one; with an ``uploading`` that deletes they send what they make.

    Raises:
        DeviceError: the cluster cannot be reached.
        UsageError: ``resume`` with ``fresh``, or an output that is a file of the source.
        OutputExistsError: an output is there and ``overwrite`` is false, or something took its name meanwhile.
        LockedError: another run is writing this output.
        ResumeError: an interrupted run is there and neither ``resume`` nor ``fresh`` was given, or it
            cannot go on.
        SpaceError: no room.
        Dsv4Error: see ``run_plan``.
    """
    check_not_both(resume=resume, fresh=fresh)
    by_workers = cluster is not None and uploading is not None and uploading.takes_senders
    if cluster is not None and uploading is not None and by_workers and uploading.deletes:
        from .cluster_upload import execute_in_store

        return execute_in_store(
            plan,
            cluster,
            uploading,
            resume=resume,
            fresh=fresh,
            watch=watch,
            before_finish=before_finish,
            record_seconds=record_seconds,
            lock=lock,
        )
    threads = default_threads(plan) if threads is None else threads
    codecs = default_codecs()
    outputs = outputs_of(plan, lock=lock)
    outputs.look()
    path, manifest = journal_path(plan), manifest_path(plan)
    fingerprint = fingerprint_of(plan)
    if _is_finished(plan, outputs, fingerprint, inputs, overwrite=overwrite, resume=resume):
        return summarize_finished(plan, threads)
    if cluster is not None:
        cluster.connect()
    with (
        contextlib.closing(outputs),
        Journal(path, forget=fresh, lock=lock) as journal,
        contextlib.nullcontext() if uploading is None else contextlib.closing(uploading),
    ):
        if uploading is not None:
            begin_upload(uploading, journal)
        if journal.is_new:
            _start(plan, outputs, journal, fingerprint, overwrite, fresh)
        elif resume:
            _resume(plan, outputs, journal, fingerprint, threads)
            fingerprint = dict(journal.fingerprint or {})  # the same, as it was before anything was used up
        else:
            raise interrupted(path)

        def before_rename(report: RunReport) -> None:
            check_unchanged(plan, fingerprint)
            if before_finish is not None:
                before_finish(report)
            if uploading is not None:
                uploading.settle()

        try:
            makers = None
            if cluster is not None:
                from .cluster import ClusterMakers

                makers = ClusterMakers(cluster, plan, outputs, journal.claim)
            with work_is_kept(plan):
                report = run_plan(
                    plan,
                    outputs,
                    threads=threads,
                    codecs=codecs,
                    watch=watch,
                    recorder=journal,
                    record_seconds=record_seconds,
                    before_finish=before_rename,
                    file_done=None if uploading is None or by_workers else uploading.file_done,
                    makers=makers,
                )
                write_manifest(manifest, plan, report, fingerprint)
        except KEEPING:
            raise
        except Dsv4Error:
            if not plan.consumes:  # what was used up is in the output only
                outputs.discard()
                journal.remove()
            raise
        journal.remove()
    return summarize(plan, report)


@contextlib.contextmanager
def work_is_kept(plan: Plan) -> Iterator[None]:
    """Say in errors after which a run can go on that it can.

    Raises:
        RunInterruptedError: Ctrl-C.
        Dsv4Error: of the run, with a hint.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise RunInterruptedError("interrupted", where=plan.output_path(), hint=RESUME_HINT) from None
    except KEEPING as error:
        if "--resume" in (error.hint or ""):
            raise
        raise error.with_changes(hint=f"{error.hint}; {RESUME_HINT}" if error.hint else RESUME_HINT) from None


def begin_upload(uploading: Uploading, journal: Journal) -> None:
    """Have the destination take the files of a run that holds the journal, so that no run of this output sends any now.

    Raises:
        Dsv4Error: see ``Uploading.begin``; nothing is left behind here.
    """
    had_work = journal.has_content
    try:
        uploading.begin()
    except BaseException:
        if not had_work:
            journal.remove()
        raise


def check_not_both(*, resume: bool, fresh: bool) -> None:
    """Check that a run is not told to go on and to start over.

    Raises:
        UsageError: it is.
    """
    if resume and fresh:
        raise UsageError(
            "--resume and --fresh exclude each other", hint="--resume continues the work, --fresh discards the work"
        )


def summarize_finished(plan: Plan, threads: int | None = None) -> Summary:
    """Return the summary of a plan that an earlier run carried out."""
    threads = default_threads(plan) if threads is None else threads
    name = default_codecs().name
    manifest = manifest_path(plan)
    links = links_in(manifest) if is_file(manifest) else {}  # it goes with an output that was uploaded
    done = RunReport((), Tally(), plan.nbytes, 0.0, threads, name, resumed_bytes=plan.nbytes, links=links)
    return summarize(plan, done)


def _is_finished(
    plan: Plan,
    outputs: Outputs,
    fingerprint: dict[str, Any],
    inputs: Iterable[Path],
    *,
    overwrite: bool,
    resume: bool,
) -> bool:
    """Return whether there is nothing to do for ``resume``, having made sure that nothing is replaced unasked.

    Raises:
        UsageError: the output would replace a file of the source, or another input.
        OutputExistsError: an output is there, and ``overwrite`` is false.
        ResumeError: the output is finished, and unfinished work without a journal lies next to it.
    """
    check_sources_stay(plan, fingerprint, outputs, inputs)
    check_claimed(manifest_path(plan))
    if not os.path.lexists(journal_path(plan)):
        if resume and finished_before(plan, fingerprint):
            outputs.check_no_work()  # of a run with --overwrite that was killed as it began anew
            return True
        outputs.check_absent(overwrite)
    check_replaceable(manifest_path(plan))
    return False


def interrupted(path: Path) -> ResumeError:
    """Return the error of a run that finds the work of another one, and was not told what to do with it."""
    return ResumeError(
        "an interrupted run left work here",
        where=path,
        hint="pass --resume to continue the interrupted run, or --fresh to start over",
    )


def execute_in_turn(
    plans: Sequence[Plan],
    *,
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    fresh: bool = False,
    watch: Callable[[Step], None] | None = None,
    before_finish: Callable[[RunReport], None] | None = None,
    lock: bool = True,
    inputs: Sequence[Path] = (),
    uploading: Uploading | None = None,
    cluster: Cluster | None = None,
) -> Summary:
    """Carry out plans one after another, and sum them up as one; see ``execute`` for the options.

    That no output is in the way, and that the disk holds all of them, is checked before the first begins. Each
    appears when it is done; ``resume`` goes on where the last run stopped, whichever plan it was in. ``uploading`` is
    for a single plan.

    Raises:
        Dsv4Error: as for ``execute``.
    """
    if len(plans) > 1:
        _check_all(plans, inputs, overwrite=overwrite, resume=resume, fresh=fresh, lock=lock)
    summaries: list[Summary] = []
    before = 0
    for plan in plans:
        summary = execute(
            plan,
            threads=threads,
            overwrite=overwrite,
            resume=resume,
            fresh=fresh,
            watch=None if watch is None else partial(_add_step, watch, before),
            before_finish=before_finish,
            lock=lock,
            inputs=inputs,
            uploading=uploading,
            cluster=cluster,
        )
        summaries.append(summary)
        before += plan.nbytes
    return join_summaries(summaries)


def _add_step(watch: Callable[[Step], None], before: int, step: Step) -> None:
    watch(step._replace(done=before + step.done))


def _check_all(
    plans: Sequence[Plan], inputs: Sequence[Path], *, overwrite: bool, resume: bool, fresh: bool, lock: bool
) -> None:
    """Check of every plan what can be checked before the first one runs.

    Raises:
        Dsv4Error: as for ``execute``.
    """
    needed = 0
    for plan in plans:
        outputs = outputs_of(plan, lock=lock)
        outputs.look()
        if _is_finished(plan, outputs, fingerprint_of(plan), inputs, overwrite=overwrite, resume=resume):
            continue
        if not (resume or fresh):
            if os.path.lexists(journal_path(plan)):
                raise interrupted(journal_path(plan))
            outputs.check_no_work()
        needed += disk_needed(plan, outputs.allocated_bytes())
    check_free(plans[0].destination, needed)


def summarize_dry_run(plan: Plan, threads: int | None = None, *, sent_by_workers: bool = False) -> Summary:
    """Return the summary of a run that only plans: nothing is read but headers, and nothing is written."""
    from .dry_run import foresee

    threads = default_threads(plan) if threads is None else threads
    nothing = RunReport((), Tally(), 0, 0.0, threads, "", resumed_bytes=0)
    found = foresee(plan, threads, sent_by_workers=sent_by_workers)
    return replace(summarize(plan, nothing), written_bytes=0, dry_run=found)


def _start(
    plan: Plan, outputs: Outputs, journal: Journal, fingerprint: dict[str, Any], overwrite: bool, fresh: bool
) -> None:
    """Begin a run from nothing; what cannot even begin leaves nothing behind, and older work as it was."""
    had_work = journal.has_content
    try:
        check_whole(plan)
        outputs.check_absent(overwrite)
        if not fresh:
            outputs.check_no_work()
        check_space(plan, outputs.allocated_bytes())
    except BaseException:
        if not had_work:
            journal.remove()
        raise
    try:
        journal.begin(fingerprint, outputs.replaces, outputs.held, outputs.discards if fresh else {})
        outputs.create()
        journal.note_inodes(outputs.inodes())
    except BaseException as error:
        outputs.discard()
        # Ctrl-C comes between any two steps, also after a file is made and before anybody knows of it: the journal says
        # whose it is, as after a kill.
        if isinstance(error, KeyboardInterrupt) and any(map(os.path.lexists, outputs.temporary())):
            raise RunInterruptedError("interrupted", where=plan.output_path(), hint=RESUME_HINT) from None
        journal.remove()
        raise


def _resume(plan: Plan, outputs: Outputs, journal: Journal, fingerprint: dict[str, Any], threads: int) -> None:
    """Take over the work of an interrupted run: every finished segment counts only with its checksum.

    Neither name nor inode number nor size prove that a file is as it was left: a stale copy can be put back, and a
    freed inode number be given to the next file.
    """
    from concurrent.futures import ThreadPoolExecutor

    check_same(journal.fingerprint or {}, fingerprint, journal.path)
    journal.check_plan(plan)
    started = journal.started_files()
    outputs.replaces, outputs.held, outputs.discards = journal.replaces, journal.held, journal.discards
    if not journal.inodes:  # that run died while it made its files, or before
        outputs.remove_discarded()
    outputs.reopen(started, journal.complete_files(plan), journal.inodes)
    outputs.check_not_taken()
    check_space(plan, outputs.allocated_bytes())
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda index: journal.check_bytes(plan, index, outputs.paths[index]), sorted(started)):
            pass
    journal.resume()
    journal.note_inodes(outputs.inodes())


def check_sources_stay(plan: Plan, fingerprint: dict[str, Any], outputs: Outputs, inputs: Iterable[Path] = ()) -> None:
    """Check that no name that the run writes, renames or removes stands for a file of the source, or another input.

    A folder's files are only made and unlinked: another hard link of a source's file, as an older output may hold,
    leaves that file as it is.

    Raises:
        UsageError: one does.
        InputOutputError: the source cannot be looked at.
    """
    manifest = manifest_path(plan)
    written = [*plan.final_paths(), *outputs.temporary(), *outputs.paths, journal_path(plan), manifest]
    written += [partial_path(manifest), replaced_path(plan.output_path()), trial_path(plan.output_path())]
    unlinked = {*plan.final_paths(), *outputs.paths} if plan.is_folder else set()
    sources = (plan.source, *(plan.source / name for name in fingerprint["source"]))
    check_inputs_stay((*sources, *inputs), written, unlinked)


def check_inputs_stay(inputs: Iterable[Path], written: Iterable[Path], unlinked: Collection[Path] = ()) -> None:
    """Check that no name that is written stands for an input, a file in a folder that is one, or one of its split set.

    Links are followed on both sides, and files compared by device and inode; ``unlinked`` names lose their link alone,
    so another name of an input may be among them.

    Raises:
        UsageError: one does.
        InputOutputError: an input cannot be looked at.
    """
    known: dict[tuple[int, int], list[Path]] = {}
    for given in inputs:
        with os_errors(given, "read"):
            for path in (given, *(given.iterdir() if is_folder(given) else _split_set(given))):
                if (status := _status(path)) is not None:
                    known.setdefault((status.st_dev, status.st_ino), []).append(path)
    for path in written:
        status = _status(path)
        found = [] if status is None else known.get((status.st_dev, status.st_ino), [])
        source = next((source for source in found if path not in unlinked or _is_same_entry(path, source)), None)
        if source is not None:
            raise UsageError(
                "the output would replace a file of the source",
                where=path,
                got=f"the same file as {source}",
                hint="choose another name or folder for the output",
            )


def _split_set(path: Path) -> list[Path]:
    """Return the files of the split GGUF that a file is one of by its name."""
    if path.suffix != ".gguf":
        return []
    from ..containers.gguf import paths_of_set

    return paths_of_set(path)


def check_result(path: Path, inputs: Iterable[Path], *, overwrite: bool) -> Identity | None:
    """Return what a result replaces that ``write_file`` writes at the end, having checked that it may.

    Raises:
        OutputExistsError: as for ``check_new_file``, or something has the temporary name.
        UsageError: it would replace one of the inputs, or lie in a finished output.
    """
    check_outside_outputs(path)
    check_new_file(path, overwrite)
    check_no_partial(path)
    check_inputs_stay(inputs, (path, partial_path(path)))
    return Identity.of(path)


def _is_same_entry(one: Path, other: Path) -> bool:
    """Return whether two names of a file are the same name in the same folder, once links are followed."""
    left, right = Path(os.path.realpath(one)), Path(os.path.realpath(other))
    return left.name == right.name and os.path.samefile(left.parent, right.parent)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (OSError, ValueError):
        return None


def summarize(plan: Plan, report: RunReport) -> Summary:
    """Return the summary of a finished run."""
    return Summary(
        target=plan.target,
        source=shown(plan.source),
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


def join_summaries(summaries: Sequence[Summary]) -> Summary:
    """Return several conversions of one source as one: files, bytes, seconds and counts are added up."""
    first = summaries[0]
    if len(summaries) == 1:
        return first
    from .dry_run import join_dry_runs

    dry_runs = [summary.dry_run for summary in summaries if summary.dry_run is not None]
    reports = [summary.report for summary in summaries]
    tally = Tally()
    for report in reports:
        tally.add(report.tally)
    seconds = sum(summary.seconds for summary in summaries)
    written, resumed = (sum(getattr(s, name) for s in summaries) for name in ("written_bytes", "resumed_bytes"))
    return replace(
        first,
        files=tuple(chain.from_iterable(summary.files for summary in summaries)),
        tensors=sum(summary.tensors for summary in summaries),
        dropped=tuple(dict.fromkeys(chain.from_iterable(summary.dropped for summary in summaries))),
        notes=tuple(dict.fromkeys(chain.from_iterable(summary.notes for summary in summaries))),
        counted=tuple(chain.from_iterable(summary.counted for summary in summaries)),
        read_bytes=sum(summary.read_bytes for summary in summaries),
        written_bytes=written,
        resumed_bytes=resumed,
        seconds=seconds,
        bytes_per_second=(written - resumed) / seconds if seconds else 0.0,
        peak_memory_bytes=max(summary.peak_memory_bytes for summary in summaries),
        report=replace(
            reports[0],
            tensors=tuple(chain.from_iterable(report.tensors for report in reports)),
            tally=tally,
            written_bytes=sum(report.written_bytes for report in reports),
            seconds=sum(report.seconds for report in reports),
            resumed_bytes=sum(report.resumed_bytes for report in reports),
            flagged=tuple(chain.from_iterable(report.flagged for report in reports)),
            zero=tuple(dict.fromkeys(chain.from_iterable(report.zero for report in reports))),
            links=dict(chain.from_iterable(report.links.items() for report in reports)),
        ),
        dry_run=join_dry_runs(dry_runs) if dry_runs else None,
    )
