"""Data sets: where files lie and what labels mean, one memory map at training size, minibatches. Knows no network."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from agcseg.data import camvid, cityscapes
from agcseg.data.cache import Cached, locked, not_writable, open_cache
from agcseg.data.folder import folder_layout
from agcseg.data.labels import Classes
from agcseg.data.layout import SPLITS, Layout, Sample, list_samples
from agcseg.data.minibatches import choose
from agcseg.data.pictures import read_numbers
from agcseg.data.streets import make_streets, street
from agcseg.errors import UserError, expanded

STREETS_VERSION = 1  # of how the built-in streets look; a new number leaves those made earlier unused
LAYOUTS = {layout.name: layout for layout in (cityscapes.LAYOUT, camvid.LAYOUT, cityscapes.STREETS)}
NAMES = (*LAYOUTS, "folder")


def find_data(data, say: Callable[[str], None] = print, classes: Classes | None = None) -> tuple[Layout, Path]:
    """The layout of a data set and its folder. The built-in streets are made first where they are missing.

    Args:
        data: the part `data` of `agcseg.config.Config`.
        classes: of `data=folder`, where they are known and not to be read from its file.

    Raises:
        UserError: no folder is given, or the file of the classes cannot be used.
    """
    if data.root is None and data.name == "streets":
        streets = data.streets
        root = streets_root(data.cache_dir, streets.train, streets.val, tuple(streets.size), streets.seed, say)
    elif data.root is None:
        raise UserError(f"data={data.name}: give its folder with data.root=")
    else:
        root = expanded(data.root)
    return folder_layout(root, data.folder, classes) if data.name == "folder" else LAYOUTS[data.name], root


def find_samples(
    data, layout: Layout, root: Path, split: str, contours: bool = False, say: Callable[[str], None] = print
) -> list[Sample]:
    """The samples of a split. With `data.val_share`, training and validation are parts of the split train.

    Raises:
        UserError: see `agcseg.data.layout.list_samples`; or there are too few to share out.
    """
    if data.val_share is None or split not in SPLITS:
        return list_samples(layout, root, split, contours, say)
    samples = list_samples(layout, root, "train", contours, say)
    held_out = round(data.val_share * len(samples))
    if not 0 < held_out < len(samples):
        raise UserError(f"data.val_share={data.val_share}: {held_out} of {len(samples)} images would be for validation")
    held_out = set(choose(len(samples), held_out, data.choice_seed).tolist())
    return [sample for i, sample in enumerate(samples) if (i in held_out) == (split == "val")]


def open_data(
    data,
    progress: Callable = lambda items, total: items,
    say: Callable[[str], None] = print,
    contours: bool = False,
    rebuild: bool = False,
) -> tuple[Layout, dict[str, Cached]]:
    """Both splits of a data set at training size, from the cache, which is built first where it is missing.

    Args:
        data: the part `data` of `agcseg.config.Config`.
        progress: wraps an iteration, called with it and its length.
        say: takes the lines that a person should see.
        contours: the network finds contours, so that instances are needed where the data set has them.
        rebuild: build the cache anew.

    Raises:
        UserError: the data set is missing, incomplete or broken, or has too few images; it says what was looked for,
            where, and what to do.
    """
    layout, root = find_data(data, say)
    samples = {split: find_samples(data, layout, root, split, contours, say) for split in SPLITS}
    if data.name == "streets":
        _as_wanted(data, samples, root)
    for split, wanted in (("train", data.train_images), ("val", data.val_images)):
        there = len(samples[split])
        if wanted is not None and wanted > there:
            raise UserError(f"data.{split}_images={wanted}: there are {there} {split} images in {root}")
        if layout.expected and there != layout.expected[split] and data.val_share is None:
            say(f"{layout.title} in {root}: {there} of {layout.expected[split]} {split} images")
    size, cache_dir = tuple(data.size), expanded(data.cache_dir)
    return layout, {
        split: open_cache(layout, samples[split], size, cache_dir, split, progress, say, rebuild, samples[other])
        for split, other in zip(SPLITS, reversed(SPLITS), strict=True)
    }


def _as_wanted(data, samples: dict[str, list[Sample]], root: Path) -> None:
    """Refuse scenes that are there, and are not those that `data.streets` would make; its defaults ask for none."""
    wanted, usual = data.streets, type(data.streets)()
    there: dict[str, Any] = {split: len(samples[split]) for split in SPLITS}
    if data.val_share is not None:  # both are of the split train
        there = {"train": sum(there.values())}
    with contextlib.suppress(UserError):  # whoever decodes it says more
        label = read_numbers(samples["train"][0].label)
        there["size"] = [*label.shape]
        if wanted.seed != usual.seed and data.val_share is None:
            first = street(np.random.default_rng([wanted.seed, 0, 0]), label.shape[:2])[1]
            there["seed"] = wanted.seed if np.array_equal(first, label) else "another"
    for key, its in there.items():
        if getattr(wanted, key) not in (getattr(usual, key), its):
            raise UserError(
                f"data.streets.{key}={getattr(wanted, key)}: the scenes in {root} are there already, with {its}; leave "
                "it out, or name a new folder with data.root="
            )


def streets_root(cache_dir: str | Path, train: int, val: int, size: tuple[int, int], seed: int, say=print) -> Path:
    """The folder of the built-in streets with these parameters; they are made first where they are missing.

    Raises:
        UserError: `cache_dir` cannot be written.
    """
    cache_dir = expanded(cache_dir)
    root = cache_dir / f"streets{STREETS_VERSION}-{train}+{val}-{size[0]}x{size[1]}-seed{seed}"
    if not root.is_dir():
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with locked(root, say):
                if not root.is_dir():
                    say(f"making {train} + {val} street scenes of {size[0]}x{size[1]} in {root}")
                    for part in cache_dir.glob(f".{root.name}.partial-*"):  # of killed processes: we hold the lock
                        shutil.rmtree(part, ignore_errors=True)
                    sign = Path(f"{root}.tmp")

                    def alive(jobs):
                        for job in jobs:
                            sign.touch()  # see `locked`
                            yield job

                    try:
                        make_streets(root, train, val, size, seed, alive)
                    finally:
                        sign.unlink(missing_ok=True)
        except OSError as error:
            raise not_writable(error, cache_dir) from None
    return root
