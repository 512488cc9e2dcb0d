"""Every image decoded and resized once, into a memory map that all runs share."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
from PIL import Image

from agcseg.data.labels import IGNORE
from agcseg.data.layout import Layout, Sample, load
from agcseg.errors import UserError

VERSION = 2  # of what is written; a new number leaves old caches unused


class Cached(NamedTuple):
    """One split at training size.

    Attributes:
        folder: where it lies.
        images: (n, 3, H, W) uint8, RGB.
        labels: (n, H, W) uint8, class numbers or 255.
        contours: (n, H, W) uint8, 1 on the borders between instances (see `contours`).
        names: n names.
    """

    folder: Path
    images: np.memmap
    labels: np.memmap
    contours: np.memmap
    names: list[str]


def open_cache(
    layout: Layout,
    samples: list[Sample],
    size: tuple[int, int],
    cache_dir: Path,
    split: str,
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
    say: Callable[[str], None] = print,
) -> Cached:
    """Open the memory map of these samples, and build it first if it is not there.

    Images are resized by Pillow's bilinear filter (antialiased: its support grows with the reduction), labels and
    instances by the nearest neighbour. The folder's name holds a hash of the file list with sizes and times, of the
    training size and of the class table, so changed data are never taken for old ones. A build runs under a lock,
    writes beside the place and is renamed at the end: two processes share one build, and a killed one leaves nothing
    that is taken for whole.

    Args:
        size: (height, width) of training.
        progress: wraps the iteration over the samples; gets their number too.

    Raises:
        UserError: files that cannot be used, all of them by name; or too little space on the disk.
    """
    digest = _digest(layout, samples, size)
    folder = cache_dir / f"{layout.name}-{split}-{size[0]}x{size[1]}-{digest[:16]}"
    if not folder.is_dir():
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(f"{folder}.lock")
            try:
                lock.acquire(blocking=False)
            except filelock.Timeout:
                say(f"waiting for another process that builds {folder}")
                lock.acquire()
            try:
                if not folder.is_dir():
                    _build(layout, samples, size, folder, progress)
            finally:
                lock.release()
        except OSError as error:
            raise not_writable(error, cache_dir) from None
    return Cached(
        folder,
        # copy-on-write, so that torch sees a writable array and nobody can change the file
        np.load(folder / "images.npy", mmap_mode="c"),
        np.load(folder / "labels.npy", mmap_mode="c"),
        np.load(folder / "contours.npy", mmap_mode="c"),
        json.loads((folder / "names.json").read_text()),
    )


def not_writable(error: OSError, cache_dir: Path) -> UserError:
    return UserError(
        f"{error.filename or cache_dir}: cannot be written ({error.strerror or error}); give another folder with "
        "data.cache_dir="
    )


def _digest(layout: Layout, samples: list[Sample], size: tuple[int, int]) -> str:
    files = [
        (str(path.absolute()), stat.st_size, stat.st_mtime_ns)
        for sample in samples
        for path in (sample.image, sample.label, sample.instance)
        if path
        for stat in (path.stat(),)
    ]
    key = [VERSION, layout.name, sorted(layout.classes.from_file.items()), size, files]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def _build(layout: Layout, samples: list[Sample], size: tuple[int, int], folder: Path, progress) -> None:
    height, width = size
    needed = len(samples) * 5 * height * width
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise UserError(
            f"{folder.parent}: the cache needs {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free; "
            "give another folder with data.cache_dir="
        )
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a build that was killed: we hold the lock
    temporary.mkdir()
    try:
        images = _new(temporary / "images.npy", (len(samples), 3, height, width))
        labels = _new(temporary / "labels.npy", (len(samples), height, width))
        borders = _new(temporary / "contours.npy", (len(samples), height, width))

        def convert(i: int) -> str | None:
            try:
                image, *truth = load(samples[i], layout)
            except UserError as error:
                return str(error)
            images[i] = resize_image(image, size)
            labels[i], instances = (resize_truth(part, size) for part in truth)
            borders[i] = contours(labels[i], instances)
            return None

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            problems = [line for line in progress(pool.map(convert, range(len(samples))), len(samples)) if line]
        if problems:
            raise UserError(f"{len(problems)} of {len(samples)} samples cannot be used:\n  " + "\n  ".join(problems))
        for written in (images, labels, borders):
            written.flush()
        (temporary / "names.json").write_text(json.dumps([sample.name for sample in samples]))
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def resize_image(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """An RGB image at (height, width), by Pillow's bilinear filter with antialiasing; (3, height, width) uint8."""
    return np.ascontiguousarray(np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR)).transpose(2, 0, 1))


def resize_truth(truth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Labels or instances at (height, width), by the nearest neighbour."""
    return np.asarray(Image.fromarray(truth).resize(size[::-1], Image.Resampling.NEAREST))


def contours(labels: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """Where a labelled pixel has a labelled neighbour (of four) of another instance.

    Both sides of a border are marked, so it is two pixels wide; a border to unlabelled pixels is none. In Cityscapes
    what is no instance has its label id there, so borders between classes count too.

    Args:
        labels: (H, W) class numbers or 255.
        instances: (H, W) integers.

    Returns:
        (H, W) bool.
    """
    valid, marked = labels != IGNORE, np.zeros(labels.shape, dtype=bool)
    for one, other in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        border = (instances[one] != instances[other]) & valid[one] & valid[other]
        marked[one] |= border
        marked[other] |= border
    return marked


def _new(path: Path, shape: tuple[int, ...]) -> np.memmap:
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
