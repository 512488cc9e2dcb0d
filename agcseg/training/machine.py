"""The device a run computes on, and the memory it took."""

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from agcseg.errors import UserError, first_line
from agcseg.nn import ConvUnit

SIGNS_OF_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",  # the CPU's allocator
    "not enough memory",  # the same on Windows
    "alloc_failed",  # CUDNN_STATUS_..., CUBLAS_STATUS_...
    "host_allocation_failed",
    "unable to find an engine",  # cuDNN has algorithms, and no room for the workspace of any
)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


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
            keep_freed_memory()
            return torch.device("cpu")  # "cpu:0" is another name of it, and compares as another device
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device={name}: cannot be used here ({first_line(error)}); try device=auto or device=cpu"
        ) from None
    return device


def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees, where the C library is glibc.

    Each step frees the maps of the one before and asks for as many again. Left to itself glibc gives large ones back to
    the system, which clears every page anew: a fifth of SegNet's step at 256x512 in float32, NCHW.
    """
    with contextlib.suppress(OSError, AttributeError):  # of other systems
        for parameter, value in (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1):
            ctypes.CDLL(None).mallopt(parameter, value)


def give_back_freed_memory() -> None:
    """To the system, all of it: what this process has freed is not in use."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short, the device's or the computer's.

    torch has an exception for its own CUDA allocator only. cuDNN that finds no room for the workspace of any algorithm,
    cuBLAS without its handle, pinned memory and the CPU's allocator raise plain RuntimeErrors.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS_OF_NO_MEMORY)


@contextlib.contextmanager
def settings(precision: str, deterministic: bool = False) -> Iterator[None]:
    """torch's global settings for a run, a benchmark or a prediction; at the end they are as they were before.

    With `deterministic` on a GPU the environment's CUBLAS_WORKSPACE_CONFIG is set too, and stays.

    Args:
        precision: "tf32" lets convolutions and matrix products on a GPU round their float32 factors to 10 bits; with
            "fp32" and "bf16" what is float32 is computed as IEEE has it (torch's own default is TF32 in convolutions).
        deterministic: torch's deterministic algorithms, and none chosen by timing.
    """
    flags, of_tf32 = _tf32_flags(precision == "tf32")
    flags += [(torch.backends.cudnn, "benchmark"), (torch.utils.deterministic, "fill_uninitialized_memory")]
    before, were_deterministic = [getattr(*flag) for flag in flags], torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    values = of_tf32, of_tf32, not deterministic, before[-1] and not deterministic
    try:
        for (module, name), value in zip(flags, values, strict=True):
            setattr(module, name, value)
        _use_deterministic_algorithms(deterministic, warn_only)
        yield
    finally:
        for (module, name), value in zip(flags, before, strict=True):
            setattr(module, name, value)
        _use_deterministic_algorithms(were_deterministic, warn_only)


def _tf32_flags(wanted: bool) -> tuple[list[tuple[Any, str]], bool | str]:
    """Where torch is told of TF32 in convolutions and products, and the value to tell.

    In the older of its two ways, which torch.compile and cudnn.flags read; that raises after somebody used the newer.
    """
    try:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32  # noqa: B018
    except RuntimeError:
        cudnn: Any = torch.backends.cudnn
        newer = [(cudnn.conv, "fp32_precision"), (torch.backends.cuda.matmul, "fp32_precision")]
        return newer, "tf32" if wanted else "ieee"
    return [(torch.backends.cudnn, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32")], wanted


def _use_deterministic_algorithms(wanted: bool, warn_only: bool) -> None:
    if wanted != torch.are_deterministic_algorithms_enabled():  # torch imports its compiler to be told: 1.5 seconds
        torch.use_deterministic_algorithms(wanted, warn_only=warn_only)


def channels_last(wanted: bool | str, device: torch.device) -> bool:
    """Whether maps lie channels-last in memory; "auto": where that is faster.

    That is on CUDA, whose convolutions would turn every map around otherwise, and on CPUs with AVX-512 (a SegNet step
    at 256x512 took 1.42 s on one, against 1.61 s; on one with AVX2 it lost).
    """
    if wanted == "auto":
        return device.type == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return bool(wanted)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        give_back_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of earlier runs in this process


def peak_memory(device: torch.device) -> float:
    """MiB: CUDA's counter, or the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    sizes = _process_sizes()
    if "VmHWM" in sizes:
        return sizes["VmHWM"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def idle_memory(device: torch.device) -> float:
    """MiB in use now: by CUDA's counter, or by the process itself, the files that it maps left out."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    give_back_freed_memory()
    return _process_sizes().get("RssAnon") or peak_memory(device)


def added_memory(device: torch.device, idle: float) -> float:
    """MiB: the peak since `reset_peak_memory` above `idle`, of `idle_memory`; of a process again without mapped files,
    for how much of the data's cache lies in memory says nothing about the training."""
    sizes = {} if device.type == "cuda" else _process_sizes()
    return peak_memory(device) - sizes.get("RssFile", 0.0) - sizes.get("RssShmem", 0.0) - idle


def _process_sizes() -> dict[str, float]:
    """Of /proc/self/status, in MiB; empty elsewhere than on Linux."""
    try:
        lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    except OSError:
        return {}
    return {line[0].rstrip(":"): int(line[1]) / 2**10 for line in lines if line[-1] == "kB"}


def compiled(network: nn.Module, mode: str = "default") -> nn.Module:
    """`torch.compile` in one of its modes.

    Of a network of fast units it leaves the layouts as they are: making maps channels-last, as the compiler does for
    plain convolutions on a CPU, would have it keep a copy of every filter for backward.
    """
    options = torch._inductor.list_mode_options(mode)
    if any(isinstance(module, ConvUnit) and module.is_fast for module in network.modules()):
        options = {**options, "layout_optimization": False}
    return cast(nn.Module, torch.compile(network, options=options))


@contextlib.contextmanager
def keeping(network: nn.Module) -> Iterator[dict[int, int]]:
    """Counts the bytes that autograd keeps from forward to backward: of each storage once, the parameters left out.

    Copies of parameters, such as filters with a gain folded in, count. The first backward ends the count.
    """
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    over = False

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not over and storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that keeps its own output is freed by its backward only

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal over
        over = True
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield storages
