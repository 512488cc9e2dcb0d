"""Noise between norm and activation of every unit, in training only.

Deep Control (sections 1 and 4) suggests noise in deep layers, independent of minibatch and data, in place of the one
that batch normalisation's statistics bring. It gives no formula; this one is ours.
"""

from functools import partial

import torch
from torch import Tensor, nn

from agcseg.nn.conv import ConvUnit


def noisy(maps: Tensor, gain: float, shift: float, generator: torch.Generator) -> Tensor:
    """Each map times 1 + m, plus s times its own root mean square (through which no gradient flows).

    Args:
        maps: (N, C, H, W).
        gain, shift: m and s are uniform in ±gain and ±shift, drawn for each sample and channel.
        generator: where from; on the device of `maps`.

    Returns:
        (N, C, H, W), whose expectation is `maps`.
    """
    dtype = torch.promote_types(maps.dtype, torch.float32)
    draws = 2 * torch.rand(2, *maps.shape[:2], 1, 1, generator=generator, device=maps.device, dtype=dtype) - 1
    rms = maps.detach().to(dtype).square().mean((2, 3), keepdim=True).sqrt()
    return (maps * (1 + gain * draws[0]) + shift * draws[1] * rms).to(maps.dtype)


def add_noise(network: nn.Module, gain: float, shift: float, seed: int) -> torch.Generator:
    """Make every `ConvUnit` of `network` noisy in training (see `noisy`); nothing changes in evaluation.

    The units change to their literal implementation: the fast one has no place between norm and ReLU.

    Args:
        network: any network made of `ConvUnit`, on the device it stays on.
        gain, shift: see `noisy`.
        seed: of a random generator of its own, so that noise changes neither initial weights nor the order of images.
            Replicas of a network need different ones.

    Returns:
        that generator, whose state belongs in a checkpoint.
    """
    generator = torch.Generator(next(network.parameters()).device).manual_seed(seed)

    for unit in network.modules():
        if isinstance(unit, ConvUnit):
            unit.implementation = "literal"
            unit.norm.register_forward_hook(partial(_in_training, gain=gain, shift=shift, generator=generator))
    return generator


def _in_training(module: nn.Module, inputs: tuple, maps: Tensor, **options) -> Tensor:
    return noisy(maps, **options) if module.training else maps
