"""The queue: starts jobs where a device is free, follows them to their end, stops them when told to."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ._devices import Device, job_environment
from ._slots import Slots, try_lock

CHILD = str(Path(__file__).with_name("_child.py"))
HOLDS = "HYDRA_GPUS_LAUNCHER_HOLDS"  # descriptors of the locks that a job holds
ELSEWHERE = "another sweep runs it"


@dataclass(eq=False)
class Job:
    label: str
    file_name: str  # of its files in .jobs
    prepare: Callable[[], tuple[bytes, Path]]  # what the child reads, and the folder of .jobs
    process: subprocess.Popen = field(init=False)  # once it is started
    state: str = "waiting"
    reason: str = ""
    status: dict = field(default_factory=dict)  # as read last from the status file
    told: float = 0.0  # when it was written, seconds since 1970
    device: Device | None = None
    started: float | None = None
    ended: float | None = None
    message: bytes = b""
    log: Path | None = None  # once it is claimed
    again: float = 0.0  # not to be tried before, on the monotonic clock
    log_start: int = 0

    @property
    def status_file(self) -> Path:
        assert self.log  # claimed
        return self.log.with_suffix(".json")


def run_queue(jobs: list[Job], slots: Slots, grace_s: float, show: Callable[[Job | None], None]) -> int | None:
    """Run all jobs, each where there is a free slot.

    Args:
        show: called with each job that has started, has ended or has to wait for another sweep, and often with None.

    Returns:
        the number of the signal that stopped the queue, or None.
    """
    received: list[int] = []
    pauses: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number, numbers in ((signal.SIGINT, received), (signal.SIGTERM, received), (signal.SIGTSTP, pauses)):
            handlers[number] = signal.signal(number, partial(_note, numbers))
    waiting = list(jobs)
    running: list[Job] = []
    deadline: float | None = None
    try:
        while running or (waiting and not received):
            if pauses:
                _pause(running)
                pauses.clear()
            if waiting and not received:
                _start_some(waiting, running, slots, show)
            for job in running[:]:
                _read_status(job)
                if _ended(job, bool(received)):
                    running.remove(job)
                    slots.give_back(job.device)  # type: ignore[arg-type]  # it has started
                    show(job)
            if received and deadline is None:
                deadline = time.monotonic() + grace_s
                for job in running:
                    job.process.terminate()
            elif deadline is not None and (time.monotonic() > deadline or len(received) > 1):
                for job in running:
                    _signal_group(job, signal.SIGKILL)
            show(None)
            time.sleep(0.1)
    finally:
        for job in running:
            _signal_group(job, signal.SIGKILL)
            job.process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return received[0] if received else None


def _note(numbers: list[int], number: int, frame) -> None:
    numbers.append(number)


def _pause(running: list[Job]) -> None:
    """Ctrl-Z: stop the jobs and this process, until the shell's fg or bg."""
    for job in running:
        _signal_group(job, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)
    for job in running:
        _signal_group(job, signal.SIGCONT)


def _start_some(waiting: list[Job], running: list[Job], slots: Slots, show) -> None:
    """Start as many jobs as there are free slots, in order, without those that another sweep is running."""
    now = time.monotonic()
    for job in [job for job in waiting if now >= job.again]:
        if (device := slots.take()) is None:
            return
        try:
            lock = _claim(job)
            if lock is None:
                slots.give_back(device)
                job.again = now + 1.0
                if not job.reason:
                    job.reason = ELSEWHERE
                    show(job)
                continue
            _start(job, device, slots, lock)
            running.append(job)
        except Exception as error:
            slots.give_back(device)
            job.state, job.reason = "failed", " ".join(f"{type(error).__name__}: {error}".split())
            job.started = job.ended = time.time()
        waiting.remove(job)
        show(job)


def _claim(job: Job) -> int | None:
    """Lock the job's log file, so that no other launch of the same sweep writes its files."""
    if job.log is None:
        job.message, folder = job.prepare()
        folder.mkdir(parents=True, exist_ok=True)
        job.log = folder / f"{job.file_name}.log"
    return try_lock(job.log)


def _start(job: Job, device: Device, slots: Slots, lock: int) -> None:
    assert job.log
    try:
        job.status_file.unlink(missing_ok=True)
        holds = [lock, *slots.lock(device)]
        environment = job_environment(device, slots.number, job.status_file.absolute(), os.environ)
        environment |= {"PYTHONUNBUFFERED": "1", HOLDS: ",".join(map(str, holds))}
        with job.log.open("ab") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {job.label} on {device.name}\n".encode())
            log.flush()
            job.log_start = log.tell()
            job.process = subprocess.Popen(
                [sys.executable, CHILD],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=holds,
                start_new_session=True,  # so that the terminal's Ctrl-C reaches the launcher alone
            )
    finally:
        os.close(lock)
    job.device, job.started, job.state, job.reason = device, time.time(), "running", ""
    with contextlib.suppress(BrokenPipeError):  # a child that has died already: its exit code will tell
        assert job.process.stdin
        job.process.stdin.write(job.message)
        job.process.stdin.flush()


def _ended(job: Job, stopping: bool) -> bool:
    """Whether the job has ended; if so, how."""
    if os.waitid(os.P_PID, job.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return False
    _signal_group(job, signal.SIGKILL)  # what it has left behind: data loaders keep memory of the GPU
    code = job.process.wait()
    with contextlib.suppress(BrokenPipeError):
        assert job.process.stdin
        job.process.stdin.close()
    _read_status(job)
    job.ended = time.time()
    told = job.status.get("state", "running")
    job.reason = str(job.status.get("reason") or "")
    if code == 0:
        job.state = "finished" if told == "running" else str(told)
    elif stopping:
        job.state, job.reason = "interrupted", ""
    else:
        job.state = "failed"
        if code < 0:
            name = signal.Signals(-code).name
            job.reason = f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        elif told != "failed" or not job.reason:
            job.reason = f"exit code {code}: {_last_line(job)}"
    return True


def _signal_group(job: Job, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(job.process.pid, number)


def _read_status(job: Job) -> None:
    try:
        told = job.status_file.stat().st_mtime
        if told != job.told:
            status = json.loads(job.status_file.read_text())
            if isinstance(status, dict):
                job.status, job.told = status, told
    except (OSError, ValueError):  # not there yet, or not written as it should be
        pass


def _last_line(job: Job) -> str:
    assert job.log
    try:
        with open(job.log, "rb") as log:
            log.seek(max(job.log_start, log.seek(0, os.SEEK_END) - 4096))
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError as error:
        return f"its output cannot be read ({error.strerror})"
    return lines[-1].strip() if lines else "it wrote nothing"
