"""Each trap by the name of its class: a factory, example inputs and a second shape."""

from __future__ import annotations

import torch

from tests.models import Case

TRAPS: dict[str, Case] = {}


def trap(inputs, opaque=False):
    def add(cls):
        TRAPS[cls.__name__] = Case(cls, inputs, opaque)
        return cls

    return add


def rows(width, a=3, b=5):
    return lambda i: (torch.randn((a, b)[i], width),)
