"""Capture a model: install the captured classes, run the examples, hand every new graph to the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from qgraph.capture.install import install
from qgraph.capture.session import capturing
from qgraph.capture.snapshot import Snapshot, copies
from qgraph.capture.source import raised_at
from qgraph.capture.state import ModuleState
from qgraph.errors import QGraphError
from qgraph.graph import STATE, Shared, states

# Modules of torch whose forward multiplies by no weight: nothing to rewrite, so they stay as they are.
_NO_SITES = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU, nn.LocalResponseNorm,
    nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict,
)  # fmt: skip


def install_all(model: nn.Module, shared: Shared) -> None:
    """Give every module that has a forward of its own its captured class."""
    shared.canonical.update(_tied_names(model))
    shared.install = install_made
    for path, module in model.named_modules():
        if _worth_capturing(module):
            install(module, ModuleState(shared, path, module.forward))


def install_made(module: nn.Module, path: str, shared: Shared) -> None:
    """The same for a module that a forward has made and put at `path`."""
    for below, child in module.named_modules(prefix=path):
        ours = "qgraph" in below.split(".")  # quantizers of a module that was captured before
        if STATE not in child.__dict__ and not ours and _worth_capturing(child):
            install(child, ModuleState(shared, below, child.forward))


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], progress: Callable[[str], None]) -> None:
    """Run the model once in eval and once in train mode, float, and keep the graphs; leave no trace of the runs.

    A mode in which a forward has filled a table outside of the model is run again, since the next one may find it full.
    """
    modes = [(module, module.training) for module in model.modules()]
    before = Snapshot(model)
    try:
        for training in (False, True):
            progress("train" if training else "eval")
            _set_mode(model, modes, training)
            _run_once(model, args, kwargs, before)
        for training in (False, True):
            if sum(state.try_again(training) for _, _, state in states(model)):
                _set_mode(model, modes, training)
                _run_once(model, args, kwargs, before)
    finally:
        for module, training in modes:
            module.training = training
        before.restore()
        _forget_dropped(model)


def _forget_dropped(model: nn.Module) -> None:
    """No quantizer is kept for a module that the examples' runs made and that was dropped after them."""
    shared: Shared | None = next((state.shared for _, _, state in states(model)), None)
    if shared is not None:
        held = set(model.modules())
        for site in [site for site, quantizer in shared.quantizers.items() if quantizer not in held]:
            del shared.quantizers[site]


def _run_once(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], before: Snapshot) -> None:
    """One recorded run; where recording itself is what fails, one that only notes the sites."""
    try:
        with torch.enable_grad(), capturing(quantize=False) as session:
            try:
                model(*copies(args), **copies(kwargs))
            finally:  # children that were through before an error keep their graphs, and no graph stays as recorded
                session.rewrite()
    except QGraphError:
        raise
    except Exception as error:
        before.restore()
        reason = f"recording raised {type(error).__name__}: {error}"
        where = raised_at(error)
        with torch.enable_grad(), capturing(quantize=False, reason=reason, where=where) as session:
            model(*copies(args), **copies(kwargs))
        session.rewrite()
    before.restore()


def _set_mode(model: nn.Module, modes: list[tuple[nn.Module, bool]], training: bool) -> None:
    # A module that the user keeps in eval inside a model in train mode (frozen batch norm) stays so.
    root_training = model.training if modes[0][0] is not model else modes[0][1]
    for module, own in modes:
        module.training = training and (own or not root_training)


def _worth_capturing(module: nn.Module) -> bool:
    if isinstance(module, ParametrizationList):
        return True  # its result is a weight, also where the layer that asks for it stays Python
    if isinstance(module, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        return False
    if "forward" in module.__dict__:  # set on the object itself: it may do anything
        return True
    kind = type(module)
    if kind.forward is nn.Module.forward or isinstance(module, _NO_SITES):
        return False
    if kind.__module__.startswith("torch.nn.modules"):
        return next(module.parameters(), None) is not None or isinstance(module, nn.modules.lazy.LazyModuleMixin)
    return True


def _tied_names(model: nn.Module) -> dict[str, str]:
    """For each further name of a parameter its first."""
    first: dict[int, str] = {}
    again: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        kept = first.setdefault(id(parameter), name)
        if kept != name:
            again[name] = kept
    return again
