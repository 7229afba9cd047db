"""Operations with a weight of their own, wherever it stands and however it is made."""

from __future__ import annotations

from tests.zoo.operations.op import Op

_W = "self.w$n = nn.Parameter(torch.randn(4, 4) * 0.5)"
_FC = "self.fc$n = nn.Linear(4, 4)"
_CONV = "self.conv$n = nn.Conv2d(4, 4, 3, padding=1)"

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
        "    rows = torch.where(top$n == e)[0]\n    $r[rows] = $x[rows] @ self.w$n[e]",
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
    "tensordot": Op("vs", "$r = torch.tensordot($x, self.w$n, dims=1)", _W),
    "inner": Op("vs", "$r = torch.inner($x, self.w$n)", _W),
    "multi_dot": Op("v", "$r = torch.linalg.multi_dot([$x, self.w$n, self.w$n])", _W),
    "matmul_in_place_of_method": Op("vs", "$r = $x.matmul(self.w$n.mT)", _W),
    "summed_bmm": Op("s", "$r = $x + torch.addbmm(self.w$n, $x.mT, $x).unsqueeze(0).sum(1, keepdim=True)", _W),
    "batched_matmul": Op(
        "v", "$r = (self.w$n @ $x.t()).mean(0).t()", "self.w$n = nn.Parameter(torch.randn(2, 4, 4) * 0.5)"
    ),
    "joined_weight": Op(
        "vs",
        "$r = F.linear($x, torch.cat([self.a$n, self.b$n]), torch.stack([self.c$n, self.c$n]).view(-1))",
        "self.a$n, self.b$n = nn.Parameter(torch.randn(2, 4) * 0.5), nn.Parameter(torch.randn(2, 4) * 0.5)\n"
        "self.c$n = nn.Parameter(torch.zeros(2))",
    ),
    "viewed_weight": Op(
        "vs", "$r = F.linear($x, self.w$n.view(4, 4))", "self.w$n = nn.Parameter(torch.randn(16) * 0.5)"
    ),
    "weight_by_mode": Op("vs", "$r = F.linear($x, self.w$n if self.training else self.w$n.detach())", _W),
    "weight_by_name": Op("vs", '$r = $x @ getattr(self, "w$n")', _W),
    "weight_of_dict": Op("vs", '$r = $x @ dict(self.named_parameters())["w$n"]', _W),
    "codebook": Op(
        "vs",
        "near$n = ($x.unsqueeze(-2) - self.codes$n).pow(2).sum(-1).argmin(-1)\n$r = $x + self.codes$n[near$n]",
        "self.codes$n = nn.Parameter(torch.randn(5, 4))",
    ),
    "prototypes": Op(
        "vs",
        "$r = $x - torch.cdist($x, self.codes$n).mean(-1, keepdim=True)",
        "self.codes$n = nn.Parameter(torch.randn(5, 4))",
    ),
    "class_token": Op(
        "s",
        "$r = torch.cat([self.token$n.expand($x.shape[0], -1, -1), $x], 1)",
        "self.token$n = nn.Parameter(torch.randn(1, 1, 4))",
        resizes=True,
    ),
    "learned_queries": Op(
        "s",
        "q$n = self.queries$n.unsqueeze(0).repeat($x.size(0), 1, 1)\n$r = self.attn$n(q$n, $x, $x)[0]",
        "self.queries$n = nn.Parameter(torch.randn(3, 4))\nself.attn$n = nn.MultiheadAttention(4, 2, batch_first=True)",
        resizes=True,
    ),
    "queries_through_layer": Op(
        "s",
        "q$n = self.fc$n(self.queries$n)\n$r = $x + ($x @ q$n.t()).softmax(-1) @ q$n",
        f"{_FC}\nself.queries$n = nn.Parameter(torch.randn(3, 4))",
    ),
    "padding_mask": Op(
        "s",
        "mask$n = torch.arange($x.shape[1]).expand($x.shape[0], -1) > 1\n"
        "$r = self.attn$n($x, $x, $x, key_padding_mask=mask$n, need_weights=False)[0]",
        "self.attn$n = nn.MultiheadAttention(4, 2, batch_first=True)",
    ),
    "conv3d": Op(
        "i",
        "$r = self.conv$n($x.unsqueeze(2)).squeeze(2)",
        "self.conv$n = nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1))",
    ),
    "pruned": Op("vs", "$r = self.fc$n($x)", f'{_FC}\nprune.l1_unstructured(self.fc$n, "weight", amount=0.3)'),
    "energy": Op(
        "vs",
        "with torch.enable_grad():\n    v$n = $x.detach().requires_grad_()\n"
        "    (g$n,) = torch.autograd.grad(self.fc$n(v$n).tanh().sum(), v$n, create_graph=True)\n$r = $x + g$n",
        _FC,
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
