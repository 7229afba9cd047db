"""One bad layer of a model is found by `compare`, by `sensitivity` and by `monitor`."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgraph
from qgraph.errors import InspectError
from tests.analysis.planted import DEFECTS, PLANTED, WEIGHT_DEFECTS, planted

# dB that the layers before it keep: at 8 bits, and at 4 bits a tensor
THRESHOLDS = {defect: 17 if defect in WEIGHT_DEFECTS else 25 for defect in DEFECTS}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def distance(model, inputs):
    """An `evaluate`: how far a model is from the float one."""
    with torch.no_grad():
        wanted = model.eval()(*inputs)

    def evaluate(prepared):
        prepared.eval()
        with torch.no_grad():
            return F.mse_loss(prepared(*inputs), wanted)

    return evaluate


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("defect", DEFECTS)
def test_compare_has_it_as_the_first_that_drops(name, defect):
    model, prepared, inputs = planted(name, defect)
    layer = PLANTED[name].layer
    found = qgraph.compare(model, prepared, inputs)
    assert found.first_drop(THRESHOLDS[defect]).path == layer, str(found)
    if defect == "nan":
        row = found[layer]
        assert "NaN in b" in row.problem and row.snr_db == -math.inf
        assert f"first not finite: {layer}: " in str(found)
    else:
        assert not any(row.problem for row in found.rows)


@pytest.mark.parametrize("how", ["quantized", "float"])
@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("defect", DEFECTS)
def test_sensitivity_ranks_it_first(name, defect, how):
    model, prepared, inputs = planted(name, defect)
    layer = PLANTED[name].layer
    if defect == "nan":
        with pytest.raises(
            InspectError, match=f"evaluate gives nan, with {layer} alone" if how == "quantized" else "nan"
        ):
            qgraph.sensitivity(prepared, distance(model, inputs), how=how)
        return
    found = qgraph.sensitivity(prepared, distance(model, inputs), how=how, lower_is_better=True)
    assert found.worst.name == layer and found.worst.cost > 2 * max(0.0, found.layers[1].cost), str(found)


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("defect", DEFECTS)
def test_monitor_names_it_alone(name, defect):
    _, prepared, inputs = planted(name, defect)
    case = PLANTED[name]
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-4)
    with qgraph.monitor(prepared, every=3) as watch:
        for _ in range(3):
            prepared(*inputs).square().mean().backward()
            watch.step()
            if defect != "nan":  # which one step would spread
                optimizer.step()
            optimizer.zero_grad()
    found = watch.summary()
    assert found.worst is not None and found.worst.site == f"{case.layer}.{case.weight}", str(found)
    sick = {symptom.site for symptom in found.symptoms if "gradient" not in symptom.found}
    assert sick == {found.worst.site}, str(found)


def with_nan(name):
    """A model, it prepared with one NaN in the planted weight, inputs, and the weight's name."""
    case = PLANTED[name]
    model, inputs = case.make(), case.inputs()
    prepared = qgraph.prepare(model, "W4", inputs)
    site = f"{case.layer}.{case.weight}"
    with torch.no_grad():
        prepared.get_parameter(site).view(-1)[0] = math.nan
    return model, prepared, inputs, site


@pytest.mark.parametrize("name", PLANTED)
def test_a_weight_with_nan_is_named_by_all_three(name):
    model, prepared, inputs, site = with_nan(name)
    assert qgraph.compare(model, prepared, inputs).first_drop(0).path == PLANTED[name].layer
    with pytest.raises(InspectError, match=f"nan for the float model, all quantizers off .not finite: {site}"):
        qgraph.sensitivity(prepared, distance(model, inputs))
    watch = qgraph.monitor(prepared, every=3)
    for _ in range(3):
        prepared(*inputs).sum().backward()
        watch.step()
    worst = watch.summary().worst
    assert worst.site == site and worst.found.startswith("1 of ") and "of the weight are not finite" in worst.found


@pytest.mark.parametrize("name", PLANTED)
def test_the_weight_that_a_nan_comes_from_is_in_front_though_a_step_spreads_it(name):
    _, prepared, inputs, site = with_nan(name)
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-3)
    watch = qgraph.monitor(prepared, every=3)
    for _ in range(3):
        prepared(*inputs).sum().backward()
        watch.step()
        optimizer.step()
    found = watch.summary()
    assert len({symptom.site for symptom in found.symptoms}) > 1
    assert (found.worst.site, found.worst.first_step, found.worst.last_step) == (site, 0, 2)


@pytest.mark.parametrize("name", PLANTED)
def test_a_weight_that_is_lost_is_found(name):
    case = PLANTED[name]
    model, inputs = case.make(), case.inputs()
    prepared = qgraph.prepare(model, "W8", inputs)
    nn.init.constant_(prepared.get_parameter(f"{case.layer}.{case.weight}"), 0.01)
    assert qgraph.compare(model, prepared, inputs).first_drop(25).path == case.layer
    watch = qgraph.monitor(prepared, every=3)
    for _ in range(3):
        prepared(*inputs)
        watch.step()
    found = watch.summary()
    assert {symptom.path for symptom in found.symptoms} == {case.layer} and found.worst.kind == "dead groups"
