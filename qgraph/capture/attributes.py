"""What a graph takes for granted of attributes: noted while the forward reads them, checked before each call.

A forward decides by ``self.scale``, ``self.child.flag`` or ``self.config.use_cache``, and its graph has the outcome for
a constant. So while a forward is recorded, each attribute that its own code reads off a module below it is noted with
its value (`patches` is how a read is seen), and the graph holds for as long as each of them is the same. What a
forward does not read costs no check.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Collection
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qgraph.capture.contents import CONSTANTS, CONTAINERS, DEEPEST, is_constant, is_object
from qgraph.capture.values import is_traced
from qgraph.graph import STATE

if TYPE_CHECKING:
    from qgraph.capture.recorder import Recorder

_TABLES = ("_parameters", "_buffers", "_modules")
_TORCH_OWN = frozenset({*nn.Module().__dict__, STATE, "_is_full_backward_hook", "_is_hf_initialized"}) - {"training"}
# torch's own access to attributes reads `__dict__`, which is no interest of the forward's in all that is there.
_ACCESS = (nn.Module.__getattr__.__code__, nn.Module.__setattr__.__code__, nn.Module.__delattr__.__code__)
_MISSING = object()
_HERE = __file__.rpartition("/")[0]


@dataclass(slots=True)
class Held:
    """What one module held when a forward read it.

    Parameters
    ----------
    path : tuple of str
        The way from the module whose graph it is to this one; () for itself.
    constants : dict
        Plain values by name, and small containers of them.
    settings : dict
        For each plain object or class (a config), by its way: its plain fields.
    lengths : dict
        Of other containers.
    present : dict
        Whether a parameter, buffer, child or tensor was there or None, by the table of the module and its name.
    absent : set
        Names of which there was no attribute.
    names : dict
        The names in `_modules`, `_parameters`, `_buffers`, `__dict__`, for a forward that goes through all of them.
    captured : dict
        Of the children that were read, whether each had a captured class: one that is put in their place has none.
    """

    path: tuple[str, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    settings: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    present: dict[tuple[str, str], bool] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    captured: dict[str, bool] = field(default_factory=dict)

    def same_in(self, module: Any) -> bool:
        """Whether `module`, from which the path starts, holds the same now."""
        for step in self.path:
            module = module.__dict__["_modules"].get(step)
            if module is None:
                return False
        own = module.__dict__
        for (table, name), given in self.present.items():
            if ((own[table] if table else own).get(name) is not None) is not given:
                return False
        modules = own["_modules"]
        for name, captured in self.captured.items():
            child = modules.get(name)
            if child is not None and (STATE in child.__dict__) is not captured:
                return False
        for name, value in self.constants.items():
            now = own[name] if name in own else getattr(type(module), name, None)
            if now is not value and (type(now) is not type(value) or not _equal(now, value)):
                return False
        return not (self.settings or self.lengths or self.names or self.absent) or self._same_contents(module, own)

    def _same_contents(self, module: Any, own: dict[str, Any]) -> bool:
        for name, length in self.lengths.items():
            if not isinstance(own.get(name), CONTAINERS) or len(own[name]) != length:
                return False
        for table, names in self.names.items():
            now = own if table == "__dict__" else own[table]
            if tuple(now) != names and _names(now) != names:  # the first is faster, and mostly so
                return False
        for way, fields in self.settings.items():
            if not _same_fields(own, way, fields):
                return False
        return not any(_has(module, name) for name in self.absent)


class AttributeReads:
    """What one recorder's forward reads off modules."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._held: dict[int, Held | None] = {}
        self._modules: list[nn.Module] = []  # kept, so that their ids stay theirs
        self._met: set[tuple[int, str]] = set()
        self._written: dict[tuple[int, str], bool] = {}  # by the forward's own code, or by another's

    @property
    def held(self) -> tuple[Held, ...]:
        for module, held in zip(self._modules, self._held.values(), strict=True):
            if held is not None:
                read = _names(module._modules) if "_modules" in held.names else ()
                read += tuple(name for table, name in held.present if table == "_modules")
                children = ((name, module._modules.get(name)) for name in read)
                held.captured = {name: STATE in child.__dict__ for name, child in children if child is not None}
        return tuple(held for held in self._held.values() if held is not None)

    def wrote(self, module: nn.Module, name: str, own: bool) -> None:
        """An attribute is set while the forward runs: by its own code, or by that of a child."""
        self._written[id(module), name] = own

    def relies_on(self, module: Any, name: str) -> bool:
        """Whether the graph takes the number that stood there before for a constant."""
        held = self._held.get(id(module))
        return held is not None and name in held.constants

    def read(self, module: nn.Module, name: str, frame: FrameType) -> None:
        """The forward's own code asks for an attribute; `frame` is where."""
        if (id(module), name) in self._met or (name in _TORCH_OWN and name not in _TABLES):
            return
        if not self._recorder.recording:
            return
        if frame.f_code.co_filename.startswith(_HERE) or (name == "__dict__" and frame.f_code in _ACCESS):
            return
        if name == "__dict__":
            own = object.__getattribute__(module, "__dict__")
            for every in tuple(own):
                self.read(module, every, frame)
            if (held := self._of(module)) is not None:
                held.names.setdefault(name, _names(own))
        if not name.startswith("__"):
            self._met.add((id(module), name))
            self._note(module, name)

    def _note(self, module: nn.Module, name: str) -> None:
        own = object.__getattribute__(module, "__dict__")
        value, table = _find(own, type(module), name)
        if is_traced(value):
            return
        if callable(value) or hasattr(value, "__get__"):
            self._recorder.globals.follow(value, type(module))
        if table == "own":
            self._recorder.globals.watch(own, name)
        if table == "class" and hasattr(value, "__get__"):  # a method, a property
            return
        held = self._of(module)
        if held is None:
            if STATE in own and isinstance(value, CONSTANTS):
                self._recorder.fail(f"reads {name} of a {type(module).__name__} that is not its child")
            return
        written = self._written.get((id(module), name))
        if written is not None:
            if not written and isinstance(value, CONSTANTS):
                self._recorder.fail(f"reads {'.'.join(('self', *held.path, name))}, which a child has set in this call")
            return
        if name in _TABLES:
            held.names[name] = _names(value)
        elif table == "":
            held.absent.add(name)
        elif table in _TABLES:
            held.present[table, name] = value is not None
        elif table == "own" or is_constant(value):
            _keep(held, name, value, self._recorder.globals.named)

    def _of(self, module: nn.Module) -> Held | None:
        """The notes on a module; None for one that the forward's module does not hold."""
        if id(module) not in self._held:
            path = self._recorder.path_to(module)
            self._modules.append(module)
            self._held[id(module)] = None if path is None else Held(tuple(path.split(".")) if path else ())
        return self._held[id(module)]


def _find(own: dict[str, Any], kind: type, name: str) -> tuple[Any, str]:
    """An attribute's value and where it stands: "own", a table of torch's, "class", or "" for nowhere."""
    if name in own:
        return own[name], "own"
    for table in _TABLES:
        if name in own.get(table, ()):
            return own[table][name], table
    for base in kind.__mro__:
        if name in base.__dict__:
            return base.__dict__[name], "class"
    return None, ""


def _keep(held: Held, name: str, value: Any, named: Collection[str]) -> None:
    if isinstance(value, (Tensor, nn.Module)):
        held.present["", name] = True
    elif is_constant(value):
        held.constants[name] = copy.deepcopy(value)
    elif isinstance(value, CONTAINERS):
        held.lengths[name] = len(value)
    elif is_object(value):
        _keep_fields(held, (name,), value, named)
    elif callable(value):
        held.constants[name] = value
        if isinstance(value, type):
            _keep_fields(held, (name,), value, named)


def _keep_fields(held: Held, way: tuple[str, ...], value: Any, named: Collection[str]) -> None:
    """The plain fields of an object, and of its class those that the forward's code names."""
    kind, own = (value, {}) if isinstance(value, type) else (type(value), vars(value))
    shared = {name: inspect.getattr_static(kind, name, value) for name in named if name not in own}
    fields = {name: item for name, item in {**own, **shared}.items() if is_constant(item)}
    if fields:
        held.settings[way] = copy.deepcopy(fields)
    for name, item in own.items():
        if len(way) < DEEPEST and is_object(item):
            _keep_fields(held, (*way, name), item, named)


def _same_fields(own: dict[str, Any], way: tuple[str, ...], fields: dict[str, Any]) -> bool:
    holder: Any = own.get(way[0])
    for step in way[1:]:
        holder = getattr(holder, "__dict__", {}).get(step)
    kind, own = (holder, {}) if isinstance(holder, type) else (type(holder), getattr(holder, "__dict__", {}))
    try:
        for name, value in fields.items():  # one by one: torch.compile compares no views of dicts that hold dicts
            now = own[name] if name in own else getattr(kind, name, _MISSING)
            if now is not value and now != value:
                return False
        return True
    except (RuntimeError, ValueError):  # what was a number is a tensor or an array now
        return False


def _equal(a: Any, b: Any) -> bool:
    """Equality of two of one type; torch.compile takes a partial function, met twice, for two of them."""
    if isinstance(a, functools.partial):
        return a.func is b.func and a.args == b.args and a.keywords == b.keywords
    return a == b


def _names(table: dict[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in table if name != "qgraph")  # our quantizers come after the first run


def _has(module: Any, name: str) -> bool:
    return hasattr(type(module), name) or _find(module.__dict__, object, name)[1] != ""
