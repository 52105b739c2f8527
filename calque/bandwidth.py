"""How fast this machine reads memory: no runtime decodes faster than it can read every weight once a token."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from calque.doctor import cores

# Larger than the caches of a core's neighbours; it is read in as many parts as there are threads.
BLOCK_BYTES = 256 << 20
TIMES = 4


def bandwidth(threads: int = 0) -> float:
    """Return the bytes per second at which ``threads`` threads read memory now; 0 takes one for each core of this process."""
    threads = threads or cores()
    block = np.ones(BLOCK_BYTES // 8, np.int64)
    parts = np.array_split(block, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(TIMES):
            start = time.perf_counter()
            list(pool.map(np.max, parts))  # numpy holds no lock meanwhile, and a maximum keeps up with memory where a sum does not
            best = min(best, time.perf_counter() - start)
    return BLOCK_BYTES / best
