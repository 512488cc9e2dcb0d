"""AGC in other people's networks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from agcseg import AGC2d, convert_batchnorm


class Block(nn.Module):
    """Everything the conversion distinguishes, with one shared in-place ReLU as ResNet has it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)  # has a bias
        self.conv4, self.bn4 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.linear, self.bn5 = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        identity = x
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x)).relu()
        x = self.bn4(self.conv4(x))
        x += identity
        return self.bn5(self.linear(self.relu(x).mean((2, 3))))


def trained(model):
    """With other values than at the start, so that γ and β are seen to be taken over."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def test_what_is_fused_and_what_is_left():
    conversion = convert_batchnorm(Block())
    assert conversion.replaced == ["bn1", "bn2", "bn3", "bn4"] and conversion.fused == ["bn1", "bn2"]
    assert conversion.left == {
        "bn3": "fused with its ReLU only: its convolution has a bias",
        "bn4": "not fused: no ReLU behind it, or more than that",
        "bn5": "stays: BatchNorm1d is not BatchNorm2d",
    }
    assert isinstance(conversion.model.conv1, nn.Conv2d) and isinstance(conversion.model.bn2, AGC2d)


def test_fused_is_unfused_in_value_and_gradient():
    torch.manual_seed(0)
    block = trained(Block()).double()
    plain = convert_batchnorm(copy.deepcopy(block), mean_scale=0.8, fuse=False).model
    fused = convert_batchnorm(block, mean_scale=0.8).model
    assert type(plain) is Block
    assert fused.state_dict().keys() == plain.state_dict().keys()
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 12, 14, dtype=torch.float64)
    results = []
    for model in (plain, fused):
        x.requires_grad_().grad = None
        output = model(x)
        (output * torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view_as(output)).sum().backward()
        results.append({"output": output, "input": x.grad, **{name: p.grad for name, p in model.named_parameters()}})
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=1e-10, msg=name)


def test_scale_and_shift_are_taken_over_and_shared():
    block = trained(Block())
    weight = block.bn1.weight
    conversion = convert_batchnorm(block)
    assert conversion.model.bn1.weight is weight and block.bn1.weight is weight
    assert conversion.model.bn1.mean_scale.tolist() == [1.0] * 8


def test_a_network_that_cannot_be_traced_is_converted_all_the_same():
    class Dynamic(Block):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    model = Dynamic()
    conversion = convert_batchnorm(model)
    assert conversion.model is model and isinstance(model.bn1, AGC2d) and conversion.fused == []
    assert conversion.left["bn1"].startswith("not fused: the network cannot be traced (")
    model(torch.randn(2, 3, 8, 8)).sum().backward()


class Around(nn.Module):
    """A sequence that can be fused, and what a forward may do around it."""

    def __init__(self, forward=None):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.behind = forward or (lambda self, maps: maps)

    def forward(self, x):
        return self.behind(self, self.relu(self.norm(self.conv(x))))


def empty_assertion(self, maps):
    if not isinstance(maps, torch.Tensor):
        raise AssertionError
    return maps


class Optional(Around):
    def forward(self, x, both=None):
        maps = super().forward(x)
        return maps if both is None else (maps, maps)


class Unused(Around):
    def __init__(self):
        super().__init__()
        self.auxiliary = nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Around(lambda self, maps: F.dropout(maps, 0.5, self.training)), "not the same in training and evaluation"),
        (Around(lambda self, maps: maps + torch.ones(1)), "or makes tensors of its own"),
        (Around(lambda self, maps: vars(self).update(seen=maps) or maps), "its forward stores something, as seen"),
        (Around(empty_assertion), "AssertionError"),
        (Optional(), "its forward has optional arguments"),
        (Unused(), "does not use auxiliary.bias"),
    ],
)
def test_what_a_trace_would_change_is_not_traced(model, reason):
    model.train()
    model.relu.eval()
    keys = {name for name in model.state_dict() if "running" not in name and "num_batches" not in name}
    conversion = convert_batchnorm(model)
    assert conversion.model is model and conversion.fused == [] and reason in conversion.left["norm"]
    assert model.state_dict().keys() == keys | {"norm.mean_scale"}
    assert model.training and model.norm.training and not model.relu.training
    assert not any("tensor_constant" in name or name == "seen" for name in vars(model))
    output = model.eval()(x := torch.randn(2, 3, 8, 8))
    assert isinstance(output, torch.Tensor) and torch.equal(output, model(x))


def test_hooks_go_on_running():
    """Of the layers themselves, of one that contains them, and of pruning."""
    calls = []
    for hooked in ("conv", "norm", "relu", ""):
        inner = Around()
        inner.get_submodule(hooked).register_forward_hook(lambda *_, hooked=hooked: calls.append(hooked))
        conversion = convert_batchnorm(nn.Sequential(inner))
        assert conversion.fused == [] and list(conversion.left) == ["0.norm"]
        conversion.model(torch.randn(2, 3, 8, 8))
    assert calls == ["conv", "norm", "relu", ""]
    model = Around()
    prune.l1_unstructured(model.conv, "weight", 0.5)
    conversion = convert_batchnorm(model)
    assert conversion.left == {"norm": "fused with its ReLU only: its convolution has hooks"}
    for _ in range(2):  # the second time with filters that were made afresh
        conversion.model(torch.randn(2, 3, 8, 8)).sum().backward()


def test_layers_called_by_keyword():
    class Keywords(Around):
        def forward(self, x):
            return self.relu(self.norm(input=self.conv(input=x)))

    conversion = convert_batchnorm(Keywords())
    assert conversion.fused == ["norm"]
    conversion.model(torch.randn(2, 3, 8, 8)).sum().backward()


def test_a_layer_with_two_names_and_norms_of_other_kinds():
    class FrozenBatchNorm2d(nn.Module):  # as torchvision has it
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(4))

    model = nn.ModuleDict({"first": nn.BatchNorm2d(4), "frozen": FrozenBatchNorm2d(), "instance": nn.InstanceNorm1d(4)})
    model["again"] = model["first"]
    conversion = convert_batchnorm(model, fuse=False)
    assert conversion.replaced == ["first"] and model["again"] is model["first"] and type(model["again"]) is AGC2d
    assert conversion.left == {"frozen": "stays: FrozenBatchNorm2d is not BatchNorm2d"}
    assert convert_batchnorm(nn.BatchNorm2d(4)).left == {"": "stays: it is the whole network; use AGC2d"}


def test_what_is_frozen_and_in_evaluation_stays_so():
    model = nn.Sequential(Around(), Around(), nn.Dropout())
    model[1] = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    model[0].requires_grad_(False)
    model.train()[2].eval()
    conversion = convert_batchnorm(model)
    assert conversion.fused == ["0.norm", "1.1"]
    assert not conversion.model.get_parameter("0.norm.mean_scale").requires_grad
    assert conversion.model.get_parameter("1.1.mean_scale").requires_grad
    assert conversion.model.training and not conversion.model.get_submodule("2").training


def test_norm_without_affine_and_modes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), nn.ReLU()).eval()
    conversion = convert_batchnorm(model)
    assert conversion.fused == ["1"] and not conversion.model.training
    assert conversion.model.state_dict().keys() == {"0.weight", "1.weight", "1.bias", "1.mean_scale"}


@pytest.mark.parametrize(
    ("name", "norms", "fused"), [("resnet50", 53, 33), ("segmentation.deeplabv3_resnet50", 60, 40)]
)
def test_torchvision_trains_a_step(name, norms, fused):
    models = pytest.importorskip("torchvision").models
    constructor = models.segmentation.deeplabv3_resnet50 if "deeplab" in name else models.resnet50
    options = {"weights": None, "weights_backbone": None} if "deeplab" in name else {"weights": None}
    conversion = convert_batchnorm(constructor(**options))
    assert (len(conversion.replaced), len(conversion.fused)) == (norms, fused)
    model = conversion.model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, 0.9)
    for _ in range(2):
        output = model(torch.randn(2, 3, 64, 64))
        loss = (output["out"] if isinstance(output, dict) else output).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
