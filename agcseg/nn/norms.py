"""The normalisations that `norm=` names: callables shaped like BatchNorm2d, from a number of channels to a module.

The modules defined here take maps (N, C, H, W), have parameters of shape (C,), or (1,) for the whole layer, and compute
on half-precision maps in float32. A norm changes what its `ConvUnit` does around it by having one of two methods:
`activate(maps)` takes the place of the ReLU, and the convolution uses `standardise(filters)` instead of its filters.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from agcseg.nn.agc import AGC2d, statistics_dtype
from agcseg.nn.background import BackgroundAGC2d


def agc_norm(
    num_features: int,
    mean_scale: float = 1.0,
    background: str = "map",
    window: int | float = 0.5,
    quantile: float = 0.5,
    median_gradient: bool = False,
) -> AGC2d:
    """AGC2d, whose background is the mean of the map, or AGC with another one.

    Args:
        mean_scale: λ at the start.
        background, window, quantile, median_gradient: see `agcseg.nn.background.BackgroundAGC2d`.

    Raises:
        UserError (a ValueError): there is no such background, or a number is out of range.
    """
    if background == "map":
        return AGC2d(num_features, mean_scale=mean_scale)
    return BackgroundAGC2d(num_features, mean_scale, background, window, quantile, median_gradient)


def center(num_features: int, mean_scale: float = 1.0) -> AGC2d:
    """AGC whose λ is fixed: 1 subtracts each map's mean, 0 leaves gain and bias alone."""
    norm = AGC2d(num_features, mean_scale=mean_scale)
    norm.mean_scale.requires_grad_(False)
    return norm


class AGCStd2d(AGC2d):
    """AGC divided by each map's standard deviation: (z - λ·mean(z)) / sqrt(var(z) + ε)·γ + β.

    With λ = 1 it is instance normalisation. With another λ a constant map, as behind dead inputs, or one of 1x1 is
    scaled up by 1/sqrt(ε).
    """

    def __init__(self, num_features: int, mean_scale: float = 1.0, eps: float = 1e-5) -> None:
        super().__init__(num_features, mean_scale=mean_scale)
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        maps = input.to(statistics_dtype(input))
        variance, mean = torch.var_mean(maps, (2, 3), correction=0, keepdim=True)
        weight, bias, mean_scale = (p.view(1, -1, 1, 1) for p in (self.weight, self.bias, self.mean_scale))
        return ((maps - mean_scale * mean) * (weight * (variance + self.eps).rsqrt()) + bias).to(input.dtype)


class MeanOnlyBatchNorm2d(nn.Module):
    """Batch normalisation without the division (Salimans & Kingma 2016): (z - mean)·γ + β, the mean of a minibatch.

    Evaluation subtracts the running mean, which moves by `momentum` towards each minibatch's.
    """

    running_mean: Tensor

    def __init__(self, num_features: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))

    def forward(self, input: Tensor) -> Tensor:
        maps, mean = input.to(statistics_dtype(input)), self.running_mean
        if self.training:
            mean = maps.mean((0, 2, 3))
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        mean, weight, bias = (v.view(1, -1, 1, 1) for v in (mean, self.weight, self.bias))
        return ((maps - mean) * weight + bias).to(input.dtype)


class FRN2d(nn.Module):
    """Filter response normalisation z / sqrt(mean(z²) + |ε|)·γ + β, the mean over each map (Singh & Krishnan 2020).

    Brings its own activation, the thresholded linear unit max(·, τ) with a trained τ (`threshold`, starts at 0). ε is
    not trained.
    """

    def __init__(self, num_features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.threshold = nn.Parameter(torch.zeros(num_features))

    def forward(self, input: Tensor) -> Tensor:
        maps = input.to(statistics_dtype(input))
        power = maps.square().mean((2, 3), keepdim=True)
        weight, bias = (p.view(1, -1, 1, 1) for p in (self.weight, self.bias))
        return (maps * (weight * (power + abs(self.eps)).rsqrt()) + bias).to(input.dtype)

    def activate(self, maps: Tensor) -> Tensor:
        return torch.maximum(maps, self.threshold.view(1, -1, 1, 1).to(maps.dtype))


class DynamicTanh2d(nn.Module):
    """Dynamic tanh, DyT (Zhu et al. 2025, arXiv 2503.10622): tanh(α·z)·γ + β, point by point, without statistics.

    α, (1,), is one number for the whole layer; it starts at 0.5 as in the paper.
    """

    def __init__(self, num_features: int, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), float(alpha)))
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, input: Tensor) -> Tensor:
        maps = torch.tanh(self.alpha * input.to(statistics_dtype(input)))
        return (maps * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(input.dtype)


class DynamicErf2d(nn.Module):
    """Dynamic erf, Derf (Chen et al. 2025, arXiv 2512.10938): erf(α·z + s)·γ + β, point by point, without statistics.

    α and s (`shift`), (1,) each, are two numbers for the whole layer; they start at 0.5 and 0 as in the paper.
    """

    def __init__(self, num_features: int, alpha: float = 0.5, shift: float = 0.0) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), float(alpha)))
        self.shift = nn.Parameter(torch.full((1,), float(shift)))
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, input: Tensor) -> Tensor:
        maps = torch.erf(self.alpha * input.to(statistics_dtype(input)) + self.shift)
        return (maps * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(input.dtype)


class ScaledWS2d(nn.Module):
    """Scaled weight standardisation (Brock et al. 2021): every filter with mean 0 and the norm that keeps a variance
    behind ReLU, sqrt(2 / (1 - 1/π)). The maps get γ and β only. Initial weights matter by their direction alone."""

    def __init__(self, num_features: int, eps: float = 1e-4) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def standardise(self, filters: Tensor) -> Tensor:
        variance, mean = torch.var_mean(filters, (1, 2, 3), correction=0, keepdim=True)
        norm = (variance * filters[0].numel()).clamp(min=self.eps).sqrt()
        return (filters - mean) * (math.sqrt(2 / (1 - 1 / math.pi)) / norm)

    def forward(self, input: Tensor) -> Tensor:
        return (input * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(input.dtype)


def group_norm(num_features: int, groups: int = 32, eps: float = 1e-5) -> nn.GroupNorm:
    """Group normalisation with as many of `groups` as divide the channels (29 channels: 1 group)."""
    return nn.GroupNorm(math.gcd(groups, num_features), num_features, eps=eps)


def layer_norm(num_features: int, eps: float = 1e-5) -> nn.GroupNorm:
    """Layer normalisation over (C, H, W) with an affine per channel: group normalisation with one group."""
    return nn.GroupNorm(1, num_features, eps=eps)


def instance_norm(num_features: int, eps: float = 1e-5) -> nn.InstanceNorm2d:
    """Instance normalisation with an affine per channel and no running statistics."""
    return nn.InstanceNorm2d(num_features, eps=eps, affine=True)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it is a batch normalisation, torch's or another's: it has running statistics, and is no instance
    normalisation, which may have them too."""
    return hasattr(module, "running_mean") and not isinstance(module, nn.modules.instancenorm._InstanceNorm)


# None is no normalisation: the convolution then has a bias of its own.
NORMS: dict[str, Callable[..., nn.Module] | None] = {
    "agc": agc_norm,
    "bn": nn.BatchNorm2d,
    "group": group_norm,
    "instance": instance_norm,
    "layer": layer_norm,
    "none": None,
    "center": center,
    "agc_std": AGCStd2d,
    "mean_only": MeanOnlyBatchNorm2d,
    "frn": FRN2d,
    "ws": ScaledWS2d,
    "dyt": DynamicTanh2d,
    "derf": DynamicErf2d,
}
OF_MINIBATCHES = ("bn", "mean_only")  # whose statistics are of a whole minibatch
