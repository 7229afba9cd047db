"""`compare`: what differs, where, and that nothing is left behind in the models."""

from __future__ import annotations

import json
import math

import onnx
import pytest
import torch
from torch import nn

import qgraph
from qgraph.errors import InspectError
from tests.analysis.planted import PLANTED
from tests.models import CASES, CNN, GPT, Recurrent

EXACT = 90  # dB: float32 keeps 24 bits, which is 144 dB of one rounding; sums of a few hundred values cost some


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", PLANTED)
def test_a_model_is_equal_to_itself_and_to_its_prepared_form_switched_off(name):
    case = PLANTED[name]
    model, inputs = case.make(), case.inputs()
    prepared = qgraph.prepare(model, "A4W2", inputs)
    with qgraph.disabled(prepared):
        found = qgraph.compare(model, prepared, inputs)
    assert {row.snr_db for row in found.rows} == {math.inf} and found.rows[-1].path == ""
    assert found.first_drop(1000) is None and not found.only_a and not found.only_b


def test_the_numbers_are_those_of_their_definitions():
    model, x = CNN().eval(), torch.randn(2, 3, 16, 16)
    prepared = qgraph.prepare(model, "A4W2", (x,)).eval()
    found = qgraph.compare(model, prepared, x)
    with torch.no_grad():
        a, b = (m.conv1(x).double() for m in (model, prepared))
    row = found["conv1"]
    assert row.snr_db == pytest.approx(10 * math.log10(a.square().sum() / (a - b).square().sum()), abs=1e-4)
    assert row.cosine == pytest.approx(float(nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)))
    assert row.max_error == pytest.approx(float((a - b).abs().max()))
    assert (row.kind, row.shape) == ("Conv2d", (2, 8, 16, 16))
    assert [r.path for r in found.rows][:3] == ["conv1", "bn1", "relu"]


def test_a_module_called_twice_has_a_row_for_each_call():
    case = CASES["twice"]
    model, inputs = case.make(), case.inputs(0)
    other = case.make()
    other.load_state_dict(model.state_dict())
    calls = []
    found = qgraph.compare(model, model, inputs)
    assert [row.name for row in found.rows] == ["fc", "fc (call 2)", "out", "the model"]
    other.fc.register_forward_hook(lambda m, args, y: calls.append(y) or (y if len(calls) == 1 else y + 10))
    found = qgraph.compare(model, other, inputs)
    assert found.rows[0].snr_db == math.inf and found.first_drop(50).name == "fc (call 2)"
    assert found["fc"] is found.rows[1]


def test_models_are_left_as_they_were():
    case = PLANTED["cnn"]
    model, inputs = case.make(), case.inputs()
    prepared = qgraph.prepare(model, "A4W2", inputs)
    prepared.bn1.eval()
    prepared(*inputs).sum().backward()
    state = {k: v.clone() for k, v in prepared.state_dict().items()}
    grads = [p.grad.clone() for p in prepared.parameters()]
    random = torch.get_rng_state()
    qgraph.compare(model, prepared, inputs)
    with pytest.raises(InspectError):
        qgraph.compare(model, prepared, torch.ones(1, 5, 16, 16))
    assert prepared.training and model.training and not prepared.bn1.training and prepared.bn2.training
    assert all(torch.equal(state[k], v) for k, v in prepared.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, prepared.parameters(), strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks for m in (*prepared.modules(), *model.modules()))
    assert qgraph.inspect(prepared).coverage.guard_misses == 0


def test_two_configs_and_two_checkpoints():
    case = PLANTED["transformer"]
    model, inputs = case.make(), case.inputs()
    rough, fine = (qgraph.prepare(model, config, inputs) for config in ("W1", "W8"))
    losses = [qgraph.compare(model, side, inputs)[""].snr_db for side in (rough, fine)]
    assert losses[0] < losses[1]
    assert "at W1" in str(qgraph.compare(rough, fine, inputs))
    other = qgraph.prepare(model, "W8", inputs)
    with torch.no_grad():
        other.blocks[0]["mlp"][2].weight.mul_(1.5)
    assert qgraph.compare(fine, other, inputs).first_drop(60).path == "blocks.0.mlp.2"


def test_keyword_inputs_and_wrapped_models():
    case = PLANTED["transformer"]
    model, inputs = case.make(), case.inputs()
    prepared = qgraph.prepare(model, "W2", inputs)
    found = qgraph.compare(model, torch.nn.DataParallel(prepared), {"ids": inputs[0]})
    assert found == qgraph.compare(model, prepared, inputs) and len(found.rows) > 20
    assert not any(m._forward_hooks for m in prepared.modules())


def exported(model, config, x, path, target="ort"):
    prepared = qgraph.prepare(model, config, x).eval()
    qgraph.export(prepared, path, x, target=target, verify=False, progress=False)
    return prepared


def test_a_standard_file_is_what_it_was_made_from_until_a_layer_changes(tmp_path):
    x, path = (torch.randn(2, 3, 16, 16),), tmp_path / "m.onnx"
    prepared = exported(CNN(), "W4", x, path, "standard")
    found = qgraph.compare(prepared, path, x)
    assert {row.path for row in found.rows} == {"conv1", "bn1", "relu", "conv2", "bn2", "fc", ""}
    assert found.only_a == () and found.only_b == ()  # a dropout does nothing in eval
    assert found.worst.snr_db > EXACT and qgraph.compare(path, prepared, x).worst.snr_db > EXACT
    with torch.no_grad():
        prepared.conv2.weight.mul_(2)
    assert qgraph.compare(path, prepared, x).first_drop(EXACT).path == "conv2"


def test_a_file_with_recurrent_layers(tmp_path):
    x = (torch.randint(0, 20, (7, 7)),)  # batch and time of one size
    prepared = exported(Recurrent(), "W4", x, tmp_path / "m.onnx")
    found = qgraph.compare(prepared, tmp_path / "m.onnx", x)
    assert {row.path for row in found.rows} == {"emb", "lstm", "gru", "head", ""}
    assert found.worst.snr_db > EXACT, str(found)


def test_modules_inside_functions_of_a_file_are_found(tmp_path):
    x, path = (torch.randint(0, 65, (2, 16)),), tmp_path / "gpt.onnx"
    prepared = exported(GPT(65, 64, 4), "W1-2:4", x, path)
    assert onnx.load(path).functions
    found = qgraph.compare(prepared, path, x)
    containers = (nn.ModuleList, nn.ModuleDict)
    modules = {path: m for path, m in prepared.named_modules() if "qgraph" not in path}
    inner = {path for path, module in modules.items() if not isinstance(module, containers)}
    assert {row.path for row in found.rows} == inner >= {"wte", "wpe", "head", "blocks.2.attn", "blocks.3.mlp.1"}
    assert found.only_a == () and found.only_b == ()
    assert found.worst.snr_db > EXACT, str(found)
    files = qgraph.compare(path, path, x)
    assert {row.snr_db for row in files.rows} == {math.inf} and inner <= {row.path for row in files.rows}


class Rotated(nn.Module):
    """Two tensors of one shape, and both the same for all inputs."""

    def forward(self, x):
        angles = torch.arange(x.shape[1], dtype=torch.float32).outer(torch.ones(x.shape[2]))
        return angles.cos(), angles.sin()


class Mixed(nn.Module):
    """A weight of its own beside children."""

    def __init__(self):
        super().__init__()
        self.w, self.norm = nn.Parameter(torch.randn(16, 16)), nn.LayerNorm(16)

    def forward(self, x):
        return self.norm(x @ self.w)


class Sliced(nn.Module):
    def __init__(self):
        super().__init__()
        self.rotary, self.layers = Rotated(), nn.ModuleList(Mixed() for _ in range(4))

    def forward(self, x):
        cos, sin = self.rotary(x)
        for layer in (*self.layers[:2], *self.layers[-1:]):
            x = layer(x * cos + sin)
        return x


@pytest.mark.parametrize("target", ["ort", "standard", "qdq"])
def test_modules_with_several_outputs_own_weights_and_in_slices_are_found(target, tmp_path):
    x, path = (torch.randn(2, 5, 16),), tmp_path / "m.onnx"
    found = qgraph.compare(exported(Sliced(), "A8W4", x, path, target), path, x)
    used = {f"layers.{i}{child}" for i in (0, 1, 3) for child in ("", ".norm")}
    assert {row.path for row in found.rows} == used | {"", "rotary"}
    assert found.only_a == () and found.only_b == () and found.worst.snr_db > EXACT, str(found)


def test_equal_infinities_are_no_difference_and_a_lone_one_is():
    class Masked(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value, self.act = value, nn.Identity()

        def forward(self, x):
            return self.act(x.masked_fill(x > 1, self.value)).clamp(-1, 1)

    x = torch.randn(4, 8)
    assert qgraph.compare(Masked(-math.inf), Masked(-math.inf), x)["act"].snr_db == math.inf
    found = qgraph.compare(Masked(0.0), Masked(-math.inf), x)
    assert "infinite in b" in found["act"].problem and found[""].problem is None


def test_the_result_as_text_and_as_data():
    case = PLANTED["cnn"]
    model, inputs = case.make(), case.inputs()
    found = qgraph.compare(model, qgraph.prepare(model, "A4W1", inputs), inputs)
    text = str(found)
    assert "a: CNN\nb: CNN at A4W1" in text and "conv2" in text and f"lowest: {found.worst.name} at" in text
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [row["path"] for row in data["layers"]] == [row.path for row in found.rows]
    same = qgraph.compare(model, model, inputs).to_dict()["layers"][0]
    assert same["equal"] and same["snr_db"] is None


def test_wrong_use_is_said(tmp_path):
    x = torch.randn(2, 3, 16, 16)
    model = CNN()
    with pytest.raises(InspectError, match="no module in common: a has conv1"):
        qgraph.compare(model, nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), x)
    wider = CNN()
    wider.conv2 = nn.Conv2d(8, 12, 5, stride=2)
    with pytest.raises(InspectError, match=r"'conv2' gives \(2, 12, 7, 7\) in a .*\(2, 12, 6, 6\) in b"):
        qgraph.compare(model, wider, x)
    with pytest.raises(InspectError, match=r"a \(CNN\) does not run on the inputs: RuntimeError"):
        qgraph.compare(model, model, torch.randn(2, 4, 16, 16))
    with pytest.raises(InspectError, match="do not fit forward"):
        qgraph.compare(model, model, (x, x))
    with pytest.raises(InspectError, match="hold no tensor"):
        qgraph.compare(model, model, (3,))
    with pytest.raises(InspectError, match="the inputs hold no values"):
        qgraph.compare(nn.Linear(3, 2), nn.Linear(3, 2), torch.ones(0, 3))
    with pytest.raises(InspectError, match="b is a int"):
        qgraph.compare(model, 3, x)
    with pytest.raises(InspectError, match="no such file"):
        qgraph.compare(model, tmp_path / "none.onnx", x)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "theirs", [], [])), tmp_path / "theirs.onnx")
    with pytest.raises(InspectError, match=r"expected a file written by qgraph\.export"):
        qgraph.compare(model, tmp_path / "theirs.onnx", x)
    ours = tmp_path / "ours.onnx"
    qgraph.export(qgraph.prepare(nn.Linear(3, 2), "W4", torch.randn(1, 3)), ours, (torch.randn(1, 3),), progress=False)
    assert qgraph.compare(ours, ours, torch.randn(1, 3).double()).worst.snr_db == math.inf  # files take float32
    with pytest.raises(InspectError, match=r"takes input, and the inputs hold x"):
        qgraph.compare(model, ours, x)
    with pytest.raises(InspectError, match="does not run on the inputs"):
        qgraph.compare(ours, ours, torch.randn(2, 4))


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_comparison_is_drawn(kind, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(16, 8)
    found = qgraph.compare(model, qgraph.prepare(model, "W2", x), x)
    path = found.plot(tmp_path / f"layers.{kind}", threshold=10.0)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if kind == "png" else b"<?xml") and not list(tmp_path.glob(".*"))
    with pytest.raises(InspectError, match=r"found the suffix '\.txt'; expected one of \.png"):
        found.plot(tmp_path / "layers.txt")
    with pytest.raises(InspectError, match="its folder does not exist"):
        found.plot(tmp_path / "none" / "layers.png")


def test_a_frozen_model_is_the_prepared_one():
    torch.manual_seed(0)
    model, x = CNN(), torch.randn(2, 3, 16, 16)
    prepared = qgraph.prepare(model, "A8W4", x).eval()
    with torch.no_grad():
        prepared(x)
    frozen = qgraph.freeze(prepared)
    found = qgraph.compare(prepared, frozen, x)
    assert found.worst.snr_db > 100 and not found.only_a and not found.only_b
    assert qgraph.compare(model, frozen, x).first_drop(60) is not None
