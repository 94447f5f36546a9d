"""Opening untrusted files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from dsv4convert.containers.untrusted import BUFFER_BYTES, open_regular


def test_a_read_of_a_few_bytes_reads_little_ahead(tmp_path: Path) -> None:
    """Python's own buffer is sixteen times as large since 3.14, and tensors are probed at half a million places."""
    path = tmp_path / "file"
    path.write_bytes(bytes(2**20))
    with open_regular(path) as file:
        file.seek(2**19)
        assert file.read(1) == b"\0"
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) <= 2**19 + BUFFER_BYTES


def test_ctrl_c_once_a_file_has_its_descriptor_is_no_error_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> BinaryIO:
        fdopen(*arguments).close()
        raise KeyboardInterrupt

    path = tmp_path / "file"
    path.touch()
    fdopen = os.fdopen
    monkeypatch.setattr(os, "fdopen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_regular(path)
