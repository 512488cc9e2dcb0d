"""AGC instead of batch normalisation in a network that somebody else wrote."""

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
    only the ReLU is at hand, those two do. That needs a symbolic trace of the network (`torch.fx`, in its present mode:
    call `model.train()` or `.eval()` first if its forward asks): `Conversion.model` is then a `GraphModule` with the
    parameters and the state_dict keys of `model`. A network that cannot be traced keeps its own class and forward, with
    AGC2d in it.

    AGC does not divide by a standard deviation: a network trained with batch normalisation has to be trained on. On a
    map of 1x1, as behind a global pooling, AGC with λ = 1 leaves nothing but β: give such layers a smaller λ.

    Args:
        model: any network. Its layers are replaced.
        mean_scale: initial λ.
        fuse: fuse where possible; False only replaces the layers.

    Returns:
        the converted network, with lists of what was and what was not done.
    """
    replaced, left = [], {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.InstanceNorm2d) or not isinstance(module, nn.modules.batchnorm._NormBase):
            continue
        if type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) and name:
            model.set_submodule(name, _agc_of(module, mean_scale))
            replaced.append(name)
        else:
            left[name] = f"stays: {type(module).__name__} is not BatchNorm2d"
    if not fuse:
        return Conversion(model, replaced, [], left)
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever a forward that cannot be traced raises
        reason = f"not fused: the network cannot be traced ({str(error).splitlines()[0]})"
        return Conversion(model, replaced, [], left | dict.fromkeys(replaced, reason))
    traced, apart = _fuse(model, graph, set(replaced))
    return Conversion(traced, replaced, [name for name in replaced if name not in apart], left | apart)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, AGC2d) or super().is_leaf_module(module, name)


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
    return agc


def _as(kind: type[AGC2d], agc: AGC2d) -> AGC2d:
    """The same layer, parameters shared, as another kind."""
    other = kind(agc.num_features, agc.initial_mean_scale, device="meta").train(agc.training)
    other.weight, other.bias, other.mean_scale = agc.weight, agc.bias, agc.mean_scale
    return other


def _fuse(model: nn.Module, graph: fx.Graph, names: set[str]) -> tuple[fx.GraphModule, dict[str, str]]:
    """A module that runs `graph` with ReLU, and where possible the convolution, taken into each AGC of `names`."""
    modules, layers, convolutions, apart = dict(model.named_modules()), {}, {}, {}
    uses = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in list(graph.nodes):
        if node.op != "call_module" or node.target not in names:
            continue
        name, relu, conv = node.target, next(iter(node.users), None), node.args[0]
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
            node.args = (conv.args[0], graph.get_attr(f"{conv.target}.weight"))
        graph.erase_node(conv)
    traced = fx.GraphModule(model, graph, type(model).__name__)
    for name, layer in {**layers, **convolutions}.items():  # of a convolution the graph needs the filters only
        traced.set_submodule(name, layer)
    return traced.train(model.training), apart


def _why_apart(conv: fx.Node, modules: dict[str, nn.Module], uses: list[str]) -> str | None:
    """Why a convolution cannot be taken into the AGC behind it."""
    if conv.op != "call_module" or type(modules[conv.target]) is not nn.Conv2d:
        return "no Conv2d in front"
    layer = modules[conv.target]
    if layer.bias is not None:
        return "its convolution has a bias"
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return f"its convolution pads by {layer.padding_mode!r}, {layer.padding!r}"
    if len(conv.users) > 1 or uses.count(conv.target) > 1:
        return "its convolution is read or used elsewhere too"
    return None


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[node.target]) is nn.ReLU
    return node.target in (F.relu, torch.relu, torch.relu_, "relu", "relu_")
