"""Folders that are no checkpoint of ours and are known all the same: one row a layout, with what to do about it.

The table is asked when a folder could not be opened, so that what can be read is never refused for its looks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..containers.folder_names import CONFIG_NAME, SHARD_NAME
from ..containers.impostors import DOWNLOAD_AGAIN, PULL, is_error_page, is_lfs_pointer
from ..containers.json_object import read_json
from ..containers.orbax import ITEMS, METADATA_NAME
from ..containers.presence import is_file, is_folder
from ..containers.safetensors import Stored, read_header, read_metadata
from ..containers.untrusted import open_regular
from ..errors import (
    ConfigError,
    Dsv4Error,
    FileFormatError,
    InputMissingError,
    InventoryError,
    UnsupportedError,
    counted,
    first_of,
)
from ..model.config import VERSION_BY_ARCHITECTURE
from .packed import SUFFIXES

# Files whose first bytes are looked at, and how many of them.
READ_SUFFIXES = (".safetensors", ".json", ".jinja")
FIRST_BYTES = 512
MAX_FILES = 4096

NUMBERED_FILE = re.compile(r"(.*?)(\d{1,6})-of-(\d{1,6})\.safetensors")

UNFINISHED_SUFFIXES = (".incomplete", ".aria2", ".crdownload", ".part", ".download")
SNAPSHOTS, HUB_PREFIX = "snapshots", "models--"
MODELOPT = "modelopt"
GPTQ_METHODS = ("gptq", "awq", "auto-round", "autoround", "gptqmodel")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

ROUTER = re.compile(r"(?:model\.)?(layers|mtp)\.(\d+)\.(?:ffn|mlp)\.gate\.weight")
EXPERT = re.compile(r"(?:model\.)?(layers|mtp)\.(\d+)\.(?:ffn|mlp)\.experts\.(\d+)\.(?:w1|gate_proj)\.")
ADAPTER_MARKS = (".lora_", ".base_layer.", ".modules_to_save.", ".original_module.")
BITS_AND_BYTES = (".absmax", ".quant_map", ".SCB", ".weight_format")
DRAFT_LAYER = "draft layer"
DRAFT_EXPERTS = "dspark_n_routed_experts"
OFFICIAL = "take the published checkpoint (deepseek-ai) instead"
UNQUANTISED = f"convert the checkpoint that it was made of, or {OFFICIAL}"


@dataclass(frozen=True)
class Folder:
    """What can be seen of a folder without believing any of it; nothing here raises."""

    path: Path
    files: tuple[str, ...] = field(default=())

    @classmethod
    def at(cls, path: Path) -> Folder:
        """Look at ``path``; a folder that cannot be listed looks empty."""
        try:
            names = sorted(entry.name for entry in path.iterdir())[:MAX_FILES]
        except OSError:
            names = []
        return cls(path, tuple(names))

    def json(self, name: str) -> dict[str, Any]:
        """Return an object of JSON, empty where there is none that can be read."""
        try:
            found = read_json(self.path / name)
        except Dsv4Error:
            return {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return config.json with the keys of ``text_config`` at the top."""
        found = self.json(CONFIG_NAME)
        inner = found.get("text_config")
        return found | inner if isinstance(inner, dict) else found

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """Return what the folder says of how it was quantised."""
        found = self.config.get("quantization_config")
        return found if isinstance(found, dict) else {}

    @cached_property
    def method(self) -> str:
        """Return the name of the method that the folder says it was quantised with."""
        return str(self.quantization.get("quant_method", ""))[:40].lower()

    @cached_property
    def first_bytes(self) -> dict[str, bytes]:
        """Return the first bytes of the files that a reader would open."""
        found: dict[str, bytes] = {}
        for name in self.files:
            if name.endswith(READ_SUFFIXES):
                try:
                    with open_regular(self.path / name) as file:
                        found[name] = file.read(FIRST_BYTES)
                except OSError:
                    continue
        return found

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """Return the tensors of every safetensors file that can be read."""
        found: dict[str, Stored] = {}
        for name in self.files:
            if name.endswith(".safetensors"):
                try:
                    found |= read_header(self.path / name)
                except Dsv4Error:
                    continue
        return found

    def suffix(self, *suffixes: str) -> str | None:
        """Return the first tensor whose name ends in one of ``suffixes``."""
        return next((name for name in self.tensors if name.endswith(suffixes)), None)

    def named(self, *suffixes: str) -> list[str]:
        """Return the files whose names end in one of ``suffixes``."""
        return [name for name in self.files if name.endswith(suffixes)]

    def shape(self, *names: str) -> tuple[int, ...] | None:
        """Return the shape of the first of some tensors that is there, a prefix ``model.`` aside."""
        for name in names:
            tensor = self.tensors.get(name) or self.tensors.get(f"model.{name}")
            if tensor is not None:
                return tensor.shape
        return None

    @cached_property
    def routers(self) -> dict[str, int]:
        """Return how many routed experts the router of each layer chooses among."""
        found = ((ROUTER.fullmatch(name), tensor) for name, tensor in self.tensors.items())
        return {_layer(match): tensor.shape[0] for match, tensor in found if match and tensor.shape}

    @property
    def experts(self) -> dict[str, int]:
        """Return the same for the layers of the trunk only."""
        return {layer: count for layer, count in self.routers.items() if not layer.startswith(DRAFT_LAYER)}

    @cached_property
    def stored_experts(self) -> dict[str, int]:
        """Return how many routed experts of each layer are there, one by one."""
        found: dict[str, set[int]] = {}
        for name in self.tensors:
            match = EXPERT.match(name)
            if match is not None:
                found.setdefault(_layer(match), set()).add(int(match[3]))
        return {layer: len(experts) for layer, experts in found.items()}


def _layer(match: re.Match[str]) -> str:
    return f"{'layer' if match[1] == 'layers' else DRAFT_LAYER} {match[2]}"


class Layout(NamedTuple):
    """A layout: what tells it, as a function that returns what was seen or None, what to do, and the error's class.

    ``keys`` are those of config.json that it explains where they are wrong. One that ``is_read`` where its weights
    allow explains no error but those about its own tensors.
    """

    name: str
    sees: Callable[[Folder], str | None]
    advice: str
    error: type[Dsv4Error] = UnsupportedError
    keys: tuple[str, ...] = ()
    is_read: bool = False

    @property
    def explained(self) -> tuple[str, ...]:
        """Return how errors begin that this layout explains better."""
        return tuple(f"key {key}" for key in self.keys)


def _listed(names: list[str]) -> str | None:
    """Return the first of some names, and how many more there are; None without any."""
    return first_of(names) if names else None


def _lfs(folder: Folder) -> str | None:
    return _listed([name for name, begin in folder.first_bytes.items() if is_lfs_pointer(begin)])


def _error_page(folder: Folder) -> str | None:
    """An HTML or XML page, or a line of text, under the name of a file of the model."""
    found = [name for name, begin in folder.first_bytes.items() if is_error_page(begin)]
    for name, begin in folder.first_bytes.items():
        if name.endswith(".safetensors") and name not in found and begin and begin.isascii():
            text = begin.decode("ascii")
            if all(character.isprintable() or character.isspace() for character in text):
                found.append(name)
    if not found:
        return None
    return f"{_listed(found)} begins {folder.first_bytes[found[0]].lstrip()[:24].decode('ascii', 'replace')!r}"


def _unfinished_here(folder: Folder) -> str | None:
    return _listed(folder.named(*UNFINISHED_SUFFIXES))


def _unfinished(folder: Folder) -> str | None:
    found = folder.named(*UNFINISHED_SUFFIXES)
    cache = folder.path / ".cache" / "huggingface" / "download"
    with suppress(OSError):
        found += sorted(path.name for path in cache.glob("**/*.incomplete"))[:MAX_FILES]
    return _listed(found)


def _hub_repository(folder: Folder) -> str | None:
    """A repository in the hub's cache, its folder of snapshots, or the cache with one repository in it."""
    if folder.path.name == SNAPSHOTS:
        repositories = [folder.path.parent]
    else:
        repositories = [folder.path, *(folder.path / name for name in folder.files if name.startswith(HUB_PREFIX))]
    found = [snapshot for path in repositories if (snapshot := _snapshot(path)) is not None]
    if len(found) > 1:
        return f"there are {len(found)} models in it, such as {found[0]}"
    return f"its snapshot is {found[0]}" if found else None


def _snapshot(repository: Path) -> Path | None:
    """Return the snapshot that a repository's main branch has, else the latest."""
    try:
        revisions = [path for path in (repository / SNAPSHOTS).iterdir() if is_folder(path)]
        revisions.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return None
    main = ""
    with suppress(OSError), open_regular(repository / "refs" / "main") as file:
        main = file.read(FIRST_BYTES).decode("ascii", "replace").strip()
    return next((path for path in revisions if path.name == main), revisions[0] if revisions else None)


def _pickles(folder: Folder) -> str | None:
    return None if folder.named(".safetensors") else _listed(folder.named(*PICKLE_SUFFIXES))


def _other_framework(folder: Folder) -> str | None:
    found = [n for n in folder.files if n.endswith((".distcp", ".msgpack", ".h5", ".onnx")) or n == "manifest.ocdbt"]
    return None if folder.named(".safetensors") else _listed(found)


def _orbax(folder: Folder) -> str | None:
    """See the folder of a step too, and that of its item."""
    if folder.named(".safetensors"):
        return None
    for place in ("", f"{ITEMS.rpartition('/')[2]}/", f"{ITEMS}/"):
        with suppress(OSError):
            if is_file(folder.path / place / METADATA_NAME):
                return f"{place}{METADATA_NAME}"
    return None


def _gguf(folder: Folder) -> str | None:
    return None if folder.named(".safetensors") else _listed(folder.named(".gguf"))


def _other_model(folder: Folder) -> str | None:
    names = folder.config.get("architectures")
    found = [str(name) for name in names] if isinstance(names, list) else []
    found = found or [str(folder.config.get("model_type", ""))]
    if any(name in VERSION_BY_ARCHITECTURE or name.startswith("deepseek_v4") for name in found):
        return None
    return next((name[:80] for name in found if name.lower().startswith("deepseek")), None)


def _modelopt(folder: Folder) -> str | None:
    for where in _modelopt_places(folder):
        for key in ("moe_quant_algo", "quant_algo"):
            if "NVFP4" in str(where.get(key, "")) or (where.get(key) == "MIXED_PRECISION"):
                return f"{key} {where[key]}"
    return folder.suffix(".weight_scale_2")


def _modelopt_other(folder: Folder) -> str | None:
    """Another of ModelOpt's formats, such as its FP8."""
    if _modelopt(folder) is not None:
        return None
    for where in _modelopt_places(folder):
        producer = where.get("producer")
        made = isinstance(producer, Mapping) and producer.get("name") == MODELOPT
        if made or where.get("quant_method") == MODELOPT or "quant_algo" in where:
            return f"quant_algo {str(where.get('quant_algo', 'not said'))[:40]}"
    return None


def _modelopt_places(folder: Folder) -> list[Mapping[str, Any]]:
    """Return the objects in which ModelOpt says what it made."""
    own = folder.json("hf_quant_config.json").get("quantization")
    return [where for where in (folder.config, folder.quantization, own) if isinstance(where, Mapping)]


def _compressed_tensors(folder: Folder) -> str | None:
    if folder.method == "compressed-tensors":
        return f"format {str(folder.quantization.get('format', 'not said'))[:60]}"
    return folder.suffix(".weight_packed", ".weight_global_scale")


def _gptq(folder: Folder) -> str | None:
    if folder.method in GPTQ_METHODS or folder.method.startswith("intel/auto-round"):
        return f"quant_method {folder.method}"
    return folder.suffix(".qweight", ".qzeros", ".g_idx")


def _bitsandbytes(folder: Folder) -> str | None:
    if (
        folder.method == "bitsandbytes"
        or folder.quantization.get("load_in_4bit")
        or folder.quantization.get("load_in_8bit")
    ):
        return "quant_method bitsandbytes"
    return next((n for n in folder.tensors if n.endswith(BITS_AND_BYTES) or ".quant_state." in n), None)


def _gpt_oss(folder: Folder) -> str | None:
    return folder.suffix("_proj_blocks", "_proj_scales")


def _mlx(folder: Folder) -> str | None:
    inner = folder.config.get("quantization")
    if isinstance(inner, Mapping) and "group_size" in inner and "bits" in inner:
        # Modes of modules count more than what holds for the modules that have none.
        modes = {str(module["mode"]) for module in inner.values() if isinstance(module, Mapping) and "mode" in module}
        if modes:
            return " and ".join(sorted(modes))[:60]
        return f"{inner['bits']} bits in groups of {inner['group_size']}"[:60]
    for name in folder.named(".safetensors")[:1]:
        try:
            found = read_metadata(folder.path / name)
        except Dsv4Error:
            continue
        if isinstance(found, Mapping) and found.get("format") == "mlx":
            return f"{name} says format mlx"
    return next((name for name in folder.tensors if ".switch_mlp." in name), None) or folder.suffix(".biases")


def _shards(folder: Folder) -> str | None:
    return _listed([name for name in folder.files if SHARD_NAME.fullmatch(name)])


def _adapter(folder: Folder) -> str | None:
    weights = [name for name in folder.named(".safetensors") if not name.startswith("adapter_")]
    if "adapter_config.json" in folder.files and not weights:
        return "adapter_config.json"
    found = [n for n in folder.tensors if ".lora_" in n]
    return _listed(found) if len(found) * 2 > len(folder.tensors) else None


def _adapter_leftovers(folder: Folder) -> str | None:
    found = [n for n in folder.tensors if n.startswith("base_model.model.") or any(mark in n for mark in ADAPTER_MARKS)]
    return _listed(found)


def _other_method(folder: Folder) -> str | None:
    known = (_modelopt, _modelopt_other, _compressed_tensors, _gptq, _bitsandbytes, _gpt_oss, _mlx)
    if folder.method in ("", "fp8", "none") or any(sees(folder) for sees in known):
        return None
    return f"quant_method {folder.method}"


def _uneven_experts(folder: Folder) -> str | None:
    counts = Counter(folder.experts.values())
    if len(counts) < 2:
        return None
    rare = min(counts, key=lambda count: (counts[count], count))
    layer = next(name for name, count in folder.experts.items() if count == rare)
    others = sorted(count for count in counts if count != rare)
    return f"{rare} in {layer}, {' or '.join(map(str, others[:2]))} in others"


def _experts_without_router(folder: Folder) -> str | None:
    """Routers that choose among more experts than their layers have."""
    for layer, stored in folder.stored_experts.items():
        if stored < folder.routers.get(layer, 0):
            return f"{layer} has {counted(stored, 'expert')}, its router chooses among {folder.routers[layer]}"
    return None


def _draft_of_other_size(folder: Folder) -> str | None:
    """A draft with as many experts as before, next to a trunk that lost some; V4.1's has a number of its own."""
    trunk = set(folder.experts.values())
    if len(trunk) != 1 or DRAFT_EXPERTS in folder.config:
        return None
    for layer, count in folder.routers.items():
        if layer.startswith(DRAFT_LAYER) and count not in trunk:
            return f"{layer} chooses among {count}, the trunk among {trunk.pop()}"
    return None


def _fewer_experts(folder: Folder) -> str | None:
    counts, said = set(folder.experts.values()), folder.config.get("n_routed_experts")
    if len(counts) != 1 or not isinstance(said, int) or said in counts:
        return None
    return f"routers choose among {counts.pop()}, n_routed_experts is {said}"


def _other_top_k(folder: Folder) -> str | None:
    shape = next((t.shape for name, t in folder.tensors.items() if name.endswith(".tid2eid")), None)
    said = folder.config.get("num_experts_per_tok")
    if shape is None or len(shape) != 2 or not isinstance(said, int) or shape[1] == said:
        return None
    return f"tables of {shape[1]} experts a token, num_experts_per_tok is {said}"


def _other_vocabulary(folder: Folder) -> str | None:
    said = folder.config.get("vocab_size")
    rows = {
        "embed": folder.shape("embed.weight", "embed_tokens.weight"),
        "head": folder.shape("head.weight", "lm_head.weight"),
        "tid2eid": next((t.shape for name, t in folder.tensors.items() if name.endswith(".tid2eid")), None),
    }
    other = [f"{name} has {counted(shape[0], 'row')}" for name, shape in rows.items() if shape and shape[0] != said]
    return f"{', '.join(other)}, vocab_size is {said}" if other and isinstance(said, int) else None


def _half_width_experts(folder: Folder) -> str | None:
    width = folder.config.get("hidden_size")
    for name, tensor in folder.tensors.items():
        if EXPERT.match(name) and name.endswith("weight") and tensor.dtype.startswith("F8_E4M3"):
            if isinstance(width, int) and len(tensor.shape) == 2 and tensor.shape[1] * 2 == width:
                return name
            return None
    return None


def _unnumbered(folder: Folder) -> str | None:
    """Several safetensors files, no index, and names that do not say whether they are all."""
    found = folder.named(".safetensors")
    sets = {(match[1], int(match[3])) for name in found if (match := NUMBERED_FILE.fullmatch(name))}
    return _listed(found) if len(found) > 1 and len(sets) != 1 and not folder.named(".index.json") else None


LFS, PAGE = "Git LFS pointers instead of files", "an error page saved under a file's name"
UNFINISHED, START_AGAIN = "a download that is not finished", "start the download again, it goes on where it stopped"

# The first row that sees something is it: what spoils any folder first, then what it is, then what was done to it.
LAYOUTS: tuple[Layout, ...] = (
    Layout(LFS, _lfs, PULL, InputMissingError),
    Layout(PAGE, _error_page, DOWNLOAD_AGAIN, InputMissingError),
    Layout(
        "the hub's repository folder, not a snapshot in it",
        _hub_repository,
        "give the snapshot's folder",
        InputMissingError,
    ),
    Layout(UNFINISHED, _unfinished, START_AGAIN, InputMissingError),
    Layout(
        "a LoRA adapter, not a model", _adapter, "merge it into its base model first, in BF16 (dequantize makes that)"
    ),
    Layout("leftovers of a LoRA adapter", _adapter_leftovers, "merge and unload the adapter before you save the model"),
    Layout(
        "a model in PyTorch's pickles", _pickles, "save it as safetensors first: pickles can run code and are not read"
    ),
    Layout(
        "the checkpoint of another framework", _other_framework, "export it to safetensors with the published names"
    ),
    Layout("a folder of shards", _shards, "run unshard first, and convert the folder that it makes"),
    Layout(
        "an Orbax checkpoint, as of maxtext",
        _orbax,
        "conversions, inspect and check start from the folder that it was made of; verify compares it with that",
    ),
    Layout("GGUF already", _gguf, "inspect, forward and verify read it; conversions start from safetensors"),
    Layout(
        "another DeepSeek model",
        _other_model,
        "llama.cpp's convert_hf_to_gguf.py may know it; V4 and V4.1 are read here",
        keys=("architectures", "model_type"),
    ),
    Layout("ModelOpt's NVFP4", _modelopt, UNQUANTISED, is_read=True),
    Layout("another of ModelOpt's formats", _modelopt_other, UNQUANTISED),
    Layout("compressed-tensors", _compressed_tensors, UNQUANTISED, is_read=True),
    Layout("GPTQ or AWQ", _gptq, UNQUANTISED),
    Layout("bitsandbytes", _bitsandbytes, UNQUANTISED),
    Layout(
        "stacks of experts in gpt-oss's form", _gpt_oss, f"the order of gate and up in them is not known; {OFFICIAL}"
    ),
    Layout("MLX", _mlx, UNQUANTISED),
    Layout("weights of another quantiser", _other_method, UNQUANTISED),
    Layout(
        "experts removed unevenly: layers have different numbers of them",
        _uneven_experts,
        "neither config.json nor a GGUF can say so; remove as many in every layer",
        InventoryError,
        ("n_routed_experts",),
    ),
    Layout(
        "experts removed, and routers as they were",
        _experts_without_router,
        "cut gate.weight, gate.bias and tid2eid as well, alike in every layer, and set n_routed_experts",
        InventoryError,
    ),
    Layout(
        "experts removed, and config.json as it was",
        _fewer_experts,
        "set n_routed_experts, and rewrite tid2eid, whose rows name experts",
        InventoryError,
    ),
    Layout(
        "experts removed from the trunk and not from the draft",
        _draft_of_other_size,
        "remove the same from the draft, or leave it out with --draft drop",
        InventoryError,
    ),
    Layout(
        "another number of experts a token than the tables have",
        _other_top_k,
        "set num_experts_per_tok back, or cut the rows of tid2eid as well",
        InventoryError,
    ),
    Layout(
        "a resized vocabulary",
        _other_vocabulary,
        "vocab_size, embedding, head and tid2eid must have as many rows",
        InventoryError,
    ),
    Layout("experts of half the width: packed FP4 that was read as FP8", _half_width_experts, OFFICIAL, InventoryError),
    Layout(
        "files without an index, and names that do not say how many",
        _unnumbered,
        "--index headers reads all of them",
        InputMissingError,
    ),
)


def known_layouts(folder: Path) -> Iterator[tuple[Layout, str]]:
    """Yield the layouts that a folder looks like, with what was seen of each."""
    looked = Folder.at(folder)
    for layout in LAYOUTS:
        seen = layout.sees(looked)
        if seen is not None:
            yield layout, seen


# How an error says that the tensors of V4.1's roles contradict a key of config.json.
TENSORS_DISAGREE = " and the layers that have "


def name_layout(folder: Path, error: Dsv4Error) -> Dsv4Error:
    """Return the error that names the layout of a folder, or ``error`` where it is none that is known.

    An error about a key of config.json says more than a layout that explains weights, unless by that very key, or
    where tensors are what contradicts it; and where a file is missing or damaged, tensors are missing for that reason.
    """
    is_key = isinstance(error, ConfigError) and error.what.startswith("key") and TENSORS_DISAGREE not in error.what
    is_of_file = isinstance(error, InputMissingError | FileFormatError)
    for layout, seen in known_layouts(folder):
        if is_key and layout.error is not InputMissingError and not error.what.startswith(layout.explained):
            continue
        if is_of_file and (layout.error is InventoryError or layout.is_read):
            continue
        if layout.is_read and not any(suffix in f"{error.what} {error.expected}" for suffix in SUFFIXES):
            continue
        # In a folder that would be read, a tensor does not fit: how, is worth saying too.
        sides = (error.expected, error.got) if layout.is_read else (None, None)
        what = f"{layout.name}: {seen} ({error.what})"
        return layout.error(what, where=folder, expected=sides[0], got=sides[1], hint=layout.advice)
    return error


def companion_notes(folder: Path) -> tuple[str, ...]:
    """Return notes on what lies next to weights that can be read: pointers, error pages, unfinished downloads."""
    looked = Folder.at(folder)
    seen = (
        (LFS, _lfs(looked), PULL),
        (PAGE, _error_page(looked), DOWNLOAD_AGAIN),
        (UNFINISHED, _unfinished_here(looked), START_AGAIN),
    )
    return tuple(f"{name}: {what}; {advice}" for name, what, advice in seen if what is not None)
