"""The plan: every source tensor claimed once, every output byte made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from dsv4convert.formats.ggml_types import BY_NAME, GgmlType
from dsv4convert.plan import (
    COPY,
    COPY_SEGMENT_BYTES,
    CopySegments,
    MadeSegments,
    Operand,
    OutputTensor,
    Plan,
    Segment,
    identity_of,
    operation_of,
    place,
)
from dsv4convert.scale_forms import Times
from dsv4convert.targets import dequantize, drafts, gguf, mend, repack, shards
from dsv4convert.targets.claims import Claims
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.targets.segments import StackedSegments, convert_segments, stack_segments
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


def _plans_of(found: object) -> list[Plan]:
    """Return the plans of what a planner returns: a plan, several, or one with more."""
    plans = found if isinstance(found, list | tuple) and not hasattr(found, "plan") else [getattr(found, "plan", found)]
    assert all(isinstance(plan, Plan) for plan in plans)
    return list(plans)


@pytest.mark.parametrize("name", PLANNERS)
def test_the_source_files_are_those_of_the_segments(name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny")
    if name == "unshard":
        shard(source, tmp_path / "shards", mp=2)
        source = tmp_path / "shards"
    for plan in _plans_of(PLANNERS[name](source, tmp_path)):
        read = [operand.file for segment in plan.segments() for operand in segment.operands]
        assert plan.source_files == tuple(dict.fromkeys(read)) != ()


def test_segments_that_differ_in_anything_have_another_identity(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """A run goes on only under the plan that it began with, so whatever decides bytes must show in the identity."""
    found: dict[bytes, tuple[Segment, ...]] = {}
    kinds: set[type[Sequence[Segment]]] = set()
    for preset in ("tiny", "v41-tiny"):
        source = make_checkpoint(preset, files=3)
        shard(source, tmp_path / preset, mp=2)
        left_out = {"transformers"} if preset == "v41-tiny" else set()  # it has no modules for V4.1
        for name in PLANNERS.keys() - left_out:
            for plan in _plans_of(PLANNERS[name](tmp_path / preset if name == "unshard" else source, tmp_path)):
                names = {file: str(file) for file in plan.source_files}
                for tensor in plan.tensors():
                    kinds.add(type(tensor.segments))
                    segments = tuple(tensor.segments)
                    assert found.setdefault(identity_of(tensor.segments, names), segments) == segments
                    assert operation_of(tensor.segments) == operation_of(segments)
    assert kinds >= {tuple, *_kinds_of(MadeSegments)}
    assert len(found) > 1000


def _kinds_of(base: type[MadeSegments]) -> Iterator[type[MadeSegments]]:
    for kind in base.__subclasses__():
        if not kind.__abstractmethods__:
            yield kind
        yield from _kinds_of(kind)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"offset": 4097}, id="offset"),
        pytest.param({"file": Path("b")}, id="file"),
        pytest.param({"scale_form": Times(0.5)}, id="scale form"),
    ],
)
def test_each_place_of_a_stack_counts_in_its_identity(change: dict[str, Any]) -> None:
    places = [Operand(Path("a"), 4096 * number, 32, 1, "<f4", Times(1.0)) for number in range(4)]
    first = Segment(COPY, (places[0],), 8, 32)
    names = {Path("a"): "a", Path("b"): "b"}
    identity = StackedSegments(first, places).identity(names)
    assert identity == StackedSegments(first, list(places)).identity(names)
    for number in range(1, 4):
        changed = [*places[:number], places[number]._replace(**change), *places[number + 1 :]]
        assert StackedSegments(first, changed).identity(names) != identity


@pytest.mark.parametrize("element", [BY_NAME[name] for name in ("f32", "q8_0", "mxfp4")], ids=lambda kind: kind.name)
def test_a_stack_has_the_segments_of_its_weights_whether_these_are_alike_or_not(
    element: GgmlType, make_checkpoint: MakeCheckpoint
) -> None:
    held = open_folder(make_checkpoint("tiny", files=3)).weights
    alike = [held[f"layers.2.ffn.experts.{number}.w1.weight"] for number in range(8)]
    fp8 = held["layers.2.ffn.shared_experts.w1.weight"]
    for weights in (alike, alike[:1], [*alike, fp8], [fp8, *alike]):
        each = [segment for weight in weights for segment in convert_segments(weight, element)]
        stack = stack_segments(weights, element)
        assert list(stack) == each
        assert isinstance(stack, StackedSegments) == (len(weights) > 1 and weights == alike)


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
