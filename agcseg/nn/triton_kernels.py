"""The programs of `agcseg.nn.kernels`, in Triton: each reads a map once and writes one once.

Maps are taken as positions times maps with a stride each, so that one kernel serves both layouts. A program works on
one sample, BK maps and a share of their positions, BP at a time. Sums over a map are left as one partial sum per share,
(N, shares, K) in float32, which the next kernel adds up in this order: no atomics, so that every run gives the same.
Comparisons are written so that a NaN stays one.

A 3x3 convolution of stride 1 sees each number of its input through nine taps, so that its mean is known before it runs
from what each tap sees: S, the sum of the map less the border that the tap never reaches. Nor need the mean's gradient
be added to the maps. With M positions and l = -λ·s/M, where s = Σ g as in `agcseg.nn.fast`,

    mean(z') = <γW, S>/M    dW' = corr(x, g) + Σ_n l·S    dx = convᵀ(g, γW) + l·(those γW whose taps reach the position)

Inside of a map all nine do: that is one number for each, the gradient of its sum. Borders are corrected in dx itself.
"""

import triton
import triton.language as tl


@triton.jit
def sums(z, partial, P, K, sp, sk, share, BP: tl.constexpr, BK: tl.constexpr):
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
def activate(
    z, partial, mean, bias, scale, y, winners, P, w, K, sp, sk, zsp, zsk, share, shares,
    KNOWN: tl.constexpr, POOL: tl.constexpr, SUM: tl.constexpr, SHARES: tl.constexpr, BP: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """y = relu(z' - λ·mean + β), and with POOL its maxima and winners; P positions of y. With SUM, where the mean is
    known, `partial` becomes Σ y of a share of the positions."""
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
    total = tl.zeros([BP, BK], tl.float32)
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
        else:
            best = _relu(tl.load(z + at, mask=mask, other=0.0), level)
        tl.store(y + at, best, mask=mask)
        if SUM:
            total += tl.where(mask, best.to(tl.float32), 0.0)
    if SUM:
        tl.store(partial + (n * tl.num_programs(0) + i) * K + k, tl.sum(total, 0), mask=k < K)


@triton.jit
def gate(
    dy, y, winners, sum_grad, g, partial, P, w, K, sp, sk, zsp, zsk, share,
    ADD: tl.constexpr, POOL: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """g = dy·[y > 0], with ADD of dy + the gradient of Σ y, with POOL in the winners' cells; and Σ g of a share of the
    P positions of y."""
    i, n, k = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BK + tl.arange(0, BK)
    if ADD:
        level = tl.load(sum_grad + n * K + k, mask=k < K, other=0.0)
    sample = n.to(tl.int64) * P * K
    total = tl.zeros([BP, BK], tl.float32)
    for p0 in range(i * share, min(i * share + share, P), BP):
        p = p0 + tl.arange(0, BP)
        mask = (p < P)[:, None] & (k < K)[None, :]
        at = sample + p[:, None] * sp + k[None, :] * sk
        v = tl.load(dy + at, mask=mask, other=0.0)
        if ADD:
            v = v.to(tl.float32) + level[None, :]
        v = tl.where(tl.load(y + at, mask=mask, other=0.0) <= 0, 0.0, v).to(g.dtype.element_ty)
        if POOL:
            _to_cells(g + 4 * sample, v, tl.load(winners + at, mask=mask, other=0), p, w, k, zsp, zsk, mask)
        else:
            tl.store(g + at, v, mask=mask)
        total += v.to(tl.float32)
    tl.store(partial + (n * tl.num_programs(0) + i) * K + k, tl.sum(total, 0), mask=k < K)


@triton.jit
def _to_cells(maps, v, winner, p, w, k, zsp, zsk, mask):
    """Each value of window p into its cell, 0 into the others."""
    cell = maps + _corner(p, w)[:, None] * zsp + k[None, :] * zsk
    for c in tl.static_range(4):
        tl.store(cell + (c // 2 * 2 * w + c % 2) * zsp, tl.where(winner == c, v, 0.0).to(v.dtype), mask=mask)


@triton.jit
def _vectors(partial, mean, d_bias, d_scale, N, k, K, shares, SHARES: tl.constexpr, BK: tl.constexpr):
    """dβ = Σ_n s and dλ = -Σ_n mean·s."""
    db, dl = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
    for n in range(N):
        s = _total(partial, n, k, K, shares, SHARES)
        db += s
        dl -= tl.load(mean + n * K + k, mask=k < K, other=0.0) * s
    tl.store(d_bias + k, db, mask=k < K)
    tl.store(d_scale + k, dl, mask=k < K)


@triton.jit
def spread(
    g, partial, mean, scale, winners, dz, d_bias, d_scale, N, P, w, K, sp, sk, zsp, zsk, share, shares,
    POOL: tl.constexpr, SHARES: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dz' = g - λ·s/M, with POOL g in the winners' cells; P positions of g. One program also gives dβ and dλ."""
    i, n, k = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BK + tl.arange(0, BK)
    M = P * 4 if POOL else P
    level = -tl.load(scale + k, mask=k < K, other=0.0) * _total(partial, n, k, K, shares, SHARES) / M
    if (i == 0) & (n == 0):
        _vectors(partial, mean, d_bias, d_scale, N, k, K, shares, SHARES, BK)
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
def window(
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
        if GATHER:
            cell = maps + _corner(p, w)[:, None] * zsp + k[None, :] * zsk
            offset = winner.to(tl.int32)
            offset = (offset // 2 * 2 * w + offset % 2) * zsp
            tl.store(values + at, tl.load(cell + offset, mask=mask, other=0.0), mask=mask)
        else:
            _to_cells(maps, tl.load(values + at, mask=mask, other=0.0), winner, p, w, k, zsp, zsk, mask)


@triton.jit(do_not_specialize=["N", "M", "shares"])
def levels(
    partial, mean, scale, level, d_bias, d_scale, N, K, M, shares, SHARES: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """l = -λ·s/M, (N, K), dβ and dλ."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    factor = -tl.load(scale + k, mask=k < K, other=0.0) / M
    for n in range(N):
        tl.store(level + n * K + k, factor * _total(partial, n, k, K, shares, SHARES), mask=k < K)
    _vectors(partial, mean, d_bias, d_scale, N, k, K, shares, SHARES, BK)


@triton.jit
def _line(
    x, winners, start, step, length, k, K, sp, sk, side: tl.constexpr, UNPOOL: tl.constexpr, BP: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Σ x of a line of positions, with UNPOOL of that side of the windows: 0 upper, 1 lower, 2 left, 3 right cells."""
    total = tl.zeros([BP, BK], tl.float32)
    for p0 in range(0, length, BP):
        p = p0 + tl.arange(0, BP)
        mask = (p < length)[:, None] & (k < K)[None, :]
        at = (start + p * step)[:, None] * sp + k[None, :] * sk
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if UNPOOL:
            cell = tl.load(winners + at, mask=mask, other=0)
            v = tl.where((cell % 2 if side >= 2 else cell // 2) == side % 2, v, 0.0)
        total += v
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["h", "w", "shares"])
def tap_sums(
    x, winners, partial, taps, h, w, K, sp, sk, tt, tk, shares,
    UNPOOL: tl.constexpr, SHARES: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """S, the sum of what each tap sees of x, with UNPOOL of x unpooled, from Σ x and the borders."""
    n, k = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    total = _total(partial, n, k, K, shares, SHARES)
    x += n.to(tl.int64) * h * w * K
    winners += n.to(tl.int64) * h * w * K
    taps += n * 9 * K + k * tk
    top = _line(x, winners, 0, 1, w, k, K, sp, sk, 0, UNPOOL, BP, BK)
    bottom = _line(x, winners, (h - 1) * w, 1, w, k, K, sp, sk, 1, UNPOOL, BP, BK)
    left = _line(x, winners, 0, w, h, k, K, sp, sk, 2, UNPOOL, BP, BK)
    right = _line(x, winners, w - 1, w, h, k, K, sp, sk, 3, UNPOOL, BP, BK)
    for i in tl.static_range(3):  # the first row of taps never reaches the last row of the map, and so on
        for j in tl.static_range(3):
            seen = total
            if i == 0:
                seen -= bottom
            if i == 2:
                seen -= top
            if j == 0:
                seen -= right
            if j == 2:
                seen -= left
            if i != 1 and j != 1:
                at = (((2 - i) // 2 * (h - 1)) * w + (2 - j) // 2 * (w - 1)) * sp + k * sk
                v = tl.load(x + at, mask=k < K, other=0.0).to(tl.float32)
                if UNPOOL:
                    v = tl.where(tl.load(winners + at, mask=k < K, other=0) == 2 - i + (2 - j) // 2, v, 0.0)
                seen += v
            tl.store(taps + (3 * i + j) * tt, seen, mask=k < K)


@triton.jit(do_not_specialize=["N", "M"])
def fold(
    filters, gain, taps, folded, mean, N, K, L, M, BN: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr
):  # fmt: skip
    """γW and the mean that it makes of an input, <γW, S>/M; L weights a filter."""
    k, n = tl.program_id(0) * BK + tl.arange(0, BK), tl.program_id(1) * BN + tl.arange(0, BN)
    scale = tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
    total = tl.zeros([BN, BK, BL], tl.float32)
    for start in range(0, L, BL):
        t = start + tl.arange(0, BL)
        at, mask = k[:, None] * L + t[None, :], (k < K)[:, None] & (t < L)[None, :]
        v = tl.load(filters + at, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
        v = v.to(folded.dtype.element_ty)
        tl.store(folded + at, v, mask=mask & (tl.program_id(1) == 0))
        s = tl.load(taps + n[:, None] * L + t[None, :], mask=(n < N)[:, None] & (t < L)[None, :], other=0.0)
        total += s[:, None, :] * v.to(tl.float32)[None, :, :]
    tl.store(mean + n[:, None] * K + k[None, :], tl.sum(total, 2) / M, mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["N"])
def fold_back(
    filters, gain, level, folded, taps, N, K, L, BN: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr
):  # fmt: skip
    """γW and, of each of its taps, what the mean's gradient adds to the positions that it reaches: Σ_k l·γW, (N, L)."""
    t, n = tl.program_id(0) * BL + tl.arange(0, BL), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros([BN, BK, BL], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        at, mask = k[:, None] * L + t[None, :], (k < K)[:, None] & (t < L)[None, :]
        v = tl.load(filters + at, mask=mask, other=0.0).to(tl.float32)
        v = (v * tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)[:, None]).to(folded.dtype.element_ty)
        tl.store(folded + at, v, mask=mask & (tl.program_id(1) == 0))
        d = tl.load(level + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        total += d[:, :, None] * v.to(tl.float32)[None, :, :]
    tl.store(taps + n[:, None] * L + t[None, :], tl.sum(total, 1), mask=(n < N)[:, None] & (t < L)[None, :])


@triton.jit(do_not_specialize=["h", "w"])
def borders(dx, taps, sum_grad, h, w, K, sp, sk, tt, tk, BP: tl.constexpr, BK: tl.constexpr):
    """The gradient of Σ x from those of the taps, and from the borders of dx what taps add inside that never reach
    them."""
    i, n, k = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BK + tl.arange(0, BK)
    taps += n * 9 * K + k * tk
    inside, top, bottom = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
    left, right = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
    for j in tl.static_range(9):
        v = tl.load(taps + j * tt, mask=k < K, other=0.0)
        inside += v
        if j < 3:
            bottom += v
        if j >= 6:
            top += v
        if j % 3 == 0:
            right += v
        if j % 3 == 2:
            left += v
    if i == 0:
        tl.store(sum_grad + n * K + k, inside, mask=k < K)
    q = i * BP + tl.arange(0, BP)  # around: the first row, the last row, then the ends of those between
    row = tl.where(q < 2 * w, q // w * (h - 1), 1 + (q - 2 * w) // 2)
    column = tl.where(q < 2 * w, q % w, (q - 2 * w) % 2 * (w - 1))
    first, last = (row == 0).to(tl.float32)[:, None], (row == h - 1).to(tl.float32)[:, None]
    start, end = (column == 0).to(tl.float32)[:, None], (column == w - 1).to(tl.float32)[:, None]
    v = -(first * top[None, :] + last * bottom[None, :] + start * left[None, :] + end * right[None, :])
    v += first * start * tl.load(taps + 8 * tt, mask=k < K, other=0.0)[None, :]  # was taken off twice
    v += first * end * tl.load(taps + 6 * tt, mask=k < K, other=0.0)[None, :]
    v += last * start * tl.load(taps + 2 * tt, mask=k < K, other=0.0)[None, :]
    v += last * end * tl.load(taps, mask=k < K, other=0.0)[None, :]
    at = dx + n.to(tl.int64) * h * w * K + (row * w + column)[:, None] * sp + k[None, :] * sk
    mask = (q < 2 * (w + h - 2))[:, None] & (k < K)[None, :]
    v += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, v.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def filters(
    d, filters, gain, taps, level, d_filters, d_gain, N, K, L, ADD: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr
):  # fmt: skip
    """dW = γ·dW' and dγ = <W, dW'>, L weights a filter; with ADD dW' = d + Σ_n l·S."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    scale, total = tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32), tl.zeros([BK, BL], tl.float32)
    for start in range(0, L, BL):
        t = start + tl.arange(0, BL)
        at, mask = k[:, None] * L + t[None, :], (k < K)[:, None] & (t < L)[None, :]
        v = tl.load(d + at, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            for n in range(N):
                s = tl.load(taps + n * L + t, mask=t < L, other=0.0)
                v += tl.load(level + n * K + k, mask=k < K, other=0.0)[:, None] * s[None, :]
        total += v * tl.load(filters + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_filters + at, (v * scale[:, None]).to(d_filters.dtype.element_ty), mask=mask)
    tl.store(d_gain + k, tl.sum(total, 1).to(d_gain.dtype.element_ty), mask=k < K)


@triton.jit
def _pixels(
    logits, labels, weights, p, P, K, sp, sk, WEIGHTED: tl.constexpr, IGNORE: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Of P pixels' logits x: x - max x, whether k is the label, and the weight w[label]: 0 where it does not count."""
    k = tl.arange(0, BK)
    label = tl.load(labels + p, mask=p < P, other=IGNORE).to(tl.int32)
    mask = (p < P)[:, None] & (k < K)[None, :]
    x = tl.load(logits + p[:, None] * sp + k[None, :] * sk, mask=mask, other=-float("inf")).to(tl.float32)
    known = (label >= 0) & (label < K)
    weight = tl.where(known, 1.0, float("nan"))  # torch's gather would end the program
    if WEIGHTED:
        weight = tl.load(weights + label, mask=known, other=float("nan")).to(tl.float32)
    x -= tl.where(p < P, tl.max(x, 1), 0.0)[:, None]
    return x, k[None, :] == label[:, None], tl.where(label == IGNORE, 0.0, weight), label != IGNORE


@triton.jit
def class_loss(
    logits, labels, weights, partial, P, K, sp, sk, share,
    WEIGHTED: tl.constexpr, IGNORE: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Σ w[label]·-log softmax(x)[label] and the number of labelled pixels, of a share of an image's."""
    i, n = tl.program_id(0), tl.program_id(1)
    logits += n.to(tl.int64) * P * K
    labels += n.to(tl.int64) * P
    total, number = tl.zeros([BP], tl.float32), tl.zeros([BP], tl.float32)
    for p0 in range(i * share, min(i * share + share, P), BP):
        p = p0 + tl.arange(0, BP)
        x, own, weight, counts = _pixels(logits, labels, weights, p, P, K, sp, sk, WEIGHTED, IGNORE, BK)
        cost = tl.log(tl.sum(tl.exp(x), 1)) - tl.sum(tl.where(own, x, 0.0), 1)
        total += tl.where(counts, weight * cost, 0.0)
        number += counts.to(tl.float32)
    at = partial + (n * tl.num_programs(0) + i) * 2
    tl.store(at, tl.sum(total))
    tl.store(at + 1, tl.sum(number))


@triton.jit
def class_loss_back(
    logits, labels, weights, factor, d, P, K, sp, sk, share,
    WEIGHTED: tl.constexpr, IGNORE: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dx = (softmax(x) - [k = label])·w[label]·factor of the image."""
    i, n, k = tl.program_id(0), tl.program_id(1), tl.arange(0, BK)
    logits += n.to(tl.int64) * P * K
    labels += n.to(tl.int64) * P
    d += n.to(tl.int64) * P * K
    for p0 in range(i * share, min(i * share + share, P), BP):
        p = p0 + tl.arange(0, BP)
        x, own, weight, _ = _pixels(logits, labels, weights, p, P, K, sp, sk, WEIGHTED, IGNORE, BK)
        v = tl.exp(x)
        v = v / tl.sum(v, 1)[:, None] - tl.where(own, 1.0, 0.0)
        v = (v * (weight * tl.load(factor + n))[:, None]).to(d.dtype.element_ty)
        tl.store(d + p[:, None] * sp + k[None, :] * sk, v, mask=(p < P)[:, None] & (k < K)[None, :])
