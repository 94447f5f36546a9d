"""Tests of dsv4convert; the folders mirror the package."""

import os

# One of several test processes computes with one thread: more wait for each other, spinning, as long as others have the
# processors, three quarters of the time of forward passes. Libraries read this when they are loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
