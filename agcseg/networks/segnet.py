"""SegNet with pooling indices (Badrinarayanan, Kendall, Cipolla 2015) as Deep Control uses it (section 3, i)."""

from collections.abc import Callable

from torch import Tensor, nn

from agcseg.nn import AGC2d, ConvUnit, max_pool2d, max_unpool2d

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

    Raises:
        ValueError: in `forward`, when the image's height or width is not a multiple of 32.
    """

    multiple = 32  # of which height and width must be multiples

    def __init__(
        self,
        num_classes: int = 19,
        in_channels: int = 3,
        width: float = 1.0,
        norm: Callable[[int], nn.Module] | None = AGC2d,
        head_norm: bool = False,
    ) -> None:
        super().__init__()
        stages = [[max(1, round(width * channels)) for channels in stage] for stage in STAGES]
        self.encoder = nn.ModuleList()
        channels = in_channels
        for stage in stages:
            self.encoder.append(_stage(channels, stage, norm))
            channels = stage[-1]
        self.decoder = nn.ModuleList()
        for stage, below in zip(reversed(stages), [*reversed(stages[:-1]), None], strict=True):
            mirrored = stage[:-1] + ([below[-1]] if below else [])
            self.decoder.append(_stage(channels, mirrored, norm))
            channels = mirrored[-1]
        self.head = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.head_norm = norm(num_classes) if head_norm and norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Class logits, (N, K, H, W), of images, (N, in_channels, H, W)."""
        if images.shape[-2] % self.multiple or images.shape[-1] % self.multiple:
            raise ValueError(f"SegNet takes height and width in multiples of 32; got {tuple(images.shape[-2:])}")
        maps, pooled = images, []
        for stage in self.encoder:
            maps, indices = max_pool2d(stage(maps))
            pooled.append(indices)
        for stage in self.decoder:
            maps = stage(max_unpool2d(maps, pooled.pop()))
        return self.head_norm(self.head(maps))


def _stage(in_channels: int, widths: list[int], norm: Callable[[int], nn.Module] | None) -> nn.Sequential:
    units = []
    for i, out_channels in enumerate(widths):
        units.append(ConvUnit(in_channels, out_channels, norm=norm, identity=i > 0))
        in_channels = out_channels
    return nn.Sequential(*units)
