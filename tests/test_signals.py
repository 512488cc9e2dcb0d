"""Figures of the layers, on signals made by hand."""

import math

import pytest
import torch
from torch import nn

import agcseg
from agcseg import ConvUnit
from agcseg.nn import NORMS, layer_signals


def unit_of(bias=(0.0, -100.0, 0.0), mean_scale=(-0.5, 7.0, 1.5)):
    """Passes its three channels on; the second filter is dead."""
    unit = ConvUnit(3, 3, 1).double()
    nn.init.dirac_(unit.conv.weight)
    unit.norm.bias.data = torch.tensor(bias, dtype=torch.float64)
    unit.norm.mean_scale.data = torch.tensor(mean_scale, dtype=torch.float64)
    return unit


def test_by_hand():
    maps = torch.tensor([[1.0, 3.0], [1.0, -1.0], [0.0, 0.0]], dtype=torch.float64).view(1, 3, 1, 2)
    figures = layer_signals(unit_of(), maps)[""]
    # mean 2 of root mean square √5; mean 0; a map of zeros, which has no ratio
    assert figures["common_mode"] == pytest.approx((2 / math.sqrt(5) + 0) / 2)
    assert figures["dead"] == [False, True, True]  # λ·0 = 0 does not pass a ReLU
    assert figures["active"] == pytest.approx((1 + 0 + 0) / 3)
    assert figures["lambda_mean"] == figures["lambda_q50"] == -0.5 and figures["lambda_negative"] == 1


def test_lambda_leaves_dead_filters_out():
    figures = layer_signals(unit_of(), 2 + torch.randn(4, 3, 8, 8, dtype=torch.float64))[""]
    assert figures["dead"] == [False, True, False]
    expected = {"mean": 0.5, "std": 1.0, "min": -0.5, "q25": 0.0, "q50": 0.5, "q75": 1.0, "max": 1.5, "negative": 0.5}
    assert {key: figures[f"lambda_{key}"] for key in expected} == pytest.approx(expected)
    assert figures["lambda_above_1"] == 0.5


def test_all_filters_dead():
    figures = layer_signals(unit_of(bias=(-100.0,) * 3), torch.randn(1, 3, 4, 4, dtype=torch.float64))[""]
    assert figures["dead"] == [True] * 3 and figures["lambda_mean"] is None and figures["lambda_q50"] is None


@pytest.mark.parametrize("norm", NORMS)
def test_networks_of_any_norm_are_left_as_they_were(norm):
    network, images = agcseg.build("segnet", norm=norm, width=0.05), torch.randn(2, 3, 32, 64)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    figures = layer_signals(network, images)
    assert len(figures) == 25 and all(0 <= layer["common_mode"] <= 1 for layer in figures.values())
    assert all(layer["active"] >= 0 and len(layer["dead"]) > 0 for layer in figures.values())
    assert ("lambda_mean" in figures["encoder.0.0"]) == (norm in ("agc", "center", "agc_std"))
    assert network.training and all(torch.equal(state[key], value) for key, value in network.state_dict().items())
    units = [unit for unit in network.modules() if isinstance(unit, ConvUnit)]
    assert all(unit.implementation == "fast" and not unit.norm._forward_hooks for unit in units)


@pytest.mark.parametrize("how", ["a part", "a part's call", "the whole's call"])
def test_compiled_parts(how):
    network = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3), agcseg.AGC2d(3), nn.ReLU()) for _ in range(2))).eval()
    x = torch.randn(1, 3, 8, 8)
    expected = layer_signals(network, x)
    if how == "a part":
        network[1] = torch.compile(network[1], backend="eager")
    else:
        (network if "whole" in how else network[1]).compile(backend="eager")
    with torch.no_grad():
        network(x)
    assert layer_signals(network, x) == expected and len(expected) == 2


def test_a_compiled_network():
    network, x = nn.Sequential(nn.Conv2d(3, 4, 3), agcseg.AGC2d(4)), torch.randn(1, 3, 6, 6)
    compiled = torch.compile(network, backend="eager")
    compiled.eval()(x)
    assert [*layer_signals(compiled, x)] == ["1"]


def test_parts_in_evaluation_and_parts_for_training_only():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.unit, self.auxiliary, self.frozen = ConvUnit(3, 4), ConvUnit(3, 4), nn.BatchNorm2d(3).eval()

        def forward(self, images):
            maps = self.frozen(images)
            return (self.unit(maps), self.auxiliary(maps)) if self.training else self.unit(maps)

    network = Network()
    assert list(layer_signals(network, torch.randn(1, 3, 8, 8))) == ["frozen", "unit"]
    assert network.training and network.unit.training and not network.frozen.training


def test_classnet():
    figures = layer_signals(agcseg.build("classnet", width=0.05), torch.randn(1, 3, 128, 256))
    assert len(figures) == 54


def test_common_mode_at_initialisation():
    """Behind a ReLU most of a filter's output is its mean, but not behind the images."""
    torch.manual_seed(0)
    network = agcseg.build("segnet", width=0.25, norm_options={"mean_scale": 0.0})
    figures = layer_signals(network, torch.randn(1, 3, 64, 128))
    assert figures["encoder.0.0"]["common_mode"] < 0.2 < 0.5 < figures["encoder.2.1"]["common_mode"]


class Foreign(nn.Module):
    """Somebody else's network: layers named in another order than they run in, one of them twice, one without maps."""

    def __init__(self):
        super().__init__()
        self.last, self.agc = nn.BatchNorm2d(4), agcseg.AGC2d(4, mean_scale=0.5)
        self.convs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.unit, self.vector = ConvUnit(4, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.agc(self.convs(x)).relu()
        x = self.last(self.agc(x))
        return self.vector(self.unit(x).mean((2, 3)))


def test_any_network_in_the_order_of_execution():
    network = Foreign()
    assert list(layer_signals(network, torch.randn(2, 3, 8, 8))) == ["convs.1", "agc", "last", "unit"]
    conversion = agcseg.convert_batchnorm(network)
    assert conversion.fused == ["convs.1"]  # the others read something else too
    figures = layer_signals(network, torch.randn(2, 3, 8, 8))
    assert list(figures) == ["convs.1", "agc", "last", "unit"]
    assert all(layer["lambda_mean"] == (0.5 if name == "agc" else 1) for name, layer in figures.items())
    assert (figures["agc"]["height"], figures["agc"]["width"]) == (6, 6)


def test_figures_of_a_layer_alone_are_those_of_its_unit():
    unit, x = unit_of(), 2 + torch.randn(4, 3, 8, 8, dtype=torch.float64)
    alone = nn.Sequential(unit.conv, unit.norm, nn.ReLU(inplace=True))
    assert layer_signals(alone, x)["1"] == layer_signals(unit, x)[""]


def test_the_device_is_waited_for_once(monkeypatch):
    network, calls = agcseg.build("segnet", width=0.05), []
    for name in ("item", "tolist", "__bool__", "__float__"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, own=own, name=name: calls.append(name) or own(*a))
    assert len(layer_signals(network, torch.randn(2, 3, 32, 64))) == 25
    assert calls == ["tolist"]
