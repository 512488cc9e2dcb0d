"""The networks and the one door to them."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from agcseg.errors import UserError
from agcseg.networks.classnet import ClassNet
from agcseg.networks.segnet import SegNet
from agcseg.nn import IMPLEMENTATIONS, NORMS, initialise

NETWORKS: dict[str, type[nn.Module]] = {"segnet": SegNet, "classnet": ClassNet}


def build(
    network: str,
    *,
    norm: str | Callable[[int], nn.Module] | None = "agc",
    num_classes: int = 19,
    width: float = 1.0,
    init: str = "he",
    implementation: str = "fast",
    norm_options: dict[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Build a segmentation network, initialised from torch's default generator (seed it with `torch.manual_seed`).

    Args:
        network: "segnet" or "classnet".
        norm: one of `agcseg.nn.NORMS`, such as "agc", "bn" or "none", or any callable from a number of channels to a
            module.
        num_classes: number of classes K.
        width: factor on the layers' widths; 1 is the paper's network.
        init: "he", "he_centered" or "identity" (see `agcseg.nn.initialise`).
        implementation: "fast" or "literal": how AGC is computed, with the same values, parameters and state_dict (see
            `agcseg.nn.ConvUnit`); other norms ignore it.
        norm_options: keyword arguments for the norm, such as `{"eps": 1e-3}` for "bn".
        **options: further keyword arguments of the network, such as `in_channels`, `head_norm` (SegNet) or
            `contour_width` (ClassNet).

    Returns:
        a module from images (N, 3, H, W) to class logits (N, K, H, W); ClassNet gives a `ClassNetOutput` with them and
        contour logits.

    Raises:
        UserError (a ValueError): a name or option is not known, or a number is out of range; it lists what there is.
    """
    if network not in NETWORKS:
        raise UserError(f"network={network!r} is not known; choose from {', '.join(NETWORKS)}")
    if isinstance(norm, str):
        if norm not in NORMS:
            raise UserError(f"norm={norm!r} is not known; choose from {', '.join(NORMS)}")
        name, norm = norm, NORMS[norm]
    else:
        name = getattr(norm, "__name__", repr(norm))
    if num_classes < 1 or width <= 0:
        raise UserError(f"num_classes={num_classes} and width={width} must be positive")
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"implementation={implementation!r} is not known; choose from {', '.join(IMPLEMENTATIONS)}")
    if norm_options:
        _check_options(f"norm {name!r}", norm, norm_options, skip={"num_features", "device", "dtype"})
        for key, value in norm_options.items():
            default = inspect.signature(norm).parameters[key].default
            if isinstance(default, int | float) and not isinstance(value, int | float | None):
                raise UserError(f"norm {name!r}: {key}={value!r} must be like its default, {default!r}")
        norm = partial(norm, **norm_options)
    own = {"num_classes", "width", "norm", "implementation"}
    _check_options(f"network {network!r}", NETWORKS[network], options, skip=own)
    module = NETWORKS[network](
        num_classes=num_classes, width=width, norm=norm, implementation=implementation, **options
    )
    initialise(module, init)
    return module


def _check_options(what: str, target: Callable | None, options: dict[str, Any], skip: set[str]) -> None:
    known = [name for name in inspect.signature(target).parameters if name not in skip] if target else []
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UserError(f"{what} has no option {', '.join(unknown)}; it takes {', '.join(known) or 'none'}")
