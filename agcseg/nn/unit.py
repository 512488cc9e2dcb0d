"""The fast AGC unit (see `agcseg.nn.fast`) forward and backward, as two operations of torch's.

Nothing sees through an operation: `torch.compile`, which would keep the maps that backward rebuilds because it finds
them in forward too, runs it as it runs eagerly, and fake tensors have its shapes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from agcseg.nn import passes
from agcseg.nn.agc import statistics_dtype
from agcseg.nn.passes import CACHED


class Geometry(NamedTuple):
    """Of a convolution, as torch.nn.Conv2d has it."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


PARTS = 4  # of a minibatch, at most, in which a GPU rebuilds maps; of a small one 2
MANY = 2**23  # elements, from which on a pass over maps costs a GPU more than the launches that spare it cost the host

OPERATIONS = torch.library.Library("agcseg", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
OPERATIONS.define(
    "unit(Tensor[] inputs, Tensor? unpool, Tensor[] parameters, Tensor[] stem, bool pool, bool ahead,"
    " Tensor? sums) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
OPERATIONS.define(
    "unit_backward(Tensor grad, Tensor output, Tensor? winners, Tensor? unpool, Tensor mean, Tensor stem_mean,"
    " Tensor[] parameters, Tensor[] stem, Tensor[] inputs, SymInt[] shapes, bool[] needs,"
    " Tensor? sum_grad, Tensor? taps, Tensor? stem_taps) -> Tensor[]",
    tags=TAGS,
)


def _forward(inputs, unpool, parameters, stem, pool, ahead, sums):
    """The output, winners of the pooling, mean of z' and of the stem's z'; with `ahead` the output's sums (in parts, as
    `sums` are the input's), the tap sums of the unit and of the stem. What there is none of is empty."""
    filters, gain, bias, mean_scale = parameters
    maps, stem_mean, taps, stem_taps = inputs, None, None, None
    if ahead:
        x = inputs[0]
        if stem:
            x, _, stem_mean, sums, stem_taps = _ahead(x, sums, None, stem, False)
        output, winners, mean, sums, taps = _ahead(x, sums, unpool, parameters, pool)
        return output, *(x.new_empty(0) if t is None else t for t in (winners, mean, stem_mean, sums, taps, stem_taps))
    if _joins(inputs[0], len(inputs[0]), [x.shape[1:] for x in inputs]):
        maps = [torch.cat(inputs, 1)]
    if stem:
        output, _, stem_mean = passes.activate(convolve(maps, *stem[:2], same_padding(stem[0])), *stem[2:])
        maps = [output]
        del output
    elif unpool is not None:
        maps = [passes.unpool(maps[0], unpool)]
    z = convolve(maps, filters, gain, same_padding(filters))
    del maps
    z = z.contiguous(memory_format=_layout(inputs, filters))
    if pool and z.is_cpu and not gain.all():
        z.add_(0.0)  # γ = 0 leaves 0 and -0, of which the first must win
    output, winners, mean = passes.activate(z, bias, mean_scale, pool=pool)
    return output, *(z.new_empty(0) if t is None else t for t in (winners, mean, stem_mean, None, None, None))


def _ahead(x, sums, unpool, parameters, pool):
    """A unit on a GPU whose mean is known ahead of its convolution, 3x3: its output, winners, mean, sums, tap sums."""
    kernels, (filters, gain, bias, mean_scale) = passes.kernels(x), parameters
    taps = kernels.tap_sums(x, kernels.sums(x) if sums is None else sums, filters, unpool)
    maps = x if unpool is None else kernels.unpool(x, unpool)
    folded, mean = kernels.fold(filters, gain, x.dtype, taps, maps.shape[2:].numel())
    z = F.conv2d(maps, folded, padding=1)
    del maps
    z = z.contiguous(memory_format=_layout([x], filters))
    output, winners, _, sums = kernels.activate(z, bias, mean_scale, pool, mean, True)
    return output, winners, mean, sums, taps


def _backward(
    grad, output, winners, unpool, mean, stem_mean, parameters, stem, inputs, shapes, needs, sum_grad, taps, stem_taps,
):  # fmt: skip
    """Gradients of the unit's 4 parameters, the stem's 4, the inputs and their sums; empty where not needed."""
    of_stem = (stem_mean, stem_taps) if stem else (None, None)
    by_sample = [grad, output, winners, unpool, mean, of_stem[0], sum_grad, taps, of_stem[1]]
    shapes = [shapes[i : i + 3] for i in range(0, len(shapes), 3)]
    # What is rebuilt exists for some samples at a time: for one on a CPU, where one is enough work, else for a part.
    parts = 1
    if (unpool is not None or stem) and output.shape[2:].numel() * (1 if winners is None else 4) >= 2**16:
        parts = len(grad) if grad.device.type == "cpu" else min(len(grad), max(2, min(PARTS, len(grad) // 4)))
    if parts <= 1:
        grads = _backward_part(*by_sample, None, inputs, parameters, stem, shapes, needs)
    else:
        d_input = None
        if unpool is not None and needs[8]:
            d_input = torch.empty_like(unpool, dtype=output.dtype, memory_format=passes.layout(output))
        tensors = (*by_sample, d_input, *inputs)
        chunks = zip(*([None] * parts if t is None else t.chunk(parts) for t in tensors), strict=False)
        grads, *others = (_backward_part(*c[:10], c[10:], parameters, stem, shapes, needs) for c in chunks)
        for other in others:
            pairs = zip(*((a, b) for a, b in zip(grads[:8], other, strict=False) if a is not None), strict=True)
            torch._foreach_add_(*map(list, pairs))
        for i in range(8, len(grads)):
            if i == 8 and d_input is not None:
                grads[i] = d_input
            elif grads[i] is not None:
                grads[i] = torch.cat([grads[i], *(other[i] for other in others)])
    like = [*parameters, *(stem or parameters)]
    grads[:8] = [g if g is None else passes.as_parameter(g, p) for g, p in zip(grads[:8], like, strict=True)]
    grads[8:-1] = [g if g is None else g.contiguous(memory_format=passes.layout(output)) for g in grads[8:-1]]
    return [output.new_empty(0) if g is None else g for g in grads]


def _backward_part(
    grad, output, winners, unpool, mean, stem_mean, sum_grad, taps, stem_taps, d_input, inputs, parameters, stem,
    shapes, needs,
) -> list[Tensor | None]:  # fmt: skip
    """`_backward` for some samples of the minibatch; None where not needed. Fills `d_input` where the input is unpooled
    and there is one."""
    if _joins(output, len(output), shapes):
        channels, (_, height, width) = [shape[0] for shape in shapes], shapes[0]
        joined = [torch.cat(inputs, 1)] if inputs else []
        *grads, d_joined, _ = _backward_part(
            grad, output, winners, unpool, mean, stem_mean, None, None, None, None, joined, parameters, stem,
            [(sum(channels), height, width)], [*needs[:8], any(needs[8:])],
        )  # fmt: skip
        d_maps = [None] * len(shapes) if d_joined is None else d_joined.split(channels, 1)
        return [*grads, *(d if need else None for d, need in zip(d_maps, needs[8:], strict=True)), None]
    need_maps = tuple(needs[8:]) if not stem else (any(needs[4:]),)
    maps, shapes_of_maps = tuple(inputs), shapes
    if stem:
        height_width = output.shape[2:] if winners is None else [2 * side for side in output.shape[2:]]
        shapes_of_maps = [(len(stem[0]), *height_width)]
        if maps:
            filters, gain, bias, mean_scale = stem
            z = convolve(inputs, filters, gain, same_padding(filters))
            rebuilt, _, _ = passes.activate(z, bias, mean_scale, mean=stem_mean)
            maps = (rebuilt,)
            del z
    elif unpool is not None:
        shapes_of_maps = [(shapes[0][0], 2 * shapes[0][1], 2 * shapes[0][2])]
        if maps:
            maps = [passes.unpool(maps[0], unpool)]
    grads, d_maps, d_sums = _gradients(
        grad, output, winners, mean, maps, shapes_of_maps, parameters, needs[:4], need_maps, sum_grad, taps
    )
    d_stem = [None] * 4
    if stem and need_maps[0]:
        d_stem, d_maps, d_sums = _gradients(
            d_maps[0], rebuilt, None, stem_mean, tuple(inputs), shapes, stem, needs[4:8], tuple(needs[8:]), d_sums,
            stem_taps,
        )  # fmt: skip
    elif stem:
        d_maps = [None] * len(needs[8:])
    elif unpool is not None and need_maps[0]:
        d_maps = [passes.gather(d_maps[0], unpool, d_input)]
    return [*grads, *d_stem, *d_maps, d_sums]


def _gradients(grad, output, winners, mean, maps, shapes, parameters, needs, need_maps, sum_grad, taps):
    """Gradients of one unit: those of W, γ, β, λ (None where `needs` says no), of the convolution's inputs and, where
    the mean was known ahead, of their sums.

    `maps` are these inputs, of (C, H, W) `shapes`; a list if they may be freed on the way, empty where neither W nor γ
    needs a gradient.
    """
    filters, gain, _, mean_scale = parameters
    need_filters = needs[0] or needs[1]
    if taps is not None:
        return _gradients_ahead(
            grad, output, winners, mean, maps, shapes, parameters, need_filters, need_maps, sum_grad, taps
        )
    dz, d_bias, d_mean_scale = passes.backward(grad, output, winners, mean, mean_scale, need_filters or any(need_maps))
    d_filters = d_gain = None
    d_maps = [None] * len(need_maps)
    if dz is not None:
        d_maps, slices = convolve_backward(
            dz, maps, shapes, same_padding(filters), filters, gain, need_maps, need_filters
        )
        del dz
    if need_filters:
        d_filters = torch.cat(slices, 1) if len(slices) > 1 else slices[0]
        d_filters, d_gain = passes.filter_gradients(d_filters, filters, gain)
    return [d_filters, d_gain, d_bias, d_mean_scale], d_maps, None


def _gradients_ahead(
    grad, output, winners, mean, maps, shapes, parameters, need_filters, need_maps, sum_grad, taps
):  # fmt: skip
    """`_gradients` where the mean's gradient is never added to maps."""
    kernels, (filters, gain, _, mean_scale) = passes.kernels(output), parameters
    g, partial = kernels.gate(grad, output, winners, sum_grad)
    level, d_bias, d_mean_scale = kernels.levels(partial, mean, mean_scale, g.shape[2:].numel())
    d_filters = d_gain = d_sums = None
    folded, back = kernels.fold_back(filters, gain, g.dtype, level)
    d_maps, slices = convolve_backward(
        g, maps, shapes, same_padding(filters), filters, gain, need_maps, need_filters, folded
    )
    if need_maps[0]:
        d_sums = kernels.borders(d_maps[0], back)
    if need_filters:
        d_filters, d_gain = kernels.filter_gradients(slices[0], filters, gain, taps, level)
    return [d_filters, d_gain, d_bias, d_mean_scale], d_maps, d_sums


def _joins(like: Tensor, n: int, shapes: Sequence[Sequence[int]]) -> bool:
    """Whether the maps of a convolution, of (C, H, W) `shapes`, are concatenated for it."""
    return like.is_cuda and len(shapes) > 1 and n * sum(math.prod(shape) for shape in shapes) < MANY


def same_padding(filters: Tensor) -> Geometry:
    return Geometry(padding=(filters.shape[2] // 2,) * 2)


def _slices(filters: Tensor, shapes: Sequence[Sequence[int]], geometry: Geometry) -> list[Tensor]:
    """The filters of each input, from those of the concatenation."""
    if len(shapes) == 1:
        return [filters]
    return list(filters.split([shape[0] // geometry.groups for shape in shapes], 1))


def convolve(inputs: Sequence[Tensor], filters: Tensor, gain: Tensor, geometry: Geometry) -> Tensor:
    """z' = (γW) * x = γ(W * x), summed over the inputs, each with its slice of the filters."""
    dtype = inputs[0].dtype
    fold = _fold_is_smaller(filters, inputs[0])
    folded = passes.fold(filters, gain, dtype) if fold else filters.to(dtype)
    slices = _slices(folded, [x.shape[1:] for x in inputs], geometry)
    z = F.conv2d(inputs[0], slices[0], None, *geometry)
    for x, w in zip(inputs[1:], slices[1:], strict=True):
        z += F.conv2d(x, w, None, *geometry)
    return z if fold else z.mul_(gain.to(dtype).view(-1, 1, 1))


def convolve_backward(dz, maps, shapes, geometry, filters, gain, need_maps, need_filters, folded=None):
    """Two lists over the inputs: dx and the slice of dW', None where not needed. Overwrites dz, empties a list."""
    stride, padding, dilation, groups = geometry

    def backward(x, w, *mask):  # with real tensors: it copies the expanded dummies of torch.nn.grad to full size
        return torch.ops.aten.convolution_backward(
            dz, x, w, None, stride, padding, dilation, False, [0, 0], groups, [*mask, False]
        )

    fold = folded is not None or _fold_is_smaller(filters, dz)
    if folded is None:
        folded = passes.fold(filters, gain, dz.dtype) if fold else filters.to(dz.dtype)
    # On small maps, and on a GPU's, calls cost more than the memory of both gradients at once.
    small = dz.numel() <= 4 * CACHED or dz.is_cuda
    if fold and small and need_filters and need_maps == (True,) and isinstance(maps, tuple):
        d_map, d_slice, _ = backward(maps[0], folded, True, True)
        return [d_map], [d_slice]
    maps = maps or tuple(dz.new_empty(len(dz), *shape) for shape in shapes)  # only their shapes count
    slices = _slices(folded, shapes, geometry)  # of which the filters' gradient reads the shapes only
    d_filters = [backward(x, w, False, True)[1] if need_filters else None for x, w in zip(maps, slices, strict=True)]
    if not any(need_maps):
        return [None] * len(maps), d_filters
    if isinstance(maps, list):  # rebuilt ones make room for dx, to which only their shapes matter
        shells = [torch.empty_like(x) for x in maps]
        maps.clear()
        maps = shells
    if not fold:
        dz.mul_(gain.to(dz.dtype).view(-1, 1, 1))
    d_maps = [
        backward(x, w, True, False)[0] if need else None for x, w, need in zip(maps, slices, need_maps, strict=True)
    ]
    return d_maps, d_filters


def _fold_is_smaller(filters: Tensor, maps: Tensor) -> bool:
    """Whether γ is cheaper on the filters than on the convolution's output, of as many positions as `maps`.

    Small filters are scaled in any case: the two gradients of the convolution then come from one call. So are all on a
    GPU: what changes their dtype scales them on the way.
    """
    small = filters.numel() <= CACHED or filters[0].numel() < maps.shape[0] * maps.shape[2:].numel()
    return small or filters.is_cuda


def _layout(inputs: Sequence[Tensor], filters: Tensor) -> torch.memory_format:
    """Of a convolution's output: channels_last if either has it."""
    last = torch.channels_last in (passes.layout(inputs[0]), passes.layout(filters))
    return torch.channels_last if last else torch.contiguous_format


def _fake_forward(inputs, unpool, parameters, stem, pool, ahead, sums):
    assert not ahead  # under a compiler
    (x, *_), (filters, *_) = inputs, parameters
    sides = x.shape[2:] if unpool is None else [2 * side for side in x.shape[2:]]
    shape = (x.shape[0], len(filters), *(side // 2 if pool else side for side in sides))
    output = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(inputs, filters))
    winners = torch.empty_like(output, dtype=torch.uint8) if pool else x.new_empty(0)
    dtype = statistics_dtype(x)
    mean = x.new_empty((x.shape[0], len(filters)), dtype=dtype)  # its len would fix the size of the minibatch
    stem_mean = x.new_empty((x.shape[0], len(stem[0])), dtype=dtype) if stem else x.new_empty(0)
    return output, winners, mean, stem_mean, *(x.new_empty(0) for _ in range(3))


def _fake_backward(
    grad, output, winners, unpool, mean, stem_mean, parameters, stem, inputs, shapes, needs, *_
):  # fmt: skip
    gradients = [torch.empty_like(p) for p in (*parameters, *(stem or parameters))]
    memory_format = passes.layout(output)
    for i in range(0, len(shapes), 3):
        shape = (output.shape[0], *shapes[i : i + 3])
        gradients.append(torch.empty(shape, dtype=output.dtype, device=output.device, memory_format=memory_format))
    gradients = [g if need else output.new_empty(0) for g, need in zip(gradients, needs, strict=True)]
    return [*gradients, output.new_empty(0)]


OPERATIONS.impl("unit", _forward, "CompositeExplicitAutograd")
OPERATIONS.impl("unit_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("agcseg::unit", _fake_forward, lib=OPERATIONS)
torch.library.register_fake("agcseg::unit_backward", _fake_backward, lib=OPERATIONS)


def forward_work(inputs, unpool, parameters, stem, pool, ahead, sums, out_shape=None, **_) -> int:
    """Of the convolutions, two per multiplication and addition; from shapes. For torch.utils.flop_counter, whose import
    takes more than torch's own."""
    return sum(_work(out_shape[0], pool, own) for own in (parameters, stem) if own)


def backward_work(
    grad, output, winners, unpool, mean, stem_mean, parameters, stem, inputs, shapes, needs, *_, **__
) -> int:
    """Twice the forward's, a gradient of filters and one of inputs, where needed; and what is rebuilt of the stem."""
    own, pool = [needs[0] or needs[1], any(needs[4:])], winners is not None
    work = sum(own) * _work(output, pool, parameters)
    if stem and own[0]:
        work += (1 + (needs[4] or needs[5]) + any(needs[8:])) * _work(output, pool, stem)
    return work


def _work(output, pool: bool, parameters) -> int:
    """Of one convolution; its output is (N, K, H, W), halved by pooling."""
    return 2 * output[0] * output[2] * output[3] * (4 if pool else 1) * math.prod(parameters[0])
