"""Your data: a folder of images and masks, with a file that says what the classes are; and a draft of that file."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from agcseg.data.labels import IGNORE, TABLES, UNKNOWN, Classes, Color, packed, some_color, unpacked
from agcseg.data.layout import Layout, fixed, scan
from agcseg.data.pictures import each, numbers_of, open_picture
from agcseg.errors import FileError, UserError, by_cause, expanded

MANY = UNKNOWN  # classes that numbers of 8 bits can tell apart
DEFAULT = "classes.yaml"
ENTRY = {"name", "color", "colors", "numbers"}
EXAMPLE = (
    "such as\n  classes:\n  - name: road\n    numbers: [0]\n    color: [128, 64, 128]\n  void:\n    numbers: [255]"
)


def folder_layout(root: Path, patterns, classes: Classes | None = None) -> Layout:
    """The layout of `data=folder`.

    Args:
        root: the data's folder.
        patterns: the part `data.folder` of `agcseg.config.Config`.
        classes: if they are known already, as a trained network's are; else they are read.

    Raises:
        UserError: a pattern cannot be used; there is no file of classes, or it does not say what they are.
    """
    for key in ("images", "labels", "instances"):
        if fault := fault_of_pattern(getattr(patterns, key), key):
            raise UserError(f"data.folder.{key}={getattr(patterns, key)}: {fault}")
    images, labels = str(PurePosixPath(patterns.images)), str(PurePosixPath(patterns.labels))
    instances = patterns.instances and str(PurePosixPath(patterns.instances))
    splits = {"train": patterns.train, "val": patterns.val}
    if instances == type(patterns).instances and not any(
        (root / fixed(instances.replace("{split}", split))).is_dir() for split in splits.values()
    ):
        instances = None  # nobody spoke of any
    if "trainids" in labels.lower() and patterns.classes == "cityscapes":
        raise UserError(
            f"data.folder.labels={labels}: data.folder.classes=cityscapes are the numbers of labelIds; for trainIds "
            "name the 19 classes, 0 to 18, in a file, with 255 as void"
        )
    tree = "\n".join(f"{{root}}/{part}" for part in (images, labels, instances) if part)
    tree = tree.replace("{split}", "SPLIT").replace("{name}", "NAME").replace("**/", "")
    return Layout(
        name="folder",
        title=root.absolute().name.encode(errors="replace").decode(),  # it may be no text
        classes=classes or read_classes(root, patterns.classes),
        images=images,
        labels=labels,
        instances=instances,
        tree=f"{tree}\nas data.folder.images, .labels and .instances say; SPLIT is {patterns.train} or {patterns.val}",
        source="your own",
        splits=splits,
        instance_divisor=patterns.instance_divisor,
    )


def fault_of_pattern(pattern: str | None, key: str) -> str:
    """Why a pattern of images, labels or instances cannot be used, or nothing."""
    if pattern is None and key == "instances":
        return ""
    if pattern is None or "{name}" not in pattern:
        return "must hold {name}, which stands for the names of the files"
    plain, suffix = pattern.replace("{split}", "").replace("{name}", ""), PurePosixPath(pattern).suffix
    if {*plain} & {*"{}"}:
        return "only {split} and {name} can stand in braces; * takes any part of a name"
    if pattern.startswith(("/", "~")):
        return "must be a path below data.root"
    if {*suffix} & {*"*{"}:
        return "must end in a suffix such as .png; or, for every kind of picture, without a point before its end"
    return ""


def classes_file(root: Path, name: str) -> Path:
    """Where `data.folder.classes` lies: in the data's folder or, if there is none, where the program was started, but
    for a file of the usual name, which is that of other data there."""
    inside = root / expanded(name)
    return inside if inside.is_file() or name == DEFAULT or not Path(name).is_file() else Path(name)


def read_classes(root: Path, name: str) -> Classes:
    """The classes that a file names, or those of Cityscapes or CamVid where it is called so.

    Raises:
        UserError: the file is missing, or cannot be used; it says where and why.
    """
    path = classes_file(root, name)
    if name in TABLES and not path.is_file():
        return TABLES[name]
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing; it says what the classes are (data.folder.classes). To have it drafted from the labels: "
            f"agcseg-data data=folder data.root={root} draft=true"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    return _classes(path, content)


def _classes(path: Path, content) -> Classes:
    def refuse(fault: str) -> NoReturn:
        raise UserError(f"{path}: {fault}")

    if not isinstance(content, dict) or not isinstance(content.get("classes"), list) or not content["classes"]:
        refuse(f"expected a list of classes, {EXAMPLE}")
    if unknown := content.keys() - {"classes", "void"}:
        refuse(f"{sorted(map(str, unknown))[0]}: is not a key here; there are classes and void")
    if len(content["classes"]) > MANY:
        refuse(f"names {len(content['classes'])} classes; there can be {MANY}")
    names: list[str] = []
    colors: list[Color] = []
    from_file: dict[int, int] = {}
    from_color: dict[Color, int] = {}

    def take(entry: dict, what: str, meaning: int, number: list[int]) -> list[Color]:
        if unknown := entry.keys() - ENTRY:
            refuse(
                f"{what}: {sorted(map(str, unknown))[0]}: is not a key of a class; there are {', '.join(sorted(ENTRY))}"
            )
        numbers = entry.get("numbers", number)
        given = [] if entry.get("colors") is None else entry["colors"]
        if not isinstance(given, list):
            refuse(f"{what}: colors: {given}: expected a list of [red, green, blue]")
        given = [entry["color"], *given] if entry.get("color") is not None else given
        for one in numbers if isinstance(numbers, list) else [numbers]:
            if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < 2**31:
                refuse(f"{what}: numbers: {one}: expected whole numbers as they stand in the label files")
            if one in from_file:
                refuse(f"{what}: number {one} is that of {_meaning(from_file[one], names)} already")
            from_file[one] = meaning
        for color in given:
            if not (
                isinstance(color, list) and len(color) == 3 and all(type(c) is int and 0 <= c < 256 for c in color)
            ):
                refuse(f"{what}: color {color}: expected [red, green, blue], 0 to 255")
            if tuple(color) in from_color:
                refuse(f"{what}: colour {color} is that of {_meaning(from_color[tuple(color)], names)} already")
            from_color[tuple(color)] = meaning
        return [tuple(color) for color in given]

    numbered = any(isinstance(entry, dict) and "numbers" in entry for entry in content["classes"])
    for i, entry in enumerate(content["classes"]):
        entry = {"name": entry} if isinstance(entry, str) else entry
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name.strip():
            hint = f": {name} is not text, quote it" if name is not None else ""
            refuse(f"class {i + 1} has no name{hint}")
        if name in names:
            refuse(f"two classes are called {name}")
        names.append(name)
        colors.append((take(entry, name, i, [] if numbered else [i]) or [some_color(i)])[0])
    void = {} if content.get("void") is None else content["void"]
    if isinstance(void, dict):
        take(void, "void", IGNORE, [])
    else:
        refuse("void: expected numbers: [...] or colors: [...]")
    if len(names) == 1:
        refuse("names one class only, so there is nothing to tell apart; give what is not of it a class too")
    return Classes(tuple(names), tuple(colors), from_file, from_color, numbered)


def _meaning(number: int, names: list[str]) -> str:
    return "void" if number == IGNORE else names[number]


class _Seen(NamedTuple):
    pixels: Counter
    files: Counter
    colors: dict[int, Color]  # of numbers in pictures with a palette


def draft(layout: Layout, root: Path, splits: Iterable[str], progress: Callable = iter) -> str:
    """A file of classes to be edited, from what stands in the label files: each number's or colour's share.

    Raises:
        UserError: there are no labels, some cannot be read, some hold numbers and others colours, or so many different
            ones that they cannot be classes.
    """
    listed = [sample.label for split in splits for sample in scan(layout, root, split).samples]
    if not listed:
        raise UserError("\n  ".join(["no image with its label was found:"] + [
            line for split in splits for line in by_cause(scan(layout, root, split).problems)
        ]))  # fmt: skip

    def look(path: Path):
        try:
            picture = open_picture(path, lossless=True)
            stored = numbers_of(path, picture)
        except FileError as error:
            return error
        palette = np.array(picture.getpalette() or []).reshape(-1, 3) if picture.mode == "P" else ()
        if stored.dtype == np.uint8 and stored.ndim == 2:
            counts = np.bincount(stored.ravel())
            values, counts = np.flatnonzero(counts), counts[counts > 0]
        else:
            values, counts = np.unique(packed(stored) if stored.ndim == 3 else stored, return_counts=True)
        return stored.ndim == 3, values.tolist(), counts.tolist(), palette

    seen, broken = {kind: _Seen(Counter(), Counter(), {}) for kind in (False, True)}, []
    example: dict[bool, Path] = {}
    for path, found in zip(listed, progress(each(look, listed)), strict=True):
        if isinstance(found, FileError):
            broken.append(found)
            continue
        colored, values, counts, palette = found
        example.setdefault(colored, path)
        seen[colored].pixels.update(dict(zip(values, counts, strict=True)))
        seen[colored].files.update(values)
        for value in values:
            if value < len(palette):
                color = tuple(palette[value].tolist())
                if (other := seen[colored].colors.setdefault(value, color)) != color:
                    raise UserError(
                        f"{path}: {value} is {color} in its palette, and {other} in that of another label file, so the "
                        "numbers alone mean nothing; store all as RGB, or all with one palette"
                    )
    if broken:
        raise UserError("\n  ".join(["these label files cannot be read:", *by_cause(broken)]))
    if len(example) == 2:
        raise UserError(f"{example[False]} holds numbers, {example[True]} colours; all labels must be of one kind")
    colored = True in example
    if len(seen[colored].pixels) > MANY:
        many = f"{len(seen[colored].pixels)} different {'colours' if colored else 'numbers'}"
        raise UserError(
            f"{root}: the labels hold {many}, more than {MANY} classes: stored with losses, smoothed, or instances?"
        )
    return _drafted(root, len(listed), seen[colored], colored)


def _drafted(root: Path, files: int, seen: _Seen, colored: bool) -> str:
    total, values = seen.pixels.total(), sorted(seen.pixels)
    void = [255] if not colored and 255 in values and len(values) > 2 else []  # two are 0 and 255: black and white
    palette = seen.colors if len({*seen.colors.values()}) == len(seen.colors) else {}  # else it tells nothing apart
    lines = [
        f"# The classes of {root.absolute()}, drafted from {files} label files.",
        "# Name them; take out what is no class, and put what is to be ignored under void. The order of the classes is",
        "# that of the network's outputs. color: how it is painted, and what is read where labels are colours.",
        "classes:",
    ]
    for i, value in enumerate(value for value in values if value not in void):
        share = f"# {seen.pixels[value] / total:.3%} of the pixels, in {seen.files[value]} files"
        color = unpacked(value) if colored else palette.get(value, some_color(i))
        lines += [f"- name: class {i if colored else value}    {share}"]
        lines += [] if colored else [f"  numbers: [{value}]"]
        lines += [f"  color: {list(color)}"]
    note = f"    # a guess: {seen.pixels[255] / total:.3%} of the pixels, in {seen.files[255]} files" if void else ""
    lines += ["void:", "  colors: []" if colored else f"  numbers: {void}{note}"]
    return "\n".join(lines) + "\n"
