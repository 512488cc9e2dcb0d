"""A Hydra launcher for the GPUs of one Linux machine: one process per job, one free GPU each, a queue, a live table.

    python app.py -m hydra/launcher=gpus lr=0.1,0.01 seed=1,2,3
    python app.py -m hydra/launcher=gpus hydra.launcher.devices=[0,2] hydra.launcher.jobs_per_device=2 ...
    python app.py -m hydra/launcher=gpus hydra.launcher.devices=cpu hydra.launcher.jobs_per_device=4 ...

A job's output goes to SWEEP_DIR/.jobs/JOB.log. What it tells of itself it writes, as JSON, into the file that the
environment variable RUN_STATUS_FILE names, as a whole and as often as it likes (write another file beside it, then
rename); all keys are optional:

    {"state": "running", "progress": "epoch 3/150", "error": "23.1 %", "eta_s": 1200, "reason": "..."}

`state` at the end may be any word, such as "diverged" or "skipped"; a job that ends with exit code 0 and says nothing
else has "finished". `eta_s` counts from the moment of writing. Around the task function, the launcher adds
"return_value", what the task returned, if JSON can hold it: that is what a sweeper gets.

A job that raises, is killed or runs out of memory touches no other. Ctrl-C or SIGTERM sends SIGTERM to all jobs, which
raises SystemExit(143) in them, and after `grace_s` seconds SIGKILL to what is left; a second signal does so at once.
If the launcher itself is killed, each job notices (the pipe that is held open to it ends) and does the same to itself.
What a job started and left behind in its process group is killed when the job ends. Exit code: 0 if all jobs ended by
themselves, 1 if some failed, 130 after Ctrl-C, 143 after SIGTERM.

As with multiprocessing's "spawn", a job imports the main module again: guard the call of the Hydra main with
`if __name__ == "__main__":`, and register resolvers at the top level of a module.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

# ruff: noqa: UP045 - OmegaConf wants Optional[...] on Python 3.10


@dataclass
class GpusLauncherConf:
    """With CUDA_VISIBLE_DEVICES set, its entries are the GPUs there are, and numbers count among them, as in any CUDA
    program."""

    _target_: str = "hydra_plugins.hydra_gpus_launcher.launcher.GpusLauncher"
    devices: Any = "auto"  # auto (all GPUs, or the CPU if there is none) | a list of GPUs | cpu
    jobs_per_device: int = 1  # at a time; on the CPU they share the cores
    grace_s: float = 30.0  # from SIGTERM to SIGKILL


ConfigStore.instance().store(group="hydra/launcher", name="gpus", node=GpusLauncherConf, provider="hydra_gpus_launcher")


class GpusLauncher(Launcher):
    def __init__(self, devices: Any, jobs_per_device: int, grace_s: float) -> None:
        self.devices = devices
        self.jobs_per_device = jobs_per_device
        self.grace_s = grace_s
        self.config: Optional[DictConfig] = None
        self.hydra_context: Optional[HydraContext] = None
        self.task_function: Optional[TaskFunction] = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from ._launch import launch  # every Hydra program imports this module: only a sweep pays for the rest

        return launch(self, job_overrides, initial_job_idx)
