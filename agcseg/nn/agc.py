"""Automatic gain control (not adaptive gradient clipping): equation (1) of Deep Control (Ruff 2017, section 2).

    O = (z - λ·mean(z))·γ + β          z = I * W, its mean taken over the map of one sample and one filter

Every sample is treated on its own: no minibatch statistic, no running average, and train() equals eval().
"""

import warnings

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_unary


def agc(input: Tensor, weight: Tensor, bias: Tensor, mean_scale: Tensor) -> Tensor:
    """Automatic gain control of a convolution's output (equation 1). For backward it keeps `input` and one mean a map.

    Args:
        input: raw filter outputs z, (N, C, H, W).
        weight: γ, (C,), scales the mean-subtracted signal.
        bias: β, (C,).
        mean_scale: λ, (C,), how much of each map's own mean is subtracted.

    Returns:
        (N, C, H, W) in the dtype of `input`. Half-precision inputs are reduced and scaled in float32.

    Raises:
        ValueError: `input` is not 4-dimensional, not of real numbers, or its channels are not those of the parameters,
            or these are not vectors of one length.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(agc, (input,), input, weight, bias, mean_scale)
    check_arguments(input, weight, bias, mean_scale)
    if not torch.jit.is_scripting():
        if runs_eagerly():
            return _AGC.apply(input, weight, bias, mean_scale)
    return agc_formula(input, weight, bias, mean_scale)


def agc_formula(input: Tensor, weight: Tensor, bias: Tensor, mean_scale: Tensor) -> Tensor:
    """`agc` as the paper writes it, in torch's own operations: what compilers, tracers and transforms get to see."""
    mean = input.mean((2, 3), keepdim=True, dtype=statistics_dtype(input))
    weight, bias, mean_scale = weight.view(1, -1, 1, 1), bias.view(1, -1, 1, 1), mean_scale.view(1, -1, 1, 1)
    return ((input - mean_scale * mean) * weight + bias).to(input.dtype)


def transformed() -> bool:
    """Whether a transform of torch.func, a forward derivative, `torch.jit.trace` or `torch.export` wants torch's own
    operations."""
    traced = torch.jit.is_tracing() or torch.compiler.is_exporting()
    return torch._C._are_functorch_transforms_active() or traced or forward_ad._current_level >= 0


def runs_eagerly() -> bool:
    """Whether nothing but autograd looks on, no compiler or exporter either."""
    return not (torch.compiler.is_compiling() or transformed())


def check_arguments(input: Tensor, weight: Tensor, bias: Tensor, mean_scale: Tensor) -> None:
    if input.dim() != 4:
        raise ValueError(f"agc takes maps of shape (N, C, H, W); got {_shape(input)}")
    if not input.is_floating_point():
        raise ValueError(f"agc takes maps of real numbers; got {input.dtype}")
    if input.size(1) != weight.numel():
        raise ValueError(f"agc was made for {weight.numel()} channels; the input is {_shape(input)}")
    for vector in (weight, bias, mean_scale):
        if vector.dim() != 1 or vector.numel() != weight.numel():
            raise ValueError(f"γ, β and λ are vectors of one length; got {_shape(weight)} and {_shape(vector)}")


def _shape(maps: Tensor) -> str:
    return str(list(maps.size())).replace("[", "(").replace("]", ")")


def statistics_dtype(maps: Tensor) -> torch.dtype:
    half = maps.dtype == torch.bfloat16 or maps.dtype == torch.float16
    return torch.float32 if half else maps.dtype


class _AGC(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, mean_scale):
        mean = input.mean((2, 3), dtype=statistics_dtype(input))
        ctx.save_for_backward(input, weight, bias, mean_scale, mean)
        centred = input - (mean_scale * mean)[:, :, None, None]
        if weight.dtype != centred.dtype:  # as float32 parameters of float64 maps, which may not become the output's
            return (centred * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)).to(input.dtype)
        return centred.mul_(weight.view(-1, 1, 1)).add_(bias.view(-1, 1, 1)).to(input.dtype)

    @staticmethod
    def backward(ctx, grad):
        input, weight, bias, mean_scale, mean = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return differentiable(agc_formula, (input, weight, bias, mean_scale), needs, grad)
        s = grad.sum((2, 3), dtype=mean.dtype)
        d_input = d_weight = None
        if needs[0]:
            level = (mean_scale * s / grad.shape[2:].numel()).to(grad.dtype)
            d_input = (grad - level[:, :, None, None]).mul_(weight.to(grad.dtype).view(-1, 1, 1))
        if needs[1]:
            d_weight = (grad * input).sum((0, 2, 3), dtype=mean.dtype) - (mean_scale * mean * s).sum(0)
        d_bias = s.sum(0) if needs[2] else None
        d_mean_scale = -weight * (mean * s).sum(0) if needs[3] else None
        return d_input, *(None if d is None else d.to(weight.dtype) for d in (d_weight, d_bias, d_mean_scale))


def differentiable(formula, inputs, needs, grad) -> tuple[Tensor | None, ...]:
    """The gradients of `formula(*inputs)` where they are themselves differentiated (create_graph=True)."""
    inputs = [x.view_as(x) for x in inputs]  # one may be made of another
    output = formula(*inputs)
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return tuple(next(grads) if need else None for need in needs)


class AGC2d(nn.Module):
    """Automatic gain control over (N, C, H, W): `agc` with its trainable parameters. Stands where BatchNorm2d stands.

    On a map of one position λ = 1 leaves nothing but β, whatever the input; the first such map is warned of.

    Args:
        num_features: C, the number of filters of the convolution in front.
        mean_scale: initial λ. The paper names no initial values; 1 starts as plain mean subtraction. By name only: the
            second argument of BatchNorm2d is something else.

    Attributes:
        weight: γ, (C,), starts at 1.
        bias: β, (C,), starts at 0.
        mean_scale: λ, (C,). The paper saw it settle between slightly negative and 2: do not clamp it, and keep weight
            decay off all three.
    """

    def __init__(self, num_features: int, *, mean_scale: float = 1.0, device=None, dtype=None) -> None:
        super().__init__()
        self.num_features = num_features
        self.initial_mean_scale = mean_scale
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.mean_scale = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.constant_(self.mean_scale, self.initial_mean_scale)

    def forward(self, input: Tensor) -> Tensor:
        output = agc(input, self.weight, self.bias, self.mean_scale)
        if not torch.jit.is_scripting():
            self._warn_of_points(output)
        return output

    @torch.jit.unused
    def _warn_of_points(self, output: Tensor) -> None:
        if type(output) is not Tensor or output.shape[2:].numel() != 1 or output.is_meta or not runs_eagerly():
            return
        if not vars(self).get("_knows_points") and bool((self.mean_scale == 1).all()):
            warnings.warn(
                f"{self} got maps of 1x1, of which λ = 1 leaves nothing but β: give it a smaller λ (mean_scale)",
                stacklevel=3,
            )
        self._knows_points = True  # the question waits for the device, once

    def extra_repr(self) -> str:
        return f"{self.num_features}, mean_scale={self.initial_mean_scale:g}"
