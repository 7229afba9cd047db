"""Settings of all tests."""

from hypothesis import settings

# No deadline: the machines that run these tests are shared, and a slow example is no wrong one.
# Derandomized: every run draws the same inputs, so that a failure is one for everybody.
settings.register_profile("qgraph", deadline=None, derandomize=True)
settings.load_profile("qgraph")
