"""What the layers of a network do on a minibatch, to judge its λ by."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from agcseg.nn.agc import AGC2d
from agcseg.nn.conv import ConvUnit
from agcseg.nn.norms import is_batch_norm

LAMBDA = ("mean", "std", "min", "q25", "q50", "q75", "max", "negative", "above_1")


@dataclass
class _Seen:
    """Of one layer: of each call's maps the ratios (N, C) and the shares of points that pass (N, C)."""

    size: torch.Size
    ratios: list[Tensor] = field(default_factory=list)
    active: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def layer_signals(network: nn.Module, images: Tensor) -> dict[str, dict]:
    """Figures of every `ConvUnit`, AGC and batch normalisation on one minibatch, in evaluation, in order of execution.

    The network is left as it was. A filter is dead where no point of its maps passes the ReLU in the whole minibatch.
    Its λ has no gradient and keeps its value, so that λ's figures leave dead filters out. Where the common-mode ratio
    is small, λ has little effect and says little. Of a layer without a ReLU behind it, "active" are positive points.

    Args:
        network: any network.
        images: (N, 3, H, W), or whatever its forward takes, on its device; a validation minibatch.

    Returns:
        name of the unit, or of the layer where it is in no unit -> plain figures, of those that see maps in evaluation:
            height, width: of its maps, in the first call.
            common_mode: |mean| / root mean square of a map behind the convolution, averaged over maps that are not 0.
            active: share of points that pass the ReLU.
            dead: a list of bool, one for each filter.
            With AGC also mean, standard deviation, extremes and quartiles of λ (lambda_mean, lambda_std, lambda_min,
            lambda_q25, lambda_q50, lambda_q75, lambda_max) and the shares of λ below 0 and above 1 (lambda_negative,
            lambda_above_1), over the filters that are not dead; None if all are.
    """
    network = getattr(network, "_orig_mod", network)
    names = {norm: name.replace("_orig_mod.", "") for norm, name in _layers(network)}
    seen: dict[nn.Module, _Seen] = {}

    def note(norm: Any, args: tuple, kwargs: dict, output: Tensor) -> None:
        maps = args[0] if args else next(iter(kwargs.values()))
        if maps.dim() != 4:
            return
        layer = seen.setdefault(norm, _Seen(maps.shape[2:]))
        maps = maps.flatten(2)
        size = torch.linalg.vector_norm(maps, dim=2, dtype=torch.float64)
        layer.ratios.append(maps.sum(2, dtype=torch.float64).abs() / (size * maps.shape[2] ** 0.5))
        gate = output > (norm.threshold.view(1, -1, 1, 1) if hasattr(norm, "threshold") else 0)
        layer.active.append(gate.mean((2, 3), dtype=torch.float64))

    handles = [norm.register_forward_hook(note, with_kwargs=True) for norm in names]  # units are literal with a hook
    modes = {module: module.training for module in network.modules()}
    compiled = any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in modes)
    try:
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():  # else without hooks
            network.eval()(images)
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()
    if not seen:
        return {}
    vectors = [_numbers(norm, torch.cat(layer.ratios), torch.cat(layer.active)) for norm, layer in seen.items()]
    copied = torch.cat([vector.to(vectors[0].device) for vector in vectors]).tolist()  # waits for the device once
    rows = iter(copied)
    return {
        names[norm]: dict(zip(("height", "width"), layer.size, strict=True))
        | _figures(norm, [next(rows) for _ in vector])
        for (norm, layer), vector in zip(seen.items(), vectors, strict=True)
    }


def _layers(network: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Norms, with the names they go by."""
    units = {module.norm: name for name, module in network.named_modules() if isinstance(module, ConvUnit)}
    yield from units.items()
    for name, module in network.named_modules():
        if module not in units and (is_batch_norm(module) or isinstance(module, AGC2d)):
            yield module, name


def _numbers(norm: nn.Module, ratios: Tensor, active: Tensor) -> Tensor:
    """A layer's figures in one vector on its device: common mode, active, λ's where there is one, dead."""
    share = active.mean(0)
    dead = share == 0
    values = [ratios.nanmean(), share.mean()]
    if isinstance(norm, AGC2d):
        alive = norm.mean_scale.double().where(~dead, torch.nan)
        mean = alive.nanmean()
        std = (alive - mean).square().nanmean().sqrt()
        quantiles = torch.nanquantile(alive, torch.linspace(0, 1, 5, dtype=torch.float64, device=alive.device))
        counts = torch.stack([(alive < 0).sum(), (alive > 1).sum()])
        shares = (counts / (~dead).sum()).where(~dead.all(), torch.nan)
        values += [mean, std, *quantiles, *shares]
    return torch.cat([torch.stack([value.double() for value in values]), dead.double()])


def _figures(norm: nn.Module, numbers: list[float]) -> dict:
    common_mode, active, *rest = numbers
    of_lambda, dead = (rest[: len(LAMBDA)], rest[len(LAMBDA) :]) if isinstance(norm, AGC2d) else ([], rest)
    figures = {"common_mode": common_mode, "active": active, "dead": [value == 1 for value in dead]}
    for key, value in zip(LAMBDA if of_lambda else (), of_lambda, strict=True):
        figures[f"lambda_{key}"] = None if value != value else value
    return figures
