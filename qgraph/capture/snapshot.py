"""What a run may change, kept before it: so that a run whose graph turns out not to hold can be taken back."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qgraph.capture.structure import parts, walk
from qgraph.modules import Quantizers

_KEPT = (bool, int, float, str, type(None), Tensor)
_TORCHS = frozenset(vars(nn.Module()))  # every module has them; what else begins with "_" is the user's


class Snapshot:
    """Random states, a module's buffers, attributes and hooks, which parameters it has, and a call's arguments,
    before a run that may be taken back.

    Parameters
    ----------
    module : nn.Module
        Its buffers and attributes are kept, and those of the modules in it.
    values : tuple
        The arguments: what their objects and containers hold is kept.
    contents : bool
        Keep also what the tensors among them hold.
    """

    def __init__(self, module: nn.Module, values: tuple[Any, ...] = (), contents: bool = False) -> None:
        self.python, self.numpy = random.getstate(), np.random.get_state()
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
        self.attributes = [(m, dict(m._buffers), _own_attributes(m)) for m in module.modules()]
        self.parameters = [(m, n, p) for m in module.modules() for n, p in m._parameters.items() if p is not None]
        self.children = [(m, dict(m._modules)) for m in module.modules() if not _is_ours_or_scripted(m)]
        self.hooks = [(hooks, tuple(hooks)) for m in module.modules() for hooks in _hooks(m)]
        self.objects: list[tuple[Any, Any]] = []
        self.tensors: list[tuple[Tensor, int, bool, Tensor]] = []
        for item in (item for value in values for _, item in walk(value)):
            if isinstance(item, Tensor) and contents and not isinstance(item, nn.Parameter) and not item.is_inference():
                self.tensors.append((item, item._version, item.requires_grad, item.detach().clone()))
            elif isinstance(item, (list, dict)) and not dataclasses.is_dataclass(item):
                self.objects.append((item, _content(item)))
            elif not isinstance(item, tuple) and parts(item) is not None and hasattr(item, "__dict__"):
                self.objects.append((item, dict(vars(item))))

    def restore(self) -> None:
        """Put everything back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
            for tensor, version, required, content in self.tensors:
                if tensor._version != version:
                    if tensor.requires_grad and not required:
                        tensor.detach_()
                    tensor.copy_(content)
        for item, content in self.objects:
            _put_back(item, content)
        for hooks, before in self.hooks:
            for key in [key for key in hooks if key not in before]:
                del hooks[key]  # one that has gone is done with, as a lazy layer's
        for module, children in self.children:
            for name in [n for n in module._modules if n not in children and n != "qgraph"]:
                del module._modules[name]  # made by the run
            module._modules.update(children)
        for module, name, parameter in self.parameters:
            if module._parameters.get(name) is not parameter:
                module._parameters[name] = parameter
        for module, buffers, attributes in self.attributes:
            for name, kept in buffers.items():  # a scripted module has no more of a dict than this
                module._buffers[name] = kept
            for name in set(_own_attributes(module)) - set(attributes):
                del module.__dict__[name]
            for name, (value, content) in attributes.items():
                module.__dict__[name] = value
                if isinstance(value, (list, dict)):
                    _put_back(value, content)


def copies(values: Any) -> Any:
    """Copies of a call's arguments, since a forward may change them; what cannot be copied is used as it is."""
    try:
        return copy.deepcopy(values)
    except Exception:
        return values


def _is_ours_or_scripted(module: nn.Module) -> bool:
    """Whether a module holds quantizers, which a run may make for good, or has no more of a dict than its names."""
    return isinstance(module, (Quantizers, torch.jit.ScriptModule))


def _content(item: Any) -> Any:
    return list(item) if isinstance(item, list) else dict(item)


def _put_back(item: Any, content: Any) -> None:
    if isinstance(item, (list, dict)) and _holds_the_same(item, content):  # a frozen one takes no change
        return
    if isinstance(item, list):
        item[:] = content
    elif isinstance(item, dict) and not dataclasses.is_dataclass(item):
        item.clear()
        item.update(content)
    else:
        vars(item).clear()
        vars(item).update(content)


def _holds_the_same(item: Any, content: Any) -> bool:
    if len(item) != len(content) or (isinstance(item, dict) and list(item) != list(content)):
        return False
    values = (item.values(), content.values()) if isinstance(item, dict) else (item, content)
    return all(a is b for a, b in zip(*values, strict=True))


def _hooks(module: nn.Module) -> list[dict[int, Any]]:
    return [value for name, value in module.__dict__.items() if "_hooks" in name and isinstance(value, dict)]


def _own_attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """A module's scalars, lists and dicts, the latter with a copy of what they hold; not torch's own."""
    return {
        name: (value, _content(value) if isinstance(value, (list, dict)) else None)
        for name, value in module.__dict__.items()
        if isinstance(value, (*_KEPT, list, dict)) and name not in _TORCHS
    }
