"""What stays float: every parameter that no site covers, and why."""

from __future__ import annotations

import re

from torch import fx, nn

from qgraph.graph import STATE, is_prepared, states
from qgraph.inspection.layers import FloatTensor
from qgraph.inspection.prepared import NOT_CAPTURED

_NORMS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm,
)  # fmt: skip
_NORM_NAME = re.compile(r"(?i)norm(\dd)?$")
_BIAS_NAME = re.compile(r"(^|_)bias($|_)")


def float_parameters(model: nn.Module, covered: set[str]) -> list[FloatTensor]:
    """Every parameter of a model that is not among `covered` (names, or paths of modules), each once."""
    usage = _Usage(model) if is_prepared(model) else None
    prefix = model.__dict__[STATE].path if is_prepared(model) else ""
    result = []
    for path, module in model.named_modules():
        if path.split(".")[-1] == "qgraph" or ".qgraph." in f".{path}.":
            continue
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = ".".join(part for part in (prefix, path, name) if part)
            if usage is not None and usage.canonical(full) != full:
                continue
            if _is_covered(full, covered):
                continue
            lazy = nn.parameter.is_lazy(parameter)
            shape = () if lazy else tuple(parameter.shape)
            reason = "not initialized yet (lazy)" if lazy else _reason(full, module, parameter, usage)
            size = 0 if lazy else parameter.numel() * parameter.element_size()
            dtype = str(parameter.dtype).removeprefix("torch.")
            result.append(FloatTensor(full, shape, dtype, size, reason))
    return result


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes: one of torch's, or one that is called so."""
    return isinstance(module, _NORMS) or _NORM_NAME.search(type(module).__name__) is not None


def is_bias(name: str) -> bool:
    """Whether a parameter is called a bias, as in ``in_proj_bias`` or ``bias_hh_l0``."""
    return _BIAS_NAME.search(name) is not None


def _is_covered(name: str, covered: set[str]) -> bool:
    while name:
        if name in covered:
            return True
        name = name.rpartition(".")[0]
    return False


def _reason(name: str, module: nn.Module, parameter: nn.Parameter, usage: _Usage | None) -> str:
    if is_norm(module):
        return "norm"
    if is_bias(name.rpartition(".")[2]):
        return "bias"
    if parameter.dim() < 2:
        return "1-D" if parameter.dim() else "a scalar"
    return "not prepared" if usage is None else usage.reason(name)


class _Usage:
    """Which parameters the captured graphs of a prepared model read."""

    def __init__(self, model: nn.Module) -> None:
        self.read: set[str] = set()
        self.called: set[str] = set()
        self.python: set[str] = set()
        self.graphs = 0
        self.shared = None
        for _, _, state in states(model):
            path = state.path
            self.shared = self.shared or state.shared
            self.graphs += len(state.variants)
            if state.opaque:
                self.python.add(path)
            for variant in state.variants:
                for node in variant.graph.nodes:
                    self._note(path, node)

    def canonical(self, name: str) -> str:
        return self.shared.canonical.get(name, name) if self.shared is not None else name

    def reason(self, name: str) -> str:
        owner = name.rpartition(".")[0]
        if name in self.read:
            return "used, but no weight of a site"
        if owner in self.python:
            return "its module runs as Python, where no site uses it"
        if not self.graphs:
            return NOT_CAPTURED
        if owner in self.called:
            return "its module has no site"
        return "never used in the captured runs"

    def _note(self, path: str, node: fx.Node) -> None:
        target = f"{path}.{node.target}".lstrip(".")
        if node.op == "get_attr":
            self.read.add(self.canonical(target))
        elif node.op == "call_module":
            self.called.add(target)
