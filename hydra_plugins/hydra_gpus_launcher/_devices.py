"""Which devices there are, without importing torch, and the environment that shows a job its own."""

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hydra.errors import CompactHydraException


class Device(NamedTuple):
    name: str  # in tables
    visible: str  # CUDA_VISIBLE_DEVICES of its jobs


CPU = Device("cpu", "")


def find_devices(devices: Any, environment: Mapping[str, str]) -> list[Device]:
    """The devices that `devices` asks for: "auto", "cpu", or GPUs by number or UUID.

    Raises:
        CompactHydraException: it cannot be understood, or a GPU is not there or named twice.
    """
    if devices == "cpu":
        return [CPU]
    pool = visible_gpus(environment)
    if devices == "auto":
        return [Device(_name(gpu), gpu) for gpu in pool] or [CPU]
    if isinstance(devices, (int, str)):
        devices = [devices]
    what, chosen = f"hydra.launcher.devices={devices}", []
    for wanted in devices or []:
        wanted = str(wanted)
        by_number = pool[int(wanted)] if wanted.isdecimal() and int(wanted) < len(pool) else None
        gpu = by_number or (wanted if wanted in pool and not wanted.isdecimal() else None)
        if gpu is None:
            there = f"there are {len(pool)} GPUs ({', '.join(pool)})" if pool else "no GPU was found"
            raise CompactHydraException(f"{what}: {there}; give auto, cpu, or a list such as [0,2]")
        chosen.append(Device(_name(gpu), gpu))
    if not chosen or len(set(chosen)) < len(chosen):
        raise CompactHydraException(f"{what}: name at least one GPU, and none twice (jobs_per_device=2 shares one)")
    return chosen


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that a CUDA program started here would see, as entries for CUDA_VISIBLE_DEVICES."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        pool = []
        for entry in listed.split(","):
            if not re.fullmatch(r"\d+|(GPU|MIG)-\S+", entry.strip()):
                break  # CUDA too ignores what follows an entry such as -1
            pool.append(entry.strip())
        return pool
    return _installed_gpus()


def _installed_gpus() -> list[str]:
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
        if answer.returncode == 0:
            return parse_list(answer.stdout)
    except (OSError, subprocess.TimeoutExpired):
        pass
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number in range(len(list(folder.iterdir())))] if folder.is_dir() else []


def parse_list(text: str) -> list[str]:
    """GPUs from `nvidia-smi -L`: the number of each, or of one that is divided the UUIDs of its parts."""
    gpus, parts = [], {}
    for line in text.splitlines():
        if gpu := re.match(r"GPU (\d+):", line):
            gpus.append(gpu[1])
        elif gpus and (part := re.match(r"\s+MIG .*UUID: (MIG-[^)]+)\)", line)):
            parts.setdefault(gpus[-1], []).append(part[1])
    return [entry for gpu in gpus for entry in parts.get(gpu, [gpu])]


def job_environment(device: Device, slots: int, status_file: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a job: it sees one device, and of the CPU's cores its share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    unless_set = {
        "OMP_NUM_THREADS": str(max(1, cores // slots)),
        "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads that spin take the cores of other jobs: up to 40 times slower
    }
    if device.visible and "CUDA_VISIBLE_DEVICES" not in environment:
        unless_set["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the numbers of nvidia-smi
    own = {"CUDA_VISIBLE_DEVICES": device.visible, "RUN_STATUS_FILE": str(status_file)}
    return {**unless_set, **environment, **own}


def _name(gpu: str) -> str:
    return f"GPU {gpu}" if gpu.isdecimal() else gpu[:12]
