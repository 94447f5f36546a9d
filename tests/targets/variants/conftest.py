"""Every variant as a small checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from ...checkpoints import MakeCheckpoint
from .conversions import VARIANTS


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> Path:
    """Return the tiny checkpoint of each variant. Treat it as read-only."""
    return make_checkpoint("tiny", **VARIANTS[request.param])
