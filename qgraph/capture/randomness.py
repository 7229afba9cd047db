"""Python's and numpy's random numbers: a forward that draws from them decides anew each time, so no graph holds it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np


def random_states() -> tuple[Any, Any]:
    """Both generators' states now."""
    return random.getstate(), np.random.get_state(legacy=False)


def same_random(before: tuple[Any, Any], after: tuple[Any, Any]) -> bool:
    """Whether no number was drawn between two states."""
    a, b = before[1]["state"], after[1]["state"]
    return before[0] == after[0] and a["pos"] == b["pos"] and bool((a["key"] == b["key"]).all())
