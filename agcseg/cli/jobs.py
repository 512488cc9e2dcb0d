"""From a command line to the runs that it asks for: their configurations, and the folder of each."""

import argparse
import contextlib
import copy
import functools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import hydra
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from agcseg import figure1
from agcseg.cli import CONFIGS, to_object
from agcseg.config import Config
from agcseg.errors import UserError
from agcseg.record.identity import differences, folder_name

ConfigStore.instance().store(name="schema", node=Config)
for setting in figure1.RUNS:  # options of the group figure1, for experiment/figure1.yaml
    choices = [{"override /network": setting.network}, {"override /norm": setting.norm}]
    node = {"defaults": choices, "minibatch": setting.minibatch}
    if setting.rate != Config().lr.base * setting.minibatch:
        node["lr"] = {"value": setting.rate}
    ConfigStore.instance().store(group="figure1", name=setting.name, package="_global_", node=node)

OWN_HYDRA = {
    "hydra.run.dir": ".", "hydra.sweep.dir": "outputs/${name}", "hydra.sweep.subdir": ".",
    "hydra.output_subdir": "null", "hydra/job_logging": "plain", "hydra/launcher": "gpus",
}  # fmt: skip
GROUPS = ("network", "norm", "data", "augment", "experiment", "figure1")


def folder_of(
    config: Config, overrides: Iterable[str], name: str = "train", places: Iterable[str] = (CONFIGS,)
) -> Path:
    """Where a run lies: outputs/NAME/RUN. RUN is made from the typed configuration, see `agcseg.record.identity`.

    Args:
        overrides: of the run, of which those that choose a file say what is usual for it.
        name, places: the primary configuration, and the folders of configurations.
    """
    if config.run:
        return Path("outputs") / config.name / config.run
    choices, places = _choices(overrides), tuple(places)
    if _is_plain(name, places):  # of no files but this one
        choices = tuple(f"{group}={getattr(config, group).name}" for group in ("network", "norm", "data", "augment"))
        name, places = "train", (CONFIGS,)
    return Path("outputs") / config.name / folder_name(config, to_object(_composed(choices, name, places), Config))


def check_files(arguments: list[str]) -> None:
    """Refuse files of one's own that are no YAML, whether they are used or not: Hydra ends in a traceback of YAML's.

    Raises:
        UserError: one line for each of them.
    """
    broken = []
    for place in _flags(arguments)[1]:
        folder = Path(place.removeprefix("file://"))
        for path in sorted([*folder.glob("*.yaml"), *folder.glob("*/*.yaml")]) if folder != Path(CONFIGS) else ():
            try:
                for _ in yaml.parse(path.read_text(encoding="utf-8")):
                    pass
            except yaml.YAMLError as error:
                line = f", line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
                broken.append(f"{path}{line}: {getattr(error, 'problem', None) or error}")
            except UnicodeDecodeError:
                broken.append(f"{path}: is not in UTF-8")
    if broken:
        raise UserError("\n  ".join(["the configuration cannot be read:"] * (len(broken) > 1) + broken))


def with_own_hydra(arguments: list[str]) -> list[str]:
    """The command line, and where its primary configuration says nothing of Hydra, as a run's config.yaml does, what
    train.yaml says of it."""
    flags, places = _flags(arguments)
    if not flags.config_name or not _is_plain(flags.config_name, places) or flags.shell_completion:
        return arguments
    given = {override.partition("=")[0].lstrip("+") for override in flags.overrides}
    return arguments + [f"{key}={value}" for key, value in OWN_HYDRA.items() if key not in given]


def spelled_as_in_files(arguments: list[str]) -> list[str]:
    """The command line of a sweep. Hydra's sweeper takes `++KEY=1` and the KEY that an experiment's file sweeps for two
    keys, and would multiply them out: such a key is written as it is there."""
    flags, places = _flags(arguments)
    with contextlib.suppress(HydraException, OmegaConfBaseException):  # Hydra says it better
        swept = _sweeper(flags.overrides, flags.config_name or "train", places)[0].params or {}
        return [
            bare if (bare := text.lstrip("+")).partition("=")[0] in swept and text.startswith("++") else text
            for text in arguments
        ]
    return arguments


def check_sweep(arguments: list[str]) -> None:
    """Look at all jobs of a sweep before the first one starts.

    Only of Hydra's own sweeper: others decide as they go.

    Raises:
        UserError: two jobs have one folder, so that the second would find its run done, or go on with the first one's;
            or several experiments have sweeps of their own, of which Hydra takes none.
    """
    flags, places = _flags(arguments)
    name = flags.config_name or "train"
    folders: dict[Path, tuple[tuple[str, ...], Config]] = {}
    try:
        for job, choices, values in _jobs(flags.overrides, name, places):
            try:
                cfg = copy.deepcopy(_composed(choices, name, places))
                for override in values:
                    OmegaConf.update(cfg, override.key_or_group, override.value(), force_add=True)
                config = to_object(cfg, Config)
                folder = folder_of(config, job, name, places)
            except (UserError, HydraException, OmegaConfBaseException):
                continue  # it fails by itself, and the others run
            if folder in folders:
                earlier, its = folders[folder]
                one, other = (" ".join(sorted({*a} - {*b})) for a, b in ((earlier, job), (job, earlier)))
                both = ({"config": asdict(settings), "processes": 1} for settings in (its, config))
                alike = its.epochs == config.epochs and not differences(*both)
                raise UserError(
                    f"two runs of this sweep have one folder, {folder}: that with {one} and that with {other}"
                    f"{'; they differ in nothing that decides the outcome' * alike}. Tell them apart with run= or name="
                )
            folders[folder] = job, config
    except (HydraException, OmegaConfBaseException):
        pass  # Hydra says it better


def _sweeper(
    overrides: list[str], name: str, places: tuple[str, ...]
) -> tuple[DictConfig, list[Override], OverridesParser]:
    """What sweeps: its configuration, and the overrides with what reads them."""
    with _hydra(places):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        given = parser.parse_overrides(overrides)
    fixed = [part.input_line or "" for part in given if not part.is_sweep_override()]
    return _composed(tuple(fixed), name, places, whole=True).hydra.sweeper, given, parser


def _jobs(
    overrides: list[str], name: str, places: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], list[Override]]]:
    """Each job of a sweep once: its overrides, those that choose a file, and those that give a value to a key."""
    sweeper, given, parser = _sweeper(overrides, name, places)
    if not sweeper._target_.endswith("BasicSweeper"):
        return
    for part in given:
        if part.key_or_group == "experiment" and part.is_sweep_override():
            for file in part.sweep_string_iterator():
                own = _composed((f"experiment={file}",), name, places, whole=True).hydra.sweeper.params
                if own:
                    raise UserError(
                        f"experiment={file} has a sweep of its own ({', '.join(own)}), which Hydra leaves out where "
                        "several experiments are swept: start one after the other"
                    )
    swept = parser.parse_overrides([f"{key}={value}" for key, value in (sweeper.params or {}).items()])
    for job in dict.fromkeys(map(tuple, BasicSweeper.split_arguments([*swept, *given], None)[0])):
        parts = [part for part in parser.parse_overrides(list(job)) if not part.is_hydra_override()]
        choosing = [part for part in parts if _is_group(part.key_or_group, name, places)]
        values = [part for part in parts if part not in choosing and not part.is_delete()]
        yield job, tuple(part.input_line or "" for part in choosing), values


@functools.cache
def _is_group(key: str, name: str, places: tuple[str, ...]) -> bool:
    """Whether a key chooses a file, among those of one's own too."""
    with _hydra(places):
        loader = GlobalHydra.instance().config_loader()
        return "." not in key and bool(loader.get_group_options(key, config_name=name, overrides=_search(places)))


def _flags(arguments: list[str]) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """Hydra's flags, and the folders of configurations."""
    flags = get_args_parser().parse_args(arguments)
    places = [flags.config_path or CONFIGS, *filter(None, [flags.config_dir])]
    for text in flags.overrides:
        key, _, value = text.partition("=")
        if key.lstrip("+") == "hydra.searchpath":
            with contextlib.suppress(HydraException):  # Hydra says it better
                given = OverridesParser.create().parse_override(f"{key}={value}").value()
                places += given if isinstance(given, list) else []
    return flags, tuple(places)


def _is_plain(name: str, places: tuple[str, ...]) -> bool:
    """Whether a primary configuration is made of itself alone."""
    for place in places:
        path = Path(place, name if name.endswith(".yaml") else f"{name}.yaml")
        if path.is_file():
            content = OmegaConf.load(path)
            return isinstance(content, DictConfig) and "defaults" not in content
    return False


def _choices(overrides: Iterable[str]) -> tuple[str, ...]:
    return tuple(line for line in overrides if re.fullmatch(rf"\+*({'|'.join(GROUPS)})=.*", line))


@functools.cache
def _composed(overrides: tuple[str, ...], name: str, places: tuple[str, ...], whole: bool = False) -> DictConfig:
    with _hydra(places):
        return hydra.compose(name, [*overrides, *_search(places)], return_hydra_config=whole)


def _search(places: tuple[str, ...]) -> list[str]:
    """The override that has Hydra search all places; those without a scheme are folders."""
    others = [place if "://" in place else f"file://{os.path.abspath(place)}" for place in places[1:]]
    return [f"hydra.searchpath=[{','.join(map(repr, others))}]"] if others else []


@contextlib.contextmanager
def _hydra(places: tuple[str, ...]) -> Iterator[None]:
    """Hydra's state for composing, also within a job of its own."""
    state = GlobalHydra.instance()
    outer, state.hydra = state.hydra, None
    try:
        with hydra.initialize_config_dir(os.path.abspath(places[0]), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer
