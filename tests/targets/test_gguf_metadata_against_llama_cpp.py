"""Names, model cards and vocabularies: our key-values beside those of llama.cpp's converter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.checkpoint.model_card import read_model_card
from dsv4convert.checkpoint.tokenizer import load_tokenizer
from dsv4convert.model.config import load_config
from dsv4convert.synth.tokenizer import write_synth_tokenizer
from dsv4convert.targets.gguf_metadata import ParameterCounts, default_output_name, model_keys, text_metadata

from ..oracles.llama_cpp import llama_cpp_folder

pytestmark = pytest.mark.llama

CONFIGS = Path(__file__).parents[2] / "dsv4convert" / "model" / "configs"

# Asks llama.cpp's converter for the key-values and the file name of each (folder, is it the MTP file):
# the whole of its metadata step, on a folder with a single tensor.
DRIVER = """
import json, sys
from pathlib import Path
root = Path(sys.argv[1])
sys.path[:0] = [str(root), str(root / "gguf-py")]
import gguf, torch
from safetensors.torch import save_file
from conversion.deepseek import DeepseekV4Model
results = []
for folder, mtp in json.loads(sys.argv[2]):
    save_file({"norm.weight": torch.ones(4, dtype=torch.bfloat16)}, Path(folder) / "model.safetensors")
    DeepseekV4Model.mtp_only = mtp
    model = DeepseekV4Model(Path(folder), gguf.LlamaFileType.MOSTLY_BF16, Path(folder))
    model.get_vocab_base_pre = lambda tokenizer: "joyai-llm"
    model.ftype = gguf.LlamaFileType.MOSTLY_MXFP4_MOE
    model.prepare_metadata(vocab_only=False)
    values = {}
    for key, entry in model.gguf_writer.kv_data[0].items():
        kind = entry.type.name
        if kind == "ARRAY":
            kind = gguf.GGUFValueType.get_type(entry.value[0]).name + " array"
        values[key] = (kind, entry.value)
    results.append((model.fname_out.name, values))
print("RESULT" + json.dumps(results))
"""

CARD = """---
license: other
license_name: some
license_link: LICENSE
base_model:
- deepseek-ai/DeepSeek-V4-Flash-Base
- https://huggingface.co/a/b-v2
datasets: x/y-1.5
language:
- en
- no
pipeline_tag: text-generation
tags: [moe, long]
author: Someone
---
"""
GENERATION = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True}
CASES: list[tuple[str, str, str, int, bool]] = [
    # config, folder name, card, vocabulary, MTP file
    ("v4-flash", "DeepSeek-V4-Flash", "", 777, False),
    ("v4-flash", "DeepSeek-V4-Flash", CARD, 320, True),
    ("v4-flash", "tiny", CARD, 5000, False),
    ("v4-pro", "DeepSeek-V4-Pro", CARD, 900, False),
    ("v4-pro", "my model", "", 900, True),
    ("v4-flash-base", "DeepSeek-V4-Flash-Base", "# no front matter", 900, False),
    ("v4-flash-0731", "DeepSeek-V4-Flash-0731", "", 900, False),
    ("v4-flash", "org-v2.1-finetune-8B", "", 321, False),
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str, dict[str, Any]]]:
    """Return (folder, file name, {key: [type, value]}) of every case."""
    folders = []
    for i, (config, name, card, vocab_size, _) in enumerate(CASES):
        folder = tmp_path_factory.mktemp(f"case{i}") / name
        folder.mkdir()
        raw = json.loads((CONFIGS / f"{config}.json").read_text())
        sizes = {"vocab_size": vocab_size}
        if "dspark_noise_token_id" in raw:
            sizes["dspark_noise_token_id"] = vocab_size - 1
        (folder / "config.json").write_text(json.dumps(raw | sizes))
        write_synth_tokenizer(folder, vocab_size, seed=i)
        if card:
            (folder / "README.md").write_text(card)
            (folder / "generation_config.json").write_text(json.dumps(GENERATION))
        folders.append(folder)
    request = json.dumps([(str(folder), case[-1]) for folder, case in zip(folders, CASES, strict=True)])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(llama_cpp_folder()), request],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    results = json.loads(done.stdout.rpartition("RESULT")[2])
    return [(folder, name, values) for folder, (name, values) in zip(folders, results, strict=True)]


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{case[1]} {case[3]}" for case in CASES])
def test_key_values_and_file_name_equal_llama_cpps(theirs: list[tuple[Path, str, dict[str, Any]]], index: int) -> None:
    folder, file_name, expected = theirs[index]
    mtp = CASES[index][-1]
    config = load_config(folder)
    card = read_model_card(folder)
    counts = ParameterCounts(0, 0, 0, 0)
    entries = text_metadata(
        "deepseek4",
        config,
        model_keys(config, "deepseek4", config.num_hidden_layers + mtp, mtp=mtp),
        load_tokenizer(folder, config.vocab_size),
        card,
        counts=counts,
        file_type=38,
        chat_template=None,
    )
    found = {
        entry.key: [f"{entry.sub_type.name} array", list(entry.value)]
        if entry.sub_type is not None
        else [entry.type.name, entry.value]
        for entry in entries
    }
    expected.pop("tokenizer.chat_template")  # ours is another
    assert found.pop("deepseek4.vocab_size") == ["UINT32", config.vocab_size]  # only we write it
    assert found == expected
    assert default_output_name(config, card, counts, experts="mxfp4", prefix="mtp-" if mtp else "") == file_name
