"""How many threads torch computes with, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread() -> Iterator[None]:
    """Make torch compute on one thread inside the block.

    How work is cut over threads changes the last bits of sums, so the reference would differ between machines; and once
    in a few dozen runs one of two threads was seen to compute its half of a row 1e-4 σ away from all other runs. On small
    pieces of weights threads are no faster either: they wait for each other, and waiting costs a processor's time.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
