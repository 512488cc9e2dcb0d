"""SegNet with pooling indices (Badrinarayanan, Kendall, Cipolla 2015) as Deep Control uses it (section 3, i)."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from agcseg.errors import UserError
from agcseg.nn import AGC2d, ConvUnit
from agcseg.nn.rebuild import Cost, can_rebuild, choose, rebuilding

# VGG16's 13 convolutions. The paper lists 12 widths for 13 layers; exactly one 512 is missing there.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class SegNet(nn.Module):
    """26 convolutions of 3x3: five encoder stages, each ended by a 2x2 max pooling, and their mirror image.

    Each decoder stage starts by unpooling with the indices of its encoder stage and narrows in its last convolution,
    so that every unpooling finds the width of its pooling. The last convolution is the classifier: it has a bias and
    neither norm nor ReLU, unless `head_norm`.

    Args:
        num_classes: K.
        in_channels: channels of the input image.
        width: factor on all widths; 1 is the paper's network.
        norm: num_features -> module, or None for none.
        head_norm: put the norm behind the classifier too.
        implementation: of the units, "fast" or "literal" (see `agcseg.nn.ConvUnit`).
        recompute: share of a step's arithmetic that may be spent again in backward, so that fewer of the units' outputs
            are kept for it (fast AGC only; see `agcseg.nn.rebuild`). Whatever is more than 0 buys the first unit's, the
            largest map of the encoder for the cheapest of its convolutions (0.001 at width 1). The others' are kept
            under torch.compile.

    Raises:
        UserError (a ValueError): `recompute` is not such a share, or `head_norm` wants a norm that acts on filters.
        ValueError: in `forward`, when the image's height or width is not a multiple of 32.
    """

    multiple = 32  # of which height and width must be multiples
    contour = False  # wants no contours to train on
    order = ("encoder.", "decoder.", "head")  # from the image to the classes

    def __init__(
        self,
        num_classes: int = 19,
        in_channels: int = 3,
        width: float = 1.0,
        norm: Callable[[int], nn.Module] | None = AGC2d,
        head_norm: bool = False,
        implementation: str = "fast",
        recompute: float = 0.001,
    ) -> None:
        super().__init__()
        unit = partial(ConvUnit, norm=norm, implementation=implementation)
        stages = [[max(1, round(width * channels)) for channels in stage] for stage in STAGES]
        self.encoder = nn.ModuleList()
        channels = in_channels
        for stage in stages:
            self.encoder.append(_stage(channels, stage, unit))
            channels = stage[-1]
        self.decoder = nn.ModuleList()
        for stage, below in zip(reversed(stages), [*reversed(stages[:-1]), None], strict=True):
            mirrored = stage[:-1] + ([below[-1]] if below else [])
            self.decoder.append(_stage(channels, mirrored, unit))
            channels = mirrored[-1]
        self.head = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.head_norm = norm(num_classes) if head_norm and norm else nn.Identity()
        if hasattr(self.head_norm, "standardise"):
            raise UserError(
                f"head_norm=true: {type(self.head_norm).__name__} acts on filters, and the classifier keeps its own"
            )
        self.recompute = recompute

    @property
    def recompute(self) -> float:
        """Share of a step's arithmetic that backward may spend again, see `agcseg.nn.rebuild`."""
        return self._recompute

    @recompute.setter
    def recompute(self, budget: float) -> None:
        self._recompute, self._rebuilt = budget, choose(self._costs(), budget)
        stage: Any = self.encoder[0]
        self._stem = bool(budget) and stage[0].is_fast  # of a narrow network it costs more, and is worth it still
        self._rebuilt.discard(stage[0])  # by the second unit

    def _costs(self) -> list[Cost]:
        costs = []
        for i, stage in enumerate([*self.encoder, *reversed(self.decoder)]):
            for unit in stage:
                pooled = i < len(self.encoder) and unit is stage[-1]
                costs.append(Cost.of(unit, 4.0 ** -(i % len(self.encoder)), pooled))
        return [*costs, Cost(None, 0, self.head.weight.numel())]

    def forward(self, images: Tensor) -> Tensor:
        """Class logits, (N, K, H, W), of images, (N, in_channels, H, W)."""
        if images.shape[-2] % self.multiple or images.shape[-1] % self.multiple:
            raise ValueError(
                f"SegNet takes heights and widths in multiples of {self.multiple}; got {tuple(images.shape[-2:])}"
            )
        if not can_rebuild(self._rebuilt, images):
            return self._forward(images)
        with rebuilding(self._rebuilt) as run:
            return self._forward(images, run)

    def _forward(self, maps: Tensor, run: Callable | None = None) -> Tensor:
        pooled, sums = [], None
        for stage in self.encoder:
            maps, winners, sums = stage(maps, sums, pool=True, stem=self._stem and stage is self.encoder[0], run=run)
            pooled.append(winners)
        for stage in self.decoder:
            maps, _, sums = stage(maps, sums, unpool=pooled.pop(), run=run)
        return self.head_norm(self.head(maps))


class _Stage(nn.Sequential):
    """Units at one resolution, an unpooling in front of the first, a pooling behind the last."""

    def forward(
        self,
        maps: Tensor,
        sums: Tensor | None = None,
        unpool: Tensor | None = None,
        pool: bool = False,
        stem: bool = False,
        run: Callable | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The maps, the winners of the pooling, the sums of the maps: what there is none of is None."""
        first, *units = self if stem else (None, *self)
        winners = None
        for i, unit in enumerate(units):
            options: dict[str, Any] = {"unpool": unpool, "stem": first} if i == 0 else {}
            options["pool"] = pool and i == len(units) - 1
            if maps.is_cuda:  # only there sums serve the unit behind
                options |= {"sum_up": True, "sums": sums}
            result = run(unit, maps, **options) if run else unit(maps, **options)
            maps, *others = result if isinstance(result, tuple) else (result,)
            sums = others.pop() if maps.is_cuda else None
            winners = others[0] if others else None
        return maps, winners, sums


def _stage(in_channels: int, widths: list[int], unit: Callable[..., ConvUnit]) -> _Stage:
    channels = [in_channels, *widths]
    return _Stage(*(unit(channels[i], channels[i + 1], identity=i > 0) for i in range(len(widths))))
