"""GEMS, the gated effective minibatch size (Deep Control, section 1): gradients by the number of active points.

The paper proposes to "normalise the gradients not by the mapsize x minibatchsize but to the number of non-saturated
points in the map or minibatch thereof" and gives no more. Here filter c of a unit with P points in its maps, of which
A are let through by its ReLU, has its gradients multiplied by

    s = min(limit, P / A)          s = 1 where A = 0: such a filter's gradients are 0

That is the ratio of the two normalisers, so the loss stays as it is. Only the gradients of parameters are scaled, never
the error sent on to the layer below, so that no layer changes another's gradients. Layers without a ReLU, the
classifier, are left alone.

A and P can be averaged over steps (`ema`): both decay by the same factor as new counts are added, so that a step weighs
less the older it is, the first like any other, and A/P is the share of a window of about 1/(1 - ema) minibatches. A
step in which a filter is silent counts there as what it is, one with no active point; its own factor is 1.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from agcseg.errors import UserError
from agcseg.nn.agc import AGC2d
from agcseg.nn.conv import ConvUnit, StandardisedConv2d
from agcseg.nn.hooks import has_forward_of_its_own
from agcseg.nn.norms import FRN2d, ScaledWS2d

MODES = ("minibatch", "map", "sample")
GATES = ("relu", "grad")
# Norms that treat each map on its own and share no parameter between them, so that a factor on a map's error comes out
# of their backward as it went in.
SEPARATE = (AGC2d, FRN2d, ScaledWS2d, nn.InstanceNorm2d, nn.Identity)


class GEMS:
    """Counts active points while `network` runs forward in training, and scales the gradients when asked to.

    Between `backward`, of one or several parts of a minibatch, and the optimiser's step call `scale_gradients`. Where
    several processes share a minibatch, first add up `active` and `points` over them. All units change to their
    literal implementation, as the fast one does not show what it lets through.

    Args:
        network: any network made of `ConvUnit`, on the device it stays on.
        mode: what is counted, for each filter:
            "minibatch": points of all its maps.
            "sample": samples with an active point; P is the number of samples.
            "map": points of each map by themselves; each sample's part of the gradient has its own factor, before they
                are added up. For norms that treat each map on its own. The same as "minibatch" for one sample.
        limit: the largest factor, at least 1; `inf` for none.
        ema: from 0 (none) to below 1: how much of the counts of earlier steps remains, from step to step. Not with
            "map", whose factors are those of single samples.
        gate: which points are active:
            "relu": those that the ReLU lets through, whether or not a pooling takes them up.
            "grad": those of them that an error comes back to: not the losers of a pooling, nor, in front of the
                classifier, pixels without a label. (Further below a mean's gradient reaches every point.) Counted in
                backward.

    Attributes:
        active: unit's name -> A, (C,) int64, since the last `scale_gradients`.
        points: unit's name -> P, () int64.
        averages: unit's name -> A and P averaged over steps, (2, C) float64, without a common factor; empty where `ema`
            is 0. The only thing that belongs in a checkpoint.
        factors: unit's name -> s of the last `scale_gradients`, (C,) float64; with "map" the mean over samples of the
            last part.

    Raises:
        UserError (a ValueError): mode, limit, ema or gate cannot be used, or "map" not with this network's norm or ema.
    """

    def __init__(
        self, network: nn.Module, mode: str = "minibatch", limit: float = 10.0, ema: float = 0.0, gate: str = "relu"
    ) -> None:
        if mode not in MODES:
            raise UserError(f"GEMS mode {mode!r} is not known; choose from {', '.join(MODES)}")
        if not limit >= 1:
            raise UserError(f"GEMS limit {limit} must be at least 1")
        if not 0 <= ema < 1:
            raise UserError(f"GEMS ema {ema} must be at least 0 (off) and below 1")
        if ema and mode == "map":
            raise UserError(f"GEMS ema {ema} cannot be used with mode 'map', whose factors are those of single samples")
        if gate not in GATES:
            raise UserError(f"GEMS gate {gate!r} is not known; choose from {', '.join(GATES)}")
        self.mode, self.limit, self.ema, self.gate = mode, limit, ema, gate
        self.units = {name: unit for name, unit in network.named_modules() if isinstance(unit, ConvUnit)}
        self.active: dict[str, Tensor] = {}
        self.points: dict[str, Tensor] = {}
        self.averages: dict[str, Tensor] = {}
        self.factors: dict[str, Tensor] = {}
        for name, unit in self.units.items():
            if mode == "map" and not isinstance(unit.norm, SEPARATE):
                raise UserError(f"GEMS mode 'map' cannot be used with {type(unit.norm).__name__}, which mixes maps")
            if mode == "map" and not _is_plain(unit.conv):
                raise UserError(f"GEMS mode 'map' takes convolutions as ConvUnit makes them; {name}.conv is another")
            unit.implementation = "literal"
            self._reset(name)
            self._hook(name, unit)

    def scale_gradients(self) -> None:
        """Multiply the gradients of all units' parameters by their factors, and start to count afresh."""
        for name, unit in self.units.items():
            if self.mode != "map":
                active, points = self.active[name], self.points[name]
                if self.ema:
                    counts = torch.stack([active, points.expand_as(active)]).double()
                    if name in self.averages:
                        counts += self.ema * self.averages[name].to(counts.device)
                    active, points = self.averages[name] = counts
                factor = self._factor(active, points).where(self.active[name] > 0, 1.0)
                self.factors[name] = factor
                for parameter in unit.parameters():
                    # a threshold of the activation learns from the points that it stops; one number for the whole
                    # layer (DyT's α) has no filter to go by
                    if parameter.grad is None or parameter is getattr(unit.norm, "threshold", None):
                        continue
                    if parameter.shape[:1] == factor.shape:
                        parameter.grad.mul_(factor.to(parameter.dtype).view(-1, *[1] * (parameter.dim() - 1)))
            self._reset(name)

    def _factor(self, active: Tensor, points: Tensor | int) -> Tensor:
        factor = (points / active.clamp(min=1).double()).clamp(max=self.limit)
        return torch.where(active > 0, factor, 1.0)

    def _reset(self, name: str) -> None:
        weight = self.units[name].conv.weight
        self.active[name] = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        self.points[name] = torch.zeros((), dtype=torch.int64, device=weight.device)

    def _hook(self, name: str, unit: ConvUnit) -> None:
        counter = _Counter(self, name)
        unit.norm.register_forward_hook(counter.passing)
        if self.mode == "map":
            unit.conv.register_forward_hook(counter.rewire)


def _is_plain(conv: nn.Conv2d) -> bool:
    """Whether `_Convolution` is its backward."""
    as_made = (
        type(conv) in (nn.Conv2d, StandardisedConv2d)
        and not has_forward_of_its_own(conv)
        and isinstance(conv.padding, tuple)
    )
    return as_made and (conv.stride, conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), (1, 1), 1, "zeros")


class _Counter:
    """One unit's hooks. No closures: a copy of the network, or a file of it, has counts of its own."""

    def __init__(self, gems: GEMS, name: str) -> None:
        self.gems, self.name = gems, name
        self.scale: dict[str, Tensor] = {}  # of the last call of the convolution: each has its own, for its backward

    def count(self, gate: Tensor, dtype: torch.dtype, scale: dict[str, Tensor]) -> None:
        gems, each = self.gems, gate.flatten(2).sum(2)  # (N, C)
        positions = gate.shape[2:].numel()
        counted = (each > 0).sum(0) if gems.mode == "sample" else each.sum(0)
        gems.active[self.name] += counted
        gems.points[self.name] += len(gate) * (1 if gems.mode == "sample" else positions)
        if gems.mode == "map":
            factor = scale["of maps"] = gems._factor(each, positions).to(dtype)[:, :, None, None]
            gems.factors[self.name] = factor.mean((0, 2, 3))

    def returning(self, scale: dict[str, Tensor], error: Tensor) -> Tensor | None:
        if self.gems.gate == "grad":
            self.count(error != 0, error.dtype, scale)
        return error * scale["of maps"] if self.gems.mode == "map" else None

    def passing(self, norm: Any, inputs: tuple, maps: Tensor) -> Tensor:
        if not (norm.training and maps.requires_grad):
            return maps
        if self.gems.gate == "relu":
            threshold = norm.threshold.view(1, -1, 1, 1) if hasattr(norm, "threshold") else 0
            self.count(maps.detach() > threshold, maps.dtype, self.scale)
        if self.gems.gate == "grad" or self.gems.mode == "map":
            maps = maps.clone()  # on a view (instance norm's) the hook may be lost
            maps.register_hook(partial(self.returning, self.scale))
        return maps

    def rewire(self, conv: nn.Conv2d, inputs: tuple, maps: Tensor) -> Tensor:
        if not (self.gems.units[self.name].norm.training and torch.is_grad_enabled()):  # as `passing` decides
            return maps
        self.scale = {}
        filters = conv.standardise(conv.weight) if isinstance(conv, StandardisedConv2d) else conv.weight
        return _Convolution.apply(maps.detach(), inputs[0], filters, conv.bias, conv.padding, self.scale)


class _Convolution(torch.autograd.Function):
    """A convolution's output as given, with a backward that takes an error scaled map by map: the filters get it so,
    the input gets the error itself."""

    @staticmethod
    def forward(ctx, output, input, filters, bias, padding, scale):
        ctx.save_for_backward(input, filters)
        ctx.padding, ctx.scale, ctx.biased = padding, scale, bias is not None
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx, grad):
        input, filters = ctx.saved_tensors

        def backward(error, *mask):
            x, w = input.to(error.dtype), filters.to(error.dtype)
            return torch.ops.aten.convolution_backward(
                error, x, w, [len(w)], (1, 1), ctx.padding, (1, 1), False, (0, 0), 1, mask
            )

        d_input = None
        if ctx.needs_input_grad[1]:
            d_input = backward(grad / ctx.scale["of maps"], True, False, False)[0].to(input.dtype)
        _, d_filters, d_bias = backward(grad, False, True, ctx.biased)
        d_bias = d_bias.to(filters.dtype) if ctx.biased else None
        return None, d_input, d_filters.to(filters.dtype), d_bias, None, None
