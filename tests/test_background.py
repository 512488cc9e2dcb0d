"""Other backgrounds for AGC: each against a slow definition, in float64."""

import math

import pytest
import torch
from torch import nn

import agcseg
from agcseg import AGC2d, ConvUnit
from agcseg.errors import UserError
from agcseg.nn.background import BACKGROUNDS, BackgroundAGC2d, median, trimmed_mean, window_mean


def maps(n=2, c=3, h=5, w=8):
    return torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def slow_window(z, height, width):
    output = torch.empty_like(z)
    for i in range(z.shape[2]):
        for j in range(z.shape[3]):
            top, left = max(0, i - height // 2), max(0, j - width // 2)
            output[:, :, i, j] = z[:, :, top : i + height // 2 + 1, left : j + width // 2 + 1].mean((2, 3))
    return output


@pytest.mark.parametrize(
    ("window", "height", "width"), [(3, 3, 3), (5, 5, 5), (9, 9, 9), (0.5, 3, 5), (0.9, 5, 7), (0.01, 3, 3)]
)
def test_window(window, height, width):
    z = maps()
    torch.testing.assert_close(window_mean(z, window), slow_window(z, height, width), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [15, 17, 1001])
def test_a_large_window_is_the_map(window):
    """From 2·max(H, W) - 1 on, whatever the size of the map."""
    for z in (maps(), maps(h=1, w=1), maps(h=8, w=2)):
        whole, windowed = AGC2d(3).double(), BackgroundAGC2d(3, 1.0, "window", window).double()
        torch.testing.assert_close(windowed(z), whole(z), rtol=0, atol=1e-12)
        torch.testing.assert_close(windowed.float()(z.float()), whole.float()(z.float()), rtol=0, atol=1e-6)


def test_a_window_without_numbers():
    """As a third-party network is tried."""
    assert window_mean(torch.empty(2, 3, 8, 6, device="meta"), 0.5).shape == (2, 3, 8, 6)


def test_a_smaller_window_is_not():
    assert (window_mean(maps(), 13) - maps().mean((2, 3), keepdim=True)).abs().max() > 1e-3


def test_median_is_the_lower_one_and_has_no_gradient():
    z = torch.tensor([4.0, 1.0, 3.0, 2.0]).view(1, 1, 2, 2).requires_grad_()
    assert median(z).item() == 2 and not median(z).requires_grad
    odd = maps(h=3, w=5)
    for n in range(2):
        for c in range(3):
            assert median(odd)[n, c].item() == sorted(odd[n, c].flatten().tolist())[7]
    layer = BackgroundAGC2d(1, 0.5, "median")
    layer(z).sum().backward()
    assert z.grad.flatten().tolist() == [1] * 4  # of z alone, none through the median


def test_gradient_of_the_median_goes_to_one_position():
    """That of torch's own; of several equal values the first."""
    z = maps(h=3, w=4).requires_grad_()
    found, expected = median(z, gradient=True), z.flatten(2).median(2).values
    assert torch.equal(found.flatten(), expected.flatten()) and torch.equal(found, median(z))
    weights = maps(h=1, w=1)
    (gradient,) = torch.autograd.grad((found * weights).sum(), z)
    assert torch.equal(gradient, torch.autograd.grad((expected * weights[..., 0, 0]).sum(), z)[0])
    assert ((gradient != 0).sum((2, 3)) == 1).all()
    equal = torch.tensor([5.0, 2.0, 2.0, 1.0, 2.0, 7.0]).view(1, 1, 2, 3).requires_grad_()
    median(equal, gradient=True).sum().backward()
    assert equal.grad.flatten().tolist() == [0, 1, 0, 0, 0, 0]
    layer = BackgroundAGC2d(1, 0.5, "median", median_gradient=True)
    equal.grad = None
    layer(equal).sum().backward()
    assert equal.grad.flatten().tolist() == [1, -2, 1, 1, 1, 1]  # six times half of the background's is taken off
    assert str(layer).endswith("background=median, median_gradient=True)")


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.77, 1.0])
def test_trimmed_mean_and_its_gradient(quantile):
    z = maps(h=3, w=5).requires_grad_()
    counted = math.ceil(quantile * 15)
    background = trimmed_mean(z, quantile)
    for n in range(2):
        for c in range(3):
            low = sorted(z[n, c].flatten().tolist())[:counted]
            assert background[n, c].item() == pytest.approx(sum(low) / counted, abs=1e-12)
            (gradient,) = torch.autograd.grad(background[n, c].sum(), z, retain_graph=True)
            expected = (z[n, c] <= low[-1]).double() / counted
            torch.testing.assert_close(gradient[n, c], expected, rtol=0, atol=1e-12)
    if quantile == 1:
        torch.testing.assert_close(background, z.mean((2, 3), keepdim=True), rtol=0, atol=1e-12)


def test_a_constant_map_is_its_own_background():
    z = torch.full((1, 2, 4, 4), 3.0)
    for background in BACKGROUNDS:
        assert torch.equal(BackgroundAGC2d(2, 1.0, background)(z), torch.zeros_like(z))


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_layer(background):
    layer, z = BackgroundAGC2d(3, 0.75, background).double(), maps()
    layer.weight.data, layer.bias.data = torch.randn(2, 3, dtype=torch.float64)
    found = {"window": window_mean(z, 0.5), "median": median(z)}
    b = found.get(background, trimmed_mean(z, 0.5))
    expected = (z - 0.75 * b) * layer.weight.view(3, 1, 1) + layer.bias.view(3, 1, 1)
    torch.testing.assert_close(layer(z), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(z), torch.cat([layer(one) for one in z.split(1)]), rtol=0, atol=1e-12)
    assert torch.equal(layer.train()(z), layer.eval()(z))
    nn.init.zeros_(layer.mean_scale)
    torch.testing.assert_close(layer(z), z * layer.weight.view(3, 1, 1) + layer.bias.view(3, 1, 1))


@pytest.mark.parametrize("background", ["window", "median", "trimmed"])
def test_gradcheck(background):
    layer = BackgroundAGC2d(2, 0.7, background, median_gradient=True).double()
    z = maps(c=2, h=4, w=3).requires_grad_()
    parameters = dict(layer.named_parameters())

    def function(z, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (z,))

    assert torch.autograd.gradcheck(function, (z, *parameters.values()))


@pytest.mark.parametrize("background", ["median", "trimmed"])
def test_deterministic_algorithms(background):
    layer, z = BackgroundAGC2d(3, 1.0, background, median_gradient=True), maps().float().requires_grad_()

    def output_and_gradient():
        output = layer(z)
        return output, torch.autograd.grad(output.square().sum(), z)[0]

    plain = output_and_gradient()
    torch.use_deterministic_algorithms(True)
    try:
        assert all(map(torch.equal, output_and_gradient(), plain))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_half_precision(background):
    layer, z = BackgroundAGC2d(3, 1.0, background), maps(h=32, w=32).bfloat16()
    output = layer(z)
    assert output.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(z), output)
    torch.testing.assert_close(output.double(), layer.double()(z.double()), rtol=0.01, atol=0.01)


def test_only_the_map_is_fast():
    """The default is the class it always was; the others are never taken for it."""
    default, other = (
        agcseg.build("segnet", width=0.05, norm_options={"background": background}) for background in ("map", "median")
    )
    assert all(type(unit.norm) is AGC2d and unit.is_fast for unit in default.modules() if isinstance(unit, ConvUnit))
    assert not any(unit.is_fast for unit in other.modules() if isinstance(unit, ConvUnit))


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("network", ["segnet", "classnet"])
def test_trains_a_step(background, network):
    built = agcseg.build(network, num_classes=5, width=0.05, norm_options={"background": background})
    outputs = built(torch.randn(1, 3, 128, 128))
    (outputs.classes if network == "classnet" else outputs).square().mean().backward()
    gradients = [p.grad for p in built.parameters() if p.grad is not None]
    assert len(gradients) > 100 and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": "mode"}, "background='mode' is not known; choose from map, window, median, trimmed"),
        ({"background": "window", "window": 4}, "window=4 must be an odd number"),
        ({"background": "window", "window": 1}, "window=1 must be an odd number of positions from 3"),
        ({"background": "window", "window": 3.5}, "window=3.5 must be an odd number"),
        ({"background": "trimmed", "quantile": 0}, "quantile=0 must be above 0"),
        ({"background": "trimmed", "quantile": 1.1}, "quantile=1.1 must be above 0 and at most 1"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError) as error:
        agcseg.build("segnet", norm_options=options)
    assert message in str(error.value)
