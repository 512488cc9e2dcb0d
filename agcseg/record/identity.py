"""What makes two runs the same: decided here, from the typed configuration and the data, and nowhere else."""

import hashlib
import inspect
import os
import re
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from agcseg.config import Config, FolderConfig, momentum, rate
from agcseg.networks import NETWORKS
from agcseg.nn import NORMS
from agcseg.nn.norms import OF_MINIBATCHES

# Where things lie and how fast they go: of no influence on what is computed, but for rounding.
FREE = {
    "name", "run", "device", "channels_last", "compile", "graph", "deterministic", "resume", "save_every", "images",
    "data.root", "data.cache_dir", "data.folder.classes", "network.implementation", "network.options.recompute",
}  # fmt: skip
CHOSEN = {"augment.name", "schedule", "optimizer", "ema"}  # in the name, though a file says them
IN_NAME = {"network.name", "norm.name", "minibatch", "lr.base", "lr.value", "seed"}  # of every folder
NEEDED = {  # without which a setting has no effect: a key and its values
    "lr.power": ("schedule", {"poly"}),
    "lr.step_epochs": ("schedule", {"step"}),
    "lr.step_factor": ("schedule", {"step"}),
    "gems.limit": ("gems.mode", {"minibatch", "map", "sample"}),
    "gems.ema": ("gems.mode", {"minibatch", "map", "sample"}),
    "gems.gate": ("gems.mode", {"minibatch", "map", "sample"}),
    "norm.options.window": ("norm.options.background", {"window"}),
    "norm.options.quantile": ("norm.options.background", {"trimmed"}),
    "norm.options.median_gradient": ("norm.options.background", {"median"}),
    "contour.loss": ("network.name", {"classnet"}),
    "contour.band": ("network.name", {"classnet"}),
    "sync_bn": ("norm.name", {"bn"}),
    **{f"data.folder.{field.name}": ("data.name", {"folder"}) for field in fields(FolderConfig)},
    "data.streets.train": ("data.name", {"streets"}),
    "data.streets.val": ("data.name", {"streets"}),
    "data.streets.size": ("data.name", {"streets"}),
    "data.streets.seed": ("data.name", {"streets"}),
}
LONGEST = 150  # bytes of a folder's name; file systems take 255


def flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings with their keys joined by dots."""
    answer: dict[str, Any] = {}
    for key, value in settings.items():
        answer |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return answer


def complete(settings: dict) -> dict[str, Any]:
    """Settings as `flat` gives them. Keys and options that an older version did not have get their default."""
    found = flat(settings)
    options = {}
    for kind, known in (("network", NETWORKS), ("norm", NORMS)):
        target = known.get(found.get(f"{kind}.name", ""))
        for option in inspect.signature(target).parameters.values() if target else ():
            if option.default is not option.empty and isinstance(option.default, (bool, int, float, str, type(None))):
                options[f"{kind}.options.{option.name}"] = option.default
    return flat(asdict(Config())) | options | found


def deciding(settings: dict, processes: int = 1) -> dict[str, Any]:
    """What decides the outcome of a run: its settings, those in `FREE` left out, those without effect at their
    defaults, rate and momentum as they take effect, and where a norm has statistics of its minibatch, the images that
    they are of.

    Args:
        settings: a configuration as a dictionary, of this version or an older one.
        processes: that share a minibatch.
    """
    found = complete(settings)
    of_rate: Any = SimpleNamespace(lr=SimpleNamespace(base=found.pop("lr.base"), value=found.pop("lr.value")))
    for key in ("minibatch", "momentum", "momentum_match"):
        setattr(of_rate, key, found[key])
    del found["momentum_match"]
    found |= {"rate": float(f"{rate(of_rate):.12g}"), "momentum": float(f"{momentum(of_rate):.12g}")}
    if found["init_from"]:  # a run or its checkpoint, however its place is written
        place = Path(os.path.expanduser(found["init_from"])).resolve()  # another machine's home stays what it is
        found["init_from"] = str(place.parent if place.name == "last.pt" else place)
    if found["norm.name"] in OF_MINIBATCHES and not found["sync_bn"]:
        found["images per process"] = found["minibatch"] // processes
    usual, idle = flat(asdict(Config())), _idle(found)
    found |= {key: usual[key] for key in idle & usual.keys()}
    left_out = FREE | (idle - usual.keys())
    return {key: value for key, value in found.items() if key not in left_out}


def without_effect(settings: dict) -> list[str]:
    """What was set although the rest of the settings leaves it no effect: "KEY=VALUE, of KEY=VALUE alone"."""
    found = complete(settings)
    usual = complete({"norm": {"name": found["norm.name"]}})
    lines = []
    for key in sorted(_idle(found)):
        needed, values = NEEDED[key]
        if key in found and found[key] != usual.get(key, found[key]):
            lines.append(f"{key}={found[key]}, of {needed}={' or '.join(sorted(values))} alone")
    return lines


def _idle(found: dict[str, Any]) -> set[str]:
    return {key for key, (needed, values) in NEEDED.items() if needed in found and found[needed] not in values}


def differences(there: dict, here: dict) -> list[str]:
    """One line for each thing that makes two runs differ, but for their number of epochs, in which a run may grow,
    unless the rate follows it.

    Args:
        there, here: "config", a configuration as a dictionary; "processes"; "data", split -> digest of its images as
            they are used, and the names of the "classes"; "start", a digest of what `init_from` names; "source", of the
            file of `network.factory`. What one of them lacks, being older, is not compared.
    """
    # Where it is not known how many processes there were, it is taken to be as many.
    old, new = (deciding(run["config"], run.get("processes") or here["processes"]) for run in (there, here))
    follows_epochs = new["schedule"] in ("poly", "cosine")
    keys = sorted((old.keys() | new.keys()) - (set() if follows_epochs else {"epochs"}))
    lines = [f"{key}: {old.get(key)} there, {new.get(key)} here" for key in keys if old.get(key) != new.get(key)]
    old, new = (dict(run.get("data") or {}) for run in (there, here))
    classes = [data.pop("classes", None) for data in (old, new)]
    if not lines and all(classes) and classes[0] != classes[1]:
        lines = [f"classes: {', '.join(classes[0])} there, {', '.join(classes[1])} here"]
    if not lines and old and new and old != new:
        lines = ["the images or their labels are others"]
    for key, line in (
        ("start", f"init_from: {here['config']['init_from']} holds other weights now"),
        ("source", f"network.factory: the file of {here['config']['network']['factory']} is another now"),
    ):
        if not lines and there.get(key) and here.get(key) and there[key] != here[key]:
            lines = [line]
    return lines


def folder_name(config: Config, usual: Config) -> str:
    """Network, norm, minibatch, rate, seed, and what else differs from `usual`, as far as it decides the outcome.

    Args:
        usual: what the files of the configuration say, before single values were given.

    Returns:
        at most `LONGEST` bytes; a longer name is cut, and ends in a hash of the whole.
    """
    name = f"{config.network.name}-{config.norm.name}-mb{config.minibatch}-lr{rate(config):g}-seed{config.seed}"
    ordinary = complete(asdict(usual)) | {key: flat(asdict(Config()))[key] for key in CHOSEN}
    settings = complete(asdict(config))
    left_out = FREE | IN_NAME | _idle(settings) | {"epochs"}
    for key, value in sorted(settings.items()):
        if key not in left_out and value != ordinary.get(key):
            name += f"-{key}={_short(value)}"
    whole = os.fsencode(name)
    if len(whole) <= LONGEST:
        return name
    return f"{whole[: LONGEST - 9].decode(errors='ignore')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _short(value: Any) -> str:
    """A value in letters that any file system takes."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int | float):
        return f"{value:.12g}" if isinstance(value, float) else str(value)
    if isinstance(value, list):
        return "x".join(map(_short, value))
    return re.sub(r"[^A-Za-z0-9._]+", "x", str(value)).strip("x")
