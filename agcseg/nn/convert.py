"""AGC instead of batch normalisation in a network that somebody else wrote, in place."""

import textwrap
import warnings
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from agcseg.nn.agc import AGC2d
from agcseg.nn.conv import ConvUnit
from agcseg.nn.fast import AGCReLU2d
from agcseg.nn.find import Findings, find
from agcseg.nn.hooks import has_forward_of_its_own, has_hooks
from agcseg.nn.norms import is_batch_norm
from agcseg.nn.pairs import paired, unpair, unpaired

# By name, as their packages need not be installed.
FROZEN = ("torchvision.ops.misc.FrozenBatchNorm2d", "timm.layers.norm_act.FrozenBatchNormAct2d")
ANY_SHAPE = ("torch.nn.modules.batchnorm.SyncBatchNorm", "timm.layers.norm_act.SyncBatchNormAct")
KINDS = ("torch.nn.modules.batchnorm.BatchNorm2d", "timm.layers.norm_act.BatchNormAct2d", *ANY_SHAPE, *FROZEN)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
SETTINGS = ("eps", "momentum", "affine", "track_running_stats", "process_group")


class Conversion(NamedTuple):
    """What `convert_batchnorm` did; printed, a summary.

    Attributes:
        model: the network itself, with AGC.
        replaced: names of the layers that were batch normalisation and are AGC now.
        fused: names of the AGC layers that run as one step with the convolution in front of them.
        left: name -> why a batch normalisation stayed, or why an AGC runs apart from a convolution.
    """

    model: nn.Module
    replaced: list[str]
    fused: list[str]
    left: dict[str, str]

    def __str__(self) -> str:
        stay = {name: reason for name, reason in self.left.items() if reason.startswith("stays")}
        apart = {name: reason for name, reason in self.left.items() if name not in stay}
        lines = [
            f"{type(self.model).__name__}: {len(self.replaced)} layers of batch normalisation are AGC now, "
            f"{len(self.fused)} AGC layers run as one step with the convolution in front of them.",
            *_by_reason(apart),
            *_by_reason(stay),
        ]
        if not self.replaced:
            lines[0] = lines[0].replace("0 layers of batch normalisation are AGC now", "nothing to replace")
        return "\n".join(lines)


def _by_reason(names: dict[str, str]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, reason in names.items():
        reasons.setdefault(reason, []).append(name or "(the network)")
    lines = [f"{len(of)} {reason}: {', '.join(of)}" for reason, of in reasons.items()]
    return [f"  {textwrap.shorten(line, 150, placeholder=' ...')}" for line in lines]


def convert_batchnorm(model: nn.Module, mean_scale: float = 1.0, fuse: bool = True) -> Conversion:
    """Make every batch normalisation of maps in `model` AGC, in place, with its scale and shift as γ and β.

    The network stays what it is: the same object of the same class, with its forward, methods, modes and hooks; its
    state_dict loses the running statistics and gains λ (`mean_scale`). BatchNorm2d, SyncBatchNorm behind a
    two-dimensional layer, torchvision's frozen form and timm's forms with an activation are replaced; what was frozen
    stays frozen, λ too.

    Where only an AGC reads what a Conv2d gives, the two run as one step of autograd that keeps no map but the
    convolution's input (`agcseg.nn.pairs`). Which belong together is found by tracing copies of the network, or of its
    parts; the forward itself is not touched, and a convolution whose output something else reads after all, or that has
    hooks, runs by itself. Values and gradients are those of the layers one by one.

    AGC does not divide by a standard deviation: a network trained with batch normalisation has to be trained on. On a
    map of 1x1, as behind a global pooling, AGC with λ = 1 leaves nothing but β; where that is seen, a warning names the
    layers: give them a smaller λ.

    Args:
        model: any network.
        mean_scale: initial λ, not trained where the scale is frozen.
        fuse: run AGC as one step with its convolution; False only replaces the layers, and undoes it in a network that
            was converted before.

    Returns:
        the network, with lists of what was and what was not done. Of one that is converted already the first is empty.

    Raises:
        ValueError: `model` is, or holds, a DistributedDataParallel, or is sharded by FSDP.
    """
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, nn.parallel.DistributedDataParallel) or kind == "FullyShardedDataParallel":
            raise ValueError(f"the network is wrapped in {kind}, which would not see λ: convert, then wrap")
        if _kind(module) in KINDS and any(hasattr(p, "device_mesh") for p in module.parameters()):
            raise ValueError("the network is sharded by fully_shard, which would not see λ: convert, then shard")
    findings = find(model, lambda module: isinstance(module, AGC2d) or _kind(module) in KINDS)
    layers = dict(model.named_modules())
    of_units = {unit.norm for unit in layers.values() if isinstance(unit, ConvUnit)}
    replaced, left = [], {}
    for name, module in layers.items():
        reason = _why_stays(module, findings)
        if reason:
            left[name] = reason
        elif _kind(module) in KINDS:
            _become_agc(module, mean_scale, next(model.parameters(), None))
            replaced.append(name)
    if not fuse:
        for module in layers.values():
            unpair(module)
    fused = []
    for name, module in layers.items() if fuse else ():
        if module in of_units or type(module) not in (AGC2d, AGCAct2d, AGCReLU2d):
            continue  # units see to it themselves, and subclasses may mean something else
        reason = _why_apart(name, layers, findings)
        if reason:
            left[name] = f"apart: {reason}"
        else:
            _pair(name, layers, findings)
            fused.append(name)
    points = [name for name in replaced if layers[name] in findings.points]
    if points and mean_scale == 1:
        warnings.warn(
            f"{', '.join(points)} get maps of 1x1, of which AGC with λ = 1 leaves nothing but β: fill their mean_scale "
            "with less",
            stacklevel=2,
        )
    return Conversion(model, replaced, fused, left)


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _why_stays(module: nn.Module, findings: Findings) -> str | None:
    """Why a batch normalisation stays what it is; None of anything else."""
    kind = _kind(module)
    if not is_batch_norm(module):
        return None
    if kind in ANY_SHAPE and module not in findings.two_dimensional:
        return f"stays, {type(module).__name__}: it is not seen behind a two-dimensional layer"
    if has_forward_of_its_own(module):
        return f"stays, {type(module).__name__}: its forward was replaced"
    return None if kind in KINDS else f"stays, {type(module).__name__}: it is not BatchNorm2d"


def _become_agc(norm: Any, mean_scale: float, other: Tensor | None) -> None:
    """Make a batch normalisation AGC, the same object: whoever holds it, and its hooks, keep it. One without any tensor
    gets the device and dtype of another parameter."""
    own = next((t for t in (norm.weight, norm.running_mean) if t is not None), None)
    like = other if own is None else own
    options = {} if like is None else {"device": like.device, "dtype": like.dtype}
    num_features = norm.num_features if own is None else len(own)
    fresh = AGC2d(num_features, mean_scale=mean_scale, **options)
    for name in (*STATISTICS, *SETTINGS):
        norm._buffers.pop(name, None)
        norm._non_persistent_buffers_set.discard(name)
        vars(norm).pop(name, None)
    norm.__class__ = AGCAct2d if hasattr(norm, "act") else AGC2d
    norm.num_features, norm.initial_mean_scale = num_features, mean_scale
    if norm.weight is None:
        norm.weight = fresh.weight
    missing = ("mean_scale",) if norm.bias is not None else ("bias", "mean_scale")
    for name in missing:
        if "weight" in norm._buffers:  # frozen for good
            norm.register_buffer(name, getattr(fresh, name).detach())
        else:
            setattr(norm, name, getattr(fresh, name).requires_grad_(norm.weight.requires_grad))


class AGCAct2d(AGC2d):
    """What timm's BatchNormAct2d becomes: AGC, then its modules `drop` and `act`."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def _why_apart(name: str, layers: dict[str, nn.Module], findings: Findings) -> str | None:
    """Why an AGC does not run as one step with a convolution."""
    norm = layers[name]
    if norm not in findings.sources:
        parts = [part for part in findings.errors if norm in set(part.modules())]
        why = f" ({findings.errors[parts[0]]})" if parts else ""
        return f"it is not seen in a trace of the network{why}"
    if has_hooks(norm):
        return "it has hooks"
    for source in findings.sources[norm]:
        if isinstance(source, str):
            return f"no convolution in front of it, but {source}"
        if not isinstance(source, nn.Conv2d):
            return f"no Conv2d in front of it, but {type(source).__name__}"
        if not findings.alone.get(source):
            return "its convolution is read elsewhere too"
        if source.padding == "same":
            return "its convolution pads by 'same'"
        if is_parametrized(source):
            return "its convolution is parametrised"
        if has_hooks(source):
            return "its convolution has hooks"
    return None


def _pair(name: str, layers: dict[str, nn.Module], findings: Findings) -> None:
    names = {module: name for name, module in layers.items()}
    convs: list[Any] = findings.sources[layers[name]]
    for conv in convs:
        path, other = names[conv].split("."), name.split(".")
        common = next((i for i, (a, b) in enumerate(zip(path, other, strict=False)) if a != b), 0)
        passed = (*_below(path[:-1], common), *_below(other, common))
        conv.__class__ = paired(unpaired(type(conv)))
        seen = (layers[name] for name in passed if name in layers)
        conv.watched = (*conv.watched, *seen, *findings.skipped.get(layers[name], ()))  # of its other AGCs too


def _below(path: list[str], common: int) -> list[str]:
    return [".".join(path[: i + 1]) for i in range(common, len(path))]
