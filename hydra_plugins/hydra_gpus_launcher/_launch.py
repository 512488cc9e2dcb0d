"""From a sweep's overrides to jobs, and from their ends to Hydra's JobReturns."""

import functools
import hashlib
import os
import pickle
import re
import shutil
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf, open_dict

from ._child import LOADING
from ._devices import find_devices
from ._queue import Job, run_queue
from ._table import event_line, final_lines, labels, live_lines


def launch(launcher, job_overrides: Sequence[Sequence[str]], first_number: int) -> list[JobReturn]:
    """Run all jobs of a sweep; the same overrides twice are one job.

    Raises:
        CompactHydraException: the settings cannot be used, or the task function cannot be found by another process.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM.
    """
    if LOADING in os.environ:
        raise CompactHydraException("a job's import of the main module must not start the sweep again")
    setup_globals()
    config = launcher.config
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    if launcher.jobs_per_device < 1:
        raise CompactHydraException(f"hydra.launcher.jobs_per_device={launcher.jobs_per_device}: must be at least 1")
    wanted = OmegaConf.to_container(launcher.devices) if OmegaConf.is_config(launcher.devices) else launcher.devices
    slots = find_devices(wanted, os.environ) * launcher.jobs_per_device
    start = {
        "grace_s": launcher.grace_s,
        "path": [os.path.abspath(folder) for folder in sys.path],
        "argv": sys.argv,
        "task": _reference(launcher.task_function),
        **_main_module(),
    }
    folder = Path(str(config.hydra.sweep.dir)) / ".jobs"
    returns: dict[tuple[str, ...], JobReturn] = {}
    jobs: dict[tuple[str, ...], Job] = {}
    shown = [list(filter_overrides(overrides)) for overrides in job_overrides]
    for i, (overrides, label) in enumerate(zip(job_overrides, labels(shown), strict=True)):
        overrides = tuple(overrides)
        if overrides not in jobs:
            name, returns[overrides] = _file_name(label, overrides), JobReturn(overrides=shown[i])
            message = functools.partial(_message, launcher, start, overrides, first_number + i, returns[overrides])
            jobs[overrides] = Job(label, folder / f"{name}.log", folder / f"{name}.json", message)

    todo = list(jobs.values())
    show = _shower(todo)
    try:
        received = run_queue(todo, slots, launcher.grace_s, show)
    finally:
        show(None, over=True)
    print("\n".join(final_lines(todo, time.time())), flush=True)
    if received:
        print("the sweep was stopped; the same command runs what is left", file=sys.stderr, flush=True)
        raise SystemExit(128 + received)
    for overrides, job in jobs.items():
        result = returns[overrides]
        result.status = JobStatus.FAILED if job.state == "failed" else JobStatus.COMPLETED
        result.return_value = job.status.get("return_value")
        if job.state == "failed":
            result.return_value = CompactHydraException(f"{job.label}: {job.reason} (output in {job.log})")
    return [returns[tuple(overrides)] for overrides in job_overrides]


def _message(launcher, start: dict, overrides: tuple[str, ...], number: int, result: JobReturn) -> bytes:
    """What the child needs, composed when the job starts."""
    context = launcher.hydra_context
    config = context.config_loader.load_sweep_config(launcher.config, list(overrides))
    with open_dict(config):
        config.hydra.job.id = str(number)
        config.hydra.job.num = number
    result.cfg, result.hydra_cfg = deepcopy(config), OmegaConf.masked_copy(config, "hydra")
    with open_dict(result.cfg):
        del result.cfg["hydra"]
    instances = Singleton.get_state()["instances"]
    return pickle.dumps((start, pickle.dumps((context, config, instances))))


def _reference(task) -> tuple[str, str, int]:
    """Where another process finds the task function: module, name, and how many decorators lie around it there."""
    module, name = getattr(task, "__module__", None), getattr(task, "__qualname__", "")
    try:
        found = functools.reduce(getattr, name.split("."), sys.modules[module])
    except (AttributeError, KeyError):
        found = None
    depth = 0
    while found is not task and found is not None:
        found, depth = getattr(found, "__wrapped__", None), depth + 1
    if found is None:
        raise CompactHydraException(
            f"hydra/launcher=gpus cannot run {name or task} in a process of its own: "
            "define the task function at the top level of a module"
        )
    return module, name, depth


def _main_module() -> dict[str, str | None]:
    """The program's main module by name (python -m) or by path; neither for a notebook or a package's __main__.py."""
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", None)
    path = getattr(main, "__file__", None)
    if name:
        return {"main_name": None if name.endswith("__main__") else name, "main_path": None}
    return {"main_name": None, "main_path": os.path.abspath(path) if path and os.path.isfile(path) else None}


def _file_name(label: str, overrides: tuple[str, ...]) -> str:
    """Readable, and the same when the same sweep starts again."""
    return f"{re.sub(r'[^A-Za-z0-9.=+-]+', '_', label)[:80]}-{hashlib.sha1(repr(overrides).encode()).hexdigest()[:6]}"


def _shower(jobs: list[Job]):
    """What shows the jobs: a table that is drawn again and again on a terminal, else a line per event."""
    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    drawn, next_draw = 0, 0.0

    def show(job: Job | None, over: bool = False) -> None:
        nonlocal drawn, next_draw
        now = time.time()
        if not terminal:
            if job:
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {event_line(job)}", flush=True)
            return
        if not job and now < next_draw and not over:
            return
        width, height = shutil.get_terminal_size()
        if not (width and height):  # a terminal that does not know; Python 3.10 says so, later ones say 80, 24
            width, height = 80, 24
        said = [event_line(job)] if job and job.state == "failed" else []
        lines = [] if over else live_lines(jobs, width, height, now)
        up = f"\033[{drawn}F" if drawn else ""
        print(up + "".join(f"{line}\033[K\n" for line in said + lines) + "\033[J", end="", flush=True)
        drawn, next_draw = len(lines), now + 0.5

    return show
