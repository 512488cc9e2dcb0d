"""Speed and memory of training steps: one table for network x normalisation x minibatch x precision.

Times of one group (same network, minibatch and precision) are taken in turn, round after round, so that a ratio
compares steps that ran within seconds of each other. Memory is taken of each case alone: on the CPU in a process of its
own.
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from agcseg.config import DataConfig
from agcseg.data import open_data
from agcseg.data.minibatches import minibatches, open_split
from agcseg.data.streets import make_streets
from agcseg.errors import UserError
from agcseg.losses import image_losses
from agcseg.networks import build
from agcseg.nn import GEMS, NORMS, add_noise
from agcseg.nn.background import BACKGROUNDS
from agcseg.nn.inference import inference_form
from agcseg.training.machine import peak_memory, reset_peak_memory

FOLDED = ("bn-folded", "agc-onepass")  # inference only, see `agcseg.nn.inference`
TRAINED = ("agc-gems", "agc-noise")  # training only, and not compiled
FORMS = ("agc-literal", *(f"agc-{background}" for background in BACKGROUNDS if background != "map"), *TRAINED, *FOLDED)
BASES = ("bn", "none", "bn-folded")  # what ratios are to
MODES = {"": None, "-compiled": "default", "-graphs": "reduce-overhead"}  # suffix -> torch.compile's mode
VARIANTS = tuple(name + mode for name in (*NORMS, *FORMS) for mode in MODES if not (mode and name in TRAINED))


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

    def __init__(self, case: Case) -> None:
        self.case, self.device = case, torch.device(case.device)
        torch.manual_seed(0)
        options = {"norm_options": {"background": case.form}} if case.form in BACKGROUNDS else {}
        if case.form == "literal":
            options["implementation"] = case.form
        self.network = build(case.network, norm=case.norm, num_classes=case.num_classes, width=case.width, **options)
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
        self.model = torch.compile(self.network, mode=mode) if mode else self.network
        self.optimizer = torch.optim.SGD(self.network.parameters(), 1e-4, 0.9, fused=True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.precision == "bf16")

    def loss(self) -> torch.Tensor:
        with self.autocast():
            outputs = self.model(self.images)
        return sum(part.mean() for part in image_losses(outputs, self.labels, contours=self.contours))

    def __call__(self) -> None:
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
    """Bytes that autograd keeps from forward to backward: unique storages, the parameters themselves excluded.

    Copies of parameters, such as filters with a gain folded in, count.
    """
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in step.network.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.loss()
    kept = sum(storages.values())
    del loss
    return kept


def alone(case: Case, steps: int = 2) -> dict:
    """Memory and work of one case, measured in this process: call it in a fresh one for the CPU.

    Returns:
        peak_mib: peak above the network, its optimiser and the minibatch, before the first step (gradients and
            momentum count as above); kept_mib: see `kept_for_backward`; parameters; gflop of forward and backward as
            torch counts them, two per multiplication and addition.
    """
    step = Step(case)
    idle = _used(step.device)
    reset_peak_memory(step.device)
    for _ in range(steps):
        step()
    result = {"peak_mib": peak_memory(step.device) - idle, "kept_mib": kept_for_backward(step) / 2**20}
    result["parameters"] = sum(p.numel() for p in step.network.parameters())
    step.model = step.network  # torch counts what runs eagerly
    with FlopCounterMode(display=False) as counter:
        step.loss().backward()
    result["gflop"] = counter.get_total_flops() / 1e9
    return result


def _used(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 2**10


def _alone_in_a_process(case: Case) -> dict:
    command = [sys.executable, "-m", "agcseg.bench", json.dumps({**asdict(case), "threads": torch.get_num_threads()})]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"{case.variant} at minibatch {case.minibatch} ended with {done.stderr.strip().splitlines()[-1:]}"
        )
    return json.loads(done.stdout)


def measure_alone(case: Case) -> dict:
    """`alone`, in a process of its own on the CPU; on CUDA, whose counters are exact, in this one."""
    if torch.device(case.device).type == "cpu":
        return _alone_in_a_process(case)
    try:
        return alone(case)
    finally:
        _free()


def _free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def times(cases: list[Case], rounds: int, say=lambda line: None) -> list[list[float]]:
    """Seconds per step of each case, one figure per round; the cases take turns, in changing order."""
    steps = []
    for case in cases:
        say(f"warming up {case.variant}")
        steps.append(Step(case))
        for _ in range(5 if steps[-1].device.type == "cuda" else 2):
            steps[-1]()
    repeats = 10 if steps[0].device.type == "cuda" else 1
    seconds: list[list[float]] = [[] for _ in cases]
    for turn in range(rounds):
        order = range(len(cases)) if turn % 2 == 0 else reversed(range(len(cases)))
        for i in order:
            _wait(steps[i].device)
            start = time.perf_counter()
            for _ in range(repeats):
                steps[i]()
            _wait(steps[i].device)
            seconds[i].append((time.perf_counter() - start) / repeats)
        say(f"round {turn + 1} of {rounds}")
    del steps
    _free()
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def largest_minibatch(case: Case, budget: int) -> tuple[int, str]:
    """The largest minibatch whose step fits into `budget` bytes, all of it counted: network, optimiser and activations.

    Returns:
        the minibatch (0: not even one image fits), and how it was found. On CUDA the process is limited to the budget
        and minibatches are tried, by doubling and then halving the interval. On the CPU it follows from the peaks at
        minibatch 1 and 3, which grow linearly.
    """
    if torch.device(case.device).type == "cpu":
        one, three = (_alone_in_a_process(replace(case, minibatch=n)) for n in (1, 3))
        each = (three["peak_mib"] - one["peak_mib"]) / 2
        fixed = one["peak_mib"] - each + 4 * one["parameters"] / 2**20  # gradients and momentum; the weights themselves
        return max(0, int((budget / 2**20 - fixed) / each)), "from the peaks at minibatch 1 and 3"
    total = torch.cuda.get_device_properties(case.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), torch.device(case.device))
    try:
        fits, fails = 0, 1
        while _fits(replace(case, minibatch=fails)):
            fits, fails = fails, 2 * fails
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if _fits(replace(case, minibatch=middle)) else (fits, middle)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, torch.device(case.device))
    return fits, "tried"


def _fits(case: Case) -> bool:
    try:
        step = Step(case)
        for _ in range(3):
            step()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        step = None
        _free()


def delivery(size: tuple[int, int], minibatch: int, device: str, images: int = 64) -> float:
    """Images per second that cache and minibatch code deliver on the device, with no network."""
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


def table(cases: list[Case], rounds: int, memory: bool = True, say=lambda line: None) -> list[dict]:
    """Measure all cases; one row each.

    Ratios are those of the same round, to BN, to folded BN and to no normalisation of the same mode (plain, compiled or
    graphs) where that was measured too; `..._low` and `..._high` are their extremes over the rounds.
    """
    rows = []
    groups: dict[tuple, list[Case]] = {}
    for case in cases:
        groups.setdefault((case.network, case.minibatch, case.precision), []).append(case)
    for (network, minibatch, precision), group in groups.items():
        say(f"{network}, minibatch {minibatch}, {precision}")
        figures = []
        for case in group:
            if memory:
                say(f"memory of {case.variant}")
            figures.append(measure_alone(case) if memory else {})
        seconds = times(group, rounds, say)
        for i, case in enumerate(group):
            row = {
                "network": network,
                "variant": case.variant,
                "minibatch": minibatch,
                "precision": precision,
                "step_ms": 1e3 * median(seconds[i]),
                "step_ms_low": 1e3 * min(seconds[i]),
                "step_ms_high": 1e3 * max(seconds[i]),
                "images_per_second": minibatch / median(seconds[i]),
                **figures[i],
            }
            for base in BASES:
                names = [other.variant for other in group]
                if base + case.suffix in names:
                    j = names.index(base + case.suffix)
                    ratios = [a / b for a, b in zip(seconds[i], seconds[j], strict=True)]
                    row[f"time_to_{base}"] = median(ratios)
                    row[f"time_to_{base}_low"], row[f"time_to_{base}_high"] = min(ratios), max(ratios)
                    for key in ("kept_mib", "peak_mib"):
                        if memory:
                            row[f"{key.removesuffix('_mib')}_to_{base}"] = figures[i][key] / figures[j][key]
            if row.get("gflop"):
                row["tflop_per_second"] = row["gflop"] / row["step_ms"]
            rows.append(row)
    return rows


if __name__ == "__main__":  # one case, alone in this process
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings.pop("threads"))
    print(json.dumps(alone(Case(**{**settings, "size": tuple(settings["size"])}))))
