"""What holds other steps: children and how they are called, branches, loops, modes of torch."""

from __future__ import annotations

from tests.zoo.operations.op import Op

_CHILD = "self.child$n = $Child()"

NESTED = {
    "child": Op("vsi", "$r = self.child$n($x)", _CHILD),
    "child_twice": Op("vsi", "$r = self.child$n(self.child$n($x))", _CHILD),
    "child_two_names": Op("vsi", "$r = self.child$n($x) + self.same$n($x)", f"{_CHILD}\nself.same$n = self.child$n"),
    "children": Op(
        "vsi",
        "$r = $x\nfor block in self.blocks$n:\n    $r = block($r)",
        "self.blocks$n = nn.ModuleList($Child() for _ in range(2))",
    ),
    "children_sequential": Op(
        "vsi", "$r = self.blocks$n($x)", "self.blocks$n = nn.Sequential($Child(), nn.Tanh(), $Child())"
    ),
    "children_dict": Op(
        "vsi",
        "$r = $x\nfor name in self.blocks$n:\n    $r = self.blocks$n[name]($r)",
        'self.blocks$n = nn.ModuleDict({"a": $Child(), "b": $Child()})',
    ),
    "child_of_children": Op(
        "vsi", "for block in self.holder$n.children():\n    $r = block($x)", "self.holder$n = nn.ModuleList([$Child()])"
    ),
    "child_tied": Op(
        "vsi",
        "$r = self.b$n(self.a$n($x))",
        "self.a$n, self.b$n = $Child(), $Child()\nfor name, p in list(self.a$n.named_parameters(recurse=False)):\n"
        "    setattr(self.b$n, name, p)",
    ),
    "child_keywords": Op("vsi", "$r = self.child$n(x=$x, flag=True, gain=0.5)", _CHILD),
    "child_options": Op("vsi", "$r = self.child$n($x, extra, flag=flag, gain=gain)", _CHILD),
    "child_optional": Op("vsi", "$r = self.child$n($x) + self.child$n($x, extra=$x.mean())", _CHILD),
    "child_dict": Op("vsi", '$r = self.child$n($x)["out"]', _CHILD, returns="dict"),
    "child_tuple": Op("vsi", "$r, _, size$n = self.child$n($x)\n$r = $r / size$n", _CHILD, returns="tuple"),
    "child_named_tuple": Op("vsi", "$r = self.child$n($x).out", _CHILD, returns="named_tuple"),
    "child_dataclass": Op(
        "vsi", "out$n = self.child$n($x)\n$r = out$n.out + out$n.first.mean()", _CHILD, returns="dataclass"
    ),
    "child_list": Op(
        "vsi",
        "outs$n = self.child$n($x)\nouts$n.append($x)\n$r = outs$n[0] + outs$n[-1].mean()",
        _CHILD,
        returns="list",
    ),
    "child_takes_dict": Op("vsi", '$r = self.child$n({"x": $x, "unused": None})', _CHILD, takes="dict"),
    "child_takes_pair": Op("vsi", "$r = self.child$n(($x, $y))", _CHILD, takes="pair"),
    "child_takes_list": Op("vsi", "$r = self.child$n([$x, $y])", _CHILD, takes="list"),
    "child_takes_dataclass": Op("vsi", "$r = self.child$n(Inputs($x, $y))", _CHILD, takes="dataclass"),
    "child_hooked": Op("vsi", "$r = self.child$n($x)", f"{_CHILD}\nself.child$n.register_forward_hook(doubled)"),
    "child_observed": Op(
        "vsi",
        "seen$n = []\nhandle = self.child$n.register_forward_hook(lambda module, args, out: seen$n.append(out))\n"
        "$r = self.child$n($x)\nhandle.remove()\n$r = $r + seen$n[0].mean()",
        _CHILD,
    ),
    "child_as_method": Op("vsi", "$r = self.child$n.forward($x)", _CHILD),
    "child_checkpointed": Op("vsi", "$r = checkpoint(self.child$n, $x, use_reentrant=False)", _CHILD),
    "child_functional": Op(
        "vsi",
        "w$n = {name: p * 0.9 for name, p in self.child$n.named_parameters()}\n"
        "$r = torch.func.functional_call(self.child$n, w$n, ($x,))",
        _CHILD,
    ),
    "child_frozen": Op("vsi", "$r = self.child$n($x)", f"{_CHILD}\nself.child$n.requires_grad_(False)"),
    "child_no_grad": Op("vsi", "with torch.no_grad():\n    t$n = self.child$n($x)\n$r = $x + t$n.mean()", _CHILD),
    "child_maybe": Op("vsi", "$r = $x if self.child$n is None or not self.training else self.child$n($x)", _CHILD),
    "child_per_step": Op(
        "s", "$r = torch.stack([self.child$n($x[:, t]) for t in range($x.shape[1])], 1)", _CHILD, inner="v"
    ),
    "child_dropped": Op(
        "vsi", "$r = $x\nif not self.training or torch.rand(1).item() > 0.5:\n    $r = self.child$n($x)", _CHILD
    ),
    "child_sometimes_pair": Op(
        "vsi",
        "out$n = self.child$n($x)\n$r = out$n if isinstance(out$n, torch.Tensor) else out$n[0]",
        _CHILD,
        returns="by_data",
    ),
    "child_by_rows": Op(
        "vsi",
        "$r = torch.cat([self.child$n(row.unsqueeze(0)) for row in $x])",
        _CHILD,
    ),
    "child_unpacked": Op("vsi", '$r = self.child$n(*[$x], **{"flag": flag})', _CHILD),
    "child_inherited": Op("vsi", "$r = $Child.forward(self.child$n, $x)", _CHILD),
    "child_replaced": Op("vsi", "self.child$n = self.child$n\n$r = self.child$n($x)", _CHILD),
    "child_state": Op(
        "vsi", "$r = self.child$n($x)\nself.child$n.seen = $x.detach()\n$r = $r + self.child$n.seen.mean()", _CHILD
    ),
    "child_map": Op("vsi", "$r = sum(map(self.child$n, ($x, $y)))", _CHILD),
    "child_hidden": Op("vsi", "$r = self.hidden$n[0]($x) + $x.mean()", f"{_CHILD}\nself.hidden$n = [self.child$n]"),
    "while_small": Op("vsi", "$r, i$n = $x, 0\nwhile i$n < $x.shape[0]:\n    @body $r $r\n    i$n += 2"),
    "match_kind": Op("vsi", "match $x.dim():\n    case 3:\n        @body $x $r\n    case _:\n        @other $x $r"),
    "comprehension": Op(
        "vsi", "def part$n(v$n):\n    @body v$n z$n\n    return z$n\n\n$r = sum([part$n(t) for t in ($x, $y)])"
    ),
    "if_training": Op("vsi", "if self.training:\n    @body $x $r\nelse:\n    @other $x $r"),
    "if_flag": Op("vsi", "if flag:\n    @body $x $r\nelse:\n    @other $x $r"),
    "if_extra": Op("vsi", "if extra is None:\n    @body $x $r\nelse:\n    @other $x $r"),
    "if_batch": Op("vsi", "if $x.shape[0] > 2:\n    @body $x $r\nelse:\n    @other $x $r"),
    "if_even": Op("vsi", "if $x.size(-1) % 2 == 0 and $x.dim() > 1:\n    @body $x $r\nelse:\n    @other $x $r"),
    "if_data": Op("vsi", "if $x.sum() > 0:\n    @body $x $r\nelse:\n    @other $x $r"),
    "if_setting": Op("vsi", "if self.deep$n:\n    @body $x $r\nelse:\n    @other $x $r", "self.deep$n = True"),
    "if_gain": Op("vsi", "if gain > 0.75:\n    @body $x $r\nelse:\n    @other $x $r"),
    "repeat": Op("vsi", "$r = $x\nfor _ in range(2):\n    @body $r $r"),
    "repeat_by_size": Op("vsi", "$r = $x\nfor _ in range($x.shape[0] - 1):\n    @body $r $r"),
    "each_step": Op(
        "s",
        "outs$n = []\nfor t in range($x.shape[1]):\n    v$n = $x[:, t]\n    @body v$n z$n\n    outs$n.append(z$n)\n"
        "$r = torch.stack(outs$n, 1)",
        inner="v",
    ),
    "each_unbound": Op(
        "s",
        "outs$n = []\nfor t, v$n in enumerate($x.unbind(1)):\n    @body v$n z$n\n    outs$n.append(z$n / (t + 1))\n"
        "$r = torch.stack(outs$n, dim=1)",
        inner="v",
    ),
    "without_grad": Op("vsi", "with torch.no_grad():\n    @body $x z$n\n$r = $x + z$n.mean()"),
    "grad_switched": Op("vsi", "with torch.set_grad_enabled(self.training):\n    @body $x $r"),
    "autocast": Op("vsi", 'with torch.autocast("cpu", dtype=torch.bfloat16):\n    @body $x z$n\n$r = z$n.to($x.dtype)'),
    "inner_function": Op("vsi", "def inner$n(v$n):\n    @body v$n z$n\n    return z$n\n\n$r = inner$n($x) + $x.mean()"),
    "checkpointed_function": Op(
        "vsi",
        "def inner$n(v$n):\n    @body v$n z$n\n    return z$n\n\n$r = checkpoint(inner$n, $x, use_reentrant=False)",
    ),
    "attempt": Op("vsi", "try:\n    @body $x $r\nfinally:\n    self.tried$n = True"),
}
