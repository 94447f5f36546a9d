"""Seeded synthetic checkpoints, from a few MB to headers of the published sizes."""

from __future__ import annotations
