"""agcseg-data: check a data set, build its cache, make the built-in streets."""

import logging
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig

from agcseg.check import check_data
from agcseg.cli import CONFIGS, fail, hydra_arguments, program, to_object
from agcseg.config import DataConfig
from agcseg.data import find_data, open_data
from agcseg.data.folder import classes_file, draft, folder_layout
from agcseg.data.labels import CITYSCAPES
from agcseg.data.layout import SPLITS, Layout, Listing, check, scan
from agcseg.data.pictures import left_out
from agcseg.data.streets import make_streets
from agcseg.errors import UserError, by_cause, expanded
from agcseg.record.files import write
from agcseg.training.lines import progress

log = logging.getLogger("agcseg")


@dataclass
class DataProgram:
    data: DataConfig = field(default_factory=DataConfig)
    build: bool = True
    rebuild: bool = False
    every: bool = False
    draft: bool = False


ConfigStore.instance().store(name="data_schema", node=DataProgram)


def inspect(program: DataProgram) -> int:
    """Check every file, say what was found, build the cache if all is well.

    Returns:
        the number of problems.
    """
    data, streets = program.data, program.data.streets
    root = expanded(data.root) if data.root else None
    if root and data.name == "streets" and not (root.is_dir() and any(root.iterdir())):
        log.info(f"making {streets.train} + {streets.val} street scenes in {root}")
        height, width = streets.size
        make_streets(root, streets.train, streets.val, (height, width), streets.seed)
    layout, root = find_data(data, log.info)
    tree = layout.tree.replace("{root}", str(root)).replace("\n", "\n  ")
    log.info(f"{layout.title} in {root.absolute()}. Expected tree:\n  {tree}")
    problems = []
    scans = {split: scan(layout, root, split) for split in (("train",) if data.val_share else SPLITS)}
    for split in scans:
        problems += _inspected(data, layout, split, scans)
    if problems:
        log.info("\n".join(map(str, problems) if program.every else by_cause(problems)))
        more = "" if program.every else " every=true lists every file."
        log.info(f"{len(problems)} problems. Source of the files: {layout.source}.{more}")
    elif program.build:
        _, cached = open_data(data, progress, log.info, rebuild=program.rebuild)
        for split in SPLITS:
            log.info(f"{split} cache: {cached[split].folder}")
    if not problems:
        log.info("all files are good")
    return len(problems)


def _inspected(data: DataConfig, layout: Layout, split: str, scans: dict[str, Listing]) -> list[UserError]:
    """Say what there is of a split; what is wrong with it."""
    samples, missing, no_instance, unused = scans[split]
    others = [sample for other in scans if other != split for sample in scans[other][0]]
    broken, pixels = check(samples, layout, partial(progress, total=len(samples), what=split), others)
    expected = layout.expected and layout.expected[split]
    wanted = {"train": data.train_images, "val": data.val_images}[split]
    note = f" of {expected} expected" if expected else ""
    if no_instance and len(no_instance) < len(samples):
        missing = [*missing, *no_instance]
    elif no_instance:
        note += ", none with instances, which networks that find contours need"
    log.info(f"{split}: {len(samples)} samples{note}, {len(missing)} missing, {len(broken)} broken")
    if unused:
        log.info(f"{split}: {left_out(unused)}")
    absent = [name for name, count in zip(layout.classes.names, pixels, strict=True) if not count]
    if samples and not broken and absent:
        log.info(f"{split}: no pixel of {', '.join(absent)}")
    enough = wanted is None or wanted <= len(samples)
    if expected and len(samples) != expected and enough and samples:
        log.info(f"{split}: a part of {layout.title}; that is enough for data.{split}_images={_or_null(wanted)}")
    if not enough and data.val_share is None:
        advice = f"give data.{split}_images=null for all there are" if samples else "see above"
        fault = f"{split}: {len(samples)} complete samples, data.{split}_images={wanted} asks for more; {advice}"
        return [UserError(fault), *missing, *broken]
    return [*missing, *broken]


def _or_null(value) -> str:
    return "null" if value is None else str(value)


def write_draft(data: DataConfig, given: Iterable[str]) -> None:
    """Write the file of classes of `data=folder`, drafted from its labels, and say how to go on with what was `given`.

    Raises:
        UserError: it is there already, or the labels cannot be used.
    """
    if data.name != "folder" or not data.root:
        raise UserError("draft=true: drafts the classes of data=folder data.root=FOLDER; others are known")
    root = expanded(data.root)
    path = classes_file(root, data.folder.classes)
    if path.exists():
        raise UserError(f"{path}: is there already; remove it, or draft to another file with data.folder.classes=FILE")
    layout = folder_layout(root, data.folder, CITYSCAPES)  # whose classes are not looked at
    splits = ("train",) if data.val_share else SPLITS
    write(path, draft(layout, root, splits, lambda items: progress(items, None, "labels")))
    log.info(f"wrote {path}: name the classes, then agcseg-data {shlex.join(given)}")


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="data")
def _job(cfg) -> None:
    try:
        wanted = to_object(cfg, DataProgram)
        check_data(wanted.data)
        if wanted.rebuild and not wanted.build:
            raise UserError("rebuild=true: builds the cache anew; leave out build=false")
        if wanted.draft:
            given = HydraConfig.get().overrides.task
            return write_draft(wanted.data, [override for override in given if not override.startswith("draft=")])
        problems = inspect(wanted)
    except (UserError, OSError) as error:
        fail("agcseg-data", error)
    if problems:
        raise SystemExit(1)


def main() -> None:
    with program("agcseg-data"):
        sys.argv[1:] = hydra_arguments("agcseg-data", sys.argv[1:], DataProgram)
        _job()


if __name__ == "__main__":
    main()
