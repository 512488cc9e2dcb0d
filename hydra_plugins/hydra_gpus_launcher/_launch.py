"""From a sweep's overrides to jobs, and from their ends to Hydra's JobReturns."""

import contextlib
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
from typing import TextIO

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf, open_dict

from ._child import LOADING
from ._devices import find_devices
from ._queue import Job, run_queue
from ._slots import Slots
from ._table import event_line, final_lines, labels, live_lines


def launch(launcher, job_overrides: Sequence[Sequence[str]], first_number: int) -> list[JobReturn]:
    """Run all jobs of a sweep; the same overrides twice are one job.

    Raises:
        CompactHydraException: the settings cannot be used, or the task function cannot be found by another process.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM.
    """
    if LOADING in os.environ:
        raise CompactHydraException("a job's import of the main module must not start the sweep again")
    _fill_standard_streams()
    setup_globals()
    config = launcher.config
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    if launcher.jobs_per_device < 1:
        raise CompactHydraException(f"hydra.launcher.jobs_per_device={launcher.jobs_per_device}: must be at least 1")
    _refuse_batches(config.hydra.sweeper)
    _refuse_lost_sweeps(launcher, job_overrides)
    wanted = OmegaConf.to_container(launcher.devices) if OmegaConf.is_config(launcher.devices) else launcher.devices
    devices, found = find_devices(wanted, os.environ)
    slots = Slots(devices, launcher.jobs_per_device)
    start = {
        "grace_s": launcher.grace_s,
        "path": [os.path.abspath(folder) for folder in sys.path],
        "argv": sys.argv,
        "task": _reference(launcher.task_function),
        **_main_module(),
    }
    returns: dict[tuple[str, ...], JobReturn] = {}
    jobs: dict[tuple[str, ...], Job] = {}
    shown = [list(filter_overrides(overrides)) for overrides in job_overrides]
    named = labels([[override.lstrip("+") for override in overrides] for overrides in shown])
    for i, (overrides, label) in enumerate(zip(job_overrides, named, strict=True)):
        overrides = tuple(overrides)
        if overrides not in jobs:
            returns[overrides] = JobReturn(overrides=shown[i])
            prepare = functools.partial(_prepare, launcher, start, overrides, first_number + i, returns[overrides])
            jobs[overrides] = Job(label, _file_name(label, overrides), prepare)

    todo = list(jobs.values())
    shared = f", {launcher.jobs_per_device} jobs at a time on each" if launcher.jobs_per_device > 1 else ""
    say(f"{len(todo)} jobs on {found}{shared}")
    show = _shower(todo, slots)
    try:
        received = run_queue(todo, slots, launcher.grace_s, show)
    finally:
        show(None, over=True)
    say("\n".join(final_lines(todo, time.time())))
    if received:
        say("the sweep was stopped; the same command runs what is left", sys.stderr)
        raise SystemExit(128 + received)
    for overrides, job in jobs.items():
        result = returns[overrides]
        result.status = JobStatus.FAILED if job.state == "failed" else JobStatus.COMPLETED
        result.return_value = job.status.get("return_value")
        if job.state == "failed":
            where = f" (output in {job.log})" if job.log else ""
            result.return_value = CompactHydraException(f"{job.label}: {job.reason}{where}")
    return [returns[tuple(overrides)] for overrides in job_overrides]


def _fill_standard_streams() -> None:
    """Where stdin, stdout or stderr is closed, the next file that is opened would take its place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _refuse_batches(sweeper) -> None:
    """Hydra's own sweeper ends a sweep at the first batch with a failure."""
    size = sweeper.get("max_batch_size")
    if size and size > 0 and str(sweeper.get("_target_")).endswith(".BasicSweeper"):
        raise CompactHydraException(
            f"hydra.sweeper.max_batch_size={size}: a failure in one batch would keep the next from starting; leave it "
            "out, this launcher has a queue (hydra.launcher.devices and jobs_per_device say how many run at a time)"
        )


def _refuse_lost_sweeps(launcher, job_overrides: Sequence[Sequence[str]]) -> None:
    """Hydra takes sweep and launcher from what all jobs share: those of the files that a sweep over a group names, such
    as experiment=a,b, it would leave out without a word."""
    loader, of_all = launcher.hydra_context.config_loader, launcher.config.hydra
    common = set.intersection(*map(set, job_overrides))
    seen = set()
    for overrides in job_overrides:
        new = {o for o in overrides if o not in common and o not in seen and _names_option(loader, o)}
        if not new:
            continue
        seen |= new
        own = loader.load_sweep_config(launcher.config, list(overrides)).hydra
        for what, has, used in (
            ("a sweep", own.sweeper.get("params"), of_all.sweeper.get("params")),
            ("a launcher", own.launcher, of_all.launcher),
        ):
            if has and has != used:
                raise CompactHydraException(
                    f"{' '.join(sorted(new))}: there is {what} of its own in that file, which Hydra leaves out in a "
                    "sweep over several files; start one sweep for each"
                )


def _names_option(loader, override: str) -> bool:
    group = override.lstrip("+").partition("=")[0].partition("@")[0]
    return "." not in group and bool(loader.get_group_options(group))


def _prepare(launcher, start: dict, overrides: tuple[str, ...], number: int, result: JobReturn) -> tuple[bytes, Path]:
    """What the child needs, and the folder of its files, composed when the job starts."""
    context = launcher.hydra_context
    config = context.config_loader.load_sweep_config(launcher.config, list(overrides))
    with open_dict(config):
        config.hydra.job.id = str(number)
        config.hydra.job.num = number
    result.cfg, result.hydra_cfg = deepcopy(config), OmegaConf.masked_copy(config, "hydra")
    with open_dict(result.cfg):
        del result.cfg["hydra"]
    instances = Singleton.get_state()["instances"]
    message = pickle.dumps((start, pickle.dumps((context, config, instances))))
    return message, Path(str(config.hydra.sweep.dir)) / ".jobs"


def _reference(task) -> tuple[str, str, int]:
    """Where another process finds the task function: module, name, and how many decorators lie around it there."""
    module, name = str(getattr(task, "__module__", "")), getattr(task, "__qualname__", "")
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


def say(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print on a stream, stdout unless given. A pipe that nobody reads, a terminal that is gone or a full disk ends no
    sweep: from then on it goes on in silence there."""
    stream = stream or sys.stdout
    if stream is None:  # closed when Python started
        return
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), end=end, file=stream, flush=True)
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _shower(jobs: list[Job], slots: Slots):
    """What shows the jobs: a table that is drawn again and again on a terminal, else a line per event."""
    try:
        terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # no stdout
        terminal = False
    drawn, next_draw, said_of_slots = 0, 0.0, ""

    def show(job: Job | None, over: bool = False) -> None:
        nonlocal drawn, next_draw, said_of_slots
        now, why_not = time.time(), slots.why_not
        note = f"{why_not} (hydra.launcher.devices=[...] takes it all the same)" if why_not else ""
        if not terminal:
            if job:
                say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {event_line(job)}")
            elif note and why_not != said_of_slots:
                said_of_slots = why_not
                say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} not used now: {note}")
            return
        if not job and now < next_draw and not over:
            return
        width, height = shutil.get_terminal_size()
        if not (width and height):  # a terminal that does not know; Python 3.10 says so, later ones say 80, 24
            width, height = 80, 24
        said = [event_line(job)] if job and job.state == "failed" else []
        lines = [] if over else live_lines(jobs, width, height, now, note)
        up = f"\033[{drawn}F" if drawn else ""
        say(up + "".join(f"{line}\033[K\n" for line in said + lines) + "\033[J", end="")
        drawn, next_draw = len(lines), now + 0.5

    return show
