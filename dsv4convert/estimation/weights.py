"""The bytes of a model's weights by family, by rank, and by recipe, as the conversions would write them.

Nothing is worked out here that a conversion works out: the planners of ``shard`` and ``hf-to-gguf`` say what they
would write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint.folder import Checkpoint
from ..checkpoint.shards import open_shards
from ..containers.folder_names import CONFIG_NAME
from ..containers.safetensors import read_header
from ..containers.sources import size_of
from ..errors import DeviceError, InputMissingError, TokenizerError, UsageError
from ..inspection.naming import family_of
from ..model.config import ModelConfig
from ..model.gguf_keys import LLAMA_CPP, LLAMA_CPP_V41
from ..model.parallel import OUTPUT_GROUPS
from ..model.tensors import Split
from ..targets.drafts import choose_draft
from ..targets.gguf import plan_gguf
from ..targets.gguf_tensors import GgufOptions, Kind, gguf_models
from ..targets.low_bit import SizesOnly
from ..targets.recipes import load_recipe, recipe_names
from ..targets.shard_tensors import ShardOptions, kind_of, shard_files
from .subject import FOLDER, GGUF, Part, Subject, gguf_parts

EXPERT_STACK = "_exps."
DRAFT_KINDS = (Kind.MTP, Kind.DSPARK)


@dataclass(frozen=True)
class Ranks:
    """A model divided among ``mp`` ranks, of which ``o_proj_tp`` share the output projections.

    ``rank_bytes`` are those of each rank's tensors, ``file_bytes`` those of the file that ``shard`` writes of them;
    ``families`` those of rank 0 by family, and ``replicated`` what every rank has whole, by kind of tensor, on one
    rank.
    """

    mp: int
    o_proj_tp: int
    rank_bytes: tuple[int, ...]
    file_bytes: tuple[int, ...]
    families: Mapping[str, int]
    replicated: Mapping[str, int]

    def as_json(self) -> dict[str, Any]:
        """Return the division as plain JSON values."""
        return {
            "mp": self.mp,
            "o_proj_tp": self.o_proj_tp,
            "rank_bytes": list(self.rank_bytes),
            "file_bytes": list(self.file_bytes),
            "rank_0_families": dict(self.families),
            "replicated": dict(self.replicated),
            "replicated_bytes": sum(self.replicated.values()),
        }


@dataclass(frozen=True)
class GgufSize:
    """A GGUF of the model: the bytes of its tensors by ggml type, and of its files where metadata can be planned too.

    ``parts`` are the tensors, as of a GGUF that is there.
    """

    recipe: str | None
    types: Mapping[str, int]
    parts: tuple[Part, ...]
    files: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensors."""
        return sum(self.types.values())

    def as_json(self) -> dict[str, Any]:
        """Return the sizes as plain JSON values."""
        return {"recipe": self.recipe, "bytes": self.nbytes, "types": dict(self.types), "files": dict(self.files)}


def needs_checkpoint(subject: Subject, option: str) -> Checkpoint:
    """Return the checkpoint that ``option`` is planned from.

    Raises:
        UsageError: the model is already a GGUF or shards.
    """
    if subject.checkpoint is None:
        raise UsageError(
            f"{option}: the model is already {'a GGUF' if subject.kind == GGUF else subject.kind}",
            where=subject.path,
            expected="a checkpoint folder or a config.json",
        )
    return subject.checkpoint


def divided(
    checkpoint: Checkpoint, mp: int, o_proj_tp: int | None = None, *, experts: str | None = None, draft: str = "keep"
) -> Ranks:
    """Return what each of ``mp`` ranks holds.

    ``o_proj_tp`` ranks share attention's output projections, every so many again; None: as many as share the rest.

    Raises:
        UsageError: ranks that cannot share the model; names the config key and the numbers.
    """
    check_output_ranks(checkpoint.config, mp, o_proj_tp, checkpoint.folder / CONFIG_NAME)
    output_mp = mp if o_proj_tp is None else o_proj_tp
    written, _, _ = choose_draft(checkpoint, draft)
    files, _, costs = shard_files(written, ShardOptions(mp=mp, experts=experts), output_mp)
    families: Counter[str] = Counter()
    for tensor in files[0].tensors:
        families[family_of(tensor.name)] += tensor.nbytes
    return Ranks(
        mp,
        output_mp,
        tuple(sum(tensor.nbytes for tensor in file.tensors) for file in files),
        tuple(file.nbytes for file in files),
        dict(families.most_common()),
        costs.replicated,
    )


def ranks_of_shards(subject: Subject) -> Ranks:
    """Return what each rank of the shards in a folder holds.

    Raises:
        Dsv4Error: they cannot be read.
    """
    shards = open_shards(subject.path)
    headers = [read_header(file) for file in shards.files]
    families: Counter[str] = Counter()
    for name, tensor in headers[0].items():
        families[family_of(name)] += tensor.nbytes
    replicated: Counter[str] = Counter()
    for weight in shards.weights.values():
        if weight.row.split is Split.COPY:
            replicated[kind_of(weight.row)] += weight.nbytes
    return Ranks(
        shards.mp,
        shards.mp,
        tuple(sum(tensor.nbytes for tensor in header.values()) for header in headers),
        tuple(size_of(file) for file in shards.files),
        dict(families.most_common()),
        dict(replicated.most_common()),
    )


def check_output_ranks(config: ModelConfig, mp: int, o_proj_tp: int | None, where: object) -> None:
    """Check that the output projections can be divided so: a rank has one group or more.

    Raises:
        UsageError: they cannot; names both numbers.
    """
    groups = config.o_groups
    if o_proj_tp is None:
        if mp > groups:
            raise UsageError(
                f"key {OUTPUT_GROUPS}: {groups} groups cannot be divided among {mp} ranks",
                where=where,
                expected=f"at most {groups} ranks for the output projections",
                got=mp,
                hint=f"--o-proj-tp {groups} lets every {groups} ranks share them",
            )
        return
    if not 1 <= o_proj_tp <= groups or groups % o_proj_tp:
        raise UsageError(
            "--o-proj-tp: not a share of the output groups",
            where=where,
            expected=f"a divisor of {OUTPUT_GROUPS} {groups}",
            got=o_proj_tp,
        )
    if mp % o_proj_tp:
        raise UsageError("--o-proj-tp: must divide --mp", expected=f"a divisor of {mp}", got=o_proj_tp)


def gguf_size(subject: Subject, options: GgufOptions) -> GgufSize:
    """Return the size of the GGUF that ``hf-to-gguf`` makes with ``options``; of a folder with its files.

    Raises:
        Dsv4Error: what the conversion would refuse.
    """
    checkpoint = needs_checkpoint(subject, "--gguf" if options.recipe is None else "--recipe")
    size = _text_model(checkpoint, options)
    if subject.kind != FOLDER:
        return size
    try:
        plan = plan_gguf(subject.path, Path("model.gguf"), options, low_bit=SizesOnly())
    except (TokenizerError, DeviceError, InputMissingError) as error:
        # What lies next to the weights decides the metadata, and so the file; the tensors are known without it.
        return replace(size, notes=(f"tensors without the metadata of the file: {error}",))
    return replace(size, files={file.name: file.nbytes for file in plan.files})


def recipe_sizes(checkpoint: Checkpoint) -> list[GgufSize]:
    """Return the sizes of the text model's GGUF by default and with every recipe that its type of model takes."""
    one_each = _one_expert_each(checkpoint)
    names: Iterable[str | None] = (None, *(name for name in recipe_names() if load_recipe(name).dialect is None))
    sizes = [_text_model(one_each, GgufOptions(recipe=name), checkpoint.config) for name in names]
    return sorted(sizes, key=lambda size: -size.nbytes)


def _text_model(checkpoint: Checkpoint, options: GgufOptions, whole: ModelConfig | None = None) -> GgufSize:
    """Return the size of the models that ``options`` make.

    ``whole`` is the config of a checkpoint of which every stack has one expert here: it says how many there are.
    """
    made = gguf_models(checkpoint, options, SizesOnly())
    types: Counter[str] = Counter()
    parts: list[Part] = []
    for model in made.models:
        is_draft = model.kind in DRAFT_KINDS
        tensors = []
        for tensor in model.tensors:
            stacked = 1 if whole is None or EXPERT_STACK not in tensor.name else whole.n_experts(is_draft)
            types[tensor.type.name] += tensor.nbytes * stacked
            shape = (tensor.shape[0] * stacked, *tensor.shape[1:])
            tensors.append((tensor.name, tensor.type.name, shape, tensor.nbytes * stacked))
        if model.kind is Kind.TEXT:
            architecture = LLAMA_CPP if checkpoint.config.engram is None else LLAMA_CPP_V41
            parts += gguf_parts(architecture, tensors, None)
    return GgufSize(options.recipe, dict(types.most_common()), tuple(parts))


def _one_expert_each(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with the first expert of each layer only: all of a layer's are of one size."""
    weights = {name: weight for name, weight in checkpoint.weights.items() if not weight.expert}
    return replace(checkpoint, weights=weights)
