"""The programs. Only they know Hydra."""

import difflib
import sys
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from agcseg.errors import UserError

_installed = Path(__file__).parents[1] / "configs"
CONFIGS = str(_installed if _installed.is_dir() else Path(__file__).parents[2] / "configs")


def check_keys(program: str, arguments: list[str], schema: type) -> None:
    """End the program if an override names a key that `schema` does not have, and say which one may be meant.

    Hydra refuses such a key too, but does not say what there is.
    """
    known: list[str] = []

    def collect(node: DictConfig, prefix: str) -> None:
        for key in node:
            known.append(f"{prefix}{key}")
            child = node._get_node(key)
            if isinstance(child, DictConfig):
                collect(child, f"{prefix}{key}.")

    collect(OmegaConf.structured(schema), "")
    for argument in arguments:
        key, is_override, _ = argument.partition("=")
        free = key.startswith(("-", "+", "~", "hydra", "experiment", "figure1")) or ".options." in key
        if is_override and not free and key.partition("@")[0] not in known:
            close = difflib.get_close_matches(key, known, 3, 0.5)
            meant = f"did you mean {' or '.join(close)}? " if close else ""
            fail(program, UserError(f"{key} is not a key of the configuration; {meant}{program} --help lists them all"))


def to_object(cfg: DictConfig):
    """The typed configuration, its interpolations resolved.

    Raises:
        UserError: a value is missing or cannot be resolved.
    """
    try:
        return OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from None


def fail(program: str, error: UserError) -> NoReturn:
    """End the program as a user's mistake deserves: the message alone, exit code 2."""
    print(f"{program}: error: {error}", file=sys.stderr)
    raise SystemExit(2)
