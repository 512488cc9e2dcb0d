"""Convolution, automatic gain control, ReLU and pooling as one step of autograd, for little memory.

The values and gradients of `relu(agc(conv2d(x, W), γ, β, λ))`, but nothing is kept for backward that the neighbouring
layers do not keep anyway: the input, the output, the parameters and one number per map. γ goes into the filters
(z' = (γW) * x, y = relu(z' - λ·mean(z') + β)), and with M positions in a map:

    g = dy·[y > 0]     s = Σ g          dβ = Σ_n s          dλ = -Σ_n mean(z')·s
    dz' = g - λ·s/M    dW' = corr(x, dz')    dW = γ·dW'     dγ = <W, dW'>     dx = convᵀ(dz', γW)

γ is never divided by, so it is exact at γ = 0. Batch normalisation needs its normalised map everywhere, also where the
ReLU is off, and keeps one more full map per convolution.

2x2 max pooling behind the unit keeps the pooled values and one byte per window instead of the full map; index
unpooling in front of it is a function of the pooled-size map and those bytes, so backward rebuilds the unpooled map; a
cheap unit in front (`stem`) is rebuilt in the same way.

Where the convolution is not at hand, `agc_relu` does the same for AGC and ReLU alone. Outputs of no more than SMALL
numbers get the formula itself, on a CPU: there the calls cost more time than the memory is worth.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from agcseg.nn.agc import AGC2d, _check, agc
from agcseg.nn.pooling import flat_indices, max_pool2d, max_unpool2d, window_offsets

Parameters = tuple[Tensor, Tensor, Tensor, Tensor]


class Geometry(NamedTuple):
    """Of a convolution, as torch.nn.Conv2d has it."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | None = None  # None: half the filters' size, so that stride 1 keeps the map's
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


PLAIN = Geometry()
CACHED = 2**18  # numbers that stay in a processor's cache
SMALL = 2**17  # numbers of an output, up to which a CPU spends more time on calls than memory is worth


def agc_unit(
    input: Tensor | Sequence[Tensor],
    filters: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean_scale: Tensor,
    *,
    unpool: Tensor | None = None,
    pool: bool = False,
    stem: Parameters | None = None,
    geometry: Geometry = PLAIN,
) -> Tensor | tuple[Tensor, Tensor]:
    """relu(agc(conv2d(input, filters))), by default with stride 1 and zero padding to the input's size.

    The convolution's inputs and outputs have the dtype of `input` (under autocast: autocast's), means and the sums over
    maps are taken in at least float32. There is no second derivative.

    Args:
        input: maps (N, C, H, W), or several that are taken as concatenated over the channels without building the
            concatenation.
        filters: W, (K, C, k, k), k odd unless `geometry` gives the padding; (K, C / groups, k, k) with groups.
        weight, bias, mean_scale: γ, β, λ, each (K,).
        unpool: winners (see Returns) of shape (N, C, H, W): `input` is unpooled to (N, C, 2H, 2W) in front of the
            convolution. Also takes the indices of torch's `max_pool2d`.
        pool: 2x2 max pooling, stride 2, behind the ReLU; height and width must be even.
        stem: filters, γ, β and λ of one more unit in front, whose output is not kept but rebuilt in backward. Worth it
            where that unit is cheap and its output large: the first of a network.
        geometry: of the convolution; other than the default only for one plain input, without pooling and stem.

    Returns:
        (N, K, H, W); with `pool` the maxima (N, K, H/2, W/2) and the winners, of the same shape: which cell of its
        window held the (first) maximum, 0 and 1 in the upper row, 2 and 3 in the lower, uint8; of small maps torch's
        own indices. Either serves as `unpool`.
    """
    inputs = (input,) if isinstance(input, Tensor) else tuple(input)
    plain = len(inputs) == 1 and unpool is None and stem is None and not pool
    if geometry != PLAIN and not plain:
        raise ValueError(f"{geometry} takes one input, without pooling, unpooling and stem")
    if sum(x.shape[1] for x in inputs) != (stem[0] if stem else filters).shape[1] * geometry.groups:
        raise ValueError(f"filters of shape {tuple(filters.shape)} do not fit maps {[tuple(x.shape) for x in inputs]}")
    for f, *vectors in ((filters, weight, bias, mean_scale), *((stem,) if stem else ())):
        if any(len(vector) != len(f) for vector in vectors):
            raise ValueError(f"{len(f)} filters take γ, β and λ of as many; got {[len(v) for v in vectors]}")
    if geometry.padding is None:
        if any(f.shape[2] != f.shape[3] or f.shape[2] % 2 == 0 for f in (filters, *(stem or ())[:1])):
            raise ValueError(f"filters must be square and odd; got {tuple(filters.shape)}")
        geometry = geometry._replace(padding=(filters.shape[2] // 2,) * 2)
    if unpool is not None and (len(inputs) > 1 or stem):
        raise ValueError("unpooling takes one input, and no stem behind it")
    if pool and (inputs[0].shape[2] % 2 or inputs[0].shape[3] % 2) and unpool is None:
        raise ValueError(f"2x2 pooling takes even heights and widths; got {tuple(inputs[0].shape[2:])}")
    if _is_small(inputs[0], len(filters), 1 if unpool is None else 4):
        return _small_unit(inputs, filters, weight, bias, mean_scale, unpool, pool, stem, geometry)
    if unpool is not None and unpool.dtype != torch.uint8:
        unpool = window_offsets(unpool, 2 * inputs[0].shape[3])
    device = inputs[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        inputs = tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in inputs)
    return _Unit.apply(geometry, pool, unpool, filters, weight, bias, mean_scale, *(stem or (None,) * 4), *inputs)


def _is_small(maps: Tensor, num_features: int, positions: int = 1) -> bool:
    """Whether the formula in torch's own operations is faster: by the output's size, `positions` times that of `maps`.

    On a GPU nothing was measured, and a compiler saves the calls by itself. On the meta device there are only shapes.
    """
    if maps.is_meta:
        return True
    if maps.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return len(maps) * num_features * maps.shape[2:].numel() * positions <= SMALL


def _small_unit(inputs, filters, weight, bias, mean_scale, unpool, pool, stem, geometry):
    """`agc_unit` in torch's own operations: keeps more, of maps that are small."""
    maps = torch.cat(inputs, 1) if len(inputs) > 1 else inputs[0]
    if unpool is not None:
        maps = max_unpool2d(maps, unpool)
    if stem is not None:
        maps = agc_relu(F.conv2d(maps, stem[0].to(maps.dtype), None, *_same(stem[0])), *stem[1:])
    maps = agc_relu(F.conv2d(maps, filters.to(maps.dtype), None, *geometry), weight, bias, mean_scale)
    return max_pool2d(maps) if pool else maps


class _Unit(torch.autograd.Function):
    """Arguments: geometry, pool, offsets for unpooling, the unit's 4 parameters, the stem's 4 or None, the inputs."""

    @staticmethod
    def forward(ctx, geometry, pool, offsets, filters, gain, bias, mean_scale, *stem_and_inputs):
        stem, inputs = stem_and_inputs[:4], stem_and_inputs[4:]
        maps, stem_mean, winners = inputs, None, None
        if stem[0] is not None:
            z = _convolve(maps, stem[0], stem[1], _same(stem[0]))
            stem_mean = _mean(z)
            maps = (_activate(z, stem_mean, stem[2], stem[3]),)
        elif offsets is not None:
            maps = (_unpool(maps[0], offsets),)
        z = _convolve(maps, filters, gain, geometry)
        ctx.geometry, ctx.shapes = geometry, [x.shape[1:] for x in maps]
        del maps
        mean = _mean(z)
        output = _activate(z, mean, bias, mean_scale)
        del z
        if pool:
            output, winners = _pool(output)
            ctx.mark_non_differentiable(winners)
        needs = ctx.needs_input_grad
        # The inputs serve the gradients of W and γ, and a stem's output is rebuilt from them; else they are not kept.
        kept = inputs if needs[3] or needs[4] or (stem[0] is not None and any(needs[7:])) else ()
        ctx.save_for_backward(filters, gain, mean_scale, mean, output, winners, offsets, *stem, stem_mean, *kept)
        return (output, winners) if pool else output

    @staticmethod
    def backward(ctx, grad, *_):
        # Not once_differentiable: its message comes later and names no remedy.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the fast AGC unit has no second derivative (create_graph=True): build with implementation='literal', "
                "convert with fuse=False"
            )
        return _backward(ctx, grad)


def _backward(ctx, grad):
    filters, gain, mean_scale, mean, output, winners, offsets, *rest = ctx.saved_tensors
    stem, by_sample = rest[:4], [grad, mean, output, winners, offsets, *rest[4:]]
    # What is rebuilt exists for one sample at a time, where one is enough work (for a GPU too).
    positions = output.shape[2:].numel() * (1 if winners is None else 4)
    alone = (offsets is not None or stem[0] is not None) and positions >= 2**16
    parts = len(grad) if alone else 1
    if parts <= 1:
        return None, None, None, *_backward_part(ctx, filters, gain, mean_scale, stem, *by_sample)
    chunks = zip(*([None] * parts if t is None else t.chunk(parts) for t in by_sample), strict=True)
    grads = [_backward_part(ctx, filters, gain, mean_scale, stem, *chunk) for chunk in chunks]
    grads = list(zip(*grads, strict=True))
    parameters = [None if g[0] is None else sum(g) for g in grads[:8]]
    return None, None, None, *parameters, *(None if g[0] is None else torch.cat(g) for g in grads[8:])


def _backward_part(
    ctx, filters, gain, mean_scale, stem, grad, mean, output, winners, offsets, stem_mean, *inputs
) -> list[Tensor | None]:
    """Gradients of the unit's 4 parameters, the stem's 4 and the inputs, for some samples of the minibatch."""
    needs = ctx.needs_input_grad[3:]  # the unit's 4 parameters, the stem's 4, the inputs
    need_maps = needs[8:] if stem[0] is None else [any(needs[4:])]
    maps = inputs
    if stem[0] is not None and maps:
        rebuilt = _activate(_convolve(inputs, stem[0], stem[1], _same(stem[0])), stem_mean, stem[2], stem[3])
        maps = (rebuilt,)
    elif offsets is not None and maps:
        maps = [_unpool(maps[0], offsets)]
    grads, d_maps = _gradients(
        grad, output, winners, mean, maps, ctx.shapes, ctx.geometry, filters, gain, mean_scale, needs[:4], need_maps
    )
    d_stem = [None] * 4
    if stem[0] is not None and need_maps[0]:
        shapes, geometry = [x.shape[1:] for x in inputs], _same(stem[0])
        d_stem, d_maps = _gradients(
            d_maps[0], rebuilt, None, stem_mean, inputs, shapes, geometry, *stem[:2], stem[3], needs[4:8], needs[8:]
        )
    elif stem[0] is not None:
        d_maps = [None] * len(needs[8:])
    elif offsets is not None and need_maps[0]:
        d_maps = [_gather(d_maps[0], offsets)]
    return [*grads, *d_stem, *d_maps]


def _gradients(grad, output, winners, mean, maps, shapes, geometry, filters, gain, mean_scale, needs, need_maps):
    """Gradients of one unit: those of W, γ, β, λ (None where `needs` says no) and those of the convolution's inputs.

    `maps` are these inputs, of (C, H, W) `shapes`; a list if they may be freed on the way, empty where neither W nor γ
    needs a gradient.
    """
    g = torch.ops.aten.threshold_backward(grad, output, 0)
    s = g.sum((2, 3), dtype=mean.dtype)
    d_filters = d_gain = None
    d_bias = s.sum(0).to(gain.dtype) if needs[2] else None
    d_mean_scale = -(mean * s).sum(0).to(gain.dtype) if needs[3] else None
    d_maps = [None] * len(need_maps)
    if needs[0] or needs[1] or any(need_maps):
        positions = output.shape[2:].numel() * (1 if winners is None else 4)
        level = (-mean_scale * s / positions)[:, :, None, None]
        dz = g.add_(level)
        if winners is not None:
            dz = _unpool(dz, winners, fill=level)
        del g
        need_filters = needs[0] or needs[1]
        d_maps, slices = _convolve_backward(dz, maps, shapes, geometry, filters, gain, need_maps, need_filters)
        if need_filters:
            d_filters = (torch.cat(slices, 1) if len(slices) > 1 else slices[0]).to(filters.dtype)
            d_gain = _scale(d_filters, filters, gain, mean.dtype)
    return [d_filters, d_gain, d_bias, d_mean_scale], d_maps


def _scale(d_filters: Tensor, filters: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """dW' becomes dW = γ·dW' in place; returns dγ = <W, dW'>. In blocks that stay in a processor's cache."""
    rows = max(1, CACHED // filters[0].numel())
    if rows >= len(filters):
        d_gain = (filters.to(dtype) * d_filters).sum((1, 2, 3)).to(gain.dtype)
        d_filters.mul_(gain.view(-1, 1, 1, 1))
        return d_gain
    d_gain = []
    for w, d, scale in zip(filters.split(rows), d_filters.split(rows), gain.split(rows), strict=True):
        d_gain.append((w.to(dtype) * d).sum((1, 2, 3)))
        d.mul_(scale.view(-1, 1, 1, 1))
    return torch.cat(d_gain).to(gain.dtype)


def _same(filters: Tensor) -> Geometry:
    return Geometry(padding=(filters.shape[2] // 2,) * 2)


def _slices(filters: Tensor, shapes: Sequence[Sequence[int]], geometry: Geometry, dtype: torch.dtype) -> list[Tensor]:
    """The filters of each input, from those of the concatenation."""
    if len(shapes) == 1:
        return [filters.to(dtype)]
    return list(filters.to(dtype).split([shape[0] // geometry.groups for shape in shapes], 1))


def _convolve(inputs: Sequence[Tensor], filters: Tensor, gain: Tensor, geometry: Geometry) -> Tensor:
    """z' = (γW) * x = γ(W * x), summed over the inputs, each with its slice of the filters."""
    fold = _fold_is_smaller(filters, inputs[0])
    folded = _fold(filters, gain) if fold else filters
    slices = _slices(folded, [x.shape[1:] for x in inputs], geometry, inputs[0].dtype)
    with torch.autocast(inputs[0].device.type, enabled=False):  # the inputs' dtype decides
        z = F.conv2d(inputs[0], slices[0], None, *geometry)
        for x, w in zip(inputs[1:], slices[1:], strict=True):
            z += F.conv2d(x, w, None, *geometry)
    return z if fold else z.mul_(gain.view(-1, 1, 1))


def _convolve_backward(dz, maps, shapes, geometry, filters, gain, need_maps, need_filters):
    """Two lists over the inputs: dx and the slice of dW', None where not needed. Overwrites dz, empties a list."""
    stride, padding, dilation, groups = geometry

    def backward(x, w, *mask):  # with real tensors: it copies the expanded dummies of torch.nn.grad to full size
        return torch.ops.aten.convolution_backward(
            dz, x, w, None, stride, padding, dilation, False, [0, 0], groups, [*mask, False]
        )

    fold = _fold_is_smaller(filters, dz)
    if fold and dz.numel() <= 4 * CACHED and need_filters and need_maps == (True,) and isinstance(maps, tuple):
        # On small maps calls cost more than the memory of both gradients at once.
        d_map, d_slice, _ = backward(maps[0], _fold(filters, gain).to(dz.dtype), True, True)
        return [d_map], [d_slice]
    maps = maps or tuple(dz.new_empty(len(dz), *shape) for shape in shapes)  # only their shapes count
    slices = _slices(filters, shapes, geometry, dz.dtype)
    d_filters = [backward(x, w, False, True)[1] if need_filters else None for x, w in zip(maps, slices, strict=True)]
    if not any(need_maps):
        return [None] * len(maps), d_filters
    if isinstance(maps, list):  # rebuilt ones make room for dx, to which only their shapes matter
        shells = [torch.empty_like(x) for x in maps]
        maps.clear()
        maps = shells
    if fold:
        slices = _slices(_fold(filters, gain), shapes, geometry, dz.dtype)
    else:
        dz.mul_(gain.view(-1, 1, 1))
    d_maps = [
        backward(x, w, True, False)[0] if need else None for x, w, need in zip(maps, slices, need_maps, strict=True)
    ]
    return d_maps, d_filters


def _fold_is_smaller(filters: Tensor, maps: Tensor) -> bool:
    """Whether γ is cheaper on the filters than on the convolution's output, of as many positions as `maps`.

    Small filters are scaled in any case: the two gradients of the convolution then come from one call.
    """
    return filters.numel() <= CACHED or filters[0].numel() < maps.shape[0] * maps.shape[2:].numel()


def _fold(filters: Tensor, gain: Tensor) -> Tensor:
    return filters * gain.view(-1, 1, 1, 1)


def _mean(z: Tensor) -> Tensor:
    """(N, K), in at least float32."""
    return z.mean((2, 3), dtype=torch.promote_types(z.dtype, torch.float32))


def _activate(z: Tensor, mean: Tensor, bias: Tensor, mean_scale: Tensor) -> Tensor:
    """relu(z' - λ·mean + β), in place: fresh maps cost more time than the arithmetic on them."""
    return z.add_((bias - mean_scale * mean)[:, :, None, None]).relu_()


def _pool(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima of the 2x2 windows and the cells 0..3 of the first one in each, as torch's `max_pool2d` breaks ties."""
    upper, lower = maps[:, :, 0::2], maps[:, :, 1::2]
    rows = torch.maximum(upper, lower)
    maxima = torch.maximum(rows[..., 0::2], rows[..., 1::2])
    not_0, not_1, not_2 = (cell != maxima for cell in (upper[..., 0::2], upper[..., 1::2], lower[..., 0::2]))
    low = not_0 & not_1
    right = torch.where(low, not_2, not_0)
    return maxima, low.view(torch.uint8).mul_(2).add_(right.view(torch.uint8))


def _unpool(values: Tensor, offsets: Tensor, fill: Tensor | None = None) -> Tensor:
    """(N, C, H, W) -> (N, C, 2H, 2W): each value to its cell, elsewhere 0 or `fill` (N, C, 1, 1)."""
    n, c, h, w = values.shape
    plain = values.is_contiguous() or not values.is_contiguous(memory_format=torch.channels_last)
    maps = torch.empty(
        (n, c, 2 * h, 2 * w),
        dtype=values.dtype,
        device=values.device,
        memory_format=torch.contiguous_format if plain else torch.channels_last,
    )
    maps = maps.zero_() if fill is None else maps.copy_(fill.expand_as(maps))
    maps.flatten(2).scatter_(2, flat_indices(offsets).flatten(2), values.flatten(2))
    return maps


def _gather(maps: Tensor, offsets: Tensor) -> Tensor:
    """(N, C, 2H, 2W) -> (N, C, H, W): the cells that `offsets` names."""
    return maps.flatten(2).gather(2, flat_indices(offsets).flatten(2)).view(offsets.shape)


class AGCReLU2d(AGC2d):
    """AGC2d followed by ReLU, for networks whose convolutions stay as they are: `agc_relu` with its parameters."""

    def forward(self, input: Tensor) -> Tensor:
        return agc_relu(input, self.weight, self.bias, self.mean_scale)


def agc_relu(input: Tensor, weight: Tensor, bias: Tensor, mean_scale: Tensor) -> Tensor:
    """relu(agc(input)), keeping only its output, which the next layer keeps anyway, and the mean of each map.

    With y the output, g = dy·[y > 0], s a map's sum of g and M its positions: dβ = Σ_n s, dγ = (Σ g·y - β·dβ)/γ,
    dλ = -γ·Σ_n mean(z)·s, dz = γ·(g - λ·s/M). Where some |γ| is too small to divide by (below 1e-6 or 1e-3 of |β|; of
    half-precision maps, whose last digits β swallows, below 1/4 of |β| in bfloat16, 1/32 in float16), the input is kept
    too and dγ = Σ g·(z - λ·mean(z)). To know it waits for the device once.

    Args:
        input: raw filter outputs z, (N, C, H, W).
        weight, bias, mean_scale: γ, β, λ, each (C,).

    Returns:
        (N, C, H, W) in the dtype of `input`. There is no second derivative.

    Raises:
        ValueError: as `agc`.
    """
    _check(input, weight)
    if torch.compiler.is_compiling() or _is_small(input, len(weight)):  # a compiler decides by itself what to keep
        return F.relu(agc(input, weight, bias, mean_scale), inplace=True)
    return _AGCReLU.apply(input, weight, bias, mean_scale)


class _AGCReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, gain, bias, mean_scale):
        mean = _mean(input)
        output = input * gain.view(-1, 1, 1)
        output = output.add_((bias - mean_scale * gain * mean)[:, :, None, None]).relu_().to(input.dtype)
        share = max(1e-3, 32 * torch.finfo(input.dtype).eps)
        small = ctx.needs_input_grad[1] and bool((gain.abs() < torch.clamp(share * bias.abs(), min=1e-6)).any())
        ctx.save_for_backward(output, mean, gain, bias, mean_scale, input if small else None)
        return output

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "agc_relu has no second derivative (create_graph=True): use relu(agc(...)), convert with fuse=False"
            )
        output, mean, gain, bias, mean_scale, input = ctx.saved_tensors
        needs = ctx.needs_input_grad
        g = torch.ops.aten.threshold_backward(grad, output, 0)
        s = g.sum((2, 3), dtype=mean.dtype)
        d_input = d_gain = None
        if needs[1] and input is None:
            d_gain = ((g * output).sum((0, 2, 3), dtype=mean.dtype) - bias * s.sum(0)) / gain
        elif needs[1]:
            d_gain = (g * input).sum((0, 2, 3), dtype=mean.dtype) - (mean_scale * mean * s).sum(0)
        d_bias = s.sum(0) if needs[2] else None
        d_mean_scale = -gain * (mean * s).sum(0) if needs[3] else None
        if needs[0]:
            level = (mean_scale * s / g.shape[2:].numel())[:, :, None, None]
            d_input = g.sub_(level).mul_(gain.view(-1, 1, 1))
        return d_input, *(None if d is None else d.to(gain.dtype) for d in (d_gain, d_bias, d_mean_scale))
