"""What is written to the file is read from it, and nothing of it is left behind."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import pytest
import torch

from calque.integers_file import IntegersFile


def test_bytes_come_back_from_their_places(tmp_path: Path) -> None:
    file = IntegersFile(tmp_path)
    one, other = torch.arange(6, dtype=torch.float32).reshape(2, 3), torch.arange(5, dtype=torch.int8)
    places = [file.reserve(24), file.reserve(5)]
    file.write(places[1], other)
    file.write(places[0], one)
    assert torch.equal(file.read(places[0], 24).view(torch.float32), one.flatten())
    assert torch.equal(file.read(places[1] + 2, 3).view(torch.int8), other[2:])


def test_system_that_writes_and_reads_a_little_at_a_time_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, place: write(descriptor, data[:7], place))
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, place: read(descriptor, [views[0][:5]], place))
    file, tensor = IntegersFile(tmp_path), torch.arange(40, dtype=torch.int16)
    file.write(file.reserve(80), tensor)
    assert torch.equal(file.read(0, 80).view(torch.int16), tensor)


def test_nothing_is_left_of_it(tmp_path: Path) -> None:
    file = IntegersFile(tmp_path)
    file.write(file.reserve(1 << 20), torch.zeros(1 << 20, dtype=torch.uint8))
    assert list(tmp_path.iterdir()) == []  # it never has a name, so that a killed conversion leaves none either
    descriptor = file._file.fileno()
    del file
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor") as raised:
        os.fstat(descriptor)
    assert raised.value.errno == errno.EBADF
