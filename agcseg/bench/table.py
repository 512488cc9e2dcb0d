"""Speed and memory of training steps: one table for network x normalisation x minibatch x precision.

Each case lives in a process of its own (`agcseg.bench.measure`). Times of one group (same network, minibatch and
precision) are taken in turn, round after round, so that a ratio compares steps that ran within seconds of each other.
"""

import contextlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from dataclasses import asdict, replace
from statistics import median

import torch

from agcseg.bench.measure import course, failure
from agcseg.bench.step import Case

BASES = ("bn", "none", "bn-folded")  # what ratios are to


def table(
    cases: list[Case],
    rounds: int,
    memory: bool = True,
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[list[dict]], object] = lambda rows: None,
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
            rows[i]["failed"] = str(error) if isinstance(error, Failed) else failure(error)
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


def _first(case: Case) -> dict:
    with contextlib.closing(_in_a_process("course", case)) as answers:
        return next(answers)


def frontier_table(cases: list[Case], keep: Callable[[list[dict]], object] = lambda rows: None) -> list[dict]:
    """`frontier` of all cases, each in a process of its own; a row for each budget, with "kept_to_bn" and "extra_flop",
    the share of its arithmetic that is added, against the case of the same network, minibatch and precision that is
    plain BN, and comes first; if that failed, without them."""
    rows: list[dict] = []
    plain: dict[tuple, dict] = {}
    for case in cases:
        named = {"network": case.network, "variant": case.variant, "minibatch": case.minibatch}
        named["precision"] = case.precision
        try:
            with contextlib.closing(_in_a_process("frontier", case)) as answers:
                for answer in answers:
                    if case.variant == "bn":
                        plain[case.network, case.minibatch, case.precision] = answer
                    if bn := plain.get((case.network, case.minibatch, case.precision)):
                        answer["kept_to_bn"] = answer["kept_mib"] / bn["kept_mib"]
                        answer["extra_flop"] = answer["gflop"] / bn["gflop"] - 1
                    rows.append(named | answer)
                    keep(rows)
        except Failed as failed:
            rows.append(named | {"failed": str(failed)})
    return rows


class Failed(Exception):
    """A case that could not be measured, in one line."""


def _in_a_process(what: str, case: Case, *arguments) -> Generator[dict, None, None]:
    """What the generator of that name, called in a process of its own, yields.

    Raises:
        Failed: it raised, or the process died.
    """
    order = {"what": what, "case": asdict(case), "arguments": arguments, "threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "agcseg.bench.measure", json.dumps(order)]
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
