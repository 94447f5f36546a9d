"""Compiled twins of the numpy codecs, in numba: same arguments, same bits, same counts."""

from __future__ import annotations

from dsv4convert.formats.base import TileFunction

TWINS: dict[str, TileFunction] = {}
