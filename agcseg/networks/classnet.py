"""ClassNet, the second network of Deep Control (Ruff 2017, section 3, ii). A reconstruction: it was never published.

The paper describes it in a few paragraphs of prose and its appendix is not public. What they leave open is decided
here, and listed in docs/choices.md; the layers' numbers below are ours.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from agcseg.errors import UserError
from agcseg.nn import AGC2d, ConvUnit
from agcseg.nn.rebuild import Cost, can_rebuild, choose, rebuilding

# Widths of the encoder's blocks, at 1/1, 1/2, ... 1/128 of the image's size, with 7 poolings between them.
WIDTHS = (32, 64, 128, 256, 256, 256, 256, 256)
# Kernel sizes in front of the 1x1 that ends a block. "shared": it also is the projection of the last 3x3.
ENCODER = {"shared": (3, 1, 3), "separate": (3, 1, 3, 1)}
DECODER = {"shared": (3,), "separate": (3, 1)}


class ClassNetOutput(NamedTuple):
    """Logits of one resolution.

    Attributes:
        classes: (N, K, H, W).
        contour: (N, 1, H, W), of a pixel lying on a border between instances.
        deep: the same of the coarser decoder stages, 1/2 to 1/128, in training with `deep_supervision`.
    """

    classes: Tensor
    contour: Tensor
    deep: tuple["ClassNetOutput", ...] = ()


def _call(unit: nn.Module, maps: Tensor | list[Tensor]) -> Tensor:
    return unit(maps)


class ClassNet(nn.Module):
    """56 convolutions with 5 to 48 of them between the image and the class logits, each with norm and ReLU.

    An encoder block is 3x3, 1x1, 3x3 and a 1x1 over the concatenation of these three; behind a pooling it also reads
    the image at its size. Every block has a lateral 1x1 to K class maps and `contour_width` contour maps, D together.
    A decoder stage doubles the D maps from below (nearest neighbour), joins the lateral ones, and is 3x3 and a 1x1
    over the concatenation of its inputs with that. Two heads of 1x1, with a bias and neither norm nor ReLU, give the
    logits. `encoder`, `lateral` and `decoder` have the finest resolution first.

    In the fast AGC form no concatenation is kept. At 128x128 the deepest map is a single pixel: mean subtraction
    leaves nothing of it, and instance normalisation, or batch normalisation of one image, is refused by torch.

    Args:
        num_classes: K.
        in_channels: channels of the input image.
        width: factor on the encoder's widths; 1 is the paper's "up to 256".
        norm: num_features -> module, or None for none.
        contour_width: contour maps in laterals and decoder (the paper's "NumClasses+10").
        final_projection: "shared", or "separate" for a 1x1 of its own behind the last 3x3 of a block as well (longest
            path 63).
        deep_supervision: in training, also give logits from the coarser decoder stages, by heads of their own.
        implementation: of the units, "fast" or "literal" (see `agcseg.nn.ConvUnit`).
        recompute: share of a step's arithmetic that may be spent again in backward, so that fewer maps are kept for it
            (fast AGC only, and not under torch.compile; see `agcseg.nn.rebuild`).

    Raises:
        UserError (a ValueError): an option is not one of these.
        ValueError: in `forward`, when the image's height or width is not a multiple of 128.
    """

    multiple = 128  # of which height and width must be multiples
    contour = True  # wants contours to train on
    order = ("encoder.", "lateral.", *(f"decoder.{i}." for i in reversed(range(7))), "head")  # image to classes

    def __init__(
        self,
        num_classes: int = 19,
        in_channels: int = 3,
        width: float = 1.0,
        norm: Callable[[int], nn.Module] | None = AGC2d,
        contour_width: int = 10,
        final_projection: str = "shared",
        deep_supervision: bool = False,
        implementation: str = "fast",
        recompute: float = 0.01,
    ) -> None:
        super().__init__()
        if final_projection not in ENCODER:
            raise UserError(f"final_projection={final_projection!r} is not known; choose from {', '.join(ENCODER)}")
        if not isinstance(contour_width, int) or contour_width < 0:
            raise UserError(f"contour_width={contour_width!r} must be a number of maps, 0 or more")
        unit = partial(ConvUnit, norm=norm, implementation=implementation)
        widths = [max(1, round(width * channels)) for channels in WIDTHS]
        inputs = [in_channels, *(channels + in_channels for channels in widths[:-1])]
        maps = num_classes + contour_width
        self.encoder = nn.ModuleList(
            _Block(channels, out, ENCODER[final_projection], unit) for channels, out in zip(inputs, widths, strict=True)
        )
        self.lateral = nn.ModuleList(unit(channels, maps, 1) for channels in widths)
        self.decoder = nn.ModuleList(
            _Block(2 * maps, maps, DECODER[final_projection], unit, inputs_too=True) for _ in widths[:-1]
        )
        self.head = _Head(maps, num_classes)
        self.deep_heads = nn.ModuleList(_Head(maps, num_classes) for _ in widths[1:] if deep_supervision)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.recompute = recompute

    @property
    def recompute(self) -> float:
        """Share of a step's arithmetic that backward may spend again, see `agcseg.nn.rebuild`."""
        return self._recompute

    @recompute.setter
    def recompute(self, budget: float) -> None:
        self._recompute, self._rebuilt = budget, choose(self._costs(), budget)

    def _costs(self) -> list[Cost]:
        costs = []
        for modules in (self.encoder, self.lateral, self.decoder, [self.head, *self.deep_heads]):
            for i, module in enumerate(modules):
                for part in module.modules():
                    if isinstance(part, ConvUnit):
                        costs.append(Cost.of(part, 4.0**-i))
                    elif isinstance(part, _Head):
                        costs.append(
                            Cost(None, 0, (part.classes.weight.numel() + part.contour.weight.numel()) * 4.0**-i)
                        )
        unit = self.lateral[0]
        if isinstance(unit, ConvUnit) and unit.is_fast:
            maps = len(unit.conv.weight)
            costs.append(Cost(self.upsample, maps, maps))
        return costs

    def forward(self, images: Tensor) -> ClassNetOutput:
        """Logits of images, (N, in_channels, H, W)."""
        if images.shape[-2] % self.multiple or images.shape[-1] % self.multiple:
            raise ValueError(
                f"ClassNet takes heights and widths in multiples of {self.multiple}; got {tuple(images.shape[-2:])}"
            )
        if not can_rebuild(self._rebuilt, images):
            return self._forward(images)
        with rebuilding(self._rebuilt) as run:
            return self._forward(images, run)

    def _forward(self, images: Tensor, run: Callable = _call) -> ClassNetOutput:
        laterals, inputs = [], (images,)
        for i, (block, lateral) in enumerate(zip(self.encoder, self.lateral, strict=True)):
            maps = block(*inputs, run=run)
            laterals.append(run(lateral, maps))
            if i + 1 < len(self.encoder):
                inputs = F.max_pool2d(maps, 2), F.avg_pool2d(images, 2 ** (i + 1))
        stages = [laterals.pop()]
        for stage in reversed(self.decoder):
            stages.append(stage(run(self.upsample, stages[-1]), laterals.pop(), run=run))
        finest = self.head(stages.pop())
        if not (self.training and self.deep_heads):
            return finest
        return finest._replace(deep=tuple(head(stages.pop()) for head in self.deep_heads))


class _Block(nn.Module):
    """Units in a row and a 1x1 over the concatenation of all they give (`inputs_too`: and of what the first reads)."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        kernels: tuple[int, ...],
        unit: Callable[..., ConvUnit],
        inputs_too: bool = False,
    ) -> None:
        super().__init__()
        self.inputs_too = inputs_too
        self.units = nn.ModuleList(
            unit(width if i else in_channels, width, kernel, identity=i > 0) for i, kernel in enumerate(kernels)
        )
        self.final = unit(inputs_too * in_channels + len(kernels) * width, width, 1, identity="last")

    def forward(self, *inputs: Tensor, run: Callable = _call) -> Tensor:
        gathered, maps = [*inputs] if self.inputs_too else [], inputs
        for unit in self.units:
            maps = run(unit, maps)
            gathered.append(maps)
        return run(self.final, gathered)


class _Head(nn.Module):
    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.classes = nn.Conv2d(in_channels, num_classes, 1)
        self.contour = nn.Conv2d(in_channels, 1, 1)

    def forward(self, maps: Tensor) -> ClassNetOutput:
        return ClassNetOutput(self.classes(maps), self.contour(maps))
