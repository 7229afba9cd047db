"""Passes and the pipeline that runs them over every captured graph of a model.

A pass rewrites one `torch.fx.Graph`. The pipeline checks its conditions before and after, lints the graph, and says
in an error which pass failed, after which others, and where.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import fx, nn

from qgraph.errors import PassError, QGraphError
from qgraph.graph import STATE, is_prepared, states
from qgraph.placement import Owner


@dataclass(frozen=True, slots=True)
class Note:
    """What a pass did, or refused to do, at one site."""

    pass_name: str
    site: str
    text: str


@dataclass(frozen=True, slots=True)
class PassResult:
    """Whether a pass changed the graph, and its notes."""

    modified: bool
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True, slots=True)
class PassContext:
    """What a pass may know of the graph's surroundings: the module that owns it, its path and the model's config."""

    owner: Owner
    training: bool

    @property
    def path(self) -> str:
        return self.owner.path

    @property
    def module(self) -> nn.Module:
        return self.owner.module


class Pass(ABC):
    """One rewrite of a graph. Subclasses are frozen dataclasses whose fields are the pass's options."""

    name: ClassVar[str]

    def requires(self, graph: fx.Graph, context: PassContext) -> str | None:
        """Why the pass cannot run on this graph, or None."""
        return None

    def ensures(self, graph: fx.Graph, context: PassContext) -> str | None:
        """What the pass promised and did not keep, or None."""
        return None

    @abstractmethod
    def run(self, graph: fx.Graph, context: PassContext) -> PassResult:
        """Rewrite `graph` in place."""

    def __str__(self) -> str:
        options = [(f.name, getattr(self, f.name)) for f in fields(self)]  # type: ignore[arg-type]
        given = ",".join(f"{name}={value}" for name, value in options if value is not None)
        return f"{self.name}{{{given}}}" if given else self.name


Callback = Callable[[str, str, fx.Graph, float], None]


@dataclass(frozen=True)
class Pipeline:
    """An ordered tuple of passes.

    Parameters
    ----------
    passes : tuple of Pass
    callback : callable, optional
        Called as ``callback(pass_name, module_path, graph, seconds)`` after each pass on each graph.

    Examples
    --------
    >>> Pipeline((MyPass(),)).run(prepared)      # every graph captured so far, and those captured later
    """

    passes: tuple[Pass, ...]
    callback: Callback | None = None

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def run(self, prepared: nn.Module) -> bool:
        """Rewrite a prepared model; returns whether anything changed.

        Raises
        ------
        PassError
            If the model is not prepared, or a pass fails.
        """
        if not is_prepared(prepared):
            raise PassError(f"{type(prepared).__name__} is not prepared: call qgraph.prepare on it first.")
        shared = prepared.__dict__[STATE].shared
        modified = False
        for _, module, state in states(prepared):
            for variant in state.variants:
                modified |= self.rewrite(state.owner(module), variant)
        new = tuple(p for p in self.passes if p not in shared.pipeline.passes)
        shared.pipeline = Pipeline(shared.pipeline.passes + new, shared.pipeline.callback)
        return modified

    def rewrite(self, owner: Owner, variant: Any) -> bool:
        """Run every pass on one captured graph, with checks in between."""
        context = PassContext(owner, variant.training)
        modified = False
        for index, rewriting in enumerate(self.passes):
            start = time.perf_counter()
            result = self._run_one(rewriting, index, variant.graph, context)
            modified |= result.modified
            owner.shared.notes.extend(result.notes)
            if self.callback is not None:
                self.callback(rewriting.name, owner.path, variant.graph, time.perf_counter() - start)
        variant.compile()
        return modified

    def _run_one(self, rewriting: Pass, index: int, graph: fx.Graph, context: PassContext) -> PassResult:
        inputs = [node.target for node in graph.nodes if node.op == "placeholder"]
        try:
            self._hold(rewriting, "requires", rewriting.requires(graph, context), index, context)
            result = rewriting.run(graph, context)
            graph.lint()
            if [node.target for node in graph.nodes if node.op == "placeholder"] != inputs:
                raise PassError("the pass changed the arguments of the forward.")
            self._hold(rewriting, "ensures", rewriting.ensures(graph, context), index, context)
            return result
        except PassError:
            raise
        except QGraphError as error:
            raise type(error)(f"{error} ({self._at(rewriting, index, context)})") from error
        except Exception as error:
            raise PassError(f"{self._at(rewriting, index, context)}: {error}") from error

    def _hold(
        self, rewriting: Pass, what: str, problem: str | None, index: int, context: PassContext
    ) -> None:
        if problem is not None:
            raise PassError(f"{self._at(rewriting, index, context)}: {what}: {problem}.")

    def _at(self, rewriting: Pass, index: int, context: PassContext) -> str:
        before = ", ".join(p.name for p in self.passes[:index]) or "none"
        return f"pass {rewriting} on module '{context.path}' (passes before: {before})"

    @staticmethod
    def parse(text: str, known: Iterable[type[Pass]]) -> Pipeline:
        """The pipeline that prints as `text`: ``name{option=value,...},name,...``."""
        by_name = {kind.name: kind for kind in known}
        passes = []
        for name, options in re.findall(r"([\w-]+)(?:\{([^}]*)\})?", text):
            if name not in by_name:
                raise PassError(f"no pass is called {name!r}; there are {', '.join(sorted(by_name))}.")
            pairs = [item.split("=", 1) for item in options.split(",") if item]
            passes.append(by_name[name](**{key.strip(): value.strip() for key, value in pairs}))
        return Pipeline(tuple(passes))
