"""The passes over maps of `agcseg.nn.passes` for a GPU, in Triton: one read and one write of a map each.

Maps are taken as positions times maps with a stride each, so that one kernel serves both layouts. A program works on
one sample, BK maps and a share of their positions, BP at a time. Sums over a map are left as one partial sum per share,
(N, shares, K) in float32, which the next kernel adds up in this order: no atomics, so that every run gives the same.
Comparisons are written so that a NaN stays one.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from agcseg.nn.passes import empty, layout

TILE = 4096  # numbers
SHARES = 128  # at most, of a map's positions
PROGRAMS = 1024  # about as many fill a large GPU several times over


@triton.jit
def _sums(z, partial, P, K, sp, sk, share, BP: tl.constexpr, BK: tl.constexpr):
    """Σ z of a share of the positions."""
    i, n, k = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BK + tl.arange(0, BK)
    z += n.to(tl.int64) * P * K
    total = tl.zeros([BP, BK], tl.float32)
    for p0 in range(i * share, min(i * share + share, P), BP):
        p = p0 + tl.arange(0, BP)
        mask = (p < P)[:, None] & (k < K)[None, :]
        total += tl.load(z + p[:, None] * sp + k[None, :] * sk, mask=mask, other=0.0).to(tl.float32)
    tl.store(partial + (n * tl.num_programs(0) + i) * K + k, tl.sum(total, 0), mask=k < K)


@triton.jit
def _total(partial, n, k, K, shares, SHARES: tl.constexpr):
    """Σ over the shares: (BK,) of sample n."""
    i = tl.arange(0, SHARES)
    mask = (i < shares)[:, None] & (k < K)[None, :]
    return tl.sum(tl.load(partial + (n * shares + i[:, None]) * K + k[None, :], mask=mask, other=0.0), 0)


@triton.jit
def _corner(p, w):
    """The position of the upper left cell of window p in a map of 2w columns, w windows in a row."""
    return (p // w) * 4 * w + (p % w) * 2


@triton.jit
def _relu(z, level):
    y = (z.to(tl.float32) + level[None, :]).to(z.dtype)
    return tl.where(y < 0, 0.0, y).to(z.dtype)


@triton.jit
def _activate(
    z, partial, mean, bias, scale, y, winners, P, w, K, sp, sk, zsp, zsk, share, shares,
    KNOWN: tl.constexpr, POOL: tl.constexpr, SHARES: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y = relu(z' - λ·mean + β), and with POOL its maxima and winners; P positions of y."""
    i, n, k = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BK + tl.arange(0, BK)
    M = P * 4 if POOL else P
    if KNOWN:
        m = tl.load(mean + n * K + k, mask=k < K, other=0.0)
    else:
        m = _total(partial, n, k, K, shares, SHARES) / M
        tl.store(mean + n * K + k, m, mask=(k < K) & (i == 0))
    level = tl.load(bias + k, mask=k < K, other=0.0) - tl.load(scale + k, mask=k < K, other=0.0) * m
    z += n.to(tl.int64) * M * K
    y += n.to(tl.int64) * P * K
    winners += n.to(tl.int64) * P * K
    for p0 in range(i * share, min(i * share + share, P), BP):
        p = p0 + tl.arange(0, BP)
        mask = (p < P)[:, None] & (k < K)[None, :]
        at = p[:, None] * sp + k[None, :] * sk
        if POOL:
            cell = z + _corner(p, w)[:, None] * zsp + k[None, :] * zsk
            best = _relu(tl.load(cell, mask=mask, other=0.0), level)
            winner = tl.zeros([BP, BK], tl.uint8)
            for c in tl.static_range(1, 4):
                v = _relu(tl.load(cell + (c // 2 * 2 * w + c % 2) * zsp, mask=mask, other=0.0), level)
                winner = tl.where(v > best, c, winner).to(tl.uint8)
                best = tl.where(v > best, v, best)
            tl.store(winners + at, winner, mask=mask)
            tl.store(y + at, best, mask=mask)
        else:
            tl.store(y + at, _relu(tl.load(z + at, mask=mask, other=0.0), level), mask=mask)


@triton.jit
def _gate(dy, y, g, partial, P, K, sp, sk, share, BP: tl.constexpr, BK: tl.constexpr):
    """g = dy·[y > 0] and Σ g of a share of the positions."""
    i, n, k = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BK + tl.arange(0, BK)
    sample = n.to(tl.int64) * P * K
    total = tl.zeros([BP, BK], tl.float32)
    for p0 in range(i * share, min(i * share + share, P), BP):
        p = p0 + tl.arange(0, BP)
        mask = (p < P)[:, None] & (k < K)[None, :]
        at = sample + p[:, None] * sp + k[None, :] * sk
        v = tl.load(dy + at, mask=mask, other=0.0)
        v = tl.where(tl.load(y + at, mask=mask, other=0.0) <= 0, 0.0, v).to(g.dtype.element_ty)
        tl.store(g + at, v, mask=mask)
        total += v.to(tl.float32)
    tl.store(partial + (n * tl.num_programs(0) + i) * K + k, tl.sum(total, 0), mask=k < K)


@triton.jit
def _spread(
    g, partial, mean, scale, winners, dz, d_bias, d_scale, N, P, w, K, sp, sk, zsp, zsk, share, shares,
    POOL: tl.constexpr, SHARES: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dz' = g - λ·s/M, with POOL g in the winners' cells; P positions of g. One program also gives dβ and dλ."""
    i, n, k = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BK + tl.arange(0, BK)
    M = P * 4 if POOL else P
    level = -tl.load(scale + k, mask=k < K, other=0.0) * _total(partial, n, k, K, shares, SHARES) / M
    if (i == 0) & (n == 0):
        db, dl = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
        for j in range(N):
            s = _total(partial, j, k, K, shares, SHARES)
            db += s
            dl -= tl.load(mean + j * K + k, mask=k < K, other=0.0) * s
        tl.store(d_bias + k, db, mask=k < K)
        tl.store(d_scale + k, dl, mask=k < K)
    g += n.to(tl.int64) * P * K
    winners += n.to(tl.int64) * P * K
    dz += n.to(tl.int64) * M * K
    for p0 in range(i * share, min(i * share + share, P), BP):
        p = p0 + tl.arange(0, BP)
        mask = (p < P)[:, None] & (k < K)[None, :]
        at = p[:, None] * sp + k[None, :] * sk
        v = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
        if POOL:
            winner = tl.load(winners + at, mask=mask, other=0)
            cell = dz + _corner(p, w)[:, None] * zsp + k[None, :] * zsk
            for c in tl.static_range(4):
                part = tl.where(winner == c, v, 0.0) + level[None, :]
                tl.store(cell + (c // 2 * 2 * w + c % 2) * zsp, part.to(dz.dtype.element_ty), mask=mask)
        else:
            tl.store(dz + at, (v + level[None, :]).to(dz.dtype.element_ty), mask=mask)


@triton.jit
def _window(
    values, winners, maps, P, w, K, sp, sk, zsp, zsk, share, GATHER: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr
):
    """Between P values and the maps of 4P positions: each value into its cell, 0 elsewhere, or out of it."""
    i, n, k = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BK + tl.arange(0, BK)
    values += n.to(tl.int64) * P * K
    winners += n.to(tl.int64) * P * K
    maps += n.to(tl.int64) * P * 4 * K
    for p0 in range(i * share, min(i * share + share, P), BP):
        p = p0 + tl.arange(0, BP)
        mask = (p < P)[:, None] & (k < K)[None, :]
        at = p[:, None] * sp + k[None, :] * sk
        winner = tl.load(winners + at, mask=mask, other=0)
        if winners.dtype.element_ty == tl.int64:  # torch's flat positions
            winner = winner // (2 * w) % 2 * 2 + winner % 2
        cell = maps + _corner(p, w)[:, None] * zsp + k[None, :] * zsk
        if GATHER:
            offset = winner.to(tl.int32)
            offset = (offset // 2 * 2 * w + offset % 2) * zsp
            tl.store(values + at, tl.load(cell + offset, mask=mask, other=0.0), mask=mask)
        else:
            v = tl.load(values + at, mask=mask, other=0.0)
            for c in tl.static_range(4):
                part = tl.where(winner == c, v, 0.0).to(v.dtype)
                tl.store(cell + (c // 2 * 2 * w + c % 2) * zsp, part, mask=mask)


@triton.jit
def _filters(d, filters, gain, d_filters, d_gain, L, BLOCK: tl.constexpr):
    """dW = γ·dW' and dγ = <W, dW'> of one filter of L weights."""
    k = tl.program_id(0)
    scale, total = tl.load(gain + k).to(tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, L, BLOCK):
        at = start + tl.arange(0, BLOCK)
        v = tl.load(d + k * L + at, mask=at < L, other=0.0).to(tl.float32)
        total += v * tl.load(filters + k * L + at, mask=at < L, other=0.0).to(tl.float32)
        tl.store(d_filters + k * L + at, (v * scale).to(d_filters.dtype.element_ty), mask=at < L)
    tl.store(d_gain + k, tl.sum(total, 0).to(d_gain.dtype.element_ty))


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


def activate(z, bias, mean_scale, pool=False, mean=None):
    """As `agcseg.nn.passes.activate`."""
    n, k, h, w = z.shape
    plan, bias, mean_scale = _plan(z), bias.contiguous(), mean_scale.contiguous()
    z_strides, partial, shares = plan.strides, mean, 1
    if known := mean is not None:
        mean = mean.contiguous()
    else:
        partial, shares = _partial(z, plan), plan.grid[0]
        _run(_sums, plan.grid, z, z, partial, h * w, k, *z_strides, plan.share, **plan.tile)
        mean = torch.empty((n, k), dtype=torch.float32, device=z.device)
    y = winners = z
    if pool:
        y = empty(z, (n, k, h // 2, w // 2), layout(z))
        winners = torch.empty_like(y, dtype=torch.uint8)
        h, w, plan = h // 2, w // 2, _plan(y)
    _run(
        _activate, plan.grid, z, z, partial, mean, bias, mean_scale, y, winners, h * w, w, k, *plan.strides, *z_strides,
        plan.share, shares, KNOWN=known, POOL=pool, SHARES=_power_of_2(shares), **plan.tile,
    )  # fmt: skip
    return y, winners if pool else None, mean


def backward(grad, output, winners, mean, mean_scale):
    """As `agcseg.nn.passes.backward`."""
    n, k, h, w = output.shape
    memory_format = layout(output)
    grad, mean_scale = grad.contiguous(memory_format=memory_format), mean_scale.contiguous()
    g = torch.empty_like(output)
    plan = _plan(g)
    partial = _partial(g, plan)
    _run(_gate, plan.grid, g, grad, output, g, partial, h * w, k, *plan.strides, plan.share, **plan.tile)
    dz, dz_strides = g, plan.strides
    if winners is not None:
        dz = empty(g, (n, k, 2 * h, 2 * w), memory_format)
        dz_strides = _plan(dz).strides
    d_bias, d_scale = torch.empty_like(mean_scale), torch.empty_like(mean_scale)
    _run(
        _spread, plan.grid, g, g, partial, mean, mean_scale, g if winners is None else winners, dz, d_bias, d_scale, n,
        h * w, w, k, *plan.strides, *dz_strides, plan.share, plan.grid[0], POOL=winners is not None,
        SHARES=_power_of_2(plan.grid[0]), **plan.tile,
    )  # fmt: skip
    return dz, d_bias, d_scale


def unpool(values, winners):
    """As `agcseg.nn.passes.unpool`; winners in either notation."""
    n, k, h, w = values.shape
    memory_format = layout(values)
    maps = empty(values, (n, k, 2 * h, 2 * w), memory_format)
    values, winners = (part.contiguous(memory_format=memory_format) for part in (values, winners))
    _between(values, winners, maps, False)
    return maps


def gather(maps, winners):
    """As `agcseg.nn.passes.gather`; winners in either notation."""
    memory_format = layout(maps)
    values = empty(maps, winners.shape, memory_format)
    maps, winners = (part.contiguous(memory_format=memory_format) for part in (maps, winners))
    _between(values, winners, maps, True)
    return values


def _between(values, winners, maps, gather):
    (_, k, h, w), plan = values.shape, _plan(values)
    _run(
        _window, plan.grid, values, values, winners, maps, h * w, w, k, *plan.strides, *_plan(maps).strides, plan.share,
        GATHER=gather, **plan.tile,
    )  # fmt: skip


def filter_gradients(d, filters, gain):
    """As `agcseg.nn.passes.filter_gradients`; of filters that are a view of others, with strides of their own."""
    filters, gain = filters.contiguous(memory_format=layout(filters)), gain.contiguous()
    d_filters, d_gain = torch.empty_like(filters), torch.empty_like(gain)
    if d.stride() != filters.stride():
        d = torch.empty_like(filters, dtype=d.dtype).copy_(d)
    length = filters[0].numel()
    block = min(1024, _power_of_2(length))
    _run(_filters, (len(filters), 1, 1), d, d, filters, gain, d_filters, d_gain, length, BLOCK=block)
    return d_filters, d_gain
