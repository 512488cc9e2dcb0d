"""Training images drawn anew in every epoch: larger or smaller, cut out, mirrored, in other colours.

What happens to an image depends on the seed, the epoch and its place in the data set alone, so that a run that goes on,
several processes and parts of a minibatch get the same pictures. It happens on the device, to pixels (uint8), by
torchvision.transforms.v2, which is imported where it is used only: that takes as long as importing torch.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from agcseg.data.labels import IGNORE

PADDING = (124, 116, 104)  # about the mean colour, which becomes 0


def transform(
    size: tuple[int, int],
    scale: Sequence[float] = (1.0, 1.0),
    crop: Sequence[int] | None = None,
    flip: float = 0.0,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> Callable | None:
    """What is done to every image: colours first, the rest in the order of the arguments.

    Args:
        size: (height, width) of the images.
        scale: smallest and largest factor on it.
        crop: (height, width) cut out at a random place; None for `size`. What lies beyond the image has the mean
            colour, no label and no contour.
        flip: probability of mirroring left and right.
        brightness, contrast, saturation, hue: how far each may change, as `torchvision.transforms.v2.ColorJitter` says.

    Returns:
        a `v2.Compose`, None if that is nothing.
    """
    from torchvision import tv_tensors
    from torchvision.transforms import InterpolationMode, v2

    class ScaleJitter(v2.ScaleJitter):
        def transform(self, inpt, params):
            if not isinstance(inpt, tv_tensors.Mask):
                return super().transform(inpt, params)
            # torchvision's own for masks is "nearest", which lies up to half a pixel beside the image
            exact = InterpolationMode.NEAREST_EXACT
            resized = v2.functional.resize_image(inpt.as_subclass(Tensor)[None], params["size"], exact)
            return tv_tensors.wrap(resized[0], like=inpt)

    steps: list[v2.Transform] = []
    if brightness or contrast or saturation or hue:
        steps.append(v2.ColorJitter(brightness, contrast, saturation, hue))
    if tuple(scale) != (1, 1):
        side = max(size)  # a square: of another shape it depends on the version which number is the height
        steps.append(ScaleJitter((side, side), tuple(scale), antialias=True))
    if tuple(scale) != (1, 1) or crop:
        fill = {tv_tensors.Image: PADDING, tv_tensors.Mask: IGNORE}
        steps.append(v2.RandomCrop(tuple(crop or size), pad_if_needed=True, fill=fill))
    if flip:
        steps.append(v2.RandomHorizontalFlip(flip))
    return v2.Compose(steps) if steps else None


def augmented(
    how: Callable, drawn: tuple[int, int], places: Iterable[int], images: Tensor, *truth: Tensor
) -> list[Tensor]:
    """A minibatch after `transform`.

    Args:
        how: of `transform`.
        drawn: seed and epoch.
        places: of the images in the data set.
        images: (N, 3, H, W) uint8.
        truth: labels, and where there are any contours, (N, H, W) uint8: resized to the nearest pixel.

    Returns:
        images, and truth, of the size of the crop.
    """
    from torchvision import tv_tensors

    made = []
    with torch.random.fork_rng(devices=[]):  # transforms draw from the CPU's generator
        for place, image, *labels in zip(places, images, *truth, strict=True):
            seed = np.random.SeedSequence([*drawn, int(place)]).generate_state(1, np.uint64).item()
            torch.default_generator.manual_seed(seed)
            made.append(how(tv_tensors.Image(image), *map(tv_tensors.Mask, labels)))
    images, *truth = (torch.stack([part.as_subclass(Tensor) for part in parts]) for parts in zip(*made, strict=True))
    contours = [part.where(part != IGNORE, 0) for part in truth[1:]]
    return [images, *truth[:1], *contours]
