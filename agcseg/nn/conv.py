"""Convolution, normalisation and ReLU as one unit: the place where a norm may be fused with its convolution."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from agcseg.nn.agc import AGC2d, agc_conv2d


class ConvUnit(nn.Module):
    """Convolution (stride 1, output of the input's size) -> norm -> ReLU.

    With AGC the gain is folded into the filters (`agc_conv2d`); every other norm runs as it is. The convolution has a
    bias only where there is no norm: a norm's own bias supplies it.

    Args:
        in_channels, out_channels, kernel_size: of the convolution; `kernel_size` is odd.
        norm: num_features -> module, or None for none.
        identity: the layer may start as the identity (`init="identity"`): it is not the first after a change of
            resolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        norm: Callable[[int], nn.Module] | None = AGC2d,
        identity: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=norm is None)
        self.norm = norm(out_channels) if norm else nn.Identity()
        self.identity = identity

    def forward(self, input: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        if isinstance(norm, AGC2d):
            output = agc_conv2d(input, conv.weight, norm.weight, norm.bias, norm.mean_scale, conv.stride, conv.padding)
        else:
            output = norm(conv(input))
        return F.relu(output, inplace=True)
