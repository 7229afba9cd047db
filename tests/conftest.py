"""Settings of all tests."""

import os

from hypothesis import settings

# Before torch is imported: one thread a worker, so that sums are those of the processes that tests start, and that a
# worker can be forked.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadline: the machines that run these tests are shared, and a slow example is no wrong one.
# Derandomized: every run draws the same inputs, so that a failure is one for everybody.
settings.register_profile("qgraph", deadline=None, derandomize=True)
settings.load_profile("qgraph")
