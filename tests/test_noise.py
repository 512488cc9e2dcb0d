"""Layer-wise noise: its moments, where it acts, and that nothing else changes."""

import copy
import io
import math

import pytest
import torch

import agcseg
from agcseg import ConvUnit
from agcseg.nn import NORMS
from agcseg.nn.noise import add_noise, noisy


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("gain", "shift"), [(0.5, 0.0), (0.0, 0.3), (0.5, 0.3)])
def test_moments(gain, shift):
    """Over 40,000 maps: the expectation is y, the variance gain²/3·y² + shift²/3·mean(y²)."""
    y = torch.tensor([[-1.0, 0.0], [0.5, 3.0]], dtype=torch.float64).expand(200, 200, 2, 2)
    noise = (noisy(y, gain, shift, generator()) - y).flatten(0, 1)
    expected = gain**2 / 3 * y[0, 0].square() + shift**2 / 3 * y[0, 0].square().mean()
    torch.testing.assert_close(noise.var(0), expected, rtol=0.02, atol=1e-12)
    assert (noise.mean(0).abs() < 4 * expected.sqrt() / 200 + 1e-12).all()
    assert noise.abs().max() <= gain * 3 + shift * math.sqrt(10.25 / 4)


def test_one_draw_for_each_map():
    y = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    noise = noisy(y, 0.1, 0.1, generator()) - y
    assert (noise == noise[:, :, :1, :1]).all() and len(noise[:, :, 0, 0].unique()) == 6


def test_gradient_does_not_flow_through_the_size_of_the_shift():
    y = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(noisy(y, 0.0, 0.9, generator()).sum(), y)
    assert torch.equal(gradient, torch.ones_like(y))
    scaled = noisy(y, 0.5, 0.9, generator())
    (gradient,) = torch.autograd.grad(scaled.sum(), y)
    assert torch.equal(gradient, gradient[..., :1, :1].expand_as(gradient)) and gradient[0, 0, 0, 0] != 1


def test_a_dead_map_stays_dead():
    assert torch.equal(noisy(torch.zeros(2, 3, 4, 4), 0.5, 0.5, generator()), torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize("norm", NORMS)
def test_units_are_noisy_in_training_only(norm):
    torch.manual_seed(0)
    unit, x = ConvUnit(3, 4, norm=NORMS[norm], implementation="literal"), torch.randn(2, 3, 6, 6)
    plain = unit(x)
    own = add_noise(unit, 0.5, 0.5, seed=1)
    state = own.get_state()
    first, second = unit(x), unit(x)
    assert not torch.equal(first, plain) and not torch.equal(first, second)
    own.set_state(state)
    assert torch.equal(unit(x), first)  # from the state of a checkpoint
    assert first.min() == 0 or norm == "frn"  # in front of the activation
    unit.eval()
    state, default = own.get_state(), torch.get_rng_state()
    evaluated = unit(x)
    if norm not in ("bn", "mean_only"):
        assert torch.equal(evaluated, plain)
    assert torch.equal(own.get_state(), state) and torch.equal(torch.get_rng_state(), default)


def test_fast_units_become_literal():
    network = agcseg.build("segnet", width=0.05)
    images = torch.randn(1, 3, 32, 32)
    expected = network(images)
    default = torch.get_rng_state()
    add_noise(network, 0.2, 0.2, seed=1)
    noisy_logits = network(images)
    assert torch.equal(torch.get_rng_state(), default)
    assert not torch.allclose(noisy_logits, expected, rtol=1e-2)
    torch.testing.assert_close(network.eval()(images), expected)
    noisy_logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_noise_is_drawn_once_where_outputs_are_computed_again():
    """A noisy unit gives something else the second time, so its output is kept whatever the budget."""
    images, found = torch.randn(1, 3, 128, 128), []
    for recompute in (0, 1 / 3):
        torch.manual_seed(0)
        network = agcseg.build("classnet", width=0.1, num_classes=3, recompute=recompute)
        add_noise(network, 0.2, 0.2, seed=1)
        network(images).classes.square().sum().backward()
        found.append([p.grad for p in network.parameters() if p.grad is not None])
    assert all(map(torch.equal, *found))


def test_a_noisy_network_can_be_copied_and_saved_whole():
    unit, x = ConvUnit(3, 4), torch.randn(2, 3, 6, 6)
    add_noise(unit, 0.5, 0.3, seed=0)
    file = io.BytesIO()
    torch.save(unit, file)
    file.seek(0)
    copied, loaded, expected = copy.deepcopy(unit), torch.load(file, weights_only=False), unit(x)
    assert torch.equal(copied(x), expected) and torch.equal(loaded(x), expected)  # each draws for itself
