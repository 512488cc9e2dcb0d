"""Where the files of a data set lie, as patterns; listing, reading and checking them."""

import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from agcseg.data.labels import IGNORE, UNKNOWN, Classes, packed, unpacked
from agcseg.data.masks import check_palette, mixed
from agcseg.data.pictures import (
    each,
    is_picture,
    left_out,
    list_files,
    numbers_of,
    open_picture,
    read_image,
    read_numbers,
)
from agcseg.errors import FileError, UserError, by_cause

SPLITS = ("train", "val")


class Sample(NamedTuple):
    """The files of one image. `instance` is None where a data set has no instances."""

    name: str
    image: Path
    label: Path
    instance: Path | None


class Layout(NamedTuple):
    """A data set: what its classes are, and where its files lie.

    Patterns are paths below the root. In them {split} stands for the split, {name} and * for any part of a file's or
    folder's name, and **/ for any folders or none. An image and its label agree in all these parts; or in {name} alone,
    where their patterns have others. A pattern without a suffix takes every kind of picture, one with a suffix takes it
    in upper and lower case.

    Attributes:
        name: what `data=` calls it.
        title: what people call it.
        classes: its class table.
        images, labels, instances: patterns; None for no instances.
        tree: the expected tree as text, with {root} for the root.
        source: where the files come from.
        expected: number of images per split of the whole data set, or None if any number will do.
        image_size: (height, width) of every image, or None if they may vary.
        instance_divisor: d, if an instance's number from d on, divided by d, is its label's number (and below d is that
            number itself); None if nothing is known.
        archives: that the images, and the labels, come with, or empty.
        splits: what a split is called in the patterns, where it has another name there.
    """

    name: str
    title: str
    classes: Classes
    images: str
    labels: str
    tree: str
    source: str
    instances: str | None = None
    expected: dict[str, int] | None = None
    image_size: tuple[int, int] | None = None
    instance_divisor: int | None = None
    archives: tuple[str, ...] = ()
    splits: dict[str, str] = {}  # never changed


class Listing(NamedTuple):
    """The samples of a split, by name, with their instances where they have any; and everything that is missing.

    Attributes:
        problems: one for each folder or file that is missing or stands twice.
        no_instance: the same for instances.
        unused: files among the images that are none.
    """

    samples: list[Sample]
    problems: list[UserError]
    no_instance: list[UserError]
    unused: list[Path]


OPEN = re.compile(r"(\{name\}|\*\*/|\*)")  # what a pattern leaves open


def scan(layout: Layout, root: Path, split: str) -> Listing:
    """List one split.

    Raises:
        UserError: a folder cannot be read.
    """
    named = layout.splits.get(split, split)
    patterns = {"images": layout.images, "labels": layout.labels, "instances": layout.instances}
    patterns = {what: pattern.replace("{split}", named) for what, pattern in patterns.items() if pattern}
    whole = len({tuple(OPEN.findall(pattern)) for pattern in patterns.values()}) == 1
    comes = {
        what: f" (it comes with {archive})"
        for what, archive in zip(patterns, layout.archives + layout.archives[1:], strict=False)
    }
    problems: list[UserError] = []
    found, unused = {}, []
    for what, pattern in patterns.items():
        folder = root / fixed(pattern)
        if folder.is_dir():
            found[what], twice, others = _find(root, pattern, whole)
            problems += twice
            unused += others if what == "images" else []
        else:
            hint = _elsewhere(root, pattern) or _without_splits(layout, root) * (what == "images")
            problems.append(UserError(f"{folder}: no such folder{comes.get(what, '')}{hint}"))
    if not {"images", "labels"} <= found.keys():
        return Listing([], problems, [], unused)
    if not found["images"]:
        fault = f"holds no {_shown(patterns['images'])}{comes.get('images', '')}"
        problems.append(UserError(f"{root / fixed(patterns['images'])}: {fault}"))

    def missing(what: str, key: tuple[str, ...]) -> FileError:
        path, suffix = _path(root, patterns[what], key), PurePosixPath(patterns[what]).suffix
        kinds = comes.get(what, "") if suffix else " (or another kind of picture)"
        return FileError(path if suffix else Path(f"{path}.png"), f"missing{kinds}")

    images, labels, instances = (found.get(what, {}) for what in ("images", "labels", "instances"))
    no_instance: list[UserError] = [
        missing("instances", key) for key in images if "instances" in found and key not in instances
    ]
    problems += [missing("labels", key) for key in images if key not in labels]
    problems += [missing("images", key) for key in labels if key not in images]
    samples = [
        Sample("/".join(part.strip("/") for part in key if part), image, labels[key], instances.get(key))
        for key, image in images.items()
        if key in labels
    ]
    return Listing(sorted(samples, key=lambda sample: sample.name), problems, no_instance, unused)


def _find(root: Path, pattern: str, whole: bool) -> tuple[dict[tuple[str, ...], Path], list[UserError], list[Path]]:
    """Files by the parts of their names that the pattern leaves open, {name} last, or by {name} alone; those that stand
    twice; and the others."""
    suffix = PurePosixPath(pattern).suffix
    expression = _expression(pattern.removesuffix(suffix))
    found: dict[tuple[str, ...], Path] = {}
    twice: list[UserError] = []
    others = []
    for path in list_files(root / fixed(pattern)):
        fits = path.suffix.lower() == suffix.lower() if suffix else is_picture(path)
        match = expression.fullmatch(path.relative_to(root).with_suffix("").as_posix()) if fits else None
        if not match:
            others.append(path)
            continue
        parts = list(match.groups())
        name = parts.pop(expression.groupindex["name"] - 1)
        key = (*parts, name) if whole else (name,)
        key = tuple(unicodedata.normalize("NFC", part) for part in key)  # macOS writes letters in two parts
        if found.setdefault(key, path) != path:
            twice.append(
                FileError(path, "has the name of another file", str(found[key]), "rename or remove one of them")
            )
    return found, twice, others


def _expression(stem: str) -> re.Pattern:
    """For a path below the root without its suffix: the group "name", and one for each other open part."""
    text = ""
    for part in OPEN.split(stem):
        if part == "{name}":
            text += "(?P=name)" if "(?P<name>" in text else "(?P<name>[^/]+)"
        else:
            text += {"**/": "((?:[^/]+/)*)", "*": "([^/]*)"}.get(part, re.escape(part))
    return re.compile(text)


def fixed(pattern: str) -> str:
    """The folders of a pattern before anything is left open."""
    return OPEN.split(pattern)[0].rpartition("/")[0]


def _path(root: Path, pattern: str, key: tuple[str, ...]) -> Path:
    """Where the file with this key would be; parts that are not known stay open."""
    *parts, name = key
    return root / OPEN.sub(lambda open_: name if open_[1] == "{name}" else parts.pop(0) if parts else open_[1], pattern)


def _shown(pattern: str) -> str:
    shown = pattern[len(fixed(pattern)) :].lstrip("/").replace("{name}", "*")
    return shown if PurePosixPath(pattern).suffix else f"picture {shown}"


def _elsewhere(root: Path, pattern: str) -> str:
    """A hint where the folders of a pattern are found instead, if they are near."""
    if root.is_dir() and (inside := fixed(pattern)):
        for folder in (root.parent, root.parent.parent, *sorted(root.glob("*/")), *sorted(root.glob("*/*/"))):
            if (folder / inside).is_dir():
                return f"; but there is {folder / inside}: data.root must be a folder that holds everything"
    return ""


def _without_splits(layout: Layout, root: Path) -> str:
    """A hint where the pictures of a folder of one's own lie in one place, not in one for each split."""
    before, split, _ = layout.images.partition("{split}")
    folder = root / before
    if layout.name != "folder" or not (split and folder.is_dir() and any(map(is_picture, folder.iterdir()))):
        return ""
    return (
        f"; {folder} holds pictures itself: without folders train and val add data.folder.images='images/{{name}}' "
        "data.folder.labels='labels/{name}' data.val_share=0.2"
    )


def list_samples(
    layout: Layout, root: Path, split: str, instances: bool = False, say: Callable[[str], None] = lambda line: None
) -> list[Sample]:
    """The samples of one split, sorted by name.

    Args:
        instances: they are needed, for networks that find contours. Else they are taken if every image has them.
        say: told of the files that are left out.

    Raises:
        UserError: anything is missing; it says what was looked for, what the tree should look like and where it comes
            from.
    """
    if split not in SPLITS and "{split}" not in layout.images:
        raise UserError(f"split={split}: {layout.title} has one folder of images, {layout.images}, for all splits")
    samples, problems, no_instance, unused = scan(layout, root, split)
    if problems or (instances and no_instance):
        raise UserError(not_found(layout, root, problems + no_instance * instances))
    if unused:
        say(f"{layout.title}, {split}: {left_out(unused)}")
    return [sample._replace(instance=None) for sample in samples] if no_instance else samples


def not_found(layout: Layout, root: Path, problems: list[UserError]) -> str:
    """The whole explanation for someone whose data set is not where we looked."""
    lines = by_cause(problems)
    shown = "\n".join(f"  {line}" for line in lines[:5])
    more = f"\n  and {len(lines) - 5} more: agcseg-data lists them all" if len(lines) > 5 else ""
    tree = "\n".join(f"  {line}" for line in layout.tree.replace("{root}", str(root)).splitlines())
    return (
        f"{layout.title} was looked for in {root.absolute()} (data.root), and is not complete there:\n{shown}{more}\n"
        f"The tree should look like this:\n{tree}\n"
        f"Source: {layout.source}.\n"
        "Give the folder with data.root=FOLDER. To train on built-in data instead: agcseg-train experiment=demo"
    )


def labels_of(samples: Iterable[Sample]) -> list[Path]:
    return [sample.label for sample in samples]


def load(sample: Sample, layout: Layout) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """Decode one sample completely.

    Returns:
        the image (RGB), its labels, (height, width) uint8 class numbers or 255, and its instances, integers of the same
        shape: the labels again where the data set has none.

    Raises:
        UserError: a file is missing, truncated, of the wrong size, holds numbers that are not labels, or instances and
            labels contradict each other; it names the file.
    """
    image = read_image(sample.image)
    size = (image.height, image.width)
    if layout.image_size and size != layout.image_size:
        raise FileError(
            sample.image,
            f"{size[0]}x{size[1]}, expected {layout.image_size[0]}x{layout.image_size[1]}",
            advice=f"{layout.title} as it is distributed is wanted; resized files can be read by data=folder",
        )
    picture = open_picture(sample.label, lossless=True)
    stored = numbers_of(sample.label, picture, colors=not layout.classes.from_file)
    _check_size(sample.label, stored, size)
    if stored.ndim == 3 and not layout.classes.from_color:
        cause = "mode RGB, expected one 8-bit channel of label ids (is this the colour picture?)"
        raise FileError(sample.label, cause)
    labels = layout.classes.translate(stored)
    if (labels == UNKNOWN).any():
        kind = "colours" if stored.ndim == 3 else "numbers"
        cause = f"holds {kind} that are no labels of {layout.title}"
        raise FileError(sample.label, cause, counted(stored[labels == UNKNOWN]))
    if stored.ndim == 2 and picture.mode == "P":
        check_palette(sample.label, stored, picture, layout.classes)
    if sample.instance is None:
        return image, labels, labels
    instances = read_numbers(sample.instance)
    _check_size(sample.instance, instances, size)
    if instances.ndim == 3:
        raise FileError(sample.instance, "mode RGB, expected one channel of instance numbers")
    if layout.instance_divisor and stored.ndim == 2:
        _check_instances(sample, stored, sample.instance, instances, layout, layout.instance_divisor)
    return image, labels, instances


def _check_instances(
    sample: Sample, stored: np.ndarray, path: Path, instances: np.ndarray, layout: Layout, divisor: int
) -> None:
    """The label of each pixel follows from its instance's number."""
    own = np.where(instances >= divisor, instances // divisor, instances)
    wrong = (own != stored) & (stored != IGNORE)  # numbers below 0 stand in no file of instances
    if not wrong.any():
        return
    share = wrong.mean()
    if np.array_equal(layout.classes.translate(own), stored):
        cause = f"holds class numbers (training ids), expected the label ids of {layout.title}"
    elif share > 0.25:
        cause = "contradicts its instances: one of the two belongs to another image"
    else:
        cause = (
            "contradicts its instances: one of the two was stored with losses (as JPEG, or of fewer colours), or edited"
        )
    row, column = np.argwhere(wrong)[0]
    detail = (
        f"{share:.1%} of the pixels, first in row {row}, column {column}: {stored[row, column]}, where "
        f"{path.name} has {instances[row, column]}"
    )
    raise FileError(sample.label, cause, detail)


def check(
    samples: list[Sample],
    layout: Layout,
    progress: Callable[[Iterable], Iterable] = iter,
    others: Iterable[Sample] = (),
) -> tuple[list[UserError], list[int]]:
    """Decode every sample.

    Args:
        others: samples of other splits, whose labels must be stored in the same way.

    Returns:
        an error for each that is wrong, all of them, not the first; and the labelled pixels of each class in the rest.
    """

    def looked_at(sample: Sample) -> UserError | np.ndarray:
        try:
            return np.bincount(load(sample, layout)[1].ravel(), minlength=256)
        except UserError as error:
            return error

    problems: list[UserError] = [*mixed(labels_of(samples), layout.classes, labels_of(others))]
    pixels = np.zeros(256, dtype=np.int64)
    for found in progress(each(looked_at, samples)):
        if isinstance(found, UserError):
            problems.append(found)
        else:
            pixels += found
    return problems, pixels[: len(layout.classes)].tolist()


def counted(stored: np.ndarray) -> str:
    """Numbers (n,) or colours (n, 3) with the pixels that have them, the most frequent first."""
    colored = stored.ndim == 2
    values, counts = np.unique(packed(stored) if colored else stored, return_counts=True)
    few = [
        f"{unpacked(int(values[i])) if colored else values[i]} on {counts[i]} pixels"
        for i in np.argsort(-counts, kind="stable")[:5]
    ]
    return ", ".join(few) + (f" and {len(values) - 5} more" if len(values) > 5 else "")


def _check_size(path: Path, stored: np.ndarray, size: tuple[int, int]) -> None:
    if stored.shape[:2] != size:
        detail = f"{stored.shape[0]}x{stored.shape[1]}, but its image is {size[0]}x{size[1]}"
        raise FileError(path, "another size than its image", detail)
