"""The programs. Only they know Hydra."""

import argparse
import difflib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from agcseg.errors import UserError

Image.MAX_IMAGE_PIXELS = 2**29  # Pillow refuses from twice as many on; its own limit is made for unknown senders

_installed = Path(__file__).parents[1] / "configs"
CONFIGS = str(_installed if _installed.is_dir() else Path(__file__).parents[2] / "configs")


def check_keys(program: str, arguments: list[str], schema: type) -> None:
    """End the program if an override names a key that `schema` does not have, and say which one may be meant, or if
    its value wants quotes.

    Hydra refuses both too, but says neither what there is nor what to do.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser  # not for the programs without Hydra

    known, parser = [], OverridesParser.create()

    def collect(node: DictConfig, prefix: str) -> None:
        for key in node:
            known.append(f"{prefix}{key}")
            child = node._get_node(key)
            if isinstance(child, DictConfig):
                collect(child, f"{prefix}{key}.")

    collect(OmegaConf.structured(schema), "")
    for argument in arguments:
        key, is_override, value = argument.partition("=")
        if key.startswith("-") or not is_override:  # one of Hydra's flags
            continue
        free = key.startswith(("+", "~", "hydra", "experiment", "figure1")) or ".options." in key
        if not free and key.partition("@")[0] not in known:
            fail(program, _unknown(program, f"{key} is not a key of the configuration", key, known))
        try:
            parser.parse_override(argument)
        except Exception:  # the grammar's, of several classes
            quoted = f"{key}='{value}'"
            fail(program, UserError(f'{argument}: the value cannot be read; quote it for {program} too: "{quoted}"'))


def _unknown(program: str, what: str, key: str, known: Iterable[str]) -> UserError:
    close = difflib.get_close_matches(key, known, 3, 0.5)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    return UserError(f"{what}; {meant}{program} --help lists them all")


def parse_run(program: str, keys: dict, description: str, epilog: str, argv: list[str] | None) -> tuple[str, dict]:
    """The command line RUN KEY=VALUE ... of the programs that use a trained network. They need no Hydra.

    Args:
        keys: every key with its default, or with its type if the default is None.

    Returns:
        RUN, and the keys with their values.

    Raises:
        UserError: an argument is not of this form.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} RUN [KEY=VALUE ...]",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, such as outputs/demo/RUN, or its last.pt")
    parser.add_argument("settings", metavar="KEY=VALUE", nargs="*", help="see below")
    arguments = parser.parse_args(argv)
    first = arguments.run.partition("=")[0]
    if first in keys and not Path(arguments.run).exists():
        raise UserError(f"{arguments.run}: the run comes first: {program} RUN {arguments.run} ...")
    values = {key: None if isinstance(default, type) else default for key, default in keys.items()}
    for setting in arguments.settings:
        key, given, text = setting.partition("=")
        if not given or key not in keys:
            raise _unknown(program, f"{setting}: expected KEY=VALUE with one of the keys {', '.join(keys)}", key, keys)
        values[key] = _typed(key, text, keys[key] if isinstance(keys[key], type) else type(keys[key]))
    return arguments.run, values


def _typed(key: str, text: str, kind: type) -> bool | int | str:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{key}={text}: must be true or false")
        return text.lower() == "true"
    if kind is int:
        if not text.isdecimal() or int(text) < 1:
            raise UserError(f"{key}={text}: must be a number, at least 1")
        return int(text)
    return text


def to_object(cfg: DictConfig):
    """The typed configuration, its interpolations resolved.

    Raises:
        UserError: a value is missing or cannot be resolved.
    """
    try:
        return OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from None


def stopped(program: str) -> NoReturn:
    """End the program as Ctrl-C deserves."""
    print(f"\n{program}: stopped", file=sys.stderr)
    raise SystemExit(130) from None


def fail(program: str, error: UserError | OSError) -> NoReturn:
    """End the program as a user's mistake deserves: the message alone, exit code 2."""
    if isinstance(error, OSError) and error.filename:
        error = f"{error.filename}: cannot be read or written ({error.strerror})"
    print(f"{program}: error: {error}", file=sys.stderr)
    raise SystemExit(2)


def show(*lines: str) -> None:
    """Print, whether or not somebody reads to the end: `agcseg-eval RUN | head -1` is no mistake."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
