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
numbers get few of torch's own operations, on a CPU: there the calls cost more time than the memory is worth.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from agcseg.nn import passes, unit
from agcseg.nn.agc import AGC2d, agc, check_arguments, statistics_dtype, transformed
from agcseg.nn.pooling import max_pool2d, max_unpool2d, window_offsets

Parameters = tuple[Tensor, Tensor, Tensor, Tensor]

ONCE = "the fast AGC unit", "build with implementation='literal', convert with fuse=False"
SMALL = 2**17  # elements of an output, up to which a CPU spends more time on calls than memory is worth


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
    sum_up: bool = False,
    sums: Tensor | None = None,
) -> Tensor | tuple[Tensor | None, ...]:
    """relu(agc(conv2d(input, filters))), with stride 1 and zero padding to the input's size.

    The convolution's inputs and outputs have the dtype of `input` (under autocast: autocast's), means and the sums over
    maps are taken in at least float32. There is no second derivative.

    Args:
        input: maps (N, C, H, W), or several that are taken as concatenated over the channels. The concatenation is not
            kept for backward, and built at all only of small maps on a GPU.
        filters: W, (K, C, k, k), k odd.
        weight, bias, mean_scale: γ, β, λ, each (K,).
        unpool: winners (see Returns) of shape (N, C, H, W): `input` is unpooled to (N, C, 2H, 2W) in front of the
            convolution. Also takes the indices of torch's `max_pool2d`.
        pool: 2x2 max pooling, stride 2, behind the ReLU; height and width must be even.
        stem: filters, γ, β and λ of one more unit in front, whose output is not kept but rebuilt in backward. Worth it
            where that unit is cheap and its output large: the first of a network.
        sum_up: return the sums of the output's maps as well, for the unit behind: with them that knows its mean before
            its convolution runs.
        sums: of `input`, as the unit that it comes from returned them; with `sum_up` only. The gradient of `input` then
            lacks what its sums have a gradient for.

    Returns:
        (N, K, H, W); with `pool` the maxima (N, K, H/2, W/2) and the winners, of the same shape: which cell of its
        window held the (first) maximum, 0 and 1 in the upper row, 2 and 3 in the lower, uint8; of small maps torch's
        own indices. Either serves as `unpool`. With `sum_up` the sums of the maps too, last, each in some parts, (N,
        parts, K); None where they would save no time: everywhere but on a GPU, for one input, filters of 3x3 and a
        large output, not under a compiler.

    Raises:
        ValueError: maps are not (N, C, H, W) of real numbers, filters, vectors or winners do not fit them, or a side to
            be pooled is odd.
        RuntimeError: in a backward with create_graph=True.
    """
    inputs = tuple(input) if isinstance(input, (tuple, list)) else (input,)
    if has_torch_function(inputs):
        options: dict[str, Any] = {"unpool": unpool, "pool": pool, "stem": stem, "sum_up": sum_up, "sums": sums}
        return handle_torch_function(agc_unit, inputs, input, filters, weight, bias, mean_scale, **options)
    # Each step of Python costs a small unit's time: what is plain is seen by few of them.
    _check_maps(inputs, unpool)
    _, channels, height, width = inputs[0].shape
    if len(inputs) > 1:
        channels = sum(x.shape[1] for x in inputs)
    if channels != (stem[0] if stem else filters).shape[1]:
        raise ValueError(f"filters of shape {tuple(filters.shape)} do not fit maps {[tuple(x.shape) for x in inputs]}")
    _check_parameters(filters, weight, bias, mean_scale)
    if stem:
        _check_parameters(*stem)
    for _, _, rows, columns in (filters.shape, stem[0].shape) if stem else (filters.shape,):
        if rows != columns or rows % 2 == 0:
            raise ValueError(f"filters must be square and odd; got {tuple(filters.shape)}")
    if unpool is not None and (len(inputs) > 1 or stem):
        raise ValueError("unpooling takes one input, and no stem behind it")
    if pool and (height % 2 or width % 2) and unpool is None:
        raise ValueError(f"2x2 pooling takes even heights and widths; got {(height, width)}")
    if _is_small(inputs[0], filters.shape[0], 1 if unpool is None else 4):
        result = _small_unit(inputs, filters, weight, bias, mean_scale, unpool, pool, stem)
        return _with_no_sums(result) if sum_up else result
    if unpool is not None and unpool.dtype != torch.uint8:
        unpool = window_offsets(unpool, 2 * inputs[0].shape[3])
    device = inputs[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        inputs = tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in inputs)
    ahead = sum_up and _is_ahead(inputs, filters, stem, unpool)
    parameters = (filters, weight, bias, mean_scale, *(stem or (None,) * 4))
    result = _Unit.apply(pool, ahead, unpool, *parameters, *inputs, sums if ahead else None)
    return _with_no_sums(result) if sum_up and not ahead else result


def _with_no_sums(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return (*result, None) if isinstance(result, tuple) else (result, None)


def _is_ahead(inputs, filters, stem, unpool) -> bool:
    """Whether the mean is to be known ahead of the convolution."""
    return (
        passes.kernels(inputs[0]) is not None
        and not torch.compiler.is_compiling()
        and len(inputs) == 1
        and all(weights.shape[2:] == (3, 3) for weights in (filters, *(stem or ())[:1]))
        and (unpool is not None or min(inputs[0].shape[2:]) > 1)
        and len(filters) * inputs[0][:, 0].numel() * (1 if unpool is None else 4) >= unit.MANY
    )


def _check_maps(inputs: tuple[Tensor, ...], unpool: Tensor | None) -> None:
    """As strict for small maps as for large ones."""
    for x in inputs:
        if x.dim() != 4:
            raise ValueError(f"agc_unit takes maps of shape (N, C, H, W); got {[tuple(x.shape) for x in inputs]}")
        if not x.is_floating_point():
            raise ValueError(f"agc_unit takes maps of real numbers, such as float32; got {x.dtype}")
    first, *others = inputs
    if others:
        mixed = len({x.dtype for x in inputs}) > 1 and not torch.is_autocast_enabled(first.device.type)
        if mixed or any(x.shape[2:] != first.shape[2:] or len(x) != len(first) for x in others):
            got = [(tuple(x.shape), x.dtype) for x in inputs]
            raise ValueError(f"maps that are concatenated differ in their channels only; got {got}")
    if unpool is None:
        return
    if unpool.dtype not in (torch.uint8, torch.int64) or unpool.shape != first.shape:
        got = f"{tuple(unpool.shape)} of {unpool.dtype}"
        raise ValueError(f"winners are uint8 or int64 and of the maps' shape {tuple(first.shape)}; got {got}")
    if (
        unpool.dtype == torch.int64
        and type(unpool) is Tensor  # not a fake one, which has no values
        and unpool.device.type == "cpu"
        and not (torch.compiler.is_compiling() or transformed())
    ):
        width = 2 * unpool.shape[3]
        row = (unpool - passes.upper_left(unpool, width)).bitwise_and_(~1)
        if not ((row == 0) | (row == width)).all():
            raise ValueError("winners must lie in the 2x2 windows of their own positions")


def _check_parameters(filters: Tensor, *vectors: Tensor) -> None:
    if any(vector.shape != filters.shape[:1] for vector in vectors):
        got = ", ".join(str(tuple(vector.shape)) for vector in vectors)
        raise ValueError(f"{len(filters)} filters take γ, β and λ of as many; got {got}")


def _is_small(maps: Tensor, num_features: int, positions: int = 1) -> bool:
    """Whether the formula in torch's own operations is faster: by the output's size, `positions` times that of `maps`.

    On a GPU nothing was measured, and a compiler saves the calls by itself. On the meta device there are only shapes,
    and transforms of torch.func and traces need the formula.
    """
    if transformed():
        return True
    if not maps.is_cpu:
        return maps.is_meta
    if torch.compiler.is_compiling():
        return False
    n, _, height, width = maps.shape
    return n * num_features * height * width * positions <= SMALL


def _small_unit(inputs, filters, weight, bias, mean_scale, unpool, pool, stem):
    """`agc_unit` in torch's own operations: keeps more, of maps that are small."""
    maps = torch.cat(inputs, 1) if len(inputs) > 1 else inputs[0]
    if unpool is not None:
        maps = max_unpool2d(maps, unpool)
    if stem is not None:
        maps = _convolved(maps, *stem)
    maps = _convolved(maps, filters, weight, bias, mean_scale)
    return max_pool2d(maps) if pool else maps


def _convolved(maps: Tensor, filters: Tensor, weight: Tensor, bias: Tensor, mean_scale: Tensor) -> Tensor:
    n, _, height, width = maps.shape
    # Kept for backward are the folded filters, or else the convolution's output.
    fold = filters[0].numel() <= n * height * width and not transformed()
    folded = filters * weight.view(-1, 1, 1, 1) if fold else filters
    z = F.conv2d(maps, folded.to(maps.dtype), padding=filters.shape[2] // 2)
    if fold:
        return _Activate.apply(z, bias, mean_scale)
    return agc_relu(z, weight, bias, mean_scale) if transformed() else _small_agc_relu(z, weight, bias, mean_scale)


class _Activate(torch.autograd.Function):
    """relu(z' - λ·mean(z') + β) in place of z' = (γW) * x. As `agcseg.nn.passes` has it, in fewer steps of Python."""

    @staticmethod
    def forward(ctx, z, bias, mean_scale):
        mean = z.mean((2, 3), dtype=statistics_dtype(z))
        level = torch.addcmul(bias, mean_scale, mean, value=-1)
        output = passes.add_levels(z, level).relu_()
        ctx.mark_dirty(z)
        ctx.save_for_backward(output, mean, mean_scale)
        return output

    @staticmethod
    def backward(ctx, grad):
        _only_once(*ONCE)
        output, mean, mean_scale = ctx.saved_tensors
        g = torch.ops.aten.threshold_backward(grad, output, 0)
        s = g.sum((2, 3), dtype=mean.dtype)
        level = (mean_scale * s).div_(-g.shape[2] * g.shape[3])
        return passes.add_levels(g, level), s.sum(0), (mean * s).sum(0).neg_()


class _Unit(torch.autograd.Function):
    """Arguments: pool, whether the mean is known ahead, winners for unpooling, the unit's 4 parameters, the
    stem's 4 or None, the inputs, their sums or None."""

    @staticmethod
    def forward(ctx, pool, ahead, unpool, *tensors):
        *tensors, sums = tensors
        parameters, inputs = list(tensors[:4]), list(tensors[8:])
        stem = [] if tensors[4] is None else list(tensors[4:8])
        ctx.given_parts = 0 if sums is None else sums.shape[1]
        output, winners, mean, stem_mean, sums, *taps = torch.ops.agcseg.unit(
            inputs, unpool, parameters, stem, pool, ahead, sums
        )
        needs = ctx.needs_input_grad[3:-1]
        # The inputs serve the gradients of W and γ, and a stem's output is rebuilt from them; else they are not kept.
        kept = inputs if needs[0] or needs[1] or (stem and any(needs[4:])) else []
        ctx.stem = len(stem)
        ctx.shapes = [side for x in inputs for side in x.shape[1:]]
        ctx.set_materialize_grads(False)
        if pool:
            ctx.mark_non_differentiable(winners)
        ctx.parts = sums.shape[1] if ahead else 0
        ctx.save_for_backward(
            output, winners if pool else None, unpool, mean, stem_mean, *(taps if ahead else (None, None)), *parameters,
            *stem, *kept,
        )  # fmt: skip
        results = (output, *([winners] if pool else []), *([sums] if ahead else []))
        return results if len(results) > 1 else output

    @staticmethod
    def backward(ctx, grad, *others):
        _only_once(*ONCE)
        needs = ctx.needs_input_grad[3:-1]
        output, winners, unpool, mean, stem_mean, taps, stem_taps, *tensors = ctx.saved_tensors
        sum_grad = others[-1] if ctx.parts else None
        if grad is None and sum_grad is None:
            return None, None, None, *(None for _ in needs), None
        grad = torch.zeros_like(output) if grad is None else grad
        if sum_grad is not None:  # the same for all parts
            sum_grad = sum_grad[:, 0].contiguous()
        parameters, stem, inputs = tensors[:4], tensors[4 : 4 + ctx.stem], tensors[4 + ctx.stem :]
        *grads, d_sums = torch.ops.agcseg.unit_backward(
            grad, output, winners, unpool, mean, stem_mean, parameters, stem, inputs, ctx.shapes, needs, sum_grad,
            taps, stem_taps,
        )  # fmt: skip
        grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        if grads[8] is None or not ctx.parts:
            d_sums = None
        elif ctx.given_parts:
            d_sums = d_sums[:, None].expand(-1, ctx.given_parts, -1)
        else:
            grads[8].add_(d_sums.to(grads[8].dtype)[:, :, None, None])
            d_sums = None
        return None, None, None, *grads, d_sums


def _only_once(what: str, remedy: str) -> None:
    """For a backward. Not once_differentiable: its message comes later and names no remedy."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{what} has no second derivative (create_graph=True): {remedy}")


class AGCReLU2d(AGC2d):
    """AGC2d followed by ReLU, for networks whose convolutions stay as they are: `agc_relu` with its parameters, which
    says what is kept for backward, and that there is no second derivative."""

    def forward(self, input: Tensor) -> Tensor:
        return agc_relu(input, self.weight, self.bias, self.mean_scale)


def agc_relu(input: Tensor, weight: Tensor, bias: Tensor, mean_scale: Tensor) -> Tensor:
    """relu(agc(input)), keeping only its output, which the next layer keeps anyway, and the mean of each map; on a CPU
    of outputs of no more than SMALL numbers the input too.

    With y the output, g = dy·[y > 0], s a map's sum of g and M its positions: dβ = Σ_n s, dγ = (Σ g·y - β·dβ)/γ,
    dλ = -γ·Σ_n mean(z)·s, dz = γ·(g - λ·s/M). Where some |γ| is too small to divide by (below 1e-6 or 1e-3 of |β|; of
    half-precision maps, whose last digits β swallows, below 1/4 of |β| in bfloat16, 1/32 in float16), the input is kept
    too and dγ = Σ g·(z - λ·mean(z)). On a GPU, which would have to be waited for to know, the input is always kept.

    Args:
        input: raw filter outputs z, (N, C, H, W).
        weight, bias, mean_scale: γ, β, λ, each (C,).

    Returns:
        (N, C, H, W) in the dtype of `input`. There is no second derivative.

    Raises:
        ValueError: as `agc`.
        RuntimeError: in a backward with create_graph=True, where maps are large.
    """
    if torch.jit.is_scripting():
        return F.relu(agc(input, weight, bias, mean_scale))
    return _eager_agc_relu(input, weight, bias, mean_scale)


@torch.jit.ignore
def _eager_agc_relu(input: Tensor, weight: Tensor, bias: Tensor, mean_scale: Tensor) -> Tensor:
    if has_torch_function_unary(input):
        return handle_torch_function(agc_relu, (input,), input, weight, bias, mean_scale)
    check_arguments(input, weight, bias, mean_scale)
    if torch.compiler.is_compiling() or transformed():  # a compiler decides by itself what to keep
        return F.relu(agc(input, weight, bias, mean_scale), inplace=True)
    if _is_small(input, len(weight)):
        return _small_agc_relu(input, weight, bias, mean_scale)
    return _AGCReLU.apply(input, weight, bias, mean_scale)


def _small_agc_relu(input: Tensor, weight: Tensor, bias: Tensor, mean_scale: Tensor) -> Tensor:
    """In torch's own operations, whose backward takes no Python; keeps the input and the output."""
    mean = input.mean((2, 3), dtype=statistics_dtype(input))
    level = torch.addcmul(bias, mean_scale * weight, mean, value=-1)
    return torch.addcmul(level.to(input.dtype)[:, :, None, None], input, weight.to(input.dtype).view(-1, 1, 1)).relu_()


class _AGCReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, gain, bias, mean_scale):
        mean = passes.sums(input) / input.shape[2:].numel()
        level = (bias - mean_scale * gain * mean).to(input.dtype)[:, :, None, None]
        output = torch.addcmul(level, input, gain.to(input.dtype).view(-1, 1, 1)).relu_()
        small = ctx.needs_input_grad[1] and (input.device.type != "cpu" or _is_small_gain(gain, bias, input.dtype))
        ctx.save_for_backward(output, mean, gain, bias, mean_scale, input if small else None)
        return output

    @staticmethod
    def backward(ctx, grad):
        _only_once("agc_relu", "use relu(agc(...)), convert with fuse=False")
        output, mean, gain, bias, mean_scale, input = ctx.saved_tensors
        needs = ctx.needs_input_grad
        g = torch.ops.aten.threshold_backward(grad, output, 0)
        s = passes.sums(g)
        d_input = d_gain = None
        if needs[1] and input is None:
            d_gain = (passes.sums(g * output).sum(0) - bias * s.sum(0)) / gain
        elif needs[1]:
            d_gain = (passes.sums(g * input) - mean_scale * mean * s).sum(0)
        d_bias = s.sum(0) if needs[2] else None
        d_mean_scale = -gain * (mean * s).sum(0) if needs[3] else None
        if needs[0]:
            level = (mean_scale * s / g.shape[2:].numel()).to(g.dtype)[:, :, None, None]
            d_input = g.sub_(level).mul_(gain.to(g.dtype).view(-1, 1, 1))
        return d_input, *(None if d is None else d.to(gain.dtype) for d in (d_gain, d_bias, d_mean_scale))


def _is_small_gain(gain: Tensor, bias: Tensor, dtype: torch.dtype) -> bool:
    share = max(1e-3, 32 * torch.finfo(dtype).eps)
    return bool((gain.abs() < torch.clamp(share * bias.abs(), min=1e-6)).any())
