"""transformers loads both forms of a dequantized folder, with nothing missing, nothing unexpected, nothing changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsv4convert.checkpoint import open_folder

from ..checkpoints import MakeCheckpoint
from ..oracles.plain_folders import read_folder
from .folders import dequantize

pytestmark = pytest.mark.oracle

TORCH_DTYPE = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def load(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        *((variant, names) for variant in (None, "base", "dspark") for names in ("official", "transformers")),
        # The vision tower is no part of transformers' model; only the form that leaves it out loads clean.
        ("vision", "transformers"),
    ],
)
def test_nothing_is_missing_or_unexpected(
    variant: str | None, names: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint("tiny", variant=variant)
    dequantize(source, tmp_path / "out", names=names, max_file_bytes=3_000_000)
    model, info = load(tmp_path / "out")
    assert {key: list(value) for key, value in info.items()} == {
        "missing_keys": [],
        "unexpected_keys": [],
        "mismatched_keys": [],
        "error_msgs": [],
    }
    assert type(model).__name__ == "DeepseekV4ForCausalLM"


@pytest.mark.parametrize("names", ["official", "transformers"])
@pytest.mark.parametrize("dtype", TORCH_DTYPE)
def test_the_model_holds_the_numbers_of_the_folder(
    dtype: str, names: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    import torch

    source = make_checkpoint("tiny", seed=3)
    dequantize(source, tmp_path / "stacked", dtype=dtype, names="transformers")
    dequantize(source, tmp_path / "out", dtype=dtype, names=names)
    model, _ = load(tmp_path / "out")
    assert model.dtype == getattr(torch, TORCH_DTYPE[dtype])
    state = model.state_dict()
    held = {name: raw for name, raw in read_folder(tmp_path / "stacked").items() if not name.startswith("mtp.")}
    assert held.keys() == state.keys()
    views = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64}
    for name, raw in held.items():
        stored = torch.from_numpy(raw.values.copy()).view(views[raw.dtype])
        assert torch.equal(state[name].double(), stored.double()), name


def test_a_prompt_gives_the_same_logits_in_either_form(tiny: Path, tmp_path: Path) -> None:
    import torch

    tokens = torch.arange(3, 163)[None]
    logits = []
    for names in ("official", "transformers"):
        dequantize(tiny, tmp_path / names, dtype="f32", names=names)
        model, _ = load(tmp_path / names, attn_implementation="eager")
        with torch.no_grad():
            logits.append(model(tokens, use_cache=False).logits)
    assert torch.isfinite(logits[0]).all()
    assert torch.equal(*logits)


def test_the_official_names_are_those_of_the_source(tiny: Path, tmp_path: Path) -> None:
    dequantize(tiny, tmp_path / "out")
    assert read_folder(tmp_path / "out").keys() == open_folder(tiny).weights.keys()
