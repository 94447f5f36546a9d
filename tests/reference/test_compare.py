"""Comparing runs: the numbers, and what makes two runs incomparable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dsv4convert.errors import FileFormatError, InputMissingError, OutputExistsError, UsageError, VerifyError
from dsv4convert.reference import Model
from dsv4convert.reference.compare import compare, difference, logits_difference
from dsv4convert.reference.goldens import INDEX_NAME, open_goldens, recorded_activations, write_goldens

from .random_model import random_source, random_tokens

Array = npt.NDArray[Any]


def values(*rows: list[float]) -> Array:
    return np.array(rows, np.float32)


def test_equal_values_have_no_error() -> None:
    a = values([1, 2], [-3, 4])
    d = difference("x", a, a.copy())
    assert (d.rmse, d.relative_rmse, d.median_relative_rmse, d.cosine, d.largest) == (0, 0, 0, 1, 0)


def test_errors_are_measured_against_the_first_run() -> None:
    a, b = values([3, 4], [3, 4], [3, 4]), values([3, 4], [3, 4.5], [3, 10])
    d = difference("x", a, b)
    assert d.rmse == pytest.approx(np.sqrt((0.25 + 36) / 6))
    assert d.relative_rmse == pytest.approx(np.sqrt((0.25 + 36) / 6) / np.sqrt(12.5))
    assert d.median_relative_rmse == pytest.approx(np.sqrt(0.25 / 2) / np.sqrt(12.5))
    assert d.largest == 6
    assert d.cosine == pytest.approx((25 + 27 + 49) / np.sqrt(75) / np.sqrt(25 + 29.25 + 109))


def test_an_error_where_the_first_run_is_zero_is_infinite() -> None:
    assert difference("x", values([0, 0]), values([0, 1])).relative_rmse == float("inf")


def test_a_nan_is_beyond_every_tolerance() -> None:
    a = [("x", values([1, 2])), ("logits", values([1, 2]))]
    b = [("x", values([1, np.nan])), ("logits", values([1, 2]))]
    beyond = compare(a, b).first_beyond(1e9, by_median=False)
    assert beyond is not None
    assert beyond.name == "x"


def test_entries_that_neither_query_sees_are_no_error() -> None:
    a = values([-np.inf, 1], [2, 1])
    assert difference("score", a, a.copy()).relative_rmse == 0
    b = values([5, 1], [2, 1])
    assert np.isinf(difference("score", a, b).relative_rmse or 0)
    logits = ("logits", values([1, 2]))
    block = compare([("score", a), logits], [("score", b), logits]).as_json()["blocks"][0]
    assert block["relative_rmse"] is None


def test_choices_agree_as_sets() -> None:
    a, b = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[3, 1, 2], [4, 5, 9]])
    assert difference("experts", a, b).agreement == pytest.approx(5 / 6)
    chosen_a, chosen_b = np.array([[True, True, False]]), np.array([[False, True, True]])
    assert difference("chosen", chosen_a, chosen_b).agreement == 0.5
    assert difference("chosen", np.zeros((2, 0), bool), np.zeros((2, 0), bool)).agreement == 1


def test_no_entries_are_equal() -> None:
    empty = np.zeros((0, 8), np.float32)
    assert difference("entries", empty, empty).relative_rmse == 0


def test_kl_is_that_of_the_distributions() -> None:
    a, b = values([0, np.log(3)], [1, 1]), values([np.log(3), 0], [5, 5])
    d = logits_difference(a, b)
    assert d.positions == 2
    assert d.kl_max == pytest.approx(0.25 * np.log(1 / 3) + 0.75 * np.log(3))
    assert d.kl_mean == pytest.approx(d.kl_max / 2)
    assert d.argmax_agreement == 0.5


def test_the_first_sub_block_beyond_the_tolerance_is_found() -> None:
    a = [("a", values([1, 1])), ("b", values([1, 1])), ("c", values([1, 1])), ("logits", values([1, 1]))]
    b = [(name, value + offset) for (name, value), offset in zip(a, (0, 0.01, 0.5, 0), strict=True)]
    comparison = compare(a, b)
    first = comparison.first_beyond(1e-3, by_median=False)
    assert first is not None
    assert first.name == "b"
    assert comparison.worst(by_median=False).name == "c"
    assert comparison.first_beyond(0.6, by_median=False) is None


def test_other_sub_blocks_or_shapes_are_refused_by_name() -> None:
    x, logits = ("x", values([1, 2])), ("logits", values([1, 2]))
    with pytest.raises(VerifyError, match="same sub-blocks: expected x, got logits"):
        compare([x, logits], [logits])
    with pytest.raises(VerifyError, match="same sub-blocks: expected the end of the run, got logits"):
        compare([x], [x, logits])
    with pytest.raises(VerifyError, match=r"x: the runs have different shapes: expected \[1, 2\], got \[1, 3\]"):
        compare([x, logits], [("x", values([1, 2, 3])), logits])
    with pytest.raises(VerifyError, match="the runs hold no logits"):
        compare([x], [x])


# ---- goldens ------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, Model, list[int]]:
    """Return a goldens folder with the last 3 of 140 positions, the model and the tokens."""
    source = random_source(0, 36)
    tokens = random_tokens(source.config, 140, 36).tolist()
    model = Model(source)
    write_goldens(tmp_path / "goldens", model, tokens, 137)
    return tmp_path / "goldens", model, tokens


def test_goldens_hold_every_activation_in_order(recorded: tuple[Path, Model, list[int]]) -> None:
    folder, model, tokens = recorded
    goldens = open_goldens(folder)
    assert list(goldens.tokens) == tokens
    expected = list(recorded_activations(model, tokens, 137))
    found = list(goldens.activations())
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (name, value), (_, again) in zip(found, expected, strict=True):
        assert np.array_equal(value, again), name
    assert found[-1][1].shape == (3, model.config.vocab_size)
    assert sorted(file for _, file in goldens.entries) == [file for _, file in goldens.entries]


def test_recorded_positions_are_those_of_the_whole_run(recorded: tuple[Path, Model, list[int]]) -> None:
    folder, model, tokens = recorded
    whole = dict(model.activations(tokens))
    for name, value in open_goldens(folder).activations():
        if value.dtype != np.float32 or name.endswith("score"):
            continue
        expected = whole[name] if "entries" in name else whole[name][-3:]
        np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-4, err_msg=name)


def test_goldens_replace_only_goldens_and_only_when_told(recorded: tuple[Path, Model, list[int]]) -> None:
    folder, model, tokens = recorded
    with pytest.raises(OutputExistsError, match="already exists; pass --overwrite"):
        write_goldens(folder, model, tokens)
    write_goldens(folder, model, tokens[:5], overwrite=True)
    assert len(list(folder.iterdir())) == 1 + len(open_goldens(folder).entries)
    other = folder.parent / "other"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="not replaced: contains"):
        write_goldens(other, model, tokens, overwrite=True)
    assert (other / "precious.txt").read_text() == "mine"


def test_positions_that_are_not_there_cannot_be_recorded(recorded: tuple[Path, Model, list[int]]) -> None:
    _, model, tokens = recorded
    with pytest.raises(UsageError, match="first recorded position: expected 0 to 139, got 140"):
        list(recorded_activations(model, tokens, 140))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 2}', '{"format": 1, "tokens": "no"}', "[" * 100_000],
    ids=["empty", "cut", "list", "version", "tokens", "deep"],
)
def test_a_malformed_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(FileFormatError, match=INDEX_NAME):
        open_goldens(tmp_path)


def test_an_enormous_index_is_refused_and_not_read(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).touch()
    os.truncate(tmp_path / INDEX_NAME, 2**42)
    with pytest.raises(FileFormatError, match=f"{INDEX_NAME}: too large"):
        open_goldens(tmp_path)


def test_an_index_cannot_name_files_elsewhere(recorded: tuple[Path, Model, list[int]]) -> None:
    folder, _, _ = recorded
    index = folder / INDEX_NAME
    index.write_text(index.read_text().replace('"0000.', '"../0000.'))
    with pytest.raises(FileFormatError, match="not an index of goldens"):
        open_goldens(folder)


def test_missing_and_broken_files_are_named(recorded: tuple[Path, Model, list[int]]) -> None:
    folder, _, _ = recorded
    (folder / "0000.embed.npy").write_bytes(b"\x93NUMPY broken")
    with pytest.raises(FileFormatError, match=r"0000\.embed\.npy: not a readable \.npy"):
        list(open_goldens(folder).activations())
    (folder / "0000.embed.npy").unlink()
    with pytest.raises(InputMissingError, match=r"0000\.embed\.npy: no such file"):
        list(open_goldens(folder).activations())
    with pytest.raises(InputMissingError, match=r"goldens\.json is missing"):
        open_goldens(folder / "nowhere")
