"""Passes and the pipeline that runs them over every captured graph of a model.

A pass rewrites one `torch.fx.Graph`. The pipeline checks its conditions before and after, lints the graph,
and says in an error which pass failed, after which others, and where.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import fx, nn

from qgraph.capture.serialize import dump_graph, load_graph
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
    """What a pass may know of a graph's surroundings: the module that owns it, its path, the config."""

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
            If the model is not prepared, or a pass fails; the graphs are then as they were.
        """
        if not is_prepared(prepared):
            raise PassError(f"{type(prepared).__name__} is not prepared: call qgraph.prepare on it first.")
        shared = prepared.__dict__[STATE].shared
        variants = [
            (state.owner(module), variant) for _, module, state in states(prepared) for variant in state.variants
        ]
        before = [dump_graph(variant.graph) for _, variant in variants]
        modified = False
        try:
            for owner, variant in variants:
                modified |= self.rewrite(owner, variant)
        except Exception:
            for (_, variant), records in zip(variants, before, strict=True):
                variant.graph = load_graph(records)
                variant.compile()
            raise
        new = tuple(p for p in self.passes if p not in shared.pipeline.passes)
        shared.pipeline = Pipeline(shared.pipeline.passes + new, shared.pipeline.callback)
        return modified

    def rewrite(self, owner: Owner, variant: Any) -> bool:
        """Run every pass on one captured graph, with checks in between."""
        context = PassContext(owner, variant.training)
        modified = False
        shared = owner.shared
        prefix = shared.dump.begin(owner.path, variant.training, variant.graph) if shared.dump else ""
        for index, rewriting in enumerate(self.passes):
            start = time.perf_counter()
            result = self._run_one(rewriting, index, variant.graph, context)
            modified |= result.modified
            seconds = time.perf_counter() - start
            shared.notes.extend(result.notes)
            shared.seconds[rewriting.name] = shared.seconds.get(rewriting.name, 0.0) + seconds
            if shared.dump:
                shared.dump.write(prefix, index + 1, rewriting.name, owner.path, variant.graph, seconds)
            if self.callback is not None:
                self.callback(rewriting.name, owner.path, variant.graph, seconds)
        variant.compile()
        return modified

    def _run_one(self, rewriting: Pass, index: int, graph: fx.Graph, context: PassContext) -> PassResult:
        inputs = [node.target for node in graph.nodes if node.op == "placeholder"]
        try:
            self._hold("requires", rewriting.requires(graph, context))
            result = rewriting.run(graph, context)
            graph.lint()
            if [node.target for node in graph.nodes if node.op == "placeholder"] != inputs:
                raise PassError("the pass changed the arguments of the forward")
            self._hold("ensures", rewriting.ensures(graph, context))
            return result
        except QGraphError as error:
            raise type(error)(f"{self._at(rewriting, index, context)}: {error}") from error
        except Exception as error:
            raise PassError(f"{self._at(rewriting, index, context)}: {error}") from error

    @staticmethod
    def _hold(what: str, problem: str | None) -> None:
        if problem is not None:
            raise PassError(f"{what}: {problem}.")

    def _at(self, rewriting: Pass, index: int, context: PassContext) -> str:
        before = ", ".join(p.name for p in self.passes[:index]) or "none"
        return f"pass {rewriting} on module '{context.path}' (passes before: {before})"

    @staticmethod
    def parse(text: str, known: Iterable[type[Pass]]) -> Pipeline:
        """The pipeline that prints as `text`: ``name{option=value,...},name,...``; values are text.

        Raises
        ------
        PassError
            For what is no such text, a pass that is not among `known`, or an option that it does not take.
        """
        if not re.fullmatch(rf"\s*(?:{_ITEM}\s*(?:,\s*{_ITEM}\s*)*)?", text):
            raise PassError(
                f"pipeline {text!r}: expected name{{option=value,...}},name,...; "
                f"for example quantize-weights,share-quantizers."
            )
        by_name = {kind.name: kind for kind in known}
        passes = []
        for name, options in re.findall(_ITEM, text):
            if name not in by_name:
                raise PassError(f"no pass is called {name!r}; there are {', '.join(sorted(by_name))}.")
            pairs = dict(item.split("=", 1) for item in options.split(",") if item)
            taken = [f.name for f in fields(by_name[name])]  # type: ignore[arg-type]
            unknown = [key for key in pairs if key not in taken]
            if unknown:
                raise PassError(f"pass {name} has no option {unknown[0]!r}; it takes {', '.join(taken) or 'none'}.")
            passes.append(by_name[name](**pairs))
        return Pipeline(tuple(passes))


_ITEM = r"([\w-]+)(?:\{((?:\w+=[^,{}]*(?:,\w+=[^,{}]*)*)?)\})?"
