"""The fast AGC unit against the paper's formula: values and all gradients in float64."""

import copy
import itertools
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import agcseg.nn.fast
from agcseg import build
from agcseg.errors import UserError
from agcseg.losses import segmentation_loss
from agcseg.nn import NORMS, ConvUnit, agc_relu, agc_unit, max_pool2d, max_unpool2d, passes
from agcseg.nn.pooling import window_offsets
from agcseg.nn.rebuild import rebuilding


@pytest.fixture(autouse=True)
def one_thread():
    """Maps this small cost more in waiting for threads than in arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


both_forms = pytest.mark.parametrize("form", ["large", "small"], indirect=True)
pytestmark = pytest.mark.usefixtures("form")

CASES = {
    "plain": {},
    "1x1": {"kernel_size": 1},
    "minibatch 1": {"n": 1},
    "odd size": {"size": (5, 7)},
    "more numbers in the filters than in the maps": {"size": (2, 2), "n": 1},
    "zero gain": {"gain": 0.0},
    "negative gain": {"gain": -0.7},
    **{f"lambda {value}": {"mean_scale": value} for value in (-0.3, 0.0, 0.5, 1.0, 2.0)},
    "pool": {"pool": True},
    "unpool": {"unpool": True},
    "unpool and pool": {"unpool": True, "pool": True, "n": 1},
    "concatenation": {"widths": (2, 1, 3)},
    "concatenation, pool": {"widths": (2, 3), "pool": True},
    "unpool, large": {"unpool": True, "size": (256, 256), "widths": (1,), "n": 2},
    "stem": {"stem": True},
    "stem, large": {"stem": True, "size": (256, 256), "widths": (1,), "n": 2},
    "stem, pool": {"stem": True, "pool": True},
    "stem, concatenation": {"stem": True, "widths": (2, 3)},
    "channels_last": {"memory_format": torch.channels_last},
    "channels_last, unpool and pool": {"memory_format": torch.channels_last, "unpool": True, "pool": True},
}


def make(
    n=3, size=(6, 8), widths=(3,), kernel_size=3, gain=None, mean_scale=None, pool=False, unpool=False, stem=False,
    memory_format=torch.contiguous_format,
):  # fmt: skip
    """A pair of equal units (fast, literal), a function from a unit and inputs to outputs, and the inputs."""
    generator = torch.Generator().manual_seed(0)
    channels = sum(widths)
    fast = nn.ModuleList([ConvUnit(4 if stem else channels, 5, kernel_size)])
    if stem:
        fast.append(ConvUnit(channels, 4, kernel_size))
    fast = fast.double()
    for parameter in fast.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if gain is not None:
        fast[0].norm.weight.data[:3] = gain
    if mean_scale is not None:
        fast[0].norm.mean_scale.data.fill_(mean_scale)
    literal = copy.deepcopy(fast)
    for unit in literal:
        unit.implementation = "literal"
    size = [side // 2 for side in size] if unpool else size
    inputs = [torch.randn(n, width, *size, generator=generator, dtype=torch.float64) for width in widths]
    inputs = [x.to(memory_format=memory_format).requires_grad_() for x in inputs]
    winners = torch.randint(4, (n, channels, *size), generator=generator).to(torch.uint8) if unpool else None

    def run(units, inputs):
        input = inputs[0] if len(inputs) == 1 else inputs
        output = units[0](input, unpool=winners, pool=pool, stem=units[1] if stem else None)
        return output[0] if pool else output

    return fast, literal, run, inputs


def gradients(units, run, inputs, leaves):
    output = run(units, inputs)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape).sin()
    return [output, *torch.autograd.grad((output * weights).sum(), leaves)]


@both_forms
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula(case):
    fast, literal, run, inputs = make(**CASES[case])
    ours = gradients(fast, run, inputs, [*fast.parameters(), *inputs])
    theirs = gradients(literal, run, inputs, [*literal.parameters(), *inputs])
    assert len(ours) == len(theirs) > 4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-12)


@pytest.mark.parametrize("case", ["plain", "unpool and pool", "channels_last, unpool and pool"])
def test_equals_the_formula_in_blocks(case, monkeypatch):
    """As maps and filters are gone through that do not fit in a cache."""
    monkeypatch.setattr(passes, "BLOCK", 40)
    monkeypatch.setattr(passes, "CACHED", 40)
    test_equals_the_formula(case)
    filters, gain = torch.randn(7, 3, 3, 3), torch.randn(7)
    expected = (filters * gain.view(-1, 1, 1, 1)).bfloat16()
    assert torch.equal(passes.fold(filters, gain, torch.bfloat16), expected)
    assert passes.fold(filters.bfloat16(), gain, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("case", [case for case in CASES if "concatenation" in case])
def test_equals_the_formula_of_the_concatenation(case, monkeypatch):
    """As a GPU's are computed that are small enough to be built."""
    monkeypatch.setattr(agcseg.nn.unit, "_joins", lambda like, n, shapes: len(shapes) > 1)
    test_equals_the_formula(case)
    fast, _, run, inputs = make(**CASES[case])
    inputs[0].requires_grad_(False)  # nor do all of them need a gradient
    output = run(fast, inputs)
    some = torch.autograd.grad(output.sum(), inputs[1:])
    monkeypatch.undo()
    expected = torch.autograd.grad(run(fast, inputs).sum(), inputs[1:])
    torch.testing.assert_close(some, expected, atol=1e-10, rtol=1e-12)


@pytest.mark.parametrize("case", ["zero gain", "unpool and pool", "stem, concatenation"])
def test_gradcheck(case):
    fast, _, run, inputs = make(**{"n": 2, **CASES[case], "size": (4, 4)})
    parameters = dict(fast.named_parameters())

    def function(*tensors):
        replaced = dict(zip(parameters, tensors[len(inputs) :], strict=True))
        return torch.func.functional_call(Runner(fast, run), replaced, (tensors[: len(inputs)],))

    parameters = {f"units.{name}": parameter for name, parameter in parameters.items()}
    assert torch.autograd.gradcheck(function, (*inputs, *parameters.values()))


class Runner(nn.Module):
    def __init__(self, units, run):
        super().__init__()
        self.units, self.run = units, run

    def forward(self, inputs):
        return self.run(self.units, inputs)


@pytest.mark.parametrize("case", ["plain", "stem, pool", "unpool"])
def test_frozen_parameters(case):
    fast, _, run, inputs = make(**{**CASES[case], "n": 1})
    leaves = [*fast.parameters(), *inputs]
    _, *expected = gradients(fast, run, inputs, leaves)
    subsets = list(itertools.product([False, True], repeat=len(leaves)))[1:]
    if len(leaves) > 5:  # with a stem: up to two trained, or up to two frozen
        subsets = [subset for subset in subsets if sum(subset) <= 2 or sum(subset) >= len(leaves) - 2]
    for trained in subsets:
        for leaf, train in zip(leaves, trained, strict=True):
            leaf.requires_grad_(train)
        chosen = list(itertools.compress(leaves, trained))
        _, *found = gradients(fast, run, inputs, chosen)
        for a, b in zip(found, itertools.compress(expected, trained), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@both_forms
def test_without_gradients():
    fast, literal, run, inputs = make(pool=True)
    expected = run(literal, inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output = run(fast, inputs)
        assert not output.requires_grad
        torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)


@both_forms
def test_checkpoint():
    fast, _, run, inputs = make(unpool=True, pool=True)
    leaves = [*fast.parameters(), *inputs]
    expected = gradients(fast, run, inputs, leaves)
    found = gradients(fast, lambda units, x: checkpoint(run, units, x, use_reentrant=False), inputs, leaves)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", ["plain", "stem, pool", "unpool"])
def test_compiles_without_graph_breaks(case):
    fast, _, run, inputs = make(**CASES[case])
    leaves = [*fast.parameters(), *inputs]
    expected = gradients(fast, run, inputs, leaves)
    found = gradients(fast, torch.compile(run, backend="aot_eager", fullgraph=True), inputs, leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@both_forms
def test_second_derivative_is_refused():
    fast, _, run, inputs = make()
    with pytest.raises(RuntimeError, match="no second derivative.*literal"):
        torch.autograd.grad(run(fast, inputs).sum(), inputs, create_graph=True)


def test_changing_the_output_in_place_is_noticed():
    fast, _, run, inputs = make()
    output = run(fast, inputs)
    output.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        output.sum().backward()


def test_wrong_shapes_are_refused():
    unit = ConvUnit(3, 4)
    with pytest.raises(ValueError, match="do not fit"):
        unit(torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="even"):
        unit(torch.zeros(1, 3, 5, 4), pool=True)
    with pytest.raises(ValueError, match="implementation"):
        ConvUnit(3, 4, implementation="quick")
    with pytest.raises(ValueError, match=r"4 filters take γ, β and λ of as many; got \(1,\), \(4,\), \(4,\)"):
        agc_unit(torch.zeros(1, 3, 4, 4), unit.conv.weight, torch.ones(1), torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match=r"got \(4,\), \(4, 1\), \(4,\)"):  # it would broadcast over the samples
        agc_unit(torch.zeros(4, 3, 4, 4), unit.conv.weight, torch.ones(4), torch.zeros(4, 1), torch.ones(4))


@pytest.mark.parametrize("size", [8, 256])
def test_maps_of_other_than_real_numbers_are_refused(size):
    for dtype in (torch.uint8, torch.complex64):
        maps = torch.zeros(1, 3, size, size, dtype=dtype)
        for layer in (ConvUnit(3, 16), agcseg.AGC2d(3), agcseg.AGCReLU2d(3)):
            with pytest.raises(ValueError, match=rf"takes maps of real numbers.*got {dtype}"):
                layer(maps)
    for kernel_size in (2, (3, 3)):
        with pytest.raises(ValueError, match="must be one odd number"):
            ConvUnit(3, 4, kernel_size)


@both_forms
def test_a_network_on_fake_tensors():
    with FakeTensorMode():
        assert build("segnet", width=0.1)(torch.randn(1, 3, 32, 32)).shape == (1, 19, 32, 32)


def test_an_empty_minibatch(monkeypatch):
    monkeypatch.setattr(agcseg.nn.fast, "SMALL", -1)
    fast, _, run, inputs = make(unpool=True, size=(256, 256), n=0)
    output, *found = gradients(fast, run, inputs, [*fast.parameters(), *inputs])
    assert output.shape == (0, 5, 256, 256) and not any(gradient.any() for gradient in found)


# --- pooling ---


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pooling_breaks_ties_as_torch_does(memory_format):
    cells = torch.tensor(list(itertools.product([0.0, 1.0, 2.0], repeat=4))).view(1, 81, 2, 2)
    cells = cells.repeat(2, 1, 3, 2).to(memory_format=memory_format)
    identity = torch.zeros(81, 81, 1, 1)
    nn.init.dirac_(identity)
    pooled, offsets = agc_unit(cells, identity, torch.ones(81), torch.zeros(81), torch.zeros(81), pool=True)
    expected, indices = max_pool2d(cells)
    assert torch.equal(pooled, expected)
    assert torch.equal(offsets, window_offsets(indices, 4))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gain_of_zero_in_front_of_a_pooling(memory_format, monkeypatch):
    """All cells are 0 or -0 then: the first wins, and γ's gradient is that of its z."""
    monkeypatch.setattr(agcseg.nn.fast, "SMALL", -1)
    unit, found = ConvUnit(1, 8, 1).double(), []
    nn.init.zeros_(unit.norm.weight)
    nn.init.ones_(unit.norm.bias)
    x = torch.randn(1, 1, 16, 16, dtype=torch.float64).to(memory_format=memory_format)
    for unit.implementation in ("fast", "literal"):
        unit.zero_grad()
        (unit(x, pool=True)[0] * torch.arange(8.0)).sum().backward()
        found.append(unit.norm.weight.grad)
    torch.testing.assert_close(*found)


@both_forms
def test_unpooling_takes_both_notations():
    values, indices = max_pool2d(torch.randn(2, 3, 6, 8))
    values.requires_grad_()
    offsets = window_offsets(indices, 8)
    expected = F.max_unpool2d(values, indices, 2)
    weights = torch.randn(expected.shape)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), values)
    unit = ConvUnit(3, 4)
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            for winners in (indices, offsets):
                maps = max_unpool2d(values, winners)
                assert torch.equal(maps, expected)
                assert torch.equal(torch.autograd.grad((maps * weights).sum(), values)[0], gradient)
                assert torch.equal(unit(values, unpool=winners), unit(expected))
        finally:
            torch.use_deterministic_algorithms(False)


# --- precision ---


@both_forms
def test_autocast_takes_maps_of_different_dtypes():
    maps = torch.rand(2, 3, 8, 8)
    parameters = torch.rand(4, 5, 3, 3), *torch.rand(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output = agc_unit((maps, maps[:, :2].bfloat16()), *parameters)
        torch.testing.assert_close(output, agc_unit(torch.cat([maps, maps[:, :2]], 1), *parameters), atol=0.1, rtol=0.1)
    with pytest.raises(ValueError, match="differ in their channels only"):
        agc_unit((maps, maps[:, :2].bfloat16()), *parameters)


@both_forms
def test_bfloat16_autocast():
    units, _, run, inputs = make(n=2, size=(32, 32), unpool=True, widths=(16,))
    units, inputs = units.float(), [inputs[0].detach().float().requires_grad_()]
    leaves = [*units.parameters(), *inputs]
    expected = gradients(units, run, inputs, leaves)

    def autocast(units, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            output = run(units, inputs)
        assert output.dtype == torch.bfloat16
        return output

    errors = {}
    for units[0].implementation in ("literal", "fast"):
        found = gradients(units, autocast, inputs, leaves)
        assert [a.dtype for a in found[1:]] == [leaf.dtype for leaf in leaves]
        errors[units[0].implementation] = [
            ((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)
        ]
    for fast, literal in zip(errors["fast"], errors["literal"], strict=True):
        assert fast < 0.1
        assert fast < 1.5 * literal + 0.002


@both_forms
def test_half_precision_is_reduced_in_float32():
    # 4096 positions of 1 + 1/128: a bfloat16 sum would stop growing long before the end
    maps = torch.full((1, 1, 64, 64), 1 + 1 / 128, dtype=torch.bfloat16)
    one, bias, mean_scale = torch.ones(1), torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
    bias.data += 0.5
    output = agc_unit(maps, torch.ones(1, 1, 1, 1), one, bias, mean_scale)
    assert torch.equal(output, torch.full_like(maps, 0.5))  # x - mean(x) + β, with the exact mean
    output.backward(torch.ones_like(output))
    assert bias.grad.item() == 4096
    assert mean_scale.grad.item() == -4096 * (1 + 1 / 128)


# --- networks ---


def images_and_labels(n=2):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 6, (n, 64, 96), generator=generator).to(torch.uint8)
    labels[labels == 5] = 255
    return torch.randn(n, 3, 64, 96, generator=generator), labels


@both_forms
@pytest.mark.parametrize("recompute", [0.0, 0.001])
def test_segnet_fast_equals_literal(recompute):
    torch.manual_seed(0)
    fast = build("segnet", num_classes=5, width=0.1, recompute=recompute).double()
    literal = build("segnet", num_classes=5, width=0.1, implementation="literal").double()
    with torch.no_grad():
        for name, parameter in fast.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    literal.load_state_dict(fast.state_dict())
    images, labels = images_and_labels()
    outputs = []
    for network in (fast, literal):
        logits = network(images.double())
        F.cross_entropy(logits, labels.long(), ignore_index=255).backward()
        outputs.append(logits)
    torch.testing.assert_close(*outputs, atol=1e-10, rtol=0)
    for a, b in zip(fast.parameters(), literal.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=0)
    fast.load_state_dict(literal.state_dict())


@pytest.mark.parametrize("norm", [name for name in NORMS if name not in ("agc", "center")])
def test_other_norms_ignore_the_implementation(norm):
    images, _ = images_and_labels()
    outputs = []
    for implementation in ("fast", "literal"):
        torch.manual_seed(0)
        outputs.append(build("segnet", norm=norm, width=0.1, implementation=implementation)(images))
    assert torch.equal(*outputs)


def bytes_kept(network, loss):
    """Bytes of the unique storages that autograd keeps, parameters excluded."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss(network)
    assert result.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def test_bytes_kept_for_backward():
    images, labels = images_and_labels(n=1)

    def loss(network):
        return segmentation_loss(network(images), labels).mean()

    kept = {
        norm: bytes_kept(build("segnet", num_classes=5, width=0.25, norm=norm), loss) for norm in ("agc", "bn", "none")
    }
    assert kept["agc"] < 0.3 * kept["bn"]
    assert kept["agc"] < 0.55 * kept["none"]


def _replica(rank, path):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    network = build("segnet", num_classes=5, width=0.05).double()
    images, labels = images_and_labels()
    replica = nn.parallel.DistributedDataParallel(copy.deepcopy(network))
    segmentation_loss(replica(images[rank : rank + 1].double()), labels[rank : rank + 1]).mean().backward()
    segmentation_loss(network(images.double()), labels).mean().backward()
    for a, b in zip(replica.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=0)
    dist.destroy_process_group()


def test_two_replicas_equal_one_minibatch(tmp_path):
    mp.spawn(_replica, (str(tmp_path),), nprocs=2)


def test_small_maps_take_torchs_own_operations(monkeypatch):
    unit, maps = ConvUnit(2, 4), torch.zeros(3, 2, 6, 8)
    monkeypatch.setattr(agcseg.nn.fast, "SMALL", 3 * 4 * 6 * 8)
    assert "_Unit" not in str(unit(maps).grad_fn)
    assert "_Unit" not in str(unit(maps[:, :, ::2, ::2], unpool=torch.zeros(3, 2, 3, 4, dtype=torch.uint8)).grad_fn)
    assert "_AGCReLU" not in str(agc_relu(torch.zeros(3, 4, 6, 8), *unit.agc_parameters[1:]).grad_fn)
    monkeypatch.setattr(agcseg.nn.fast, "SMALL", 3 * 4 * 6 * 8 - 1)
    assert "_Unit" in str(unit(maps).grad_fn)
    assert "_Unit" in str(unit(maps[:, :, ::2, ::2], unpool=torch.zeros(3, 2, 3, 4, dtype=torch.uint8)).grad_fn)
    assert "_AGCReLU" in str(agc_relu(torch.zeros(3, 4, 6, 8), *unit.agc_parameters[1:]).grad_fn)


# --- rebuilding ---


@pytest.mark.parametrize("name, size", [("segnet", (64, 64)), ("classnet", (128, 128))])
def test_rebuilt_outputs_are_the_same_bit_for_bit(name, size):
    torch.manual_seed(0)
    network, images = build(name, num_classes=3, width=0.1), torch.randn(2, 3, *size)

    def step(budget):
        network.recompute = budget
        network.zero_grad()
        kept = bytes_kept(network, lambda network: loss(network(images)))
        outputs = loss(network(images))
        outputs.backward(retain_graph=True)
        outputs.backward()  # once more through the same graph
        return kept, [outputs.detach(), *(p.grad.clone() for p in network.parameters())]

    def loss(outputs):
        return sum(logits.square().mean() for logits in ([outputs] if name == "segnet" else outputs[:2]))

    kept, expected = step(0)
    for budget in (0.001, 0.05, 1 / 3):
        less, found = step(budget)
        assert less <= kept
        kept = less
        assert all(map(torch.equal, found, expected))
    assert kept < 0.7 * step(0)[0]


def test_parameters_changed_before_backward_are_noticed():
    network = build("classnet", num_classes=3, width=0.1, recompute=1 / 3)
    loss = network(torch.randn(1, 3, 128, 128)).classes.sum()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@both_forms
@pytest.mark.parametrize("changed", ["maps", "filters"])
def test_what_a_frozen_unit_is_computed_again_from_is_watched(changed):
    """It keeps nothing itself that torch would watch."""
    first, second = ConvUnit(3, 4), ConvUnit(4, 4)
    first.requires_grad_(False)
    images = torch.randn(2, 3, 8, 8)
    with rebuilding({first}) as run:
        loss = second(run(first, images)).sum()
    with torch.no_grad():
        (images if changed == "maps" else first.conv.weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@both_forms
def test_autocast_around_backward_rounds_no_gradient():
    torch.manual_seed(0)
    unit, x = ConvUnit(3, 8), torch.randn(2, 3, 16, 16)
    loss = unit(x).square().sum()
    expected = torch.autograd.grad(loss, list(unit.parameters()), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(loss, list(unit.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name, size", [("segnet", (64, 64)), ("classnet", (128, 128))])
def test_parameters_of_a_functional_call_serve_its_backward(name, size):
    """The network has its own ones back by then."""
    torch.manual_seed(0)
    fast, images = build(name, num_classes=3, width=0.1, recompute=1 / 3).double(), torch.randn(1, 3, *size).double()
    literal = build(name, num_classes=3, width=0.1, implementation="literal").double()
    given = {key: (1.1 * p.detach()).requires_grad_() for key, p in fast.named_parameters()}
    results = []
    for network in (fast, literal):
        outputs = torch.func.functional_call(network, given, (images,))
        loss = (outputs if name == "segnet" else outputs.classes).square().sum()
        results.append(torch.autograd.grad(loss, list(given.values()), allow_unused=True))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)


def test_a_hooked_stem_is_called_once():
    network = build("segnet", num_classes=3, width=0.1, recompute=1 / 3)
    seen = []
    network.encoder[0][0].register_forward_hook(lambda *call: seen.append(call))
    network(torch.randn(1, 3, 64, 64)).sum().backward()
    assert len(seen) == 1


def test_a_unit_with_a_forward_of_its_own_keeps_its_output():
    """What `agc_unit` computes again would be something else."""
    torch.manual_seed(0)
    network, images = build("segnet", num_classes=3, width=0.1).double(), torch.randn(1, 3, 64, 64).double()
    for unit in network.modules():
        if isinstance(unit, ConvUnit):
            unit.forward = lambda *given, run=unit.forward, **options: _doubled(run(*given, **options))
    gradients = []
    for budget in (0, 1 / 3):
        network.recompute = budget
        gradients.append(torch.autograd.grad(network(images).square().sum(), list(network.parameters())))
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, kept, rtol=1e-12, atol=1e-12)


def _doubled(result):
    return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result


def test_upsampled_maps_are_computed_again():
    """ClassNet's largest ones, for no arithmetic."""
    network, images = build("classnet", num_classes=3, width=0.1, recompute=0.01), torch.randn(1, 3, 128, 128)
    calls = []
    run = network.upsample.forward
    network.upsample.forward = lambda maps: calls.append(maps.shape) or run(maps)
    loss = network(images).classes.sum()
    forward = len(calls)
    loss.backward()
    assert forward == 7 and len(calls) == 14


def test_what_has_no_numbers_is_not_computed_again():
    network = build("classnet", num_classes=3, width=0.1, recompute=1 / 3).to("meta")
    assert network(torch.empty(2, 3, 128, 128, device="meta")).classes.shape == (2, 3, 128, 128)


def test_a_budget_is_a_share():
    with pytest.raises(UserError, match="recompute='much' must be a share of a step's arithmetic"):
        build("segnet", width=0.1, recompute="much")
    with pytest.raises(UserError, match=r"recompute=0.5 must be a share"):
        build("classnet", width=0.1, recompute=0.5)


@pytest.mark.parametrize("channels", [1, 29, 32, 48])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_levels_are_added_alike_in_every_layout(channels, dtype, memory_format):
    """Bit for bit: rows at a time or map by map, each of a minibatch its own."""
    maps = torch.randn(3, channels, 5, 7).to(dtype).contiguous(memory_format=memory_format)
    level = torch.randn(3, channels)
    expected = maps + level.to(dtype)[:, :, None, None]
    assert passes.add_levels(maps, level) is maps and torch.equal(maps, expected)
    assert maps.is_contiguous(memory_format=memory_format)
    view = torch.randn(3, channels, 5, 14).to(dtype)[..., ::2]
    expected = view + level.to(dtype)[:, :, None, None]
    assert torch.equal(passes.add_levels(view, level), expected)
