"""Minibatches, cut straight from the memory map or from the device."""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from agcseg.data.augment import augmented
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
    """

    images: Tensor
    labels: Tensor
    indices: np.ndarray
    names: list[str]
    contours: Tensor | None = None

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
    names = [cached.names[i] for i in indices]
    parts = [cached.images, cached.labels, cached.contours][: 2 + contours]
    parts = [torch.from_numpy(part) for part in parts]
    if device.type == "cuda":
        needed = len(indices) * sum(part[0].nbytes for part in parts)
        if needed <= torch.cuda.mem_get_info(device)[0] / 2:
            parts = [part[indices].to(device) for part in parts]
            indices = np.arange(len(indices))
    images, labels, *borders = parts
    return Split(images, labels, indices, names, borders[0] if borders else None)


def histogram(split: Split, num_classes: int) -> list[int]:
    """Labelled pixels of each class."""
    counts = torch.zeros(256, dtype=torch.int64)
    for rows in torch.from_numpy(split.indices).split(64):  # bincount waits for the device
        counts += torch.bincount(split.labels[rows].flatten(), minlength=256).cpu()
    return counts[:num_classes].tolist()


def minibatches(
    split: Split,
    minibatch: int,
    device: torch.device,
    shuffle: tuple[int, int] | None = None,
    flip: bool = False,
    share: tuple[int, int] = (0, 1),
    augment: Callable | None = None,
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
        augment: what is done to each image of a shuffled minibatch, see `agcseg.data.augment`.
    """
    order, places, flips = split.indices, np.arange(len(split)), None
    if shuffle is not None:
        generator = np.random.default_rng(shuffle)
        places = generator.permutation(places)[: len(order) // minibatch * minibatch]
        order = order[places]
        flips = generator.random(len(order)) < 0.5 if flip else None
    first, processes = share
    if shuffle is None:
        order, first, processes = order[first::processes], 0, 1
    steps = [slice(start + first, start + minibatch, processes) for start in range(0, len(order), minibatch)]
    parts = [part for part in (split.images, split.labels, split.contours) if part is not None]
    constants = [_sent(constant, device) for constant in normalisation()]
    mirrored = None if flips is None else _sent(torch.from_numpy(flips).view(-1, 1, 1), device)
    chosen = torch.from_numpy(order)
    if split.images.device.type == device.type:
        chosen = _sent(chosen, device)  # all at once: an index from the CPU would wait for the device in every step
        loaded = ([part[chosen[step]] for part in parts] for step in steps)
    else:
        loaded = read_ahead(parts, [chosen[step] for step in steps], device)
    with contextlib.closing(loaded):
        for step, (images, *truth) in zip(steps, loaded, strict=True):
            if mirrored is not None:
                images = torch.where(mirrored[step].unsqueeze(1), images.flip(-1), images)
                truth = [torch.where(mirrored[step], part.flip(-1), part) for part in truth]
            if augment is not None and shuffle is not None:
                images, *truth = augmented(augment, shuffle, places[step], images, *truth)
            yield normalise(images, constants), *truth


def read_ahead(parts: list[Tensor], steps: list[Tensor], device: torch.device) -> Generator[list[Tensor], None, None]:
    """Yield the rows `steps[0]`, `steps[1]`, ... of each part on the device, while a thread reads the next ones.

    They pass through two buffers in pinned memory in turn, so that neither this thread nor the device waits for a file
    that is read or for a copy that is made. What the thread raises is raised here.
    """
    pinned = device.type == "cuda"
    longest = max(map(len, steps), default=0)
    free: queue.SimpleQueue = queue.SimpleQueue()
    filled: queue.SimpleQueue = queue.SimpleQueue()
    for _ in range(2):
        buffers = [torch.empty(longest, *part.shape[1:], dtype=part.dtype, pin_memory=pinned) for part in parts]
        free.put((buffers, torch.cuda.Event(blocking=True) if pinned else None))

    def read() -> None:
        try:
            for rows in steps:
                buffers, copied = free.get()
                if buffers is None:
                    return
                if copied:
                    copied.synchronize()  # the device may still read what the buffers hold
                for part, buffer in zip(parts, buffers, strict=True):
                    torch.index_select(part, 0, rows, out=buffer[: len(rows)])
                filled.put((buffers, copied))
        except BaseException as error:  # whatever it is, the other thread must hear of it
            filled.put((error, None))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        for rows in steps:
            buffers, copied = filled.get()
            if isinstance(buffers, BaseException):
                raise buffers
            sent = [buffer[: len(rows)].to(device, non_blocking=True, copy=True) for buffer in buffers]
            if copied:
                copied.record()
            free.put((buffers, copied))
            yield sent
    finally:
        free.put((None, None))
        reader.join()


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def normalisation() -> tuple[Tensor, Tensor]:
    """Factor and subtrahend of `normalise`, (3, 1, 1) each."""
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (STD, MEAN))
    return 1 / (255 * std), mean / std


def normalise(images: Tensor, constants: Sequence[Tensor] | None = None) -> Tensor:
    """uint8 RGB images (N, 3, H, W) to the float32 values that networks are trained on: (x/255 - MEAN) / STD.

    Args:
        constants: `normalisation()` on the device of `images`, where it was sent once for many of them.
    """
    factor, subtrahend = constants or [constant.to(images.device) for constant in normalisation()]
    return images.float().mul_(factor).sub_(subtrahend)
