"""What a reader of one data set's layout offers, and the check of its files."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from agcseg.data.labels import UNKNOWN, Classes
from agcseg.errors import UserError

SPLITS = ("train", "val")


class Sample(NamedTuple):
    """The files of one image. `instance` is None where a data set has no instances."""

    name: str
    image: Path
    label: Path
    instance: Path | None


class Layout(NamedTuple):
    """A data set's layout.

    Attributes:
        name: what `data=` calls it.
        title: what people call it.
        classes: its class table.
        scan: (root, split) -> sorted samples, and one line for each file or folder that is missing.
        tree: the expected tree as text, with {root} for the root.
        source: where the files come from.
        expected: number of images per split, or None if any number will do.
        image_size: (height, width) of every image, or None if they may vary.
    """

    name: str
    title: str
    classes: Classes
    scan: Callable[[Path, str], tuple[list[Sample], list[str]]]
    tree: str
    source: str
    expected: dict[str, int] | None
    image_size: tuple[int, int] | None


def list_samples(layout: Layout, root: Path, split: str) -> list[Sample]:
    """The samples of one split, for training.

    Raises:
        UserError: anything is missing; it says what was looked for, what the tree should look like and where it comes
            from.
    """
    samples, problems = layout.scan(root, split)
    if problems:
        raise UserError(not_found(layout, root, problems))
    return samples


def not_found(layout: Layout, root: Path, problems: list[str]) -> str:
    """The whole explanation for someone whose data set is not where we looked."""
    shown = "\n".join(f"  {line}" for line in problems[:5])
    more = f"\n  and {len(problems) - 5} more: agcseg-data lists them all" if len(problems) > 5 else ""
    tree = "\n".join(f"  {line}" for line in layout.tree.format(root=root).splitlines())
    return (
        f"{layout.title} was looked for in {root.absolute()} (data.root), and is not complete there:\n{shown}{more}\n"
        f"The tree should look like this:\n{tree}\n"
        f"Source: {layout.source}.\n"
        "Give the folder with data.root=FOLDER. To train on built-in data instead: agcseg-train experiment=demo"
    )


def load(sample: Sample, layout: Layout) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """Decode one sample completely.

    Returns:
        the image (RGB), its labels, (height, width) uint8 class numbers or 255, and its instances, integers of the same
        shape: the labels again where the data set has none.

    Raises:
        UserError: a file is missing, truncated, of the wrong size or holds numbers that are not labels; it names the
            file.
    """
    image = decode(sample.image).convert("RGB")
    if layout.image_size and (image.height, image.width) != layout.image_size:
        raise UserError(f"{sample.image}: {_size(image)}, expected {layout.image_size[0]}x{layout.image_size[1]}")
    label = decode(sample.label)
    _check_size(sample.label, label, image)
    if label.mode not in ("L", "P"):
        raise UserError(
            f"{sample.label}: mode {label.mode}, expected one 8-bit channel of label ids (is this the colour picture?)"
        )
    labels = layout.classes.lookup()[np.asarray(label)]
    if (labels == UNKNOWN).any():
        numbers = sorted(set(np.asarray(label)[labels == UNKNOWN].tolist()))
        raise UserError(f"{sample.label}: holds {_few(numbers)}, which are no label ids of {layout.title}")
    if sample.instance is None:
        return image, labels, labels
    instance = decode(sample.instance)
    _check_size(sample.instance, instance, image)
    if not instance.mode.startswith("I"):
        raise UserError(f"{sample.instance}: mode {instance.mode}, expected one 16-bit channel of instance ids")
    return image, labels, np.asarray(instance)


def check(samples: list[Sample], layout: Layout, progress: Callable[[Iterable], Iterable] = iter) -> list[str]:
    """Decode every sample, and give one line for each that is wrong. All of them, not the first."""

    def problem(sample: Sample) -> str | None:
        try:
            load(sample, layout)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(cpu_count()) as pool:
        return [line for line in progress(pool.map(problem, samples)) if line]


def decode(path: Path) -> Image.Image:
    """Read a whole picture.

    Raises:
        UserError: it is missing, truncated, not an image, or larger than Pillow thinks sane; it names the file.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's ways to say so
        raise UserError(f"{path}: cannot be decoded, truncated or not an image ({error})") from None


def _check_size(path: Path, picture: Image.Image, image: Image.Image) -> None:
    if picture.size != image.size:
        raise UserError(f"{path}: {_size(picture)}, but its image is {_size(image)}")


def _size(picture: Image.Image) -> str:
    return f"{picture.height}x{picture.width}"


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
