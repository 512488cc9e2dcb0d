"""Where jobs may run now. A GPU on which another sweep or another program computes is not free."""

import contextlib
import fcntl
import os
import subprocess
import time
from collections import Counter
from pathlib import Path

from ._devices import Device

LOCKS = "HYDRA_GPUS_LAUNCHER_LOCKS"  # folder of the locks, one for all sweeps of the machine; /tmp unless set


class Slots:
    """The devices, each for as many jobs at a time as it may have.

    From the start of its first job there to the end of its last, a sweep holds the lock of a GPU. The jobs inherit it,
    so that it outlives a launcher that is killed. A GPU that was asked for is taken all the same.

    Attributes:
        why_not: why devices were refused when last looked at, in words; empty if none was.
    """

    def __init__(self, devices: list[Device], jobs_per_device: int) -> None:
        self.number = len(devices) * jobs_per_device
        self._devices, self._each = devices, jobs_per_device
        self._jobs: Counter[Device] = Counter()
        self._locks: dict[Device, int] = {}
        self._refused: dict[Device, tuple[float, str]] = {}  # until when, and why

    @property
    def why_not(self) -> str:
        return "; ".join(f"{device.name}: {why}" for device, (_, why) in self._refused.items())

    def take(self) -> Device | None:
        """The device with the fewest jobs that may have another one."""
        for device in sorted(self._devices, key=self._jobs.__getitem__):
            if self._jobs[device] < self._each and (self._jobs[device] or self._is_free(device)):
                self._jobs[device] += 1
                return device
        return None

    def give_back(self, device: Device) -> None:
        self._jobs[device] -= 1
        if not self._jobs[device] and device in self._locks:
            os.close(self._locks.pop(device))

    def lock(self, device: Device) -> list[int]:
        """The descriptor by which the jobs on a device hold its lock."""
        return [self._locks[device]] if device in self._locks else []

    def _is_free(self, device: Device) -> bool:
        if not device.visible:
            return True
        now = time.monotonic()
        if now < self._refused.get(device, (0.0, ""))[0]:
            return False
        name = "".join(c if c.isalnum() or c == "-" else "_" for c in device.uuid or f"number-{device.visible}")
        lock = try_lock(Path(os.environ.get(LOCKS, "/tmp")) / f"hydra-gpus-launcher-{name}.lock")
        why = "" if lock is not None else "another sweep runs there"
        if lock is not None and not device.asked_for and (pid := computing().get(device.uuid)):
            why = f"process {pid} computes there"
            os.close(lock)
        if why and not device.asked_for:
            self._refused[device] = now + 2.0, why
            return False
        self._refused.pop(device, None)
        if lock is not None:
            self._locks[device] = lock
        return True


def try_lock(path: Path) -> int | None:
    """Lock a file for reading processes too, other users' files among them.

    Returns:
        the descriptor that holds the lock, to be closed; None if somebody else has it.
    """
    with contextlib.suppress(OSError):  # it is there, or cannot be
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        os.fchmod(descriptor, 0o644)
        os.close(descriptor)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return os.open(os.devnull, os.O_RDONLY)  # nobody can lock it
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks
        pass
    return descriptor


def computing() -> dict[str, str]:
    """GPUs on which a process computes, by UUID, each with the number of one such process; none where nvidia-smi does
    not answer."""
    command = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = [line.split(",") for line in answer.stdout.splitlines() if line.count(",") == 1]
    return {uuid.strip(): pid.strip() for uuid, pid in pairs if pid.strip() != str(os.getpid())}
