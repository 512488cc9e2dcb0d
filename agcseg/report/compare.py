"""Which runs may be compared with which, and how one side differs from the other.

Runs are compared only if all their settings agree but those that are compared and those that change nothing that is
computed. The seeds decide: two trainings that differ in rounding alone can end points apart, so one pair of runs has no
interval that covers the noise of training, and decides nothing (but a diverged run does: it has failed).
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from agcseg.figure1 import RUNS, Setting
from agcseg.report.read import FREE, NAMES, Run
from agcseg.report.statistics import bootstrap, t_interval

VARIED = {"norm.name", "minibatch", "lr.base", "lr.value", "seed"}

Seeds = dict[int, Run]  # the runs of one setting
Cells = dict[Setting, Seeds]


class Estimate(NamedTuple):
    """A value with its 95 % interval (nan without one)."""

    value: float
    low: float
    high: float
    basis: str  # what the interval is over
    weak: str = ""  # why it decides nothing; empty if it does
    leans: bool = True  # whether it says anything at all


def setting(run: Run) -> Setting:
    """What a run is matched by; its rate to four digits."""
    return Setting(run.network, run.norm, run.minibatch, float(f"{run.rate:.4g}"))


def label(of: Setting) -> str:
    """Such as "SegNet BN, minibatch 4, rate 0.08"."""
    network, norm = NAMES.get(of.network, of.network), NAMES.get(of.norm, of.norm)
    return f"{network} {norm}, minibatch {of.minibatch}, rate {of.rate:g}"


def cells(runs: list[Run]) -> tuple[Cells, list[str]]:
    """Runs by setting and seed, and a line for each reason why some must stay out.

    Of every network, the largest group of runs with the same settings stays; BN and AGC may have options of their own,
    but of each norm's runs only those with the commonest options stay.
    """
    kept: Cells = {}
    notes = []
    for network in dict.fromkeys(run.network for run in runs):
        group, notes_here = _alike([run for run in runs if run.network == network], _settings)
        notes += notes_here
        for norm in dict.fromkeys(run.norm for run in group):
            alike, notes_here = _alike([run for run in group if run.norm == norm], _norm_options)
            notes += notes_here
            for run in alike:
                keep(kept.setdefault(setting(run), {}), run, notes)
    return kept, notes + _between_networks(kept)


def keep(seeds: Seeds, run: Run, notes: list[str]) -> None:
    """Of two runs with the same settings and seed, the one that went further stays."""
    other = seeds.setdefault(run.seed or 0, run)
    if other is not run:
        best, rest = sorted((other, run), key=lambda r: (r.state == "unfinished", -r.last_epoch))
        seeds[run.seed or 0] = best
        notes.append(f"not compared, since {best.name} has the same settings and seed: {rest.name}")


def unlike(runs: list[Run]) -> str:
    """Why times and memory of runs cannot be compared, or empty. AGC runs must have one implementation."""
    unknown = [run.name for run in runs if not run.device]
    if unknown:
        return f"needs the name of the device in result.json of {', '.join(unknown)}"
    for what, values in {
        "device": {run.device for run in runs},
        **{key: {run.settings.get(key) for run in runs} for key in ("channels_last", "compile", "deterministic")},
        "network.implementation": {run.settings.get("network.implementation") for run in runs if run.norm == "agc"},
    }.items():
        if len(values) > 1:
            return f"the runs differ in {what}: {', '.join(sorted(map(str, values)))}"
    return ""


def is_figure1(runs: list[Run], kept: Cells) -> bool:
    """Whether a folder holds the paper's experiment: runs of that name, or most of its twelve settings."""
    named = any("figure1" in str(run.settings.get("name")) for run in runs)
    return (named and any(of in kept for of in RUNS)) or sum(of in kept for of in RUNS) > len(RUNS) / 2


def common_epoch(runs: list[Run]) -> int:
    """The last epoch that all have reached, diverged runs apart; 0 if there is none."""
    held = [run.last_epoch for run in runs if run.state != "diverged"]
    return min(held or [run.last_epoch for run in runs], default=0)


def difference(ours: float, theirs: float) -> float:
    return ours - theirs


def relative(ours: float, theirs: float) -> float:
    return ours / theirs - 1


def compare(
    ours: Seeds,
    theirs: Seeds,
    measure: Callable[[Run, int], float],
    gap: Callable[[float, float], float] = difference,
    resample: Callable[[Run, Run, int], tuple[float, float, str] | None] | None = None,
    source: str = "metrics.csv",
) -> Estimate | str:
    """How far one side is from the other, paired by seed, at the last epoch that all these runs have reached.

    Args:
        measure: of a run up to an epoch; infinite for failure, nan if it was not measured.
        gap: of two measures.
        resample: interval and its basis for a single pair of runs; it is shown, but does not decide.
        source: the file that `measure` needs.

    Returns:
        the estimate, or what is missing for one.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return "needs runs with the same seed on both sides"
    runs = [side[seed] for seed in seeds for side in (ours, theirs)]
    epoch = common_epoch(runs)
    if not epoch and any(run.state != "diverged" for run in runs):
        return "needs an epoch that all of the runs have finished"
    measured = {run.name: measure(run, epoch) for run in runs}
    unmeasured = [name for name, value in measured.items() if math.isnan(value)]
    if unmeasured:
        return f"needs {source} of {', '.join(unmeasured)}"
    pairs = [(measured[ours[seed].name], measured[theirs[seed].name]) for seed in seeds]
    gaps = [(difference if math.inf in pair else gap)(*pair) for pair in pairs if pair != (math.inf, math.inf)]
    if not gaps:
        return "both sides diverged"
    estimate = _estimate(gaps, seeds, ours, theirs, epoch, resample)
    planned, diverged = runs[0].epochs, sum(run.state == "diverged" for run in runs)
    basis = estimate.basis + f", {diverged} of {len(runs)} runs diverged" * (diverged > 0)
    weak, leans = estimate.weak, True
    if epoch < planned and any(run.state != "diverged" for run in runs):
        basis, weak = f"{basis}, at epoch {epoch} of {planned}", "the runs are unfinished"
        leans = not math.isnan(estimate.low)
    if all(run.at("pixel_error", epoch) >= run.commonest_class_error for run in runs):
        weak, leans = "no run is better than naming the commonest class", False
    return estimate._replace(basis=basis, weak=weak, leans=leans)


def _estimate(gaps, seeds, ours, theirs, epoch, resample) -> Estimate:
    n, value = len(gaps), float(np.mean(gaps))
    if np.isinf(gaps).any():
        return Estimate(value, min(gaps), max(gaps), f"{n} seed{'s' * (n > 1)}")
    if n > 1:
        return Estimate(value, *t_interval(gaps), f"{n} seeds, paired")
    found = resample(ours[seeds[0]], theirs[seeds[0]], epoch) if resample and len(seeds) == 1 else None
    low, high, basis = found or (math.nan, math.nan, "one seed, no interval")
    return Estimate(value, low, high, basis, "one seed")


def by_images(which: int, gap: Callable = difference) -> Callable:
    """Resampling of validation images, paired; of the share of wrong pixels in % (0) or the loss (1)."""

    def resample(ours: Run, theirs: Run, epoch: int) -> tuple[float, float, str] | None:
        if not ours.images or not theirs.images or ours.images.keys() != theirs.images.keys():
            return None
        if {ours.last_epoch, theirs.last_epoch} != {epoch}:
            return None  # images.csv is of the last epoch only
        pairs = np.array([[ours.images[name][which], theirs.images[name][which]] for name in ours.images])
        pairs = pairs[np.isfinite(pairs).all(1)] * (100 if which == 0 else 1)
        if not len(pairs):
            return None
        low, high = bootstrap(lambda drawn: gap(pairs[drawn, 0].mean(1), pairs[drawn, 1].mean(1)), len(pairs))
        return low, high, f"one seed; over its {len(pairs)} validation images only, not over trainings"

    return resample


def _alike(runs: list[Run], settings: Callable[[Run], dict]) -> tuple[list[Run], list[str]]:
    """The largest group of runs that agree in their settings, and why the others are not in it."""
    usual, _ = Counter(tuple(settings(run).items()) for run in runs).most_common(1)[0]
    usual, alike = dict(usual), []
    apart: dict[str, list[str]] = {}  # what differs -> names of runs
    for run in runs:
        here = settings(run)
        differing = [key for key in sorted(here.keys() | usual.keys()) if here.get(key) != usual.get(key)]
        if differing:
            what = ", ".join(f"{key} is {here.get(key)}, not {usual.get(key)}" for key in differing)
            apart.setdefault(what, []).append(run.name)
        else:
            alike.append(run)
    return alike, [f"not compared with the others, since {what}: {', '.join(apart[what])}" for what in apart]


def _settings(run: Run) -> dict[str, str]:
    keys = [key for key in sorted(run.settings) if key not in VARIED | FREE and not key.startswith("norm.")]
    return {key: str(run.settings[key]) for key in keys} | {"processes": str(run.processes)}


def _norm_options(run: Run) -> dict[str, str]:
    return {key: str(run.settings[key]) for key in sorted(run.settings) if key.startswith("norm.options.")}


def _between_networks(kept: Cells) -> list[str]:
    some = {of.network: _settings(next(iter(seeds.values()))) for of, seeds in kept.items()}
    notes = []
    for network in [*some][1:]:
        first = next(iter(some))
        here, there = some[network], some[first]
        keys = [k for k in there if (k.startswith("data.") or k == "epochs") and here.get(k) != there[k]]
        if keys:
            what = ", ".join(f"{key} ({there[key]} and {here.get(key)})" for key in keys)
            names = " and ".join(NAMES.get(name, name) for name in (first, network))
            notes.append(f"{names} differ in {what}: they are not compared with each other")
    return notes
