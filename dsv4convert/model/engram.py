"""The constants of V4.1's n-gram tables, and the rows that a sequence of tokens looks up.

Token ids are first mapped to fewer ids, those of spellings that differ in case, accents or spaces being
one (``checkpoint.engram`` computes the map). The hash of the n tokens up to a position, one for each n,
is taken modulo a prime of each head's own; each head of each n has its run of rows in the layer's table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from math import isqrt

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from .config_v41 import EngramConfig

# The seed of layer L's multipliers is this prime times L.
SEED_FACTOR = 10007
INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class EngramConstants:
    """What a runtime needs to find the rows of a token, besides the tables.

    Everything goes by engram layer, in ascending order. ``multipliers`` has one entry per place back from
    the token; ``primes`` and ``offsets`` one per column: all heads of the 2-grams, then of the 3-grams, and
    so on. ``token_map`` is int32 [vocabulary]; ``pad_id`` is the padding token mapped by it.
    """

    layer_ids: tuple[int, ...]
    multipliers: tuple[tuple[int, ...], ...]
    primes: tuple[tuple[int, ...], ...]
    offsets: tuple[tuple[int, ...], ...]
    token_map: npt.NDArray[np.int32] = field(repr=False)
    pad_id: int

    @property
    def rows(self) -> tuple[int, ...]:
        """Return the rows of each table."""
        return tuple(map(sum, self.primes))

    def sliced(self, first: int, last: int) -> EngramConstants | None:
        """Return the constants of the tables in layers ``first``..``last``, renumbered from 0; None without any.

        A table's constants depend on the layer that it had in the whole model, so they are made before the cut.
        """
        kept = [at for at, layer in enumerate(self.layer_ids) if first <= layer <= last]
        if not kept:
            return None
        return replace(
            self,
            layer_ids=tuple(self.layer_ids[at] - first for at in kept),
            multipliers=tuple(self.multipliers[at] for at in kept),
            primes=tuple(self.primes[at] for at in kept),
            offsets=tuple(self.offsets[at] for at in kept),
        )


def engram_constants(engram: EngramConfig, token_map: npt.NDArray[np.int32], where: object = None) -> EngramConstants:
    """Return the constants of ``engram``'s tables for a tokenizer's ``token_map``; ``where`` is the config's file.

    Raises:
        ConfigError: the map or the tables have another size than the config says.
    """
    check_rows(engram, where)
    size = int(token_map.max(initial=-1)) + 1
    if size != engram.compressed_vocab_size:
        raise ConfigError(
            "key engram_compressed_vocab_size: the tokenizer's token map has another size",
            where=where,
            expected=size,
            got=engram.compressed_vocab_size,
            hint="does tokenizer.json belong to this model?",
        )
    primes = row_primes(engram)
    return EngramConstants(
        engram.layer_ids,
        tuple(multipliers(layer, engram) for layer in engram.layer_ids),
        primes,
        tuple(tuple(accumulate(runs[:-1], initial=0)) for runs in primes),
        token_map,
        int(token_map[engram.pad_token_id]),
    )


def check_rows(engram: EngramConfig, where: object = None) -> None:
    """Check that every table has as many rows as the primes of its heads add up to.

    Raises:
        ConfigError: it does not.
    """
    for layer, rows, primes in zip(engram.layer_ids, engram.num_embeddings, row_primes(engram), strict=True):
        if rows != sum(primes):
            raise ConfigError(
                f"key engram_num_embeddings: the table of layer {layer} does not fit its hash functions",
                where=where,
                expected=f"{sum(primes)} rows from engram_vocab_size {engram.vocab_size} on",
                got=rows,
            )


def multipliers(layer: int, engram: EngramConfig) -> tuple[int, ...]:
    """Return layer ``layer``'s odd factors of the ids 0, 1, ... places back, whose products fit an int64."""
    bound = max(1, INT64_MAX // engram.compressed_vocab_size // 2)
    draws = np.random.default_rng(SEED_FACTOR * layer).integers(0, bound, engram.max_ngram_size, np.int64)
    return tuple(int(draw) * 2 + 1 for draw in draws)


def row_primes(engram: EngramConfig) -> tuple[tuple[int, ...], ...]:
    """Return the rows of every head, layer by layer: primes from ``vocab_size`` on, no two of them alike.

    The published code starts anew for every layer and every n and skips what is taken, which comes to
    taking one after the other.
    """
    found = primes_from(engram.vocab_size)
    return tuple(tuple(islice(found, engram.rows_per_token)) for _ in engram.layer_ids)


def primes_from(start: int) -> Iterator[int]:
    """Yield the primes that are at least ``start``, ascending.

    >>> list(islice(primes_from(16_000_000), 3))
    [16000057, 16000079, 16000081]
    """
    number = max(start, 2)
    while True:
        if number == 2 or (number % 2 and all(number % factor for factor in range(3, isqrt(number) + 1, 2))):
            yield number
        number += 1


def engram_rows(
    constants: EngramConstants, ids: Sequence[int], image: Sequence[bool] | None = None
) -> npt.NDArray[np.int64]:
    """Return the rows [tokens, layers, columns] that each token of the sequence ``ids`` looks up.

    A place before the sequence's start, or one where ``image`` is set, counts as padding, and so does
    everything further back from there.
    """
    mapped = constants.token_map[np.asarray(ids, np.int64)].astype(np.int64)
    outside = np.zeros(len(mapped), np.bool_) if image is None else np.asarray(image, np.bool_)
    rows = np.empty((len(mapped), len(constants.layer_ids), len(constants.primes[0])), np.int64)
    heads = len(constants.primes[0]) // (len(constants.multipliers[0]) - 1)
    places = len(constants.multipliers[0])
    # context[s]: the mapped ids s places back.
    context = np.full((places, len(mapped)), constants.pad_id, np.int64)
    is_pad = outside
    for back in range(min(places, len(mapped))):
        if back:
            is_pad = np.concatenate([[True], is_pad[:-1]]) | outside
        context[back, back:] = np.where(is_pad[back:], constants.pad_id, mapped[: len(mapped) - back])
    for layer, factors in enumerate(constants.multipliers):
        primes, offsets = np.array(constants.primes[layer]), np.array(constants.offsets[layer])
        mixed = context[0] * factors[0]
        for back in range(1, places):
            mixed = mixed ^ (context[back] * factors[back])
            columns = slice((back - 1) * heads, back * heads)
            rows[:, layer, columns] = mixed[:, None] % primes[columns] + offsets[columns]
    return rows
