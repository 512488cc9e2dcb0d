"""SegNet's shape, counts, initial values, and the door."""

import contextlib
import gc
import math
import weakref

import pytest
import torch
from torch import nn

import agcseg
from agcseg import AGC2d, ConvUnit
from agcseg.nn import INITS, NORMS
from agcseg.nn.init import initialise
from agcseg.training.machine import keeping


def count_parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("norm", "parameters"), [("bn", 29_446_035), ("agc", 29_453_971), ("none", 29_438_099)])
def test_segnet_counts(norm, parameters):
    network = agcseg.build("segnet", norm=norm, num_classes=19)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert count_parameters(network) == parameters
    assert len(convolutions) == 26 and all(conv.kernel_size == (3, 3) for conv in convolutions)
    assert sum(isinstance(m, nn.BatchNorm2d | AGC2d) for m in network.modules()) == (0 if norm == "none" else 25)
    assert convolutions[-1].bias is not None and convolutions[-1].out_channels == 19
    assert all((conv.bias is not None) == (norm == "none") for conv in convolutions[:-1])


def test_segnet_widths():
    network = agcseg.build("segnet", norm="none")
    widths = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert widths[:13] == [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    assert widths[13:] == [512, 512, 512, 512, 512, 256, 256, 256, 128, 128, 64, 64, 19]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("init", INITS)
def test_every_norm_and_init_builds_and_trains_a_step(norm, init):
    network = agcseg.build("segnet", norm=norm, num_classes=5, width=0.1, init=init)
    logits = network(torch.randn(2, 3, 64, 32))
    assert logits.shape == (2, 5, 64, 32)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)


def test_minibatch_is_its_samples_one_by_one():
    network = agcseg.build("segnet", norm="agc", width=0.1, init="he_centered").double()
    images = torch.randn(3, 3, 32, 64, dtype=torch.float64)
    whole = network(images)
    torch.testing.assert_close(whole, torch.cat([network(image) for image in images.split(1)]), rtol=0, atol=1e-10)
    whole.sum().backward()
    summed = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    for image in images.split(1):
        network(image).sum().backward()
    for p, gradient in zip(network.parameters(), summed, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-6, atol=1e-8)


def test_train_equals_eval_with_agc():
    network, images = agcseg.build("segnet", norm="agc", width=0.1), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network.train()(images), network.eval()(images))


def test_deterministic_algorithms():
    network, images = agcseg.build("segnet", norm="agc", width=0.1), torch.randn(1, 3, 32, 64)
    plain = network(images)
    torch.use_deterministic_algorithms(True)
    try:
        deterministic = network(images)
        deterministic.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(plain, deterministic)


@pytest.mark.parametrize(("init", "gain"), [("he", math.sqrt(2)), ("he_centered", math.sqrt(2 / (1 - 1 / math.pi)))])
def test_he(init, gain):
    torch.manual_seed(0)
    weight = agcseg.build("segnet", init=init).encoder[3][1].conv.weight
    assert weight.std().item() == pytest.approx(gain / math.sqrt(9 * 512), rel=0.01)


def test_identity_init():
    network = agcseg.build("segnet", norm="agc", width=0.1, init="identity", norm_options={"mean_scale": 0.0})
    units = [m for m in network.modules() if isinstance(m, ConvUnit)]
    assert sum(unit.identity for unit in network.encoder.modules() if isinstance(unit, ConvUnit)) == 8
    decoder = [m for m in network.decoder.modules() if isinstance(m, ConvUnit) and m.identity]
    assert sum(unit.conv.in_channels == unit.conv.out_channels for unit in decoder) == 4
    assert sum(unit.conv.in_channels > unit.conv.out_channels for unit in decoder) == 3
    assert not units[0].identity
    maps = torch.rand(1, units[0].conv.in_channels, 32, 32)
    first = network.encoder[0][0](maps)
    assert torch.equal(network.encoder[0](maps)[0], first)  # λ=0: a stage is its first convolution


def test_identity_of_parametrised_convolutions():
    unit = ConvUnit(4, 4, identity=True)
    torch.nn.utils.parametrizations.weight_norm(unit.conv)
    initialise(unit, "identity")
    impulse = torch.nn.init.dirac_(torch.empty(4, 4, 3, 3))
    torch.testing.assert_close(unit.conv.weight.detach(), impulse)


def test_head_norm():
    network = agcseg.build("segnet", norm="agc", width=0.1, head_norm=True)
    assert sum(isinstance(m, AGC2d) for m in network.modules()) == 26


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "segnt"}, "network='segnt' is not known; choose from segnet"),
        ({"norm": "batch"}, "norm='batch' is not known; choose from agc, bn, group, instance, layer, none"),
        ({"init": "xavier"}, "init='xavier' is not known; choose from he, he_centered, identity"),
        ({"width": 0}, "width=0 must be positive"),
        ({"norm": "bn", "norm_options": {"epz": 1}}, "norm 'bn' has no option epz; it takes eps, momentum"),
        ({"depth": 3}, "network 'segnet' has no option depth; it takes in_channels, head_norm, recompute"),
    ],
)
def test_the_door_names_what_there_is(arguments, message):
    with pytest.raises(ValueError) as error:
        agcseg.build(**{"network": "segnet", **arguments})
    assert message in str(error.value)


def test_a_callable_is_a_norm():
    network = agcseg.build("segnet", norm=lambda channels: nn.GroupNorm(1, channels), width=0.1)
    assert sum(isinstance(m, nn.GroupNorm) for m in network.modules()) == 25


def test_wrong_size():
    with pytest.raises(ValueError, match=r"multiples of 32; got \(48, 64\)"):
        agcseg.build("segnet", width=0.1)(torch.zeros(1, 3, 48, 64))


@pytest.mark.parametrize("norm", ["agc", "bn"])
@pytest.mark.parametrize("counted", [False, True])
def test_a_forward_without_backward_leaves_nothing_in_memory(norm, counted, monkeypatch):
    """Such as one that ended for lack of memory, before a smaller minibatch is tried."""
    monkeypatch.setattr("agcseg.nn.fast.SMALL", 0)
    network, left = agcseg.build("segnet", num_classes=3, norm=norm, width=0.05), []
    for unit in network.modules():
        if isinstance(unit, ConvUnit):
            unit.register_forward_hook(lambda unit, _, output: left.append(weakref.ref(_first(output))))
    with keeping(network) if counted else contextlib.nullcontext():
        network(torch.randn(1, 3, 32, 32))
    gc.collect()
    assert left and not any(maps() is not None for maps in left)


def _first(output):
    return output[0] if isinstance(output, tuple) else output
