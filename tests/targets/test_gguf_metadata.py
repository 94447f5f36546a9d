"""The key-values of a GGUF: which keys, of which type, with which value, and their bytes."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from dsv4convert.checkpoint.model_card import ModelCard, read_model_card
from dsv4convert.checkpoint.tokenizer import Tokenizer, load_tokenizer
from dsv4convert.containers.gguf_write import KeyValue, encode_key_values
from dsv4convert.errors import ConfigError, UnsupportedError
from dsv4convert.formats.ggml_types import QUANTISED
from dsv4convert.model.config import ModelConfig, parse_config
from dsv4convert.model.gguf_keys import KEYS, LLAMA_CPP, LLAMA_CPP_V41, NEXTN_KEY, PORT, PORT_NAMES, ROLE_KEYS, key_name
from dsv4convert.synth.tokenizer import write_synth_tokenizer
from dsv4convert.targets.gguf_metadata import (
    FILE_TYPES,
    ParameterCounts,
    count_parameters,
    default_output_name,
    file_type,
    model_keys,
    text_metadata,
)

CONFIGS = Path(__file__).parents[2] / "dsv4convert" / "model" / "configs"
VOCAB = 400
NO_COUNTS = ParameterCounts(0, 0, 0, 0)
FLASH_COUNTS = ParameterCounts(284_000_000_000, 6_500_000_000, 1_900_000_000, 256)

# What llama.cpp's converter writes for V4-Flash under deepseek4., as (type, value), and vocab_size.
FLASH_KEYS: dict[str, tuple[str, object]] = {
    "block_count": ("UINT32", 43),
    "context_length": ("UINT32", 1048576),
    "embedding_length": ("UINT32", 4096),
    "embedding_length_out": ("UINT32", 16384),
    "vocab_size": ("UINT32", 129280),
    "attention.head_count": ("UINT32", 64),
    "attention.head_count_kv": ("UINT32", 1),
    "rope.scaling.type": ("STRING", "yarn"),
    "rope.scaling.factor": ("FLOAT32", 16.0),
    "rope.scaling.original_context_length": ("UINT32", 65536),
    "rope.scaling.yarn_beta_fast": ("FLOAT32", 32.0),
    "rope.scaling.yarn_beta_slow": ("FLOAT32", 1.0),
    "rope.freq_base": ("FLOAT32", 10000.0),
    "rope.dimension_count": ("UINT32", 64),
    "attention.layer_norm_rms_epsilon": ("FLOAT32", 1e-06),
    "expert_count": ("UINT32", 256),
    "expert_used_count": ("UINT32", 6),
    "expert_shared_count": ("UINT32", 1),
    "expert_feed_forward_length": ("UINT32", 2048),
    "expert_gating_func": ("UINT32", 4),
    "expert_weights_scale": ("FLOAT32", 1.5),
    "expert_weights_norm": ("BOOL", True),
    "swiglu_clamp_exp": ("FLOAT32 array", [10.0] * 43),
    "swiglu_clamp_shexp": ("FLOAT32 array", [10.0] * 43),
    "attention.key_length": ("UINT32", 512),
    "attention.value_length": ("UINT32", 512),
    "attention.q_lora_rank": ("UINT32", 1024),
    "attention.output_lora_rank": ("UINT32", 1024),
    "attention.output_group_count": ("UINT32", 8),
    "attention.sliding_window": ("UINT32", 128),
    "attention.compress_ratios": ("INT32 array", [0, 0, *[4, 128] * 20, 4, 0]),
    "attention.compress_rope_freq_base": ("FLOAT32", 160000.0),
    "attention.indexer.head_count": ("UINT32", 64),
    "attention.indexer.key_length": ("UINT32", 128),
    "attention.indexer.top_k": ("UINT32", 512),
    "hyper_connection.count": ("UINT32", 4),
    "hyper_connection.sinkhorn_iterations": ("UINT32", 20),
    "hyper_connection.epsilon": ("FLOAT32", 1e-06),
    "hash_layer_count": ("UINT32", 3),
}


def published(name: str) -> ModelConfig:
    return parse_config(json.loads((CONFIGS / f"{name}.json").read_text()), name)


@pytest.fixture(scope="module")
def flash() -> ModelConfig:
    return published("v4-flash")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_synth_tokenizer(folder, VOCAB, seed=0)
    return load_tokenizer(folder, VOCAB)


def metadata(
    config: ModelConfig,
    tokenizer: Tokenizer,
    card: ModelCard | None = None,
    *,
    architecture: str = LLAMA_CPP,
    block_count: int | None = None,
    mtp: bool = False,
    **options: Any,
) -> list[KeyValue]:
    keys = model_keys(config, architecture, block_count or config.num_hidden_layers, mtp=mtp)
    arguments: dict[str, Any] = {"counts": NO_COUNTS, "file_type": 38, "chat_template": "ours"}
    card = card or ModelCard("DeepSeek-V4-Flash")
    return text_metadata(architecture, config, keys, tokenizer, card, **(arguments | options))


def as_dict(entries: list[KeyValue]) -> dict[str, tuple[str, object]]:
    """Return {key: (type, value)}; the type of an array names its elements."""
    assert len({entry.key for entry in entries}) == len(entries)
    found: dict[str, tuple[str, object]] = {}
    for entry in entries:
        if entry.type == GGUFValueType.ARRAY:
            assert entry.sub_type is not None
            found[entry.key] = (f"{entry.sub_type.name} array", list(entry.value))
        else:
            found[entry.key] = (entry.type.name, entry.value)
    return found


def test_flash_keys_have_llama_cpps_names_types_and_values(flash: ModelConfig, tokenizer: Tokenizer) -> None:
    found = as_dict(metadata(flash, tokenizer))
    model_keys = {key.removeprefix("deepseek4."): found[key] for key in found if key.startswith("deepseek4.")}
    assert model_keys == FLASH_KEYS


# Keys that came with this architecture: an older gguf package does not have them.
NEW_KEYS = {
    "embedding_length_out",
    "hash_layer_count",
    "swiglu_clamp_exp",
    "swiglu_clamp_shexp",
    "attention.compress_ratios",
    "attention.compress_rope_freq_base",
    "attention.output_group_count",
    "attention.output_lora_rank",
    "attention.indexer.head_count",
    "attention.indexer.key_length",
    "attention.indexer.top_k",
    "hyper_connection.count",
    "hyper_connection.epsilon",
    "hyper_connection.sinkhorn_iterations",
}


def test_the_gguf_package_knows_every_older_key(flash: ModelConfig, tokenizer: Tokenizer) -> None:
    groups = [group for group in vars(gguf.Keys).values() if isinstance(group, type)]
    templates = {value for group in groups for value in vars(group).values() if isinstance(value, str)}
    known = {template.replace("{arch}", "deepseek4") for template in templates}
    ours = set(as_dict(metadata(flash, tokenizer)))
    assert ours - known <= {f"deepseek4.{key}" for key in NEW_KEYS}


def test_general_keys_come_first_and_the_template_last(flash: ModelConfig, tokenizer: Tokenizer) -> None:
    entries = metadata(flash, tokenizer)
    assert entries[0] == KeyValue("general.architecture", GGUFValueType.STRING, "deepseek4")
    assert entries[-1] == KeyValue("tokenizer.chat_template", GGUFValueType.STRING, "ours")
    found = as_dict(entries)
    assert found["general.type"] == ("STRING", "model")
    assert found["general.file_type"] == ("UINT32", 38)
    assert found["general.quantization_version"] == ("UINT32", 2)


def test_tokenizer_keys_have_llama_cpps_types(flash: ModelConfig, tokenizer: Tokenizer) -> None:
    found = as_dict(metadata(flash, tokenizer))
    assert found["tokenizer.ggml.model"] == ("STRING", "gpt2")
    assert found["tokenizer.ggml.pre"] == ("STRING", "joyai-llm")
    assert found["tokenizer.ggml.tokens"] == ("STRING array", list(tokenizer.tokens))
    assert found["tokenizer.ggml.token_type"] == ("INT32 array", list(tokenizer.token_types))
    assert found["tokenizer.ggml.merges"] == ("STRING array", list(tokenizer.merges))
    assert found["tokenizer.ggml.bos_token_id"] == ("UINT32", 0)
    assert found["tokenizer.ggml.eos_token_id"] == ("UINT32", 1)
    assert found["tokenizer.ggml.padding_token_id"] == ("UINT32", 1)
    assert found["tokenizer.ggml.add_bos_token"] == ("BOOL", False)
    assert found["tokenizer.ggml.add_eos_token"] == ("BOOL", False)


def test_mtp_file_counts_its_block_and_names_its_layers(flash: ModelConfig, tokenizer: Tokenizer) -> None:
    found = as_dict(metadata(flash, tokenizer, block_count=44, mtp=True))
    assert found["deepseek4.block_count"] == ("UINT32", 44)
    assert found["deepseek4.nextn_predict_layers"] == ("UINT32", 1)
    assert found["deepseek4.swiglu_clamp_exp"] == ("FLOAT32 array", [10.0] * 44)
    assert found["deepseek4.attention.compress_ratios"] == FLASH_KEYS["attention.compress_ratios"]


def test_slice_has_metadata_of_its_layers(flash: ModelConfig, tokenizer: Tokenizer) -> None:
    found = as_dict(metadata(flash.sliced(1, 4), tokenizer))
    assert found["deepseek4.block_count"] == ("UINT32", 4)
    assert found["deepseek4.attention.compress_ratios"] == ("INT32 array", [0, 4, 128, 4])
    assert found["deepseek4.hash_layer_count"] == ("UINT32", 2)


def test_model_without_yarn_has_no_scaling_keys(flash: ModelConfig, tokenizer: Tokenizer) -> None:
    found = as_dict(metadata(replace(flash, yarn=None), tokenizer))
    assert not [key for key in found if "rope.scaling" in key]
    assert found["deepseek4.rope.freq_base"] == ("FLOAT32", 10000.0)


def test_unknown_gating_function_is_refused(flash: ModelConfig, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"key scoring_func: unknown: expected .*got relu"):
        metadata(replace(flash, scoring_func="relu"), tokenizer)


@pytest.mark.parametrize("architecture", [LLAMA_CPP, LLAMA_CPP_V41, PORT])
def test_no_architecture_has_one_name_for_two_keys(architecture: str) -> None:
    names = [key_name(architecture, key.name) for key in (*KEYS, NEXTN_KEY, *ROLE_KEYS)]
    assert len(set(names)) == len(names)


def test_every_key_that_the_port_spells_its_way_is_in_the_table() -> None:
    assert PORT_NAMES.keys() <= {key.name for key in KEYS}


def test_keys_that_are_read_back_have_names_of_config_json(flash: ModelConfig) -> None:
    names = [key.in_config for key in KEYS if key.in_config is not None]
    assert len(set(names)) == len(names)
    scaling = {f"yarn.{key}" for key in flash.raw["rope_scaling"]}
    assert set(names) <= flash.raw.keys() | scaling


def test_early_port_spells_its_keys_its_way(flash: ModelConfig, tokenizer: Tokenizer) -> None:
    found = as_dict(metadata(flash, tokenizer, architecture=PORT))
    assert found["general.architecture"] == ("STRING", "deepseek-v4")
    own = {
        "o_lora_rank": "attention.output_lora_rank",
        "o_groups": "attention.output_group_count",
        "compress_ratios": "attention.compress_ratios",
        "compress_rope_freq_base": "attention.compress_rope_freq_base",
        "n_hash_layers": "hash_layer_count",
        "hyperconnections.count": "hyper_connection.count",
        "hyperconnections.sinkhorn_iterations": "hyper_connection.sinkhorn_iterations",
        "hyperconnections.epsilon": "hyper_connection.epsilon",
    }
    for key, theirs in own.items():
        assert found[f"deepseek-v4.{key}"] == FLASH_KEYS[theirs]
        assert f"deepseek-v4.{theirs}" not in found
    for key in FLASH_KEYS.keys() - own.values():
        assert found[f"deepseek-v4.{key}"] == FLASH_KEYS[key]


# generation_config.json and card


def test_sampling_keys_follow_generation_config(flash: ModelConfig, tokenizer: Tokenizer) -> None:
    generation = {
        "temperature": 1,
        "top_p": 0.95,
        "top_k": 20,
        "repetition_penalty": 1.1,
        "do_sample": True,
        "min_p": None,
    }
    found = as_dict(metadata(flash, tokenizer, ModelCard("x", {}, generation)))
    assert {key: value for key, value in found.items() if "sampling" in key} == {
        "general.sampling.temp": ("FLOAT32", 1),
        "general.sampling.top_p": ("FLOAT32", 0.95),
        "general.sampling.top_k": ("INT32", 20),
        "general.sampling.penalty_repeat": ("FLOAT32", 1.1),
    }


CARD = """---
license: mit
base_model:
- deepseek-ai/DeepSeek-V4-Flash-Base
language: [en, no, zh]
pipeline_tag: text-generation
tags:
- moe
version: 4
---
# A model
"""


def test_model_card_gives_license_base_model_tags_and_languages(
    tmp_path: Path, flash: ModelConfig, tokenizer: Tokenizer
) -> None:
    folder = tmp_path / "DeepSeek-V4-Flash"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    found = as_dict(metadata(flash, tokenizer, read_model_card(folder)))
    general = {key: value for key, value in found.items() if key.startswith("general.")}
    assert general["general.name"] == ("STRING", "DeepSeek V4 Flash")
    assert general["general.version"] == ("STRING", "4")
    assert general["general.license"] == ("STRING", "mit")
    assert general["general.base_model.count"] == ("UINT32", 1)
    assert general["general.base_model.0.name"] == ("STRING", "DeepSeek V4 Flash Base")
    assert general["general.base_model.0.organization"] == ("STRING", "Deepseek Ai")
    assert general["general.base_model.0.repo_url"] == (
        "STRING",
        "https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash-Base",
    )
    assert general["general.tags"] == ("STRING array", ["moe", "text-generation"])
    assert general["general.languages"] == ("STRING array", ["en", "no", "zh"])


def test_folder_without_card_or_generation_config_is_fine(tmp_path: Path) -> None:
    assert read_model_card(tmp_path) == ModelCard(tmp_path.name)
    (tmp_path / "README.md").write_text("# no front matter\n---\na: [\n---\n")
    assert read_model_card(tmp_path) == ModelCard(tmp_path.name)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("README.md", "---\na: [\n---\n", "not used: front matter is not valid YAML"),
        ("README.md", b"---\n\xff\n---\n", "not used: not valid UTF-8"),
        ("generation_config.json", "{", "not used: not valid JSON"),
        ("generation_config.json", "[1]", "not used: not a JSON object"),
    ],
    ids=["yaml", "bytes", "cut", "list"],
)
def test_malformed_side_file_is_noted_in_one_line(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (note,) = read_model_card(tmp_path).notes
    assert note.startswith(f"{name}: {message}")
    assert note.isprintable()


def test_name_option_overrides_the_folder(flash: ModelConfig, tokenizer: Tokenizer) -> None:
    assert as_dict(metadata(flash, tokenizer, name="My model"))["general.name"] == ("STRING", "My model")


def test_size_label_comes_from_the_counts(flash: ModelConfig, tokenizer: Tokenizer) -> None:
    assert as_dict(metadata(flash, tokenizer, counts=FLASH_COUNTS))["general.size_label"] == (
        "STRING",
        "256x8.4B",
    )
    assert "general.size_label" not in as_dict(metadata(flash, tokenizer))


def test_parameters_are_counted_as_llama_cpp_does() -> None:
    tensors = [
        ("token_embd.weight", (50, 8)),
        ("blk.0.ffn_gate_exps.weight", (6, 16, 8)),
        ("blk.0.ffn_down_exps.weight", (6, 8, 16)),
        ("blk.0.exp_probs_b.bias", (6,)),
    ]
    assert count_parameters(tensors) == ParameterCounts(400 + 2 * 768 + 6, 406, 256, 6)
    assert count_parameters([("output.weight", (3, 4))]) == ParameterCounts(12, 12, 0, 0)


@pytest.mark.parametrize(("experts", "number"), [("mxfp4", 38), ("bf16", 32), ("q8_0", 7), ("f16", 1), ("f32", 0)])
def test_file_type_follows_the_experts(experts: str, number: int) -> None:
    assert file_type(experts) == number
    assert number in [int(kind) for kind in gguf.LlamaFileType]


def test_each_file_type_has_the_number_and_name_of_llama_cpp() -> None:
    theirs = {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in gguf.LlamaFileType}
    # The newest is not in every release of gguf; whole files in it are compared with llama.cpp's elsewhere.
    assert {kind for kind, (number, _) in FILE_TYPES.items() if number not in theirs} <= {"q2_0"}
    assert all(theirs.get(number, name) == name for number, name in FILE_TYPES.values())
    assert FILE_TYPES.keys() >= set(QUANTISED)


def test_unknown_expert_type_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="got q8_1"):
        file_type("q8_1")


@pytest.mark.parametrize(
    ("folder", "experts", "prefix", "expected"),
    [
        ("DeepSeek-V4-Flash", "mxfp4", "", "DeepSeek-V4-Flash-256x8.4B-MXFP4_MOE.gguf"),
        ("DeepSeek-V4-Flash", "mxfp4", "mtp-", "mtp-DeepSeek-V4-Flash-MXFP4_MOE.gguf"),
        ("DeepSeek-V4-Flash-0731", "mxfp4", "", "DeepSeek-V4-Flash-256x8.4B-0731-MXFP4_MOE.gguf"),
        ("DeepSeek-V4-Flash-0731", "mxfp4", "dspark-", "dspark-DeepSeek-V4-Flash-0731-MXFP4_MOE.gguf"),
        ("DeepSeek-V4-Flash-Base", "q8_0", "", "DeepSeek-V4-Flash-Base-256x8.4B-Q8_0.gguf"),
        ("tiny", "bf16", "", "Tiny-256x8.4B-BF16.gguf"),
    ],
)
def test_output_name_follows_the_convention(
    flash: ModelConfig, folder: str, experts: str, prefix: str, expected: str
) -> None:
    assert default_output_name(flash, ModelCard(folder), FLASH_COUNTS, experts=experts, prefix=prefix) == expected


# chat templates


def test_template_of_the_folder_wins_over_ours(flash: ModelConfig, tokenizer: Tokenizer) -> None:
    own = replace(tokenizer, chat_templates={"default": "theirs"})
    assert as_dict(metadata(flash, own))["tokenizer.chat_template"] == ("STRING", "theirs")


def test_named_templates_get_keys_of_their_own(flash: ModelConfig, tokenizer: Tokenizer) -> None:
    own = replace(tokenizer, chat_templates={"tool_use": "T", "rag": "R"})
    found = as_dict(metadata(flash, own))
    assert found["tokenizer.chat_template"] == ("STRING", "ours")
    assert found["tokenizer.chat_template.tool_use"] == ("STRING", "T")
    assert found["tokenizer.chat_templates"] == ("STRING array", ["tool_use", "rag"])


# bytes

SCALARS = [
    KeyValue("a.u8", GGUFValueType.UINT8, 200),
    KeyValue("a.i8", GGUFValueType.INT8, -100),
    KeyValue("a.u16", GGUFValueType.UINT16, 60000),
    KeyValue("a.i16", GGUFValueType.INT16, -30000),
    KeyValue("a.u32", GGUFValueType.UINT32, 4_000_000_000),
    KeyValue("a.i32", GGUFValueType.INT32, -2_000_000_000),
    KeyValue("a.f32", GGUFValueType.FLOAT32, 1e-6),
    KeyValue("a.yes", GGUFValueType.BOOL, True),
    KeyValue("a.no", GGUFValueType.BOOL, False),
    KeyValue("a.text", GGUFValueType.STRING, "<｜User｜>\n\0"),
    KeyValue("a.u64", GGUFValueType.UINT64, 2**63 + 1),
    KeyValue("a.i64", GGUFValueType.INT64, -(2**62)),
    KeyValue("a.f64", GGUFValueType.FLOAT64, 1 / 3),
    KeyValue("a.texts", GGUFValueType.ARRAY, ["", "a", "世界"], GGUFValueType.STRING),
    KeyValue("a.ints", GGUFValueType.ARRAY, (0, 4, -128), GGUFValueType.INT32),
    KeyValue("a.floats", GGUFValueType.ARRAY, [10.0, 0.1], GGUFValueType.FLOAT32),
]


def test_one_entry_is_spelled_out_in_bytes() -> None:
    entry = KeyValue("ab", GGUFValueType.ARRAY, [1, -1], GGUFValueType.INT32)
    assert encode_key_values([entry]) == (
        b"\x02\0\0\0\0\0\0\0ab"  # length and key
        b"\x09\0\0\0"  # array
        b"\x05\0\0\0"  # of int32
        b"\x02\0\0\0\0\0\0\0"  # two
        b"\x01\0\0\0\xff\xff\xff\xff"
    )


def test_bytes_equal_those_of_the_gguf_writer(tmp_path: Path, flash: ModelConfig, tokenizer: Tokenizer) -> None:
    entries = [*metadata(flash, tokenizer), *SCALARS]
    path = tmp_path / "theirs.gguf"
    writer = GGUFWriter(path, "deepseek4")
    for entry in entries:
        if entry.key != "general.architecture":  # the writer has written it
            writer.add_key_value(entry.key, entry.value, entry.type, entry.sub_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    header = struct.Struct("<IIQQ")  # magic, version, tensors, key-values
    theirs = path.read_bytes()
    assert header.unpack_from(theirs)[3] == len(entries)
    assert theirs[header.size :] == encode_key_values(entries)


def test_gguf_reader_reads_back_what_was_encoded(tmp_path: Path, flash: ModelConfig, tokenizer: Tokenizer) -> None:
    entries = [*metadata(flash, tokenizer), *SCALARS]
    data = struct.pack("<4sIQQ", b"GGUF", 3, 0, len(entries)) + encode_key_values(entries)
    path = tmp_path / "ours.gguf"
    path.write_bytes(data.ljust(len(data) + 64, b"\0"))
    fields = GGUFReader(path).fields
    for entry in entries:
        expected = list(entry.value) if entry.type == GGUFValueType.ARRAY else entry.value
        found = fields[entry.key].contents()
        assert fields[entry.key].types[0] == entry.type
        if GGUFValueType.FLOAT32 in (entry.type, entry.sub_type):
            expected = np.float32(expected).tolist()
        assert found == expected, entry.key


@pytest.mark.parametrize(
    "entry",
    [
        KeyValue("k", GGUFValueType.UINT32, -1),
        KeyValue("k", GGUFValueType.UINT32, 2**32),
        KeyValue("k", GGUFValueType.UINT32, 1.5),
        KeyValue("k", GGUFValueType.FLOAT32, 1e300),
        KeyValue("k", GGUFValueType.STRING, "\ud800"),
        KeyValue("k", GGUFValueType.STRING, 3),
        KeyValue("k", GGUFValueType.ARRAY, [1, 2**40], GGUFValueType.INT32),
        KeyValue("k", GGUFValueType.ARRAY, [1]),
    ],
    ids=lambda entry: f"{entry.type.name} {entry.value!r}",
)
def test_value_that_does_not_fit_names_its_key(entry: KeyValue) -> None:
    with pytest.raises(ConfigError, match=r"GGUF key k: .* does not fit"):
        encode_key_values([entry])
