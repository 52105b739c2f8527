"""A file for what is costly to make and read several times: the integers of a conversion, which memory has no room for."""

from __future__ import annotations

import os
import tempfile
import weakref
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class IntegersFile:
    """Bytes of tensors at places of their own. The file has no name, so it is gone once nothing refers to it, however that ends.

    ``folder``: where the disk has room; None: wherever the system keeps such files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.end = 0

    def reserve(self, nbytes: int) -> int:
        """Return where so many bytes may be written; nothing else is."""
        place, self.end = self.end, self.end + nbytes
        return place

    def write(self, place: int, tensor: Tensor) -> None:
        """The tensor's bytes are in the file from ``place``.

        Raises:
            OSError: the disk is full.
        """
        left = memoryview(tensor.contiguous().view(torch.uint8).flatten().numpy().data)
        while left:  # the system writes no more than 2 GiB at a time
            done = os.pwrite(self._file.fileno(), left, place)
            left, place = left[done:], place + done

    def read(self, place: int, nbytes: int) -> Tensor:
        """Return bytes that were written, uint8 [nbytes]."""
        data = bytearray(nbytes)
        left = memoryview(data)
        while left:
            done = os.preadv(self._file.fileno(), [left], place)
            assert done, f"nothing was written at {place}"
            left, place = left[done:], place + done
        return torch.frombuffer(data, dtype=torch.uint8)

    @cached_property
    def _file(self) -> IO[bytes]:
        # It is open for as long as something refers to it, not for a block.
        file = tempfile.TemporaryFile(dir=self.folder, prefix="calque-integers-", buffering=0)  # noqa: SIM115
        weakref.finalize(self, file.close)
        return file
