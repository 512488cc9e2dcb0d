"""SegNet with pooling indices (Badrinarayanan, Kendall, Cipolla 2015) as Deep Control uses it (section 3, i)."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from agcseg.nn import AGC2d, ConvUnit

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
        recompute: rebuild the first unit's output in backward instead of keeping it (fast form only): the largest map
            of the encoder for the cheapest of its convolutions.

    Raises:
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
        recompute: bool = True,
    ) -> None:
        super().__init__()
        self.recompute = recompute
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

    def forward(self, images: Tensor) -> Tensor:
        """Class logits, (N, K, H, W), of images, (N, in_channels, H, W)."""
        if images.shape[-2] % self.multiple or images.shape[-1] % self.multiple:
            raise ValueError(f"SegNet takes heights and widths in multiples of 32; got {tuple(images.shape[-2:])}")
        maps, pooled = images, []
        for i, stage in enumerate(self.encoder):
            maps, winners = stage(maps, pool=True, recompute=self.recompute and i == 0)
            pooled.append(winners)
        for stage in self.decoder:
            maps = stage(maps, unpool=pooled.pop())
        return self.head_norm(self.head(maps))


class _Stage(nn.Sequential):
    """Units at one resolution, an unpooling in front of the first, a pooling behind the last."""

    def forward(
        self, maps: Tensor, unpool: Tensor | None = None, pool: bool = False, recompute: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        stem, *units = self if recompute else (None, *self)
        for i, unit in enumerate(units):
            first, last = i == 0, i == len(units) - 1
            maps = unit(maps, unpool=unpool if first else None, pool=pool and last, stem=stem if first else None)
        return maps


def _stage(in_channels: int, widths: list[int], unit: Callable[..., ConvUnit]) -> _Stage:
    channels = [in_channels, *widths]
    return _Stage(*(unit(channels[i], channels[i + 1], identity=i > 0) for i in range(len(widths))))
