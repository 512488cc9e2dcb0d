"""AGC in other people's networks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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
