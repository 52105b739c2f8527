"""Holds for every test: one thread a process, since pytest runs as many processes as there are cores."""

import os
import signal

# Read by torch when it is first imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Started in the background, as some CI systems do, the tests would hand an ignored SIGINT on to the processes they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
