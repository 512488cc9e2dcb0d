"""One run over several devices: what the processes that torchrun starts must agree on. With one process, nothing."""

import contextlib
import logging
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from agcseg.errors import UserError


def world() -> int:
    """Number of processes that share this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process. Process 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def join(name: str) -> str:
    """Meet the other processes, if torchrun started this one.

    Args:
        name: what `device=` names. Processes with GPUs take one each, so that none of them can be named.

    Returns:
        the device of this process, for `agcseg.training.machine.find_device`.

    Raises:
        UserError: there are fewer GPUs than processes, `name` is one GPU, or something else started them.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return name
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={name}: with torchrun each process takes a GPU of its own; use auto, cuda or cpu")
    if "LOCAL_RANK" not in os.environ:
        raise UserError(
            "WORLD_SIZE is set and LOCAL_RANK is not: let torchrun start the processes, or unset WORLD_SIZE"
        )
    local = int(os.environ["LOCAL_RANK"])
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        name = "cpu"
    elif local >= torch.cuda.device_count():
        raise UserError(f"torchrun: process {local + 1} has no GPU, there are {torch.cuda.device_count()}; start fewer")
    else:
        name = f"cuda:{local}"
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        if name == "cpu":
            dist.init_process_group("gloo")
        else:  # NCCL connects at once, and does not guess which GPU is whose
            dist.init_process_group("nccl", device_id=torch.device(name))
    return name


def leave(code: int = 0) -> None:
    """End a process of torchrun's: at the interpreter's own end a thread of gloo's, once in many times, is destroyed
    while it runs, and that aborts the process."""
    if dist.is_initialized():
        if not code:  # else the others may never come
            dist.destroy_process_group()
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def first_to_tell() -> bool:
    """Whether no other process of this run has told of an error before. A mistake of the user's is found by each."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return True
    try:
        meeting = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*meeting, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"agcseg told {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except Exception:  # nobody to ask
        return True


def wait() -> None:
    """Until all processes are here."""
    if world() > 1:
        dist.barrier()


def from_first(value):
    """The value, any picklable one, that process 0 has."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def gather(rows: list) -> list:
    """What every process has for its `[rank::world]` of a list, put together in the order of that list."""
    if world() == 1:
        return rows
    parts: list = [None] * world()
    dist.all_gather_object(parts, rows)
    whole = [None] * sum(map(len, parts))
    for first, part in enumerate(parts):
        whole[first :: world()] = part
    return whole


def add(value: Tensor) -> Tensor:
    """The sum over processes, in place."""
    if world() > 1:
        dist.all_reduce(value)
    return value


def share_buffers(network: nn.Module) -> None:
    """Give every process the buffers of process 0: batch normalisation's running statistics differ between them."""
    if world() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
