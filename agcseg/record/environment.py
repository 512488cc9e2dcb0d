"""What a run ran with: code, machine and packages."""

import functools
import platform
import shlex
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import torch

import agcseg


def environment(device: torch.device) -> dict:
    """For environment.json; None for what is not known or not there.

    Returns:
        agcseg: its version; commit and clean: of its checkout, clean if nothing that git knows was changed; command;
        python, torch, cuda, cudnn, driver: versions; device: model of the GPU or CPU; system; packages: name ->
        version, of all that are installed.
    """
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "--error-unmatch", "__init__.py") else None
    cuda = device.type == "cuda"
    return {
        "agcseg": agcseg.__version__,
        "commit": commit,
        "clean": None if commit is None else _git("status", "--porcelain", "--untracked-files=no") == "",
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "driver": _driver() if cuda else None,
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "system": platform.platform(),
        "packages": _packages(),
    }


@functools.cache  # for two lines the whole description of each package is read
def _packages() -> dict[str, str]:
    headers = [distribution.metadata for distribution in distributions()]
    return dict(sorted((one["Name"], one["Version"]) for one in headers if one and one["Name"]))


def _git(*arguments: str) -> str | None:
    """What git says of the folder of this package; None if it cannot."""
    return _said("git", "-C", str(Path(agcseg.__file__).parent), *arguments)


def _driver() -> str | None:
    said = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0] if said else None


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
