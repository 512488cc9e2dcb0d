"""The folder of a run: whose it is, what is finished in it, and who may go on."""

import inspect
import json
import logging
from dataclasses import asdict
from pathlib import Path

import filelock
from omegaconf import OmegaConf

from agcseg.config import Config
from agcseg.errors import UserError
from agcseg.nn import NORMS
from agcseg.record.files import remove_parts, tell

log = logging.getLogger("agcseg")

LOCK_WAIT = 60.0  # seconds for another process to leave the folder: after a stop it may still be about to end

# What may differ between a run and its continuation: where things lie and how fast they go, not what is computed.
FREE = {
    "name", "run", "epochs", "device", "channels_last", "compile", "resume", "save_every", "images", "data.root",
    "data.cache_dir", "network.implementation", "network.options.recompute",
}  # fmt: skip


def check_same_run(saved: dict, settings: dict, pixels: list[int] | None, folder: Path) -> None:
    """Refuse to go on with another run than the one in the folder.

    Args:
        saved: a checkpoint, of which "config" and "histogram" are read.
        settings: this run's configuration as a dictionary.
        pixels: of each class in its training images; None where the checkpoint's are None.

    Raises:
        UserError: it names every key that differs, unless it is in `FREE`.
    """
    there, here = _flat(saved["config"]), _flat(settings)
    norm = NORMS[settings["norm"]["name"]]
    options = inspect.signature(norm).parameters.values() if norm else ()
    # a run may be older than a key or an option
    default = _flat(asdict(Config())) | {f"norm.options.{option.name}": option.default for option in options}
    values = {key: [side.get(key, default.get(key)) for side in (there, here)] for key in sorted({*there, *here})}
    differ = [f"{key}: {old} there, {new} here" for key, (old, new) in values.items() if key not in FREE and old != new]
    if not differ and saved["histogram"] != pixels:
        differ = ["the training images or their labels have changed"]
    if differ:
        raise UserError(
            f"{folder} holds another run:\n  " + "\n  ".join(differ) + "\n"
            "Give this one another place with name= or run=, or start afresh beside it with resume=false"
        )


def finished(config: Config, folder: Path) -> dict | None:
    """The result of a run that has nothing left to do, else None.

    Raises:
        UserError: the folder holds another run, or files that cannot be read.
    """
    try:
        result = json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:
        raise UserError(f"{folder / 'result.json'}: is not readable; delete it to continue from last.pt") from None
    if result["state"] == "finished" and result["epochs"] < config.epochs:
        return None
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder}: has a result.json but no config.yaml, so it cannot be told what ran there")
    settings, saved = asdict(config), OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    check_same_run({"config": saved, "histogram": None}, settings, None, folder)
    log.info(f"{result_line(folder, result)} (nothing left to do)")
    tell("skipped", result["epochs"], config.epochs, result, f"already {result['state']}")
    return result


def lock(folder: Path) -> filelock.FileLock:
    """Keep every other process out of the folder, until `release`.

    Raises:
        UserError: another one is still in it after `LOCK_WAIT`.
    """
    held = filelock.FileLock(folder / ".lock")
    try:
        held.acquire(blocking=False)
    except filelock.Timeout:
        log.info(f"{folder}: another process is training this run; waiting {LOCK_WAIT:g} s for it to end")
        try:
            held.acquire(timeout=LOCK_WAIT)
        except filelock.Timeout:
            raise UserError(f"{folder}: another process is training this run") from None
    remove_parts(folder)
    return held


def free_folder(folder: Path) -> Path:
    """The folder itself or, where it is taken, FOLDER-2, FOLDER-3, ..."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def result_line(folder: Path, result: dict) -> str:
    error = f", pixel error {result['pixel_error']:.2%}" if "pixel_error" in result else ""
    reason = f": {result['reason']}" if result["reason"] else ""
    return f"{folder}: {result['state']} after {result['epochs']} epochs{error}{reason}"


def _flat(settings: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
