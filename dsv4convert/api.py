"""The public functions: one for each command, with the command's options as keywords; the command line calls them.

Imports stand in the functions, so that a command loads what it needs and no more.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial, wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeAlias, TypedDict, TypeVar

from .errors import UsageError, counted

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .checkpoint.folder import Checkpoint
    from .engine.cluster import Cluster
    from .engine.conversion import Summary
    from .engine.manifest import ManifestReport
    from .engine.monitor import Step
    from .engine.run import RunReport
    from .engine.upload import Upload
    from .estimation.estimate import Estimate
    from .inspection.census import CheckReport
    from .inspection.description import Description
    from .plan import Plan
    from .reference import Model
    from .reference.importance import ImatrixSummary
    from .targets.mend import MendSummary
    from .targets.recipe_sizes import RecipeSizes
    from .targets.repack import RepackSummary
    from .targets.shards import ShardSummary
    from .verification import Report

T = TypeVar("T")
P = ParamSpec("P")
StrPath: TypeAlias = "str | os.PathLike[str]"

# Called with the bytes done and the bytes in all; a ``StepListener`` of ``engine.monitor`` is told more.
Progress: TypeAlias = Callable[[int, int], None]

DEFAULT_MAX_FILE_SIZE = "5GB"
DEFAULT_CONTEXT_SIZE = 512
MAX_THREADS = 256
DOWNLOAD_OUTPUT = "download the output, and pass its file or folder"

# Decimal units, as llama.cpp's converter and file managers count.
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
# What KiB, MiB … stand for; memory is sold by these.
BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
TOKEN_UNITS = {"": 1, "K": 2**10, "M": 2**20}


def _located(source: StrPath, *, headers_only: bool = False, cache: bool = False) -> Path:
    """Return the path of a source: a local one as it is, or where a remote one is mounted (see ``containers``).

    Raises:
        Dsv4Error: nothing there, or it cannot be reached.
    """
    from .containers.sources import local_path

    return local_path(source, headers_only=headers_only, cache=cache)


def _here(out: StrPath, hint: str, what: str = "an output") -> Path:
    """Return the path of an output, or of ``what``, on this machine; ``hint`` says what to do where it is elsewhere.

    Raises:
        UsageError: it is an address.
    """
    from .containers.sources import ADDRESS

    found = ADDRESS.fullmatch(os.fspath(out))
    if found is not None:
        from .containers.destinations import shown_address

        address = shown_address(f"{found[1]}://{found[2]}")  # of which a path has lost a slash
        raise UsageError(f"an address, where {what} on this machine is wanted", where=address, hint=hint)
    return Path(out)


def _imatrix_here(file: StrPath) -> Path:
    return _here(file, "download the file and pass its path", "an importance matrix")


# ---- conversions --------------------------------------------------------------------------------------


class RunOptions(TypedDict, total=False):
    """How a conversion is carried out: the keywords that all conversions have besides their own.

    ``threads`` None are as many as help. ``overwrite`` replaces an older output; of an interrupted run, ``resume``
    continues the work and ``fresh`` discards it. ``dry_run`` plans and writes nothing. ``lock`` False takes no locks,
    where the file system has none. ``cache`` downloads a source on the hub into the hub's own cache first. ``upload``
    sends the output to a repository, OWNER/NAME, or to an object store, "s3://BUCKET/PREFIX". ``workers`` is a Ray
    cluster that does the work: "ray", "ray:4", "ray:auto" or "ray://HOST:PORT"; source and output are at addresses, or
    on a file system that all its machines share.
    """

    threads: int | None
    overwrite: bool
    resume: bool
    fresh: bool
    dry_run: bool
    lock: bool
    cache: bool
    upload: Upload | str | None
    workers: str | None
    progress: Progress | None


RUN_DEFAULTS = RunOptions(
    threads=None,
    overwrite=False,
    resume=False,
    fresh=False,
    dry_run=False,
    lock=True,
    cache=False,
    upload=None,
    workers=None,
    progress=None,
)


def _source_of(source: StrPath, run: RunOptions) -> Path:
    """Return the path of a conversion's source; a dry run reads its headers alone.

    Raises:
        Dsv4Error: see ``_located``.
    """
    return _located(source, headers_only=run["dry_run"], cache=run["cache"])


def _each(given: str | Iterable[str]) -> tuple[str, ...]:
    """Return texts, of which there may be one alone: its characters are none."""
    return (given,) if isinstance(given, str) else tuple(given)


def _conversion(function: Callable[P, T]) -> Callable[P, T]:
    """Return a conversion whose ``run`` is whole, and whose signature has the keywords of ``RunOptions`` one by one."""
    own = [
        parameter for parameter in signature(function).parameters.values() if parameter.kind != Parameter.VAR_KEYWORD
    ]
    kinds = {name: getattr(kind, "__forward_arg__", kind) for name, kind in RunOptions.__annotations__.items()}
    common = (
        Parameter(name, Parameter.KEYWORD_ONLY, default=value, annotation=kinds[name])
        for name, value in RUN_DEFAULTS.items()
    )
    whole = signature(function).replace(parameters=[*own, *common])

    @wraps(function)
    def convert(*arguments: P.args, **keywords: P.kwargs) -> T:
        try:
            given = whole.bind(*arguments, **keywords)
        except TypeError as error:
            raise TypeError(f"{function.__name__}(): {error}") from None
        given.apply_defaults()
        return function(*given.args, **given.kwargs)

    convert.__signature__ = whole  # type: ignore[attr-defined]
    return convert


@_conversion
def convert_gguf(
    source: StrPath,
    out: StrPath | None = None,
    *,
    dense: str | None = None,
    experts: str | None = None,
    recipe: str | None = None,
    tensor_type: str | Iterable[str] = (),
    output_type: str | None = None,
    embedding_type: str | None = None,
    pure: bool = False,
    imatrix: StrPath | None = None,
    importance: str | None = None,
    ggml_lib: StrPath | None = None,
    draft: str | None = None,
    mmproj: str | None = None,
    max_file_size: int | str | None = None,
    split_max_tensors: int | None = None,
    no_tensor_first_split: bool = False,
    layers: str | None = None,
    dialect: str = "llama.cpp",
    engram: str | None = None,
    engram_last: bool = False,
    tokenizer_pre: str | None = None,
    name: str | None = None,
    fit: int | str | None = None,
    context: int | str | None = None,
    strict: bool = False,
    index: str = "file",
    **run: Unpack[RunOptions],
) -> Summary:
    """Convert the checkpoint folder ``source`` to a GGUF: ``dsv4convert hf-to-gguf``.

    ``out`` is the .gguf to write or an existing folder for it; None names it after the model, in the current folder.
    Sizes are bytes, or text such as "45G"; ``layers`` is a range such as "0-3". Types are ggml's names in lower case;
    ``tensor_type`` are "REGEX=TYPE", the last match winning.
    ``split_max_tensors`` is the most tensors that a file of a split GGUF may hold, 1 or more;
    ``no_tensor_first_split`` leaves its first file to the metadata.
    ``engram`` is how V4.1's n-gram tables are stored: q8_0 (the default), mxfp4, bf16, or as published, i8-row264 or
    i8-split; ``engram_last`` puts them behind all other tensors.
    ``fit`` chooses the largest recipe of which the files and the KV cache for ``context`` tokens ("128k", the default
    where the model has as many) take at most so many bytes together; with ``recipe`` it checks that one.
    ``run`` is what all conversions have in common.

    Raises:
        Dsv4Error: the class says what is wrong; ``str()`` of it is the line that the command prints.
    """
    from .targets.gguf import plan_gguf
    from .targets.gguf_tensors import GgufOptions

    place = _source_of(source, run)
    options = GgufOptions(
        dense=dense,
        experts=experts,
        output=output_type,
        embedding=embedding_type,
        pure=pure,
        recipe=recipe,
        tensor_types=_each(tensor_type),
        imatrix=None if imatrix is None else os.path.abspath(_imatrix_here(imatrix)),
        importance=importance,
        ggml_lib=None if ggml_lib is None else os.fspath(ggml_lib),
        draft=draft,
        mmproj=mmproj,
        layers=None if layers is None else parse_layers(layers),
        dialect=dialect,
        split_max_bytes=None if max_file_size is None else parse_size(max_file_size),
        split_max_tensors=split_max_tensors,
        no_tensor_first_split=no_tensor_first_split,
        engram=engram,
        engram_last=engram_last,
    )
    notes: tuple[str, ...] = ()
    tokens = None if context is None else parse_tokens(context)
    if fit is not None:
        from .targets.recipe_sizes import check_fits, size_recipes

        room = parse_size(fit, "--fit")
        sizes = size_recipes(
            place, options, context=tokens, fit=room, tokenizer_pre=tokenizer_pre, name=name, index=index
        )
        options = replace(options, recipe=check_fits(sizes))
        notes = (f"--fit {fit}: recipe {options.recipe}, with a KV cache for {counted(sizes.context, 'token')}",)
    elif tokens is not None:
        raise UsageError("--context is for --fit and --list-recipes", hint="add --fit SIZE")
    target = None if out is None else Path(out)
    plan = plan_gguf(place, target, options, tokenizer_pre=tokenizer_pre, name=name, strict=strict, index=index)
    plan = replace(plan, notes=(*notes, *plan.notes))
    inputs = [Path(path) for path in (imatrix, recipe, ggml_lib) if path is not None]
    return _carry_out([plan], run, strict=strict, inputs=inputs)


def list_recipes(
    source: StrPath,
    *,
    fit: int | str | None = None,
    context: int | str | None = None,
    imatrix: StrPath | None = None,
    importance: str | None = None,
    draft: str | None = None,
    mmproj: str | None = None,
    max_file_size: int | str | None = None,
    split_max_tensors: int | None = None,
    no_tensor_first_split: bool = False,
    layers: str | None = None,
    dialect: str = "llama.cpp",
    engram: str | None = None,
    engram_last: bool = False,
    tokenizer_pre: str | None = None,
    name: str | None = None,
    index: str = "file",
) -> RecipeSizes:
    """Return every recipe with the size of the files that ``convert_gguf`` would make, from headers alone.

    ``fit`` and ``context`` as for ``convert_gguf``: what does not fit, and which recipe would be chosen. The others
    are the options of ``convert_gguf`` on which sizes depend.

    Raises:
        Dsv4Error: see ``convert_gguf``.
    """
    from .targets.gguf_tensors import GgufOptions
    from .targets.recipe_sizes import size_recipes

    place = _located(source, headers_only=True)
    options = GgufOptions(
        imatrix=None if imatrix is None else os.path.abspath(_imatrix_here(imatrix)),
        importance=importance,
        draft=draft,
        mmproj=mmproj,
        layers=None if layers is None else parse_layers(layers),
        dialect=dialect,
        split_max_bytes=None if max_file_size is None else parse_size(max_file_size),
        split_max_tensors=split_max_tensors,
        no_tensor_first_split=no_tensor_first_split,
        engram=engram,
        engram_last=engram_last,
    )
    room = None if fit is None else parse_size(fit, "--fit")
    tokens = None if context is None else parse_tokens(context)
    return size_recipes(place, options, context=tokens, fit=room, tokenizer_pre=tokenizer_pre, name=name, index=index)


@_conversion
def merge(
    source: StrPath,
    out: StrPath,
    *,
    delete_parts: bool = False,
    **run: Unpack[RunOptions],
) -> Summary:
    """Write the split GGUF that ``source`` is one file of as one file: ``dsv4convert merge``.

    ``delete_parts`` cuts each file of the split once its tensors are in the output, and removes all at the end: only
    ``resume`` can continue such a run after an interruption.

    Raises:
        Dsv4Error: see ``convert_gguf``.
    """
    from .containers.sources import is_address, needs_local_files
    from .engine.conversion import check_not_both, summarize_finished
    from .targets.merge import plan_merge, plan_of_merged, remove_parts

    check_not_both(resume=run["resume"], fresh=run["fresh"])
    if delete_parts and run["resume"] and not (run["dry_run"] or is_address(os.fspath(source))):
        merged = plan_of_merged(Path(source), Path(out))
        if merged is not None:
            _check_threads(run["threads"])
            remove_parts(merged)
            return summarize_finished(merged, run["threads"])
    place = _source_of(source, run)
    if delete_parts and run["upload"] is not None:
        raise UsageError("--delete-parts and --upload exclude each other", hint="upload first, then delete the parts")
    if delete_parts:
        needs_local_files(place, "--delete-parts")
    plan = plan_merge(place, Path(out), delete_parts=delete_parts)
    summary = _carry_out([plan], run)
    if summary.dry_run is None:
        remove_parts(plan)
    return summary


@_conversion
def shard(
    source: StrPath,
    out: StrPath,
    *,
    mp: int,
    rank: int | Iterable[int] | None = None,
    experts: str | None = None,
    draft: str = "keep",
    strict: bool = False,
    index: str = "file",
    **run: Unpack[RunOptions],
) -> ShardSummary:
    """Divide the checkpoint folder ``source`` among ``mp`` ranks, as the published inference code loads it.

    ``rank`` gives the ranks to write, None all of them. ``draft`` is what becomes of MTP layers or DSpark stages, as in
    every command that writes folders: keep, drop, only, or split, which writes the draft to ``OUT-draft``.

    Raises:
        Dsv4Error: see ``convert_gguf``.
    """
    from .targets.drafts import folders_of, parts_of_one_model
    from .targets.shard_tensors import ShardOptions, join_costs
    from .targets.shards import ShardSummary, plan_shards

    place = _source_of(source, run)
    ranks = None if rank is None else (rank,) if isinstance(rank, int) else tuple(rank)
    if ranks == ():
        raise UsageError("--rank is empty", expected="at least one rank, or None for all of them")
    made = [
        plan_shards(place, folder, ShardOptions(mp, ranks, experts, mode), strict=strict, index=index)
        for folder, mode in folders_of(Path(out), draft)
    ]
    plans = parts_of_one_model([shards.plan for shards in made])
    summary = _carry_out(plans, run, strict=strict)
    return ShardSummary(**summary.__dict__, costs=join_costs([shards.costs for shards in made]))


@_conversion
def unshard(
    source: StrPath,
    out: StrPath,
    *,
    wo_a: str = "bf16",
    draft: str = "keep",
    max_file_size: int | str = DEFAULT_MAX_FILE_SIZE,
    strict: bool = False,
    **run: Unpack[RunOptions],
) -> Summary:
    """Put the model-parallel shards in ``source`` together again: a checkpoint folder.

    Raises:
        Dsv4Error: see ``convert_gguf``.
    """
    from .targets.drafts import folder_plans
    from .targets.shards import plan_unshard

    place = _source_of(source, run)
    plan = partial(plan_unshard, place, wo_a=wo_a, max_file_bytes=parse_size(max_file_size), strict=strict)
    plans = folder_plans(plan, Path(out), draft)
    return _carry_out(plans, run, strict=strict)


@_conversion
def dequantize(
    source: StrPath,
    out: StrPath,
    *,
    dtype: str = "bf16",
    names: str = "official",
    draft: str = "keep",
    max_file_size: int | str = DEFAULT_MAX_FILE_SIZE,
    strict: bool = False,
    index: str = "file",
    **run: Unpack[RunOptions],
) -> Summary:
    """Write the checkpoint folder ``source`` without scales, in BF16, F16 or F32.

    Raises:
        LossyError: ``strict``, and a value leaves the type's range or is rounded.
        Dsv4Error: see ``convert_gguf``.
    """
    from .targets.dequantize import plan_dequantize
    from .targets.drafts import folder_plans

    place = _source_of(source, run)
    plan = partial(
        plan_dequantize,
        place,
        dtype=dtype,
        names=names,
        max_file_bytes=parse_size(max_file_size),
        strict=strict,
        index=index,
    )
    plans = folder_plans(plan, Path(out), draft)
    return _carry_out(plans, run, strict=strict, exact=strict)


@_conversion
def requantize(
    source: StrPath,
    out: StrPath,
    *,
    draft: str = "keep",
    max_file_size: int | str = DEFAULT_MAX_FILE_SIZE,
    strict: bool = False,
    index: str = "file",
    **run: Unpack[RunOptions],
) -> Summary:
    """Write the floats of the checkpoint folder ``source`` in the official layout: FP8 and FP4, rounded as published.

    Raises:
        LossyError: ``strict``, and a value is rounded.
        Dsv4Error: see ``convert_gguf``.
    """
    from .targets.drafts import folder_plans
    from .targets.requantize import plan_requantize

    place = _source_of(source, run)
    plan = partial(plan_requantize, place, max_file_bytes=parse_size(max_file_size), strict=strict, index=index)
    plans = folder_plans(plan, Path(out), draft)
    return _carry_out(plans, run, strict=strict, exact=strict)


@_conversion
def convert_mlx(
    source: StrPath,
    out: StrPath,
    *,
    dense: str = "mxfp8",
    max_file_size: int | str = DEFAULT_MAX_FILE_SIZE,
    strict: bool = False,
    index: str = "file",
    **run: Unpack[RunOptions],
) -> Summary:
    """Write the checkpoint folder ``source`` in MLX's layout, under the names that mlx-vlm loads: ``dsv4convert mlx``.

    ``dense`` is the form of FP8 weights, "mxfp8", "affine8" or "bf16"; FP4 weights become mxfp4.

    Raises:
        LossyError: a scale of FP8 that no E8M0 byte stands for, with "mxfp8".
        Dsv4Error: see ``convert_gguf``.
    """
    from .targets.mlx import plan_mlx

    place = _source_of(source, run)
    plan = plan_mlx(place, Path(out), dense=dense, max_file_bytes=parse_size(max_file_size), strict=strict, index=index)
    return _carry_out([plan], run, strict=strict)


@_conversion
def convert_maxtext(
    source: StrPath,
    out: StrPath,
    *,
    dtype: str = "bf16",
    scan: bool = False,
    check: bool = False,
    strict: bool = False,
    index: str = "file",
    **run: Unpack[RunOptions],
) -> Summary:
    """Write the checkpoint folder ``source`` as a checkpoint that MaxText loads: ``dsv4convert maxtext``.

    ``dtype`` is bf16 or f32; ``scan`` stacks the layers that MaxText scans; ``check`` reads the finished checkpoint
    back with Orbax, and compares every leaf with its file.

    Raises:
        UsageError: ``check`` with ``upload``, which would show others what has not been read back.
        DeviceError: ``check``, and Orbax is not installed.
        FileFormatError: ``check``, and Orbax reads something else.
        LossyError: ``strict``, and a value is rounded.
        Dsv4Error: see ``convert_gguf``.
    """
    from .targets.maxtext import plan_maxtext

    if check and run["upload"] is not None:
        raise UsageError(
            "--check and --upload exclude each other", hint="check first; --resume --upload sends what is made"
        )
    if check:
        from .verification.orbax_read_back import import_orbax

        import_orbax()
    place = _source_of(source, run)
    plan = plan_maxtext(place, Path(out), dtype=dtype, scan=scan, strict=strict, index=index)
    summary = _carry_out([plan], run, strict=strict, exact=strict)
    if not check or run["dry_run"]:
        return summary
    from .verification.orbax_read_back import read_back

    return replace(summary, notes=(*summary.notes, read_back(plan.destination)))


@_conversion
def repack(
    source: StrPath,
    out: StrPath,
    *,
    experts: str = "fp8",
    draft_experts: bool = False,
    input_scale: str | float | None = None,
    draft: str = "keep",
    max_file_size: int | str = DEFAULT_MAX_FILE_SIZE,
    strict: bool = False,
    index: str = "file",
    **run: Unpack[RunOptions],
) -> RepackSummary:
    """Write the checkpoint folder ``source`` with its FP4 experts in FP8, or in NVFP4.

    Of NVFP4 alone: ``draft_experts`` converts the draft's experts too; ``input_scale`` is the scale of activations: a
    number, "W1-AND-W3,W2", a JSON file with the names of matrices or tensors, or a folder that has such scales.

    Raises:
        LossyError: ``strict``, and an element changes.
        Dsv4Error: see ``convert_gguf``.
    """
    from .targets.drafts import folder_plans
    from .targets.repack import plan_repack, summarize_repack

    place = _source_of(source, run)
    plan = partial(
        plan_repack,
        place,
        experts=experts,
        draft_experts=draft_experts,
        input_scale=None if input_scale is None else str(input_scale),
        max_file_bytes=parse_size(max_file_size),
        strict=strict,
        index=index,
    )
    plans = folder_plans(plan, Path(out), draft)
    return summarize_repack(plans, _carry_out(plans, run, strict=strict, exact=strict))


@_conversion
def mend(
    source: StrPath,
    out: StrPath,
    *,
    reindex: bool = False,
    drop_draft: bool = False,
    graft_draft: StrPath | None = None,
    prune_config: bool = False,
    rename: str | None = None,
    strict: bool = False,
    **run: Unpack[RunOptions],
) -> MendSummary:
    """Write the checkpoint folder ``source`` mended; files of weights that stay as they are are shared, not copied.

    ``reindex`` goes by the headers of all files and writes the index anew; ``graft_draft`` is the folder of which the
    draft is taken; ``prune_config`` leaves out keys of config.json about a vision tower or quantised weights that are
    not there; ``rename`` is official or transformers. The source is never written. A hard link is one file in two
    folders: what changes such a file in place changes both.

    Raises:
        Dsv4Error: see ``convert_gguf``.
    """
    from .targets.mend import Mends, plan_mend, summarize_mend

    place = _source_of(source, run)
    graft = None if graft_draft is None else _source_of(graft_draft, run)
    mends = Mends(reindex, drop_draft, graft, prune_config, rename)
    plan = plan_mend(place, Path(out), mends, strict=strict)
    return summarize_mend(plan, _carry_out([plan], run, strict=strict))


def _carry_out(
    plans: Sequence[Plan], run: RunOptions, *, strict: bool = False, exact: bool = False, inputs: Sequence[Path] = ()
) -> Summary:
    """Carry out the plans of one model, or only tell what they would write and need.

    ``strict`` refuses values that are not finite and tensors of zeros, ``exact`` values that change. None of the
    ``inputs``, files besides the source, may be written.
    """
    from .checkpoint.meaning import refuse_zeros, with_zeros
    from .engine.conversion import execute_in_turn, join_summaries, summarize_dry_run, summarize_finished
    from .engine.loss import refuse_loss, refuse_not_finite

    threads, progress, upload = run["threads"], run["progress"], run["upload"]
    _check_threads(threads)
    for plan in plans:
        _here(plan.output_path(), "name a file or folder here, and pass the address with --upload")
    uploading = None
    if upload is not None:
        from .engine.upload import Upload, Uploading

        if len(plans) > 1:
            raise UsageError("--upload takes one output", hint="run once for the trunk and once for the draft")
        request = Upload(upload) if isinstance(upload, str) else upload
        uploading = Uploading(plans[0], request, overwrite=run["overwrite"], resume=run["resume"])
    cluster = _cluster_of(run["workers"], plans, threads, progress)
    if run["dry_run"]:
        is_sent = cluster is not None and uploading is not None and uploading.takes_senders and uploading.deletes
        return join_summaries([summarize_dry_run(plan, threads, sent_by_workers=is_sent) for plan in plans])
    if uploading is not None and uploading.was_finished():
        summary = summarize_finished(plans[0], threads)
        return replace(summary, notes=(*summary.notes, "uploaded by that run, and not kept here"), deleted=True)

    def refuse(report: RunReport) -> None:
        if exact:
            refuse_loss(report)
        if strict:
            refuse_not_finite(report)
            refuse_zeros(report.zero, plans[0].source)

    total = sum(plan.nbytes for plan in plans)
    with cluster or nullcontext():
        with nullcontext() if uploading is None else uploading.abandoned_with_the_run():
            summary = execute_in_turn(
                plans,
                threads=threads,
                overwrite=run["overwrite"],
                resume=run["resume"],
                fresh=run["fresh"],
                lock=run["lock"],
                inputs=inputs,
                cluster=cluster,
                watch=_steps_of_total(progress, total),
                before_finish=refuse,
                uploading=uploading,
            )
        if progress is not None:  # headers and padding are no worker's task: they are done when all is
            progress(total, total)
        summary = replace(summary, notes=with_zeros(summary.notes, summary.report.zero))
        if uploading is not None:
            notes = (*summary.notes, *uploading.finish(summary.notes, cluster))
            summary = replace(summary, notes=notes, deleted=uploading.deletes)
    return summary


def _cluster_of(
    workers: str | None, plans: Sequence[Plan], threads: int | None, progress: Progress | None
) -> Cluster | None:
    """Return the cluster that is to carry out the plans, None where this process does it.

    Raises:
        UsageError: it is named wrongly, or cannot be had with ``threads`` or with plans that use their source up.
        DeviceError: Ray is not installed.
    """
    if workers is None:
        return None
    from .engine.cluster import Cluster
    from .engine.monitor import StepListener

    if threads is not None:
        raise UsageError("--threads and --workers exclude each other", hint="give the number of workers as ray:N")
    for plan in plans:
        if plan.consumes:
            raise UsageError("--workers and --delete-parts exclude each other", hint="leave out one of them")
    return Cluster(workers, progress.note if isinstance(progress, StepListener) else None)


def _check_threads(threads: int | None) -> None:
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise UsageError("--threads: out of range", expected=f"1 to {MAX_THREADS}", got=threads)


def _reading_threads(threads: int | None, place: Path) -> int:
    """Return the number of threads of a command that only reads: as asked, or one per processor, 16 at most.

    Of a remote source, ``READERS``.
    """
    from .containers.sources import READERS, mount_of

    _check_threads(threads)
    if threads is None and mount_of(place) is not None:
        return READERS
    return threads or min(16, len(os.sched_getaffinity(0)))


def _watched(read: Callable[[Callable[[Step], None] | None], T], progress: Progress | None, total: int) -> T:
    """Return what ``read`` returns, which tells of its steps; at the end all of ``total`` bytes are done."""
    total = max(1, total)
    result = read(_steps_of_total(progress, total))
    if progress is not None:
        progress(total, total)
    return result


def _steps_of_total(progress: Progress | None, total: int) -> Callable[[Step], None] | None:
    """Return what tells ``progress`` of steps of ``total`` bytes: a listener hears all of them, others of bytes."""
    from .engine.monitor import StepListener

    if isinstance(progress, StepListener):
        return lambda step: progress.step(step, total)
    return None if progress is None else lambda step: progress(step.done, total)


# ---- checking -----------------------------------------------------------------------------------------


def verify(
    source: StrPath,
    out: StrPath,
    *,
    sample: float | str | None = None,
    seed: int = 0,
    foreign: bool = False,
    ignore_key: str | Iterable[str] = (),
    strict: bool = False,
    index: str = "file",
    imatrix: StrPath | None = None,
    ggml_lib: StrPath | None = None,
    graft_draft: StrPath | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare the finished conversion ``out`` with its ``source``, element by element; ``report.ok`` is the verdict.

    ``sample`` is the part of each tensor to look at, such as "2%" or 0.02; None looks at everything. ``foreign``
    accepts what another tool may do otherwise; ``ignore_key`` names metadata keys not to compare. ``imatrix`` is the
    importance matrix of a low-bit GGUF, ``ggml_lib`` ggml's library, by which its tensors are made anew;
    ``graft_draft`` is the folder from which ``mend`` took the draft.

    Raises:
        Dsv4Error: the source cannot be read, or ``out`` is not there. All else is a problem in the report.
    """
    from .verification import prepare

    out = _here(out, DOWNLOAD_OUTPUT)
    place = _located(source)
    threads = _reading_threads(threads, place)
    fraction = None if sample is None else parse_sample(sample)
    prepared = prepare(
        place,
        out,
        sample=fraction,
        seed=seed,
        foreign=foreign,
        ignore_keys=_each(ignore_key),
        strict=strict,
        index=index,
        imatrix=None if imatrix is None else _imatrix_here(imatrix),
        ggml_lib=None if ggml_lib is None else Path(ggml_lib),
        graft_draft=None if graft_draft is None else _located(graft_draft),
    )
    return _watched(lambda watch: prepared.run(threads, watch), progress, prepared.nbytes)


def check(
    model: StrPath,
    *,
    index: str = "file",
    strict: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Read the whole checkpoint folder ``model`` once; ``report.findings`` says what cannot be right.

    Raises:
        InventoryError: a routing table that no model can have; or anything suspicious, if ``strict``.
        Dsv4Error: the folder is no checkpoint that can be read.
    """
    from .inspection.census import prepare_check

    place = _located(model)
    threads = _reading_threads(threads, place)
    census = prepare_check(place, index=index, strict=strict)
    return _watched(lambda watch: census.run(threads, watch), progress, census.nbytes)


def verify_manifest(out: StrPath, *, progress: Progress | None = None) -> ManifestReport:
    """Re-check the checksums that ``OUT.manifest.json`` gives for the output ``out``; no source is needed.

    Raises:
        InputMissingError, FileFormatError: the manifest is missing or malformed.
    """
    from .engine.manifest import check_manifest, manifest_of, read_manifest

    out = _here(out, DOWNLOAD_OUTPUT)
    total = sum(entry["bytes"] for entry in read_manifest(manifest_of(out))["files"])
    return _watched(lambda watch: check_manifest(out, watch), progress, total)


# ---- reading ------------------------------------------------------------------------------------------


def inspect(path: StrPath, *, index: str = "file") -> Description:
    """Describe a checkpoint folder, a GGUF or a folder of shards, from headers alone.

    Raises:
        Dsv4Error: nothing there that can be read. What is wrong with a readable model stands in the description.
    """
    from .inspection.describe import inspect_path

    return inspect_path(_located(path, headers_only=True), index)


def estimate(
    model: StrPath,
    *,
    context: int | str | None = None,
    batch: int = 1,
    kv: str | None = None,
    mp: int | None = None,
    o_proj_tp: int | None = None,
    experts: str | None = None,
    gguf: bool = False,
    recipe: str | None = None,
    draft: str = "keep",
    chunk: int | str | None = None,
    memory: int | str | None = None,
    routing: StrPath | None = None,
    hardware: StrPath | None = None,
    plot: StrPath | None = None,
    overwrite: bool = False,
    index: str = "file",
) -> Estimate:
    """Estimate what a model needs, from headers or from a config.json alone: no weight is read.

    ``model`` is a checkpoint folder, a GGUF, shards or a config.json. ``mp`` divides a checkpoint among ranks, of which
    ``o_proj_tp`` share attention's output projections; ``gguf`` or ``recipe`` ask for its GGUF. ``context`` tokens
    ("128k") of ``batch`` sequences are held as ``kv`` says: published, bf16, f16, q8_0 or f32. ``chunk`` are the
    tokens computed at once in prefill, ``memory`` ("128GiB") that of one device. ``routing`` is a file of how often
    each expert was chosen: JSON, or an importance matrix in GGUF form. ``hardware`` names a machine ("dgx-spark") or a
    TOML file of one: it gives times, and chooses the form that fits where none is asked for. ``plot`` is a picture,
    which replaces an older one with ``overwrite`` alone.

    Raises:
        Dsv4Error: nothing there that can be read, or questions that do not go together.
    """
    from .estimation.estimate import Question, estimate_path

    question = Question(
        context=None if context is None else parse_tokens(context),
        batch=batch,
        kv=kv,
        mp=mp,
        o_proj_tp=o_proj_tp,
        experts=experts,
        gguf=gguf,
        recipe=recipe,
        draft=draft,
        chunk=None if chunk is None else parse_tokens(chunk, "--chunk"),
        memory=None if memory is None else parse_size(memory, "--memory"),
        routing=None if routing is None else Path(routing),
        hardware=None if hardware is None else os.fspath(hardware),
        plot=None if plot is None else Path(plot),
        overwrite=overwrite,
    )
    return estimate_path(_located(model, headers_only=True), question, index=index)


def open_checkpoint(folder: StrPath) -> Checkpoint:
    """Open a checkpoint folder: its config, and where and how each weight is stored. No weight is read.

    Raises:
        Dsv4Error: something is missing, unknown, duplicate or of a wrong shape.
    """
    from .checkpoint.folder import open_folder

    return open_folder(_located(folder))


def load_model(
    path: StrPath,
    *,
    layers: str | None = None,
    activation_rounding: bool = False,
    cached: bool = False,
    cache: bool = False,
) -> Model:
    """Open a checkpoint folder, a GGUF or a folder of shards as a model that runs in numpy, in float32.

    Weights are decoded when they are needed, and dropped; ``cached`` keeps them, for the generation of tokens. Those of
    a remote source are fetched then, and kept on the disk of temporary files if ``cached``; ``cache`` downloads all of
    a source on the hub into the hub's own cache first.
    ``layers`` such as "0-3" runs the first layers only; ``activation_rounding`` rounds as the published kernels do.

    Raises:
        Dsv4Error: what is at ``path`` is not a readable model.
    """
    from .containers.sources import want_again
    from .reference import CachedSource, Model
    from .reference.weights.open import open_source

    place = _located(path, cache=cache)
    source = open_source(place)
    if cached:
        want_again(place)
    return Model(
        CachedSource(source) if cached else source,
        activation_rounding=activation_rounding,
        layers=leading_layers(layers),
    )


def imatrix(
    model: StrPath,
    out: StrPath,
    *,
    text: StrPath,
    context_size: int = DEFAULT_CONTEXT_SIZE,
    chunks: int | None = None,
    layers: str | None = None,
    process_output: bool = False,
    tokenizer: StrPath | None = None,
    device: str = "auto",
    overwrite: bool = False,
    cache: bool = False,
    progress: Progress | None = None,
) -> ImatrixSummary:
    """Run ``model`` over the text file ``text`` and write an importance matrix for low-bit types.

    The model is a checkpoint folder, a GGUF or a folder of shards, of any size: one layer's attention or one expert is
    in memory at a time. ``chunks`` limits the chunks of ``context_size`` tokens that the text is cut into; ``layers``
    such as "0-3" runs the first layers only; ``process_output`` includes the output matrix. ``device`` is auto, cpu or
    cuda. ``cache`` downloads a model on the hub into the hub's own cache first.

    Raises:
        Dsv4Error: see ``convert_gguf``.
    """
    from .reference.importance import ImatrixOptions, collect_imatrix

    options = ImatrixOptions(
        context_size=context_size,
        chunks=chunks,
        layers=leading_layers(layers),
        process_output=process_output,
        tokenizer=None if tokenizer is None else _located(tokenizer, headers_only=True),
        device=device,
    )
    return collect_imatrix(
        _located(model, cache=cache),
        Path(text),
        _here(out, "name a .gguf file here"),
        options,
        overwrite=overwrite,
        progress=progress,
    )


# ---- values as they are written on the command line ---------------------------------------------------


def parse_size(size: int | str, option: str = "--max-file-size") -> int:
    """Return the bytes that a size such as ``45G`` means; ``45GiB`` counts in powers of 1024.

    >>> parse_size("45G"), parse_size("128GiB")
    (45000000000, 137438953472)

    Raises:
        UsageError: not a positive number with an optional unit, or one so small that its unit was forgotten.
    """
    found = re.fullmatch(r"([0-9]{1,15})(?:([KMGT]?)|([KMGT])I)B?", str(size).strip(), re.IGNORECASE)
    if found is None or int(found[1]) == 0:
        raise UsageError(f"{option}: not a size", expected="a number with K, M, G or T, such as 45G", got=repr(size))
    if found[3] is not None:
        return int(found[1]) * BINARY_UNITS[found[3].upper()]
    nbytes = int(found[1]) * UNITS[found[2].upper()]
    if nbytes < UNITS["K"]:
        raise UsageError(f"{option}: {nbytes} bytes", expected=f"a number with a unit, such as {nbytes}G")
    return nbytes


def parse_tokens(count: int | str, option: str = "--context") -> int:
    """Return the tokens that a number such as ``128k`` means: k and M count in powers of 1024, as contexts do.

    >>> parse_tokens("128k"), parse_tokens("1M"), parse_tokens(8192)
    (131072, 1048576, 8192)

    Raises:
        UsageError: not a positive number with an optional unit.
    """
    found = re.fullmatch(r"([0-9]{1,9})([KM]?)", str(count).strip(), re.IGNORECASE)
    if found is None or int(found[1]) == 0:
        raise UsageError(
            f"{option}: not a number of tokens", expected="a number such as 8192, 128k or 1M", got=repr(count)
        )
    return int(found[1]) * TOKEN_UNITS[found[2].upper()]


def parse_layers(text: str) -> tuple[int, int]:
    """Return the first and the last layer of a range such as ``0-3`` or ``5``.

    >>> parse_layers("0-3")
    (0, 3)

    Raises:
        UsageError: not a range, or one whose first layer is behind the last.
    """
    found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", text.strip())
    if found is None:
        raise UsageError("--layers: not a range", expected="a range such as 0-3", got=repr(text))
    first = int(found[1])
    last = int(found[2]) if found[2] is not None else first
    if last < first:
        raise UsageError(
            "--layers: the first layer is behind the last", expected=f"a range such as {last}-{first}", got=text
        )
    return first, last


def leading_layers(text: str | None) -> int | None:
    """Return how many layers a range such as ``0-3`` has, which must start at layer 0; None for None.

    >>> leading_layers("0-3")
    4

    Raises:
        UsageError: not a range, or one that starts elsewhere.
    """
    if text is None:
        return None
    first, last = parse_layers(text)
    if first != 0:
        hint = f"use --layers 0-{last}"
        if first == last:
            hint = f"--layers 0-{first - 1} takes the first {counted(first, 'layer')}"
        raise UsageError("--layers must start at layer 0", expected="a range such as 0-3", got=text, hint=hint)
    return last + 1


def parse_sample(sample: float | str) -> float:
    """Return the fraction that ``2%`` or ``0.02`` means.

    >>> parse_sample("2%")
    0.02

    Raises:
        UsageError: not a number above 0 and at most 1 (100%).
    """
    if isinstance(sample, str):
        found = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})(%?)", sample.strip())
        fraction = 0.0 if found is None else float(found[1]) / (100 if found[2] else 1)
    else:
        fraction = float(sample)
    if not 0 < fraction <= 1:
        raise UsageError("--sample: not a fraction", expected="a fraction such as 2% or 0.02", got=repr(sample))
    return fraction
