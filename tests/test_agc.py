"""The layer against the paper's equation (1), written as slow loops."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from agcseg import AGC2d, AGCReLU2d, ConvUnit, agc, agc_relu
from agcseg.nn.agc import agc_formula


def loops(z, gamma, beta, lam):
    """Equation (1) for one sample and one filter after the other."""
    output = torch.empty_like(z)
    for s in range(z.shape[0]):
        for f in range(z.shape[1]):
            total, points = 0.0, 0
            for row in z[s, f]:
                for value in row:
                    total, points = total + value, points + 1
            for i in range(z.shape[2]):
                for j in range(z.shape[3]):
                    output[s, f, i, j] = (z[s, f, i, j] - lam[f] * (total / points)) * gamma[f] + beta[f]
    return output


def parameters(channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gamma, beta = torch.randn(2, channels, generator=generator, dtype=torch.float64)
    gamma[0] = 0
    lam = torch.linspace(-0.3, 2, channels, dtype=torch.float64)
    return gamma, beta, lam


def test_equation_1():
    z = torch.randn(3, 4, 5, 7, dtype=torch.float64)
    gamma, beta, lam = parameters(4)
    torch.testing.assert_close(agc(z, gamma, beta, lam), loops(z, gamma, beta, lam), rtol=0, atol=1e-12)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("form", ["large", "small"], indirect=True)
def test_with_relu_in_one_step(form, zero, request):
    """Values and gradients of the memory-saving form; with γ = 0 among the channels it keeps its input."""
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    gamma, beta, lam = parameters(6)
    gamma[0], gamma[1] = 0 if zero else 1.5, -0.7
    beta[0] = 0.4
    inputs = (x, *(p.requires_grad_() for p in (gamma, beta, lam)))
    fast, literal = agc_relu(*inputs), torch.relu(agc(*inputs))
    torch.testing.assert_close(fast, literal, rtol=0, atol=1e-12)
    if request.node.callspec.params["form"] == "large":
        kept = [t for t in fast.grad_fn.saved_tensors if t is not None and t.shape == x.shape]
        assert len(kept) == (2 if zero else 1)
    back = torch.randn_like(fast)
    for a, b in zip(torch.autograd.grad(fast, inputs, back), torch.autograd.grad(literal, inputs, back), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_with_relu_gradcheck_and_second_derivative(form):
    layer, x = AGCReLU2d(3, mean_scale=0.7).double(), torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("form", ["large", "small"], indirect=True)
def test_with_relu_in_half_precision(form):
    x = torch.randn(2, 3, 16, 16).bfloat16()
    output = AGCReLU2d(3)(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), torch.relu(AGC2d(3)(x.float())), rtol=0.01, atol=0.01)


def test_gain_gradient_in_half_precision(form):
    """β of an output swallows the digits of a small γ's share, of which dγ cannot be made then."""
    torch.manual_seed(0)
    z, back = (torch.randn(2, 4, 16, 16).bfloat16() for _ in range(2))
    values = [torch.tensor([1.0, 0.1, 0.01, 0.002]), torch.full((4,), 1.001), torch.full((4,), 0.8)]
    gradients = []
    for operation, dtype in ((agc_relu, torch.float32), (lambda *inputs: torch.relu(agc(*inputs)), torch.float64)):
        gain, *others = (value.to(dtype, copy=True).requires_grad_() for value in values)
        maps = z if dtype == torch.float32 else z.double()
        operation(maps, gain, *others).backward(back.to(maps.dtype))
        gradients.append(gain.grad)
    torch.testing.assert_close(*gradients, rtol=0.01, atol=0.5, check_dtype=False)


def test_gradcheck():
    inputs = (torch.randn(2, 3, 4, 5, dtype=torch.float64), *parameters(3))
    assert torch.autograd.gradcheck(agc, [p.clone().requires_grad_() for p in inputs])


def test_minibatch_is_its_samples_one_by_one():
    layer, x = AGC2d(4).double(), torch.randn(3, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.cat([layer(sample) for sample in x.split(1)]), rtol=0, atol=0)


def test_train_equals_eval():
    layer, x = AGC2d(4), torch.randn(2, 4, 6, 6)
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_identity_and_mean_subtraction():
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert torch.equal(AGC2d(4, mean_scale=0).double()(x), x)
    layer = AGC2d(4).double()
    torch.nn.init.constant_(layer.bias, 0.3)
    torch.testing.assert_close(layer(x).mean((2, 3)), torch.full((2, 4), 0.3, dtype=torch.float64))


def test_initial_values_and_repr():
    layer = AGC2d(3, mean_scale=0.5)
    assert layer.weight.tolist() == [1, 1, 1] and layer.bias.tolist() == [0, 0, 0]
    assert layer.mean_scale.tolist() == [0.5] * 3
    assert repr(layer) == "AGC2d(3, mean_scale=0.5)"
    assert list(layer.state_dict()) == ["weight", "bias", "mean_scale"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_reduced_in_float32(dtype):
    # 65,536 ones behind a large value: a half-precision sum would lose them.
    x = torch.ones(1, 1, 256, 257, dtype=dtype)
    x[..., 0] = 512
    mean = x.double().mean().item()
    output = AGC2d(1)(x)
    assert output.dtype == dtype
    assert output[0, 0, 0, 1].item() == pytest.approx(1 - mean, rel=2 * torch.finfo(dtype).eps)


def test_unit_under_autocast():
    unit, x = ConvUnit(3, 8), torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        output = unit(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), unit(x), rtol=0.05, atol=0.05)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(N, C, H, W\); got \(4, 6\)"):
        AGC2d(4)(torch.zeros(4, 6))
    with pytest.raises(ValueError, match="made for 4 channels; the input is"):
        AGC2d(4)(torch.zeros(1, 5, 6, 6))
    ones = torch.ones(3)
    for vectors in ((ones.view(3, 1), ones, ones), (ones, ones.view(3, 1), ones), (ones, ones, ones.view(1, 3, 1, 1))):
        for function in (agc, agc_relu):  # which would broadcast
            with pytest.raises(ValueError, match="vectors of one length"):
                function(torch.zeros(1, 3, 4, 4), *vectors)


@pytest.mark.parametrize("form", ["large", "small"], indirect=True)
def test_wrong_shapes_are_refused_with_relu(form):
    with pytest.raises(ValueError, match=r"\(N, C, H, W\); got \(4, 6, 6\)"):
        AGCReLU2d(4)(torch.zeros(4, 6, 6))
    with pytest.raises(ValueError, match="made for 4 channels; the input is"):
        AGCReLU2d(4)(torch.zeros(2, 1, 6, 6))  # would broadcast


def test_meta_device():
    maps = torch.empty(2, 3, 64, 64, device="meta")
    assert AGCReLU2d(3, device="meta")(maps).shape == maps.shape
    assert ConvUnit(3, 4).to("meta")(maps).shape == (2, 4, 64, 64)


def test_import_loads_torch_and_nothing_else():
    script = "import sys, torch; had = set(sys.modules); import agcseg; print(*sorted(set(sys.modules) - had))"
    new = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert {name.split(".")[0] for name in new} == {"agcseg"}
    assert not any(name.startswith(("agcseg.data", "agcseg.training", "agcseg.cli")) for name in new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_keeps_its_input_and_one_mean_a_map(dtype):
    x, kept = torch.randn(2, 4, 8, 8, dtype=dtype, requires_grad=True), []
    layer = AGC2d(4, dtype=torch.float64 if dtype == torch.float64 else None)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = layer(x)
    own = [p.data_ptr() for p in layer.parameters()]
    kept = [t for t in kept if t.data_ptr() not in own]
    assert output.dtype == dtype and [(t.shape, t.dtype) for t in kept[:1]] == [(x.shape, dtype)]
    assert [tuple(t.shape) for t in kept[1:]] == [(2, 4)]


@pytest.mark.parametrize("frozen", range(4))
def test_gradients_are_the_formulas(frozen):
    x = torch.randn(3, 4, 5, 7, dtype=torch.float64)
    inputs = [x, *parameters(4)]
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(i != frozen)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    back = torch.randn_like(x)
    got, expected = (torch.autograd.grad(f(*inputs), wanted, back) for f in (agc, agc_formula))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_second_derivatives():
    inputs = [torch.randn(2, 3, 4, 5, dtype=torch.float64), *parameters(3)]
    assert torch.autograd.gradgradcheck(agc, [p.clone().requires_grad_() for p in inputs])


@pytest.mark.parametrize("layer", [AGC2d, AGCReLU2d])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_tools_of_torch_take_the_layer(layer):
    """As they take BatchNorm2d."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer(4, mean_scale=0.5), nn.Sigmoid()).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"][0].startswith("agc")
    torch.testing.assert_close(traced(x), expected)
    torch.testing.assert_close(copy.deepcopy(traced)(x), expected)
    quantise = pytest.importorskip("torch.ao.quantization.quantize_fx")
    mapping = torch.ao.quantization.get_default_qconfig_mapping()
    prepared = quantise.prepare_fx(copy.deepcopy(model), mapping, (x,))
    torch.testing.assert_close(prepared(x), expected)
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    torch.testing.assert_close(extraction.create_feature_extractor(model, {"2": "out"})(x)["out"], expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_script_trace_and_transforms():
    layer, x = AGC2d(3, mean_scale=0.5), torch.randn(2, 3, 5, 5)
    for form in (torch.jit.script(layer), torch.jit.trace(layer, x), torch.export.export(layer, (x,)).module()):
        torch.testing.assert_close(form(x), layer(x))
    activated = AGCReLU2d(3)
    torch.testing.assert_close(torch.jit.script(activated)(x), activated(x))
    with pytest.raises(torch.jit.Error, match=r"got \(3, 5, 5\)"):
        torch.jit.script(layer)(x[0])

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(dict(layer.named_parameters()), x)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-4)


def test_arguments_of_batch_normalisation_are_refused():
    with pytest.raises(TypeError):
        AGC2d(8, 1e-5)  # BatchNorm2d's eps


@pytest.mark.parametrize("form", ["large", "small"], indirect=True)
def test_vectors_of_another_length_are_refused(form):
    one, z = torch.ones(4), torch.zeros(2, 4, 6, 6)
    for function in (agc, agc_relu):
        with pytest.raises(ValueError, match="one length"):
            function(z, one, one, torch.ones(1))


def test_maps_of_one_position_are_warned_of_once():
    layer = AGC2d(4)
    with pytest.warns(UserWarning, match="got maps of 1x1, of which λ = 1 leaves nothing but β"):
        layer(torch.randn(2, 4, 1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(2, 4, 1, 1))
        AGC2d(4, mean_scale=0.9)(torch.randn(2, 4, 1, 1))
