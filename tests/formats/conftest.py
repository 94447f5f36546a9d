"""Every codec test runs with numpy and with the compiled twins."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import pytest

from dsv4convert import formats
from dsv4convert.formats.backend import Codecs, compiled_codecs, numpy_codecs
from dsv4convert.formats.base import Scratch

# numba's cache watches one file per kernel; the kernels are made of several. Kernels of other sources than
# these must not be what the tests run.
_SOURCES = sorted(Path(next(iter(formats.__path__))).glob("*.py"))
_DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:16]
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"dsv4convert-numba-{_DIGEST}"))


@pytest.fixture(scope="session", params=["numpy", "compiled"])
def codecs(request: pytest.FixtureRequest) -> Codecs:
    if request.param == "numpy":
        return numpy_codecs()
    pytest.importorskip("numba")
    return compiled_codecs()


@pytest.fixture(scope="session")
def scratch() -> Scratch:
    """One arena for all tests: what an earlier, larger tile left in it must never show."""
    return Scratch()
