"""agcseg-train: one run, or with -m a sweep."""

import contextlib
import os
import re
import signal
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode

from agcseg import figure1
from agcseg.cli import CONFIGS, check_keys, fail, stopped, to_object
from agcseg.config import Config, rate
from agcseg.errors import UserError
from agcseg.record.folder import FREE
from agcseg.training import parallel
from agcseg.training.machine import out_of_memory
from agcseg.training.run import run

ConfigStore.instance().store(name="schema", node=Config)
for setting in figure1.RUNS:  # options of the group figure1, for experiment/figure1.yaml
    choices = [{"override /network": setting.network}, {"override /norm": setting.norm}]
    node = {"defaults": choices, "minibatch": setting.minibatch}
    if setting.rate != Config().lr.base * setting.minibatch:
        node["lr"] = {"value": setting.rate}
    ConfigStore.instance().store(group="figure1", name=setting.name, package="_global_", node=node)

# Overrides that stand in the run's name anyway, or do not tell two runs apart.
NAMED = {"experiment", "figure1", "network", "norm", "data", "minibatch", "lr.base", "lr.value", "seed"} | FREE


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
        # Other launchers have signals of their own: Slurm's queues the run again.
        ours = hydra_config.mode == RunMode.RUN or "RUN_STATUS_FILE" in os.environ
        with _stopped_at_once() if ours else contextlib.nullcontext():
            return run(config, folder).get("pixel_error")
    except UserError as user_error:
        error = user_error
    except (RuntimeError, MemoryError) as full:
        if not out_of_memory(full):
            raise
        first = str(full).partition("\n")[0]
        error = UserError(f"out of memory ({first}); try a smaller minibatch, accumulate=2 or precision=bf16")
    if hydra_config.mode == RunMode.RUN:
        fail("agcseg-train", error)
    # In a sweep the other runs go on: the launcher gets the error, of a kind that is shown without a traceback.
    print(f"agcseg-train: error: {error}", file=sys.stderr)
    raise CompactHydraException(str(error))


@contextlib.contextmanager
def _stopped_at_once():
    """Let SIGTERM and Ctrl-C end the process without another step, as safely as kill -9: all files are written whole.

    An exception raised wherever the signal arrives may find a lock held, TensorBoard's or the log's, that the way out
    waits for, for ever.
    """

    def stop(number: int, frame) -> None:
        os.write(2, b"\nagcseg-train: stopped; the same command goes on from the last epoch\n")
        os._exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    check_keys("agcseg-train", sys.argv[1:], Config)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and {"-m", "--multirun"} & set(sys.argv[1:]):
        fail("agcseg-train", UserError("torchrun shares out one run over devices; start a sweep, -m, without it"))
    try:
        _job()
        parallel.leave()
    except KeyboardInterrupt:
        stopped("agcseg-train")


if __name__ == "__main__":
    main()
