"""Tests run file by file in several processes (pytest-xdist), each with one thread for its arithmetic."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
