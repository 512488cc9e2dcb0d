"""The programs. Only they know Hydra."""

import sys
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from agcseg.errors import UserError

_installed = Path(__file__).parents[1] / "configs"
CONFIGS = str(_installed if _installed.is_dir() else Path(__file__).parents[2] / "configs")


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
