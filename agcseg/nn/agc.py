"""Automatic gain control (not adaptive gradient clipping): equation (1) of Deep Control (Ruff 2017, section 2).

    O = (z - λ·mean(z))·γ + β          z = I * W, its mean taken over the map of one sample and one filter

Every sample is treated on its own: no minibatch statistic, no running average, and train() equals eval().
"""

import torch
from torch import Tensor, nn


def agc(input: Tensor, weight: Tensor, bias: Tensor, mean_scale: Tensor) -> Tensor:
    """Automatic gain control of a convolution's output, written as the paper writes it (equation 1).

    Args:
        input: raw filter outputs z, (N, C, H, W).
        weight: γ, (C,), scales the mean-subtracted signal.
        bias: β, (C,).
        mean_scale: λ, (C,), how much of each map's own mean is subtracted.

    Returns:
        (N, C, H, W) in the dtype of `input`. Half-precision inputs are reduced and scaled in float32.

    Raises:
        ValueError: `input` is not 4-dimensional, or its channels are not those of the parameters.
    """
    _check(input, weight)
    mean = input.mean((2, 3), keepdim=True, dtype=_statistics_dtype(input))
    weight, bias, mean_scale = (p.view(1, -1, 1, 1) for p in (weight, bias, mean_scale))
    return ((input - mean_scale * mean) * weight + bias).to(input.dtype)


def _check(input: Tensor, weight: Tensor) -> None:
    if input.dim() != 4:
        raise ValueError(f"agc takes maps of shape (N, C, H, W); got {tuple(input.shape)}")
    if input.shape[1] != weight.numel():
        raise ValueError(f"agc was made for {weight.numel()} channels; the input is {tuple(input.shape)}")


def _statistics_dtype(maps: Tensor) -> torch.dtype:
    return torch.float32 if maps.dtype in (torch.bfloat16, torch.float16) else maps.dtype


class AGC2d(nn.Module):
    """Automatic gain control over (N, C, H, W): `agc` with its trainable parameters. Stands where BatchNorm2d stands.

    Args:
        num_features: C, the number of filters of the convolution in front.
        mean_scale: initial λ. The paper names no initial values; 1 starts as plain mean subtraction.

    Attributes:
        weight: γ, (C,), starts at 1.
        bias: β, (C,), starts at 0.
        mean_scale: λ, (C,). The paper saw it settle between slightly negative and 2: do not clamp it, and keep weight
            decay off all three.
    """

    def __init__(self, num_features: int, mean_scale: float = 1.0, device=None, dtype=None) -> None:
        super().__init__()
        self.num_features = num_features
        self.initial_mean_scale = mean_scale
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.mean_scale = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.constant_(self.mean_scale, self.initial_mean_scale)

    def forward(self, input: Tensor) -> Tensor:
        return agc(input, self.weight, self.bias, self.mean_scale)

    def extra_repr(self) -> str:
        return f"{self.num_features}, mean_scale={self.initial_mean_scale:g}"
