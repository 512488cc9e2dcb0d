"""The networks and the one door to them."""

import inspect
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from agcseg.errors import UserError
from agcseg.networks.classnet import ClassNet
from agcseg.networks.foreign import TORCHVISION, Foreign, build_foreign
from agcseg.networks.segnet import SegNet
from agcseg.nn import IMPLEMENTATIONS, INITS, NORMS, initialise

Network = SegNet | ClassNet | Foreign
NETWORKS: dict[str, type[SegNet | ClassNet]] = {"segnet": SegNet, "classnet": ClassNet}
log = logging.getLogger("agcseg")


def kind(network: str) -> type[Network]:
    """The class behind a name, which knows `multiple` and `contour` before a network is built."""
    return NETWORKS.get(network, Foreign)


def build(
    network: str,
    *,
    norm: str | Callable[[int], nn.Module] | None = "agc",
    num_classes: int = 19,
    width: float = 1.0,
    init: str | None = None,
    implementation: str = "fast",
    norm_options: dict[str, Any] | None = None,
    factory: str | Callable[..., nn.Module] | None = None,
    classes_argument: str = "num_classes",
    download: bool = True,
    size: tuple[int, int] = (256, 256),
    **options: Any,
) -> Network:
    """Build a segmentation network, initialised from torch's default generator (seed it with `torch.manual_seed`).

    Args:
        network: "segnet", "classnet", one of torchvision's (`agcseg.networks.foreign.TORCHVISION`), or with `factory`
            any name.
        norm: one of `agcseg.nn.NORMS`, such as "agc", "bn" or "none", or any callable from a number of channels to a
            module.
        num_classes: number of classes K.
        width: factor on the layers' widths; 1 is the paper's network. Of SegNet and ClassNet only.
        init: "he", "he_centered" or "identity" (see `agcseg.nn.initialise`). None is "he" for SegNet and ClassNet, and
            for others their own.
        implementation: "fast" or "literal": how AGC is computed, with the same values, parameters and state_dict (see
            `agcseg.nn.ConvUnit`); other norms ignore it.
        norm_options: keyword arguments for the norm, such as `{"eps": 1e-3}` for "bn".
        factory: a callable that makes a network of somebody else's, or "package.module:function"; the current folder
            is searched too. See `agcseg.networks.foreign.Foreign` for what it may give.
        classes_argument: the factory's argument for the number of classes.
        download: False leaves out options by which a factory would fetch trained weights.
        size: of images, (height, width), that a third-party network is tried on, without computing.
        **options: further keyword arguments of the network or the factory, such as `in_channels`, `head_norm` (SegNet),
            `contour_width` (ClassNet) or `weights_backbone` (torchvision).

    Returns:
        a module from images (N, 3, H, W) to class logits (N, K, H, W); ClassNet gives a `ClassNetOutput` with them and
        contour logits. What became of the norms of a third-party network is logged.

    Raises:
        UserError (a ValueError): a name or option is not known, or a number is out of range; it lists what there is.
    """
    _check_names(network, norm, num_classes, width, init, implementation, factory)
    make = NORMS[norm] if isinstance(norm, str) else norm
    if norm_options:
        _check_norm_options(
            norm if isinstance(norm, str) else getattr(norm, "__name__", repr(norm)), make, norm_options
        )
    if network in NETWORKS:
        own = {"num_classes", "width", "norm", "implementation"}
        _check_options(f"network {network!r}", NETWORKS[network], options, skip=own)
        make = partial(make, **norm_options) if make and norm_options else make
        ours = NETWORKS[network](
            num_classes=num_classes, width=width, norm=make, implementation=implementation, **options
        )
        initialise(ours, init or "he")
        return ours
    if factory is None:
        factory, options = f"torchvision.models.segmentation:{network}", {"weights_backbone": None, **options}
    fuse = implementation == "fast"
    foreign, told = build_foreign(
        network,
        factory,
        classes_argument=classes_argument,
        num_classes=num_classes,
        norm=norm,
        norm_options=norm_options or {},
        fuse=fuse,
        size=size,
        options=options,
        download=download,
    )
    if init:
        initialise(foreign, init)
    log.info(f"  {network}: {told}")
    return foreign


def _check_names(network: str, norm, num_classes: int, width: float, init, implementation: str, factory) -> None:
    known = (*NETWORKS, *TORCHVISION)
    if network in known and factory is not None:
        raise UserError(f"network={network}: takes no factory; network=custom does")
    if network not in known and factory is None:
        raise UserError(
            f"network={network!r} is not known; choose from {', '.join(known)}, or give "
            "network.factory=package.module:function"
        )
    if isinstance(norm, str) and norm not in NORMS:
        raise UserError(f"norm={norm!r} is not known; choose from {', '.join(NORMS)}")
    if num_classes < 1 or width <= 0:
        raise UserError(f"num_classes={num_classes} and width={width} must be positive")
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"implementation={implementation!r} is not known; choose from {', '.join(IMPLEMENTATIONS)}")
    if init is not None and init not in INITS:
        raise UserError(f"init={init!r} is not known; choose from {', '.join(INITS)}")
    if network not in NETWORKS and (width != 1 or init == "identity"):
        what = f"width={width:g}" if width != 1 else f"init={init}"
        raise UserError(f"{what}: of segnet and classnet only; network={network} takes the options of its factory")


def _check_norm_options(name: str, make: Callable | None, options: dict[str, Any]) -> None:
    _check_options(f"norm {name!r}", make, options, skip={"num_features", "device", "dtype"})
    if make is None:
        return  # it has none
    for key, value in options.items():
        default = inspect.signature(make).parameters[key].default
        if isinstance(default, bool) or not isinstance(default, int | float):
            continue
        if make is nn.BatchNorm2d and key == "momentum" and value is None:  # the mean of all minibatches so far
            continue
        whole = isinstance(default, int)
        if not isinstance(value, int if whole else int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise UserError(f"norm {name!r}: {key}={value!r} must be like its default, {default!r}")
        if (whole and value < 1) or (key == "eps" and value <= 0):
            raise UserError(f"norm {name!r}: {key}={value!r} must be positive")


def _check_options(what: str, target: Callable | None, options: dict[str, Any], skip: set[str]) -> None:
    taken = inspect.signature(target).parameters if target else {}
    known = [name for name in taken if name not in skip]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UserError(f"{what} has no option {', '.join(unknown)}; it takes {', '.join(known) or 'none'}")
    for name, value in options.items():
        if isinstance(taken[name].default, bool) and not isinstance(value, bool):
            raise UserError(f"{what}: {name}={value!r} must be true or false")
