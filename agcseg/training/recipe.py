"""How weights are moved: the optimiser, what its weight decay leaves alone, the rate from epoch to epoch, averages."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from agcseg.config import Config, momentum, rate
from agcseg.errors import UserError, first_line
from agcseg.nn import NORMS

_OWN = tuple(norm for norm in NORMS.values() if isinstance(norm, type))  # and what their names tell, see `_is_norm`


def make_optimizer(network: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Of `config.optimizer`; AdamW's β₁ is the momentum, its β₂ 0.999."""
    groups = parameter_groups(network, config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, rate(config), (momentum(config), 0.999), fused=True)
    return torch.optim.SGD(groups, rate(config), momentum(config), nesterov=config.nesterov, fused=True)


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay acts on filters only: on λ, γ and β it would pull the very thing the paper observes to 0.

    What belongs to a norm, whatever its shape, and vectors, such as biases, are left alone.
    """
    of_norms = {p for module in network.modules() if _is_norm(module) for p in module.parameters(recurse=False)}
    filters = [p for p in network.parameters() if p.dim() > 1 and p not in of_norms]
    others = [p for p in network.parameters() if p.dim() <= 1 or p in of_norms]
    return [{"params": filters, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _is_norm(module: nn.Module) -> bool:
    named = "norm" in type(module).__name__.lower()
    return named or isinstance(module, _OWN) or hasattr(module, "mean_scale")


def make_schedule(optimizer: torch.optim.Optimizer, config: Config) -> lr_scheduler.LRScheduler | None:
    """The rate of each epoch, set by a step behind each; None for a constant one without warm-up.

    With the effective rate L, E epochs and W of warm-up, epoch e (from 1) has L·e / (W + 1) in the warm-up, and with
    t = e - W - 1 and T = E - W behind it L·(1 - t/T)^power (poly), L·(1 + cos(π·t/T)) / 2 (cosine),
    L·factor^⌊t / epochs⌋ (step) or L.
    """
    if config.schedule == "constant" and not config.warmup:
        return None
    left = config.epochs - config.warmup
    main = {
        "constant": lambda: lr_scheduler.ConstantLR(optimizer, 1.0),
        "poly": lambda: lr_scheduler.PolynomialLR(optimizer, left, config.lr.power),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, left),
        "step": lambda: lr_scheduler.StepLR(optimizer, config.lr.step_epochs, config.lr.step_factor),
    }[config.schedule]
    if not config.warmup:
        return main()
    rising = lr_scheduler.LinearLR(optimizer, 1 / (config.warmup + 1), total_iters=config.warmup)
    return lr_scheduler.SequentialLR(optimizer, [rising, main()], [config.warmup])


def make_average(network: nn.Module, config: Config) -> AveragedModel | None:
    """The exponential average of weights and running statistics over steps, `config.ema` of which stays in each.

    Raises:
        UserError: a third-party network cannot be copied.
    """
    if not config.ema:
        return None
    exponential = get_ema_multi_avg_fn(config.ema)

    def average(averaged: Any, current: Any, number: Tensor | int) -> None:
        if averaged[0].is_floating_point():
            exponential(averaged, current, number)
        else:  # tables of positions and the like: an average is cut off, which makes another number of 5
            torch._foreach_copy_(averaged, current)

    try:
        return AveragedModel(network, multi_avg_fn=average, use_buffers=True)
    except Exception as error:  # whatever somebody's network holds
        raise UserError(f"ema={config.ema}: the network cannot be copied ({first_line(error)}); use ema=null") from None
