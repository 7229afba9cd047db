"""Run an exported file, and tell how far it is from the model."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import torch

TOLERANCE = 1e-5  # of the largest output


def run(path, **feeds):
    """The outputs of a file in onnxruntime."""
    return ort.InferenceSession(str(path)).run(None, {name: np.asarray(value) for name, value in feeds.items()})


def differ(want, got):
    """How far an output is from torch's, of the largest one."""
    return float((want.detach() - torch.from_numpy(got)).abs().max() / want.detach().abs().max())
