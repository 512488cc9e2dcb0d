"""AGC instead of batch normalisation in a network that somebody else wrote."""

import inspect
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from agcseg.nn.agc import AGC2d
from agcseg.nn.fast import AGCReLU2d, Geometry, agc_unit


class Conversion(NamedTuple):
    """What `convert_batchnorm` did.

    Attributes:
        model: the network with AGC.
        replaced: names of the layers that were batch normalisation and are `AGC2d` now.
        fused: those of them that run as one step with their convolution and ReLU.
        left: name -> why a batch normalisation stayed, or why an AGC runs apart from its convolution or ReLU.
    """

    model: nn.Module
    replaced: list[str]
    fused: list[str]
    left: dict[str, str]


def convert_batchnorm(model: nn.Module, mean_scale: float = 1.0, fuse: bool = True) -> Conversion:
    """Replace every BatchNorm2d of `model` by AGC2d, in place, with its scale and shift as γ and β.

    Where convolution, batch normalisation and ReLU follow each other and nothing else reads what is between them, the
    three become one step of autograd (`agcseg.nn.fast`) that keeps no map but what its neighbours keep anyway; where
    only the ReLU is at hand, those two do. That needs a symbolic trace of the network (`torch.fx`): `Conversion.model`
    is then a `GraphModule` with the parameters and the state_dict keys of `model`. A network that cannot be traced
    keeps its own class and forward, with AGC2d in it. So does one that its trace would change: whose forward differs
    between training and evaluation (beyond what layers of torch.nn do), has optional arguments, makes tensors of its
    own, stores something in the network or leaves parameters unused, or that has hooks on more than single layers.

    AGC does not divide by a standard deviation: a network trained with batch normalisation has to be trained on. On a
    map of 1x1, as behind a global pooling, AGC with λ = 1 leaves nothing but β: give such layers a smaller λ.

    Args:
        model: any network. Its layers are replaced.
        mean_scale: initial λ, not trained where the scale is frozen.
        fuse: fuse where possible; False only replaces the layers.

    Returns:
        the converted network, with lists of what was and what was not done.
    """
    replaced, left, layers = [], {}, {}
    for name, module in list(model.named_modules(remove_duplicate=False)):  # a layer may have several names
        if not hasattr(module, "running_mean") or isinstance(module, nn.modules.instancenorm._InstanceNorm):
            continue
        reason = _why_stays(name, module)
        if reason:
            left[name] = reason
            continue
        if module not in layers:
            layers[module] = _agc_of(module, mean_scale)
            replaced.append(name)
        model.set_submodule(name, layers[module])
    if not fuse or not replaced:
        return Conversion(model, replaced, [], left)
    try:
        traced, apart = _fuse(model, _trace(model), replaced)
    except Exception as error:  # whatever a forward that cannot be traced raises
        reason = f"not fused: the network cannot be traced ({(str(error) or type(error).__name__).splitlines()[0]})"
        return Conversion(model, replaced, [], left | dict.fromkeys(replaced, reason))
    return Conversion(traced, replaced, [name for name in replaced if name not in apart], left | apart)


def _why_stays(name: str, norm: nn.Module) -> str | None:
    if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return f"stays: {type(norm).__name__} is not BatchNorm2d"
    if not name:
        return "stays: it is the whole network; use AGC2d"
    return "stays: it has hooks" if _has_hooks(norm) else None


def _has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward: pruning, the old weight norm, whatever users hang on."""
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


def _trace(model: nn.Module) -> fx.Graph:
    """What the forward does, in training as in evaluation; raises where it is not known for every call."""
    arguments = inspect.signature(model.forward).parameters.values()
    if any(a.default is not a.empty or a.kind in (a.VAR_POSITIONAL, a.VAR_KEYWORD) for a in arguments):
        raise ValueError("its forward has optional arguments")
    if _has_hooks(model):
        raise ValueError("it has hooks")
    states = {module: dict(vars(module)) for module in model.modules()}
    try:
        training, evaluation = (_Tracer().trace(model.train(mode)) for mode in (True, False))
        stored = [
            name
            for module, state in states.items()
            for name, value in vars(module).items()
            if name != "training" and value is not state.get(name, states)
        ]
    finally:  # the modes, and what the forward may have left
        for module, state in states.items():
            vars(module).clear()
            vars(module).update(state)
    if str(training) != str(evaluation):
        raise ValueError("its forward is not the same in training and evaluation, or makes tensors of its own")
    if stored:
        raise ValueError(f"its forward stores something, as {stored[0]}")
    return training


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        leaf = isinstance(module, AGC2d) or super().is_leaf_module(module, name)
        if not leaf and _has_hooks(module):
            raise ValueError(f"{name} has hooks")
        return leaf


class _Unit(AGC2d):
    """AGC2d that runs its convolution and ReLU too; the convolution's filters come as an argument."""

    geometry: Geometry

    def forward(self, input: Tensor, filters: Tensor) -> Tensor:
        return agc_unit(input, filters, self.weight, self.bias, self.mean_scale, geometry=self.geometry)


def _agc_of(norm: nn.Module, mean_scale: float) -> AGC2d:
    like = norm.weight if norm.affine else norm.running_mean
    options = {} if like is None else {"device": like.device, "dtype": like.dtype}
    agc = AGC2d(norm.num_features, mean_scale, **options).train(norm.training)
    if norm.affine:
        agc.weight, agc.bias = norm.weight, norm.bias
        agc.mean_scale.requires_grad_(norm.weight.requires_grad)
    return agc


def _as(kind: type[AGC2d], agc: AGC2d) -> AGC2d:
    """The same layer, parameters shared, as another kind."""
    other = kind(agc.num_features, agc.initial_mean_scale, device="meta").train(agc.training)
    other.weight, other.bias, other.mean_scale = agc.weight, agc.bias, agc.mean_scale
    return other


def _fuse(model: nn.Module, graph: fx.Graph, names: list[str]) -> tuple[fx.GraphModule, dict[str, str]]:
    """A module that runs `graph` with ReLU, and where possible the convolution, taken into each AGC of `names`."""
    modules, layers, convolutions = dict(model.named_modules()), {}, {}
    apart = dict.fromkeys(names, "not fused: the trace does not see it")
    uses = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in list(graph.nodes):
        if node.op != "call_module" or node.target not in apart:
            continue
        name, relu, conv = node.target, next(iter(node.users), None), _input(node)
        if relu is None or len(node.users) > 1 or not _is_relu(relu, modules) or uses.count(name) > 1:
            apart[name] = "not fused: no ReLU behind it, or more than that"
            continue
        relu.replace_all_uses_with(node)
        graph.erase_node(relu)
        reason = _why_apart(conv, modules, uses)
        if reason:
            layers[name], apart[name] = _as(AGCReLU2d, modules[name]), f"fused with its ReLU only: {reason}"
            continue
        layer, unit = modules[conv.target], _as(_Unit, modules[name])
        unit.geometry = Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)
        layers[name], convolutions[conv.target] = unit, layer
        with graph.inserting_before(node):
            node.args, node.kwargs = (_input(conv), graph.get_attr(f"{conv.target}.weight")), {}
        graph.erase_node(conv)
        del apart[name]
    traced = fx.GraphModule(model, graph, type(model).__name__)
    for name, layer in {**layers, **convolutions}.items():  # of a convolution the graph needs the filters only
        traced.set_submodule(name, layer)
    lost = sorted(model.state_dict().keys() ^ traced.state_dict().keys())
    if lost:
        raise ValueError(f"its forward does not use {lost[0]}, or under another name")
    for name, module in traced.named_modules():
        module.training = modules[name].training
    return traced, apart


def _input(node: fx.Node) -> fx.Node:
    return node.args[0] if node.args else node.kwargs["input"]


def _why_apart(conv: fx.Node, modules: dict[str, nn.Module], uses: list[str]) -> str | None:
    """Why a convolution cannot be taken into the AGC behind it."""
    if conv.op != "call_module" or type(modules[conv.target]) is not nn.Conv2d:
        return "no Conv2d in front"
    layer = modules[conv.target]
    if layer.bias is not None:
        return "its convolution has a bias"
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return f"its convolution pads by {layer.padding_mode!r}, {layer.padding!r}"
    if _has_hooks(layer):
        return "its convolution has hooks"
    if len(conv.users) > 1 or uses.count(conv.target) > 1:
        return "its convolution is read or used elsewhere too"
    return None


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[node.target]) is nn.ReLU and not _has_hooks(modules[node.target])
    return node.target in (F.relu, torch.relu, torch.relu_, "relu", "relu_")
