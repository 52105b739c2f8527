"""Holds for every test: one thread a process, since pytest runs as many processes as there are cores."""

import os

# Read by torch when it is first imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
