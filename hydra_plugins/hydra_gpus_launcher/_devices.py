"""Which devices there are, without importing torch, and the environment that shows a job its own."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hydra.errors import CompactHydraException


class Device(NamedTuple):
    name: str  # in tables
    visible: str  # CUDA_VISIBLE_DEVICES of its jobs
    uuid: str = ""  # of a GPU, where it is known
    asked_for: bool = False  # by number or UUID: it is taken even if others compute on it


CPU = Device("cpu", "")
PROC, DEV = Path("/proc/driver/nvidia/gpus"), Path("/dev")
ASK_TORCH = """
import torch
for i in range(torch.cuda.device_count()):
    print("GPU", i, getattr(torch.cuda.get_device_properties(i), "uuid", ""))
"""


def find_devices(devices: Any, environment: Mapping[str, str]) -> tuple[list[Device], str]:
    """The devices that `devices` asks for: "auto", "cpu", or GPUs by number or UUID; and what was found, in words.

    Raises:
        CompactHydraException: it cannot be understood, or a GPU is not there or named twice.
    """
    if devices == "cpu":
        return [CPU], "the CPU, as asked for"
    pool, by = visible_gpus(environment)
    if devices == "auto":
        names = ", ".join(gpu.name for gpu in pool)
        return pool or [CPU], f"{names} (by {by})" if pool else f"the CPU; no GPU was found (by {by})"
    if isinstance(devices, (int, str)):
        devices = [devices]
    what, chosen = f"hydra.launcher.devices={devices}", []
    for wanted in map(str, devices or []):
        if wanted.isdecimal():
            found = pool[int(wanted) : int(wanted) + 1]
        else:
            found = [gpu for gpu in pool if wanted == gpu.visible or (len(wanted) > 4 and gpu.uuid.startswith(wanted))]
        if len(found) != 1:
            listed = ", ".join(" ".join(dict.fromkeys(filter(None, (gpu.visible, gpu.uuid)))) for gpu in pool)
            there = f"there are {len(pool)} GPUs ({listed})" if pool else f"no GPU was found (by {by})"
            raise CompactHydraException(f"{what}: {there}; give auto, cpu, or a list such as [0,2]")
        chosen.append(found[0]._replace(asked_for=True))
    if not chosen or len(set(chosen)) < len(chosen):
        raise CompactHydraException(f"{what}: name at least one GPU, and none twice (jobs_per_device=2 shares one)")
    return chosen, f"{', '.join(gpu.name for gpu in chosen)}, as asked for"


def visible_gpus(environment: Mapping[str, str]) -> tuple[list[Device], str]:
    """The GPUs that a CUDA program started here would see, each once, and who named them."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        for ask, who in ((_nvidia_smi, "nvidia-smi"), (_proc, str(PROC)), (_torch, "torch")):
            if (found := ask(environment)) is not None:
                return [gpu for gpu, _ in found], who
        return [], f"nvidia-smi, {PROC} and torch"
    uuids = _uuids(environment) if listed.strip() else {}
    pool: dict[str, Device] = {}
    for entry in map(str.strip, listed.split(",")):
        if not re.fullmatch(r"\d+|(GPU|MIG)-\S+", entry):
            break  # CUDA too ignores what follows an entry such as -1
        uuid = uuids.get(entry, "")
        if not entry.isdecimal():  # CUDA takes the beginning of a UUID too
            uuid = next((known for known in uuids.values() if known.startswith(entry)), entry)
        pool.setdefault(uuid or entry, _gpu(entry, uuid))
    return list(pool.values()), "CUDA_VISIBLE_DEVICES"


def _uuids(environment: Mapping[str, str]) -> dict[str, str]:
    """UUIDs of all GPUs, and of the parts of divided ones, by the entry that names each; without numbers where CUDA may
    count the GPUs in another order than nvidia-smi."""
    found = _nvidia_smi(environment) or _proc(environment) or []
    same = environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({model for _, model in found}) <= 1
    return {gpu.visible if same else gpu.uuid: gpu.uuid for gpu, _ in found}


def _nvidia_smi(environment: Mapping[str, str]) -> list[tuple[Device, str]] | None:
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_list(answer.stdout) if answer.returncode == 0 else None


def parse_list(text: str) -> list[tuple[Device, str]]:
    """GPUs from `nvidia-smi -L`, or of one that is divided its parts; each with the model's name."""
    gpus: list[tuple[Device, str, list[Device]]] = []
    for line in text.splitlines():
        if gpu := re.match(r"GPU (\d+): (.*?)\s*(?:\(UUID: (GPU-[^)]+)\))?$", line):
            gpus.append((_gpu(gpu[1], gpu[3] or ""), gpu[2], []))
        elif gpus and (part := re.match(r"\s+MIG .*UUID: (MIG-[^)]+)\)", line)):
            gpus[-1][2].append(_gpu(part[1], part[1]))
    return [(one, model) for gpu, model, parts in gpus for one in parts or [gpu]]


def _proc(environment: Mapping[str, str]) -> list[tuple[Device, str]] | None:
    """As the driver lists them, without those that a container may not use."""
    if not PROC.is_dir():
        return None
    found: list[tuple[Device, str]] = []
    for folder in sorted(PROC.iterdir()):
        try:
            about = (folder / "information").read_text()
        except OSError:
            about = ""
        minor, uuid = (
            re.search(r"Device Minor:\s*(\d+)", about),
            re.search(r"GPU UUID:\s*(GPU-[0-9a-f-]+)$", about, re.M),
        )
        if not minor or (DEV / f"nvidia{minor[1]}").exists():
            model = re.search(r"Model:\s*(.*)", about)
            found.append((_gpu(str(len(found)), uuid[1] if uuid else ""), model[1] if model else ""))
    return found


def _torch(environment: Mapping[str, str]) -> list[tuple[Device, str]] | None:
    """As torch sees them, in a process of its own: there may be neither nvidia-smi nor /proc, as under WSL."""
    if "torch" not in sys.modules:  # a program that has not loaded it does not compute with it
        return None
    command, order = [sys.executable, "-c", ASK_TORCH], {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    try:
        answer = subprocess.run(command, env={**environment, **order}, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode:
        return None
    lines = re.findall(r"^GPU (\d+) ([0-9a-f-]*)$", answer.stdout, re.M)
    return [(_gpu(number, uuid and f"GPU-{uuid}"), "") for number, uuid in lines]


def job_environment(device: Device, slots: int, status_file: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a job: it sees one device, and of the CPU's cores its share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    unless_set = {
        "OMP_NUM_THREADS": str(max(1, cores // slots)),
        "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads that spin take the cores of other jobs: up to 40 times slower
    }
    own = {"CUDA_VISIBLE_DEVICES": device.visible, "RUN_STATUS_FILE": str(status_file)}
    if device.visible and "CUDA_VISIBLE_DEVICES" not in environment:
        own["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the numbers of nvidia-smi
    return {**unless_set, **environment, **own}


def _gpu(entry: str, uuid: str) -> Device:
    return Device(f"GPU {entry}" if entry.isdecimal() else entry[:12], entry, uuid)
