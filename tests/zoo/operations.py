"""What a random model is made of: a table of operations, each a few lines of code with blanks.

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


_W = "self.w$n = nn.Parameter(torch.randn(4, 4) * 0.5)"
_FC = "self.fc$n = nn.Linear(4, 4)"
_CONV = "self.conv$n = nn.Conv2d(4, 4, 3, padding=1)"
_CHILD = "self.child$n = $Child()"
_MEAN = 'self.register_buffer("mean$n", torch.zeros(()))'

# -- weights of vectors and sequences ----------------------------------------------------------------------------------

WEIGHTS = {
    "linear": Op("vs", "$r = self.fc$n($x)", _FC),
    "functional_linear": Op("vs", "$r = F.linear($x, self.w$n)", _W),
    "functional_bias": Op(
        "vs", "$r = F.linear($x, self.w$n, self.b$n)", f"{_W}\nself.b$n = nn.Parameter(torch.zeros(4))"
    ),
    "matmul": Op("vs", "$r = $x @ self.w$n", _W),
    "matmul_transposed": Op("vs", "$r = torch.matmul($x, self.w$n.t())", _W),
    "matmul_left": Op("s", "$r = (self.w$n @ $x.transpose(1, 2)).transpose(1, 2)", _W),
    "einsum": Op("vs", '$r = torch.einsum("...i,ji->...j", $x, self.w$n)', _W),
    "einsum_heads": Op(
        "s",
        'h$n = torch.einsum("btd,hde->bhte", $x, self.w$n)\n$r = h$n.transpose(1, 2).flatten(2)',
        "self.w$n = nn.Parameter(torch.randn(2, 4, 2) * 0.5)",
    ),
    "addmm": Op("v", "$r = torch.addmm(self.b$n, $x, self.w$n)", f"self.b$n = nn.Parameter(torch.zeros(4))\n{_W}"),
    "bmm": Op("s", "$r = torch.bmm($x, self.w$n.expand($x.shape[0], -1, -1))", _W),
    "baddbmm": Op("s", "$r = torch.baddbmm($x, $x, self.w$n.unsqueeze(0).repeat($x.size(0), 1, 1), beta=0.5)", _W),
    "matrix_vector": Op("v", "$r = (self.w$n @ $x.unsqueeze(-1)).squeeze(-1)", _W),
    "bilinear": Op("vs", "$r = self.bi$n($x, $y)", "self.bi$n = nn.Bilinear(4, 4, 4)"),
    "no_bias": Op("vs", "$r = self.fc$n($x)", "self.fc$n = nn.Linear(4, 4, bias=False)"),
    "mlp": Op(
        "vs",
        "$r = $x + self.down$n(F.gelu(self.up$n($x)))",
        "self.up$n, self.down$n = nn.Linear(4, 8), nn.Linear(8, 4)",
    ),
    "gated": Op(
        "vs", "a$n, b$n = self.fc$n($x).chunk(2, -1)\n$r = a$n * torch.sigmoid(b$n)", "self.fc$n = nn.Linear(4, 8)"
    ),
    "tied": Op(
        "vs",
        "$r = self.b$n(torch.tanh(self.a$n($x)))",
        "self.a$n, self.b$n = nn.Linear(4, 4), nn.Linear(4, 4)\nself.b$n.weight = self.a$n.weight",
    ),
    "tied_transposed": Op("vs", "$r = F.linear(F.relu(self.fc$n($x)), self.fc$n.weight.t())", _FC),
    "weight_of_child": Op("vs", "$r = F.linear($x, self.fc$n.weight, self.fc$n.bias)", _FC),
    "twice": Op("vs", "$r = self.fc$n(torch.tanh(self.fc$n($x)))", _FC),
    "own_twice": Op("vs", "$r = F.linear(torch.tanh(F.linear($x, self.w$n)), self.w$n)", _W),
    "list": Op(
        "vs",
        "$r = $x\nfor layer in self.layers$n:\n    $r = torch.tanh(layer($r))",
        "self.layers$n = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))",
    ),
    "dict": Op(
        "vs",
        '$r = self.parts$n["two"](F.relu(self.parts$n["one"]($x)))',
        'self.parts$n = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})',
    ),
    "dict_loop": Op(
        "vs",
        "found$n = {name: layer($x) for name, layer in self.parts$n.items()}\n$r = sum(found$n.values())",
        'self.parts$n = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})',
    ),
    "sequential": Op(
        "vs",
        "$r = self.seq$n($x)",
        "self.seq$n = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 4))",
    ),
    "sequential_slice": Op(
        "vs", "$r = self.seq$n[:2]($x)", "self.seq$n = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))"
    ),
    "parameter_list": Op(
        "vs",
        "$r = $x\nfor w in self.ws$n:\n    $r = torch.tanh($r @ w)",
        "self.ws$n = nn.ParameterList(nn.Parameter(torch.randn(4, 4) * 0.5) for _ in range(2))",
    ),
    "parameter_dict": Op(
        "vs",
        '$r = F.linear($x, self.ws$n["a"]) + F.linear($x, self.ws$n["b"])',
        'self.ws$n = nn.ParameterDict({k: nn.Parameter(torch.randn(4, 4) * 0.5) for k in ("a", "b")})',
    ),
    "lora": Op(
        "vs",
        "$r = F.linear($x, self.w$n + self.up$n @ self.down$n)",
        f"{_W}\nself.up$n = nn.Parameter(torch.randn(4, 2))\nself.down$n = nn.Parameter(torch.randn(2, 4))",
    ),
    "lora_beside": Op(
        "vs",
        "$r = self.fc$n($x) + $x @ self.down$n @ self.up$n",
        f"{_FC}\nself.down$n = nn.Parameter(torch.randn(4, 2))\nself.up$n = nn.Parameter(torch.randn(2, 4))",
    ),
    "normalized": Op("vs", "$r = F.linear(F.normalize($x, dim=-1), F.normalize(self.w$n, dim=-1))", _W),
    "scaled_weight": Op(
        "vs", "$r = F.linear($x, self.w$n * self.g$n[:, None])", f"{_W}\nself.g$n = nn.Parameter(torch.ones(4) * 0.8)"
    ),
    "masked_weight": Op(
        "vs",
        "$r = F.linear($x, self.w$n * self.mask$n)",
        f'{_W}\nself.register_buffer("mask$n", torch.ones(4, 4).tril())',
    ),
    "stacked_weight": Op(
        "vs",
        "$r = F.linear(F.linear($x, self.w$n[0]), self.w$n[1])",
        "self.w$n = nn.Parameter(torch.randn(2, 4, 4) * 0.5)",
    ),
    "chunked_weight": Op(
        "vs",
        "a$n, b$n = self.w$n.chunk(2)\n$r = F.linear($x, a$n) * torch.sigmoid(F.linear($x, b$n))",
        "self.w$n = nn.Parameter(torch.randn(8, 4) * 0.5)",
    ),
    "weights_from_code": Op(
        "vs",
        "w$n = self.make$n(self.code$n).view(4, 4)\n$r = F.linear($x, w$n)",
        "self.make$n, self.code$n = nn.Linear(3, 16), nn.Parameter(torch.randn(3))",
    ),
    "weights_from_data": Op(
        "vs",
        "w$n = self.make$n($x.flatten(0, -2).mean(0)).view(4, 4)\n$r = F.linear($x, w$n)",
        "self.make$n = nn.Linear(4, 16)",
    ),
    "functional_call": Op(
        "vs",
        'w$n = {"weight": torch.tanh(self.w$n), "bias": self.fc$n.bias}\n'
        "$r = torch.func.functional_call(self.fc$n, w$n, ($x,))",
        f"{_FC}\n{_W}",
    ),
    "weight_norm": Op("vs", "$r = self.fc$n($x)", "self.fc$n = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))"),
    "weight_norm_hook": Op("vs", "$r = self.fc$n($x)", "self.fc$n = nn.utils.weight_norm(nn.Linear(4, 4))"),
    "spectral_norm": Op(
        "vs", "$r = self.fc$n($x)", "self.fc$n = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))"
    ),
    "parametrized": Op(
        "vs",
        "$r = self.fc$n($x)",
        'self.fc$n = nn.Linear(4, 4)\nnn.utils.parametrize.register_parametrization(self.fc$n, "weight", Symmetric())',
    ),
    "frozen": Op("vs", "$r = self.fc$n($x)", f"{_FC}\nself.fc$n.requires_grad_(False)"),
    "vmapped": Op("v", "$r = torch.vmap(lambda row: torch.tanh(self.w$n @ row))($x)", _W),
    "forward_as_method": Op("vs", "$r = self.fc$n.forward($x)", _FC),
    "hooked": Op(
        "vs",
        "$r = self.fc$n($x)",
        f"{_FC}\nself.fc$n.register_forward_hook(doubled)\nself.fc$n.register_forward_pre_hook(halved)",
    ),
    "embedding_of_argmax": Op("vs", "$r = $x + self.emb$n($x.argmax(-1))", "self.emb$n = nn.Embedding(4, 4)"),
    "functional_embedding": Op("vs", "$r = $x * F.embedding($x.argmax(-1), self.w$n)", _W),
    "embedding_head": Op(
        "vs",
        "$r = $x + ($x @ self.emb$n.weight.t()).softmax(-1) @ self.emb$n.weight",
        "self.emb$n = nn.Embedding(6, 4)",
    ),
    "bag": Op("v", "$r = $x + self.bag$n($x.argsort(-1))", 'self.bag$n = nn.EmbeddingBag(4, 4, mode="mean")'),
    "gru_cell": Op("v", "$r = self.cell$n($x, $y)", "self.cell$n = nn.GRUCell(4, 4)"),
    "lstm_cell": Op("v", "h$n, c$n = self.cell$n($x)\n$r = h$n + c$n", "self.cell$n = nn.LSTMCell(4, 4)"),
    "rnn_cell": Op("v", "$r = self.cell$n($x, torch.zeros($x.shape[0], 4).to($x))", "self.cell$n = nn.RNNCell(4, 4)"),
    "experts": Op(
        "v",
        "top$n = self.gate$n($x).argmax(-1)\n$r = torch.zeros_like($x)\nfor e in range(2):\n"
        "    rows = torch.where(top$n == e)[0]\n    if rows.numel():\n        $r[rows] = $x[rows] @ self.w$n[e]",
        "self.gate$n = nn.Linear(4, 2)\nself.w$n = nn.Parameter(torch.randn(2, 4, 4) * 0.5)",
    ),
    "soft_experts": Op(
        "v",
        'g$n = self.gate$n($x).softmax(-1)\n$r = torch.einsum("be,bd,edf->bf", g$n, $x, self.w$n)',
        "self.gate$n = nn.Linear(4, 2)\nself.w$n = nn.Parameter(torch.randn(2, 4, 4) * 0.5)",
    ),
    "spectral_filter": Op(
        "vs",
        "$r = torch.fft.irfft(torch.fft.rfft($x) * self.w$n, n=$x.shape[-1])",
        "self.w$n = nn.Parameter(torch.randn(3))",
    ),
    # Sequences alone.
    "lstm": Op("s", "$r, _ = self.rnn$n($x)", "self.rnn$n = nn.LSTM(4, 4, batch_first=True)"),
    "gru_both_ways": Op(
        "s", "$r, last$n = self.rnn$n($x)", "self.rnn$n = nn.GRU(4, 2, batch_first=True, bidirectional=True)"
    ),
    "rnn_time_first": Op(
        "s",
        "h$n, _ = self.rnn$n($x.transpose(0, 1))\n$r = h$n.transpose(0, 1)",
        "self.rnn$n = nn.RNN(4, 4, num_layers=2)",
    ),
    "lstm_state": Op(
        "s",
        "h$n = torch.zeros(1, $x.shape[0], 4).to($x)\n$r, (h$n, c$n) = self.rnn$n($x, (h$n, h$n))\n"
        "$r = $r + h$n[-1].unsqueeze(1)",
        "self.rnn$n = nn.LSTM(4, 4, batch_first=True)",
    ),
    "attention": Op(
        "s",
        "$r = self.attn$n($x, $x, $x, need_weights=False)[0]",
        "self.attn$n = nn.MultiheadAttention(4, 2, batch_first=True)",
    ),
    "attention_weights": Op(
        "s",
        "a$n, w$n = self.attn$n($x, $y, $y)\n$r = $x + w$n @ a$n",
        "self.attn$n = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)",
    ),
    "sdpa": Op(
        "s",
        "q$n, k$n, v$n = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv$n($x).chunk(3, -1))\n"
        "$r = F.scaled_dot_product_attention(q$n, k$n, v$n, is_causal=True).transpose(1, 2).flatten(2)",
        "self.qkv$n = nn.Linear(4, 12)",
    ),
    "sdpa_parameters": Op(
        "s",
        "k$n = self.k$n.expand($x.shape[0], -1, -1)\n$r = $x + F.scaled_dot_product_attention($x, k$n, k$n)",
        "self.k$n = nn.Parameter(torch.randn(1, 5, 4))",
    ),
    "masked_attention": Op(
        "s",
        "t$n = $x.shape[1]\nmask$n = torch.ones(t$n, t$n, dtype=torch.bool).triu(1)\n"
        'score$n = (self.q$n($x) @ $x.mT / math.sqrt($x.size(-1))).masked_fill(mask$n, float("-inf"))\n'
        "$r = score$n.softmax(-1) @ $x",
        "self.q$n = nn.Linear(4, 4)",
    ),
    "encoder_layer": Op(
        "s",
        "$r = self.layer$n($x)",
        "self.layer$n = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)",
    ),
    "conv1d": Op(
        "s", "$r = self.conv$n($x.transpose(1, 2)).transpose(1, 2)", "self.conv$n = nn.Conv1d(4, 4, 3, padding=1)"
    ),
    "functional_conv1d": Op(
        "s",
        "$r = F.conv1d(F.pad($x.mT, (2, 0)), self.w$n, groups=2).mT",
        "self.w$n = nn.Parameter(torch.randn(4, 2, 3) * 0.5)",
    ),
    "conv_transpose1d": Op(
        "s", "$r = self.conv$n($x.mT).mT", "self.conv$n = nn.ConvTranspose1d(4, 4, 2, stride=2)", resizes=True
    ),
    "positions": Op(
        "s", "$r = $x + self.pos$n[:, : $x.size(1)]", "self.pos$n = nn.Parameter(torch.randn(1, 64, 4) * 0.1)"
    ),
    "position_embedding": Op(
        "s", "$r = $x + self.emb$n(torch.arange($x.shape[1]))", "self.emb$n = nn.Embedding(64, 4)"
    ),
    "recurrence": Op(
        "s",
        "h$n, outs$n = $x.new_zeros($x.size(0), 4), []\nfor t in range($x.shape[1]):\n"
        "    h$n = torch.tanh(self.fc$n($x[:, t]) + h$n)\n    outs$n.append(h$n)\n$r = torch.stack(outs$n, 1)",
        _FC,
    ),
    "recurrence_parameters": Op(
        "s",
        "h$n = $x[:, 0]\nfor step in $x.unbind(1):\n    h$n = torch.tanh(step @ self.w$n + h$n * self.decay$n)\n"
        "$r = $x + h$n.unsqueeze(1)",
        f"{_W}\nself.decay$n = nn.Parameter(torch.rand(4))",
    ),
    "packed": Op(
        "s",
        "p$n = nn.utils.rnn.pack_padded_sequence($x, [$x.shape[1]] * $x.shape[0], batch_first=True)\n"
        "$r, _ = nn.utils.rnn.pad_packed_sequence(self.rnn$n(p$n)[0], batch_first=True)",
        "self.rnn$n = nn.GRU(4, 4, batch_first=True)",
    ),
    # Images.
    "conv": Op("i", "$r = self.conv$n($x)", _CONV),
    "functional_conv": Op(
        "i", "$r = F.conv2d($x, self.w$n, padding=1)", "self.w$n = nn.Parameter(torch.randn(4, 4, 3, 3) * 0.3)"
    ),
    "depthwise": Op("i", "$r = self.conv$n($x)", "self.conv$n = nn.Conv2d(4, 4, 3, padding=1, groups=4)"),
    "pointwise": Op("i", "$r = self.conv$n($x)", "self.conv$n = nn.Conv2d(4, 4, 1)"),
    "strided": Op("i", "$r = self.conv$n($x)", "self.conv$n = nn.Conv2d(4, 4, 3, stride=2, padding=1)", resizes=True),
    "same_padding": Op("i", "$r = self.conv$n($x)", 'self.conv$n = nn.Conv2d(4, 4, 3, padding="same", dilation=2)'),
    "circular": Op("i", "$r = self.conv$n($x)", 'self.conv$n = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")'),
    "conv_transpose": Op("i", "$r = self.conv$n($x)", "self.conv$n = nn.ConvTranspose2d(4, 4, 3, padding=1)"),
    "conv_transpose_size": Op(
        "i", "$r = self.conv$n($x, output_size=$x.shape)", "self.conv$n = nn.ConvTranspose2d(4, 4, 3, padding=1)"
    ),
    "conv_norm": Op(
        "i",
        "$r = self.seq$n(F.pad($x, (1, 1, 1, 1)))",
        "self.seq$n = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))",
    ),
    "standardized": Op(
        "i",
        'w$n, over$n = self.conv$n.weight, {"dim": (1, 2, 3), "keepdim": True}\n'
        "w$n = (w$n - w$n.mean(**over$n)) / (w$n.std(**over$n) + 1e-5)\n"
        "$r = F.conv2d($x, w$n, self.conv$n.bias, padding=1)",
        _CONV,
    ),
    "squeeze_excite": Op("i", "$r = $x * torch.sigmoid(self.fc$n($x.mean((2, 3))))[:, :, None, None]", _FC),
    "unfold": Op(
        "i",
        "cols$n = self.w$n @ F.unfold($x, 3, padding=1)\n$r = cols$n.view($x.shape[0], 4, *$x.shape[2:])",
        "self.w$n = nn.Parameter(torch.randn(4, 36) * 0.2)",
    ),
    "unet": Op(
        "i",
        "low$n = self.low$n(F.avg_pool2d(F.pad($x, (0, 1, 0, 1)), 2))\n"
        'up$n = F.interpolate(low$n, size=$x.shape[-2:], mode="nearest")\n$r = self.out$n(torch.cat([$x, up$n], 1))',
        "self.low$n, self.out$n = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 1)",
    ),
    "channels_last": Op("i", "$r = self.fc$n($x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)", _FC),
}

# -- everything without a weight of its own ----------------------------------------------------------------------------

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
    "rounded": Op("vsi", "$r = $x + ($x.round() - $x).detach()"),
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

# -- what holds other steps: children, branches, loops, modes ----------------------------------------------------------

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
