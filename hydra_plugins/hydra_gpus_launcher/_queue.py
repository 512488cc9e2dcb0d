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
from pathlib import Path

from ._devices import Device, job_environment

CHILD = str(Path(__file__).with_name("_child.py"))


@dataclass(eq=False)
class Job:
    label: str
    log: Path
    status_file: Path
    message: Callable[[], bytes]  # what the child reads; made when the job starts
    state: str = "waiting"
    reason: str = ""
    status: dict = field(default_factory=dict)  # as read last from the status file
    told: float = 0.0  # when it was written, seconds since 1970
    device: Device | None = None
    started: float | None = None
    ended: float | None = None
    process: subprocess.Popen | None = None
    log_start: int = 0


def run_queue(jobs: list[Job], slots: list[Device], grace_s: float, show: Callable[[Job | None], None]) -> int | None:
    """Run all jobs, each on one of `slots`, at most one per slot at a time.

    Args:
        slots: a device occurs once for each job that it may run at a time.
        show: called with each job that has started or ended, and often with None.

    Returns:
        the number of the signal that stopped the queue, or None.
    """
    received: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, lambda number, frame: received.append(number))
    waiting, running, free, deadline = list(jobs), [], list(slots), None
    try:
        while running or (waiting and not received):
            while waiting and free and not received:
                job = waiting.pop(0)
                used = [other.device for other in running]
                device = min(free, key=used.count)
                if _start(job, device, len(slots)):
                    free.remove(device)
                    running.append(job)
                show(job)
            for job in running[:]:
                _read_status(job)
                if _ended(job, bool(received)):
                    running.remove(job)
                    free.append(job.device)
                    show(job)
            if received and deadline is None:
                deadline = time.monotonic() + grace_s
                for job in running:
                    job.process.terminate()
            elif received and (time.monotonic() > deadline or len(received) > 1):
                for job in running:
                    _kill_group(job)
            show(None)
            time.sleep(0.1)
    finally:
        for job in running:
            _kill_group(job)
            job.process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return received[0] if received else None


def _start(job: Job, device: Device, slots: int) -> bool:
    job.device, job.started, job.state = device, time.time(), "running"
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.status_file.unlink(missing_ok=True)
    environment = job_environment(device, slots, job.status_file.absolute(), os.environ)
    try:
        message = job.message()
        with open(job.log, "ab") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {job.label} on {device.name}\n".encode())
            log.flush()
            job.log_start = log.tell()
            job.process = subprocess.Popen(
                [sys.executable, CHILD],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**environment, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # so that the terminal's Ctrl-C reaches the launcher alone
            )
    except Exception as error:
        job.state, job.ended, job.reason = "failed", time.time(), " ".join(f"{type(error).__name__}: {error}".split())
        return False
    with contextlib.suppress(BrokenPipeError):  # a child that has died already: its exit code will tell
        job.process.stdin.write(message)
        job.process.stdin.flush()
    return True


def _ended(job: Job, stopping: bool) -> bool:
    """Whether the job has ended; if so, how."""
    if os.waitid(os.P_PID, job.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return False
    _kill_group(job)  # what it has left behind: data loaders keep memory of the GPU
    code = job.process.wait()
    with contextlib.suppress(BrokenPipeError):
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


def _kill_group(job: Job) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(job.process.pid, signal.SIGKILL)


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
    with open(job.log, "rb") as log:
        log.seek(max(job.log_start, log.seek(0, os.SEEK_END) - 4096))
        lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it wrote nothing"
