"""Initial values of the convolutions. γ, β and λ keep those of their module."""

import math

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from agcseg.errors import UserError
from agcseg.nn.conv import ConvUnit

INITS = ("he", "he_centered", "identity")


def initialise(network: nn.Module, init: str = "he") -> None:
    """Fill all convolutions of `network` in place, from torch's default generator; biases become 0.

    Args:
        network: any network made of `ConvUnit` and `nn.Conv2d`.
        init: one of
            "he": Gaussian, std sqrt(2 / fan_in), as the paper (section 3; He et al. 2015).
            "he_centered": std sqrt(2 / (1 - 1/π) / fan_in), which keeps the variance of a signal whose mean is
                subtracted behind each ReLU; plain He loses a factor 0.83 per layer there (Brock et al. 2021 derive
                the same gain).
            "identity": the unit impulse in every unit marked `identity`, He elsewhere (paper, section 3).

    Raises:
        UserError: `init` is none of these.
    """
    if init not in INITS:
        raise UserError(f"init={init!r} is not known; choose from {', '.join(INITS)}")
    gain = math.sqrt(2 / (1 - 1 / math.pi)) if init == "he_centered" else math.sqrt(2)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:  # there torch would load much to do nothing
            std = gain / math.sqrt(module.weight[0].numel())
            _assign(module, torch.empty_like(module.weight).normal_(std=std))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if init == "identity":
        for module in network.modules():
            if isinstance(module, ConvUnit) and module.identity:
                weight = nn.init.dirac_(torch.empty_like(module.conv.weight))
                if module.identity == "last":
                    weight = weight.roll(weight.shape[1] - weight.shape[0], 1)
                _assign(module.conv, weight)


@torch.no_grad()
def _assign(conv: nn.Conv2d, weight: torch.Tensor) -> None:
    if is_parametrized(conv, "weight"):  # what is read is made anew each time
        conv.weight = weight
    else:
        conv.weight.copy_(weight)
