"""Networks as they run once trained: what the norm does to a convolution's output is folded into the convolution.

The mean of a convolution's output is linear in its input. With stride 1, zero padding and P positions,

    mean(x * W)_o = 1/P Σ_ijc W_ocij S_cij          S_cij the sum of x_c over the positions that tap (i, j) visits,

the sum of the map less the border rows and columns that the tap never reaches. So AGC (Deep Control, equation 1) is a
convolution with γW and a bias β - λ·mean that is known before it runs: one pass over its output instead of the two that
a mean of this output takes. Where maps are small, the many small operations of the sums cost more than the pass they
save; the values are the same. Batch normalisation's scale and shift are constants, and vanish altogether.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from agcseg.nn.agc import AGC2d, runs_eagerly, statistics_dtype
from agcseg.nn.conv import ConvUnit
from agcseg.nn.hooks import has_forward_of_its_own, has_hooks


def inference_form(network: nn.Module) -> nn.Module:
    """A copy of a network for inference, with the outputs of `network.eval()` up to rounding.

    In every `ConvUnit`, AGC becomes part of the convolution (see above) and BatchNorm2d vanishes into it. Units with
    another norm, AGC with another background than the map's mean among them, with a kernel larger than 3x3, or whose
    convolution or norm was exchanged, wrapped or has hooks, stay as they are, and so does whatever is no `ConvUnit`.

    Args:
        network: of any kind; it stays as it is.

    Returns:
        the copy, in eval mode, its parameters without gradients. Sums are taken in at least float32, but use it without
        autocast: that would round the means.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    units: list[Any] = [unit for unit in network.modules() if isinstance(unit, ConvUnit)]
    for unit in units:
        if unit.is_plain and unit.conv.kernel_size[0] <= 3:
            unit.conv = AGCConv2d(unit.conv, unit.norm)
        elif _is_constant(unit.norm) and _is_as_made(unit.conv, nn.Conv2d):
            unit.conv = fuse_conv_bn_eval(unit.conv, unit.norm)
        else:
            continue
        unit.norm = nn.Identity()
    return network.requires_grad_(False)


def _is_constant(norm: Any) -> bool:
    """Whether a norm is a scale and a shift and nothing else: subclasses bring an activation, say."""
    return _is_as_made(norm, nn.BatchNorm2d) and norm.track_running_stats


def _is_as_made(module: nn.Module, kind: type) -> bool:
    return type(module) is kind and not has_hooks(module) and not has_forward_of_its_own(module)


class AGCConv2d(nn.Module):
    """agc(conv2d(x, W)) in one pass, for inference. Stands where a `ConvUnit` has its convolution.

    Args:
        conv: with stride 1, zero padding to the input's size, a kernel of 1x1 or 3x3 and no bias.
        norm: its AGC.

    Attributes:
        weight: γW, (K, C, k, k).
        bias: β, (K,).
        mean_scale: λ, (K,).
    """

    def __init__(self, conv: nn.Conv2d, norm: AGC2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach() * norm.weight.detach().view(-1, 1, 1, 1))
        self.bias = nn.Parameter(norm.bias.detach().clone())
        self.mean_scale = nn.Parameter(norm.mean_scale.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        padding = self.weight.shape[2] // 2
        level = (self.bias - self.mean_scale * mean_of_conv(input, self.weight)).to(input.dtype)
        if runs_eagerly() and input.shape[0] == 1:  # a bias of the whole minibatch: the convolution adds it on its way
            return F.conv2d(input, self.weight, level[0], padding=padding)
        return F.conv2d(input, self.weight, padding=padding).add_(level[:, :, None, None])


def mean_of_conv(maps: Tensor, filters: Tensor) -> Tensor:
    """The map means of conv2d(maps, filters, padding=k // 2), without the convolution.

    Args:
        maps: (N, C, H, W).
        filters: (K, C, k, k), k 1 or 3.

    Returns:
        (N, K), in at least float32.
    """
    dtype = statistics_dtype(maps)
    if filters.shape[2] == 1:
        sums = maps.sum((2, 3), dtype=dtype)
    else:
        sums = _tap_sums(_tap_sums(maps, dtype).transpose(2, 3), dtype).transpose(2, 3).flatten(1)
    return sums @ filters.to(dtype).flatten(1).T / (maps.shape[2] * maps.shape[3])


def _tap_sums(lines: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., L) -> (..., 3): what the three taps see of a line as they move over it; the outer ones miss one end."""
    total = lines.sum(-1, keepdim=True, dtype=dtype)
    return torch.cat([total - lines[..., -1:], total, total - lines[..., :1]], -1)
