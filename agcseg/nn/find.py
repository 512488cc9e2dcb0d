"""Which layers of a network follow each other, found without touching it.

Hollow copies of the network, their parameters on the meta device and without hooks, are traced symbolically
(`torch.fx`); a part that cannot be traced becomes a single step in the trace of what contains it. A trace sees one way
through the forward and no context, so what it finds may only be used where a wrong finding does no harm.
"""

import copy
import inspect
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from agcseg.errors import first_line
from agcseg.nn.conv import ConvUnit


@dataclass
class Findings:
    """What traces saw of the layers asked for.

    Attributes:
        sources: layer -> what stands in front of it: modules, or the names of functions.
        skipped: layer -> the identities between it and these.
        alone: convolutions that nothing but one such layer reads, wherever they were seen.
        two_dimensional: layers behind a two-dimensional one, with nothing between that changes the dimensions.
        points: layers whose maps are 1x1.
        errors: part of the network -> why it could not be traced.
    """

    sources: dict[nn.Module, list[nn.Module | str]] = field(default_factory=dict)
    skipped: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)
    alone: dict[nn.Module, bool] = field(default_factory=dict)
    two_dimensional: set[nn.Module] = field(default_factory=set)
    points: set[nn.Module] = field(default_factory=set)
    errors: dict[nn.Module, str] = field(default_factory=dict)


def find(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> Findings:
    """Trace `model`, where need be in parts, until every layer that is `wanted` was seen or all parts were tried."""
    findings = Findings()
    state, python = torch.get_rng_state(), random.getstate()
    numpy = sys.modules.get("numpy")
    drawn = numpy.random.get_state() if numpy else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _visit(model, [module for module in model.modules() if wanted(module)], findings)
    finally:
        torch.set_rng_state(state)
        random.setstate(python)
        if numpy:
            numpy.random.set_state(drawn)
    return findings


def _visit(part: nn.Module, layers: list[nn.Module], findings: Findings) -> None:
    inside = set(part.modules())
    missing = [layer for layer in layers if layer in inside and layer not in findings.sources]
    if not missing or part in missing or isinstance(part, ConvUnit):
        return
    error = _trace(part, layers, findings)
    for child in part.children():
        _visit(child, layers, findings)
    if error and findings.errors.keys() & inside:
        error = _trace(part, layers, findings)
    if error:
        findings.errors[part] = error


def _trace(part: nn.Module, layers: list[nn.Module], findings: Findings) -> str | None:
    """Read what the forward of `part` does in training and in evaluation; returns why that failed."""
    try:
        hollow, error = _hollow(part), None
    except Exception as raised:  # whatever the parts of a network that cannot be copied raise
        return first_line(raised)
    originals = dict(zip(hollow.modules(), part.modules(), strict=True))
    leaves = {module for module, original in originals.items() if original in layers or original in findings.errors}
    for mode in (True, False):
        for module in hollow.modules():
            module.training = mode
        try:
            graph = _Tracer(leaves).trace(hollow, _defaults(hollow))
        except Exception as raised:  # whatever a forward that cannot be traced raises
            error = first_line(raised)
            continue
        _read(graph, {name: originals[module] for name, module in hollow.named_modules()}, layers, findings)
    return error


def _hollow(part: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have no content, without hooks."""
    memo = {}
    plain = (value for module in part.modules() for value in vars(module).values() if isinstance(value, torch.Tensor))
    for tensor in (*part.parameters(), *part.buffers(), *plain):
        shell = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(shell, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shell
    hollow = copy.deepcopy(part, memo)
    for module in hollow.modules():
        for hooks in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"):
            getattr(module, hooks).clear()
    return hollow


def _defaults(part: nn.Module) -> dict[str, object]:
    """The forward's optional arguments, as in a call without them."""
    arguments = inspect.signature(part.forward).parameters.values()
    return {a.name: a.default for a in arguments if a.default is not a.empty}


class _Tracer(fx.Tracer):
    def __init__(self, leaves: set[nn.Module]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        kinds = (ConvUnit, nn.modules.conv._ConvNd)
        return module in self.leaves or isinstance(module, kinds) or super().is_leaf_module(module, name)


def _read(graph: fx.Graph, modules: dict[str, nn.Module], layers: list[nn.Module], findings: Findings) -> None:
    def called(node: object) -> nn.Module | None:
        return modules[str(node.target)] if isinstance(node, fx.Node) and node.op == "call_module" else None

    def readers(node: fx.Node) -> Iterator[fx.Node]:
        for user in node.users:
            if type(called(user)) is nn.Identity:
                yield from readers(user)
            else:
                yield user

    for node in graph.nodes:
        module = called(node)
        if isinstance(module, nn.modules.conv._ConvNd):
            by = list(readers(node))
            alone = len(by) == 1 and called(by[0]) in layers
            findings.alone[module] = alone and findings.alone.get(module, True)
        if module not in layers:
            continue
        source = _input(node)
        while source is not None and type(skipped := called(source)) is nn.Identity:
            findings.skipped.setdefault(module, []).append(skipped)
            source = _input(source)
        seen = findings.sources.setdefault(module, [])
        name = called(source) or _name(source)
        if name not in seen:
            seen.append(name)
        kinds = [_kind_of_output(node, called) for node in _behind(node)]
        if next((kind for kind in kinds if kind), None) == "2d":
            findings.two_dimensional.add(module)
        if _is_point(source, called):
            findings.points.add(module)


def _input(node: fx.Node) -> fx.Node | None:
    """The first argument, or the only one given by name."""
    given = (*node.args, *node.kwargs.values())
    return given[0] if given and isinstance(given[0], fx.Node) else None


def _name(node: fx.Node | None) -> str:
    if node is None or node.op == "placeholder":
        return "what it is given"
    return getattr(node.target, "__name__", str(node.target))


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    """What `node` is made of, the nearest first."""
    waiting, seen = list(node.all_input_nodes), set()
    while waiting:
        node = waiting.pop(0)
        if node not in seen:
            seen.add(node)
            yield node
            waiting += node.all_input_nodes


def _kind_of_output(node: fx.Node, called: Callable) -> str | None:
    """ "2d" if the output is certainly maps, "other" if it may be something else, None if it is as its input."""
    module = called(node)
    if isinstance(module, nn.modules.conv._ConvNd) or (module and "Pool" in type(module).__name__):
        return "2d" if "2d" in type(module).__name__ else "other"
    if isinstance(module, (nn.Linear, nn.Flatten, nn.Unflatten)):
        return "other"
    return "other" if _name(node) in ("flatten", "view", "reshape", "mean", "squeeze", "unsqueeze", "getitem") else None


def _is_point(node: fx.Node | None, called: Callable) -> bool:
    """Whether the output of `node` is a global pooling's, convolved and activated at most."""
    while node is not None:
        module, name = called(node), _name(node)
        if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
            return module.output_size in (1, (1, 1), [1, 1])
        if name in ("adaptive_avg_pool2d", "adaptive_max_pool2d"):
            size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
            return size in (1, (1, 1), [1, 1])
        if name == "mean":
            over = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", ())
            kept = node.kwargs.get("keepdim", len(node.args) > 2 and node.args[2])
            return bool(kept) and sorted(over if isinstance(over, (tuple, list)) else ()) in ([2, 3], [-2, -1])
        inputs = node.all_input_nodes
        if module is None or len(inputs) != 1 or any(word in type(module).__name__ for word in ("Up", "Transpose")):
            return False
        node = inputs[0]
    return False
