"""All operations of random models, and the code around them: conversions, arguments and results, helpers."""

from __future__ import annotations

from tests.zoo.operations.nested import NESTED
from tests.zoo.operations.op import Op
from tests.zoo.operations.plain import PLAIN
from tests.zoo.operations.weights import WEIGHTS

OPS = {**WEIGHTS, **PLAIN, **NESTED}

# From one kind of value to another.
CONVERSIONS = {
    "vs": "$x.unsqueeze(1).repeat(1, 3, 1)",
    "vi": "$x[:, :, None, None].expand(-1, -1, 3, 3)",
    "sv": "$x.mean(1)",
    "si": "$x.transpose(1, 2).unsqueeze(-1)",
    "iv": "$x.mean((2, 3))",
    "is": "$x.flatten(2).transpose(1, 2)",
}

# How a forward finds the value in its argument `x`, and what it returns of `$x` and `$first`, the value it began with.
TAKES = {
    "tensor": "",
    "dict": 'x = x["x"]',
    "pair": "x, second = x\nx = x + second.mean()",
    "list": "x = sum(x) / len(x)",
    "dataclass": "x = x.x if x.second is None else x.x + x.second.mean()",
}
RETURNS = {
    "tensor": "$x",
    "tuple": "$x, None, $x.shape[0]",
    "dict": '{"out": $x, "first": $first, "none": None, "rows": $x.shape[0]}',
    "named_tuple": "Pair($x, $first)",
    "dataclass": "Result($x, $first)",
    "list": "[$x, $first]",
    "nested": '($x, {"inner": [$first, ($x.mean(), 2)]})',
    "by_data": "($x, $first) if $x.mean() > 0 else $x",
    "ordered": 'OrderedDict(out=$x, note="done")',
}

# What a printed model needs besides its classes; printed where its name occurs.
HELPERS = {
    "Config": "@dataclasses.dataclass\nclass Config:\n    bounded: bool = True",
    "Inputs": "@dataclasses.dataclass\nclass Inputs:\n    x: torch.Tensor\n    second: torch.Tensor | None = None",
    "Pair": "class Pair(NamedTuple):\n    out: torch.Tensor\n    first: torch.Tensor",
    "Result": "@dataclasses.dataclass\nclass Result:\n    out: torch.Tensor\n    first: torch.Tensor",
    "Rounded": (
        "class Rounded(torch.autograd.Function):\n"
        "    @staticmethod\n    def forward(ctx, x):\n        return x.round()\n\n"
        "    @staticmethod\n    def backward(ctx, grad):\n        return grad * 0.5"
    ),
    "Symmetric": "class Symmetric(nn.Module):\n    def forward(self, w):\n        return w.triu() + w.triu(1).mT",
    "doubled": "def doubled(module, args, out):\n    return out * 2 if isinstance(out, torch.Tensor) else None",
    "halved": "def halved(module, args):\n    return (args[0] * 0.5, *args[1:])",
    "scaled": "def scaled(x, by):\n    return x * by",
}

__all__ = ["CONVERSIONS", "HELPERS", "NESTED", "OPS", "PLAIN", "RETURNS", "TAKES", "WEIGHTS", "Op"]
