"""What torch's exporter cannot translate, written in what it can: the same numbers as torch, and a file that runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qgraph
from qgraph.exporters.decompositions import DECOMPOSITIONS

X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with equal values among them
Y = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
LONG = torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(2))
SORTED = Y.sort(-1).values
INDEX = torch.tensor([[0, 0, 2], [1, 1, 1], [2, 0, 2]])[:, :, None].expand(3, 3, 6)
LABELS = torch.tensor([[0, 1, 2, 3, 4, 0], [1, -100, 1, 1, 2, 2], [4, 4, 3, 3, 0, -100]])
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.1, 1.5])

CALLS = {
    **{f"cdist p={p}": ("cdist", (X, Y, p), {}) for p in (0.0, 1.0, 2.0, 3.0, float("inf"))},
    "cdist of many": ("cdist", (LONG, LONG), {}),
    "cdist of many, exact": ("cdist", (LONG, LONG, 2.0, "donot_use_mm_for_euclid_dist"), {}),
    "searchsorted": ("searchsorted", (SORTED[0, 0], X), {}),
    "searchsorted right": ("searchsorted", (SORTED[0, 0], SORTED[0, 0]), {"right": True}),
    "searchsorted rows": ("searchsorted", (SORTED, Y), {"out_int32": True}),
    "searchsorted unsorted": ("searchsorted", (Y, Y), {"side": "right", "sorter": Y.argsort(-1)}),
    "searchsorted number": ("searchsorted", (SORTED[0, 0], 0.3), {}),
    "cummax": ("cummax", (X, 1), {}),
    "cummin": ("cummin", (X, -1), {}),
    "cumprod": ("cumprod", (X, 0), {}),
    "cumprod of integers": ("cumprod", (torch.arange(1, 6, dtype=torch.int32), 0), {}),
    "median": ("median", (X,), {}),
    "median along": ("median", (X, 1), {}),
    "median kept": ("median", (X, 2), {"keepdim": True}),
    "kthvalue": ("kthvalue", (X, 3, 1), {}),
    "mean with self": ("scatter_reduce", (X, 1, INDEX, Y, "mean"), {}),
    "mean without self": ("scatter_reduce", (X, 1, INDEX, Y, "mean"), {"include_self": False}),
    "smoothed": ("cross_entropy", (X, LABELS), {"label_smoothing": 0.1}),
    "smoothed, weighted": ("cross_entropy", (X, LABELS, WEIGHTS), {"label_smoothing": 0.3}),
    "smoothed, of one": ("cross_entropy", (X[0, 0], LABELS[0, 0]), {"label_smoothing": 0.1}),
    "smoothed, each": ("cross_entropy", (X, LABELS), {"label_smoothing": 0.1, "reduction": "none"}),
    "probabilities": ("cross_entropy", (X, X.softmax(1), WEIGHTS), {}),
    "probabilities, smoothed": ("cross_entropy", (X, X.softmax(1)), {"label_smoothing": 0.1, "reduction": "sum"}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_decomposition_is_what_torch_computes(name):
    function, args, kwargs = CALLS[name]
    expected = getattr(torch, function, None) or getattr(nn.functional, function)
    expected = expected(*args, **kwargs)
    found = DECOMPOSITIONS[function](*args, **kwargs)
    if not isinstance(expected, torch.Tensor):
        assert type(found) is type(expected)
        if function in ("median", "kthvalue"):  # of equal values, torch's choice of the index is no promise
            assert torch.equal(
                X.gather(args[1] if function == "median" else args[2], _kept(found, args, kwargs)[1]),
                _kept(found, args, kwargs)[0],
            )
            found, expected = found[0], expected[0]
    # Sums in another order: some ulps; a root near 0 of a product's cancellation is torch's own inaccuracy.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-3 if name == "cdist of many" else 1e-6)


def _kept(found, args, kwargs):
    dim = args[2] if len(args) == 3 else args[1]
    return found if kwargs.get("keepdim") else [part.unsqueeze(dim) for part in found]


class All(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.codebook = nn.Linear(6, 6), nn.Embedding(7, 6)
        self.register_buffer("edges", torch.linspace(-1, 1, 5))

    def forward(self, x, index):
        y = self.fc(x)
        nearest = torch.cdist(y, self.codebook.weight).argmin(-1)
        y = y + self.codebook(nearest) + torch.searchsorted(self.edges, x)
        y = y + y.cummax(1)[0] + y.cummin(1).values + torch.sigmoid(y).cumprod(1) + y.median(1, keepdim=True)[0]
        spread = torch.zeros(x.shape[0], 4, 6).scatter_reduce(1, index, y, "mean", include_self=False)
        loss = nn.functional.cross_entropy(y, index[:, 0], label_smoothing=0.1)
        return y + y.kthvalue(2, 1, keepdim=True)[0], spread, loss


def test_a_model_that_torch_cannot_export_is_exported(tmp_path):
    torch.manual_seed(0)
    prepared = qgraph.prepare(All(), "W4").eval()
    inputs = torch.randn(3, 5, 6), torch.randint(0, 4, (3, 5, 6))
    report = qgraph.export(prepared, tmp_path / "m.onnx", inputs, progress=False)
    assert report.dynamic and all("batch" in text for text in report.dynamic)
    assert {note.split(" ")[0] for note in report.notes if "written out" in note} == set(DECOMPOSITIONS)


class Density(nn.Module):
    """A mixture of two normal distributions, which check their arguments."""

    def __init__(self):
        super().__init__()
        self.weights, self.means = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x, y):
        parts = torch.distributions.Normal(self.means(x), 1.0)
        mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=self.weights(x)), parts)
        return mixture.log_prob(y)


def test_distributions_check_no_values_in_a_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # some libraries switch it off
    inputs = torch.randn(4, 6), torch.randn(4)
    prepared = qgraph.prepare(Density(), "W4", inputs).eval()
    qgraph.export(prepared, tmp_path / "m.onnx", inputs, progress=False)
    with pytest.raises(ValueError, match="constraint"):  # and do again after it
        torch.distributions.Normal(torch.zeros(2), -1.0)
