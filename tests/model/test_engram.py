"""Constants of the n-gram tables and the rows that tokens look up, equal to the recorded ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dsv4convert.errors import ConfigError
from dsv4convert.model.config import parse_config
from dsv4convert.model.config_v41 import EngramConfig
from dsv4convert.model.engram import EngramConstants, engram_constants, engram_rows, multipliers, primes_from

from ..v41 import published_config, recorded


@pytest.fixture
def engram() -> EngramConfig:
    found = parse_config(published_config(), "here").engram
    assert found is not None
    return found


@pytest.fixture
def constants(engram: EngramConfig) -> EngramConstants:
    """Return the published constants with a token map that has only what the recorded example needs."""
    vector = recorded("engram_hash_vector.json")
    token_map = np.zeros(129280, np.int32)
    token_map[2] = 2
    token_map[-1] = engram.compressed_vocab_size - 1
    token_map[vector["token_ids"]] = vector["compressed_ids"]
    return engram_constants(engram, token_map)


def test_constants_are_the_recorded_ones(constants: EngramConstants) -> None:
    published = recorded("engram_constants.json")
    assert [list(row) for row in constants.multipliers] == published["multipliers"]
    flat = [[prime for run in layer for prime in run] for layer in published["primes_[layer][ngram 2..4][head]"]]
    assert [list(row) for row in constants.primes] == flat
    assert [list(row) for row in constants.offsets] == published["offsets_[layer][24]"]
    assert list(constants.rows) == published["rows"]
    assert constants.pad_id == published["pad_id_mapped"]


def test_rows_are_those_of_the_recorded_example(constants: EngramConstants) -> None:
    vector = recorded("engram_hash_vector.json")
    assert engram_rows(constants, vector["token_ids"]).tolist() == vector["rows"]


def test_rows_of_a_token_depend_on_the_places_before_it(constants: EngramConstants) -> None:
    ids = recorded("engram_hash_vector.json")["token_ids"]
    whole = engram_rows(constants, ids)
    # A sequence that begins later pads what it does not see; four places back is beyond every 4-gram.
    assert not np.array_equal(engram_rows(constants, ids[1:])[0], whole[1])
    assert np.array_equal(engram_rows(constants, [7, *ids])[5], whole[4])


def test_an_image_and_what_lies_behind_it_count_as_padding(constants: EngramConstants) -> None:
    ids = recorded("engram_hash_vector.json")["token_ids"]
    pad = int(np.flatnonzero(constants.token_map == constants.pad_id)[0])
    seen = engram_rows(constants, ids, [False, False, True, False, False])
    assert np.array_equal(seen[3:], engram_rows(constants, [pad, pad, pad, *ids[3:]])[3:])
    assert np.array_equal(seen[2], engram_rows(constants, [pad] * 3)[2])
    assert np.array_equal(seen[:2], engram_rows(constants, ids)[:2])


def test_no_token_has_no_rows(constants: EngramConstants) -> None:
    assert engram_rows(constants, []).shape == (0, 2, 24)


def test_a_table_of_another_size_is_an_error(engram: EngramConfig) -> None:
    wrong = replace(engram, num_embeddings=(384006168, 384016681))
    with pytest.raises(ConfigError, match="the table of layer 14 does not fit its hash functions: expected 384016682"):
        engram_constants(wrong, np.arange(99092, dtype=np.int32))


def test_a_token_map_of_another_size_is_an_error(engram: EngramConfig) -> None:
    with pytest.raises(ConfigError, match=r"engram_compressed_vocab_size: .* expected 99091, got 99092"):
        engram_constants(engram, np.arange(99091, dtype=np.int32))


def test_primes_and_multipliers_of_small_tables(engram: EngramConfig) -> None:
    found = primes_from(0)
    assert [next(found) for _ in range(8)] == [2, 3, 5, 7, 11, 13, 17, 19]
    # Products of multipliers with the largest id fit an int64.
    small = replace(engram, compressed_vocab_size=3)
    assert all(factor % 2 and factor * 2 < 2**63 for factor in multipliers(1, small))
