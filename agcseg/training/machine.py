"""The device a run computes on, and the memory it took."""

import os
import resource
import sys
from pathlib import Path

import torch

from agcseg.errors import UserError

SIGNS_OF_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",  # the CPU's allocator
    "not enough memory",  # the same on Windows
    "alloc_failed",  # CUDNN_STATUS_..., CUBLAS_STATUS_...
    "host_allocation_failed",
    "unable to find an engine",  # cuDNN has algorithms, and no room for the workspace of any
)


def find_device(name: str) -> torch.device:
    """The device that `device=` names; "auto" is CUDA if there is any, else the CPU.

    A CUDA device always has its index, as tensors on it have, and is made the current one: pinned memory, cuBLAS, NCCL
    and kernels that name no device then belong to it.

    Raises:
        UserError: it cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("a run computes on the CPU or on CUDA")
        if device.type == "cpu":
            return torch.device("cpu")  # "cpu:0" is another name of it, and compares as another device
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"device={name}: cannot be used here ({first}); try device=auto or device=cpu") from None
    return device


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short, the device's or the computer's.

    torch has an exception for its own CUDA allocator only. cuDNN that finds no room for the workspace of any algorithm,
    cuBLAS without its handle, pinned memory and the CPU's allocator raise plain RuntimeErrors.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS_OF_NO_MEMORY)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of earlier runs in this process


def peak_memory(device: torch.device) -> float:
    """MiB: CUDA's counter, or the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
