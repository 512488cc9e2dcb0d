"""The passes over maps of `agcseg.nn.passes` for a GPU, the same functions by the same names: each plans and launches a
program of `agcseg.nn.triton_kernels`, where what they compute is derived."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from agcseg.nn import triton_kernels as programs
from agcseg.nn.passes import empty, layout

TILE = 4096  # numbers
SHARES = 128  # at most, of a map's positions
PROGRAMS = 1024  # about as many fill a large GPU several times over


class _Plan(NamedTuple):
    """How maps are gone through: strides from one position and from one map to the next, the programs, positions of a
    program's share, and the size of tiles."""

    strides: tuple[int, int]
    grid: tuple[int, int, int]
    share: int
    tile: dict[str, int]


def _plan(maps: Tensor) -> _Plan:
    return _planned(*maps.shape, layout(maps) == torch.channels_last)


@cache
def _planned(n: int, k: int, h: int, w: int, channels_last: bool) -> _Plan:
    bk = min(_power_of_2(k), 64 if channels_last else 4)
    bp = min(_power_of_2(h * w), TILE // bk)
    tiles, blocks = _ceil(h * w, bp), _ceil(k, bk)
    share = _ceil(tiles, min(tiles, SHARES, max(1, PROGRAMS // (n * blocks)))) * bp
    strides = (k, 1) if channels_last else (1, h * w)
    return _Plan(strides, (_ceil(h * w, share), n, blocks), share, {"BP": bp, "BK": bk, "num_warps": 8})


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(number: int) -> int:
    """The smallest that is not smaller. Triton's own function takes as long as a launch."""
    return 1 << (number - 1).bit_length()


def _run(kernel, grid, on: Tensor, *arguments, **options) -> None:
    """On the device that holds the tensors, which need not be the current one."""
    if on.is_cuda and on.get_device() != torch.cuda.current_device():
        with torch.cuda.device(on.device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


def _partial(maps: Tensor, plan: _Plan) -> Tensor:
    return torch.empty((len(maps), plan.grid[0], maps.shape[1]), dtype=torch.float32, device=maps.device)


def sums(maps):
    """Σ of each map in parts, (N, parts, C)."""
    plan = _plan(maps)
    partial = _partial(maps, plan)
    positions, k = maps.shape[2:].numel(), maps.shape[1]
    _run(programs.sums, plan.grid, maps, maps, partial, positions, k, *plan.strides, plan.share, **plan.tile)
    return partial


def activate(z, bias, mean_scale, pool=False, mean=None, sum_up=False):
    """As `agcseg.nn.passes.activate`; with `sum_up`, of a known mean, also the output's `sums`."""
    n, k, h, w = z.shape
    plan, bias, mean_scale = _plan(z), bias.contiguous(), mean_scale.contiguous()
    z_strides, partial, shares = plan.strides, mean, 1
    if known := mean is not None:
        mean = mean.contiguous()
    else:
        partial, shares = sums(z), plan.grid[0]
        mean = torch.empty((n, k), dtype=torch.float32, device=z.device)
    y = winners = z
    if pool:
        y = empty(z, (n, k, h // 2, w // 2), layout(z))
        winners = torch.empty_like(y, dtype=torch.uint8)
        h, w, plan = h // 2, w // 2, _plan(y)
    if sum_up:
        partial = _partial(y, plan)
    _run(
        programs.activate, plan.grid, z, z, partial, mean, bias, mean_scale, y, winners, h * w, w, k, *plan.strides,
        *z_strides, plan.share, shares, KNOWN=known, POOL=pool, SUM=sum_up, SHARES=_power_of_2(shares), **plan.tile,
    )  # fmt: skip
    return y, winners if pool else None, mean, *([partial] if sum_up else [])


def gate(grad, output, winners=None, sum_grad=None):
    """g = dy·[y > 0], of `sum_grad`, the gradient of Σ y, if any; at the winners' places if any; and Σ g, in parts."""
    n, k, h, w = output.shape
    memory_format = layout(output)
    grad = grad.contiguous(memory_format=memory_format)
    g = empty(output, (n, k, h, w) if winners is None else (n, k, 2 * h, 2 * w), memory_format)
    plan = _plan(output)
    partial = _partial(output, plan)
    pool, add = winners is not None, sum_grad is not None
    _run(
        programs.gate, plan.grid, g, grad, output, winners if pool else g, sum_grad if add else partial, g, partial,
        h * w, w, k, *plan.strides, *_plan(g).strides, plan.share, ADD=add, POOL=pool, **plan.tile,
    )  # fmt: skip
    return g, partial


def backward(grad, output, winners, mean, mean_scale):
    """As `agcseg.nn.passes.backward`."""
    n, k, h, w = output.shape
    mean_scale = mean_scale.contiguous()
    g, partial = gate(grad, output)
    plan = _plan(g)
    dz, dz_strides = g, plan.strides
    if winners is not None:
        dz = empty(g, (n, k, 2 * h, 2 * w), layout(output))
        dz_strides = _plan(dz).strides
    d_bias, d_scale = torch.empty_like(mean_scale), torch.empty_like(mean_scale)
    _run(
        programs.spread, plan.grid, g, g, partial, mean, mean_scale, g if winners is None else winners, dz, d_bias,
        d_scale, n, h * w, w, k, *plan.strides, *dz_strides, plan.share, plan.grid[0], POOL=winners is not None,
        SHARES=_power_of_2(plan.grid[0]), **plan.tile,
    )  # fmt: skip
    return dz, d_bias, d_scale


def levels(partial, mean, mean_scale, positions):
    """From Σ g in parts and the mean of z': l = -λ·s/M, (N, K); dβ and dλ."""
    (n, shares, k), mean_scale = partial.shape, mean_scale.contiguous()
    level, d_bias, d_scale = torch.empty_like(mean), torch.empty_like(mean_scale), torch.empty_like(mean_scale)
    bk = min(_power_of_2(k), 16)
    _run(
        programs.levels, (_ceil(k, bk), 1, 1), partial, partial, mean, mean_scale, level, d_bias, d_scale, n, k,
        positions, shares, SHARES=_power_of_2(SHARES), BK=bk,
    )  # fmt: skip
    return level, d_bias, d_scale


def tap_sums(maps, partial, filters, winners=None):
    """S, the sums of what the taps of 3x3 filters see of maps, unpooled by `winners` if any, whose sums are `partial`.

    (N, C, 3, 3) in float32, in the order in which `filters` has its weights. Heights and widths are at least 2.
    """
    n, k, h, w = maps.shape
    memory_format = layout(maps)
    maps = maps.contiguous(memory_format=memory_format)
    winners = maps if winners is None else winners.contiguous(memory_format=memory_format)
    taps = torch.empty((n, k, 3, 3), dtype=torch.float32, device=maps.device, memory_format=layout(filters))
    bk, shares = min(_power_of_2(k), 16), partial.shape[1]
    _run(
        programs.tap_sums, (n, _ceil(k, bk), 1), maps, maps, winners, partial, taps, h, w, k, *_plan(maps).strides,
        *_tap_strides(taps), shares, UNPOOL=winners is not maps, BP=256, BK=bk, SHARES=_power_of_2(SHARES), num_warps=8,
    )  # fmt: skip
    return taps


def _tap_strides(taps):
    return (taps.shape[1], 1) if layout(taps) == torch.channels_last else (1, 9)


def fold(filters, gain, dtype, taps, positions):
    """γW and the mean of the convolution with it, (N, K), of an input with these `tap_sums`."""
    filters, gain = _dense(filters, gain)
    (k, *_), n, length = filters.shape, len(taps), filters[0].numel()
    folded, mean = torch.empty_like(filters, dtype=dtype), taps.new_empty((n, k))
    bn = min(_power_of_2(n), 8)
    _run(
        programs.fold, (_ceil(k, 2), _ceil(n, bn), 1), filters, filters, gain, taps, folded, mean, n, k, length,
        positions, BN=bn, BK=2, BL=min(256, _power_of_2(length)),
    )  # fmt: skip
    return folded, mean


def fold_back(filters, gain, dtype, level):
    """γW and what the mean's gradient adds to the positions that each tap reaches, Σ_k l·γW: (N, C, 3, 3)."""
    filters, gain = _dense(filters, gain)
    (k, c, *_), n, length = filters.shape, len(level), filters[0].numel()
    folded = torch.empty_like(filters, dtype=dtype)
    taps = torch.empty((n, c, 3, 3), dtype=torch.float32, device=level.device, memory_format=layout(filters))
    bn = min(_power_of_2(n), 8)
    _run(
        programs.fold_back, (_ceil(length, 32), _ceil(n, bn), 1), filters, filters, gain, level, folded, taps, n, k,
        length, BN=bn, BK=32, BL=32, num_warps=8,
    )  # fmt: skip
    return folded, taps


def borders(dx, taps):
    """Corrects the borders of dx in place, from `fold_back`; the gradient of the sums of x, (N, C)."""
    n, k, h, w = dx.shape
    sum_grad = taps.new_empty((n, k))
    bk = min(_power_of_2(k), 64 if layout(dx) == torch.channels_last else 4)
    bp = 1024 // bk
    _run(
        programs.borders, (_ceil(2 * (h + w - 2), bp), n, _ceil(k, bk)), dx, dx, taps, sum_grad, h, w, k,
        *_plan(dx).strides, *_tap_strides(taps), BP=bp, BK=bk,
    )  # fmt: skip
    return sum_grad


def unpool(values, winners):
    """As `agcseg.nn.passes.unpool`; winners in either notation."""
    n, k, h, w = values.shape
    memory_format = layout(values)
    maps = empty(values, (n, k, 2 * h, 2 * w), memory_format)
    values, winners = (part.contiguous(memory_format=memory_format) for part in (values, winners))
    _between(values, winners, maps, False)
    return maps


def gather(maps, winners, values=None):
    """As `agcseg.nn.passes.gather`; winners in either notation."""
    memory_format = layout(maps)
    if values is None:
        values = empty(maps, winners.shape, memory_format)
    maps, winners = (part.contiguous(memory_format=memory_format) for part in (maps, winners))
    _between(values, winners, maps, True)
    return values


def _between(values, winners, maps, gather):
    (_, k, h, w), plan = values.shape, _plan(values)
    _run(
        programs.window, plan.grid, values, values, winners, maps, h * w, w, k, *plan.strides, *_plan(maps).strides,
        plan.share, GATHER=gather, **plan.tile,
    )  # fmt: skip


def filter_gradients(d, filters, gain, taps=None, level=None):
    """As `agcseg.nn.passes.filter_gradients`, of d + Σ_n l·S if these are given."""
    filters, gain = _dense(filters, gain)
    d_filters, d_gain = torch.empty_like(filters), torch.empty_like(gain)
    if d.stride() != filters.stride():
        d = torch.empty_like(filters, dtype=d.dtype).copy_(d)
    (k, *_), length = filters.shape, filters[0].numel()
    _run(
        programs.filters, (_ceil(k, 2), 1, 1), d, d, filters, gain, d if taps is None else taps,
        d if level is None else level, d_filters, d_gain, 0 if taps is None else len(taps), k, length,
        ADD=taps is not None, BK=2, BL=min(1024, _power_of_2(length)),
    )  # fmt: skip
    return d_filters, d_gain


def class_loss(logits, labels, class_weights, ignore):
    """The loss of `agcseg.losses.segmentation_loss` and its divisors, both (N,)."""
    share, shares, arguments, options = _by_pixel(logits, labels, class_weights, ignore)
    partial = torch.empty((len(logits), shares, 2), dtype=torch.float32, device=logits.device)
    _run(
        programs.class_loss, (shares, len(logits), 1), logits, *arguments[:3], partial, *arguments[3:], share, **options
    )
    total, number = partial.sum(1).unbind(1)
    number = number.clamp(min=1)
    return total / number, number


def class_loss_gradient(logits, labels, class_weights, ignore, factor):
    """Of Σ_n factor_n·(its sum over image n)."""
    share, shares, arguments, options = _by_pixel(logits, labels, class_weights, ignore)
    d = torch.empty_like(arguments[0])
    grid, factor = (shares, len(logits), 1), factor.contiguous()
    _run(programs.class_loss_back, grid, logits, *arguments[:3], factor, d, *arguments[3:], share, **options)
    return d


def _by_pixel(logits, labels, class_weights, ignore):
    n, k, h, w = logits.shape
    logits = logits.contiguous(memory_format=layout(logits))
    bk, weighted = _power_of_2(k), class_weights is not None
    bp = max(1, min(_power_of_2(h * w), TILE // bk))
    tiles = _ceil(h * w, bp)
    share = _ceil(tiles, min(tiles, SHARES, max(1, PROGRAMS // n))) * bp
    weights = class_weights.contiguous() if weighted else logits
    arguments = [logits, labels.contiguous(), weights, h * w, k, *_plan(logits).strides]
    options = {"WEIGHTED": weighted, "IGNORE": ignore, "BP": bp, "BK": bk, "num_warps": 8}
    return share, _ceil(h * w, share), arguments, options


def _dense(filters, gain):
    """Of filters that are a view of others, with strides of their own."""
    return filters.contiguous(memory_format=layout(filters)), gain.contiguous()
