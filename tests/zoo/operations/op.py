"""One operation of a random model: a few lines of code with blanks.

Values are vectors ``v`` (batch, 4), sequences ``s`` (batch, time, 4) or images ``i`` (batch, 4, height, width). In a
template ``$x`` is the value worked on, ``$y`` an earlier one of its shape, ``$r`` the result and ``$n`` a number of its
own. ``@body A B`` and ``@other A B`` stand for the step's nested steps, from the value A to the value B; ``$Child`` is
a module class made of them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: the kinds of value it takes, the lines of its forward and of ``__init__``.

    ``inner``: the kind of value inside the nested steps, where not the same; ``resizes``: whether the result has
    another length or size; ``takes`` and ``returns``: how a child takes its argument and gives its result.
    """

    kinds: str
    forward: str
    init: str = ""
    inner: str = ""
    resizes: bool = False
    takes: str = "tensor"
    returns: str = "tensor"

    @property
    def nests(self) -> bool:
        return "@body" in self.forward or "$Child" in self.init
