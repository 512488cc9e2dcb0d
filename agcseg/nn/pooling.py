"""2x2 max pooling that remembers which cell won, and its inverse.

Two notations for the winner of a window, and either is understood where one is taken: torch's flat position in the map
(int64), which torch's own pooling returns, and the cell 0..3 in its window (uint8, 0 and 1 the upper row, 2 and 3 the
lower), eight times smaller, which the fast AGC unit returns.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from agcseg.nn import passes
from agcseg.nn.agc import transformed


def max_pool2d(input: Tensor) -> tuple[Tensor, Tensor]:
    """2x2 max pooling, stride 2: torch's own.

    Args:
        input: (N, C, H, W) with H and W even.

    Returns:
        the maxima, (N, C, H/2, W/2), and their flat positions in the map, int64 of the same shape.

    Raises:
        ValueError: H or W is odd.
    """
    if input.shape[2] % 2 or input.shape[3] % 2:
        raise ValueError(f"2x2 pooling takes even heights and widths; got {tuple(input.shape[2:])}")
    return F.max_pool2d(input, 2, return_indices=True)


def max_unpool2d(input: Tensor, winners: Tensor) -> Tensor:
    """Put every value back where its maximum stood, zeros elsewhere (SegNet, Badrinarayanan et al. 2015).

    torch's own `max_unpool2d` refuses to run under `torch.use_deterministic_algorithms(True)`, although 2x2 windows do
    not overlap, and on a GPU it knows no channels_last: there the same map is built without a scatter, in the layout of
    `input`. Values and gradients are equal bit for bit.

    Args:
        input: (N, C, h, w).
        winners: of the pooling of a (2h, 2w) map, in either notation.

    Returns:
        (N, C, 2h, 2w).
    """
    if torch.compiler.is_compiling() or transformed():
        return _unpool_by_shuffle(input, window_offsets(winners, 2 * input.shape[3]))
    on_cpu = input.device.type == "cpu"
    if on_cpu and winners.dtype != torch.uint8 and not torch.are_deterministic_algorithms_enabled():
        return F.max_unpool2d(input, winners, (2, 2))
    if not passes.kernels(input):  # which read either notation
        winners = window_offsets(winners, 2 * input.shape[3])
    return _Unpool.apply(input, winners)


class _Unpool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, cells):
        ctx.save_for_backward(cells)
        return passes.unpool(input, cells)

    @staticmethod
    def backward(ctx, grad):
        return _Gather.apply(grad, *ctx.saved_tensors), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, maps, cells):
        ctx.save_for_backward(cells)
        return passes.gather(maps, cells)

    @staticmethod
    def backward(ctx, grad):
        return _Unpool.apply(grad, *ctx.saved_tensors), None


def window_offsets(winners: Tensor, width: int) -> Tensor:
    """Cells 0..3 (uint8) of winners in either notation; `width` is that of the map in front of the pooling."""
    if winners.dtype == torch.uint8:
        return winners
    return passes.cells_of(winners, width)


def _unpool_by_shuffle(input: Tensor, offsets: Tensor) -> Tensor:
    n, c, h, w = input.shape
    cells = torch.arange(4, dtype=torch.uint8, device=input.device).view(1, 1, 4, 1, 1)
    spread = torch.where(offsets.unsqueeze(2) == cells, input.unsqueeze(2), 0)
    return F.pixel_shuffle(spread.reshape(n, 4 * c, h, w), 2)
