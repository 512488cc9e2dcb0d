"""The programs. Only they know Hydra."""

import argparse
import contextlib
import difflib
import logging
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from agcseg import __version__
from agcseg.errors import UserError, first_line
from agcseg.record.identity import flat

logging.raiseExceptions = False  # a closed pipe is no reason for a traceback per line
for _stream in (sys.stdout, sys.stderr):
    if hasattr(_stream, "reconfigure"):  # a file's name may hold what the terminal cannot show
        _stream.reconfigure(errors="backslashreplace")
Image.MAX_IMAGE_PIXELS = 2**29  # Pillow refuses from twice as many on; its own limit is made for unknown senders

_installed = Path(__file__).parents[1] / "configs"
CONFIGS = str(_installed if _installed.is_dir() else Path(__file__).parents[2] / "configs")


_IN_QUOTES = r"""(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")"""
_SWEEP = r"(choice|range|glob|shuffle|sort|interval|tag)\(.*\)"  # Hydra's functions of several values


class _Argument(str):
    """Of the command line; no two are the same object."""


def hydra_arguments(program: str, argv: list[str], schema: type) -> list[str]:
    """The command line as Hydra is to read it: texts, such as paths and names, reach the program as they were typed.

    Hydra would take `data.root=2026_11_25` for a number, and refuse brackets, apostrophes and equals signs. A text that
    is in quotes already, `null`, and a reference to another key, `${norm.name}`, stay what they are to Hydra. In a
    sweep commas part the values. An option of a network or a norm needs no plus: whether it has one of this name, it
    says better than Hydra.

    Ends the program if an override names a key that `schema` does not have, and says which one may be meant, or if its
    value cannot be read. Hydra refuses both too, but says neither what there is nor what to do.
    """
    from hydra._internal.utils import get_args_parser  # not for the programs without Hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if "--version" in argv:
        print(f"{program} {__version__}")
        raise SystemExit
    arguments = [_Argument(argument) for argument in argv]
    flags = get_args_parser().parse_intermixed_args(arguments)
    if flags.shell_completion:
        return argv
    parser, (known, texts) = OverridesParser.create(), _keys(OmegaConf.structured(schema))
    own_groups = bool(flags.config_dir or flags.config_path)  # of which nothing is known here

    def override(argument: str) -> str:
        key, given, value = argument.partition("=")
        if argument.startswith("~"):
            return argument
        if not (given and key) or key != key.strip():
            raise UserError(f"{argument}: expected KEY=VALUE, without spaces around the equals sign")
        name = key.lstrip("+").partition("@")[0]
        free = name.startswith(("hydra", "experiment", "figure1")) or ".options." in name or "/" in name
        if name not in known and not free and not (own_groups and key.startswith("+")):
            raise _unknown(program, f"{name} is not a key of the configuration", name, known)
        if name in texts and not (flags.multirun and re.fullmatch(_SWEEP, value)):
            value = ",".join(_quoted(text, known, parser) for text in (_parts(value) if flags.multirun else [value]))
        try:
            parsed = parser.parse_override(f"{key}={value}")
            several = parsed.is_sweep_override()
        except Exception:  # the grammar's, of several classes
            raise UserError(
                f"{argument}: the value cannot be read; quote it for {program} too: \"{key}='{value}'\""
            ) from None
        if value == "null" and os.path.isdir(os.path.join(CONFIGS, name)):
            raise UserError(f"{argument}: names no file of configs/{name}; leave it out for the default")
        if several and flags.help:
            raise UserError(f"{argument}: --help shows one configuration; give one value, or leave {name} out")
        if several and not flags.multirun:
            listed = "" if value.endswith(")") else f"; a list is {key}=[{value}]"
            raise UserError(f"{argument}: several values are a sweep, which needs -m{listed}")
        if name in known and not (several or own_groups or os.path.isdir(os.path.join(CONFIGS, name))):
            _check_value(argument, name, parsed.value(), known, schema)
        if re.match(r"(network|norm)\.options\.", name):
            key = f"++{name}"
        return f"{key}={value}"

    try:
        _check_flags(flags)
        given = {id(text) for text in flags.overrides}
        flags_first = [str(text) for text in arguments if id(text) not in given]  # as Hydra wants them
        return flags_first + [override(text) for text in arguments if id(text) in given]
    except UserError as error:
        fail(program, error)


def _check_flags(flags: argparse.Namespace) -> None:
    """Those that Hydra would end in a traceback."""
    alone = [f"--{name}" for name in ("run", "multirun", "cfg", "info") if getattr(flags, name)]
    if len(alone) > 1:
        raise UserError(f"{' and '.join(alone)}: only one of them at a time")
    if flags.hydra_help and flags.overrides:
        raise UserError("--hydra-help: by itself, without overrides")
    if flags.resolve and not (flags.cfg or flags.help):
        raise UserError("--resolve: only with --cfg")
    if flags.resolve and flags.cfg == "hydra":
        raise UserError("--cfg hydra --resolve: Hydra's settings refer to the program's; --cfg all --resolve has both")


def _check_value(argument: str, name: str, value: Any, known: list[str], schema: type) -> None:
    """Whether a key can have this value."""
    keys = [other for other in known if other.startswith(f"{name}.")]
    if keys and not isinstance(value, dict):
        raise UserError(f"{argument}: {name} is a group of keys, each with a value of its own: {', '.join(keys)}")
    try:
        OmegaConf.update(OmegaConf.structured(schema), name, value)
    except OmegaConfBaseException as error:
        listed = "is not a ListConfig" in str(error)
        raise UserError(f"{argument}: {'expected a list, such as [1,2]' if listed else first_line(error)}") from None


def _keys(node: DictConfig, prefix: str = "") -> tuple[list[str], set[str]]:
    """All keys of a schema, and those whose value is a text."""
    known: list[str] = []
    texts: set[str] = set()
    for key in map(str, node):
        known.append(f"{prefix}{key}")
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            inner = _keys(child, f"{prefix}{key}.")
            known, texts = known + inner[0], texts | inner[1]
        elif isinstance(child, StringNode):
            texts.add(f"{prefix}{key}")
    return known, texts


def _parts(value: str) -> list[str]:
    """The values of a sweep: what is between commas, quoted ones and references whole."""
    return re.findall(rf"(?:^|,)({_IN_QUOTES}(?=,|$)|(?:\$\{{[^{{}}]*\}}|[^,])*)", value)


def _quoted(text: str, known: list[str], parser) -> str:
    """In Hydra's quotes, if it needs them; `${` is a reference only where there is what it refers to."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if text == "null" or re.fullmatch(_IN_QUOTES, text):
        return text
    with contextlib.suppress(Exception):  # the grammar's, of several classes
        if not {"$", "\\"} & {*text} and parser.parse_override(f"key={text}").value() == text:
            return text

    def reference(found: re.Match) -> str:
        return found[0] if found[1] in known or ":" in found[1] else "\\" + found[0]

    return QuotedString(re.sub(r"\$\{([^{}]*)", reference, text), Quote.single).with_quotes()


def _unknown(program: str, what: str, key: str, known: Iterable[str]) -> UserError:
    close = difflib.get_close_matches(key, known, 3, 0.5)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    return UserError(f"{what}; {meant}{program} --help lists them all".replace("  ", " "))


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
    seen: dict[str, str] = {}
    for setting in arguments.settings:
        key, given, text = setting.partition("=")
        if not given or key not in keys:
            raise _unknown(program, f"{setting}: expected KEY=VALUE with one of the keys {', '.join(keys)}", key, keys)
        if key in seen:
            raise UserError(f"{setting}: {seen[key]} is given too; give one of the two")
        seen[key] = setting
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


def to_object(cfg: DictConfig, schema: type):
    """The typed configuration, its interpolations resolved.

    Raises:
        UserError: a key, whatever way it came in, is not in `schema`; a value is missing or cannot be resolved.
    """
    known, _ = _keys(OmegaConf.structured(schema))

    def check(node: DictConfig, prefix: str = "") -> None:
        for key in map(str, node):
            name, child = f"{prefix}{key}", node._get_node(key)
            if name not in known:
                raise _unknown("", f"{name} is not a key of the configuration", name, known)
            if isinstance(child, DictConfig) and not name.endswith(".options"):
                check(child, f"{name}.")

    check(cfg)
    try:
        typed: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(cfg)))
    except OmegaConfBaseException as error:
        raise UserError(first_line(error)) from None
    for key, value in flat(asdict(typed)).items():
        if isinstance(value, str) and "${" in value:  # which whoever reads the run's config.yaml would take for one
            raise UserError(f"{key}={value}: '${{' begins a reference to another key, and can be no part of a text")
    return typed


@contextlib.contextmanager
def program(name: str) -> Iterator[None]:
    """Around what a program does: streams that are closed or break are no mistake, letters that the locale does not
    have are escaped, a user's mistake or a file that cannot be used is one line and exit code 2, Ctrl-C is 130."""
    if not os.environ.get("XDG_CACHE_HOME", "unset"):
        del os.environ["XDG_CACHE_HOME"]  # empty is as good as unset, says the specification
    threading.excepthook = _in_thread
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "w"))
        with contextlib.suppress(AttributeError):  # of a stream that something else put there
            getattr(sys, stream).reconfigure(errors="backslashreplace")
    try:
        yield
    except BrokenPipeError:
        pass
    except (UserError, OSError) as error:
        fail(name, error)
    except KeyboardInterrupt:
        stopped(name)
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # or Python would complain at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _in_thread(error: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread passes its OSError on to whoever writes next, who says it."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)


def stopped(program: str) -> NoReturn:
    """End the program as Ctrl-C deserves."""
    _complain(f"\n{program}: stopped")
    raise SystemExit(130) from None


def fail(program: str, error: UserError | OSError) -> NoReturn:
    """End the program as a user's mistake deserves: the message alone, exit code 2. Of several processes of a torchrun,
    which all find the mistake, one says so."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        from agcseg.training.parallel import first_to_tell

        if not first_to_tell():
            raise SystemExit(2)
    _complain(f"{program}: error: {sentence(error)}")
    raise SystemExit(2)


def sentence(error: Exception) -> str:
    """What to say of an error; of a file that cannot be used, its name and why."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: cannot be read or written ({error.strerror})"
    return str(error)


def _complain(line: str) -> None:
    with contextlib.suppress(OSError, AttributeError, ValueError):  # nobody there
        print(line, file=sys.stderr, flush=True)


def show(*lines: str) -> None:
    """Print, whether or not somebody reads to the end: `agcseg-eval RUN | head -1` is no mistake."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
