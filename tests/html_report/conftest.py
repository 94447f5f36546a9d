"""The browser that tests of pages share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .browser import AXE_VARIABLE, REQUIRED_VARIABLE, Browser, axe_script, chromium, started


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Return a real browser. Without one the test is skipped, and fails where ``REQUIRED_VARIABLE`` is set."""
    program = chromium()
    if program is None:
        _without("chromium is not installed (apt-get install chromium)")
    else:
        with started(program) as running:
            yield running


@pytest.fixture(scope="session")
def axe() -> str:
    """Return axe-core's script."""
    path = axe_script()
    if path is None:
        _without(f"axe-core is not installed (npm install axe-core; {AXE_VARIABLE} is its axe.min.js)")
        return ""
    return path.read_text(encoding="utf-8")


def _without(reason: str) -> None:
    if os.environ.get(REQUIRED_VARIABLE):
        pytest.fail(f"PAGES WERE NOT TESTED IN A BROWSER: {reason}")
    pytest.skip(f"pages are not tested in a browser: {reason}")
