"""The folder of a run: whose it is, what is finished in it, and who may go on."""

import json
import logging
from pathlib import Path
from typing import Any

import filelock
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from agcseg.config import Config
from agcseg.errors import UserError, first_line
from agcseg.record.files import remove_parts, tell
from agcseg.record.identity import differences

log = logging.getLogger("agcseg")

LOCK_WAIT = 60.0  # seconds for another process to leave the folder: after a stop it may still be about to end
ELSEWHERE = "give this one another place with name= or run=, or start afresh beside it with resume=false"


def expect_same_run(there: dict, here: dict, folder: Path) -> None:
    """Refuse to go on with another run than the one in the folder.

    Args:
        there, here: see `agcseg.record.identity.differences`.

    Raises:
        UserError: it names everything that differs.
    """
    differ = differences(there, here)
    if differ:
        raise UserError(f"{folder} holds another run:\n  " + "\n  ".join(differ) + f"\n{ELSEWHERE.capitalize()}")


def finished(here: dict, epochs: int, folder: Path, unseen: str = "") -> dict | None:
    """The result of a run that has nothing left to do, else None.

    Args:
        here: this run, see `agcseg.record.identity.differences`.
        epochs: that are wanted.
        unseen: why its data cannot be compared.

    Raises:
        UserError: the folder holds another run, or files that cannot be read.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, and the run needs a folder there; {ELSEWHERE}")
    path = folder / "result.json"
    try:
        result = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, IsADirectoryError):
        result = {}
    if not _is_result(result):
        raise UserError(f"{path}: is not readable as a result; delete it to continue from last.pt")
    if result["state"] == "finished" and result["epochs"] < epochs:
        return None
    config = _settings(folder / "config.yaml")
    there = {"config": config, "processes": result.get("processes"), "data": result.get("data")}
    there |= {key: result.get(key) for key in ("start", "source")}
    expect_same_run(there, here, folder)
    note = ""
    if unseen or not result.get("data"):
        root = config["data"]["root"] or "the built-in streets"
        note = f"; trained on {root}, not looked at now" + f" ({unseen})" * bool(unseen)
    if result["state"] == "finished" and result["epochs"] > epochs:
        note += f"; these are more than epochs={epochs}"
    log.info(f"{result_line(folder, result)} (nothing left to do{note})")
    tell("skipped", result["epochs"], epochs, result, f"already {result['state']}")
    return result


def _is_result(result: Any) -> bool:
    return (
        isinstance(result, dict)
        and {"state", "reason"} <= result.keys()
        and type(result.get("epochs")) is int
        and isinstance(result.get("pixel_error", 0.0), int | float)
        and isinstance(result.get("data") or {}, dict)
    )


def _settings(path: Path) -> Any:
    """The configuration of a run; what an older version did not have is filled in."""
    try:
        loaded = OmegaConf.load(path)
        if not loaded:
            raise ValueError("it is empty")
        return OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(Config), loaded))
    except FileNotFoundError:
        raise UserError(
            f"{path.parent}: holds a result.json but no config.yaml to tell what ran there; {ELSEWHERE}"
        ) from None
    except (OSError, YAMLError, OmegaConfBaseException, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"{path}: cannot be read as a configuration ({first_line(error)}); {ELSEWHERE}") from None


def expect_checkpoint(folder: Path) -> None:
    """Refuse to write over a run that is there without its checkpoint.

    Raises:
        UserError: it says what to do.
    """
    for name in ("metrics.csv", "result.json"):
        if (folder / name).exists() and not (folder / "last.pt").exists():
            raise UserError(
                f"{folder}: holds a run ({name}) but no last.pt to go on from; delete the folder, or {ELSEWHERE}"
            )


def lock(folder: Path) -> filelock.FileLock:
    """Keep every other process out of the folder, until `release`; and clear away what killed ones left half-written.

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
    except NotImplementedError:
        raise UserError(f"{folder}: its disk has no file locks (flock); train on another one") from None
    remove_parts(folder)
    return held


def new_folder(folder: Path) -> Path:
    """Make the folder itself or, where it is taken, FOLDER-2, FOLDER-3, ..., and nobody else's."""
    number, new = 1, folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            new.mkdir()
            return new
        except FileExistsError:
            number += 1
            new = folder.with_name(f"{folder.name}-{number}")


def result_line(folder: Path, result: dict) -> str:
    error = f", pixel error {result['pixel_error']:.2%}" if "pixel_error" in result else ""
    reason = f": {result['reason']}" if result["reason"] else ""
    return f"{folder}: {result['state']} after {result['epochs']} epochs{error}{reason}"
