"""The normalisations that `norm=` names: callables shaped like BatchNorm2d, from a number of channels to a module."""

import math
from collections.abc import Callable

from torch import nn

from agcseg.nn.agc import AGC2d


def group_norm(num_features: int, groups: int = 32, eps: float = 1e-5) -> nn.GroupNorm:
    """Group normalisation with as many of `groups` as divide the channels (29 channels: 1 group)."""
    return nn.GroupNorm(math.gcd(groups, num_features), num_features, eps=eps)


def layer_norm(num_features: int, eps: float = 1e-5) -> nn.GroupNorm:
    """Layer normalisation over (C, H, W) with an affine per channel: group normalisation with one group."""
    return nn.GroupNorm(1, num_features, eps=eps)


def instance_norm(num_features: int, eps: float = 1e-5) -> nn.InstanceNorm2d:
    """Instance normalisation with an affine per channel and no running statistics."""
    return nn.InstanceNorm2d(num_features, eps=eps, affine=True)


# None is no normalisation: the convolution then has a bias of its own.
NORMS: dict[str, Callable[..., nn.Module] | None] = {
    "agc": AGC2d,
    "bn": nn.BatchNorm2d,
    "group": group_norm,
    "instance": instance_norm,
    "layer": layer_norm,
    "none": None,
}
