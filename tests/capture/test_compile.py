"""Prepared models under torch.compile: as many graphs as eager, made once; a forward that stays Python is one break."""

import collections
import copy
import functools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import qgraph
from qgraph.graph import STATE
from qgraph.modules import Quantizer, Sparsifier


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Compiled:
    """A compiled model and the graphs that were made for it so far."""

    def __init__(self, model: nn.Module) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.model = torch.compile(model, backend=self._backend)

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def _backend(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward


@dataclass
class Batch:
    u: Tensor
    v: Tensor | None = None


Pair = collections.namedtuple("Pair", "u v")


class Takes(nn.Module):
    """Adds to a product whatever tensors come with its input."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x, *others, extra=None):
        h = self.fc(x)
        for other in others:
            h = h + other
        if isinstance(extra, dict):
            return h + extra["u"]
        return h if extra is None else h + (extra[0] if isinstance(extra, (list, tuple)) else extra.u)


def rows() -> Tensor:
    return torch.randn(4, 8)


ARGUMENTS = {
    "tensors": lambda: ((rows(), rows(), rows()), {}),
    "dict": lambda: ((rows(),), {"extra": {"u": rows(), "v": [rows(), (rows(),)]}}),
    "ordered": lambda: ((rows(),), {"extra": collections.OrderedDict(u=rows())}),
    "list": lambda: ((rows(),), {"extra": [rows(), rows()]}),
    "named tuple": lambda: ((rows(),), {"extra": Pair(rows(), rows())}),
    "dataclass": lambda: ((rows(),), {"extra": Batch(rows())}),
    "object": lambda: ((rows(),), {"extra": SimpleNamespace(u=rows(), n=3)}),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_a_new_batch_compiles_nothing_anew(kind):
    args, kwargs = ARGUMENTS[kind]()
    compiled = Compiled(qgraph.prepare(Takes(), "A4W2", args, example_kwargs=kwargs))
    for _ in range(3):
        args, kwargs = ARGUMENTS[kind]()
        compiled(*args, **kwargs)
    assert len(compiled.graphs) == 1


def test_sizes_that_torch_compile_keeps_open_stay_open():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    prepared = qgraph.prepare(nn.TransformerEncoder(layer, 2), "A8W4", (torch.randn(2, 5, 16),))
    compiled = Compiled(prepared)
    for batch in (2, 3, 4, 5, 6):
        compiled(torch.randn(batch, 5, 16))
    assert len(compiled.graphs) == 2  # one for the first size, one for any


LEARNED = qgraph.QConfig(qgraph.QuantSpec(4, method="lsq"), qgraph.QuantSpec(8, granularity="token", method="lsq"))


@pytest.mark.parametrize("config", ["A4W1-2:4", "A2W1.58@3", "-50%", LEARNED], ids=str)
def test_every_quantizer_is_one_call_of_the_graph(config):
    x = rows()
    prepared = qgraph.prepare(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)), config, (x,))
    compiled = Compiled(prepared)
    assert torch.equal(compiled(x), prepared(x))
    (graph,) = compiled.graphs
    called = [node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"]
    kinds = {"fake_quantize": Quantizer, "sparsify": Sparsifier}
    planned = {name: sum(isinstance(m, kind) for m in prepared.modules()) for name, kind in kinds.items()}
    assert {name: called.count(name) for name in kinds} == planned


def test_a_learned_step_of_an_activation_begins_in_compiled_code_as_in_eager():
    x = rows()
    prepared = qgraph.prepare(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)), LEARNED, (x,))
    eager = copy.deepcopy(prepared)
    losses = []
    for model, run in ((eager, eager), (prepared, torch.compile(prepared, backend="aot_eager", fullgraph=True))):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = run(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-5) and losses[2] < losses[0]


def test_one_tensor_given_twice_is_another_kind_of_call():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, q, k, v):
            return self.a(q) + (self.b(k) if k is v else k - v)

    prepared = qgraph.prepare(Asks(), "W4", (rows(), rows(), rows())).eval()
    compiled = Compiled(prepared)
    q, k, v = rows(), rows(), rows()
    for args in ((q, k, v), (q, k, k), (q, k, v), (q, q, q)):
        torch.testing.assert_close(compiled(*args), prepared(*args))


class Selective(nn.Module):
    """Stays Python: rows go to the layer that the data choose."""

    def __init__(self, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.mix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        x = x @ self.mix
        chosen = int(x.detach().abs().sum() * 1000) % 2
        for layer in self.layers[chosen:]:
            x = torch.tanh(layer(x))
        return x


def test_the_children_of_a_forward_that_stays_python_are_compiled_each_once():
    layers = 12  # more than the versions of one function that torch.compile makes
    prepared = qgraph.prepare(Selective(layers), "W2", (rows(),))
    assert [opaque.path for opaque in qgraph.inspect(prepared).coverage.opaque[:1]] == [""]
    compiled = Compiled(prepared)
    for x in (rows() for _ in range(4)):
        out, expected = compiled(x), prepared(x)
        torch.testing.assert_close(out, expected)
        (gradient,) = torch.autograd.grad(out.sum(), prepared.mix)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), prepared.mix)[0])
    assert layers - 1 <= len(compiled.graphs) <= layers
    assert not any("select" in str(node.target) for graph in compiled.graphs for node in graph.graph.nodes)


def test_a_first_call_of_a_new_kind_is_recorded_outside_of_the_compiler():
    model = Takes()
    prepared = qgraph.prepare(model, "W2", (rows(),)).eval()
    compiled = Compiled(prepared)
    x, extra = rows(), {"u": rows()}
    torch.testing.assert_close(compiled(x, extra=extra), prepared(x, extra=extra))
    assert torch._dynamo.utils.counters["frames"]["total"] < 20  # each of ours by itself would be some hundred
    torch.testing.assert_close(compiled(x, extra=extra), prepared(x, extra=extra))


class Partial(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(8, 8), functools.partial(F.leaky_relu, negative_slope=0.3)

    def forward(self, x):
        return self.act(self.fc(x))


def test_a_partial_function_held_by_a_module_breaks_nothing():
    prepared = qgraph.prepare(Partial(), "W2", (rows(),)).eval()
    x = rows()
    torch.testing.assert_close(torch.compile(prepared, backend="eager", fullgraph=True)(x), prepared(x))
    before = prepared(x)
    prepared.act = functools.partial(F.leaky_relu, negative_slope=0.9)
    assert not torch.equal(prepared(x), before)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 16, 8) * 0.3)

    def forward(self, x, offsets):
        return torch._grouped_mm(x, self.w, offs=offsets)


def test_grouped_products_of_float32_are_compiled_with_their_gradients():
    args = (torch.randn(9, 16, requires_grad=True), torch.tensor([4, 9], dtype=torch.int32))
    prepared = qgraph.prepare(Grouped(), "W4", args)
    assert "torch._grouped_mm(" in str(qgraph.inspect(prepared).graphs[""])  # the graph is as the model wrote it
    compiled = torch.compile(prepared, backend="aot_eager", fullgraph=True)
    out, expected = compiled(*args), prepared(*args)
    torch.testing.assert_close(out, expected)
    wanted = (args[0], prepared.w)
    got = torch.autograd.grad(out.square().sum(), wanted)
    for a, b in zip(got, torch.autograd.grad(expected.square().sum(), wanted), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("a", "b", "offsets"),
    [
        ((8, 16), (2, 16, 8), [3, 8]),
        ((2, 8, 16), (16, 8), [3, 8]),
        ((4, 8), (8, 12), [3, 8]),
        ((2, 8, 4), (2, 4, 8), None),
    ],
)
def test_every_form_of_a_grouped_product_compiled(a, b, offsets):
    from qgraph.ops.grouped import grouped_mm

    ends = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    found = []
    for function in (torch._grouped_mm, torch.compile(grouped_mm, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        inputs = (torch.randn(a, requires_grad=True), torch.randn(b, requires_grad=True))
        out = function(*inputs, ends)
        found.append((out, *torch.autograd.grad((out * torch.arange(out.numel()).view_as(out)).sum(), inputs)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_quantizers_are_never_captured_themselves():
    prepared = qgraph.prepare(Selective(3), "W2", (rows(),))
    for _ in range(3):
        prepared(rows())
    copied = copy.deepcopy(prepared)
    copied(rows())
    for path, module in (*prepared.named_modules(), *copied.named_modules()):
        assert STATE not in module.__dict__ or "qgraph" not in path.split("."), path


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.rnn(x)[0])


def test_a_recurrent_layer_stays_outside_and_the_rest_is_compiled():
    x = torch.randn(2, 5, 8)
    prepared = qgraph.prepare(Recurrent(), "W4", (x,)).eval()
    eager, compiled = Compiled(Recurrent().eval()), Compiled(prepared)
    eager(x)
    torch.testing.assert_close(compiled(x), prepared(x))
    compiled(torch.randn(2, 5, 8))
    assert len(compiled.graphs) <= max(1, len(eager.graphs))


def test_layers_that_are_alike_are_compiled_once_and_torchs_own_within_their_callers():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return x + self.b(self.a(x).relu())

    class Tagger(nn.Module):
        """The compiler stops at the recurrent layer, and takes up what it meets after it."""

        def __init__(self):
            super().__init__()
            self.rnn, self.layers = nn.LSTM(4, 4, batch_first=True), nn.ModuleList(Layer() for _ in range(12))
            self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

        def forward(self, x):
            x = self.rnn(x)[0]
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    x = torch.randn(2, 3, 4)
    model = Tagger().eval()
    eager, compiled = Compiled(model), Compiled(qgraph.prepare(model, "A8W4", (x,)))
    eager(x)
    torch._dynamo.reset()
    compiled(x)
    assert len(compiled.graphs) == len(eager.graphs) == 1


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU())])
def test_a_layer_of_torchs_own_is_compiled_where_it_is_the_model(make):
    x = rows()
    prepared = qgraph.prepare(make(), "A8W4", (x,))
    compiled = Compiled(prepared)
    torch.testing.assert_close(compiled(x), prepared(x))
    assert len(compiled.graphs) == 1


def test_a_loop_over_parts_that_data_choose_is_left_to_python_as_in_eager():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x, chosen):
            out = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                out[chosen == i] = expert(x[chosen == i])
            return out

    x, chosen = torch.randn(6, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    prepared = qgraph.prepare(Routed(), "A8W4", (x, chosen))
    compiled = Compiled(prepared)
    assert torch.equal(compiled(x, chosen), prepared(x, chosen)) and not compiled.graphs


def test_sizes_that_one_class_has_met_leave_those_of_another_fixed():
    class One(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    class Other(One):
        pass

    for kind, size in ((One, 2), (Other, 5)):
        compiled = Compiled(qgraph.prepare(kind(nn.Linear(8, 8)), "W4", (rows(),)))
        compiled(torch.randn(size, 8))
        inputs = [n.meta["example_value"] for n in compiled.graphs[0].graph.nodes if n.op == "placeholder"]
        assert all(isinstance(value, Tensor) and not value._has_symbolic_sizes_strides for value in inputs)
