"""Minibatches, cut straight from the memory map or from the device."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from agcseg.data.cache import Cached

# Of ImageNet's images, in RGB; applied to values in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Split(NamedTuple):
    """The images a run uses, as they lie in the cache or, where they fit, on the device.

    Attributes:
        images: (n, 3, H, W) uint8.
        labels: (n, H, W) uint8, class numbers or 255.
        indices: (m,) int64, which of the n belong to this run.
        names: m names.
        contours: (n, H, W) uint8, 1 on borders between instances, where they are wanted.
        digest: of all that, see `Cached.digest`.
    """

    images: Tensor
    labels: Tensor
    indices: np.ndarray
    names: list[str]
    contours: Tensor | None = None
    digest: str = ""

    def __len__(self) -> int:
        return len(self.indices)


def choose(n: int, wanted: int | None, seed: int) -> np.ndarray:
    """Which `wanted` of n images a run uses: a seeded choice, the same for every run, in the data set's order."""
    if wanted is None or wanted >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).permutation(n)[:wanted])


def open_split(cached: Cached, indices: np.ndarray, device: torch.device, contours: bool = False) -> Split:
    """A split for training: on the device if that is CUDA and half of its free memory is enough, else left mapped.

    Its contours are opened only if they are wanted.
    """
    names, digest = [cached.names[i] for i in indices], cached.digest(indices, contours)
    parts = [cached.images, cached.labels, cached.contours][: 2 + contours]
    parts = [torch.from_numpy(part) for part in parts]
    if device.type == "cuda":
        needed = len(indices) * sum(part[0].nbytes for part in parts)
        if needed <= torch.cuda.mem_get_info(device)[0] / 2:
            parts = [part[indices].to(device) for part in parts]
            indices = np.arange(len(indices))
    images, labels, *borders = parts
    return Split(images, labels, indices, names, *borders, digest=digest)


def histogram(split: Split, num_classes: int) -> list[int]:
    """Labelled pixels of each class."""
    counts = torch.zeros(256, dtype=torch.int64)
    for i in split.indices:
        counts += torch.bincount(split.labels[int(i)].flatten(), minlength=256).cpu()
    return counts[:num_classes].tolist()


def minibatches(
    split: Split,
    minibatch: int,
    device: torch.device,
    shuffle: tuple[int, int] | None = None,
    flip: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, ...]]:
    """Yield (images (N, 3, H, W) float32 normalised, labels (N, H, W) uint8) on the device.

    Where the split has contours, a minibatch has a third part, contours (N, H, W) uint8.

    Args:
        minibatch: N.
        shuffle: (seed, epoch) for training: the order, and the flips, depend on these two numbers alone. The images
            left over at the end of an epoch, fewer than N, are dropped (others each time), so that every step has the
            rate that belongs to N. None for validation: in order, every image once, the last minibatch may be smaller.
        flip: mirror each image with probability 1/2.
        share: (k, n): give the k-th, (k+n)-th, ... image of each minibatch only, for one of n processes. Without
            shuffling, of all images.
    """
    order, flips = split.indices, None
    if shuffle is not None:
        generator = np.random.default_rng(shuffle)
        order = generator.permutation(order)[: len(order) // minibatch * minibatch]
        flips = generator.random(len(order)) < 0.5 if flip else None
    first, processes = share
    if shuffle is None:
        order, first, processes = order[first::processes], 0, 1
    on_device = split.images.device == device
    parts = [part for part in (split.images, split.labels, split.contours) if part is not None]
    for start in range(0, len(order), minibatch):
        chosen = torch.from_numpy(order[start : start + minibatch][first::processes])
        images, *truth = (part[chosen] for part in parts)
        if not on_device:
            images, *truth = (part.pin_memory().to(device, non_blocking=True) for part in (images, *truth))
        if flips is not None:
            mirrored = torch.from_numpy(flips[start : start + minibatch][first::processes]).to(device)
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
            truth = [torch.where(mirrored.view(-1, 1, 1), part.flip(-1), part) for part in truth]
        yield normalise(images), *truth


def normalise(images: Tensor) -> Tensor:
    """uint8 RGB images (N, 3, H, W) to the float32 values that networks are trained on: (x/255 - MEAN) / STD."""
    std = images.new_tensor(STD, dtype=torch.float32).view(3, 1, 1)
    mean = images.new_tensor(MEAN, dtype=torch.float32).view(3, 1, 1)
    return images.float().mul_(1 / (255 * std)).sub_(mean / std)
