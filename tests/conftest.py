"""Holds for every test: one thread a process, since pytest runs as many processes as there are cores."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

# Read by torch when it is first imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Started in the background, as some CI systems do, the tests would hand an ignored SIGINT on to the processes they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def shared_traces() -> Iterator[None]:
    """Conversions of the module trace a checkpoint once; for tests that look at what comes after."""
    from tests.shared_traces import shared

    with shared():
        yield
