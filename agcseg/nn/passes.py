"""Passes over maps: what the fast AGC unit does besides its convolutions, each in the layout its maps have.

The cells of a 2x2 window are 0 and 1 in the upper row, 2 and 3 in the lower. Selections among cells are bit operations
on the numbers as integers: exact, also of infinities, and several times faster on a CPU than `where`, scatter or
gather, which take number by number; nor do they need positions, which a GPU would sort to scatter deterministically.
"""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from agcseg.nn.agc import statistics_dtype

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
UNSIGNED = {torch.int16: torch.uint16, torch.int32: torch.uint32}
PAIRS = {2: torch.int32, 4: torch.int64} if sys.byteorder == "little" else {}
CACHED = 2**18  # numbers that stay in a processor's cache
BLOCK = 2 * CACHED  # of maps at a time: larger than the cache of some, but with half of the calls
TRITON = find_spec("triton") is not None  # comes with torch for CUDA on Linux; imported where it is used only


def kernels(maps: Tensor) -> ModuleType | None:
    """`agcseg.nn.kernels` where its kernels can work on these maps, the same functions as here."""
    if not maps.is_cuda or not TRITON or maps.dtype == torch.float64 or not len(maps):
        return None
    from agcseg.nn import kernels

    return kernels


def layout(maps: Tensor) -> torch.memory_format:
    plain = maps.is_contiguous() or not maps.is_contiguous(memory_format=torch.channels_last)
    return torch.contiguous_format if plain else torch.channels_last


def sums(maps: Tensor) -> Tensor:
    """Sums of each map, (N, C), taken in at least float32.

    On a CPU a sum of bfloat16 with a float32 result would convert the whole map first; one of bfloat16 adds in float32
    and rounds its result.
    """
    dtype = statistics_dtype(maps)
    if maps.dtype == torch.bfloat16 and maps.device.type == "cpu":
        rows = maps.permute(0, 2, 3, 1).sum(2) if layout(maps) == torch.channels_last else maps.sum(3).mT
        return rows.sum(1, dtype=dtype)
    return maps.sum((2, 3), dtype=dtype)


def activate(
    z: Tensor, bias: Tensor, mean_scale: Tensor, pool: bool = False, mean: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """relu(z - λ·mean(z) + β), in place: fresh maps cost more time than the arithmetic on them.

    Args:
        z: (N, K, H, W).
        bias, mean_scale: β and λ, (K,).
        pool: 2x2 max pooling as well, before the rest: it keeps the order of a map's numbers.
        mean: of z, if known.

    Returns:
        the output, the winners of the pooling if any, the mean (N, K).
    """
    if fast := kernels(z):
        return fast.activate(z, bias, mean_scale, pool, mean)
    if mean is None:
        mean = sums(z) / z.shape[2:].numel()
    winners = None
    if pool:
        z, winners = max_pool(z)
    level = torch.addcmul(bias, mean_scale, mean, value=-1)
    output = add_levels(z, level).relu_()
    if winners is not None:  # where ReLU leaves nothing the first cell wins, as behind it
        winners.bitwise_and_(_less(0, output).to(torch.uint8))
    return output, winners, mean


def backward(
    grad: Tensor, output: Tensor, winners: Tensor | None, mean: Tensor, mean_scale: Tensor, need_maps: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """From dy, with g = dy·[y > 0] and s its sums: dz' = g - λ·s/M, unpooled by `winners` if any; dβ and dλ."""
    if need_maps and (fast := kernels(output)):
        return fast.backward(grad, output, winners, mean, mean_scale)
    g = torch.ops.aten.threshold_backward(grad, output, 0)
    s = sums(g)
    dz = None
    if need_maps:
        dz = g if winners is None else unpool(g, winners)
        level = mean_scale * s
        add_levels(dz, level.div_(-dz.shape[2:].numel()))
    return dz, s.sum(0), (mean * s).sum(0).neg_()


def add_levels(maps: Tensor, level: Tensor) -> Tensor:
    """Add its level, (N, C), to each map, in place."""
    level = level.to(maps.dtype)  # a float32 vector added to bfloat16 maps would convert the maps
    n, channels, height, width = maps.shape
    half = maps.is_cpu and maps.element_size() == 2
    if half and channels % 32 and layout(maps) == torch.channels_last:
        # torch adds what is left over from 32 channels number by number: ten times slower than rows of the image
        maps.permute(0, 2, 3, 1).view(n, height, width * channels).add_(level.repeat(1, width)[:, None])
        return maps
    return maps.add_(level[:, :, None, None])


def fold(filters: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """γW, in another dtype. On a CPU the products are made in its cache."""
    gain = gain.view(-1, 1, 1, 1)
    if dtype == filters.dtype == gain.dtype:
        return filters * gain
    folded = torch.empty_like(filters, dtype=dtype)
    if filters.is_cuda:  # there one kernel does both
        return torch.mul(filters, gain, out=folded)
    for w, scale, product in _cached_rows(filters, gain, folded):
        product.copy_(w * scale)
    return folded


def filter_gradients(d_filters: Tensor, filters: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """dW = γ·dW', with the strides and dtype of W, and dγ = <W, dW'>. May overwrite dW'."""
    if fast := kernels(d_filters):
        return fast.filter_gradients(d_filters, filters, gain)
    d_filters = as_parameter(d_filters, filters)
    order = (0, 2, 3, 1) if layout(filters) == torch.channels_last else (0, 1, 2, 3)  # in which memory has them
    w, d = (numbers.permute(order).reshape(len(filters), -1) for numbers in (filters, d_filters))
    # which autocast, that a caller may have around backward, would round
    d_gain = (w * d).sum(1) if torch.is_autocast_enabled(w.device.type) else torch.linalg.vecdot(w, d)
    d_gain = d_gain.to(gain.dtype)
    return d_filters.mul_(gain.view(-1, 1, 1, 1)), d_gain


def _cached_rows(filters: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same filters of each, on a CPU as many as stay in its cache."""
    rows = len(filters)
    if filters.device.type == "cpu":
        rows = min(max(1, CACHED // filters[0].numel()), rows)
    return zip(*(tensor.split(rows) for tensor in (filters, *others)), strict=True)


def as_parameter(gradient: Tensor, parameter: Tensor) -> Tensor:
    """With the strides and dtype of the parameter, as optimisers and `torch.compile` expect it."""
    same = gradient.stride() == parameter.stride() and gradient.dtype == parameter.dtype
    return gradient if same else torch.empty_like(parameter).copy_(gradient)


def max_pool(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima of the 2x2 windows, (N, C, H/2, W/2), and the cells (uint8) of the first one in each."""
    n, c, h, w = maps.shape
    fmt = layout(maps)
    if fmt == torch.channels_last:  # of which torch's own is fast
        maxima, positions = F.max_pool2d(maps, 2, return_indices=True)
        return maxima, cells_of(positions, w)
    maxima = empty(maps, (n, c, h // 2, w // 2), fmt)
    winners = torch.empty_like(maxima, dtype=torch.uint8)
    for windows, maximum, cell in _blocks(_windows(maps, fmt), _rows(maxima, fmt), _rows(winners, fmt)):
        (a, b), (c, d) = _columns(windows[:, 0]), _columns(windows[:, 1])
        right, right_below = _less(a, b), _less(c, d)
        upper, lower = torch.maximum(a, b, out=a), torch.maximum(c, d, out=c)
        below = _less(upper, lower)
        torch.maximum(upper, lower, out=maximum)
        right ^= right_below.bitwise_xor_(right).bitwise_and_(below)
        cell.copy_(below.mul_(-2).sub_(right))
    return maxima, winners


def cells_of(positions: Tensor, width: int) -> Tensor:
    """The cells (uint8) that flat positions in maps of that width are, each in its own window, (N, C, h, w)."""
    # Modulo 2^16: a quarter of the memory, and the difference is small.
    within = positions.to(torch.int16).sub_(upper_left(positions, width).to(torch.int16))
    below = (within.bitwise_and(-2) != 0).to(torch.uint8)
    return below.mul_(2).add_(within.bitwise_and_(1).to(torch.uint8))


def upper_left(positions: Tensor, width: int) -> Tensor:
    """The flat position of the first cell of each window, (h, w)."""
    rows, columns = (torch.arange(side, device=positions.device) for side in positions.shape[2:])
    return 2 * width * rows[:, None] + 2 * columns


def unpool(values: Tensor, cells: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, C, 2h, 2w): each value in its cell, 0 elsewhere."""
    if fast := kernels(values):
        return fast.unpool(values, cells)
    n, c, h, w = values.shape
    fmt = layout(values)
    maps = empty(values, (n, c, 2 * h, 2 * w), fmt)
    for windows, value, cell in _blocks(_windows(maps, fmt), _rows(values, fmt), _rows(cells, fmt)):
        pairs, value, below, right = _pairs(windows), _bits(value), cell >> 1, cell & 1
        if pairs is not None:
            row = value.view(UNSIGNED[value.dtype]).to(pairs.dtype).bitwise_left_shift_(_shift(right, pairs))
            lower = torch.bitwise_and(row, _mask(below, row), out=pairs[:, 1])
            torch.bitwise_xor(row, lower, out=pairs[:, 0])
            continue
        windows, right = _bits(windows), _mask(right, value)
        lower = value & _mask(below, value)
        for i, row in enumerate((value ^ lower, lower)):
            at_right = row & right
            windows[:, i, :, 0].copy_(row.bitwise_xor_(at_right))
            windows[:, i, :, 1].copy_(at_right)
    return maps


def gather(maps: Tensor, cells: Tensor, values: Tensor | None = None) -> Tensor:
    """(N, C, 2h, 2w) -> (N, C, h, w): the values in the cells, the inverse of `unpool`; into `values`, if given."""
    fmt = layout(maps)
    if values is not None and not values.is_contiguous(memory_format=fmt):
        return values.copy_(gather(maps, cells))
    if fast := kernels(maps):
        return fast.gather(maps, cells, values)
    if values is None:
        values = torch.empty_like(cells, dtype=maps.dtype, memory_format=fmt)
    for windows, value, cell in _blocks(_windows(maps, fmt), _rows(values, fmt), _rows(cells, fmt)):
        pairs, value, below, right = _pairs(windows), _bits(value), cell >> 1, cell & 1
        if pairs is not None:
            upper = pairs[:, 0]
            row = (upper ^ pairs[:, 1]).bitwise_and_(_mask(below, pairs)).bitwise_xor_(upper)
            value.copy_(row.bitwise_right_shift_(_shift(right, pairs)))
            continue
        right = _mask(right, value)
        (a, b), (c, d) = ([_bits(x) for x in _columns(windows[:, i])] for i in (0, 1))
        upper, lower = _choose(a, b, right), _choose(c, d, right)
        value.copy_(_choose(upper, lower, _mask(below, value)))
    return values


def empty(like: Tensor, shape: tuple[int, ...], fmt: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=fmt)


def _windows(maps: Tensor, fmt: torch.memory_format) -> Tensor:
    """Dense maps as (rows of windows, 2, windows in a row, 2, numbers at a position)."""
    n, c, h, w = maps.shape
    maps = maps.contiguous(memory_format=fmt)
    if fmt == torch.channels_last:
        return maps.permute(0, 2, 3, 1).view(n * (h // 2), 2, w // 2, 2, c)
    return maps.view(n * c * (h // 2), 2, w // 2, 2, 1)


def _rows(values: Tensor, fmt: torch.memory_format) -> Tensor:
    """Dense maps of as many positions as there are windows, as (rows, windows in a row, numbers at a position)."""
    n, c, h, w = values.shape
    values = values.contiguous(memory_format=fmt)
    if fmt == torch.channels_last:
        return values.permute(0, 2, 3, 1).view(n * h, w, c)
    return values.view(n * c * h, w, 1)


def _blocks(windows: Tensor, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, as many as about stay in a CPU's cache; on other devices all."""
    size = len(windows)
    if windows.device.type == "cpu" and windows.numel() > BLOCK:
        size = max(1, BLOCK * len(windows) // windows.numel())
    return zip(windows.split(size), *(r.split(size) for r in rows), strict=True)


def _pairs(windows: Tensor) -> Tensor | None:
    """Each two numbers side by side as one integer, the left one its lower half: (..., windows in a row, 1).

    None where they do not lie side by side, or no integer is as large; on a CPU only, as others may lack unsigned ones.
    """
    wide = PAIRS.get(windows.element_size())
    if wide is None or not windows.is_cpu or windows.shape[-1] > 1 or windows.storage_offset() % 2:
        return None
    return windows.flatten(-2).view(wide)


def _columns(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of the left and the right numbers of one row of each window."""
    pairs = _pairs(rows)
    if pairs is None:
        return rows[:, :, 0].contiguous(), rows[:, :, 1].contiguous()
    narrow = INTEGERS[rows.element_size()]
    left, right = pairs.to(narrow), (pairs >> 4 * pairs.element_size()).to(narrow)
    return left.view(rows.dtype), right.view(rows.dtype)


def _bits(numbers: Tensor) -> Tensor:
    return numbers.view(INTEGERS[numbers.element_size()])


def _less(a: Tensor | int, b: Tensor) -> Tensor:
    """All bits set where a < b, none elsewhere: the sign of the difference."""
    return _bits(a - b).bitwise_right_shift_(8 * b.element_size() - 1)


def _shift(bit: Tensor, pairs: Tensor) -> Tensor:
    """Half of a pair's bits where `bit` is 1, none where it is 0. Overwrites `bit`, uint8."""
    return bit.mul_(4 * pairs.element_size()).to(pairs.dtype)


def _mask(bit: Tensor, like: Tensor) -> Tensor:
    """All bits set where `bit` is 1, none where it is 0. Overwrites `bit`, uint8."""
    return bit.neg_().view(torch.int8).to(like.dtype)


def _choose(a: Tensor, b: Tensor, second: Tensor) -> Tensor:
    """b where all bits of `second` are set, a where none is. Overwrites b."""
    return b.bitwise_xor_(a).bitwise_and_(second).bitwise_xor_(a)
