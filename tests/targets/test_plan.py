"""The plan: every source tensor claimed once, every output byte made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4convert.checkpoint import open_folder
from dsv4convert.checkpoint.meaning import open_checked
from dsv4convert.checkpoint.shards import open_shards
from dsv4convert.containers.safetensors import read_header
from dsv4convert.errors import InventoryError
from dsv4convert.plan import COPY_SEGMENT_BYTES, CopySegments, OutputTensor, Plan, place
from dsv4convert.targets import dequantize, drafts, gguf, mend, repack, shards
from dsv4convert.targets.claims import Claims
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.targets.shard_tensors import ShardOptions

from ..checkpoints import MakeCheckpoint
from ..engine.plans import PLANS, MakePlan
from .sharding import shard


def test_a_weight_claimed_twice_is_an_error(tiny: Path) -> None:
    checkpoint = open_folder(tiny)
    claims = Claims(checkpoint)
    weight = next(iter(checkpoint.weights.values()))
    claims.take(weight)
    with pytest.raises(InventoryError, match=f"tensor {weight.name}: claimed twice"):
        claims.take(weight)


def test_a_weight_that_nobody_claims_is_an_error(tiny: Path) -> None:
    checkpoint = open_folder(tiny)
    claims = Claims(checkpoint)
    first, *others = checkpoint.weights.values()
    for weight in others:
        claims.take(weight)
    with pytest.raises(InventoryError, match=f"tensor {first.name}: no output tensor takes it"):
        claims.close()


def test_what_is_dropped_is_counted_with_its_scales(tiny: Path) -> None:
    checkpoint = open_folder(tiny)
    claims = Claims(checkpoint)
    draft = [weight for weight in checkpoint.weights.values() if weight.is_draft]
    claims.drop("mtp", "no need", draft)
    for weight in checkpoint.weights.values():
        if not weight.is_draft:
            claims.take(weight)
    (dropped,) = claims.close()
    assert dropped.count == sum(1 + (weight.scale is not None) for weight in draft)
    assert dropped.nbytes == sum(weight.nbytes for weight in draft)


PLANNERS: dict[str, Callable[[Path, Path], object]] = {
    "hf-to-gguf": lambda source, out: gguf.plan_gguf(source, out / "a.gguf", GgufOptions()),
    "hf-to-gguf of drafts": lambda source, out: gguf.plan_gguf(source, out / "a.gguf", GgufOptions(draft="split")),
    "dequantize": lambda source, out: dequantize.plan_dequantize(source, out / "o"),
    "transformers": lambda source, out: dequantize.plan_dequantize(source, out / "o", names="transformers"),
    "mend": lambda source, out: mend.plan_mend(source, out / "o", mend.Mends(drop_draft=True)),
    "repack": lambda source, out: repack.plan_repack(source, out / "o"),
    "repack to nvfp4": lambda source, out: repack.plan_repack(source, out / "o", experts="nvfp4"),
    "shard": lambda source, out: shards.plan_shards(source, out / "o", ShardOptions(2)),
    "shard without drafts": lambda source, out: shards.plan_shards(source, out / "o", ShardOptions(2, draft="drop")),
    "shard of a draft": lambda source, out: shards.plan_shards(source, out / "o", ShardOptions(2, draft="only")),
    "unshard": lambda source, out: shards.plan_unshard(source, out / "o"),
}


@pytest.mark.parametrize("name", PLANNERS)
def test_planning_leaves_the_checkpoint_as_it_was(
    name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint("tiny")
    if name == "unshard":
        shard(source, tmp_path / "shards", mp=2)
        source = tmp_path / "shards"
    opened: list[tuple[Any, dict[str, Any], int]] = []

    def remembered(open_: Callable[..., Any]) -> Callable[..., Any]:
        def open_and_remember(*args: Any, **options: Any) -> Any:
            checkpoint = open_(*args, **options)
            opened.append((checkpoint, dict(checkpoint.weights), checkpoint.nbytes))
            return checkpoint

        return open_and_remember

    for module in (gguf, drafts, mend):
        monkeypatch.setattr(module, "open_checked", remembered(open_checked))
    monkeypatch.setattr(shards, "open_shards", remembered(open_shards))
    PLANNERS[name](source, tmp_path)
    ((checkpoint, weights, nbytes),) = opened
    assert dict(checkpoint.weights) == weights
    assert list(checkpoint.weights) == list(weights)
    assert checkpoint.nbytes == nbytes > 0


def test_the_weights_of_a_checkpoint_cannot_be_taken_away(tiny: Path) -> None:
    with pytest.raises(AttributeError):
        open_folder(tiny).weights.pop("embed.weight")  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", PLANS.values(), ids=list(PLANS))
def test_tensors_lie_apart_within_their_file_and_segments_fill_them(make: MakePlan, tiny: Path, tmp_path: Path) -> None:
    for file in make(tiny, tmp_path).files:
        position = len(file.header)
        for tensor in sorted(file.tensors, key=lambda tensor: tensor.offset):
            assert tensor.offset >= position
            assert sum(segment.nbytes for segment in tensor.segments) == tensor.nbytes
            sizes = {segment.nbytes for segment in list(tensor.segments)[:-1]}
            assert len(sizes) <= 1
            position = tensor.offset + tensor.nbytes
        assert position <= file.nbytes


@pytest.mark.parametrize("name", PLANNERS)
def test_the_source_files_are_those_of_the_segments(name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny")
    if name == "unshard":
        shard(source, tmp_path / "shards", mp=2)
        source = tmp_path / "shards"
    found = PLANNERS[name](source, tmp_path)
    plans = found if isinstance(found, list | tuple) and not hasattr(found, "plan") else [getattr(found, "plan", found)]
    for plan in plans:
        assert isinstance(plan, Plan)
        read = [operand.file for segment in plan.segments() for operand in segment.operands]
        assert plan.source_files == tuple(dict.fromkeys(read)) != ()


@given(offset=st.integers(0, 2**50), nbytes=st.integers(0, 5 * COPY_SEGMENT_BYTES))
def test_copy_segments_cover_the_range_once(offset: int, nbytes: int) -> None:
    position = offset
    for segment in CopySegments(Path("a"), offset, nbytes):
        assert segment.operands[0].offset == position
        assert segment.nbytes <= COPY_SEGMENT_BYTES
        position += segment.nbytes
    assert position == offset + nbytes


@given(sizes=st.lists(st.integers(0, 1000), max_size=20), start=st.integers(0, 100), power=st.integers(0, 6))
def test_placed_tensors_are_aligned_and_close_together(sizes: list[int], start: int, power: int) -> None:
    alignment = 1 << power
    position = start
    for tensor in place([OutputTensor("t", "u8", (n,), 0, n, ()) for n in sizes], start, alignment):
        assert tensor.offset % alignment == 0
        assert 0 <= tensor.offset - position < alignment
        position = tensor.offset + tensor.nbytes


def test_planning_reads_no_weights(tiny: Path, tmp_path: Path) -> None:
    """Headers and routing tables: the rest of the payload may as well be a hole."""
    for path in tiny.iterdir():
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            header = 8 + int.from_bytes(data[:8], "little")
            with (tmp_path / path.name).open("wb") as file:
                file.write(data[:header])
                file.truncate(len(data))
                for name, stored in read_header(path).items():
                    if name.endswith(".tid2eid"):
                        file.seek(stored.offset)
                        file.write(data[stored.offset : stored.offset + stored.nbytes])
        else:
            (tmp_path / path.name).write_bytes(data)
    here = plan_gguf(tiny, tmp_path / "a.gguf", GgufOptions(), name="x")
    there = plan_gguf(tmp_path, tmp_path / "a.gguf", GgufOptions(), name="x")
    assert [file.header for file in here.files] == [file.header for file in there.files]
