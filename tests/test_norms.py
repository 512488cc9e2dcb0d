"""The norms beside AGC and torch's own: values against formulas written out, map by map, in float64."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import agcseg
from agcseg import AGC2d, ConvUnit
from agcseg.nn import NORMS
from agcseg.nn.norms import AGCStd2d, DynamicErf2d, DynamicTanh2d, FRN2d, MeanOnlyBatchNorm2d, ScaledWS2d, center

GAIN = math.sqrt(2 / (1 - 1 / math.pi))
NEW = ("center", "agc_std", "mean_only", "frn", "ws", "dyt", "derf")


def filled(norm, channels=4, **options):
    """The norm in float64 with parameters that are neither 0 nor 1."""
    module = NORMS[norm](channels, **options).double()
    for i, parameter in enumerate(p for p in module.parameters() if p.requires_grad):
        parameter.data = torch.linspace(-0.6, 1.7 - i / 3, channels, dtype=torch.float64)[-len(parameter) :]
    return module


def map_by_map(module, z, formula):
    """`formula(values of a map, number of its filter)` for one sample and one filter after the other."""
    output = torch.empty_like(z)
    for n in range(z.shape[0]):
        for c in range(z.shape[1]):
            output[n, c] = formula(z[n, c], c)
    return output


def statistics(values):
    values = values.flatten().tolist()
    mean = sum(values) / len(values)
    return mean, sum((v - mean) ** 2 for v in values) / len(values), sum(v * v for v in values) / len(values)


def test_center():
    module, z = filled("center"), torch.randn(3, 4, 5, 7, dtype=torch.float64)
    expected = map_by_map(module, z, lambda v, c: (v - statistics(v)[0]) * module.weight[c] + module.bias[c])
    torch.testing.assert_close(module(z), expected, rtol=0, atol=1e-12)
    gain_only = filled("center", mean_scale=0.0)
    expected = z * gain_only.weight.view(4, 1, 1) + gain_only.bias.view(4, 1, 1)
    torch.testing.assert_close(gain_only(z), expected, rtol=0, atol=1e-12)


def test_center_does_not_train_lambda_and_is_fast():
    unit = ConvUnit(3, 4, norm=center)
    assert unit.is_fast
    optimizer = torch.optim.SGD(unit.parameters(), 0.1, 0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        unit(torch.randn(2, 3, 6, 6)).square().sum().backward()
        optimizer.step()
    assert unit.norm.mean_scale.tolist() == [1] * 4 and not torch.equal(unit.norm.weight, torch.ones(4))


@pytest.mark.parametrize("mean_scale", [-0.3, 0.0, 1.0])
def test_agc_std(mean_scale):
    module, z = filled("agc_std", eps=0.01), torch.randn(3, 4, 5, 7, dtype=torch.float64)
    nn.init.constant_(module.mean_scale, mean_scale)

    def formula(v, c):
        mean, variance, _ = statistics(v)
        return (v - mean_scale * mean) / math.sqrt(variance + 0.01) * module.weight[c] + module.bias[c]

    torch.testing.assert_close(module(z), map_by_map(module, z, formula), rtol=0, atol=1e-12)
    if mean_scale == 1:
        expected = F.instance_norm(z, weight=module.weight, bias=module.bias, eps=0.01)
        torch.testing.assert_close(module(z), expected, rtol=0, atol=1e-12)


def test_mean_only():
    module, z = filled("mean_only", momentum=0.3), 2 + torch.randn(3, 4, 5, 7, dtype=torch.float64)
    means = [statistics(z[:, c])[0] for c in range(4)]

    def formula(means):
        return lambda v, c: (v - means[c]) * module.weight[c] + module.bias[c]

    torch.testing.assert_close(module(z), map_by_map(module, z, formula(means)), rtol=0, atol=1e-12)
    running = [0.3 * mean for mean in means]
    torch.testing.assert_close(module.running_mean.tolist(), running, rtol=0, atol=1e-12)
    module(z)
    running = [0.7 * old + 0.3 * mean for old, mean in zip(running, means, strict=True)]
    module.eval()
    torch.testing.assert_close(module(z), map_by_map(module, z, formula(running)), rtol=0, atol=1e-12)
    torch.testing.assert_close(module.running_mean.tolist(), running, rtol=0, atol=1e-12)  # evaluation moves nothing
    assert list(module.state_dict()) == ["weight", "bias", "running_mean"]


def test_frn():
    module, z = filled("frn", eps=0.01), torch.randn(3, 4, 5, 7, dtype=torch.float64)

    def formula(v, c):
        return v / math.sqrt(statistics(v)[2] + 0.01) * module.weight[c] + module.bias[c]

    normalised = map_by_map(module, z, formula)
    torch.testing.assert_close(module(z), normalised, rtol=0, atol=1e-12)
    activated = map_by_map(
        module, normalised, lambda v, c: torch.where(v > module.threshold[c], v, module.threshold[c])
    )
    assert torch.equal(module.activate(normalised), activated)


def test_frn_replaces_the_relu():
    unit, x = ConvUnit(3, 4, norm=FRN2d), torch.randn(2, 3, 6, 6)
    nn.init.constant_(unit.norm.threshold, -0.5)
    assert unit(x).min().item() == -0.5
    network = agcseg.build("segnet", norm="frn", width=0.05, head_norm=True)  # behind the classifier: the norm alone
    nn.init.constant_(network.head_norm.threshold, 1e6)
    assert network(torch.randn(1, 3, 32, 32)).max() < 1e6


def test_ws():
    unit, x = ConvUnit(3, 4, norm=ScaledWS2d).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    nn.init.uniform_(unit.norm.weight)
    nn.init.uniform_(unit.norm.bias)
    filters = torch.empty_like(unit.conv.weight)
    for c in range(4):
        mean, variance, _ = statistics(unit.conv.weight[c])
        filters[c] = (unit.conv.weight[c] - mean) / math.sqrt(27 * variance) * GAIN * unit.norm.weight[c]
    expected = F.relu(F.conv2d(x, filters, unit.norm.bias, padding=1))
    torch.testing.assert_close(unit(x), expected, rtol=0, atol=1e-12)
    unit(x).sum().backward()
    assert unit.conv.weight.grad.isfinite().all() and unit.conv.weight.grad.abs().sum() > 0
    # a filter's scale and offset make no difference
    before = unit(x)
    unit.conv.weight.data.mul_(3).add_(0.2)
    torch.testing.assert_close(unit(x), before)


@pytest.mark.parametrize(("norm", "function"), [("dyt", math.tanh), ("derf", math.erf)])
def test_dynamic_tanh_and_erf(norm, function):
    module, z = filled(norm), torch.randn(2, 4, 3, 5, dtype=torch.float64)
    alpha, shift = module.alpha.item(), module.shift.item() if norm == "derf" else 0.0

    def formula(v, c):
        return v.clone().apply_(lambda x: function(alpha * x + shift)) * module.weight[c] + module.bias[c]

    assert alpha not in (0, 1)
    torch.testing.assert_close(module(z), map_by_map(module, z, formula), rtol=0, atol=1e-12)
    started = NORMS[norm](4)
    assert started.alpha.item() == 0.5 and getattr(started, "shift", torch.zeros(1)).item() == 0
    torch.testing.assert_close(started(torch.full((1, 4, 1, 1), 3.0)).flatten()[0].item(), function(1.5))


@pytest.mark.parametrize("norm", NEW)
def test_gradcheck(norm):
    unit = ConvUnit(2, 3, norm=lambda channels: filled(norm, channels), implementation="literal").double()
    parameters = dict(unit.named_parameters())
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)

    def function(x, *values):
        return torch.func.functional_call(unit, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters.values()))


@pytest.mark.parametrize("norm", [name for name in NEW if name != "mean_only"])
def test_sample_by_sample_in_training_and_evaluation(norm):
    unit, x = ConvUnit(3, 4, norm=NORMS[norm]).double(), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(unit(x), torch.cat([unit(sample) for sample in x.split(1)]), rtol=0, atol=1e-12)
    assert torch.equal(unit.train()(x), unit.eval()(x))


@pytest.mark.parametrize("norm", NEW)
@pytest.mark.parametrize("zero", [False, True])
def test_maps_of_one_pixel_and_of_zeros_stay_finite(norm, zero):
    x = torch.zeros(1, 3, 4, 4) if zero else torch.randn(1, 3, 1, 1)
    unit = ConvUnit(3, 4, norm=NORMS[norm])
    output = unit(x.requires_grad_())
    output.sum().backward()
    gradients = [x.grad, *(p.grad for p in unit.parameters() if p.requires_grad)]
    assert output.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("module", [AGCStd2d, MeanOnlyBatchNorm2d, FRN2d, DynamicTanh2d, DynamicErf2d])
def test_half_precision_is_reduced_in_float32(module):
    # 65,536 ones behind a large value: a half-precision sum would lose them
    x = torch.ones(1, 1, 256, 257, dtype=torch.bfloat16)
    x[..., 0] = 512
    output = module(1)(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), module(1).double()(x.double()), rtol=0.005, atol=0)


@pytest.mark.parametrize(
    ("network", "norm", "mean_scale"),
    [("segnet", "agc", 0.0), ("segnet", "agc", 0.5), ("segnet", "agc", 1.0), ("segnet", "center", 0.5),
     ("segnet", "agc_std", 0.5), ("classnet", "agc", 0.0), ("classnet", "agc", 0.5)],
)  # fmt: skip
def test_initial_lambda(network, norm, mean_scale):
    """Reaches every layer of both networks, from where both implementations give the same step."""
    size = (128, 128) if network == "classnet" else (32, 64)
    images, outputs = torch.randn(1, 3, *size, dtype=torch.float64), []
    for implementation in ("fast", "literal"):
        torch.manual_seed(0)
        built = agcseg.build(
            network, norm=norm, num_classes=3, width=0.03, norm_options={"mean_scale": mean_scale},
            implementation=implementation,
        ).double()  # fmt: skip
        layers = [module for module in built.modules() if isinstance(module, AGC2d)]
        assert len(layers) > 20 and all((layer.mean_scale == mean_scale).all() for layer in layers)
        output = built(images)
        output = output.classes if network == "classnet" else output
        output.square().sum().backward()
        outputs.append([output, *(p.grad for p in built.parameters() if p.grad is not None)])
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("norm", "options"), [("agc", {"mean_scale": "half"}), ("frn", {"eps": [1]}), ("mean_only", {"momentum": None})]
)
def test_options_of_the_wrong_kind(norm, options):
    (key,) = options
    with pytest.raises(agcseg.errors.UserError, match=f"norm '{norm}': {key}=.* must be like its default, "):
        agcseg.build("segnet", norm=norm, norm_options=options)


@pytest.mark.parametrize("change", [parametrizations.weight_norm, parametrizations.spectral_norm, None])
def test_filters_are_standardised_behind_what_makes_them(change):
    """Parametrised or pruned, they are standardised as they are then, and what they are made of learns."""
    torch.manual_seed(0)
    unit, x = ConvUnit(3, 4, norm=NORMS["ws"]).double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    if change:
        change(unit.conv)
    else:
        prune.random_unstructured(unit.conv, "weight", 0.5)
        unit(x)  # its hook makes the weight
    expected = F.conv2d(x, unit.norm.standardise(unit.conv.weight), padding=1)
    torch.testing.assert_close(unit(x), F.relu(unit.norm(expected)), rtol=0, atol=1e-12)
    originals = [parameter for name, parameter in unit.conv.named_parameters() if "orig" in name]
    unit(x).square().sum().backward()
    assert originals and all(parameter.grad.abs().sum() > 0 for parameter in originals)


def test_a_standardised_unit_is_copied_with_its_norm():
    unit = ConvUnit(3, 4, norm=NORMS["ws"])
    twin = copy.deepcopy(unit)
    twin.norm.eps = 1e9
    assert twin.conv.standardise.__self__ is twin.norm and list(twin.state_dict()) == list(unit.state_dict())
    x = torch.randn(1, 3, 4, 4)
    assert twin(x).abs().sum() < 1e-3 < unit(x).abs().sum()
