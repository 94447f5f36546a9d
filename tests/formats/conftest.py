"""Every codec test runs with numpy and with the compiled twins."""

from __future__ import annotations

import pytest

from dsv4convert.formats.backend import Codecs, compiled_codecs, numpy_codecs
from dsv4convert.formats.base import Scratch
from dsv4convert.formats.compiled.library import library_path


@pytest.fixture(scope="session", params=["numpy", "compiled"])
def codecs(request: pytest.FixtureRequest) -> Codecs:
    if request.param == "numpy":
        return numpy_codecs()
    if library_path() is None:
        pytest.skip("the compiled codecs are not built for this machine (python hatch_build.py)")
    return compiled_codecs()


@pytest.fixture(scope="session")
def scratch() -> Scratch:
    """One arena for all tests: what an earlier, larger tile left in it must never show."""
    return Scratch()
