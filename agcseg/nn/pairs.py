"""A convolution and the AGC behind it as one step of autograd that keeps no map but the convolution's input.

Without a ReLU in it, the unit of `agcseg.nn.fast` does not need its own output for backward either: with γ in the
filters, z' = (γW) * x and O = z' + (β - λ·mean(z')), M positions in a map and s = Σ dO over each,

    dz' = dO - λ·s/M    dβ = Σ_n s    dλ = -Σ_n mean(z')·s    dW' = corr(x, dz')    dW = γ·dW'    dγ = <W, dW'>

The convolution's own bias b only shifts: β + (1 - λ)·γ·b takes β's place.

In networks that others wrote, the two are called one after the other. A `paired` convolution therefore puts off what it
computes (`Deferred`): `agc` runs the unit on it, and anything else that reads it gets the convolution's maps. So it
does not matter who reads them; and where it would matter (the convolution's input was overwritten in between, or the
reader hides from torch what it reads) an error says so.
"""

from functools import cache
from typing import NamedTuple, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode, has_torch_function_unary
from torch.utils._pytree import tree_map_only

from agcseg.nn.agc import agc, agc_formula, check_arguments, differentiable, runs_eagerly
from agcseg.nn.fast import agc_relu
from agcseg.nn.hooks import has_hooks
from agcseg.nn.passes import add_levels, filter_gradients, sums
from agcseg.nn.unit import Geometry, convolve, convolve_backward

PLAIN = Geometry()


def agc_conv2d(
    input: Tensor,
    filters: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean_scale: Tensor,
    *,
    conv_bias: Tensor | None = None,
    geometry: Geometry = PLAIN,
) -> Tensor:
    """agc(conv2d(input, filters, conv_bias)), keeping `input`, the parameters and one number per map for backward.

    Args:
        input: maps (N, C, H, W).
        filters: W, (K, C / groups, k, k).
        weight, bias, mean_scale: γ, β, λ, each (K,).
        conv_bias: the convolution's own bias, (K,).
        geometry: of the convolution, its padding in numbers.

    Returns:
        (N, K, H', W') in the dtype of the convolution's output: that of `input`, under autocast autocast's.

    Raises:
        ValueError: `input` is not 4-dimensional, or the parameters are not of one length.
        RuntimeError: as conv2d.
    """
    if has_torch_function_unary(input) or not runs_eagerly():
        z = F.conv2d(input, filters, conv_bias, *geometry)
        return agc(z, weight, bias, mean_scale)
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        input = input.to(torch.get_autocast_dtype(device))
    elif input.dtype != filters.dtype:
        raise RuntimeError(f"input and filters must be of one dtype; got {input.dtype} and {filters.dtype}")
    if input.dim() != 4:
        raise ValueError(f"agc takes maps of shape (N, C, H, W); got {tuple(input.shape)}")
    check_arguments(filters.transpose(0, 1), weight, bias, mean_scale)
    if conv_bias is not None:
        bias = bias + (1 - mean_scale) * weight * conv_bias
    return _AGCConv2d.apply(geometry, input, filters, weight, bias, mean_scale)


class _AGCConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, geometry, input, filters, weight, bias, mean_scale):
        z = convolve((input,), filters, weight, geometry)
        mean = sums(z) / z.shape[2:].numel()
        ctx.geometry, ctx.shape = geometry, input.shape[1:]
        kept = input if any(ctx.needs_input_grad[i] for i in (2, 3, 5)) else None
        ctx.save_for_backward(kept, filters, weight, bias, mean_scale, mean)
        return add_levels(z, bias - mean_scale * mean)

    @staticmethod
    def backward(ctx, grad):
        input, filters, weight, bias, mean_scale, mean = ctx.saved_tensors
        need_input, *needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return None, *_second_derivative(ctx, grad)
        s = sums(grad)
        d_bias = s.sum(0).to(weight.dtype) if needs[2] else None
        d_mean_scale = -(mean * s).sum(0).to(weight.dtype) if needs[3] else None
        d_input = d_filters = d_weight = None
        if need_input or needs[0] or needs[1]:
            level = (mean_scale * s / grad.shape[2:].numel()).to(grad.dtype)
            dz = grad - level[:, :, None, None]
            maps = () if input is None else (input,)
            del grad, input
            (d_input,), (d_filters,) = convolve_backward(
                dz, maps, [ctx.shape], ctx.geometry, filters, weight, (need_input,), needs[0] or needs[1]
            )
        if d_filters is not None:
            d_filters, d_weight = filter_gradients(d_filters, filters, weight)
        return None, d_input, d_filters, d_weight, d_bias, d_mean_scale


def _second_derivative(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, *parameters = ctx.saved_tensors[:-1]

    def formula(input, filters, weight, bias, mean_scale):
        return agc_formula(F.conv2d(input, filters.to(input.dtype), None, *ctx.geometry), weight, bias, mean_scale)

    if input is None:  # then the output is linear in it, and its values do not matter to its gradient
        input = grad.new_zeros(len(grad), *ctx.shape).requires_grad_()
    return differentiable(formula, (input, *parameters), ctx.needs_input_grad[1:], grad)


class Deferred(Tensor):
    """The output of a convolution that runs when it is read: as one step with `agc`, for any other reader by itself."""

    _call: tuple[Tensor, Tensor, Tensor | None, Geometry]
    _maps: Tensor | None  # once it has run
    _versions: list[tuple[int, int] | None]  # of what it reads, when it was put off
    _autocast: tuple[bool, torch.dtype]

    @staticmethod
    def of(input: Tensor, filters: Tensor, bias: Tensor | None, geometry: Geometry) -> "Deferred":
        maps = Tensor._make_subclass(Deferred, input.new_empty(0), True)
        with torch._C.DisableTorchFunctionSubclass():
            maps.register_hook(_lost)
        maps._call, maps._maps = (input, filters, bias, geometry), None
        maps._versions, maps._autocast = _versions(input, filters, bias), _autocast(input)
        return maps

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (agc, agc_relu) and type(args[0]) is Deferred and args[0]._fits(args[1:]):
            maps, parameters = args[0], args[1:]
            maps._check_versions()
            input, filters, bias, geometry = maps._call
            output = agc_conv2d(input, filters, *parameters, conv_bias=bias, geometry=geometry)
            return output if func is agc else output.relu_()
        args, kwargs = tree_map_only(Deferred, Deferred._materialise, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        _lost()  # nothing that torch's functions see comes here

    def _fits(self, parameters) -> bool:
        """Whether `agc` may run in one step with the convolution: nothing has happened in between."""
        input, filters, _, _ = self._call
        return (
            self._maps is None
            and torch.is_grad_enabled()
            and self._autocast == _autocast(input)
            and all(p.shape == filters.shape[:1] for p in parameters)
            and runs_eagerly()
        )

    def _check_versions(self) -> None:
        if self._versions != _versions(*self._call[:3]):
            raise RuntimeError(
                "the input or the parameters of a convolution were modified in place before its output was read, which "
                "a convolution in one step with its AGC does not allow: convert_batchnorm(model, fuse=False)"
            )

    def _materialise(self) -> Tensor:
        if self._maps is None:
            self._check_versions()
            (enabled, dtype), (input, filters, bias, geometry) = self._autocast, self._call
            with torch.enable_grad(), torch.autocast(input.device.type, dtype, enabled):
                self._maps = F.conv2d(input, filters, bias, *geometry)
        return self._maps


def _lost(grad: Tensor | None = None) -> NoReturn:
    raise RuntimeError(
        "the output of a convolution that runs in one step with the AGC behind it was read by something else, in a way "
        "that hides it: a transform of torch.func, an autograd.Function, ... : convert_batchnorm(model, fuse=False)"
    )


def _versions(*tensors: Tensor | None) -> list[tuple[int, int] | None]:
    """Of tensors' values: what `.data =` puts in their place has another storage."""
    return [None if t is None else (t._version, t.untyped_storage().data_ptr()) for t in tensors]


def _autocast(input: Tensor) -> tuple[bool, torch.dtype]:
    device = input.device.type
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


class _Paired(nn.Module):
    """What makes a convolution put off its output until it is read; it stays what it is in every other respect.

    Attributes:
        watched: modules that its output passes on its way into the AGC. While one has hooks, nothing is put off.
    """

    watched: tuple[nn.Module, ...] = ()

    def forward(self, *args, **kwargs) -> Tensor:
        seen = any(has_hooks(module) for module in (self, *self.watched))
        if seen or not (runs_eagerly() and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        with _PuttingOff():
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple:
        kind = unpaired(type(self))
        return super().__reduce_ex__(protocol) if kind is type(self) else (_blank, (kind,), vars(self))

    def __prepare_scriptable__(self) -> nn.Conv2d:
        conv: nn.Conv2d = object.__new__(unpaired(type(self)))
        vars(conv).update({key: value for key, value in vars(self).items() if key != "watched"})
        return conv


@cache
def paired(kind: type[nn.Conv2d]) -> type[nn.Conv2d]:
    """The class of convolutions of a kind that put off their output."""
    return type(f"Paired{kind.__name__}", (_Paired, kind), {"__doc__": kind.__doc__, "__module__": __name__})


def unpaired(kind: type) -> type:
    """The class that `paired` made a class of, or the class itself."""
    return kind.__mro__[2] if kind.__mro__[1] is _Paired else kind


def unpair(module: nn.Module) -> None:
    """Give a convolution back the class that it had, also below one of its own that a parametrization put on top."""
    kind = type(module)
    if kind is not unpaired(kind):
        module.__class__ = unpaired(kind)
    elif issubclass(kind, _Paired) and hasattr(module, "parametrizations"):
        kind.__bases__ = tuple(map(unpaired, kind.__bases__))
    else:
        return
    module.__dict__.pop("watched", None)


def _blank(kind: type[nn.Conv2d]) -> nn.Conv2d:
    return object.__new__(paired(kind))  # type: ignore[arg-type]


class _PuttingOff(TorchFunctionMode):
    """Puts off the calls of conv2d within, where nothing about them is unusual."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.conv2d and torch.is_grad_enabled():  # a forward of its own may have none of this
            call = _Call(*args, **(kwargs or {})).numbers()
            if call is not None:
                return Deferred.of(*call)
        return func(*args, **(kwargs or {}))


class _Call(NamedTuple):
    """Arguments of conv2d."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1

    def numbers(self) -> tuple[Tensor, Tensor, Tensor | None, Geometry] | None:
        input, weight = self.input, self.weight
        usual = all(type(t) in (Tensor, nn.Parameter) and t.is_floating_point() for t in (input, weight))
        if (
            usual
            and not any(t.is_inference() or t.is_meta for t in (input, weight))
            and (input.dtype == weight.dtype or torch.is_autocast_enabled(input.device.type))
            and input.device == weight.device
            and input.dim() == 4
            and input.shape[1] == weight.shape[1] * self.groups
            and self.padding != "same"
        ):
            padding = 0 if self.padding == "valid" else self.padding
            return (
                input,
                weight,
                self.bias,
                Geometry(_pair(self.stride), _pair(padding), _pair(self.dilation), self.groups),
            )
        return None
