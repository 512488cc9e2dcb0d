"""agcseg-data: check a data set, build its cache, make the built-in streets."""

import logging
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from tqdm import tqdm

from agcseg.cli import CONFIGS, check_keys, fail, stopped, to_object
from agcseg.config import Config, DataConfig
from agcseg.config import check as check_config
from agcseg.data import LAYOUTS, open_data, streets_root
from agcseg.data.layout import SPLITS, check
from agcseg.data.streets import make_streets
from agcseg.errors import UserError

log = logging.getLogger("agcseg")


@dataclass
class DataProgram:
    data: DataConfig = field(default_factory=DataConfig)
    build: bool = True


ConfigStore.instance().store(name="data_schema", node=DataProgram)


def inspect(data: DataConfig, build: bool) -> int:
    """Check every file, say what was found, build the cache if all is well.

    Returns:
        the number of problems.
    """
    layout, streets = LAYOUTS[data.name], data.streets
    if data.root is None:
        root = streets_root(data.cache_dir, streets.train, streets.val, tuple(streets.size), streets.seed, log.info)
    else:
        root = Path(data.root).expanduser()
        if data.name == "streets" and not root.exists():
            log.info(f"making {streets.train} + {streets.val} street scenes in {root}")
            make_streets(root, streets.train, streets.val, tuple(streets.size), streets.seed)
    tree = layout.tree.format(root=root).replace("\n", "\n  ")
    log.info(f"{layout.title} in {root.absolute()}. Expected tree:\n  {tree}")
    problems = []
    for split in SPLITS:
        samples, missing = layout.scan(root, split)
        broken = check(samples, layout, partial(_progress, total=len(samples), what=split))
        expected = layout.expected and layout.expected[split]
        if expected and len(samples) != expected:
            missing = [*missing, f"{split}: {len(samples)} complete samples, expected {expected}"]
        note = f" of {expected} expected" if expected else ""
        log.info(f"{split}: {len(samples)} samples{note}, {len(missing)} missing, {len(broken)} broken")
        problems += missing + broken
    if problems:
        log.info("\n".join(problems))
        log.info(f"{len(problems)} problems. Source of the files: {layout.source}.")
    elif build:
        _, cached = open_data(data.name, root, tuple(data.size), data.cache_dir, _progress, log.info)
        for split in SPLITS:
            log.info(f"{split} cache: {cached[split].folder}")
    if not problems:
        log.info("all files are good")
    return len(problems)


def _progress(items, total: int, what: str = "decoding"):
    return tqdm(items, what, total, unit="image", disable=not sys.stderr.isatty())


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="data")
def _job(cfg) -> None:
    try:
        program = to_object(cfg)
        check_config(Config(data=program.data, minibatch=1))
        problems = inspect(program.data, program.build)
    except (UserError, OSError) as error:
        fail("agcseg-data", error)
    if problems:
        raise SystemExit(1)


def main() -> None:
    check_keys("agcseg-data", sys.argv[1:], DataProgram)
    try:
        _job()
    except KeyboardInterrupt:
        stopped("agcseg-data")


if __name__ == "__main__":
    main()
