"""GEMS against gradients normalised by hand, in float64."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import agcseg
from agcseg import ConvUnit
from agcseg.errors import UserError
from agcseg.nn import NORMS
from agcseg.nn.gems import GATES, GEMS, MODES, SEPARATE

PER_MAP = [name for name in NORMS if isinstance(ConvUnit(3, 4, norm=NORMS[name]).norm, SEPARATE)]


def make(norm="agc", n=4, seed=0, kernel_size=3):
    """A unit whose filters are active on different shares of its maps, and its input."""
    torch.manual_seed(seed)
    unit = ConvUnit(3, 5, kernel_size, norm=NORMS[norm], implementation="literal").double()
    bias = unit.conv.bias if norm == "none" else unit.norm.bias
    bias.data = torch.tensor([-1.0, -0.5, 0.0, 0.5, 9.0], dtype=torch.float64)
    if norm == "frn":
        nn.init.constant_(unit.norm.threshold, 0.1)
    if norm in ("dyt", "derf"):  # bounded by γ
        nn.init.constant_(unit.norm.weight, 3)
    return unit, torch.randn(n, 3, 6, 8, dtype=torch.float64)


def gradients(unit, x, loss=lambda output: output.square().mean()):
    unit.zero_grad()
    loss(unit(x)).backward()
    return {name: p.grad.clone() for name, p in unit.named_parameters() if p.requires_grad}


def scaled(unit, x, **options):
    unit = copy.deepcopy(unit)
    gems = GEMS(unit, **options)
    unit.zero_grad()
    unit(x).square().mean().backward()
    gems.scale_gradients()
    return {name: p.grad for name, p in unit.named_parameters() if p.requires_grad}, gems


def gate(unit, x):
    return (unit(x) > (unit.norm.threshold.view(-1, 1, 1) if hasattr(unit.norm, "threshold") else 0)).double()


def along(factor, gradient):
    return factor.view(-1, *[1] * (gradient.dim() - 1))


@pytest.mark.parametrize("norm", [name for name in NORMS if name not in ("group", "layer", "dyt", "derf")])  # these mix
def test_gradient_of_the_mean_over_active_points(norm):
    """The loss is a mean over all points; scaled, it is for each filter the mean over its active ones."""
    unit, x = make(norm)
    plain, (found, gems) = gradients(unit, x), scaled(unit, x, limit=math.inf)
    active = gate(unit, x).sum((0, 2, 3))
    assert (active > 0).all() and active.min() < active.max()
    for c in range(5):
        mean = gradients(unit, x, lambda output, c=c: output[:, c].square().sum() / (5 * active[c]))
        for name, gradient in found.items():
            expected = plain if name == "norm.threshold" else mean
            torch.testing.assert_close(gradient[c], expected[name][c], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gems.factors[""], 4 * 6 * 8 / active)


def test_a_saturated_half_changes_nothing():
    """Samples that no filter reacts to halve the plain gradient of the mean and leave the scaled one as it is."""
    unit, x = make("none")
    silent = torch.zeros_like(x)
    unit.conv.bias.data -= 20
    unit.conv.weight.data *= 20
    both = torch.cat([x, silent])
    assert gate(unit, silent).sum() == 0 < gate(unit, x).sum()
    options = {"limit": math.inf}
    for name, gradient in gradients(unit, x).items():
        torch.testing.assert_close(gradients(unit, both)[name], gradient / 2, rtol=1e-12, atol=0)
        torch.testing.assert_close(scaled(unit, both, **options)[0][name], scaled(unit, x, **options)[0][name])


@pytest.mark.parametrize("mode", MODES)
def test_all_points_active(mode):
    unit, x = make("agc")
    unit.norm.bias.data.fill_(100)
    found, gems = scaled(unit, x, mode=mode)
    assert gems.factors[""].tolist() == [1] * 5
    for name, gradient in gradients(unit, x).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_dead_filter(mode):
    unit, x = make("agc")
    unit.norm.bias.data[1] = -100
    found, gems = scaled(unit, x, mode=mode, limit=math.inf)
    assert gems.factors[""][1] == 1
    assert all((gradient[1] == 0).all() and gradient.isfinite().all() for gradient in found.values())


def test_limit():
    unit, x = make("agc")
    free, bounded = (scaled(unit, x, limit=limit)[1].factors[""] for limit in (math.inf, 2.0))
    assert free.max() > 2 and torch.equal(bounded, free.clamp(max=2))


def test_samples():
    """Filter 0 reacts to one sample of four, filter 4 to all."""
    unit, x = make("none")
    x[1:] = 0
    unit.conv.bias.data[0] = -0.01
    factor = torch.tensor([4.0, 4.0, 4.0, 1.0, 1.0], dtype=torch.float64)
    assert (gate(unit, x).amax((2, 3)).sum(0) == 4 / factor).all()
    found, _ = scaled(unit, x, mode="sample")
    for name, gradient in gradients(unit, x).items():
        torch.testing.assert_close(found[name], gradient * along(factor, gradient), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("norm", PER_MAP)
def test_maps(norm):
    """Each sample's gradient by its own factors, added up; the error for the layer below as without."""
    unit, x = make(norm)
    expected = {name: torch.zeros_like(p) for name, p in unit.named_parameters() if p.requires_grad}
    for sample in x.split(1):
        active = gate(unit, sample).sum((0, 2, 3))
        factor = torch.where(active > 0, 48 / active.clamp(min=1), 1.0).clamp(max=10)
        for name, gradient in gradients(unit, sample).items():
            own = 1 if name == "norm.threshold" else along(factor, gradient)
            expected[name] += gradient * own / 4
    for name, gradient in scaled(unit, x, mode="map")[0].items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gate_by", ["relu", "grad"])
def test_maps_of_two_calls_before_one_backward(gate_by):
    """Each call has its own factors, also of another number of samples."""
    joint, apart = [], []
    for found, parts in ((joint, False), (apart, True)):
        unit, x = make("agc")
        gems = GEMS(unit, mode="map", gate=gate_by)
        losses = (unit(some).square().sum() for some in (x[:1], x[1:]))
        if parts:
            for loss in losses:
                loss.backward()
        else:
            sum(losses).backward()
        gems.scale_gradients()
        found += [p.grad for p in unit.parameters()]
    for a, b in zip(joint, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", PER_MAP)
def test_maps_of_one_sample_are_the_minibatch(norm):
    unit, x = make(norm, n=1)
    by_map, by_minibatch = (scaled(unit, x, mode=mode)[0] for mode in ("map", "minibatch"))
    for name, gradient in by_map.items():
        torch.testing.assert_close(gradient, by_minibatch[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_no_layer_changes_anothers_gradients(mode):
    """The lower of two units gets the error as it was, whatever the upper one's factors; the head is left alone."""
    torch.manual_seed(0)
    network = agcseg.build("segnet", num_classes=5, width=0.05, init="he_centered", implementation="literal").double()
    images = torch.randn(2, 3, 32, 64, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(network(images).square().mean(), [images, *network.parameters()])
    gems = GEMS(network, mode)
    network(images).square().mean().backward()
    gems.scale_gradients()
    torch.testing.assert_close(images.grad, plain[0], rtol=1e-10, atol=1e-12)
    names = [name for name, _ in network.named_parameters()]
    for name, parameter, before in zip(names, network.parameters(), plain[1:], strict=True):
        if name.startswith("head"):
            torch.testing.assert_close(parameter.grad, before, rtol=1e-10, atol=1e-14)
        elif mode != "map":
            factor = gems.factors[name.rsplit(".", 2)[0]]
            torch.testing.assert_close(parameter.grad, before * along(factor, before), rtol=1e-10, atol=1e-12)
    assert len(gems.factors) == 25 and all((factor >= 1).all() for factor in gems.factors.values())


@pytest.mark.parametrize("mode", MODES)
def test_accumulation_is_exact(mode):
    unit, x = make("agc")
    whole, _ = scaled(unit, x, mode=mode)
    gems = GEMS(unit, mode)
    unit.zero_grad()
    for part in x.split(1):
        (unit(part).square().mean() / 4).backward()
    if mode == "minibatch":
        assert gems.points[""] == 4 * 48 and torch.equal(gems.active[""], gate(unit.eval(), x).sum((0, 2, 3)).long())
    gems.scale_gradients()
    assert gems.points[""] == 0 and gems.active[""].sum() == 0
    for name, gradient in whole.items():
        torch.testing.assert_close(dict(unit.named_parameters())[name].grad, gradient, rtol=1e-10, atol=1e-12)


def test_a_first_step_is_not_averaged():
    unit, x = make("agc")
    (plain, without), (found, averaged) = scaled(unit, x), scaled(unit, x, ema=0.9)
    assert torch.equal(without.factors[""], averaged.factors[""]) and not without.averages
    assert all(torch.equal(plain[name], found[name]) for name in plain)


@pytest.mark.parametrize("mode", ["minibatch", "sample"])
def test_average_over_steps(mode):
    """Against shares weighted by age. Filter 0 is silent at first, filter 3 in every later step, filter 1 always."""
    unit, x = make("none")
    bias, shares = unit.conv.bias.data, []
    gems = GEMS(unit, mode, limit=math.inf, ema=0.75)
    bias[:2] = -100
    for step, part in enumerate((x[:2], x[2:], 2 * x[:2], x[2:] - 1)):
        passed = gate(unit.eval(), part)
        shares.append((passed.amax((2, 3)) if mode == "sample" else passed).transpose(0, 1).flatten(1).mean(1))
        plain = gradients(unit.train(), part)
        gems.scale_gradients()
        weights = 0.75 ** torch.arange(step, -1, -1, dtype=torch.float64)
        share = (torch.stack(shares) * weights[:, None]).sum(0) / weights.sum()
        factor = torch.where(shares[-1] > 0, 1 / share, 1.0)
        torch.testing.assert_close(gems.factors[""], factor, rtol=1e-12, atol=0)
        for name, gradient in plain.items():
            found = dict(unit.named_parameters())[name].grad
            torch.testing.assert_close(found, gradient * along(factor, gradient), rtol=1e-12, atol=0)
        bias[0], bias[3] = 0.0, -100
    assert (shares[0][0], shares[1][3]) == (0, 0) and shares[1][0] > 0 == shares[3][1]


def test_a_filter_long_dead_stays_finite():
    """Its average fades to nothing; with its gradient of 0 no factor may make a NaN."""
    unit, x = make("agc")
    gems = GEMS(unit, limit=math.inf, ema=0.01)
    for step in range(200):
        if step:
            unit.norm.bias.data[1] = -100
        gradients(unit, x[:1])
        gems.scale_gradients()
        assert gems.factors[""].isfinite().all() and (unit.norm.weight.grad[1] == 0) == (step > 0)
    assert gems.averages[""][0, 1] == 0 and gems.factors[""][1] == 1


@pytest.mark.parametrize("norm", ["dyt", "derf"])
def test_a_number_of_the_whole_layer_is_left_alone(norm):
    unit, x = make(norm)
    gems = GEMS(unit)
    unit(x).sum().backward()
    before = [p.grad.clone() for p in (unit.norm.alpha, unit.norm.weight)]
    gems.scale_gradients()
    assert torch.equal(unit.norm.alpha.grad, before[0])
    assert not torch.equal(unit.norm.weight.grad, before[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ["agc", "instance", "frn", "bn", "none"])
def test_error_gate(norm, mode):
    """The loss looks at half of a pooled map: of each window there, its winner counts if the ReLU lets it through."""
    if mode == "map" and norm == "bn":
        pytest.skip("batch normalisation mixes maps")
    unit, x = make(norm)
    (unit.conv if norm == "none" else unit.norm).bias.data[0] -= 0.5
    threshold = 0.1 if norm == "frn" else 0

    def half(output):
        return F.max_pool2d(output, 2)[:, :, 1:, 1:-1]

    def loss(output):
        return half(output).square().sum()

    each = (half(unit(x)) > threshold).sum((2, 3))  # of two rows of two winners
    assert each.min() == 0 and each.max() == 4 and (gate(unit, x).sum((2, 3)) > each).any()
    active, points = {"minibatch": (each, 48), "sample": (each > 0, 1), "map": (each, 48)}[mode]
    if mode != "map":
        active, points = active.sum(0, keepdim=True), 4 * points
    factor = torch.where(active > 0, points / active.clamp(min=1).double(), 1.0)
    expected = {name: torch.zeros_like(p) for name, p in unit.named_parameters() if p.requires_grad}
    for some, s in zip(x.split(len(x) // len(factor)), factor, strict=True):
        for name, gradient in gradients(unit, some, loss).items():
            expected[name] += gradient * (1 if name == "norm.threshold" else along(s, gradient))

    gems = GEMS(unit, mode, math.inf, gate="grad")
    unit(x)  # without a backward it counts for nothing
    unit.zero_grad()
    for part in x.split(4 if norm == "bn" else 2):
        loss(unit(part)).backward()
    assert torch.equal(gems.active[""], active.sum(0)) and gems.points[""] == points * len(factor)
    gems.scale_gradients()
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(unit.named_parameters())[name].grad, gradient, rtol=1e-10, atol=1e-12)


def test_gates_agree_where_every_point_gets_an_error():
    unit, x = make("agc")
    (by_relu, relu), (by_error, grad) = (scaled(unit, x, gate=way) for way in GATES)
    assert torch.equal(relu.factors[""], grad.factors[""])
    assert all(torch.equal(by_relu[name], by_error[name]) for name in by_relu)


@pytest.mark.parametrize("options", [{"ema": 0.9}, {"gate": "grad"}, {"gate": "grad", "mode": "map"}])
def test_a_whole_network(options):
    """In half precision, over two steps of two parts each; the head and the error for the images stay as they are."""
    torch.manual_seed(0)
    network = agcseg.build("segnet", num_classes=5, width=0.05, init="he_centered")
    images = torch.randn(2, 3, 32, 64)
    gems = GEMS(network, **options)
    for _ in range(2):
        network.zero_grad()
        for part in images.split(1):
            with torch.autocast("cpu", torch.bfloat16):
                loss = network(part).square().mean()
            loss.backward()
        gems.scale_gradients()
    assert len(gems.factors) == 25 and all((factor >= 1).all() for factor in gems.factors.values())
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in network.parameters())
    assert len(gems.averages) == (25 if "ema" in options else 0)


def test_evaluation_counts_nothing():
    unit, x = make("agc")
    gems = GEMS(unit)
    unit.eval()(x)
    with torch.no_grad():
        unit.train()(x)
    assert gems.points[""] == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_unit_whose_norm_is_in_eval_mode_is_left_alone(mode):
    """The convolution's part of "map" too."""
    torch.manual_seed(0)
    units = nn.Sequential(ConvUnit(3, 4), ConvUnit(4, 4)).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(units[1](units[0](x).detach()).square().sum(), list(units[1].parameters()))
    gems = GEMS(units, mode=mode)
    units[1].norm.eval()
    units(x).square().sum().backward()
    gems.scale_gradients()
    for parameter, gradient in zip(units[1].parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("mode", MODES)
def test_with_pooling_and_in_half_precision(mode):
    """What is counted is what the ReLU lets through, not the winners of a pooling."""
    unit, x = make("agc")
    unit, gems = unit.float(), GEMS(unit, mode)
    with torch.autocast("cpu", torch.bfloat16):
        unit(x.float().requires_grad_(), pool=True)[0].square().mean().backward()
    assert gems.points[""] == (4 if mode == "sample" else 4 * 48)
    gems.scale_gradients()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in unit.parameters())


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        ("agc", {"mode": "pixel"}, "GEMS mode 'pixel' is not known; choose from minibatch, map, sample"),
        ("agc", {"limit": 0.5}, "GEMS limit 0.5 must be at least 1"),
        ("agc", {"limit": math.nan}, "GEMS limit nan must be at least 1"),
        ("agc", {"ema": 1.0}, "GEMS ema 1.0 must be at least 0 (off) and below 1"),
        ("agc", {"ema": -0.1}, "GEMS ema -0.1 must be at least 0"),
        ("agc", {"ema": math.nan}, "GEMS ema nan must be at least 0"),
        ("agc", {"ema": 0.9, "mode": "map"}, "GEMS ema 0.9 cannot be used with mode 'map', whose factors are those of"),
        ("agc", {"gate": "error"}, "GEMS gate 'error' is not known; choose from relu, grad"),
        ("bn", {"mode": "map"}, "GEMS mode 'map' cannot be used with BatchNorm2d, which mixes maps"),
        ("mean_only", {"mode": "map"}, "cannot be used with MeanOnlyBatchNorm2d"),
    ],
)
def test_mistakes(norm, options, message):
    with pytest.raises(UserError) as error:
        GEMS(agcseg.build("segnet", norm=norm, width=0.05), **options)
    assert message in str(error.value)


@pytest.mark.parametrize("options", [{"padding_mode": "reflect"}, {"dilation": 2}, {"stride": 2}, {"groups": 3}])
def test_maps_take_no_other_convolutions(options):
    unit = ConvUnit(3, 6)
    unit.conv = torch.nn.Conv2d(3, 6, 3, padding=1, bias=False, **options)
    GEMS(unit, "minibatch")
    with pytest.raises(UserError, match="GEMS mode 'map' takes convolutions as ConvUnit makes them"):
        GEMS(unit, "map")


@pytest.mark.parametrize("mode", MODES)
def test_copies_count_for_themselves_and_files_hold_the_network(mode):
    unit, x = make()
    gems = GEMS(unit, mode)
    copied, file = copy.deepcopy(unit), io.BytesIO()
    torch.save(unit, file)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        assert torch.equal(other(x), unit.eval()(x))
        other.train()(x).sum().backward()
        assert gems.points[""] == 0 and not gems.factors
    unit.train()(x)
    assert gems.points[""] > 0
