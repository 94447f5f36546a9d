"""What lies next to tensors in a finished folder: headers' metadata, index, config.json and the tokenizer's files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..checkpoint.folder import Checkpoint, read_index
from ..containers.folder_names import CONFIG_NAME
from ..containers.json_object import MAX_CONFIG_BYTES, read_json_object
from ..containers.presence import is_file
from ..containers.safetensors import METADATA_KEY, Stored, read_metadata
from ..containers.untrusted import open_regular
from ..errors import ConfigError, InputMissingError, InputOutputError, UnsupportedError
from ..model.config import Version, parse_config
from ..model.config_v41 import inference_config
from ..model.tensors import Draft, is_vision_name
from .compare import Piece
from .left_out import THE_DRAFT, THE_MODEL, is_left_out
from .numbers import FLOATS, NVFP4_BLOCK
from .report import FILE, FOLDER, KEY, Report

INFERENCE_CONFIG_NAME = "inference_config.json"

HF_QUANT_CONFIG_NAME = "hf_quant_config.json"
MODELOPT_PRODUCER = {"name": "modelopt", "version": "dsv4-nvfp4-experts"}

# Rows and columns that share a scale where FP4 becomes FP8.
FP8_SIDE = {Version.V4: 128, Version.V41: 32}

# NVFP4 that is no FP4, and INT4: in sources only.
DECODED_FIRST = ("fp4/f32", "int4")
QUANTISED = ("fp8", "fp8/f32", "fp4", "fp4/nv")

# Files that make a folder of use, compared byte for byte; the first ones have to be there if the source
# has them.
NEEDED_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
OTHER_FILES = (
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
)

DTYPE_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
PYTORCH_METADATA = {"format": "pt"}
COPY_BYTES = 2**20

# Stands for the value of a key that is not there.
ABSENT = object()
# Characters of a JSON value that a problem shows.
MAX_SHOWN = 200

# What config.json calls a field of ModelConfig, where it is not its name.
KEY_OF_FIELD = {"yarn": "rope_scaling", "version": "architectures"}


def check_file_metadata(files: Iterable[Path], report: Report, expected: Mapping[str, str], *others: object) -> None:
    """Report ``__metadata__`` of safetensors headers that is neither the layout's nor one of ``others``."""
    for path in files:
        report.keys += 1
        found = read_metadata(path)
        if found not in (None, expected, *others) and not report.foreign:
            report.problem(KEY, path, f"{METADATA_KEY}: expected {expected}, got {found!r:.80}")


def check_index(path: Path, stored: Mapping[str, Stored], report: Report) -> None:
    """Report what an index says wrong of its folder."""
    index = read_index(path)
    report.keys += 1
    metadata = index.get("metadata")
    total = sum(tensor.nbytes for tensor in stored.values())
    found = metadata.get("total_size") if isinstance(metadata, dict) else None
    if found != total:
        report.problem(KEY, path, f"total_size: expected {total}, got {found!r:.40}")
    if report.foreign:
        return
    for key in sorted(set(index) - {"metadata", "weight_map"}):
        report.problem(KEY, path, f"unknown key {key}")
    for key in sorted(set(metadata) - {"total_size"}) if isinstance(metadata, dict) else ():
        report.problem(KEY, path, f"unknown key metadata.{key}")


def check_folder_config(folder: Path, checkpoint: Checkpoint, pieces: list[Piece], report: Report) -> None:
    """Report the keys of config.json that are not the source's, but for what the conversion has to change."""

    def expected_of(found: Mapping[str, Any]) -> Mapping[str, Any]:
        return _without_pruned(_expected_config(checkpoint, pieces, report), found, pieces)

    check_config(folder, expected_of, report)


def check_config(folder: Path, expected_of: Callable[[Mapping[str, Any]], Mapping[str, Any]], report: Report) -> None:
    """Report the keys of config.json that are not the expected ones, which may depend on what it holds."""
    path = folder / CONFIG_NAME
    found = read_reported(path, report)
    if found is None:
        return
    expected = expected_of(found)
    if report.foreign:
        try:
            theirs, ours = parse_config(found, path), parse_config(expected, path)
        except (ConfigError, UnsupportedError) as error:
            report.problem(KEY, path, str(error))
            return
        for field in fields(ours):
            left, right = getattr(ours, field.name), getattr(theirs, field.name)
            if field.compare and field.name not in report.ignored_keys:
                report.keys += 1
                if left != right:
                    key = KEY_OF_FIELD.get(field.name, field.name)
                    what = "describes another model than the source's config.json"
                    report.problem(KEY, path, f"{what}: key {key}: expected {left!s:.200}, got {right!s:.200}")
        return
    check_json_keys(path, expected, found, report, report.ignored_keys)


def check_inference_config(folder: Path, checkpoint: Checkpoint, pieces: Iterable[Piece], report: Report) -> None:
    """Report the keys of V4.1's config in the inference code's form that are not what the source says."""
    path = folder / INFERENCE_CONFIG_NAME
    found = read_reported(path, report)
    if found is None:
        return
    has_fp4 = any(piece.output.encoding == "fp4" for piece in pieces)
    with_draft = checkpoint.n_draft > 0 and not is_left_out(THE_DRAFT, report)
    expected = inference_config(checkpoint.config.flat, "fp4" if has_fp4 else "fp8", with_draft=with_draft)
    check_json_keys(path, expected, found, report)


def read_reported(path: Path, report: Report, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any] | None:
    """Return a JSON object of the output; None, and a problem, where it is none that can be read."""
    try:
        return read_json_object(path, max_bytes)
    except (ConfigError, InputMissingError, InputOutputError) as error:
        report.problem(FILE, path, str(error))
        return None


def check_json_keys(
    path: Path, expected: Mapping[str, Any], found: Mapping[str, Any], report: Report, ignored: Iterable[str] = ()
) -> None:
    """Report the keys of a JSON object that are not the expected ones."""
    for key in sorted({*expected, *found} - set(ignored)):
        report.keys += 1
        for inner, left, right in _differences(key, expected.get(key, ABSENT), found.get(key, ABSENT)):
            report.problem(KEY, path, f"key {inner}: expected {_shown(left)}, got {_shown(right)}")


def _differences(key: str, left: object, right: object) -> Iterator[tuple[str, object, object]]:
    """Yield (dotted key, expected, found) of all values that differ, inside objects too."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for inner in sorted({*left, *right}):
            yield from _differences(f"{key}.{inner}", left.get(inner, ABSENT), right.get(inner, ABSENT))
    elif left is ABSENT or right is ABSENT or json.dumps(left, sort_keys=True) != json.dumps(right, sort_keys=True):
        yield key, left, right


def _shown(value: object) -> str:
    """Return a value of a JSON file in a line."""
    if value is ABSENT:
        return "no such key"
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def _expected_config(checkpoint: Checkpoint, pieces: list[Piece], report: Report) -> dict[str, Any]:
    """Return the source's config as the tensors of source and output say that it must have changed."""
    config = borne_out_config(checkpoint)
    became = dict.fromkeys((piece.source.encoding, piece.output.encoding) for piece in pieces)
    is_quantised = any(output in QUANTISED for _, output in became)
    decoded = [output for source, output in became if source in (*QUANTISED, *DECODED_FIRST)]
    if decoded and not is_quantised:
        for key in ("quantization_config", "expert_dtype"):
            config.pop(key, None)
        config |= dict.fromkeys(("torch_dtype", "dtype"), DTYPE_NAMES[decoded[0]])
    elif any(source in (*FLOATS, *DECODED_FIRST) and output in QUANTISED for source, output in became):
        config = _quantised_config(config, FP8_SIDE[checkpoint.config.version])
    elif ("fp4", "fp4/nv") in became:
        config = {**config, "quantization_config": _nvfp4_quantization(checkpoint, config, pieces)}
    elif ("fp4", "fp8") in became:
        if "text_config" not in config:  # V4.1 says it in one place
            config["expert_dtype"] = "fp8"
        quantization = config.get("quantization_config")
        if isinstance(quantization, dict) and "expert_dtype" in quantization:
            config["quantization_config"] = {**quantization, "expert_dtype": "fp8"}
    elif checkpoint.is_packed and report.layout == FOLDER and ("fp4", "fp4") in became:
        config = _quantised_config(config, FP8_SIDE[checkpoint.config.version])
    else:
        # Floats to floats: what dequantize was asked for is the type that some have now, and F32 stays as it is.
        kinds = [output for source, output in became if source != "f32" and output in FLOATS]
        if kinds and not is_quantised:
            config |= dict.fromkeys(("torch_dtype", "dtype"), DTYPE_NAMES[kinds[0]])
    has_tower = any(is_vision_name(weight.name) for weight in checkpoint.weights.values())
    keeps_tower = is_left_out(THE_MODEL, report) or any(is_vision_name(piece.source.name) for piece in pieces)
    if has_tower and not keeps_tower:
        config = {key: value for key, value in config.items() if not key.startswith("vision_")}
    if checkpoint.n_draft and is_left_out(THE_DRAFT, report):
        config = without_draft(config)
    return config


def _without_pruned(config: dict[str, Any], found: Mapping[str, Any], pieces: list[Piece]) -> dict[str, Any]:
    """Return a config without the keys that ``found`` may leave out: they speak of what the output does not have."""
    has_tower = any(is_vision_name(piece.source.name) for piece in pieces)
    is_quantised = any(piece.output.encoding in QUANTISED for piece in pieces)

    def is_idle(key: str) -> bool:
        if key in ("quantization_config", "expert_dtype"):
            return not is_quantised
        return key.startswith("vision_") and not has_tower

    return {key: value for key, value in config.items() if key in found or not is_idle(key)}


def _modelopt_quantization(pieces: Iterable[Piece]) -> dict[str, Any]:
    """Return what ModelOpt's configs say of a folder with NVFP4 experts."""
    names = [piece.output.name for piece in pieces if piece.output.encoding == "fp4/nv"]
    modules = sorted({name[: name.index(".experts.")] + ".experts" for name in names})
    excluded = ["*.attn.*", "*.ffn.shared_experts.*", "head"]
    if not any(name.startswith("mtp.") for name in names):
        excluded.append("mtp.*")
    return {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "group_size": NVFP4_BLOCK,
        "quantized_layers": {module: {"quant_algo": "NVFP4", "group_size": NVFP4_BLOCK} for module in modules},
        "exclude_modules": excluded,
    }


def _nvfp4_quantization(checkpoint: Checkpoint, config: dict[str, Any], pieces: list[Piece]) -> dict[str, Any]:
    side = FP8_SIDE[checkpoint.config.version]
    said = _modelopt_quantization(pieces)
    group = {"type": "float", "num_bits": 4, "dynamic": False, "group_size": NVFP4_BLOCK}
    return {
        "activation_scheme": "dynamic",
        "weight_block_size": [side, side],
        **config.get("quantization_config", {}),
        **said,
        "quant_method": "fp8",
        "moe_quant_algo": "NVFP4",
        "producer": MODELOPT_PRODUCER,
        "ignore": said["exclude_modules"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": group, "input_activations": group}},
    }


def check_quant_config(folder: Path, pieces: list[Piece], report: Report) -> None:
    """Report the keys of hf_quant_config.json that are not what NVFP4 experts need; others need no such file."""
    path = folder / HF_QUANT_CONFIG_NAME
    if not any(piece.output.encoding == "fp4/nv" for piece in pieces):
        return
    found = read_reported(path, report)
    if found is None:
        return
    expected = {"producer": MODELOPT_PRODUCER, "quantization": _modelopt_quantization(pieces)}
    if not report.foreign:
        check_json_keys(path, expected, found, report)


def _quantised_config(config: dict[str, Any], side: int) -> dict[str, Any]:
    """Return a config with what the published ones say of FP8 weights in blocks of ``side`` and FP4 experts."""
    quantization: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "scale_fmt": "ue8m0"}
    quantization["weight_block_size"] = [side, side]
    config = config | {key: "bfloat16" for key in ("torch_dtype", "dtype") if key in config}
    if "text_config" in config:
        return {**config, "quantization_config": {**quantization, "expert_dtype": "fp4"}}
    return {**config, "quantization_config": {**quantization, "fmt": "e4m3"}, "expert_dtype": "fp4"}


def without_draft(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without what it says of draft layers, in V4.1's object of the text model too."""
    nested = config.get("text_config")
    text = {key: value for key, value in (nested or config).items() if not key.startswith("dspark_")}
    text["num_nextn_predict_layers"] = 0
    if "compress_ratios" in text:
        text["compress_ratios"] = text["compress_ratios"][: text["num_hidden_layers"]]
    return {**config, "text_config": text} if nested else text


def borne_out_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the source's config without what its own tensors say is wrong."""
    config = dict(checkpoint.config.raw)
    layers = checkpoint.config.num_hidden_layers
    said = config.get("text_config", config)
    if not checkpoint.n_draft and (
        said.get("num_nextn_predict_layers") or any(key.startswith("dspark_") for key in said)
    ):
        config = without_draft(config)
    other_count = False
    if checkpoint.draft is Draft.MTP and checkpoint.config.version is Version.V4:
        other_count = config.get("num_nextn_predict_layers", checkpoint.n_draft) != checkpoint.n_draft
        if other_count:
            config["num_nextn_predict_layers"] = checkpoint.n_draft
    if "compress_ratios" in config and checkpoint.config.version is Version.V4:
        ratios = [0 if ratio == 1 else ratio for ratio in config["compress_ratios"]]
        if other_count:
            ratios = ratios[: layers + checkpoint.n_draft]
        config["compress_ratios"] = ratios + [0] * (layers + checkpoint.n_draft - len(ratios))
    held = {w.encoding.value for w in checkpoint.weights.values() if w.expert is not None and not w.is_draft}
    if held in ({"fp4"}, {"fp8"}):
        (dtype,) = held
        quantization = config.get("quantization_config")
        if config.get("expert_dtype") is not None:
            config["expert_dtype"] = dtype
        if isinstance(quantization, dict) and quantization.get("expert_dtype") is not None:
            config["quantization_config"] = {**quantization, "expert_dtype": dtype}
    return config


def check_files(folder: Path, source: Path, report: Report) -> None:
    """Report files next to the weights that are not the source's."""
    for name in NEEDED_FILES + OTHER_FILES:
        original, copy = source / name, folder / name
        if not is_file(original):
            continue
        if not is_file(copy):
            if name in NEEDED_FILES and not report.foreign:
                report.problem(FILE, copy, "missing from the output")
            continue
        if report.foreign:
            continue
        report.keys += 1
        position = _first_difference(original, copy)
        if position is not None:
            report.problem(FILE, copy, f"differs from the source's from byte {position} on")


def _first_difference(left: Path, right: Path) -> int | None:
    """Return the first byte in which two files differ, None where they are the same."""
    position = 0
    with open_regular(left) as a, open_regular(right) as b:
        while True:
            first, second = a.read(COPY_BYTES), b.read(COPY_BYTES)
            if first != second:
                pairs = enumerate(zip(first, second, strict=False))
                return position + next((i for i, (x, y) in pairs if x != y), min(len(first), len(second)))
            if not first:
                return None
            position += len(first)
