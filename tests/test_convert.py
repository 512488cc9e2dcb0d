"""AGC in other people's networks: the same network, with equation (1) where batch normalisation was."""

import copy
import io
import random
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from agcseg import AGC2d, AGCReLU2d, ConvUnit, agc, agc_relu, convert_batchnorm
from agcseg.nn.norms import NORMS
from agcseg.nn.pairs import Deferred, agc_conv2d, paired
from agcseg.nn.unit import Geometry


class Literal(nn.Module):
    """Equation (1) in torch's own operations."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias, self.mean_scale = layer.weight, layer.bias, layer.mean_scale

    def forward(self, input):
        z = input
        weight, bias, mean_scale = (p.view(1, -1, 1, 1) for p in (self.weight, self.bias, self.mean_scale))
        return (z - mean_scale * z.mean((2, 3), keepdim=True)) * weight + bias


def both(model, mean_scale=0.8):
    """A network with AGC written out, and the same converted, each with parameters of its own, in float64."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    model = model.double()
    literal = convert_batchnorm(copy.deepcopy(model), mean_scale, fuse=False).model
    for name, module in list(literal.named_modules()):
        if type(module) is AGC2d:
            literal.set_submodule(name, Literal(module))
    conversion = convert_batchnorm(model, mean_scale)
    assert conversion.model is model
    return literal, model


def results(model, x):
    x = x.detach().requires_grad_()
    torch.manual_seed(0)
    random.seed(0)
    output = model(x)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    grads = torch.autograd.grad((output * weights).sum(), [x, *model.parameters()], allow_unused=True)
    return dict(zip(["output", "input", *dict(model.named_parameters())], [output, *grads], strict=True))


def equal(literal, converted, x=None):
    x = torch.randn(4, 3, 12, 14, dtype=torch.float64) if x is None else x
    expected, got = results(literal, x), results(converted, x)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert (value is None) == (got[name] is None), name
        if value is not None:
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-10, msg=name)


def kept(model, x):
    sizes = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    del output
    return sum(size for size, _ in sizes.values())


class Block(nn.Module):
    """Everything the conversion distinguishes, with one shared in-place ReLU as ResNet has it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)  # has a bias
        self.conv4, self.bn4 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv5, self.bn5 = nn.Conv2d(8, 8, (1, 2), padding="same", padding_mode="circular"), nn.BatchNorm2d(8)
        self.conv6, self.bn6 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.relu, self.identity = nn.ReLU(inplace=True), nn.Identity()
        self.linear, self.bn7 = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        x = self.relu(self.bn1(self.identity(self.conv1(x))))
        identity = x
        x = F.hardswish(self.bn2(input=self.conv2(input=x)))
        x = self.bn3(self.conv3(x)).relu()
        x = self.bn4(self.conv4(x))
        x += identity
        x = self.bn5(self.conv5(self.relu(x)))
        y = self.conv6(x)
        x = self.bn6(y) + y
        return self.linear(F.silu(x).mean((2, 3)))


def test_what_is_fused_and_what_is_left():
    model = Block()
    before, methods = list(model.modules()), type(model)
    conversion = convert_batchnorm(model)
    assert conversion.model is model and type(model) is methods and list(model.modules()) == before
    assert conversion.replaced == [f"bn{i}" for i in range(1, 7)]
    assert conversion.fused == ["bn1", "bn2", "bn3", "bn4"]
    assert conversion.left == {
        "bn5": "apart: its convolution pads by 'same'",
        "bn6": "apart: its convolution is read elsewhere too",
        "bn7": "stays, BatchNorm1d: it is not BatchNorm2d",
    }
    assert str(conversion).splitlines() == [
        "Block: 6 layers of batch normalisation are AGC now, "
        "4 AGC layers run as one step with the convolution in front of them.",
        "  1 apart: its convolution pads by 'same': bn5",
        "  1 apart: its convolution is read elsewhere too: bn6",
        "  1 stays, BatchNorm1d: it is not BatchNorm2d: bn7",
    ]


def test_converted_is_the_formula_in_value_gradient_and_keys():
    torch.manual_seed(0)
    block = Block()
    keys = [key for key in block.state_dict() if "running" not in key and "num_batches" not in key or "bn7" in key]
    literal, converted = both(block)
    assert {*keys, *(f"bn{i}.mean_scale" for i in range(1, 7))} == set(converted.state_dict())
    equal(literal, converted)
    equal(literal.eval(), converted.eval())
    with torch.no_grad():
        x = torch.randn(1, 3, 9, 9, dtype=torch.float64)
        torch.testing.assert_close(converted(x), literal(x), rtol=0, atol=1e-12)


def test_gain_of_zero_frozen_parts_and_second_derivatives():
    literal, converted = both(Block())
    for model in (literal, converted):
        model.bn2.weight.data[:3] = 0
        model.conv3.requires_grad_(False)
        model.bn4.requires_grad_(False)
        model.conv4.requires_grad_(False)
    x = torch.randn(2, 3, 12, 14, dtype=torch.float64)
    parameters = []
    for model in (literal, converted):
        gradients = torch.autograd.grad(
            model(x).square().sum(), [p for p in model.parameters() if p.requires_grad], create_graph=True,
            allow_unused=True,
        )  # fmt: skip
        wanted = [model.conv1.weight, model.bn1.weight, model.bn3.mean_scale, model.conv2.weight]
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients if g is not None), wanted)
        parameters.append([g for g in gradients if g is not None] + list(second))
    for expected, got in zip(*parameters, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_norm_without_shift_gets_one(frozen):
    norm = nn.BatchNorm2d(4)
    norm.bias = None  # as bias=False makes it in newer versions of torch
    norm.weight.requires_grad_(not frozen)
    model = convert_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), norm)).model
    assert (
        model[1].bias.tolist() == [0] * 4 and model[1].bias.requires_grad == model[1].mean_scale.requires_grad != frozen
    )
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(model(x), agc(F.conv2d(x, model[0].weight, model[0].bias), *model[1].parameters()))


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(stride=(2, 2), padding=(3, 3)),
        Geometry(padding=(2, 2), dilation=(2, 2)),
        Geometry(stride=(1, 2), padding=(0, 1), groups=2),
        Geometry(groups=4),
    ],
)
def test_pairs_of_any_geometry(geometry):
    x = torch.randn(2, 4, 11, 13, dtype=torch.float64, requires_grad=True)
    filters = torch.randn(8, 4 // geometry.groups, 3, 3, dtype=torch.float64, requires_grad=True)
    vectors = [torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    z = F.conv2d(x, filters, None, *geometry)
    outputs = agc_conv2d(x, filters, *vectors, geometry=geometry), agc(z, *vectors)
    weights = torch.randn_like(z)
    results = [(y, *torch.autograd.grad(y, (x, filters, *vectors), weights)) for y in outputs]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_a_pair_keeps_nothing_but_the_input():
    """Without a ReLU behind it too; BN keeps the convolution's output as well."""
    x = torch.randn(2, 8, 32, 32, requires_grad=True)
    pair = nn.Sequential(nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16))
    converted = convert_batchnorm(copy.deepcopy(pair)).model
    assert kept(pair, x) > x.numel() * 4 * 2.5
    assert kept(converted, x) - x.numel() * 4 == 2 * 16 * 4  # the means
    with torch.autocast("cpu", torch.bfloat16):
        half = x.bfloat16().detach().requires_grad_()
        assert kept(converted, half) - half.numel() * 2 == 2 * 16 * 4
        apart = convert_batchnorm(copy.deepcopy(pair), fuse=False).model
        copies = pair[0].weight.numel() * 2  # autocast's, of the filters
        assert kept(apart, half) - half.numel() * 2 == 2 * (2 * 16 * 30 * 30 + 2 * 16 * 2) + copies


class Around(nn.Module):
    """A pair, and what a forward may do around it."""

    def __init__(self, forward=None, **layers):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.around = forward or (lambda self, x: self.run(x))
        for name, layer in layers.items():
            self.add_module(name, layer)

    def run(self, x):
        return self.relu(self.norm(self.conv(x)))

    def forward(self, x):
        return self.around(self, x)


def frozen_trunk(self, x):
    with torch.no_grad():
        x = self.run(x)
    return self.head(x)


def frozen_convolution(self, x):
    with torch.no_grad():
        x = self.conv(x)
    return self.head(self.norm(x))


def random_depth(self, x):
    x = self.run(x)
    return x + self.head(x) if torch.rand(()) + random.random() > 1 else x


def gradient_dependent(self, x):
    x = self.run(x)
    return 2 * x if torch.is_grad_enabled() else x


def attribute(self, x):
    return self.factor * self.run(x.to(next(self.parameters()).dtype))


def dropped(self, x):
    return F.dropout(self.run(x), 0.5, self.training)


def checkpointed(self, x):
    return checkpoint(self.run, x, use_reentrant=False)


def values(self, x):
    return self.run(x if x.sum() > 0 else -x)


@pytest.mark.parametrize(
    "forward",
    [
        frozen_trunk, frozen_convolution, random_depth, gradient_dependent, attribute, dropped, checkpointed, values,
    ],
)  # fmt: skip
def test_what_is_no_operation_is_kept(forward):
    """Contexts, random branches, the state of Python, checkpoints: the forward is the network's own."""
    model = Around(forward, head=nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    model.factor = 1
    literal, converted = both(model)
    literal.factor = converted.factor = 3
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        equal(literal, converted, x)
        with torch.no_grad():
            torch.manual_seed(seed)
            random.seed(seed)
            expected = literal(x)
            torch.manual_seed(seed)
            random.seed(seed)
            torch.testing.assert_close(converted(x), expected, rtol=0, atol=1e-12)


def test_autocast_regions_are_kept():
    def wide(self, x):
        with torch.autocast("cpu", enabled=False):
            x = self.conv(x.float())
        return self.norm(x)

    def inside(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.conv(x)
        return self.norm(x)

    for forward, outside in ((wide, True), (inside, False)):
        model = Around(forward)
        plain = convert_batchnorm(copy.deepcopy(model), fuse=False).model
        converted = convert_batchnorm(model).model
        x = torch.randn(2, 3, 6, 6)
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            expected, got = plain(x), converted(x)
        assert expected.dtype == got.dtype == (torch.float32 if outside else torch.bfloat16)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_own_train_methods_and_side_effects_are_kept():
    class Own(Around):
        seen, log = 0, None

        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.log, self.dropout = [], nn.Dropout(0.5)

        def forward(self, x):
            self.count += 1
            self.seen = self.run(x)
            self.log.append(self.seen)
            return self.dropout(self.seen)

        def train(self, mode=True):
            super().train(mode)
            self.dropout.eval()
            return self

    state, python = torch.get_rng_state(), random.getstate()
    model = convert_batchnorm(Own()).model
    assert model.count == 0 and model.log == [] and model.seen == 0
    assert python == random.getstate() and isinstance(model, Own) and state.shape == torch.get_rng_state().shape
    output = model.train()(torch.randn(2, 3, 6, 6))
    assert not model.dropout.training and output is model.log[0] and model.count == 1


def test_random_numbers_are_not_drawn():
    model = Around(random_depth, head=nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    state, python = torch.get_rng_state(), random.getstate()
    assert convert_batchnorm(model).replaced == ["norm", "head.1"]
    assert torch.equal(state, torch.get_rng_state()) and python == random.getstate()


def test_an_input_overwritten_between_convolution_and_norm_raises():
    def between(self, x):
        x = x * 1
        y = self.conv(x)
        F.relu(x, inplace=True)
        return self.norm(y)

    model = Around(between)
    plain = convert_batchnorm(copy.deepcopy(model), fuse=False).model
    converted = convert_batchnorm(model).model
    x = torch.randn(2, 3, 6, 6)
    with pytest.raises(RuntimeError, match="modified in place before its output was read.*fuse=False"):
        converted(x)
    with torch.no_grad():
        assert torch.equal(plain(x), converted(x))


class Quantised(nn.Conv2d):
    """Other weights for its own call, as in training with weights of few bits."""

    def forward(self, x):
        weight = self.weight.data
        self.weight.data = weight.sign()
        y = super().forward(x)
        self.weight.data = weight
        return y


class Frozen(nn.Conv2d):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


def test_convolutions_with_a_forward_of_their_own():
    x = torch.randn(2, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Frozen(3, 4, 3), nn.BatchNorm2d(4))
    converted = convert_batchnorm(model).model
    converted(x).sum().backward()
    assert [p.grad is not None for p in converted.parameters()] == [False] * 4 + [True] * 3
    converted = convert_batchnorm(nn.Sequential(Quantised(3, 4, 3), nn.BatchNorm2d(4))).model
    with pytest.raises(RuntimeError, match="were modified in place before its output was read"):
        converted(x)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].forward = partial(nn.BatchNorm2d.forward, model[1])
    replaced, left = convert_batchnorm(model)[1::2]
    assert not replaced and left == {"1": "stays, BatchNorm2d: its forward was replaced"}


def test_without_numbers():
    model = convert_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).model.to("meta")
    assert model(torch.empty(2, 3, 6, 6, device="meta")).shape == (2, 4, 4, 4)


def test_a_norm_without_tensors_becomes_like_the_network():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False, track_running_stats=False)).double()
    convert_batchnorm(model)
    assert model[1].mean_scale.dtype == torch.float64 and model(torch.randn(1, 3, 8, 8).double()).isfinite().all()


def test_a_wrapped_network_is_converted_before(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_gloo_available():
        pytest.skip("no gloo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="DistributedDataParallel, which would not see λ: convert, then wrap"):
            convert_batchnorm(nn.parallel.DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
        sharded = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        distributed.fsdp.fully_shard(sharded, mesh=distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="sharded by fully_shard, which would not see λ: convert, then shard"):
            convert_batchnorm(sharded)
    finally:
        distributed.destroy_process_group()


def test_checkpointing_goes_on_saving_memory():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointWrapper,
        apply_activation_checkpointing,
    )

    model = convert_batchnorm(nn.Sequential(Around(), Around(lambda self, x: self.run(x[:, :3])))).model
    x = torch.randn(2, 3, 16, 16)
    before, expected = kept(model, x), model(x)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Around))
    assert isinstance(model[0], CheckpointWrapper)
    assert torch.equal(model(x), expected) and kept(model, x) < 0.7 * before


def test_hooks_run_and_see_maps():
    """Of every layer and of what contains them, hung on before or after; pruning and parametrisations too."""
    names = ("0.conv", "0.norm", "0.relu", "0", "")
    for early in (True, False):
        calls = []

        def hang(model, calls=calls):
            for name in names:
                module = model.get_submodule(name)
                module.register_forward_hook(lambda m, i, o: calls.append((m, type(i[0]), type(o))))
                module.register_full_backward_hook(lambda m, i, o: calls.append((m, o[0].shape)))
            return model

        model = nn.Sequential(Around(), nn.Flatten())
        literal, converted = both(model)
        conversion = convert_batchnorm(hang(nn.Sequential(Around(), nn.Flatten()))) if early else None
        if early:
            assert conversion.fused == [] and conversion.left == {"0.norm": "apart: it has hooks"}
            conversion.model.double().load_state_dict(converted.state_dict())
            converted = conversion.model
        else:
            hang(converted)
        equal(literal, converted)
        assert [type(call[0]) for call in calls[:5]] and len(calls) == 10
        assert all(kind is torch.Tensor for call in calls if len(call) == 3 for kind in call[1:])


def test_hooks_of_what_stands_between():
    """The convolution is the last of one container, the norm the first of another."""
    literal, converted = both(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.BatchNorm2d(4))))
    equal(literal, converted)
    shapes = []
    for module in (converted[0], converted[1]):
        module.register_full_backward_hook(lambda m, i, o: shapes.append(o[0].shape))
        module.register_forward_hook(lambda m, i, o: shapes.append(o.shape) or o)
    equal(literal, converted)
    assert shapes == [(4, 4, 10, 12)] * 4


def test_hooks_of_each_norm_of_a_convolution_and_of_an_identity():
    """As in detectors, whose levels share the convolutions of a head."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.between = nn.Conv2d(3, 4, 3), nn.Identity()
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

        def forward(self, x):
            return sum(norm(self.between(self.conv(x))) * i for i, norm in enumerate(self.norms, 1))

    literal, converted = both(Head())
    equal(literal, converted)
    for name in ("norms.0", "between"):
        shapes = []
        hook = converted.get_submodule(name).register_full_backward_hook(lambda m, i, o: shapes.append(o[0].shape))  # noqa: B023
        equal(literal, converted)
        assert shapes and set(shapes) == {(4, 4, 10, 12)}
        hook.remove()


def test_pruned_and_parametrised_convolutions():
    for change in (lambda conv: prune.l1_unstructured(conv, "weight", 0.5), parametrizations.weight_norm):
        model = Around()
        change(model.conv)
        conversion = convert_batchnorm(model)
        assert conversion.fused == []
        later = convert_batchnorm(Around()).model
        later.conv.weight.data.copy_(model.conv.weight.detach())
        change(later.conv)
        for _ in range(2):  # the second time with filters that were made afresh
            x = torch.randn(2, 3, 8, 8)
            outputs = [network(x) for network in (conversion.model, later)]
            torch.testing.assert_close(*outputs)
            outputs[1].sum().backward()


def test_what_reads_a_convolution_gets_its_maps():
    model = convert_batchnorm(Around()).model
    plain = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    plain.weight = model.conv.weight
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    maps, expected = model.conv(x), plain(x)
    assert isinstance(model.conv, nn.Conv2d) and isinstance(maps, torch.Tensor) and maps.shape == expected.shape
    assert torch.equal(maps, expected) and torch.equal(torch.cat([maps, maps]), torch.cat([expected] * 2))
    maps += 1  # in place, as on any tensor
    torch.testing.assert_close(model.norm(maps), model.norm(expected + 1))
    assert torch.equal(*[torch.autograd.grad(m.square().sum(), x)[0] for m in (maps, expected + 1)])
    x.requires_grad_(False)
    with torch.no_grad():
        assert type(model.conv(x)) is torch.Tensor
    assert type(model.conv(x)) is Deferred


def test_a_reader_that_hides_from_torch_loses_no_gradient():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, maps):
            return 2 * maps

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    model = convert_batchnorm(Around()).model
    maps = model.conv(torch.randn(2, 3, 6, 6))
    with pytest.raises(RuntimeError):
        Twice.apply(maps).sum().backward()
    for read in (
        lambda: torch.func.grad(torch.sum)(maps),
        lambda: torch.func.vmap(torch.sum)(maps),
        lambda: torch.Tensor.as_subclass(maps, torch.Tensor),
        lambda: torch.autograd.Variable(maps),
    ):
        with pytest.raises(RuntimeError, match=r"in a way that hides it.*convert_batchnorm\(model, fuse=False\)"):
            read()


def test_a_jacobian_of_all_rows_at_once():
    model = convert_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid())).model.double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    rows = [torch.autograd.functional.jacobian(lambda x: model(x).sum((2, 3)), x, vectorize=v) for v in (True, False)]
    torch.testing.assert_close(*rows)


def test_layers_exchanged_after_conversion():
    x = torch.randn(2, 3, 6, 6)
    for name, other in (("conv", nn.Conv2d(3, 4, 1)), ("norm", nn.BatchNorm2d(4)), ("relu", nn.SiLU())):
        model = convert_batchnorm(Around()).model
        setattr(model, name, other)
        norm = model.norm
        maps = F.conv2d(x, model.conv.weight, model.conv.bias, padding=model.conv.padding)
        expected = agc(maps, norm.weight, norm.bias, torch.ones(4))
        if name == "norm":
            expected = copy.deepcopy(norm)(maps)
        torch.testing.assert_close(model(x), model.relu(expected))


def test_copies_and_files_are_converted_networks():
    model = convert_batchnorm(Around(run)).model
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other.conv) is paired(nn.Conv2d) and other.conv.watched == (other.norm,)
        assert torch.equal(other(x), expected)
        other.load_state_dict(model.state_dict())


def run(self, x):
    return self.run(x)


def test_a_second_call_and_undoing():
    model = nn.Sequential(Around(), ConvUnit(4, 4))
    first = convert_batchnorm(model, fuse=False)
    assert (first.replaced, first.fused, type(model[0].conv)) == (["0.norm"], [], nn.Conv2d)
    second = convert_batchnorm(model)
    assert (second.replaced, second.fused, second.left) == ([], ["0.norm"], {})
    assert str(second).startswith("Sequential: nothing to replace, 1 AGC layers run as one step")
    assert type(model[0].conv) is paired(nn.Conv2d)
    convert_batchnorm(model, fuse=False)
    assert type(model[0].conv) is nn.Conv2d and not hasattr(model[0].conv, "watched")
    convert_batchnorm(model)
    torch.nn.utils.parametrizations.weight_norm(model[0].conv)
    convert_batchnorm(model, fuse=False)
    assert not isinstance(model[0].conv, paired(nn.Conv2d)) and "watched" not in model[0].conv.__dict__
    assert isinstance(model[0].conv, nn.Conv2d) and model(torch.randn(1, 3, 6, 6)).shape == (1, 4, 6, 6)


def test_scale_shift_and_the_object_itself_are_taken_over():
    block = Block()
    norm, weight = block.bn1, block.bn1.weight
    handles = [norm]
    convert_batchnorm(block)
    assert block.bn1 is norm is handles[0] and type(norm) is AGC2d and norm.weight is weight
    assert norm.mean_scale.tolist() == [1.0] * 8 and not hasattr(norm, "running_mean") and not hasattr(norm, "eps")
    assert repr(norm) == "AGC2d(8, mean_scale=1)"
    norm.reset_parameters()


def test_a_layer_with_two_names_and_norms_of_other_kinds():
    class FrozenBatchNorm2d(nn.Module):  # of an unknown package
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(4))

    model = nn.ModuleDict({"first": nn.BatchNorm2d(4), "frozen": FrozenBatchNorm2d(), "instance": nn.InstanceNorm1d(4)})
    model["again"] = model["first"]
    conversion = convert_batchnorm(model)
    assert conversion.replaced == ["first"] and model["again"] is model["first"] and type(model["again"]) is AGC2d
    assert conversion.left["frozen"] == "stays, FrozenBatchNorm2d: it is not BatchNorm2d"
    assert conversion.left["first"].startswith("apart: it is not seen in a trace of the network (")
    assert convert_batchnorm(nn.BatchNorm2d(4)).replaced == [""]


def test_frozen_norms_of_torchvision():
    ops = pytest.importorskip("torchvision").ops
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), ops.FrozenBatchNorm2d(4), nn.ReLU())
    conversion = convert_batchnorm(model)
    assert conversion.fused == ["1"] and set(model.state_dict()) == {"0.weight", "1.weight", "1.bias", "1.mean_scale"}
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    assert [name for name, _ in model.requires_grad_().named_parameters()] == ["0.weight"]


def test_synchronised_norms_of_maps_only():
    maps = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(*maps, nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    conversion = convert_batchnorm(model)
    assert conversion.replaced == conversion.fused == ["1"]
    assert conversion.left == {"5": "stays, SyncBatchNorm: it is not seen behind a two-dimensional layer"}


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
def test_norms_of_timm_that_bring_their_activation(act):
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layers.BatchNormAct2d(4, act_layer=act)).double()
    conversion = convert_batchnorm(model, 0.8)
    assert conversion.replaced == conversion.fused == ["1"] and isinstance(model[1], AGC2d)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    norm = model[1]
    expected = act()(agc(F.conv2d(x, model[0].weight, model[0].bias), norm.weight, norm.bias, norm.mean_scale))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_what_is_frozen_and_in_evaluation_stays_so():
    model = nn.Sequential(Around(), Around(), nn.Dropout())
    model[1] = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    model[0].requires_grad_(False)
    model.train()[2].eval()
    model[0].norm.eval()
    conversion = convert_batchnorm(model)
    assert conversion.fused == ["0.norm", "1.1"]
    assert not model[0].norm.mean_scale.requires_grad and model[1][1].mean_scale.requires_grad
    assert model.training and not model[2].training and not model[0].norm.training and model[1][1].training


def test_norm_without_affine_and_modes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), nn.ReLU()).eval()
    conversion = convert_batchnorm(model)
    assert conversion.fused == ["1"] and not conversion.model.training
    assert conversion.model.state_dict().keys() == {"0.weight", "1.weight", "1.bias", "1.mean_scale"}


def test_parts_of_what_cannot_be_traced_or_copied():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.inner = nn.ModuleList([Around(), Around()]), Around(values)
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.generator = (i for i in range(3))  # cannot be copied

        def forward(self, features):
            x = sum(block(x) for block, x in zip(self.blocks, features, strict=True))
            return self.norm(self.conv(x)) + self.inner(x[:, :3])

    model = Decoder()
    conversion = convert_batchnorm(model)
    assert conversion.fused == ["blocks.0.norm", "blocks.1.norm"]
    assert set(conversion.left) == {"norm", "inner.norm"} and "cannot pickle" in conversion.left["norm"]
    del model.generator
    assert "norm" in convert_batchnorm(model).left  # its forward goes over a list

    sequence = nn.Sequential(Around(values), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    assert convert_batchnorm(sequence).fused == ["2"]  # what cannot be traced is a step of the sequence


def test_maps_of_one_position_are_warned_of():
    def pooled():
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    with pytest.warns(UserWarning, match="^2 get maps of 1x1, of which AGC with λ = 1 leaves nothing but β"):
        model = convert_batchnorm(pooled()).model
    with pytest.warns(UserWarning, match=r"AGC2d\(4, mean_scale=1\) got maps of 1x1"):
        model(torch.randn(2, 3, 4, 4))
    model(torch.randn(2, 3, 4, 4))  # told once; a warning is an error here
    convert_batchnorm(pooled(), mean_scale=0.5).model(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("name", "norms", "fused"),
    [("resnet50", 53, 53), ("segmentation.deeplabv3_resnet50", 60, 60), ("densenet121", 121, 59)],
)
@pytest.mark.filterwarnings("ignore:.*1x1")
def test_torchvision_trains_a_step(name, norms, fused):
    models = pytest.importorskip("torchvision").models
    constructor = models.segmentation.deeplabv3_resnet50 if "deeplab" in name else getattr(models, name)
    options = {"weights": None, "weights_backbone": None} if "deeplab" in name else {"weights": None}
    conversion = convert_batchnorm(constructor(**options))
    assert (len(conversion.replaced), len(conversion.fused)) == (norms, fused)
    model = conversion.model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, 0.9)
    output = model(torch.randn(2, 3, 64, 64))
    loss = (output["out"] if isinstance(output, dict) else output).square().mean()
    loss.backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_networks_written_with_agc_are_paired_too():
    """Also with its ReLU; not a subclass, which may mean something else."""
    other = NORMS["agc"](4, background="median")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), AGCReLU2d(4), nn.Conv2d(4, 4, 3), other).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = model(x)
    assert convert_batchnorm(model).fused == ["1"]
    output = model(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    maps, norm = model[0](x), model[1]
    assert type(maps) is Deferred
    torch.testing.assert_close(
        agc_relu(maps, norm.weight, norm.bias, norm.mean_scale), agc_relu(maps * 1, *norm.parameters())
    )


@pytest.mark.parametrize("wrapped", ["block", "convolution", "unit"])
def test_fully_sharded_by_block(wrapped, tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not distributed.is_gloo_available():
        pytest.skip("no gloo")
    blocks = [Around(run, second=nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))) for _ in range(2)]
    model = nn.Sequential(ConvUnit(3, 4)) if wrapped == "unit" else nn.Sequential(blocks[0])
    convert_batchnorm(model)
    reference, x = copy.deepcopy(model), torch.randn(2, 3, 8, 8)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        for part in model if wrapped != "convolution" else [model[0].conv]:
            fsdp.fully_shard(part, mesh=mesh)
        fsdp.fully_shard(model, mesh=mesh)
        for network in (model, reference):
            output = network(x)
            output.square().sum().backward()
        for p, expected in zip(model.parameters(), reference.parameters(), strict=True):
            assert (p.grad is None) == (expected.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad.full_tensor(), expected.grad, rtol=0, atol=1e-4)
    finally:
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tools_of_torch_take_converted_networks():
    """Script, trace, fx, functional calls, compilation and export."""
    model = convert_batchnorm(nn.Sequential(Around(run), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).model
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    plain = nn.Sequential(model[0].conv, model[0].norm, model[0].relu, *model[1:])
    for form in (
        torch.jit.script(plain), torch.jit.trace(model, x), torch.fx.symbolic_trace(model),
        torch.compile(model, backend="aot_eager", fullgraph=True), torch.export.export(model, (x,)).module(),
    ):  # fmt: skip
        torch.testing.assert_close(form(x), expected, rtol=0, atol=1e-5)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    expected.square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-4)


def test_feature_extractors_of_torchvision():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = convert_batchnorm(Around(run)).model
    x = torch.randn(2, 3, 8, 8)
    features = extraction.create_feature_extractor(model, ["conv", "norm", "relu"])(x)
    torch.testing.assert_close(features["relu"], model(x))
    torch.testing.assert_close(features["conv"], F.conv2d(x, model.conv.weight, padding=1))


def test_parts_of_torchvisions_networks_go_on_working():
    """A block called by itself, a getter of intermediate layers, and a state_dict with a version of its own."""
    models = pytest.importorskip("torchvision").models
    x, resnet = torch.randn(2, 3, 32, 32), models.resnet18(weights=None)
    convert_batchnorm(resnet, 0.8)
    getter = models._utils.IntermediateLayerGetter(resnet, {"conv1": "maps", "layer1": "out"})
    found = getter(x)
    assert torch.equal(found["out"], resnet.layer1(resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))))
    assert torch.equal(found["maps"], F.conv2d(x, resnet.conv1.weight, stride=2, padding=3))
    mnasnet = models.mnasnet0_5(weights=None)
    convert_batchnorm(mnasnet, 0.8)
    other = convert_batchnorm(models.mnasnet0_5(weights=None)).model
    other.load_state_dict(mnasnet.state_dict())
    assert type(mnasnet) is models.MNASNet and torch.equal(other.eval()(x), mnasnet.eval()(x))
