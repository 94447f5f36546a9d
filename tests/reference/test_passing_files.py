"""Files of arrays that go as soon as they are closed."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dsv4convert.errors import SpaceError
from dsv4convert.reference.passing_files import ArrayFile


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Let no file grow beyond 1,000 bytes, which is less than any buffer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_records_come_back_in_their_order(tmp_path: Path) -> None:
    file = ArrayFile(tmp_path)
    records = [{"a": np.arange(5), "b": np.ones((2, 3), np.float32)}, {"c": np.zeros(0)}]
    for record in records:
        file.put(record)
    for made, record in zip(file.take(), records, strict=True):
        assert list(made) == list(record)
        assert all(np.array_equal(made[name], record[name]) for name in record)
    assert list(file.take()) == []
    file.close()


def test_a_full_disk_is_named_by_the_record_that_does_not_fit(tmp_path: Path, full_disk: None) -> None:
    file = ArrayFile(tmp_path)
    with pytest.raises(SpaceError, match=r"cannot be written to \(File too large\)"):
        file.put({"values": np.ones(500, np.float32)})
    file.close()
