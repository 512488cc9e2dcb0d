"""Speed and memory of training steps: one table for network x normalisation x minibatch x precision.

Each case lives in a process of its own, so that none sees another's memory, compiler or failure. Times of one group
(same network, minibatch and precision) are taken in turn, round after round, so that a ratio compares steps that ran
within seconds of each other.
"""

import contextlib
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

from agcseg.config import DataConfig
from agcseg.data import open_data
from agcseg.data.minibatches import minibatches, open_split
from agcseg.data.streets import make_streets
from agcseg.losses import image_losses
from agcseg.networks import build
from agcseg.nn import GEMS, NORMS, add_noise
from agcseg.nn.background import BACKGROUNDS
from agcseg.nn.inference import inference_form
from agcseg.nn.unit import backward_work, forward_work
from agcseg.training.machine import (
    compiled,
    keep_freed_memory,
    keeping,
    out_of_memory,
    peak_memory,
    reset_peak_memory,
    settings,
)
from agcseg.training.step import EAGER, graphed

FOLDED = ("bn-folded", "agc-onepass")  # inference only, see `agcseg.nn.inference`
TRAINED = ("agc-gems", "agc-noise")  # training only, and not compiled
FORMS = ("agc-literal", *(f"agc-{background}" for background in BACKGROUNDS if background != "map"), *TRAINED, *FOLDED)
BASES = ("bn", "none", "bn-folded")  # what ratios are to
MODES = {
    "": None,
    "-compiled": "default",
    "-graphs": "reduce-overhead",
    "-graph": None,
}  # suffix -> torch.compile's mode
VARIANTS = tuple(name + mode for name in (*NORMS, *FORMS) for mode in MODES if not (mode and name in TRAINED))


register_flop_formula(torch.ops.agcseg.unit)(forward_work)  # without these torch counts a unit as free
register_flop_formula(torch.ops.agcseg.unit_backward)(backward_work)
SHARES = (0, 0.001, 0.02, 0.04, 0.06, 0.08, 0.11, 0.15)  # of a step's arithmetic to spend again: AGC's `recompute`
BUDGETS = (1, 0.9, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0)  # torch's activation_memory_budget


@dataclass(frozen=True)
class Case:
    """One training step to measure, or with `inference` one forward pass. `variant` is one of VARIANTS: a norm, a form
    of it if any, and a mode of torch.compile if any, joined by hyphens. `size` is (height, width)."""

    network: str
    variant: str
    minibatch: int
    precision: str
    size: tuple[int, int]
    width: float = 1.0
    device: str = "cpu"
    channels_last: bool = False
    num_classes: int = 19
    inference: bool = False

    @property
    def norm(self) -> str:
        return self.variant.partition("-")[0]

    @property
    def form(self) -> str:
        return self.variant.removeprefix(self.norm).removesuffix(self.suffix).removeprefix("-")

    @property
    def suffix(self) -> str:
        return next((mode for mode in MODES if mode and self.variant.endswith(mode)), "")


class Step:
    """A network with its optimiser and one fixed minibatch of noise; calling it is one training step, or with
    `case.inference` one forward pass in eval mode."""

    def __init__(self, case: Case, **options) -> None:
        """`options` of the network are beside those that follow from the case."""
        self.case, self.device = case, torch.device(case.device)
        if self.device.type == "cpu":
            keep_freed_memory()  # as a run does
        torch.manual_seed(0)
        if case.form in BACKGROUNDS:
            options["norm_options"] = {"background": case.form}
        if case.form == "literal":
            options["implementation"] = case.form
        self.network: torch.nn.Module = build(
            case.network, norm=case.norm, num_classes=case.num_classes, width=case.width, **options
        )
        self.network.to(self.device).train(not case.inference)
        if case.form == "noise":
            add_noise(self.network, 0.1, 0.1, seed=0)
        self.gems = GEMS(self.network) if case.form == "gems" else None
        if case.form in ("folded", "onepass"):
            self.network = inference_form(self.network)
        images = torch.randn(case.minibatch, 3, *case.size, device=self.device)
        labels = torch.randint(0, case.num_classes, (case.minibatch, *case.size), device=self.device)
        self.labels = labels.to(torch.uint8)
        self.contours = self.labels == 0  # about one pixel in num_classes, for ClassNet
        if case.channels_last:
            self.network.to(memory_format=torch.channels_last)
            images = images.contiguous(memory_format=torch.channels_last)
        self.images = images
        mode = MODES[case.suffix]
        self.model = compiled(self.network, mode) if mode else self.network
        self.optimizer = torch.optim.SGD(self.network.parameters(), 1e-4, 0.9, fused=True)
        # None of itself otherwise: what holds itself is freed late, and counts in the next step's memory
        self.graph = graphed(self._take, self.optimizer) if case.suffix == "-graph" else None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.precision == "bf16")

    def loss(self) -> torch.Tensor:
        with self.autocast():
            outputs = self.model(self.images)
        parts = image_losses(outputs, self.labels, contours=self.contours)
        return sum(part.mean() for part in parts)  # type: ignore[return-value]  # there is at least one

    def __call__(self) -> None:
        (self.graph or self._take)()

    def _take(self) -> None:
        if self.case.inference:
            with torch.no_grad(), self.autocast():
                self.model(self.images)
            return
        self.optimizer.zero_grad()
        self.loss().backward()
        if self.gems:
            self.gems.scale_gradients()
        self.optimizer.step()


def kept_for_backward(step: Step) -> int:
    """Bytes that autograd keeps from forward to backward, see `agcseg.training.machine.keeping`."""
    with keeping(step.network) as kept:
        loss = step.loss()
    del loss
    return sum(kept.values())


def memory_and_work(step: Step, steps: int = 2) -> dict:
    """Memory and work of a step that has not run yet, in a process that has done nothing else.

    Returns:
        peak_mib: peak above the network, its optimiser and the minibatch, before the first step (gradients and
            momentum count as above); kept_mib: see `kept_for_backward`; parameters; gflop of forward and backward as
            torch counts them, two per multiplication and addition.
    """
    idle = _used(step.device)
    reset_peak_memory(step.device)
    for i in range(steps + EAGER * (step.case.suffix == "-graph")):
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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Failed(Exception):
    """A case that could not be measured, in one line."""


def _failure(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (
        "out of memory" if out_of_memory(error) else f"{type(error).__name__}: {lines[0] if lines else ''}".strip(": ")
    )


def _in_a_process(what: str, case: Case, *arguments) -> Generator[dict, None, None]:
    """What the generator of that name, called in a process of its own, yields.

    Raises:
        Failed: it raised, or the process died.
    """
    order = {"what": what, "case": asdict(case), "arguments": arguments, "threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "agcseg.bench", json.dumps(order)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
        )
        assert process.stdin and process.stdout
        try:
            while True:
                answer = process.stdout.readline()
                if not answer:
                    if process.wait() == 0:
                        return
                    errors.seek(0)
                    last = errors.read().strip().splitlines()[-1:] or ["it wrote nothing"]
                    raise Failed(f"exit code {process.returncode}: {last[0]}")
                answer = json.loads(answer)
                if "failed" in answer:
                    raise Failed(answer["failed"])
                yield answer
                process.stdin.write("\n")
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


def _serve(order: dict) -> None:
    """The other end of `_in_a_process`."""
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
        print(json.dumps({"failed": _failure(error)}), file=answers, flush=True)


def largest_minibatch(case: Case, budget: int) -> tuple[int, str]:
    """The largest minibatch whose step fits into `budget` bytes, all of it counted: network, optimiser and activations.

    Returns:
        the minibatch (0: not even one image fits), and how it was found. On CUDA the process is limited to the budget
        and minibatches are tried, by doubling and then halving the interval. On the CPU it follows from the peaks at
        minibatch 1 and 3, and then from those at the minibatches found, until it is one that was measured. The first
        of these is a quarter smaller, as the first images take less than those after them.

    Raises:
        Failed: a step failed for another reason than memory.
    """
    if torch.device(case.device).type == "cuda":
        with contextlib.closing(_in_a_process("fitting", case, budget)) as answers:
            return next(answers)["largest"], "tried"
    one, three = (_first(replace(case, minibatch=n)) for n in (1, 3))
    room = budget / 2**20 - 4 * one["parameters"] / 2**20  # beside the weights; peaks hold gradients and momentum
    peaks = {1: one["peak_mib"], 3: three["peak_mib"]}
    found = _fitting(peaks, room)
    wanted = found - found // 4
    while wanted not in peaks and wanted > 3 and len(peaks) < 7:
        peaks[wanted] = _first(replace(case, minibatch=wanted))["peak_mib"]
        wanted = found = _fitting(peaks, room)
    *some, last = sorted(peaks)
    return found, f"from the peaks at minibatch {', '.join(map(str, some))} and {last}"


def _fitting(peaks: dict[int, float], room: float) -> int:
    """The largest minibatch whose peak is at most `room`, by the line through the two measured ones next to it."""
    sizes = sorted(peaks)
    above = next((i for i, size in enumerate(sizes) if peaks[size] > room), len(sizes))
    low, high = sizes[max(0, min(above, len(sizes) - 1) - 1) :][:2]
    each = (peaks[high] - peaks[low]) / (high - low)
    if each <= 0:
        raise Failed(f"the peak does not grow from minibatch {low} to {high}")
    return max(0, low + math.floor((room - peaks[low]) / each))


def frontier_table(cases: list[Case], keep: Callable[[list[dict]], None] = lambda rows: None) -> list[dict]:
    """`frontier` of all cases, each in a process of its own; a row for each budget, with "kept_to_bn" and "extra_flop",
    the share of its arithmetic that is added, against the case of the same network and precision that is plain BN."""
    rows: list[dict] = []
    plain: dict[tuple, dict] = {}
    for case in cases:
        named = {"network": case.network, "variant": case.variant, "minibatch": case.minibatch}
        named["precision"] = case.precision
        try:
            with contextlib.closing(_in_a_process("frontier", case)) as answers:
                for answer in answers:
                    bn = plain.setdefault((case.network, case.minibatch, case.precision), answer)
                    answer["kept_to_bn"] = answer["kept_mib"] / bn["kept_mib"]
                    answer["extra_flop"] = answer["gflop"] / bn["gflop"] - 1
                    rows.append(named | answer)
                    keep(rows)
        except Failed as failed:
            rows.append(named | {"failed": str(failed)})
    return rows


def _first(case: Case) -> dict:
    with contextlib.closing(_in_a_process("course", case)) as answers:
        return next(answers)


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


def delivery(size: tuple[int, int], minibatch: int, device: str, images: int = 64) -> float:
    """Images per second that cache and minibatch code deliver on the device, with no network."""
    images = max(images, minibatch)
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


def table(
    cases: list[Case],
    rounds: int,
    memory: bool = True,
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[list[dict]], None] = lambda rows: None,
) -> list[dict]:
    """Measure all cases; one row each.

    Ratios are those of the same round, to BN, to folded BN and to no normalisation of the same mode (plain, compiled,
    graphs or graph) where that was measured too; `..._low` and `..._high` are their extremes over the rounds. A case
    that fails has "failed", why, and the figures until then; no ratio is to it.

    Args:
        keep: gets the rows so far whenever something of them has been measured.
    """
    rows: list[dict] = []
    groups: dict[tuple, list[Case]] = {}
    for case in cases:
        groups.setdefault((case.network, case.minibatch, case.precision), []).append(case)
    for (network, minibatch, precision), group in groups.items():
        say(f"{network}, minibatch {minibatch}, {precision}")
        own = [
            {"network": network, "variant": case.variant, "minibatch": minibatch, "precision": precision}
            for case in group
        ]
        with contextlib.ExitStack() as courses:
            _measure(group, own, rounds, memory, courses, say, lambda rows=(*rows, *own): keep([*rows]))
        rows += own
    return rows


def _measure(group: list[Case], rows: list[dict], rounds: int, memory: bool, courses, say, keep) -> None:
    """Fill the rows of cases that take turns, in changing order."""
    running: dict[int, Generator[dict, None, None]] = {}
    turns: list[list[dict]] = [[] for _ in group]

    def ask(i: int) -> dict:
        try:
            return next(running[i])
        except Exception as error:
            del running[i]
            rows[i]["failed"] = str(error) if isinstance(error, Failed) else _failure(error)
            return {}

    for i, case in enumerate(group):
        say(f"{case.variant}: memory and warming up" if memory else f"warming up {case.variant}")
        alone = memory or torch.device(case.device).type == "cuda"
        running[i] = _in_a_process("course", case, memory) if alone else course(case, memory)
        courses.enter_context(contextlib.closing(running[i]))
        rows[i] |= ask(i)
        keep()
    for turn in range(rounds):
        order = list(running)
        for i in order if turn % 2 == 0 else reversed(order):
            if answer := ask(i):
                turns[i].append(answer)
        for i in running:
            _sum_up(i, group, rows, turns, running)
        say(f"round {turn + 1} of {rounds}")
        keep()


def _sum_up(i: int, group: list[Case], rows: list[dict], turns: list[list[dict]], running) -> None:
    """The figures of row i from the rounds so far."""
    case, row, seconds = group[i], rows[i], [turn["step"] for turn in turns[i]]
    row["step_ms"] = 1e3 * median(seconds)
    row["step_ms_low"], row["step_ms_high"] = 1e3 * min(seconds), 1e3 * max(seconds)
    row["images_per_second"] = case.minibatch / median(seconds)
    if row.get("gflop"):
        row["tflop_per_second"] = row["gflop"] / row["step_ms"]
    if "host" in turns[i][0]:
        row["host_ms"] = 1e3 * median(turn["host"] for turn in turns[i])
    for base in BASES:
        j = next((j for j in running if group[j].variant == base + case.suffix), None)
        if j is None:
            continue
        ratios = [a / b["step"] for a, b in zip(seconds, turns[j], strict=True)]
        row[f"time_to_{base}"] = median(ratios)
        row[f"time_to_{base}_low"], row[f"time_to_{base}_high"] = min(ratios), max(ratios)
        for key in ("kept", "peak"):
            if f"{key}_mib" in row:
                row[f"{key}_to_{base}"] = row[f"{key}_mib"] / rows[j][f"{key}_mib"]


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
