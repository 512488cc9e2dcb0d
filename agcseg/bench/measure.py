"""What is measured of one step, in the process that takes it; `python -m agcseg.bench.measure` is such a process.

`agcseg.bench.table` starts one for each case, so that none sees another's memory, compiler or failure.
"""

import gc
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

from agcseg.bench.step import MODES, Case, Step
from agcseg.config import DataConfig
from agcseg.data import open_data
from agcseg.data.minibatches import minibatches, open_split
from agcseg.data.streets import make_streets
from agcseg.errors import first_line
from agcseg.nn.unit import backward_work, forward_work
from agcseg.training.machine import keeping, out_of_memory, peak_memory, reset_peak_memory, settings
from agcseg.training.step import EAGER

register_flop_formula(torch.ops.agcseg.unit)(forward_work)  # without these torch counts a unit as free
register_flop_formula(torch.ops.agcseg.unit_backward)(backward_work)
SHARES = (0, 0.001, 0.02, 0.04, 0.06, 0.08, 0.11, 0.15)  # of a step's arithmetic to spend again: AGC's `recompute`
BUDGETS = (1, 0.9, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0)  # torch's activation_memory_budget


def kept_for_backward(step: Step) -> int:
    """Bytes that autograd keeps from forward to backward, see `agcseg.training.machine.keeping`."""
    with keeping(step.network) as kept:
        loss = step.loss()
    del loss
    return sum(kept.values())


def memory_and_work(step: Step) -> dict:
    """Memory and work of a step that has not run yet, in a process that has done nothing else.

    Returns:
        peak_mib: peak above the network, its optimiser and the minibatch, before the first step (gradients and
            momentum count as above); kept_mib: see `kept_for_backward`; parameters; gflop of forward and backward as
            torch counts them, two per multiplication and addition.
    """
    idle = _used(step.device)
    reset_peak_memory(step.device)
    for i in range(2 + EAGER * (step.case.suffix == "-graph")):
        step()
        if i == 0 and step.device.type == "cuda":  # the first tries cuDNN's algorithms, which takes workspace
            reset_peak_memory(step.device)
    result = {"peak_mib": peak_memory(step.device) - idle}
    step.optimizer.zero_grad()  # gradients in the memory of a CUDA graph end with its next run
    result["kept_mib"] = kept_for_backward(step) / 2**20
    result["parameters"] = sum(p.numel() for p in step.network.parameters())
    own, step.model = step.model, step.network  # torch counts what runs eagerly
    step.optimizer.zero_grad()
    result["gflop"] = _gflop(step.loss)
    step.optimizer.zero_grad()
    step.model = own
    return result


class _Operations(TorchDispatchMode):
    """Counts as torch's FlopCounterMode does, but without hooks on modules, with which a fast unit runs as literal."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def _gflop(loss: Callable[[], torch.Tensor]) -> float:
    with _Operations() as operations:
        loss().backward()
    return operations.total / 1e9


def frontier(case: Case) -> Generator[dict, None, None]:
    """What a step keeps for backward and what it computes, the less memory it may have.

    Yields:
        budget, kept_mib and gflop: of a compiled variant at the memory budgets of torch's compiler (BUDGETS), which
        cuts the step into forward and backward and computes again what it does not keep; the two then run as they are,
        so that torch can count. Of AGC by itself at the budgets of `recompute` (SHARES), of others once.
    """
    if MODES[case.suffix]:
        for budget in BUDGETS:
            torch._dynamo.reset()
            step: Any = Step(case)
            work: list[int] = []
            with torch._functorch.config.patch(activation_memory_budget=budget):
                step.model = torch.compile(step.network, backend=_counted(work))
                kept = kept_for_backward(step) / 2**20
                work.clear()
                step.loss().backward()
            yield {"budget": budget, "kept_mib": kept, "gflop": sum(work) / 1e9}
        return
    for share in SHARES if case.variant == "agc" else [None]:
        step = Step(case, **({} if share is None else {"recompute": share}))
        yield {"budget": share, "kept_mib": kept_for_backward(step) / 2**20, "gflop": _gflop(step.loss)}


def _counted(work: list[int]) -> Callable:
    """A backend for torch.compile: the graphs of forward and backward as Inductor gets them, run as they are; adds to
    `work` the operations of each as often as it runs."""
    import torch._inductor.lowering  # noqa: F401, its decompositions need it
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def counted(graph, _):
        def run(*arguments):
            with _Operations() as operations:
                result = graph(*arguments)
            work.append(operations.total)
            return result

        return make_boxed_func(run)

    return aot_autograd(
        fw_compiler=counted,
        bw_compiler=counted,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table,
    )


def _used(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 2**10


def course(case: Case, memory: bool = True) -> Generator[dict, None, None]:
    """All that is measured of one case, bit by bit.

    Yields:
        first the figures of `memory_and_work`, if wanted, and on CUDA those of `_calls`; then, for ever, those of one
        round: "step", seconds per step, and on CUDA "host", seconds until the host has asked for all of a step.
    """
    step = Step(case)
    cuda = step.device.type == "cuda"
    figures = memory_and_work(step) if memory else {}
    for _ in range(5 if cuda else 2):
        step()
    yield figures | (_calls(step) if cuda else {})
    while True:
        round_ = {}
        _wait(step.device)
        start = time.perf_counter()
        if cuda:  # this one also brings the clocks up again
            step()
            round_["host"] = time.perf_counter() - start
            _wait(step.device)
        repeats, start = 10 if cuda else 1, time.perf_counter()
        for _ in range(repeats):
            step()
        _wait(step.device)
        yield {"step": (time.perf_counter() - start) / repeats, **round_}


def _calls(step: Step) -> dict:
    """Of one step on CUDA: launches of kernels and of graphs, as the profiler counts them (none where it cannot), and
    waits of the host for the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        _wait(step.device)
    launches = sum("LaunchKernel" in event.name or "GraphLaunch" in event.name for event in profile.events())
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
    return {"launches": launches or None, "waits": waits}


def fitting(case: Case, budget: int) -> Generator[dict, None, None]:
    """The largest minibatch of `largest_minibatch` on CUDA, tried in this process."""
    total = torch.cuda.get_device_properties(case.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), torch.device(case.device))
    fits, fails = 0, 1
    while _fits(replace(case, minibatch=fails)):
        fits, fails = fails, 2 * fails
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if _fits(replace(case, minibatch=middle)) else (fits, middle)
    yield {"largest": fits}


def _fits(case: Case) -> bool:
    try:
        step = Step(case)
        for _ in range(3):
            step()
        _wait(step.device)
        return True
    except Exception as error:
        if out_of_memory(error):
            return False
        raise
    finally:
        step = None
        gc.collect()
        if case.suffix:
            torch._dynamo.reset()
        torch.cuda.empty_cache()


def delivery(size: tuple[int, int], minibatch: int, device: str) -> float:
    """Images per second that cache and minibatch code deliver on the device, with no network."""
    images = max(64, minibatch)
    with tempfile.TemporaryDirectory() as folder:
        root = make_streets(Path(folder) / "streets", images, 1, size)
        data = DataConfig("streets", str(root), folder, list(size), None, None)
        _, cached = open_data(data, say=lambda line: None)
        split = open_split(cached["train"], np.arange(images), torch.device(device))
        seconds = []
        for epoch in range(1, 6):
            start = time.perf_counter()
            for delivered, _ in minibatches(split, minibatch, torch.device(device), shuffle=(1, epoch)):
                _wait(delivered.device)
            seconds.append((time.perf_counter() - start) / (images // minibatch * minibatch))
    return 1 / median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def failure(error: BaseException) -> str:
    return "out of memory" if out_of_memory(error) else f"{type(error).__name__}: {first_line(error)}"


def serve(order: dict) -> None:
    """Answer an order of `agcseg.bench.table`, line by line, until nobody asks for more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed is no answer
    torch.set_num_threads(order["threads"])
    case = Case(**{**order["case"], "size": tuple(order["case"]["size"])})
    try:
        with settings(case.precision):  # those of a run
            measured: dict[str, Callable] = {"course": course, "fitting": fitting, "frontier": frontier}
            for answer in measured[order["what"]](case, *order["arguments"]):
                print(json.dumps(answer), file=answers, flush=True)
                if not sys.stdin.readline():
                    return
    except Exception as error:
        print(json.dumps({"failed": failure(error)}), file=answers, flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
