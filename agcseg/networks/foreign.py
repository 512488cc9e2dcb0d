"""Networks that somebody else wrote: torchvision's by name, any other by the callable that makes it."""

import hashlib
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agcseg.errors import UserError, first_line
from agcseg.nn import NORMS, AGC2d, convert_batchnorm
from agcseg.nn.norms import AGCStd2d, is_batch_norm

TORCHVISION = (
    "fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101", "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
)  # fmt: skip
# Arguments by which torchvision, segmentation_models.pytorch and timm fetch trained weights, and what fetches none.
WITHOUT_WEIGHTS = {"weights_backbone": None, "encoder_weights": None, "pretrained": False}
_given: WeakSet[nn.Module] = WeakSet()  # what factories made
OF_UNITS = ("frn", "ws")  # norms that need the convolution in front or the activation behind, see `agcseg.nn.ConvUnit`


class Foreign(nn.Module):
    """A third-party network as this framework calls one: from images to class logits of the images' size.

    Args:
        network: from images (N, 3, H, W) to logits (N, K, h, w), or to a mapping with them as "out". Where h and w are
            not H and W, they are resized bilinearly.
        num_classes: K.

    Attributes:
        layers: names of its norms in the order of execution.

    Raises:
        UserError: in `forward`, when it gives something else.
    """

    multiple = 1  # as far as is known here
    contour = False

    def __init__(self, network: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.network, self.num_classes = network, num_classes
        self.layers: tuple[str, ...] = ()

    def forward(self, images: Tensor) -> Tensor:
        """Class logits, (N, K, H, W), of images, (N, 3, H, W)."""
        logits = self.network(images)
        if isinstance(logits, Mapping):
            if "out" not in logits:
                raise UserError(
                    f"the network gives a mapping with {', '.join(map(str, logits))}; expected one with out"
                )
            logits = logits["out"]
        if not isinstance(logits, Tensor):
            raise UserError(f"the network gives a {type(logits).__name__}; expected a tensor, or a mapping with out")
        if logits.dim() != 4 or logits.shape[:2] != (images.shape[0], self.num_classes):
            raise UserError(
                f"the network gives {_shape(logits)} for images of {_shape(images)}; expected class logits of "
                f"{images.shape[0]}x{self.num_classes}xHxW, for {self.num_classes} classes"
            )
        if logits.shape[2:] == images.shape[2:]:
            return logits
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def build_foreign(
    name: str,
    factory: str | Callable[..., nn.Module],
    *,
    classes_argument: str,
    num_classes: int,
    norm: str | Callable[[int], nn.Module] | None,
    norm_options: dict[str, Any],
    fuse: bool,
    size: tuple[int, int],
    options: dict[str, Any],
    download: bool,
) -> tuple[Foreign, str]:
    """Make a third-party network and give it the norm that is wanted.

    Args:
        factory: the callable, or "package.module:function".
        classes_argument: its argument for the number of classes.
        norm: a name of `agcseg.nn.NORMS`, or a callable from a number of channels to a module. "bn" leaves the network
            as it is (`norm_options` that differ from torch's defaults are set), "agc" converts it (see
            `agcseg.nn.convert_batchnorm`), every other replaces each BatchNorm2d and keeps its scale and shift.
        fuse: let AGC run as one step with its convolution.
        size: of images, (height, width), that it is tried on, without computing: its norms' order, and which of them
            get maps of 1x1. Of those, AGC with λ = 1 would leave nothing: their λ starts at 0.
        options: further arguments of the factory.
        download: False leaves out those by which it would fetch trained weights, be they given or its defaults.

    Returns:
        the network, and a line that tells what became of its norms.

    Raises:
        UserError: the callable cannot be imported or called, its network gives no class logits, or has no norm to
            replace.
    """
    made = _make(name, factory, {classes_argument: num_classes, **options}, download)
    if made in _given:
        raise UserError(f"network={name}: its factory gives the same network again; let it make a new one at each call")
    _given.add(made)
    network = Foreign(made, num_classes)
    norms, points = _in_order(network, size)
    told = _renorm(network.network, norm, norm_options, fuse, points)
    kept = dict(network.network.named_modules())
    network.layers = tuple(layer for layer in norms if layer in kept)
    return network, told


def find_factory(factory: str) -> Callable[..., nn.Module]:
    """The callable that "package.module:function" names; the current folder is searched too.

    Raises:
        UserError: it cannot be imported.
    """
    module, _, function = factory.partition(":")
    if not module or not function:
        raise UserError(f"network.factory={factory}: expected package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except AttributeError:
        its = getattr(sys.modules.get(module), "__file__", None)
        raise UserError(f"network.factory={factory}: {module}{f' ({its})' if its else ''} has no {function}") from None
    except ModuleNotFoundError as error:
        raise UserError(
            f"network.factory={factory}: there is no module {error.name}, neither installed nor in {os.getcwd()}"
        ) from None
    except (Exception, SystemExit) as error:  # whatever somebody's module does when it is imported
        raise UserError(f"network.factory={factory}: cannot be imported ({_said(error)})") from None
    if not callable(found):
        raise UserError(f"network.factory={factory}: is a {type(found).__name__}, which cannot be called")
    return found


def digest_of_source(factory: str) -> str:
    """A digest of the file that a factory lies in, where that is one's own, in the current folder; else empty."""
    find_factory(factory)
    file = Path(getattr(sys.modules[factory.partition(":")[0]], "__file__", None) or "")
    if not file.is_file() or not file.resolve().is_relative_to(Path.cwd().resolve()) or "site-packages" in file.parts:
        return ""
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()


def _make(name: str, factory: str | Callable[..., nn.Module], arguments: dict[str, Any], download: bool) -> nn.Module:
    make = find_factory(factory) if isinstance(factory, str) else factory
    try:
        parameters = inspect.signature(make).parameters.values()
    except ValueError:  # of something built in
        parameters = ()
    if not download:
        own = {p.name for p in parameters if p.name in WITHOUT_WEIGHTS and p.default}
        arguments |= {key: WITHOUT_WEIGHTS[key] for key in own | (WITHOUT_WEIGHTS.keys() & arguments.keys())}
    swallows = any(p.kind is p.VAR_KEYWORD for p in parameters)  # torchvision's take whatever they do not know
    if parameters and (name in TORCHVISION or not swallows):
        known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        unknown = [key for key in arguments if key not in known]
        if unknown:
            raise UserError(f"network={name}: its factory takes no {', '.join(unknown)}; it takes {', '.join(known)}")
    try:
        network = make(**arguments)
    except (URLError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"network={name}: its weights cannot be downloaded ({_said(error)}); put them into {torch.hub.get_dir()}/"
            "checkpoints, or take random ones"
        ) from None
    except Exception as error:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise UserError(f"network={name}: cannot be made with {given} ({_said(error)})") from None
    if not isinstance(network, nn.Module):
        raise UserError(f"network={name}: its factory gives a {type(network).__name__}, expected a torch.nn.Module")
    return network


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _is_norm(module: nn.Module) -> bool:
    named = "norm" in type(module).__name__.lower() and not list(module.children())
    return named or isinstance(module, AGC2d) or hasattr(module, "running_mean")


def _in_order(network: Foreign, size: tuple[int, int]) -> tuple[list[str], set[str]]:
    """The norms of the network as they run, then those that do not; and those that get maps of 1x1.

    Raises:
        UserError: it cannot run on such images.
    """
    shapes: dict[str, torch.Size] = {}
    norms = [name for name, module in network.network.named_modules() if _is_norm(module)]

    def see(name: str, module: nn.Module, inputs: tuple) -> None:
        shapes.setdefault(name, inputs[0].shape)

    try:
        copy = deepcopy(network).to("meta").eval()
        for name in norms:
            copy.network.get_submodule(name).register_forward_pre_hook(partial(see, name))
        with torch.device("meta"), torch.no_grad():
            copy(torch.empty(2, 3, *size))
    except UserError:
        raise
    except Exception:  # no copy, or a forward that looks at values; it is tried on real images where it is trained
        shapes.clear()
    points = {name for name, shape in shapes.items() if len(shape) == 4 and shape[2:] == (1, 1)}
    return [*shapes, *(name for name in norms if name not in shapes)], points


def _renorm(network: nn.Module, norm, options: dict[str, Any], fuse: bool, points: set[str]) -> str:
    """Give a third-party network another norm, in place; returns what became of those it had."""
    if norm == "bn":
        return _set_batch_norm(network, options)
    if norm in OF_UNITS:
        raise UserError(f"norm={norm}: acts on more than a norm's own input, which only segnet and classnet let it do")
    left: dict[str, str] = {}
    if norm == "agc" and options.get("background", "map") == "map":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of maps of 1x1, see below
            converted = convert_batchnorm(network, options.get("mean_scale", 1.0), fuse)
        replaced, left = converted.replaced, converted.left
        how = f"AGC, {len(converted.fused)} of them in one step with their convolution"
    else:
        make = NORMS[norm] if isinstance(norm, str) else norm
        replaced, left = _replace(network, (lambda channels: make(channels, **options)) if make else _Bias)
        how = norm if isinstance(norm, str) else getattr(norm, "__name__", "another norm")
    if not replaced and not any(isinstance(module, AGC2d) for module in network.modules()):
        raise UserError(f"norm={norm}: the network has no BatchNorm2d to replace; norm=bn leaves it as it is")
    told = [f"{len(replaced)} layers of batch normalisation are now {how}"]
    modules = dict(network.named_modules())
    of_points = [name for name in replaced if name in points and isinstance(modules[name], AGC2d)]
    for norm_of_points in [modules[name] for name in of_points]:
        if isinstance(norm_of_points, AGCStd2d):  # with another λ it would scale them up by 1/sqrt(ε)
            norm_of_points.initial_mean_scale = 1.0
            nn.init.ones_(norm_of_points.mean_scale).requires_grad_(False)
    whole = [name for name in of_points if modules[name].initial_mean_scale == 1]  # of which nothing would be left
    trained = [name for name in whole if modules[name].mean_scale.requires_grad]
    for name in trained:
        modules[name].initial_mean_scale = 0.0
        nn.init.zeros_(modules[name].mean_scale)
    for names, what in (
        (trained, "λ starts at 0 instead of 1"),
        ([name for name in whole if name not in trained], "with λ fixed at 1 only β is left of them"),
    ):
        if names:
            told.append(f"{', '.join(names)}: maps of 1x1, whose mean is all there is: {what}")
    told += [f"{name}: {reason}" for name, reason in left.items() if reason.startswith("stays")]
    return "\n  ".join(told)


def _set_batch_norm(network: nn.Module, options: dict[str, Any]) -> str:
    parameters = inspect.signature(nn.BatchNorm2d).parameters
    changed = {key: value for key, value in options.items() if value != parameters[key].default}
    other = [key for key in changed if key not in ("eps", "momentum")]
    if other:
        raise UserError(f"norm=bn: {', '.join(other)}: of segnet and classnet only; here eps and momentum can be set")
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        for key, value in changed.items():
            setattr(module, key, value)
    with_what = "".join(f", {key} {value}" for key, value in changed.items())
    return f"{len(norms)} layers of batch normalisation as they are{with_what}"


def _replace(network: nn.Module, make: Callable[[int], nn.Module]) -> tuple[list[str], dict[str, str]]:
    """Put another norm in the place of each BatchNorm2d, with its scale and shift. timm's form with an activation keeps
    that behind it."""
    replaced, left, made = [], {}, {}
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if not is_batch_norm(module):
            continue
        if not isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) or not name:
            left[name] = f"stays, {type(module).__name__}"
            continue
        if module not in made:
            new = make(module.num_features)
            with torch.no_grad():
                for key in ("weight", "bias"):
                    if getattr(module, key) is not None and isinstance(getattr(new, key, None), nn.Parameter):
                        getattr(new, key).copy_(getattr(module, key))
            behind = [getattr(module, part) for part in ("drop", "act") if hasattr(module, part)]
            made[module] = (nn.Sequential(new, *behind) if behind else new).train(module.training)
            replaced.append(name)
        network.set_submodule(name, made[module])
    return replaced, left


class _Bias(nn.Module):
    """What is left of a norm that is none: the bias of the convolution in front."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, input: Tensor) -> Tensor:
        return input + self.bias.view(1, -1, 1, 1)
