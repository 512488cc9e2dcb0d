"""What the layers of a network do on a minibatch, to judge its λ by."""

import torch
from torch import Tensor, nn

from agcseg.nn.agc import AGC2d
from agcseg.nn.conv import ConvUnit


@torch.no_grad()
def layer_signals(network: nn.Module, images: Tensor) -> dict[str, dict]:
    """Figures of every `ConvUnit` on one minibatch, in evaluation; the network is left as it was.

    A filter is dead where no point of its maps passes the ReLU in the whole minibatch. Its λ has no gradient and keeps
    its value, so that λ's figures leave dead filters out. Where the common-mode ratio is small, λ has little effect and
    says little.

    Args:
        network: any network made of `ConvUnit`.
        images: (N, 3, H, W), on its device; a validation minibatch.

    Returns:
        unit's name -> plain figures, of the units that run in evaluation:
            height, width: of its maps.
            common_mode: |mean| / root mean square of a map behind the convolution, averaged over maps that are not 0.
            active: share of points that pass the ReLU.
            dead: a list of bool, one for each filter.
            With AGC also mean, standard deviation, extremes and quartiles of λ (lambda_mean, lambda_std, lambda_min,
            lambda_q25, lambda_q50, lambda_q75, lambda_max) and the shares of λ below 0 and above 1 (lambda_negative,
            lambda_above_1), over the filters that are not dead; None if all are.
    """
    units = {name: unit for name, unit in network.named_modules() if isinstance(unit, ConvUnit)}
    implementations = {unit: unit.implementation for unit in units.values()}
    ratios: dict[nn.Module, Tensor] = {}
    active: dict[nn.Module, Tensor] = {}

    sizes: dict[nn.Module, torch.Size] = {}

    def raw(conv: nn.Module, inputs: tuple, maps: Tensor) -> None:
        sizes[conv] = maps.shape[2:]
        maps = maps.flatten(2)
        size = torch.linalg.vector_norm(maps, dim=2, dtype=torch.float64)
        ratios[conv] = maps.sum(2, dtype=torch.float64).abs() / (size * maps.shape[2] ** 0.5)

    def normalised(norm: nn.Module, inputs: tuple, maps: Tensor) -> None:
        gate = maps > (norm.threshold.view(1, -1, 1, 1) if hasattr(norm, "threshold") else 0)
        active[norm] = gate.mean((0, 2, 3), dtype=torch.float64)

    handles = [unit.conv.register_forward_hook(raw) for unit in implementations]
    handles += [unit.norm.register_forward_hook(normalised) for unit in implementations]
    modes = {module: module.training for module in network.modules()}
    try:
        for unit in implementations:
            unit.implementation = "literal"  # the fast one shows neither
        network.eval()(images)
    finally:
        for module, training in modes.items():
            module.training = training
        for unit, implementation in implementations.items():
            unit.implementation = implementation
        for handle in handles:
            handle.remove()
    return {
        name: dict(zip(("height", "width"), sizes[unit.conv], strict=True))
        | _figures(unit, ratios[unit.conv], active[unit.norm])
        for name, unit in units.items()
        if unit.norm in active
    }


def _figures(unit: ConvUnit, ratios: Tensor, active: Tensor) -> dict:
    dead = active == 0
    figures = {"common_mode": ratios.nanmean().item(), "active": active.mean().item(), "dead": dead.tolist()}
    if isinstance(unit.norm, AGC2d):
        alive = unit.norm.mean_scale[~dead].double()
        quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=alive.device)
        q25, q50, q75 = alive.quantile(quartiles).tolist() if len(alive) else [None] * 3
        of = {
            "mean": alive.mean, "std": lambda: alive.std(correction=0), "min": alive.min, "max": alive.max,
            "negative": (alive < 0).double().mean, "above_1": (alive > 1).double().mean,
        }  # fmt: skip
        figures |= {f"lambda_{key}": value().item() if len(alive) else None for key, value in of.items()}
        figures |= {"lambda_q25": q25, "lambda_q50": q50, "lambda_q75": q75}
    return figures
