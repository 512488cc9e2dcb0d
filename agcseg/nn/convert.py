"""AGC instead of batch normalisation in a network that somebody else wrote."""

from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from agcseg.nn.agc import AGC2d
from agcseg.nn.fast import agc_unit


class Conversion(NamedTuple):
    """What `convert_batchnorm` did.

    Attributes:
        model: the network with AGC.
        replaced: names of the layers that were batch normalisation and are `AGC2d` now.
        fused: those of them that run as one step with their convolution and ReLU.
        left: name -> why this batch normalisation stayed, or why this AGC runs on its own.
    """

    model: nn.Module
    replaced: list[str]
    fused: list[str]
    left: dict[str, str]


def convert_batchnorm(model: nn.Module, mean_scale: float = 1.0, fuse: bool = True) -> Conversion:
    """Replace every BatchNorm2d of `model` by AGC2d, in place, with its scale and shift as γ and β.

    Where convolution, batch normalisation and ReLU follow each other and nothing else reads what is between them, the
    three become one step of autograd (`agcseg.nn.fast`), which keeps no map that its neighbours do not keep anyway. That
    needs a symbolic trace of the network (`torch.fx`): `Conversion.model` is then a `GraphModule` that shares all
    parameters with `model` and has the same state_dict keys. A network that cannot be traced keeps its own class and
    forward, with AGC2d in it.

    AGC does not divide by a standard deviation: a network trained with batch normalisation has to be trained on.

    Args:
        model: any network. It is changed.
        mean_scale: initial λ.
        fuse: fuse where possible; False only replaces the layers.

    Returns:
        the converted network, and lists of what was and was not done.
    """
    replaced, left = [], {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and name:
            model.set_submodule(name, _agc_of(module, mean_scale))
            replaced.append(name)
        elif isinstance(module, nn.modules.batchnorm._NormBase) and not isinstance(module, nn.InstanceNorm2d):
            left[name] = f"{type(module).__name__} is not BatchNorm2d"
    if not fuse:
        return Conversion(model, replaced, [], left | dict.fromkeys(replaced, "fuse=False"))
    try:
        traced, fused, alone = _fuse(model, set(replaced))
    except Exception as error:  # whatever a forward that is not traceable raises
        reason = f"the network cannot be traced ({str(error).splitlines()[0]})"
        return Conversion(model, replaced, [], left | dict.fromkeys(replaced, reason))
    return Conversion(traced, replaced, fused, left | alone)


class _FusedAGC2d(AGC2d):
    """AGC2d that runs its convolution and ReLU too; the convolution's filters come as an argument."""

    def __init__(self, agc: AGC2d, conv: nn.Conv2d) -> None:
        super().__init__(agc.num_features, agc.initial_mean_scale, device="meta")
        self.weight, self.bias, self.mean_scale = agc.weight, agc.bias, agc.mean_scale
        self.geometry = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}

    def forward(self, input: Tensor, filters: Tensor) -> Tensor:
        return agc_unit(input, filters, self.weight, self.bias, self.mean_scale, **self.geometry)


def _agc_of(norm: nn.BatchNorm2d, mean_scale: float) -> AGC2d:
    like = norm.weight if norm.weight is not None else norm.running_mean
    options = {} if like is None else {"device": like.device, "dtype": like.dtype}
    agc = AGC2d(norm.num_features, mean_scale, **options)
    if norm.affine:
        agc.weight, agc.bias = norm.weight, norm.bias
    return agc.train(norm.training)


def _fuse(model: nn.Module, names: set[str]) -> tuple[nn.Module, list[str], dict[str, str]]:
    graph = fx.Tracer().trace(model)
    modules, fused, alone, convolutions = dict(model.named_modules()), [], {}, []
    for node in list(graph.nodes):
        if node.op != "call_module" or node.target not in names:
            continue
        reason = _why_not(node, modules)
        if reason:
            alone[node.target] = reason
            continue
        conv, relu = node.args[0], next(iter(node.users))
        with graph.inserting_before(node):
            filters = graph.get_attr(f"{conv.target}.weight")
        node.args = (conv.args[0], filters)
        relu.replace_all_uses_with(node)
        graph.erase_node(relu)
        graph.erase_node(conv)
        fused.append(node.target)
        convolutions.append(conv.target)
    for name, conv in zip(fused, convolutions, strict=True):
        model.set_submodule(name, _FusedAGC2d(modules[name], modules[conv]))
    traced = fx.GraphModule(model, graph, type(model).__name__)
    for name, conv in zip(fused, convolutions, strict=True):
        traced.set_submodule(conv, modules[conv])  # the graph needs its filters only; keep the layer they belong to
        model.set_submodule(name, modules[name])
    return traced, fused, alone


def _why_not(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    conv = node.args[0]
    if not isinstance(conv, fx.Node) or conv.op != "call_module" or type(modules[conv.target]) is not nn.Conv2d:
        return "no Conv2d in front"
    layer = modules[conv.target]
    if layer.bias is not None:
        return "its convolution has a bias"
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return f"its convolution pads with {layer.padding_mode}, {layer.padding}"
    if len(conv.users) > 1:
        return "something else reads its convolution"
    for other in (conv, node):
        if sum(n.target == other.target for n in node.graph.nodes if n.op == "call_module") > 1:
            return f"{other.target} is used more than once"
    relu = next(iter(node.users), None)
    if relu is None or len(node.users) > 1 or not _is_relu(relu, modules):
        return "no ReLU behind"
    return None


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[node.target]) is nn.ReLU
    if node.op == "call_function":
        return node.target in (F.relu, torch.relu, torch.relu_)
    return node.op == "call_method" and node.target in ("relu", "relu_")
