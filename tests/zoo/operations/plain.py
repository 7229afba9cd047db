"""Operations without a weight: arithmetic, changes in place, sizes, random numbers, state, Python around tensors."""

from __future__ import annotations

from tests.zoo.operations.op import Op

_MEAN = 'self.register_buffer("mean$n", torch.zeros(()))'

PLAIN = {
    "relu": Op("vsi", "$r = F.relu($x)"),
    "tanh": Op("vsi", "$r = torch.tanh($x)"),
    "by_name": Op("vsi", '$r = getattr(torch, "sin")($x)'),
    "silu_module": Op("vsi", "$r = self.act$n($x)", "self.act$n = nn.SiLU()"),
    "functions": Op("vsi", "$r = $x\nfor f in (torch.tanh, F.gelu):\n    $r = f($r)"),
    "helper": Op("vsi", "$r = scaled($x, by=0.7)"),
    "add": Op("vsi", "$r = $x + $y"),
    "multiply": Op("vsi", "$r = $x * torch.sigmoid($y)"),
    "detached": Op("vsi", "$r = $x + $y.detach()"),
    "stack": Op("vsi", "$r = torch.stack([$x, $y]).mean(0)"),
    "where": Op("vsi", "$r = torch.where($x > 0, $x, 0.1 * $y)"),
    "clamp": Op("vsi", "$r = $x.clamp(min=-1.5, max=1.5)"),
    "add_in_place": Op("vsi", "$r = $x * 0.5\n$r += $y"),
    "relu_in_place": Op("vsi", "$r = F.relu($x + 0.1, inplace=True)"),
    "multiply_in_place": Op("vsi", "$r = $x\n$r.mul_(0.5)"),
    "out_argument": Op(
        "vsi", "$r = torch.empty_like($x)\nwith torch.no_grad():\n    torch.add($x, 1.0, out=$r)\n$r = $r * $x"
    ),
    "assign_item": Op("vsi", "$r = $x.clone()\n$r[:, 0] = $y[:, 1]"),
    "assign_masked": Op("vsi", "$r = $x.clone()\n$r[$x < 0] = 0.05"),
    "assign_slice": Op("vsi", "$r = $x + 0\n$r[:, :2] *= 2.0"),
    "swap_halves": Op("vsi", "a$n, b$n = $x.split(2, 1)\n$r = torch.cat([b$n, a$n], 1)", resizes=False),
    "dropout": Op("vsi", "$r = F.dropout($x, 0.3, self.training)"),
    "dropout_module": Op("vsi", "$r = self.drop$n($x)", "self.drop$n = nn.Dropout(0.3)"),
    "noise": Op("vsi", "$r = $x + 0.1 * torch.randn_like($x)"),
    "noise_in_training": Op("vsi", "$r = $x\nif self.training:\n    $r = $r * (torch.rand($x.shape).to($x) > 0.2)"),
    "python_noise": Op("vsi", "$r = $x * (2.0 if random.random() > 0.5 else 1.0)"),
    "gain": Op("vsi", "$r = $x * self.g$n", "self.g$n = nn.Parameter(torch.ones(1) * 0.9)"),
    "no_grad": Op("vsi", "with torch.no_grad():\n    s$n = $x.abs().mean()\n$r = $x / (s$n + 1)"),
    "buffer": Op(
        "vsi",
        "if self.training:\n    self.mean$n = 0.9 * self.mean$n + 0.1 * $x.detach().mean()\n$r = $x - self.mean$n",
        _MEAN,
    ),
    "buffer_in_place": Op(
        "vsi",
        "if self.training:\n    with torch.no_grad():\n        self.mean$n.mul_(0.9).add_($x.mean(), alpha=0.1)\n"
        "$r = $x - self.mean$n",
        _MEAN,
    ),
    "attribute": Op("vsi", "self.last$n = $x.detach()\n$r = $x + self.last$n.mean()", "self.last$n = None"),
    "straight_through": Op("vsi", "$r = $x + Rounded.apply($x)"),
    "rounded": Op("vsi", "$r = $x + 0.3 * ($x.round() - $x).detach()"),
    "sizes": Op("vsi", "$r = $x * ($x.shape[0] / math.sqrt($x.shape[-1])) / $x.dim()"),
    "numel": Op("vsi", "$r = $x / (1 + 1 / $x.numel())"),
    "double": Op("vsi", "$r = $x.double().mul(0.9).to($x.dtype)"),
    "item": Op("vsi", "$r = $x / (1 + abs($x.mean().item()))"),
    "new_tensor": Op("vsi", "$r = $x + torch.ones((), dtype=$x.dtype, device=$x.device)"),
    "tensor_constant": Op("vsi", "$r = $x * torch.tensor(0.5)"),
    "optional": Op("vsi", "$r = $x\nif extra is not None:\n    $r = $r * extra.mean()"),
    "flag": Op("vsi", "$r = torch.sigmoid($x) if flag else $x"),
    "keyword": Op("vsi", "$r = $x * gain"),
    "option": Op(
        "vsi",
        '$r = $x * self.options$n["scale"] if self.options$n["on"] else $x',
        'self.options$n = {"on": True, "scale": 0.8}',
    ),
    "config": Op("vsi", "$r = torch.tanh($x) if self.config$n.bounded else $x", "self.config$n = Config()"),
    "generator": Op("vsi", "$r = torch.cat([c * 0.5 for c in $x.unbind(0)]).view($x.shape)"),
    "functional": Op("vsi", "$r = functools.reduce(torch.add, ($x, $y, $x))"),
    "view_in_place": Op("vsi", "$r = $x * 1.0\n$r[:, 1].add_(0.5)\n$r.view(-1)[::2].mul_(0.5)"),
    "put_in_place": Op("vs", "$r = torch.zeros_like($x)\n$r.scatter_(-1, $x.argsort(-1), $x)"),
    "index_add": Op(
        "v", "$r = $x.new_zeros(2, 4).index_add_(0, torch.arange($x.shape[0]) % 2, $x)[torch.arange($x.shape[0]) % 2]"
    ),
    "copy_in_place": Op("vsi", "$r = torch.empty_like($x).copy_($y)\n$r.masked_fill_($x > 1, 0.5)"),
    "tensor_hook": Op("vsi", "$r = $x * 2\nif $r.requires_grad:\n    $r.register_hook(lambda g: g * 0.5)"),
    "table": Op(
        "vs",
        "$r = $x + self.table$n[$x.shape[0]]",
        'self.register_buffer("table$n", torch.arange(16.0), persistent=False)',
    ),
    "list_of_tensors": Op(
        "vsi", "$r = $x * self.scales$n[0] + self.scales$n[1]", "self.scales$n = [torch.tensor(0.5), torch.tensor(0.1)]"
    ),
    "int_keys": Op("vsi", "found$n = {0: $x, 1: $y}\n$r = sum(found$n[k] for k in found$n)"),
    "half_the_rows": Op("vsi", "h$n = int($x.shape[0] * 0.5) or 1\n$r = torch.cat([$x[:h$n] * 2, $x[h$n:]])"),
    "largest_size": Op("vsi", "$r = $x / max($x.shape[0], $x.shape[-1], 3) + min($x.shape) * 0.1"),
    "weighted_positions": Op("s", "$r = $x * torch.linspace(0, 1, $x.shape[1])[:, None].to($x)"),
    "every_other": Op("s", "$r = $x + sum($x[:, t : t + 1] for t in range(0, $x.shape[1], 2))"),
    "asserted": Op("vsi", "assert $x.dim() in (2, 3, 4) and isinstance($x, torch.Tensor)\n$r = $x"),
    "caught": Op(
        "vsi",
        "try:\n    if $x.shape[0] > 2:\n        raise ValueError\n    $r = $x * 2\nexcept ValueError:\n    $r = $x / 2",
    ),
    "divided_sizes": Op(
        "i", "q$n, m$n = divmod($x.shape[-1], 2)\n$r = F.pad($x, (q$n, m$n))[..., q$n : q$n + $x.shape[-1]]"
    ),
    "condition_free": Op("vsi", "$r = torch.where(torch.tensor(self.training), $x, $x * 0.9)"),
    "complex": Op("vs", "$r = torch.polar($x.abs() + 0.1, $x).real"),
    "named_steps": Op(
        "vsi",
        "steps$n = OrderedDict(first=torch.tanh, second=F.relu)\n$r = $x\nfor _, f in steps$n.items():\n    $r = f($r)",
    ),
    "walrus": Op("vsi", "$r = h$n if (h$n := $x.tanh()) is not None else $x"),
    "starred": Op("vsi", "first$n, *rest$n = $x.unbind(0)\n$r = torch.stack([first$n * 2, *rest$n])"),
    "local_class": Op("vsi", "$r = nn.Tanh()($x) + nn.ReLU()($y)"),
    "detach_in_place": Op("vsi", "t$n = $x.abs().mean()\nt$n = t$n.detach_()\n$r = $x / (t$n + 1)"),
    "random_order": Op("v", "$r = $x[torch.randperm($x.shape[0])]"),
    "normal": Op("vsi", "$r = $x + torch.normal(0.0, 0.1, $x.shape).to($x)"),
    "counter_buffer": Op(
        "vsi", "self.count$n += 1\n$r = $x / self.count$n", 'self.register_buffer("count$n", torch.ones(()))'
    ),
    "sort": Op("vs", "$r = $x.sort(-1).values"),
    "gather": Op("vs", "$r = $x.gather(-1, $x.argsort(-1))"),
    "softmax": Op("vs", "$r = $x.softmax(-1)"),
    "layer_norm": Op("vs", "$r = self.norm$n($x)", "self.norm$n = nn.LayerNorm(4)"),
    "functional_norm": Op("vs", "$r = F.layer_norm($x, ($x.shape[-1],))"),
    "rms_norm": Op("vs", "$r = self.norm$n($x)", "self.norm$n = nn.RMSNorm(4)"),
    "batch_norm": Op("v", "$r = self.norm$n($x)", "self.norm$n = nn.BatchNorm1d(4)"),
    "outer": Op("v", '$r = torch.einsum("bi,bj->bij", $x, $y).mean(-1)'),
    "batch_mean": Op("v", "$r = $x - $x.mean(0, keepdim=True)"),
    "top": Op("v", "values$n, places$n = $x.topk(2, -1)\n$r = $x.scatter(-1, places$n, values$n * 2)"),
    "flatten_time": Op(
        "s", "b$n, t$n, d$n = $x.shape\n$r = torch.tanh($x.reshape(b$n * t$n, d$n)).view(b$n, t$n, d$n)"
    ),
    "heads": Op("s", "h$n = $x.view(*$x.shape[:2], 2, $x.shape[-1] // 2).transpose(2, 3)\n$r = h$n.reshape($x.shape)"),
    "cumulative": Op("s", "$r = $x.cumsum(1) / 2"),
    "shift": Op("s", "$r = torch.cat([torch.zeros_like($x[:, :1]), $x[:, :-1]], 1)"),
    "first_half": Op("s", "$r = $x[:, : ($x.shape[1] + 1) // 2]", resizes=True),
    "prepend": Op("s", "$r = torch.cat([$x[:, -1:], $x], 1)", resizes=True),
    "slide": Op("s", "$r = F.pad($x, (0, 0, 0, 2)).unfold(1, 3, 1).mean(-1)"),
    "flip": Op("si", "$r = $x.flip(1)"),
    "roll": Op("si", "$r = torch.roll($x, 1, dims=-1)"),
    "group_norm": Op("i", "$r = self.norm$n($x)", "self.norm$n = nn.GroupNorm(2, 4)"),
    "batch_norm_image": Op("i", "$r = self.norm$n($x)", "self.norm$n = nn.BatchNorm2d(4)"),
    "max_pool": Op("i", "$r = F.max_pool2d($x, 2, ceil_mode=True)", resizes=True),
    "adaptive_pool": Op("i", "$r = self.pool$n($x)", "self.pool$n = nn.AdaptiveAvgPool2d(3)", resizes=True),
    "pad": Op("i", "$r = F.pad($x, (1, 0, 0, 1))", resizes=True),
    "interpolate": Op("i", '$r = F.interpolate($x, size=(5, 4), mode="bilinear")', resizes=True),
    "if_small": Op("i", "$r = $x\nif $x.shape[-1] < 6:\n    $r = F.pad($r, (1, 1))", resizes=True),
}
