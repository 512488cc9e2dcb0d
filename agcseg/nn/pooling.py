"""2x2 max pooling that remembers which cell won, and its inverse."""

import torch
from torch import Tensor
from torch.nn import functional as F


def max_pool2d(input: Tensor) -> tuple[Tensor, Tensor]:
    """2x2 max pooling, stride 2.

    Args:
        input: (N, C, H, W) with H and W even.

    Returns:
        the maxima, (N, C, H/2, W/2), and their flat positions in the map, int64 of the same shape.
    """
    return F.max_pool2d(input, 2, return_indices=True)


def max_unpool2d(input: Tensor, indices: Tensor) -> Tensor:
    """Put every value back where its maximum stood, zeros elsewhere (SegNet, Badrinarayanan et al. 2015).

    torch's own `max_unpool2d` refuses to run under `torch.use_deterministic_algorithms(True)`, although 2x2 windows do
    not overlap. There the same map is built without a scatter; values and gradients are equal bit for bit.

    Args:
        input: (N, C, h, w).
        indices: from `max_pool2d` of a (2h, 2w) map.

    Returns:
        (N, C, 2h, 2w).
    """
    if not torch.are_deterministic_algorithms_enabled():
        return F.max_unpool2d(input, indices, 2)
    return _unpool_by_shuffle(input, indices)


def _unpool_by_shuffle(input: Tensor, indices: Tensor) -> Tensor:
    n, c, h, w = input.shape
    row, column = indices // (2 * w), indices % (2 * w)
    cell = (row % 2) * 2 + column % 2  # which of the window's four cells won
    cells = torch.arange(4, device=input.device).view(1, 1, 4, 1, 1)
    spread = torch.where(cell.unsqueeze(2) == cells, input.unsqueeze(2), 0)
    return F.pixel_shuffle(spread.reshape(n, 4 * c, h, w), 2)
