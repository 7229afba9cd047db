"""What goes wrong says so, and leaves nothing behind: the messages, the files, the model."""

import errno
import inspect
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

import qgraph
from qgraph.errors import ExportError
from qgraph.exporters import onnx as exporter
from qgraph.exporters import write
from qgraph.exporters.onnx import export
from qgraph.exporters.probe import relative_difference


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(16, 24)
        self.fc2 = nn.Linear(24, 8)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return qgraph.prepare(Net(), "W4", (X,))


def refuses(*args, match, **kwargs):
    with pytest.raises(ExportError, match=match) as caught:
        export(*args, **kwargs)
    return caught.value


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_not_a_module(tmp_path):
    refuses({"a": 1}, tmp_path / "m.onnx", (X,), match="found a dict in place of the model.*qgraph.prepare")


def test_not_prepared(tmp_path):
    refuses(Net(), tmp_path / "m.onnx", (X,), match="Net that is not prepared.*qgraph.prepare")


def test_unknown_target(net, tmp_path):
    refuses(net, tmp_path / "m.onnx", (X,), target="tensorrt", match="target='tensorrt'.*'standard', 'ort'")


@pytest.mark.parametrize("opset", [9, 17, 99, "20"])
def test_opset_out_of_range(net, tmp_path, opset):
    refuses(net, tmp_path / "m.onnx", (X,), opset=opset, match=f"opset={opset!r}; expected 18 to")


@pytest.mark.parametrize("opset", [18, 21])
def test_opsets_that_are_written(net, tmp_path, opset):
    export(net, tmp_path / "m.onnx", (X,), opset=opset, dynamic_shapes={})
    found = {item.domain: item.version for item in onnx.load(tmp_path / "m.onnx").opset_import}
    assert found[""] == opset


def test_no_such_folder(net, tmp_path):
    refuses(net, tmp_path / "no" / "m.onnx", (X,), match="folder .*no does not exist.*create it")


def test_path_is_a_folder(net, tmp_path):
    refuses(net, tmp_path, (X,), match="is a folder; expected the path of a file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_folder(net, tmp_path):
    tmp_path.chmod(0o500)
    refuses(net, tmp_path / "m.onnx", (X,), match="cannot be written to")


def test_folder_that_refuses_new_files(net, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(write.tempfile, "mkdtemp", refuse)
    refuses(net, tmp_path / "m.onnx", (X,), match="cannot be written to .Permission denied")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_weight(tmp_path, value):
    net = qgraph.prepare(Net(), "W4", (X,))
    with torch.no_grad():
        net.fc2.weight[1, 2] = value
    refuses(net, tmp_path / "m.onnx", (X,), match=r"fc2.weight holds NaN or Inf \(1 of 192 values\)")
    assert left_in(tmp_path) == []


def test_example_inputs_that_the_model_rejects(net, tmp_path):
    error = refuses(
        net,
        tmp_path / "m.onnx",
        (torch.randn(3, 5),),
        match="itself fails on the example inputs: RuntimeError",
    )
    assert "forward" in {entry.name for entry in traceback_of(error.__cause__)}
    refuses(net, tmp_path / "m.onnx", (X, X), match=r"do not fit forward\(x\)")
    refuses(net, tmp_path / "m.onnx", (), example_kwargs={}, match="do not fit|no tensor")
    assert left_in(tmp_path) == []


def traceback_of(error):
    import traceback

    return traceback.extract_tb(error.__traceback__)


class Deciding(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x):
        if x.sum() > 0:  # the line that the message names
            return self.fc(x)
        return self.fc(-x)


def test_a_branch_on_data_names_the_users_line(tmp_path):
    net = qgraph.prepare(Deciding(), "W4", (X,))
    error = refuses(net, tmp_path / "m.onnx", (X,), match="torch.where")
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "the line that" in text)
    assert f"{Path(__file__).name}:{line}" in str(error)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
    ids=["full disk", "ctrl-c"],
)
@pytest.mark.parametrize("at", ["save", "replace"])
def test_an_existing_file_survives(net, tmp_path, monkeypatch, error, at):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"the user's old model")

    def fail(*args, **kwargs):
        raise error

    if at == "save":
        monkeypatch.setattr(write.os, "fsync", fail)
    else:
        monkeypatch.setattr(write.os, "replace", fail)
    with pytest.raises(ExportError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        export(net, path, (X,), dynamic_shapes={})
    assert isinstance(error, KeyboardInterrupt) or "no space is left" in str(caught.value)
    assert path.read_bytes() == b"the user's old model"
    assert left_in(tmp_path) == ["m.onnx"]


def test_data_file_and_model_go_together(net, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "EXTERNAL_ABOVE", 100)
    path = tmp_path / "m.onnx"
    report = export(net, path, (X,), dynamic_shapes={})
    assert left_in(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert report.file_bytes == path.stat().st_size + (tmp_path / "m.onnx.data").stat().st_size
    before = {name: (tmp_path / name).read_bytes() for name in left_in(tmp_path)}
    real = os.replace

    def fail_at_the_model(source, target):
        if Path(target) == path:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(write.os, "replace", fail_at_the_model)
    refuses(net, path, (X,), dynamic_shapes={}, match="Input/output error")
    assert {name: (tmp_path / name).read_bytes() for name in left_in(tmp_path)} == before


def damage(model: ir.Model, name: str, byte: int) -> None:
    """Change one stored byte of codes."""
    value = model.graph.initializers[name]
    array = value.const_value.numpy().copy()
    array.flat[byte] ^= 0x77
    value.const_value = ir.tensor(array, name=name)


def damage_every_file(name: str, monkeypatch, byte: int = 5) -> None:
    lower = exporter.lower

    def lower_wrongly(model, *args, **kwargs):
        lowered = lower(model, *args, **kwargs)
        damage(model, name, byte)
        return lowered

    monkeypatch.setattr(exporter, "lower", lower_wrongly)


@pytest.mark.parametrize("config", ["W4", "A8W4", "A4W4"])
def test_a_wrong_file_is_never_left(config, tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = qgraph.prepare(Net(), config, (X,))
    damage_every_file("fc2.weight.packed", monkeypatch)
    error = refuses(net, tmp_path / "m.onnx", (X,), match="does not compute what the model does")
    assert "the first layer that differs is fc2" in str(error)
    assert left_in(tmp_path) == []


def test_a_wrong_activation_quantizer_is_no_rounding_tie(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = qgraph.prepare(Net(), "A4W4", (X,))
    lower = exporter.lower

    def lower_wrongly(model, *args, **kwargs):
        lowered = lower(model, *args, **kwargs)
        rounding = [node for node in model.graph if node.op_type == "Round"][-1]
        rounding.op_type = "Floor"
        return lowered

    monkeypatch.setattr(exporter, "lower", lower_wrongly)
    error = refuses(net, tmp_path / "m.onnx", (X,), match="does not compute what the model does")
    assert "fc2" in str(error) and "quantizer" in str(error)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 12, batch_first=True)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]


def test_what_has_no_form_in_onnx_is_named(tmp_path):
    args = (torch.randn(3, 5, 8), torch.tensor([5, 3, 2]))
    net = qgraph.prepare(Packed(), "W4", args)
    refuses(net, tmp_path / "m.onnx", args, match="packed sequence.*pass the padded tensor")
    x = torch.randn(3, 5, 8)
    net = qgraph.prepare(nn.LSTM(8, 12, proj_size=4), "W4", (x,))
    refuses(net, tmp_path / "m.onnx", (x,), match="proj_size.*a Linear after it")


def test_the_model_is_left_as_it_was(tmp_path):
    torch.manual_seed(0)
    net = qgraph.prepare(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)), "A4W4")
    x = torch.randn(2, 1, 6, 6)
    net(x).sum().backward()
    net[1].eval()
    modes = {name: module.training for name, module in net.named_modules()}
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    grads = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    export(net, tmp_path / "m.onnx", (x,))
    assert torch.equal(torch.rand(3), expected)
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert all(torch.equal(parameter.grad, grads[name]) for name, parameter in net.named_parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_differences_are_measured_strictly():
    a = torch.tensor([1.0, float("nan"), float("inf"), -4.0])
    assert relative_difference(a, a.clone()) == 0
    assert relative_difference(a, torch.tensor([1.0, 0.0, float("inf"), -4.0])) == float("inf")
    assert relative_difference(a, torch.tensor([1.0, float("nan"), -float("inf"), -4.0])) == float("inf")
    assert relative_difference(a, torch.tensor([1.4, float("nan"), float("inf"), -4.0])) == pytest.approx(0.1)
    assert relative_difference(torch.zeros(0), torch.zeros(0)) == 0
    assert relative_difference(torch.zeros(2), torch.from_numpy(np.ones(2))) == 1


class FromNumber(nn.Module):
    """A number less a tensor of another type."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, mask):
        return self.fc(x) * (1.0 - mask)


def test_a_number_less_an_integer_tensor(tmp_path):
    args = (torch.randn(3, 4), torch.randint(0, 2, (3, 1)))
    report = export(qgraph.prepare(FromNumber(), "W4", args), tmp_path / "m.onnx", args)
    assert report.dynamic == ("x: 0=batch", "mask: 0=batch")
    assert any("rsub" in note for note in report.notes)


class NoTranslation(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return torch.linalg.eigvalsh(self.fc(x) @ x.mT)


def test_an_error_inside_a_captured_graph_names_the_line_that_it_came_from(tmp_path):
    x = torch.ones(4, 4)
    net = qgraph.prepare(NoTranslation(), "W4", (x,))
    first = inspect.getsourcelines(NoTranslation)[1]
    refuses(net, tmp_path / "m.onnx", (x,), match=rf"test_export_failures\.py:{first + 6} ")


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) + torch.randn_like(x)


def test_random_numbers_in_eval_are_named(tmp_path):
    x = torch.randn(3, 4)
    net = qgraph.prepare(Noisy(), "W4", (x,))
    first = inspect.getsourcelines(Noisy)[1]
    refuses(net, tmp_path / "m.onnx", (x,), match=rf"py:{first + 6} .*draws random numbers.*verify=False")
    assert not left_in(tmp_path)
    assert export(net, tmp_path / "m.onnx", (x,), verify=False).layers[0].path == "fc"


class Counting(nn.Module):
    """How often a layer is called is drawn by numpy, whose code is compiled."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(np.random.default_rng(0).poisson(x.abs().sum().item())):
            x = self.fc(x)
        return x


def test_an_error_in_compiled_code_names_the_users_line(tmp_path):
    net = qgraph.prepare(Counting(), "W4", (X[:1, :4],))
    first = inspect.getsourcelines(Counting)[1]
    refuses(net, tmp_path / "m.onnx", (X[:1, :4],), match=rf"{Path(__file__).name}:{first + 8}")


class QuietWhenTraced(nn.Module):
    """Under torch.export it leaves a layer out that eager runs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if torch.compiler.is_exporting():
            return self.a(x)
        y = self.b(self.a(x))
        return y if bool((y < 1e9).all()) else y * 0  # no graph can hold it


def test_a_site_that_tracing_leaves_out_is_named(tmp_path):
    x = torch.randn(3, 4)
    net = qgraph.prepare(QuietWhenTraced(), "W4", (x,))
    refuses(net, tmp_path / "m.onnx", (x,), match="1 quantized sites are not in the traced graph.*b.weight")


class Forces(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(self.fc(x).tanh().sum(), x)[0]


def test_a_gradient_inside_a_forward_is_named(tmp_path):
    x = torch.randn(3, 4)
    first = inspect.getsourcelines(Forces)[1]
    net = qgraph.prepare(Forces(), "W4", (x,))
    refuses(net, tmp_path / "m.onnx", (x,), match=rf"test_export_failures\.py:{first + 5} .*taken inside a forward")


class Picks(nn.Module):
    """Takes the best rows; all scores are within rounding of each other."""

    def __init__(self):
        super().__init__()
        self.score, self.out = nn.Linear(16, 1), nn.Linear(16, 16)

    def forward(self, x):
        scores = (self.score(x) * 1e-9 + 1).flatten().sin()
        best = scores.topk(4).indices
        return self.out(x[best])


def test_rows_picked_among_equal_scores_name_the_line(tmp_path):
    torch.manual_seed(0)
    line = inspect.getsourcelines(Picks.forward)[1] + 2
    x = torch.randn(64, 16)
    with pytest.raises(ExportError, match=rf"{Path(__file__).name}:{line} .*picks by the order of computed values"):
        export(qgraph.prepare(Picks().eval(), "W4", x), tmp_path / "model.onnx", (x,), progress=False)
    assert not list(tmp_path.iterdir())
