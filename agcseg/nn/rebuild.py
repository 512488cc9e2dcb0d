"""Memory for a price: outputs of chosen units are not kept for backward but computed again, bit for bit.

What autograd keeps of a network is, with the fast AGC units, mostly the units' outputs. Which to compute again follows
from what it costs: `choose` takes those that free the most numbers per operation, until a share of a step's arithmetic
is spent. Forward and backward, a step computes three times what forward does.
"""

import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from agcseg.errors import UserError
from agcseg.nn.agc import transformed
from agcseg.nn.conv import ConvUnit
from agcseg.nn.fast import agc_unit
from agcseg.nn.hooks import has_hooks


class Cost(NamedTuple):
    """Of a unit, per position of the image: numbers of its output, and multiplications to compute it once."""

    unit: nn.Module | None  # None: nothing to compute again
    numbers: float
    work: float

    @classmethod
    def of(cls, unit: ConvUnit, scale: float, pooled: bool = False) -> "Cost":
        """`scale` is the share of the image's positions that the unit's convolution has."""
        filters = unit.conv.weight
        return cls(unit if unit.is_fast else None, len(filters) * scale / (4 if pooled else 1), filters.numel() * scale)


def choose(costs: Collection[Cost], budget: float) -> set[nn.Module]:
    """The units to compute again.

    Args:
        costs: of all convolutions, in any order.
        budget: the share of a step's multiplications that may be spent again, 0 to 1/3.

    Raises:
        UserError (a ValueError): `budget` is no such share.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 <= budget <= 1 / 3:
        raise UserError(f"recompute={budget!r} must be a share of a step's arithmetic, between 0 and 0.333")
    left, chosen = budget * 3 * sum(cost.work for cost in costs), set()
    candidates = [cost for cost in costs if cost.unit is not None]
    for unit, _, work in sorted(candidates, key=lambda cost: (cost.work / cost.numbers, -cost.numbers)):
        if unit is not None and work <= left:
            chosen.add(unit)
            left -= work
    return chosen


def can_rebuild(chosen: Collection[nn.Module], images: Tensor) -> bool:
    """Whether there is a backward to come, and torch lets us decide what it is given."""
    return (
        bool(chosen)
        and not images.is_meta
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not transformed()
    )


class _Output:
    """Of a chosen unit: alive as long as somebody reads it, then computed again when backward asks for it."""

    def __init__(self, maps: Tensor, call: Callable[[], Tensor]) -> None:
        self.maps, self.call = weakref.ref(maps), call
        self.again: Tensor | None = None
        self.packs = self.left = 0

    def get(self) -> Tensor:
        maps = self.maps()
        if maps is not None:
            return maps.detach()
        if self.again is None:
            self.again = self.call()
        return self.again

    def unpack(self) -> Tensor:
        """For one of those who keep it; when the last has it, it goes."""
        maps, self.left = self.get(), (self.left or self.packs) - 1
        if not self.left:
            self.again = None
        return maps


class _Kept:
    """What a chosen unit keeps: a tensor, until it is known whether it is the unit's output."""

    def __init__(self, tensor: Tensor) -> None:
        self.packed = tensor


@contextmanager
def rebuilding(chosen: Collection[nn.Module]) -> Iterator[Callable]:
    """A function that calls a unit with given arguments, and does not keep its output if it is one of those chosen.

    Units of which that is not known (hooked, noisy, exchanged) keep theirs after all. Whatever else runs within keeps
    what it does, and saved-tensor hooks around it still see that.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    keep, give = hooks if hooks else (_held, _unchanged)
    outputs: dict[int, _Output] = {}  # by address, while they live
    own: list[_Kept] | None = None  # of the unit that runs

    def pack(tensor):
        output = known(tensor)
        if output is not tensor:
            output.packs += 1
            return output
        if own is None:
            return keep(tensor)
        own.append(_Kept(tensor.detach()))
        return own[-1]

    def unpack(packed):
        if isinstance(packed, _Output):
            return packed.unpack()
        if not isinstance(packed, _Kept):
            return give(packed)
        return packed.packed.unpack() if isinstance(packed.packed, _Output) else give(packed.packed)

    def known(tensor):
        output = outputs.get(_address(tensor))
        return output if output is not None and _same(output.maps(), tensor) else tensor

    def run(unit, input, **options):
        nonlocal own
        if unit not in chosen or not _is_steady(unit, options.get("stem")):
            return unit(input, **options)
        own = []
        result = unit(input, **options)
        maps = result[0] if isinstance(result, tuple) else result
        address = _address(maps)
        given = tree_map_only(Tensor, known, (input, options))
        output = _Output(maps, _again(unit, maps.device.type, *given))
        for kept in own:
            if _same(maps, kept.packed):
                kept.packed = output
                output.packs += 1
            else:
                kept.packed = keep(kept.packed)
        own = None
        outputs[address] = output
        weakref.finalize(maps, outputs.pop, address, None)
        return result

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield run


def _again(unit: nn.Module, device: str, input, options: dict) -> Callable[[], Tensor]:
    """The unit's call once more, with the parameters that it has now: `functional_call` takes them back before backward
    runs."""
    autocast = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
    parameters = [parameter.detach() for parameter in unit.agc_parameters] if isinstance(unit, ConvUnit) else None
    if options.get("stem"):
        options = options | {"stem": tuple(parameter.detach() for parameter in options["stem"].agc_parameters)}
    tensors = [leaf for leaf in tree_leaves((input, options, parameters)) if isinstance(leaf, Tensor)]
    versions = [_version(tensor) for tensor in tensors]

    def call():
        for held in zip(tensors, versions, strict=True):
            _unchanged(held)
        maps, own = tree_map_only(_Output, _Output.get, (input, options))
        with torch.no_grad(), torch.autocast(device, cache_enabled=False, **autocast):
            result = agc_unit(maps, *parameters, **own) if parameters else unit(maps)
        return result[0] if isinstance(result, tuple) else result

    return call


def _is_steady(unit: nn.Module, stem: ConvUnit | None) -> bool:
    """Whether the unit gives the same whenever it is called with the same, and nobody sees that it is called twice."""
    if type(unit) is nn.Upsample:
        return not has_hooks(unit)
    units = [unit] if stem is None else [unit, stem]
    return all(isinstance(one, ConvUnit) and one.is_fast and one.is_called_as_made for one in units)


def _held(tensor: Tensor) -> tuple[Tensor, int | None]:
    """For a node to keep. Its own output would keep the node: memory that no one frees if backward never comes."""
    return tensor if tensor.is_leaf else tensor.detach(), _version(tensor)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _unchanged(held: tuple[Tensor, int | None]) -> Tensor:
    """What torch sees to where it keeps tensors itself."""
    tensor, version = held
    if _version(tensor) != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor "
            f"of shape {tuple(tensor.shape)} of a network that computes units again in backward"
        )
    return tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and _address(a) == _address(b) and a.shape == b.shape and a.stride() == b.stride()
