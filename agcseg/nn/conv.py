"""Convolution, normalisation and ReLU as one unit: the place where a norm may be fused with its convolution."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agcseg.nn.agc import AGC2d
from agcseg.nn.fast import Parameters, agc_unit
from agcseg.nn.hooks import has_forward_of_its_own, has_hooks
from agcseg.nn.pooling import max_pool2d, max_unpool2d

IMPLEMENTATIONS = ("fast", "literal")
KEEP_NO_OUTPUT = {  # modules with norms whose backward does not need their output, and torch's Identity
    *("agcseg.nn.agc", "agcseg.nn.background", "agcseg.nn.norms", "torch.nn.modules.linear"),
    *("torch.nn.modules.batchnorm", "torch.nn.modules.instancenorm", "torch.nn.modules.normalization"),
}


class StandardisedConv2d(nn.Conv2d):
    """A convolution by what `standardise` makes of its filters, behind their parametrisation or pruning."""

    def __init__(self, *args, standardise: Callable[[Tensor], Tensor], **options) -> None:
        super().__init__(*args, **options)
        self.standardise = standardise

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, self.standardise(weight), bias)


class ConvUnit(nn.Module):
    """Convolution (stride 1, output of the input's size) -> norm -> ReLU, with an unpooling in front, a pooling behind.

    With AGC all of it is one step of autograd (`agcseg.nn.fast`) that calls neither `conv` nor `norm` but reads their
    parameters, as long as these are a Conv2d and an AGC2d as made here, without hooks (`is_fast`). Every other norm, a
    part that was exchanged, wrapped, parametrised or hooked, and the literal form are torch's own operations one by
    one. The convolution has a bias only where there is no norm: a norm's own bias supplies it.

    Args:
        in_channels, out_channels, kernel_size: of the convolution; `kernel_size` is odd.
        norm: num_features -> module, or None for none. A module with a method `activate(maps)` does not get the ReLU;
            one with a method `standardise(filters)` has its convolution made so that it uses these.
        identity: the layer may start as the identity (`init="identity"`): it is not the first after a change of
            resolution. "last": on the last of its input channels, where they are more than its outputs.
        implementation: "fast", or "literal" for the paper's formula. Values, gradients, parameters and state_dict are
            the same; only the literal form has second derivatives.

    Raises:
        ValueError: `implementation` is neither, or `kernel_size` not odd.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        norm: Callable[[int], nn.Module] | None = AGC2d,
        identity: bool | str = False,
        implementation: str = "fast",
    ) -> None:
        super().__init__()
        self.conv: Any
        self.norm: Any
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
        if not isinstance(kernel_size, int) or kernel_size % 2 != 1:
            raise ValueError(f"kernel_size={kernel_size!r} must be one odd number")
        made: Any = norm(out_channels) if norm else nn.Identity()
        options: dict[str, Any] = {"padding": kernel_size // 2, "bias": norm is None}
        convolution: Any = nn.Conv2d
        if hasattr(made, "standardise"):
            convolution = partial(StandardisedConv2d, standardise=made.standardise)
        self.conv = convolution(in_channels, out_channels, kernel_size, **options)
        self.norm = made
        self.identity = identity
        self.implementation = implementation

    @property
    def is_fast(self) -> bool:
        """Whether the fast form computes what calls of `conv` and `norm` would."""
        return self.implementation == "fast" and self.is_plain

    @property
    def is_plain(self) -> bool:
        """Whether the unit is AGC behind a convolution as it was made: nothing exchanged, wrapped or hooked."""
        conv, norm = self.conv, self.norm
        return (
            type(norm) is AGC2d  # a subclass may mean something else
            and type(conv) is nn.Conv2d
            and conv.bias is None
            and (conv.stride, conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), (1, 1), 1, "zeros")
            and conv.kernel_size == 2 * conv.kernel_size[:1]
            and conv.kernel_size[0] % 2 == 1
            and conv.padding == (conv.kernel_size[0] // 2,) * 2
            and not (has_hooks(conv) or has_hooks(norm))
            and not (has_forward_of_its_own(conv) or has_forward_of_its_own(norm))
        )

    @property
    def is_called_as_made(self) -> bool:
        """Whether a call of the unit is its forward: no hooks, no forward of a subclass's or of its own."""
        return type(self) is ConvUnit and not (has_hooks(self) or has_forward_of_its_own(self))

    @property
    def agc_parameters(self) -> Parameters:
        """Filters, γ, β and λ, as `agc_unit` takes them."""
        return self.conv.weight, self.norm.weight, self.norm.bias, self.norm.mean_scale

    def forward(
        self,
        input: Tensor | Sequence[Tensor],
        unpool: Tensor | None = None,
        pool: bool = False,
        stem: "ConvUnit | None" = None,
        sum_up: bool = False,
        sums: Tensor | None = None,
    ) -> Tensor | tuple[Tensor | None, ...]:
        """
        Args:
            input: maps (N, C, H, W), or several that are concatenated over the channels.
            unpool: winners of an earlier pooling, to unpool `input` with first.
            pool: 2x2 max pooling behind the ReLU.
            stem: a unit to run in front; the fast form rebuilds its output in backward instead of keeping it.
            sum_up, sums: as `agc_unit`.

        Returns:
            (N, K, H', W'); with `pool` the pooled maps and the winners, for some unit's `unpool`; with `sum_up` sums of
            the maps too, or None.

        Raises:
            ValueError: the maps' channels are not the convolution's, or their sides are odd with `pool`.
        """
        if self.is_fast and (stem is None or (stem.is_fast and stem.is_called_as_made)):
            front = stem.agc_parameters if stem else None
            return agc_unit(input, *self.agc_parameters, unpool=unpool, pool=pool, stem=front, sum_up=sum_up, sums=sums)
        maps = input if isinstance(input, Tensor) else torch.cat(list(input), 1)
        if unpool is not None:
            maps = max_unpool2d(maps, unpool)
        if stem is not None:
            maps = stem(maps)
        maps = self.norm(self.conv(maps))
        if hasattr(self.norm, "activate"):
            maps = self.norm.activate(maps)
        else:  # a hook may have kept the maps, of the convolution too where the norm hands them on
            hooked = has_hooks(self.norm) or has_hooks(self.conv)
            maps = F.relu(maps, inplace=type(self.norm).__module__ in KEEP_NO_OUTPUT and not hooked)
        results = max_pool2d(maps) if pool else (maps,)
        if sum_up:
            return *results, None
        return results if pool else maps
