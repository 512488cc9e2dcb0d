"""AGC with other estimates of a map's background than its mean (Deep Control, section 2, names them as further work).

    O = (z - λ·B(z))·γ + β          B of one sample and one filter, as equation (1) otherwise

The estimators take (N, C, H, W) and give (N, C, H, W) or (N, C, 1, 1), of the same dtype. They are torch's own
operations, for experiments: none of them has the fast form's memory or speed.
"""

import contextlib
import math

import torch
from torch import Tensor

from agcseg.errors import UserError
from agcseg.nn.agc import AGC2d, statistics_dtype

BACKGROUNDS = ("window", "median", "trimmed")


def window_mean(maps: Tensor, window: int | float) -> Tensor:
    """Mean over the window around each position, as far as it lies in the map.

    Args:
        maps: (N, C, H, W).
        window: odd, in positions; or below 1, as a share of the map's height and width (at least 3 positions). From
            2·max(H, W) - 1 on, every window is the whole map.

    Returns:
        (N, C, H, W).
    """
    rows, columns = (_averages(side, window, maps) for side in maps.shape[2:])
    with contextlib.nullcontext() if maps.is_meta else torch.autocast(maps.device.type, enabled=False):
        return rows @ maps @ columns.T  # faster than pooling by far, whose time grows with the window


def _averages(side: int, window: int | float, like: Tensor) -> Tensor:
    """(side, side): row i holds the weights of the mean around position i."""
    size = window if window >= 1 else max(3, 2 * int(window * side / 2) + 1)
    position = torch.arange(side, device=like.device)
    near = ((position[:, None] - position).abs() <= int(size) // 2).to(like.dtype)
    return near / near.sum(1, keepdim=True)


def median(maps: Tensor, gradient: bool = False) -> Tensor:
    """Median of each map, the lower one of two, (N, C, 1, 1).

    With `gradient` all of its gradient goes to the position it stands at, the first of several equal ones; else, as it
    would be all of one position's, none flows.
    """
    lower = _smallest(maps, (maps.shape[2] * maps.shape[3] + 1) // 2)
    if not gradient:
        return lower
    values = maps.flatten(2)
    # not the position that the selection names: among equal values that is any
    first = (values == lower[..., 0]).to(torch.uint8).argmax(2, keepdim=True)
    return values.gather(2, first)[..., None]


def trimmed_mean(maps: Tensor, quantile: float) -> Tensor:
    """Mean of each map's values up to its quantile, (N, C, 1, 1); 1 is the mean of all.

    The gradient goes to these values. Values equal to the quantile all count.
    """
    positions = maps.shape[2] * maps.shape[3]
    low = maps <= _smallest(maps, max(1, math.ceil(quantile * positions)))
    return (maps * low).sum((2, 3), keepdim=True) / low.sum((2, 3), keepdim=True)


def _smallest(maps: Tensor, k: int) -> Tensor:
    """The k-th smallest value of each map, (N, C, 1, 1), without gradient."""
    values = maps.detach().flatten(2)
    # On CUDA deterministic algorithms exclude selection, though its value (not its index) is always the same.
    sort = torch.are_deterministic_algorithms_enabled()
    smallest = values.sort().values[..., k - 1] if sort else values.kthvalue(k).values
    return smallest[..., None, None]


class BackgroundAGC2d(AGC2d):
    """AGC with the mean of equation (1) replaced.

    A trimmed mean lies below the mean, so that with λ = 1 signals grow from layer to layer: start with a smaller λ.

    Args:
        num_features: C, the number of filters of the convolution in front.
        mean_scale: initial λ.
        background: "window" (see `window_mean`), "median", or "trimmed" (see `trimmed_mean`).
        window: of "window".
        quantile: of "trimmed".
        median_gradient: of "median": a gradient flows through it (see `median`).

    Raises:
        UserError (a ValueError): `background` is none of these, `window` is even or too small, or `quantile` not in
            (0, 1].
    """

    def __init__(
        self,
        num_features: int,
        mean_scale: float = 1.0,
        background: str = "window",
        window: int | float = 0.5,
        quantile: float = 0.5,
        median_gradient: bool = False,
    ) -> None:
        super().__init__(num_features, mean_scale=mean_scale)
        if background not in BACKGROUNDS:
            raise UserError(f"background={background!r} is not known; choose from map, {', '.join(BACKGROUNDS)}")
        if not (0 < window < 1 or (window >= 3 and window % 2 == 1)):
            raise UserError(
                f"window={window!r} must be an odd number of positions from 3, or a share of the map below 1"
            )
        if not 0 < quantile <= 1:
            raise UserError(f"quantile={quantile!r} must be above 0 and at most 1")
        self.background, self.window, self.quantile = background, window, quantile
        self.median_gradient = median_gradient

    def forward(self, input: Tensor) -> Tensor:
        maps = input.to(statistics_dtype(input))
        if self.background == "window":
            background = window_mean(maps, self.window)
        elif self.background == "median":
            background = median(maps, self.median_gradient)
        else:
            background = trimmed_mean(maps, self.quantile)
        weight, bias, mean_scale = (p.view(1, -1, 1, 1) for p in (self.weight, self.bias, self.mean_scale))
        return ((maps - mean_scale * background) * weight + bias).to(input.dtype)

    def extra_repr(self) -> str:
        detail = {"window": f", window={self.window:g}", "trimmed": f", quantile={self.quantile:g}"}
        detail["median"] = ", median_gradient=True" if self.median_gradient else ""
        return f"{super().extra_repr()}, background={self.background}{detail.get(self.background, '')}"
