"""agcseg-train: one run, or with -m a sweep."""

import os
import re
import signal
import sys
import threading
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode

from agcseg.cli import CONFIGS, check_keys, fail, to_object
from agcseg.config import Config, rate
from agcseg.errors import UserError
from agcseg.run import FREE, run

ConfigStore.instance().store(name="schema", node=Config)

# Overrides that stand in the run's name anyway, or do not tell two runs apart.
NAMED = {"experiment", "network", "norm", "data", "minibatch", "lr.base", "lr.value", "seed"} | FREE


def run_name(config: Config, overrides: list[str]) -> str:
    """Folder name of a run, from its configuration alone: the same command finds the same folder again."""
    name = f"{config.network.name}-{config.norm.name}-mb{config.minibatch}-lr{rate(config):g}-seed{config.seed}"
    for override in sorted(overrides):
        key, _, value = override.lstrip("+~").partition("=")
        if key not in NAMED and not key.startswith("hydra"):
            name += f"-{key}={re.sub(r'[^A-Za-z0-9._]+', 'x', value).strip('x')}"
    return name


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def _job(cfg) -> float | None:
    hydra_config = HydraConfig.get()
    try:
        config = to_object(cfg)
        folder = Path("outputs") / config.name / (config.run or run_name(config, list(hydra_config.overrides.task)))
        return run(config, folder).get("pixel_error")
    except torch.OutOfMemoryError as full:
        first = str(full).splitlines()[0]
        error = UserError(f"out of memory ({first}); try a smaller minibatch, accumulate=2 or precision=bf16")
    except UserError as user_error:
        error = user_error
    if hydra_config.mode == RunMode.RUN:
        fail("agcseg-train", error)
    # In a sweep the other runs go on: the launcher gets the error, of a kind that is shown without a traceback.
    print(f"agcseg-train: error: {error}", file=sys.stderr)
    raise CompactHydraException(str(error))


def _terminated(number: int, frame) -> None:
    # Past sys.stderr, which may be in the middle of a line of its own.
    os.write(2, b"\nagcseg-train: terminated; the same command goes on from the last epoch\n")
    # Wherever this interrupts, TensorBoard may be left holding a lock that closing it waits for, for ever.
    forced = threading.Timer(5, os._exit, [143])
    forced.daemon = True
    forced.start()
    raise SystemExit(143)


def main() -> None:
    check_keys("agcseg-train", sys.argv[1:], Config)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        _job()
    except KeyboardInterrupt:
        print("\nagcseg-train: interrupted; the same command goes on from the last epoch", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
