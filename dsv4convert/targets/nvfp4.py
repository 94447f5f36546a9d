"""``repack --experts nvfp4``: tensors, input scales and configs as ModelOpt's NVFP4 checkpoints have them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..checkpoint.folder import Checkpoint, read_folder_headers
from ..checkpoint.nvfp4 import INPUT_SCALE, SCALE, SECOND_SCALE
from ..checkpoint.small_tensors import read_scalars
from ..checkpoint.weights import Weight
from ..containers.folder_names import CONFIG_NAME
from ..containers.json_object import read_json_object
from ..containers.presence import is_folder
from ..errors import ConfigError, InventoryError, UsageError
from ..formats.nvfp4 import BLOCK as NVFP4_BLOCK
from ..plan import OutputFile, OutputTensor
from .fp8_segments import CODES_PER_BYTE, FP8_BLOCKS
from .hf_folder import is_fp4_expert, json_file
from .nvfp4_segments import Part, fp4_to_nvfp4_segments, scalar_segments
from .safetensors_files import unplaced_tensor

QUANT_CONFIG_NAME = "hf_quant_config.json"

# The matrices of an expert that are computed as one, and share input and second scale.
FUSED = {"w1": "w3", "w3": "w1"}
MATRICES = ("w1", "w2", "w3")

# Without calibration. That of the published 0731 is 8.4375 for w1 and w3, and 150.0 for w2.
DEFAULT_INPUT_SCALE = "1.0"
MAX_SCALES_BYTES = 64 * 2**20

# What stays in the types of the source, in ModelOpt's words.
EXCLUDED = ("*.attn.*", "*.ffn.shared_experts.*", "head")
EXCLUDED_DRAFT = "mtp.*"
# The name and version that loaders know this layout by.
PRODUCER = {"name": "modelopt", "version": "dsv4-nvfp4-experts"}


@dataclass(frozen=True)
class InputScales:
    """The scale of each expert's activations: by matrix (w1, w2, w3), or by tensor where a file says so.

    ``by_tensor`` has full names such as ``layers.0.ffn.experts.0.w1.input_scale``.
    """

    by_matrix: Mapping[str, float]
    by_tensor: Mapping[str, float] = field(default_factory=dict)
    where: Path | None = None

    @classmethod
    def parse(cls, text: str) -> InputScales:
        """Read ``--input-scale``: a number, two numbers (w1 and w3, then w2), a JSON file or an NVFP4 folder.

        Raises:
            UsageError: it is none of these.
            InputMissingError, ConfigError, FileFormatError, InventoryError: the file or folder cannot be read as one.
        """
        numbers = _numbers(text)
        if numbers is not None:
            if len(numbers) > len(("w1 and w3", "w2")):
                raise UsageError("--input-scale: too many numbers", expected="one, or two: W1-AND-W3,W2", got=text)
            return cls({"w1": numbers[0], "w2": numbers[-1], "w3": numbers[0]})
        path = Path(text)
        if is_folder(path):
            return cls({}, _stored_scales(path), path)
        if not os.path.lexists(path):
            raise UsageError(
                "--input-scale: neither a positive number nor a file", expected="1.0, 8.4375,150.0 or a path", got=text
            )
        found = read_json_object(path, MAX_SCALES_BYTES)
        for name, value in found.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not _is_scale(value):
                raise ConfigError(
                    f"key {name[:200]}: not a scale", where=path, expected="a positive float32", got=str(value)[:40]
                )
        by_matrix = {name: float(value) for name, value in found.items() if name in MATRICES}
        by_tensor = {name: float(value) for name, value in found.items() if name not in MATRICES}
        return cls(by_matrix, by_tensor, path)

    def option(self, text: str) -> str:
        """Return ``--input-scale`` as an option of a plan: what a file or folder says counts, not only its name."""
        if self.where is None:
            return text
        said = json.dumps([dict(self.by_matrix), dict(self.by_tensor)], sort_keys=True)
        return f"{text} (checksum {xxhash.xxh3_64_hexdigest(said.encode())})"

    def of(self, weight: Weight) -> float:
        """Return the scale of a weight.

        Raises:
            InventoryError: the file has none, or another one for the matrix that is computed with it.
        """
        scale = self._of(weight.name)
        partner = partner_name(weight.name)
        if partner is not None and self._of(partner) != scale:
            raise InventoryError(
                f"tensor {input_scale_name(weight.name)}: not that of {input_scale_name(partner)}",
                where=self.where,
                expected=self._of(partner),
                got=scale,
                hint="w1 and w3 have one input, and share its scale",
            )
        return scale

    def check_names(self, weights: Iterable[Weight]) -> None:
        """Check that every tensor named in a file is one of ``weights``.

        Raises:
            InventoryError: one is not.
        """
        known = {input_scale_name(weight.name) for weight in weights}
        unknown = next((name for name in self.by_tensor if name not in known), None)
        if unknown is not None and self.where is not None and not is_folder(self.where):
            raise InventoryError(
                f"key {unknown[:200]}: no such input scale in the output",
                where=self.where,
                expected=f"w1, w2, w3 or names such as {min(known, default='')}",
            )

    def _of(self, name: str) -> float:
        found = self.by_tensor.get(input_scale_name(name), self.by_matrix.get(_matrix(name)))
        if found is None:
            raise InventoryError(
                f"tensor {input_scale_name(name)} is missing",
                where=self.where,
                hint=f"give it there, or all of {_matrix(name)} at once, or a number",
            )
        return found


def _numbers(text: str) -> list[float] | None:
    """Return the positive numbers of a list with commas, None where it is none."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    return numbers if all(map(_is_scale, numbers)) else None


def _is_scale(value: float) -> bool:
    try:
        with np.errstate(over="ignore", under="ignore"):
            return bool(0 < np.float32(value) < math.inf)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _stored_scales(folder: Path) -> dict[str, float]:
    """Return the input scales of an NVFP4 folder.

    Raises:
        InventoryError: it has none, or one is no positive number.
        InputMissingError, FileFormatError: it cannot be read.
    """
    stored = {name: tensor for name, tensor in read_folder_headers(folder)[0].items() if name.endswith(INPUT_SCALE)}
    if not stored:
        raise InventoryError(f"no tensor *{INPUT_SCALE}", where=folder, hint="give the folder of an NVFP4 checkpoint")
    found = read_scalars(stored)
    for name, value in found.items():
        if not _is_scale(value):
            raise InventoryError(
                f"tensor {name}: not a scale", where=stored[name].file, expected="a positive number", got=value
            )
    return found


def _matrix(name: str) -> str:
    """Return "w1" of ``layers.0.ffn.experts.0.w1.weight``."""
    return name.removesuffix(".weight").rpartition(".")[2]


def input_scale_name(name: str) -> str:
    """Return the name of the input scale of a weight."""
    return name.removesuffix(".weight") + INPUT_SCALE


def partner_name(name: str) -> str | None:
    """Return the name of the weight that is computed as one with another, None where there is none."""
    stem, _, matrix = name.removesuffix(".weight").rpartition(".")
    return f"{stem}.{FUSED[matrix]}.weight" if matrix in FUSED else None


def is_cast(weight: Weight, *, draft_experts: bool) -> bool:
    """Return whether ``repack --experts nvfp4`` makes NVFP4 of a weight."""
    return is_fp4_expert(weight) and (draft_experts or not weight.is_draft)


def nvfp4_tensors(weight: Weight, weights: Mapping[str, Weight], scales: InputScales) -> list[OutputTensor]:
    """Return the tensors of a packed FP4 weight as NVFP4; ``weights`` are those of the checkpoint by name.

    Raises:
        InventoryError: the weight that shares its second scale is not packed FP4; or see ``InputScales.of``.
    """
    partner = weights.get(partner_name(weight.name) or "")
    parts = fp4_to_nvfp4_segments(weight, [weight] if partner is None else [weight, partner])
    stem = weight.name.removesuffix(".weight")
    rows, columns = weight.shape
    return [
        unplaced_tensor(weight.name, "U8", (rows, columns // CODES_PER_BYTE), parts[Part.CODES]),
        unplaced_tensor(stem + SCALE, "F8_E4M3", (rows, columns // NVFP4_BLOCK), parts[Part.SCALES]),
        unplaced_tensor(stem + SECOND_SCALE, "F32", (), parts[Part.SECOND]),
        unplaced_tensor(stem + INPUT_SCALE, "F32", (), scalar_segments(scales.of(weight))),
    ]


def nvfp4_configs(
    raw: Mapping[str, Any], checkpoint: Checkpoint, cast: Sequence[Weight]
) -> tuple[OutputFile, OutputFile]:
    """Return config.json and hf_quant_config.json of a folder whose weights ``cast`` are NVFP4."""
    modules = dict.fromkeys(weight.name.rpartition(".experts.")[0] + ".experts" for weight in cast)
    excluded = [*EXCLUDED, *([] if any(weight.is_draft for weight in cast) else [EXCLUDED_DRAFT])]
    layers = {name: {"quant_algo": "NVFP4", "group_size": NVFP4_BLOCK} for name in modules}
    said: dict[str, Any] = {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "group_size": NVFP4_BLOCK,
        "quantized_layers": layers,
        "exclude_modules": excluded,
    }
    group = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4_BLOCK}
    side = FP8_BLOCKS[checkpoint.config.version]
    before = raw.get("quantization_config")
    own = dict(before) if isinstance(before, Mapping) else {}
    own.setdefault("activation_scheme", "dynamic")
    own.setdefault("weight_block_size", [side, side])
    quantization = {
        **own,
        "quant_method": "fp8",
        "moe_quant_algo": "NVFP4",
        "producer": PRODUCER,
        **said,
        "config_groups": {"group_0": {"input_activations": group, "weights": group, "targets": ["Linear"]}},
        "ignore": excluded,
    }
    config = {**raw, "quantization_config": quantization}
    return json_file(CONFIG_NAME, config), json_file(QUANT_CONFIG_NAME, {"producer": PRODUCER, "quantization": said})
