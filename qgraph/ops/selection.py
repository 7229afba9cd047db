"""The largest values of a long vector, exactly and on a CPU, without moving them."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

SAMPLE = 4096
CHUNK = 1 << 19  # values a thread at a time, to stay in cache
EXACT_COUNT = 1 << 24  # so many ones are added up in float32 without rounding


def largest(magnitude: Tensor, kept: int) -> Tensor | None:
    """Mask of the `kept` largest values, 1.0 or 0.0; of equal ones those of lowest index. None if a value is infinite.

    Searches a threshold that so many values reach. Floats that are not negative are ordered as their bits are as
    integers, and the search runs over those: a sample brackets the threshold, secant steps close in, a bisection
    now and then bounds their number. A probe is two passes of vector instructions over `magnitude`, where a
    selection takes some thirty times that.

    Parameters
    ----------
    magnitude : Tensor, shape (n,), float32, not negative, no NaN
    kept : int
        From 1 to n.
    """
    size = min(CHUNK * torch.get_num_threads(), EXACT_COUNT)
    buffer = torch.empty_like(magnitude[:size])

    def reached(threshold: int) -> int:
        value = _value(threshold)
        return sum(int(torch.ge(x, value, out=buffer[: x.shape[0]]).sum()) for x in magnitude.split(size))

    top = float(magnitude.amax())
    if top == float("inf"):
        return None
    low, at_low, high, at_high = 0, magnitude.shape[0], _bits(top) + 1, 0  # at_low >= kept > at_high
    probes = _sampled_bracket(magnitude, kept)
    step = 0
    while at_low != kept and high - low > 1:
        share = 0.5 if step % 4 == 3 else (at_low - kept) / (at_low - at_high)
        probe = probes.pop() if probes else low + int((high - low) * share)
        probe = min(max(probe, low + 1), high - 1)
        count = reached(probe)
        low, at_low, high, at_high = (probe, count, high, at_high) if count >= kept else (low, at_low, probe, count)
        step += 1
    mask = torch.ge(magnitude, _value(low), out=torch.empty_like(magnitude))
    surplus = at_low - kept
    if surplus > 0:  # `low` is the value of the last one kept; it has equals, of which the last go
        level = (magnitude == _value(low)).nonzero().squeeze(1)
        mask[level[-surplus:]] = 0
    return mask


def _sampled_bracket(magnitude: Tensor, kept: int) -> list[int]:
    """Two probes that most likely lie on either side of the threshold and near it, two deviations of a rank away."""
    n = magnitude.shape[0]
    sample = magnitude[:: n // SAMPLE | 1].sort().values  # an odd stride: most rows are of even length
    size, below = sample.shape[0], 1 - kept / n
    margin = 2 * (size * below * (1 - below)) ** 0.5 + 1
    ends = (below * size - margin, below * size + margin)
    return [_bits(float(sample[min(max(int(end), 0), size - 1)])) for end in ends]


def _bits(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]


def _value(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<i", bits))[0]
