"""No damage to a good output gets past ``verify``: single bits anywhere, and whatever else can go wrong."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dsv4convert.containers.gguf import open_gguf, read_gguf_part
from dsv4convert.errors import Dsv4Error
from dsv4convert.verification import Report, verify

from ..command_line import run_cli
from ..oracles.gguf_bytes import Info, Key, RawGguf, text
from ..oracles.safetensors_bytes import RawSafetensors, RawTensor
from .conversions import Make

FLIPS = {
    "gguf": 60,
    "gguf-mtp": 20,
    "gguf-split": 30,
    "gguf-port": 20,
    "bf16": 25,
    "fp8": 25,
    "nvfp4": 25,
    "shards-2": 40,
}
BATCH = 5  # flips a test: enough tests to see where, few enough copies


def caught(source: Path, output: Path) -> str | None:
    """Return what is found wrong, None where nothing is. Errors of ours count: nobody takes the output for good."""
    try:
        report = verify(source, output)
    except Dsv4Error as error:
        return str(error)
    return None if report.ok else str(report.problems[0])


@contextmanager
def flipped(path: Path, at: int, bit: int) -> Iterator[None]:
    """Flip a bit of a file for a while."""

    def flip() -> None:
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ (1 << bit)]))

    flip()
    try:
        yield
    finally:
        flip()


def places(path: Path) -> list[tuple[int, int]]:
    """Ranges of a file that deserve as many flips as each other, however small: header, gaps, data, tail."""
    size = path.stat().st_size
    if path.suffix == ".gguf":
        part = read_gguf_part(path)
        gaps = list(part.gaps())
        return [(0, part.header_end), (0, 400), random.Random(size).choice(gaps) if gaps else (0, 24), (0, size)]
    if path.suffix == ".safetensors":
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        return [(0, header), (0, 16), (header - 8, header), (header, size)]
    return [(0, size)]


def flip_batches() -> list[tuple[str, int]]:
    return [(kind, number) for kind, count in FLIPS.items() for number in range(count // BATCH)]


@pytest.mark.parametrize(("kind", "number"), flip_batches(), ids=lambda value: str(value))
def test_a_flipped_bit_is_caught(kind: str, number: int, small: Path, copy_of: Make) -> None:
    output = copy_of(kind)
    files = sorted(output.iterdir()) if output.is_dir() else sorted(output.parent.glob("*.gguf"))
    rng = random.Random(f"{kind} {number}")
    for _ in range(BATCH):
        path = rng.choice(files)
        at, bit = rng.randrange(*rng.choice(places(path))), rng.randrange(8)
        with flipped(path, at, bit):
            assert caught(small, output) is not None, f"bit {bit} of byte {at} of {path.name}"
    assert caught(small, output) is None


# Structural damage to a GGUF


def mxfp4_blocks(info: Info) -> np.ndarray:
    experts, rows, columns = reversed(info.dims)
    return np.frombuffer(bytearray(info.data), np.uint8).reshape(experts, rows, columns // 32, 17)


def change_blocks(raw: RawGguf, name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    info = raw.info(name)
    blocks = mxfp4_blocks(info)
    changed = change(blocks)
    info.data = (blocks if changed is None else changed).tobytes()


def swap_experts(raw: RawGguf) -> None:
    change_blocks(raw, "blk.1.ffn_up_exps.weight", lambda blocks: blocks[[0, 2, 1, 3]])


def reverse_experts_everywhere(raw: RawGguf) -> None:
    for info in raw.infos:
        if "_exps" in info.name:
            info.data = mxfp4_blocks(info)[::-1].tobytes()


def swap_nibbles_of_a_block(raw: RawGguf) -> None:
    def change(blocks: np.ndarray) -> None:
        codes = blocks[3, 7, 1, 1:]
        codes[:] = (codes << 4) | (codes >> 4)

    change_blocks(raw, "blk.2.ffn_down_exps.weight", change)


def swap_nibbles_everywhere(raw: RawGguf) -> None:
    def change(blocks: np.ndarray) -> None:
        blocks[..., 1:] = (blocks[..., 1:] << 4) | (blocks[..., 1:] >> 4)

    for info in raw.infos:
        if "_exps" in info.name:
            change_blocks(raw, info.name, change)


def interleave_elements(raw: RawGguf) -> None:
    """Elements 2j and 2j+1 in a byte, as safetensors has them, in place of j and j+16."""

    def change(blocks: np.ndarray) -> None:
        codes = np.concatenate([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], axis=-1)
        blocks[..., 1:] = codes[..., 0::2] | codes[..., 1::2] << 4

    change_blocks(raw, "blk.0.ffn_gate_exps.weight", change)


def shift_scale_row(raw: RawGguf) -> None:
    def change(blocks: np.ndarray) -> None:
        blocks[2, 1:, :, 0] = blocks[2, :-1, :, 0].copy()

    change_blocks(raw, "blk.3.ffn_up_exps.weight", change)


def shift_all_scales(raw: RawGguf) -> None:
    def change(blocks: np.ndarray) -> None:
        blocks[..., 0] = np.roll(blocks[..., 0], 1, axis=1)

    change_blocks(raw, "blk.3.ffn_down_exps.weight", change)


def scale_one_too_large(raw: RawGguf) -> None:
    def change(blocks: np.ndarray) -> None:
        blocks[0, 0, 0, 0] += 1

    change_blocks(raw, "blk.0.ffn_up_exps.weight", change)


def negative_zero_to_zero(raw: RawGguf) -> None:
    def change(blocks: np.ndarray) -> None:
        codes = blocks[..., 1:]
        where = np.argwhere(codes & 15 == 8)[0]
        codes[tuple(where)] &= 0xF0

    change_blocks(raw, "blk.0.ffn_up_exps.weight", change)


def zero_a_block(raw: RawGguf) -> None:
    def change(blocks: np.ndarray) -> None:
        blocks[1, 5, 2] = 0

    change_blocks(raw, "blk.1.ffn_gate_exps.weight", change)


def swap_data(left: str, right: str) -> Callable[[RawGguf], None]:
    def change(raw: RawGguf) -> None:
        a, b = raw.info(left), raw.info(right)
        assert (a.dims, a.kind) == (b.dims, b.kind)
        assert a.data != b.data
        a.data, b.data = b.data, a.data

    return change


def transpose(name: str, dtype: str) -> Callable[[RawGguf], None]:
    def change(raw: RawGguf) -> None:
        info = raw.info(name)
        values = np.frombuffer(info.data, dtype).reshape(tuple(reversed(info.dims)))
        info.data = values.T.tobytes()

    return change


def transpose_with_its_shape(raw: RawGguf) -> None:
    transpose("blk.1.ffn_gate_inp.weight", "<u2")(raw)
    info = raw.info("blk.1.ffn_gate_inp.weight")
    info.dims = tuple(reversed(info.dims))


def rename(old: str, new: str) -> Callable[[RawGguf], None]:
    def change(raw: RawGguf) -> None:
        raw.info(old).name = new

    return change


def drop(name: str) -> Callable[[RawGguf], None]:
    def change(raw: RawGguf) -> None:
        raw.infos.remove(raw.info(name))

    return change


def add_tensor(raw: RawGguf) -> None:
    raw.infos.append(Info("blk.0.rope_freqs.weight", (32,), 0, bytes(128)))


def retype(name: str, kind: int) -> Callable[[RawGguf], None]:
    def change(raw: RawGguf) -> None:
        raw.info(name).kind = kind

    return change


def narrow_a_norm(raw: RawGguf) -> None:
    """A norm in BF16, without any loss: the precision rules say F32 all the same."""
    info = raw.info("output_norm.weight")
    info.data = (np.frombuffer(info.data, "<u4") >> 16).astype("<u2").tobytes()
    info.kind = 30


def round_a_norm(raw: RawGguf) -> None:
    info = raw.info("blk.2.attn_norm.weight")
    info.data = np.nextafter(np.frombuffer(info.data, "<f4"), np.float32(np.inf)).tobytes()


def another_quantiser(raw: RawGguf) -> None:
    """Q8_0 with every q one lower in magnitude."""
    info = raw.info("blk.0.attn_kv.weight")
    blocks = np.frombuffer(bytearray(info.data), np.uint8).reshape(-1, 34)
    q = blocks[:, 2:].view(np.int8)
    q[:] = q - np.sign(q)
    info.data = blocks.tobytes()


def wrong_table_entry(raw: RawGguf) -> None:
    info = raw.info("blk.0.ffn_gate_tid2eid.weight")
    table = np.frombuffer(bytearray(info.data), "<i4")
    table[17] = (table[17] + 1) % 4
    info.data = table.tobytes()


def put_nan(raw: RawGguf) -> None:
    info = raw.info("token_embd.weight")
    values = np.frombuffer(bytearray(info.data), "<u2")
    values[1000] = 0x7FC0
    info.data = values.tobytes()


def set_key(name: str, value: bytes) -> Callable[[RawGguf], None]:
    def change(raw: RawGguf) -> None:
        key = raw.key(name)
        assert key.value != value
        key.value = value

    return change


def rename_key(old: str, new: str) -> Callable[[RawGguf], None]:
    def change(raw: RawGguf) -> None:
        raw.key(old).name = new

    return change


def drop_key(name: str) -> Callable[[RawGguf], None]:
    def change(raw: RawGguf) -> None:
        raw.keys.remove(raw.key(name))

    return change


def retype_key(name: str, kind: int) -> Callable[[RawGguf], None]:
    def change(raw: RawGguf) -> None:
        raw.key(name).kind = kind

    return change


def add_key(raw: RawGguf) -> None:
    raw.keys.append(Key("deepseek4.attention.causal", 7, b"\0"))


def edit_array(name: str, change: Callable[[list[bytes]], None]) -> Callable[[RawGguf], None]:
    """Change the elements of an array key, given as their bytes."""

    def edit(raw: RawGguf) -> None:
        key = raw.key(name)
        kind, count = struct.unpack_from("<IQ", key.value)
        elements, at = [], 12
        for _ in range(count):
            size = 8 + struct.unpack_from("<Q", key.value, at)[0] if kind == 8 else 4
            elements.append(key.value[at : at + size])
            at += size
        before = list(elements)
        change(elements)
        assert elements != before
        key.value = struct.pack("<IQ", kind, len(elements)) + b"".join(elements)

    return edit


def swap_first_two(elements: list[bytes]) -> None:
    elements[300], elements[301] = elements[301], elements[300]


def swap_merges(elements: list[bytes]) -> None:
    elements[0], elements[1] = elements[1], elements[0]


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def f32(value: float) -> bytes:
    return struct.pack("<f", value)


GGUF_DAMAGE: dict[str, Callable[[RawGguf], None]] = {
    "experts_swapped": swap_experts,
    "experts_reversed_everywhere": reverse_experts_everywhere,
    "nibbles_swapped_in_a_block": swap_nibbles_of_a_block,
    "nibbles_swapped_everywhere": swap_nibbles_everywhere,
    "elements_interleaved": interleave_elements,
    "scale_row_shifted": shift_scale_row,
    "all_scale_rows_shifted": shift_all_scales,
    "scale_doubled": scale_one_too_large,
    "negative_zero_lost": negative_zero_to_zero,
    "block_zeroed": zero_a_block,
    "gate_and_up_swapped": swap_data("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"),
    "layers_swapped": swap_data("blk.0.attn_q_b.weight", "blk.3.attn_q_b.weight"),
    "embedding_and_head_swapped": swap_data("token_embd.weight", "output.weight"),
    "norms_swapped": swap_data("blk.1.attn_norm.weight", "blk.1.ffn_norm.weight"),
    "hyper_connections_swapped": swap_data("blk.2.hc_attn_fn.weight", "blk.2.hc_ffn_fn.weight"),
    "kv_and_gate_of_a_compressor_swapped": swap_data(
        "blk.1.attn_compressor_kv.weight", "blk.1.attn_compressor_gate.weight"
    ),
    "f32_transposed": transpose("blk.0.hc_attn_fn.weight", "<u4"),
    "bf16_transposed": transpose("blk.1.ffn_gate_inp.weight", "<u2"),
    "transposed_with_its_shape": transpose_with_its_shape,
    "table_transposed": transpose("blk.0.ffn_gate_tid2eid.weight", "<u4"),
    "tensor_renamed": rename("blk.1.attn_sinks.weight", "blk.1.attn_sink.weight"),
    "tensor_of_another_layer": rename("blk.1.attn_sinks.weight", "blk.9.attn_sinks.weight"),
    "tensor_dropped": drop("blk.2.exp_probs_b.bias"),
    "last_tensor_dropped": lambda raw: raw.infos.remove(raw.infos[-1]),
    "stack_dropped": drop("blk.0.ffn_down_exps.weight"),
    "tensor_added": add_tensor,
    "bf16_called_f16": retype("token_embd.weight", 1),
    "i32_called_f32": retype("blk.0.ffn_gate_tid2eid.weight", 0),
    "norm_in_bf16": narrow_a_norm,
    "norm_off_by_one_bit": round_a_norm,
    "q8_0_rounded_another_way": another_quantiser,
    "table_entry_wrong": wrong_table_entry,
    "nan_in_the_embedding": put_nan,
    "dimension_split": lambda raw: setattr(raw.info("token_embd.weight"), "dims", (160, 200, 2)),
    "dimensions_swapped": lambda raw: setattr(raw.info("token_embd.weight"), "dims", (400, 160)),
    "key_block_count": set_key("deepseek4.block_count", u32(5)),
    "key_block_count_less": set_key("deepseek4.block_count", u32(3)),
    "key_expert_count": set_key("deepseek4.expert_count", u32(8)),
    "key_gating": set_key("deepseek4.expert_gating_func", u32(2)),
    "key_norm": set_key("deepseek4.expert_weights_norm", b"\0"),
    "key_scale_by_a_bit": set_key("deepseek4.expert_weights_scale", f32(1.5000001)),
    "key_rope_base": set_key("deepseek4.rope.freq_base", f32(160000.0)),
    "key_yarn_factor": set_key("deepseek4.rope.scaling.factor", f32(8.0)),
    "key_yarn_type": set_key("deepseek4.rope.scaling.type", text("linear")),
    "key_hash_layers": set_key("deepseek4.hash_layer_count", u32(3)),
    "key_epsilon": set_key("deepseek4.attention.layer_norm_rms_epsilon", f32(1e-5)),
    "key_ratio": edit_array("deepseek4.attention.compress_ratios", lambda e: e.__setitem__(1, u32(128))),
    "key_ratios_short": edit_array("deepseek4.attention.compress_ratios", lambda e: e.pop()),
    "key_clamp": edit_array("deepseek4.swiglu_clamp_exp", lambda e: e.__setitem__(2, f32(7.0))),
    "key_architecture": set_key("general.architecture", text("deepseek2")),
    "key_architecture_of_the_port": set_key("general.architecture", text("deepseek-v4")),
    "key_file_type": set_key("general.file_type", u32(7)),
    "key_name": set_key("general.name", text("Tinier")),
    "key_size_label": set_key("general.size_label", text("8x7B")),
    "key_quantization_version": set_key("general.quantization_version", u32(1)),
    "key_renamed": rename_key("deepseek4.attention.sliding_window", "deepseek4.attention.sliding_windov"),
    "key_dropped": drop_key("deepseek4.attention.indexer.top_k"),
    "key_added": add_key,
    "key_signed": retype_key("deepseek4.context_length", 5),
    "key_of_another_type": retype_key("deepseek4.expert_weights_scale", 4),
    "tokens_swapped": edit_array("tokenizer.ggml.tokens", swap_first_two),
    "token_dropped": edit_array("tokenizer.ggml.tokens", lambda e: e.pop()),
    "token_type_wrong": edit_array("tokenizer.ggml.token_type", lambda e: e.__setitem__(0, u32(1))),
    "merges_swapped": edit_array("tokenizer.ggml.merges", swap_merges),
    "bos_wrong": set_key("tokenizer.ggml.bos_token_id", u32(5)),
    "eos_dropped": drop_key("tokenizer.ggml.eos_token_id"),
    "pre_tokenizer_wrong": set_key("tokenizer.ggml.pre", text("llama-bpe")),
    "add_bos_flipped": lambda raw: setattr(
        raw.key("tokenizer.ggml.add_bos_token"), "value", bytes([1 - raw.key("tokenizer.ggml.add_bos_token").value[0]])
    ),
    "template_cut": set_key("tokenizer.chat_template", text("{{ messages }}")),
}


@pytest.mark.parametrize("damage", GGUF_DAMAGE)
def test_damage_to_a_gguf_is_caught(damage: str, small: Path, copy_of: Make) -> None:
    path = copy_of("gguf")
    raw = RawGguf.read(path)
    raw.write(path)
    if damage == next(iter(GGUF_DAMAGE)):
        assert caught(small, path) is None
    GGUF_DAMAGE[damage](raw)
    raw.write(path)
    assert caught(small, path) is not None


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def truncate(path: Path, by: int) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - by)


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def write_in_every_gap(path: Path, which: int) -> None:
    gaps = list(read_gguf_part(path).gaps())
    overwrite(path, gaps[which][1] - 1, b"\x01")


def swap_names_in_place(path: Path) -> None:
    data = path.read_bytes()
    left, right = b"blk.0.attn_q_a.weight", b"blk.1.attn_q_a.weight"
    swapped = (
        data.replace(left, b"\0" * len(left)).replace(right, left).replace(b"\0" * len(left) + b"\x02", right + b"\x02")
    )
    assert swapped != data
    path.write_bytes(swapped)


RAW_GGUF_DAMAGE: dict[str, Callable[[Path], None]] = {
    "bytes_after_the_end": lambda path: append(path, b"x"),
    "zeros_after_the_end": lambda path: append(path, bytes(32)),
    "last_byte_cut": lambda path: truncate(path, 1),
    "cut_in_the_last_tensor": lambda path: truncate(path, 4096),
    "padding_after_the_header": lambda path: write_in_every_gap(path, 0),
    "padding_between_tensors": lambda path: write_in_every_gap(path, 2),
    "padding_before_the_last": lambda path: write_in_every_gap(path, -1),
    "names_swapped_in_the_header": swap_names_in_place,
    "magic": lambda path: overwrite(path, 0, b"GGML"),
    "version_2": lambda path: overwrite(path, 4, u32(2)),
    "one_tensor_less": lambda path: overwrite(path, 8, struct.pack("<Q", len(open_gguf(path).tensors) - 1)),
    "one_key_less": lambda path: overwrite(path, 16, struct.pack("<Q", len(open_gguf(path).metadata) - 1)),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", RAW_GGUF_DAMAGE)
def test_damage_to_the_bytes_of_a_gguf_is_caught(damage: str, small: Path, copy_of: Make) -> None:
    path = copy_of("gguf")
    RAW_GGUF_DAMAGE[damage](path)
    assert caught(small, path) is not None


# Split models


def swap_files(left: Path, right: Path) -> None:
    spare = left.with_name("spare")
    left.rename(spare)
    right.rename(left)
    spare.rename(right)


def splits(path: Path) -> list[Path]:
    return sorted(path.parent.glob("*.gguf"))


def edit_split(number: int, change: Callable[[RawGguf], None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        raw = RawGguf.read(splits(path)[number])
        change(raw)
        raw.write(splits(path)[number])

    return edit


SPLIT_DAMAGE: dict[str, Callable[[Path], None]] = {
    "files_swapped": lambda path: swap_files(*splits(path)[1:3]),
    "file_missing": lambda path: splits(path)[2].unlink(),
    "file_twice": lambda path: shutil.copy(splits(path)[1], splits(path)[2]) and None,
    "split_no": edit_split(1, set_key("split.no", struct.pack("<H", 2))),
    "split_count": edit_split(1, set_key("split.count", struct.pack("<H", 9))),
    "tensor_count": edit_split(2, set_key("split.tensors.count", struct.pack("<i", 1))),
    "split_no_dropped": edit_split(2, drop_key("split.no")),
    "key_in_a_later_file": edit_split(1, add_key),
    "type_of_split_count": edit_split(1, retype_key("split.count", 3)),
    "tensor_dropped_from_a_later_file": edit_split(2, lambda raw: raw.infos.pop() and None),
}


@pytest.mark.parametrize("damage", SPLIT_DAMAGE)
def test_damage_to_a_split_model_is_caught(damage: str, small: Path, copy_of: Make) -> None:
    path = copy_of("gguf-split")
    SPLIT_DAMAGE[damage](path)
    assert caught(small, path) is not None


def test_a_missing_file_of_the_output_is_a_verdict(small: Path, copy_of: Make) -> None:
    path = copy_of("gguf-split")
    splits(path)[1].unlink()
    report = verify(small, path)
    assert [problem.kind for problem in report.problems] == ["file"]
    assert splits(path)[1].name in report.problems[0].where or "00002" in report.problems[0].where


def test_a_missing_tensor_is_named_once_and_its_source_where_that_has_another_name(small: Path, copy_of: Make) -> None:
    folder = copy_of("dequantize")
    edit_file("", drop_tensor("norm.weight"))(folder)
    [found] = [problem for problem in verify(small, folder).problems if problem.kind == "missing"]
    assert (found.where, found.what) == ("tensor norm.weight", "not in the output")
    report = Report("source", "output", "GGUF", None, 0, False)
    report.missing("output_norm.weight", "norm.weight")
    assert str(report.problems[0].what) == "not in the output; the source has norm.weight"


def test_a_malformed_model_card_is_noted_and_no_fault(small: Path, outputs: Make, tmp_path: Path) -> None:
    source = shutil.copytree(small, tmp_path / small.name)
    (source / "README.md").write_text("---\nlicense: [\n---\n")
    report = verify(source, outputs("gguf"))
    assert report.ok
    assert any("front matter is not valid YAML" in note for note in report.notes)


# Safetensors folders


def edit_file(name: str, change: Callable[[RawSafetensors], None]) -> Callable[[Path], None]:
    """Change the file of a folder whose name contains ``name``."""

    def edit(folder: Path) -> None:
        path = next(path for path in sorted(folder.glob("*.safetensors")) if name in path.name)
        raw = RawSafetensors.read(path)
        change(raw)
        raw.write(path)

    return edit


def edit_json(name: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        change(document)
        (folder / name).write_text(json.dumps(document, indent=2))

    return edit


def swap_tensors(left: str, right: str) -> Callable[[RawSafetensors], None]:
    def change(raw: RawSafetensors) -> None:
        a, b = raw.tensors[left], raw.tensors[right]
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.data != b.data
        a.data, b.data = b.data, a.data

    return change


def edit_bytes(name: str, change: Callable[[np.ndarray], None]) -> Callable[[RawSafetensors], None]:
    """Change a tensor as rows of bytes."""

    def edit(raw: RawSafetensors) -> None:
        tensor = raw.tensors[name]
        rows = np.frombuffer(bytearray(tensor.data), np.uint8).reshape(tensor.shape[0], -1)
        before = rows.copy()
        change(rows)
        assert not np.array_equal(before, rows)
        tensor.data = rows.tobytes()

    return edit


def roll_rows(rows: np.ndarray) -> None:
    rows[:] = np.roll(rows, 1, axis=0)


def swap_nibbles(rows: np.ndarray) -> None:
    rows[:] = rows << 4 | rows >> 4


def rename_tensor(old: str, new: str) -> Callable[[RawSafetensors], None]:
    def change(raw: RawSafetensors) -> None:
        raw.tensors = {new if name == old else name: tensor for name, tensor in raw.tensors.items()}

    return change


def drop_tensor(name: str) -> Callable[[RawSafetensors], None]:
    def change(raw: RawSafetensors) -> None:
        del raw.tensors[name]

    return change


def add_to_file(raw: RawSafetensors) -> None:
    raw.tensors["layers.0.attn.extra.weight"] = RawTensor("BF16", [2, 2], bytes(8))


def transpose_tensor(raw: RawSafetensors) -> None:
    tensor = raw.tensors["layers.0.hc_attn_fn"]
    tensor.data = np.frombuffer(tensor.data, "<u4").reshape(tensor.shape).T.tobytes()


def truncate_bf16(raw: RawSafetensors) -> None:
    """Cut instead of rounding: what a careless tool does to F32 weights, here one unit lower everywhere."""
    tensor = raw.tensors["layers.1.attn.wq_a.weight"]
    tensor.data = (np.frombuffer(tensor.data, "<u2") ^ 1).tobytes()


def as_bf16(raw: RawSafetensors) -> None:
    tensor = raw.tensors["layers.0.attn.attn_sink"]
    tensor.dtype, tensor.data = "BF16", (np.frombuffer(tensor.data, "<u4") >> 16).astype("<u2").tobytes()


def table_as_i32(raw: RawSafetensors) -> None:
    tensor = raw.tensors["layers.0.ffn.gate.tid2eid"]
    tensor.dtype, tensor.data = "I32", np.frombuffer(tensor.data, "<i8").astype("<i4").tobytes()


W1, W3 = "layers.1.ffn.experts.2.w1.weight", "layers.1.ffn.experts.2.w3.weight"

BF16_DAMAGE: dict[str, Callable[[Path], None]] = {
    "experts_swapped": edit_file("", swap_tensors(W1, "layers.1.ffn.experts.3.w1.weight")),
    "gate_and_up_swapped": edit_file("", swap_tensors(W1, W3)),
    "rows_shifted": edit_file("", edit_bytes(W1, roll_rows)),
    "tensor_renamed": edit_file("", rename_tensor(W1, W1.replace("w1", "w4"))),
    "tensor_dropped": edit_file("", drop_tensor("norm.weight")),
    "tensor_added": edit_file("", add_to_file),
    "transposed": edit_file("", transpose_tensor),
    "last_bits_flipped": edit_file("", truncate_bf16),
    "sink_in_bf16": edit_file("", as_bf16),
    "table_in_i32": edit_file("", table_as_i32),
    "bf16_called_f16": edit_file("", lambda raw: setattr(raw.tensors[W1], "dtype", "F16")),
    "shape_swapped": edit_file("", lambda raw: raw.tensors[W1].shape.reverse()),
    "metadata": edit_file("", lambda raw: setattr(raw, "metadata", {"format": "tf"})),
    "bytes_after_the_end": lambda folder: append(next(folder.glob("*.safetensors")), b"\0"),
    "cut": lambda folder: truncate(next(folder.glob("*.safetensors")), 1),
    "stray_file": lambda folder: shutil.copy(next(folder.glob("*.safetensors")), folder / "stray.safetensors") and None,
    "config_number": edit_json("config.json", lambda c: c.update(rms_norm_eps=1e-5)),
    "config_key_dropped": edit_json("config.json", lambda c: c.pop("swiglu_limit")),
    "config_key_added": edit_json("config.json", lambda c: c.update(quantization_config={"quant_method": "fp8"})),
    "config_expert_dtype_kept": edit_json("config.json", lambda c: c.update(expert_dtype="fp4")),
    "config_dtype": edit_json("config.json", lambda c: c.update(dtype="float16")),
    "config_number_as_text": edit_json("config.json", lambda c: c.update(hidden_size="160")),
    "config_truth_as_number": edit_json("config.json", lambda c: c.update(norm_topk_prob=1)),
    "config_missing": lambda folder: (folder / "config.json").unlink(),
    "config_no_json": lambda folder: append(folder / "config.json", b"}"),
    "tokenizer_missing": lambda folder: (folder / "tokenizer.json").unlink(),
    "tokenizer_changed": lambda folder: append(folder / "tokenizer.json", b" "),
    "tokenizer_config_changed": edit_json("tokenizer_config.json", lambda c: c.update(add_bos_token=True, x=1)),
}
BF16_FILES_DAMAGE: dict[str, Callable[[Path], None]] = {
    "index_total_size": edit_json("model.safetensors.index.json", lambda i: i["metadata"].update(total_size=1)),
    "index_entry_elsewhere": edit_json(
        "model.safetensors.index.json",
        lambda i: i["weight_map"].update({"norm.weight": sorted(set(i["weight_map"].values()))[-1]}),
    ),
    "index_entry_dropped": edit_json("model.safetensors.index.json", lambda i: i["weight_map"].pop(W1)),
    "index_entry_added": edit_json(
        "model.safetensors.index.json",
        lambda i: i["weight_map"].update({"x": next(iter(i["weight_map"].values()))}),
    ),
    "index_key_added": edit_json("model.safetensors.index.json", lambda i: i.update(extra=1)),
    "index_missing": lambda folder: (folder / "model.safetensors.index.json").unlink(),
    "file_missing": lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(),
    "files_swapped": lambda folder: swap_files(*sorted(folder.glob("*.safetensors"))[:2]),
}
CODES, SCALES = W1, W1.replace(".weight", ".scale")
FP8_DAMAGE: dict[str, Callable[[Path], None]] = {
    "scale_row_shifted": edit_file("", edit_bytes("layers.0.attn.wq_b.scale", roll_rows)),
    "scale_too_large": edit_file("", edit_bytes(SCALES, lambda rows: rows.__iadd__(1))),
    "codes_shifted": edit_file("", edit_bytes(CODES, roll_rows)),
    "scale_dropped": edit_file("", drop_tensor(SCALES)),
    "scales_of_two_experts_swapped": edit_file(
        "", swap_tensors("layers.0.attn.wo_b.scale", "layers.2.attn.wo_b.scale")
    ),
    "sign_of_zero": edit_file("", edit_bytes(CODES, lambda rows: rows.__setitem__(rows == 0, 0x80))),
    "nan_code": edit_file("", edit_bytes(CODES, lambda rows: rows.__setitem__((3, 4), 0x7F))),
    "expert_dtype": edit_json("config.json", lambda c: c.update(expert_dtype="fp4")),
}
SHARD_DAMAGE: dict[str, Callable[[Path], None]] = {
    "ranks_swapped": lambda folder: swap_files(*sorted(folder.glob("*.safetensors"))),
    "rank_twice": lambda folder: shutil.copy(*sorted(folder.glob("*.safetensors"))) and None,
    "experts_of_a_rank_swapped": edit_file("model0", swap_tensors(W1.replace(".2.", ".0."), W1.replace(".2.", ".1."))),
    "copy_differs_on_a_rank": edit_file("model1", edit_bytes("layers.3.attn_norm.weight", roll_rows)),
    "copy_differs_in_a_bit": edit_file(
        "model1", edit_bytes("layers.3.attn.wkv.weight", lambda rows: rows.__setitem__((5, 5), rows[5, 5] ^ 1))
    ),
    "fp4_nibbles_swapped": edit_file("model1", edit_bytes(W1, swap_nibbles)),
    "fp4_scale_row_shifted": edit_file("model1", edit_bytes(SCALES, roll_rows)),
    "part_of_a_head_shifted": edit_file("model0", edit_bytes("head.weight", roll_rows)),
    "columns_exchanged": edit_file(
        "model0", edit_bytes("layers.1.attn.wo_b.weight", lambda r: r.__setitem__(slice(None), r[:, ::-1].copy()))
    ),
    "tensor_missing_on_a_rank": edit_file("model1", drop_tensor("layers.0.ffn.gate.weight")),
    "expert_on_another_rank": edit_file("model1", rename_tensor(W1, W1.replace(".2.", ".1."))),
    "wo_a_scale_left_in": edit_file(
        "model0",
        lambda raw: raw.tensors.update({"layers.0.attn.wo_a.scale": RawTensor("F8_E8M0", [1, 1], b"\x7f")}),
    ),
    "config_changed": edit_json("config.json", lambda c: c.update(num_hash_layers=1)),
    "tokenizer_missing": lambda folder: (folder / "tokenizer.json").unlink(),
    "stray_shard_of_another_set": lambda folder: (
        shutil.copy(folder / "model0-mp2.safetensors", folder / "model0-mp4.safetensors") and None
    ),
    "stray_file": lambda folder: shutil.copy(folder / "model0-mp2.safetensors", folder / "x.safetensors") and None,
}
FOLDER_DAMAGE = [
    (kind, damage, change)
    for kind, damages in (
        ("bf16", BF16_DAMAGE),
        ("bf16-files", BF16_FILES_DAMAGE),
        ("fp8", FP8_DAMAGE),
        ("shards-2", SHARD_DAMAGE),
    )
    for damage, change in damages.items()
]


@pytest.mark.parametrize(
    ("kind", "change"), [(k, c) for k, _, c in FOLDER_DAMAGE], ids=[f"{k}-{d}" for k, d, _ in FOLDER_DAMAGE]
)
def test_damage_to_a_folder_is_caught(kind: str, change: Callable[[Path], None], small: Path, copy_of: Make) -> None:
    folder = copy_of(kind)
    change(folder)
    assert caught(small, folder) is not None


def swap_stacked(first: int, second: int) -> Callable[[np.ndarray], None]:
    def change(rows: np.ndarray) -> None:
        rows[[first, second]] = rows[[second, first]]

    return change


def exchange_halves(rows: np.ndarray) -> None:
    """up above gate, in place of gate above up."""
    half = rows.shape[1] // 2
    rows[:] = np.concatenate([rows[:, half:], rows[:, :half]], axis=1)


@pytest.mark.parametrize(
    "change", [swap_stacked(1, 3), exchange_halves, roll_rows], ids=["experts", "gate_up", "rolled"]
)
def test_damage_to_stacked_experts_is_caught(change: Callable[[np.ndarray], None], small: Path, copy_of: Make) -> None:
    folder = copy_of("bf16-transformers")
    edit_file("", edit_bytes("model.layers.2.mlp.experts.gate_up_proj", change))(folder)
    assert "gate_up_proj" in (caught(small, folder) or "")


def test_there_are_at_least_200_corruptions() -> None:
    structural = len(GGUF_DAMAGE) + len(RAW_GGUF_DAMAGE) + len(SPLIT_DAMAGE) + len(FOLDER_DAMAGE) + 3
    assert sum(FLIPS.values()) + structural >= 350


# What the report says about damage


def test_the_report_counts_elements_and_says_where_and_how_much(small: Path, copy_of: Make) -> None:
    path = copy_of("gguf")
    raw = RawGguf.read(path)
    info = raw.info("blk.1.hc_ffn_fn.weight")
    columns, rows = info.dims
    values = np.frombuffer(bytearray(info.data), "<f4").reshape(rows, columns)
    values[3, 5] += 0.25
    values[3, 9] -= 1.5
    values[7, 0] += 0.5
    before = np.frombuffer(info.data, "<f4").reshape(rows, columns)
    errors = np.abs(values.astype(np.float64) - before)
    info.data = values.tobytes()
    raw.write(path)
    report = verify(small, path)
    result = report.results["blk.1.hc_ffn_fn.weight"]
    assert (result.wrong, result.first_index) == (3, (3, 5))
    assert result.largest_error == pytest.approx(float(errors.max()), rel=1e-12)
    assert result.verdict == "wrong"
    assert len(report.problems) == 1
    assert "3 of" in report.problems[0].what


def test_the_index_of_a_stacked_expert_is_its_own(small: Path, copy_of: Make) -> None:
    path = copy_of("gguf")
    raw = RawGguf.read(path)

    def change(blocks: np.ndarray) -> None:
        blocks[2, 11, 1, 1 + 4] ^= 0x10  # the high nibble of byte 4: element 32 + 4 + 16

    change_blocks(raw, "blk.0.ffn_up_exps.weight", change)
    raw.write(path)
    result = verify(small, path).results["blk.0.ffn_up_exps.weight"]
    assert (result.wrong, result.first_index) == (1, (2, 11, 52))


def first_problem(report: Report) -> str:
    return f"{report.problems[0].kind} {report.problems[0]}"


def test_a_nan_makes_the_largest_error_infinite(small: Path, copy_of: Make) -> None:
    path = copy_of("gguf")
    raw = RawGguf.read(path)
    put_nan(raw)
    raw.write(path)
    report = verify(small, path)
    assert report.results["token_embd.weight"].as_json()["largest_error"] == "inf"
    assert "largest error inf" in first_problem(report)


def test_names_in_a_report_are_escaped(small: Path, copy_of: Make) -> None:
    path = copy_of("gguf")
    raw = RawGguf.read(path)
    raw.info("blk.1.attn_sinks.weight").name = "blk.1.\x1b[31m\nattn"
    raw.write(path)
    lines = run_cli("verify", small, path).out
    assert "\x1b" not in lines
    assert "\\x1b[31m\\nattn" in lines


# Other tools' roundings


def write_rounded(path: Path, step: int) -> None:
    """Q8_0 of one tensor with every q moved by ``step`` away from zero, where there is room."""
    raw = RawGguf.read(path)
    info = raw.info("blk.0.attn_q_a.weight")
    blocks = np.frombuffer(bytearray(info.data), np.uint8).reshape(-1, 34)
    q = blocks[:, 2:].view(np.int8)
    q[:] = np.clip(q.astype(int) + step * np.sign(q), -127, 127)
    info.data = blocks.tobytes()
    raw.write(path)


def half_even(path: Path, source: Path) -> int:
    """Round one tensor's halves to even and d down, as another tool may; return how many elements changed."""
    report = verify(source, path)
    assert report.ok
    raw = RawGguf.read(path)
    info = raw.info("blk.0.attn_q_a.weight")
    blocks = np.frombuffer(bytearray(info.data), np.uint8).reshape(-1, 34)
    d = blocks[:, :2].view("<u2")
    before = d.copy()
    d[:] = d - 1  # the float16 below: the same elements, a little smaller
    info.data = blocks.tobytes()
    raw.write(path)
    return int(np.count_nonzero(before != d)) * 32


def test_another_rounding_is_wrong_unless_the_tool_is_foreign(small: Path, copy_of: Make) -> None:
    path = copy_of("gguf")
    changed = half_even(path, small)
    assert verify(small, path).results["blk.0.attn_q_a.weight"].wrong == changed
    report = verify(small, path, foreign=True)
    assert report.ok
    assert report.results["blk.0.attn_q_a.weight"].wrong == 0


def test_more_than_half_a_step_is_wrong_for_foreign_tools_too(small: Path, copy_of: Make) -> None:
    path = copy_of("gguf")
    write_rounded(path, 1)
    report = verify(small, path, foreign=True)
    assert report.results["blk.0.attn_q_a.weight"].wrong > 1000


def test_a_foreign_file_may_be_named_otherwise(small: Path, copy_of: Make) -> None:
    path = copy_of("gguf")
    raw = RawGguf.read(path)
    raw.key("general.name").value = text("Somebody's quant")
    raw.keys.append(Key("quantize.imatrix.file", 8, text("x.dat")))
    raw.keys.remove(raw.key("tokenizer.chat_template"))
    raw.write(path)
    assert not verify(small, path).ok
    assert verify(small, path, foreign=True).ok
    raw.key("deepseek4.expert_used_count").value = u32(2)
    raw.write(path)
    assert not verify(small, path, foreign=True).ok
