"""MaxText's own rules: its functions that name leaves and make them of tensors, taken out of its wheel.

MaxText itself needs Python 3.12 and a hundred packages; the functions need numpy alone.
"""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

CONVERSION = "maxtext/checkpoint_conversion/"
FUNCTIONS = {
    "utils/param_mapping.py": ("DEEPSEEK_V4_MAXTEXT_TO_HF_PARAM_MAPPING", "DEEPSEEK_V4_MAXTEXT_TO_HF_PARAM_HOOK_FN"),
    "utils/tensor_handling.py": ("apply_hook_fns", "nesting_depth", "stacked_axes", "slice_shape"),
    "to_maxtext.py": (
        "_build_multi_axis_stacked_tensor",
        "_build_single_axis_stacked_tensor",
        "_get_hf_loading_function",
    ),
}

# Where MaxText stacks the layers that it scans, unless told otherwise.
PARAM_SCAN_AXIS = 1

Array = npt.NDArray[Any]


class MaxText:
    """The functions of a wheel, for one model."""

    def __init__(self, wheel: Path, config: Mapping[str, Any], *, scan: bool) -> None:
        self._names: dict[str, Any] = {"np": np, "partial": partial, "Any": Any, "List": list, "Callable": Callable}
        with zipfile.ZipFile(wheel) as archive:
            for name, functions in FUNCTIONS.items():
                tree = ast.parse(archive.read(CONVERSION + name))
                chosen = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in functions]
                assert len(chosen) == len(functions), name
                exec(compile(ast.Module(chosen, []), name, "exec"), self._names)
        self._config = SimpleNamespace(
            num_experts=config["n_routed_experts"], scan_layers=scan, param_scan_axis=PARAM_SCAN_AXIS
        )
        config = {**config, "compress_ratios": config["compress_ratios"][: config["num_hidden_layers"]]}
        mapping, hooks = (self._names[name] for name in FUNCTIONS["utils/param_mapping.py"])
        self.sources: dict[str, Any] = mapping(config, self._config, scan_layers=scan)
        self._hooks = hooks(config, self._config, scan_layers=scan, saving_to_hf=False)

    def leaf(self, key: str, shape: tuple[int, ...], tensors: Mapping[str, Array]) -> Array:
        """Return the leaf ``key``, whose shape in the model is ``shape``, made of official tensors."""
        load = self._names["_get_hf_loading_function"](
            self.sources[key], tensors.__getitem__, self._hooks.get(key), shape, self._config, key
        )
        made: Array = load()
        return made
