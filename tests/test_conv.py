"""ConvUnit obeys its parts; its fast form is as strict, and as open to torch's tools, as torch's own layers."""

from types import MethodType

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from agcseg import AGC2d, ConvUnit
from agcseg.nn import max_pool2d


def literal(unit, x, factor):
    norm = unit.norm
    z = factor * unit.conv(x)
    z = z - norm.mean_scale.view(-1, 1, 1) * z.mean((2, 3), keepdim=True)
    return F.relu(z * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1))


def made():
    torch.manual_seed(0)
    unit = ConvUnit(3, 8).double()
    nn.init.normal_(unit.norm.bias)
    return unit


class Adapted(nn.Module):
    """A wrapper as LoRA's: the convolution, and something that is added."""

    def __init__(self, conv):
        super().__init__()
        self.base, self.added = conv, nn.Conv2d(3, 8, 1, bias=False)

    def forward(self, x):
        return self.base(x) + self.added(x)


def exchange(unit, channels=8, kernel_size=3, **options):
    unit.conv, unit.norm = nn.Conv2d(3, channels, kernel_size, padding=1, **options), AGC2d(channels)


def circular(conv, x, filters, bias):
    """As is put into single convolutions for pictures without seams."""
    return F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), filters, bias)


CHANGES = {
    "stride": lambda unit: setattr(unit.conv, "stride", (2, 2)),
    "dilation": lambda unit: setattr(unit.conv, "dilation", (2, 2)),
    "padding mode": lambda unit: exchange(unit, padding_mode="reflect", bias=False),
    "even kernel": lambda unit: exchange(unit, kernel_size=2, bias=False),
    "bias": lambda unit: exchange(unit),
    "groups": lambda unit: exchange(unit, 9, groups=3),
    "wrapper": lambda unit: setattr(unit, "conv", Adapted(unit.conv)),
    "hook of the convolution": lambda unit: unit.conv.register_forward_hook(lambda module, inputs, maps: maps * 2),
    "hook of the norm": lambda unit: unit.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
    "backward hook": lambda unit: unit.norm.register_full_backward_hook(lambda module, inputs, outputs: None),
    "pruning": lambda unit: prune.l1_unstructured(unit.conv, "weight", 0.5),
    "padding of its own": lambda unit: setattr(unit.conv, "_conv_forward", MethodType(circular, unit.conv)),
    "norm of its own": lambda unit: setattr(unit.norm, "forward", lambda maps: AGC2d.forward(unit.norm, 2 * maps)),
    "parametrisation": lambda unit: parametrizations.weight_norm(unit.conv),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", ["large", "small"], indirect=True)
def test_unit_obeys_its_convolution_and_hooks(form, change):
    unit = made()
    CHANGES[change](unit)
    unit.double()
    assert not unit.is_fast
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    expected, output = literal(unit, x, 2 if change in ("hook of the norm", "norm of its own") else 1), unit(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(output.square().sum(), list(unit.parameters()))
    wanted = torch.autograd.grad(expected.square().sum(), list(unit.parameters()))
    for got, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", ["large", "small"], indirect=True)
def test_hooks_of_a_stem_run(form):
    unit, stem = ConvUnit(8, 4), ConvUnit(3, 8)
    x = torch.randn(1, 3, 8, 8)
    stem.register_forward_hook(lambda module, inputs, maps: maps * 2)
    torch.testing.assert_close(unit(x, stem=stem), unit(stem(x)))


@pytest.mark.parametrize("literal", [False, True])
def test_what_a_hook_kept_of_a_convolution_stays(literal):
    """Without a norm the ReLU gets the convolution's own maps."""
    unit, kept = ConvUnit(3, 4, norm=None), []
    if literal:
        unit.conv.register_forward_hook(lambda conv, inputs, maps: kept.append(maps))
    else:
        unit.conv.register_full_backward_hook(lambda conv, *gradients: kept.append(-gradients[0][0]))
    unit(torch.randn(2, 3, 6, 6, requires_grad=True)).sum().backward()
    assert kept[0].min() < 0


def test_odd_maps_are_not_pooled_in_any_form():
    for norm, implementation in ((AGC2d, "literal"), (nn.BatchNorm2d, "fast")):
        with pytest.raises(ValueError, match="even heights and widths"):
            ConvUnit(3, 4, norm=norm, implementation=implementation)(torch.zeros(2, 3, 7, 8), pool=True)


@pytest.mark.parametrize("form", ["large", "small"], indirect=True)
def test_wrong_maps_are_refused_whatever_their_size(form):
    unit, x = ConvUnit(8, 4), torch.randn(2, 4, 6, 6)
    _, winners = max_pool2d(torch.randn(2, 8, 12, 12))
    y = torch.randn(2, 8, 6, 6)
    unit(y, unpool=winners)
    for wrong, message in (
        (winners[:, :, :3], "winners are uint8 or int64 and of the maps' shape"),
        (winners[:1], "winners are uint8 or int64"),
        (winners > 0, "got .* of torch.bool"),
        (winners + 10**9, "must lie in the 2x2 windows"),
        (winners.flip(2), "must lie in the 2x2 windows"),
    ):
        with pytest.raises(ValueError, match=message):
            unit(y, unpool=wrong)
    for others in (x[:1], x[:, :, :1, :1], x.double()):
        with pytest.raises(ValueError, match="differ in their channels only"):
            unit([x, others])
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        unit(y[0])
    with pytest.raises(ValueError, match="do not fit"):
        unit(x)


@pytest.mark.parametrize("form", ["large", "small"], indirect=True)
def test_transforms_of_torch_func(form):
    """Two units behind each other; unpooling too. vmap gives the samples' gradients."""
    units = nn.Sequential(ConvUnit(3, 4), ConvUnit(4, 4)).double()
    parameters = {name: p.detach() for name, p in units.named_parameters()}
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)

    def loss(parameters, x):
        return functional_call(units, parameters, (x,)).square().sum()

    expected = torch.autograd.grad(loss(dict(units.named_parameters()), x), list(units.parameters()))
    for gradients in (
        torch.func.grad(loss)(parameters, x),
        torch.compile(torch.func.grad(loss), backend="eager")(parameters, x),
    ):
        for (name, got), value in zip(gradients.items(), expected, strict=True):
            torch.testing.assert_close(got, value, rtol=0, atol=1e-9, msg=name)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])
    torch.testing.assert_close(each["0.conv.weight"].sum(0), expected[0], rtol=0, atol=1e-9)
    _, tangent = torch.func.jvp(lambda x: loss(parameters, x), (x,), (torch.ones_like(x),))
    (d_input,) = torch.autograd.grad(loss(parameters, x.requires_grad_()), x)
    torch.testing.assert_close(tangent, d_input.sum(), rtol=1e-9, atol=1e-9)
    _, winners = max_pool2d(torch.randn(2, 3, 12, 12))
    torch.func.grad(lambda x: units[0](x, unpool=winners).sum())(x.detach())


@pytest.mark.parametrize("form", ["large", "small"], indirect=True)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracers_see_the_convolution(form):
    unit, x = ConvUnit(3, 4), torch.randn(2, 3, 8, 8)
    traced = torch.jit.trace(unit, x)
    assert "aten::_convolution" in str(traced.inlined_graph)
    other = torch.randn(5, 3, 10, 6)
    torch.testing.assert_close(traced(other), unit(other))
    fvcore = pytest.importorskip("fvcore.nn")
    assert fvcore.FlopCountAnalysis(unit, x).by_operator()["conv"] == 2 * 4 * 64 * 27


@pytest.mark.parametrize("form", ["large", "small"], indirect=True)
def test_minibatches_of_any_size_are_one_program(form):
    """Exported, one of torch's own operations."""
    units = nn.Sequential(ConvUnit(3, 4), ConvUnit(4, 4))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(units, backend=counter, dynamic=True)
    for n in (2, 3, 5):
        x = torch.randn(n, 3, 8, 8)
        torch.testing.assert_close(compiled(x), units(x))
        compiled(x).sum().backward()
    assert counter.frame_count == 1
    program = torch.export.export(units, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert "agcseg" not in str(program.graph) and "conv2d" in str(program.graph)
    torch.testing.assert_close(program.module()(x), units(x))


@pytest.mark.parametrize("form", ["large", "small"], indirect=True)
def test_counters_by_hooks_see_the_convolution(form):
    """As torchinfo counts."""
    torchinfo = pytest.importorskip("torchinfo")
    assert torchinfo.summary(ConvUnit(3, 4), (2, 3, 8, 8), verbose=0).total_mult_adds >= 2 * 64 * 4 * 27


def test_a_norm_may_keep_its_output():
    """As tanh does for its backward: no ReLU in place there."""
    unit = ConvUnit(3, 4, norm=lambda channels: nn.Sequential(nn.BatchNorm2d(channels), nn.Tanh()))
    unit(torch.randn(2, 3, 8, 8)).sum().backward()
    assert unit.conv.weight.grad.isfinite().all()
