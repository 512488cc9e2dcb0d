"""What a run measured, which runs may be compared, and what differs between them, in words and by how much.

Runs are compared only if all their settings agree but those that are compared and those that change nothing that is
computed. The seeds decide: two trainings that differ in rounding alone can end points apart, so one pair of runs has no
interval that covers the noise of training, and decides nothing (but a diverged run does: it has failed).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import sub
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from agcseg.errors import UserError
from agcseg.figure1 import RUNS, Setting
from agcseg.report.read import NAMES, NORM_TITLES, Run, describe

PAIRED = {"norm", "minibatch", "rate"}  # what may differ between the two sides of a comparison
# What the claims of the paper are about; where runs differ in more, they are judged on those like the reference.
PAPER_VARIES = {"norm", "network", "width", "data", "size", "epochs", "minibatch", "rate"}
UNSAID = ("no noise", "no GEMS", "background map")  # said only where there is nothing else to say
STEADY = 0.1  # of a speed, see `unsteady`
SCALE = {"pixel_error": 100, "miou": 100}  # for people: %
MEASURES = {  # heading: column of metrics.csv, over how many of the last epochs (0: all), decimals, what is best
    "error, %": ("pixel_error", 1, 1, "min"),
    "last three, %": ("pixel_error", 3, 1, "min"),
    "all epochs, %": ("pixel_error", 0, 1, "min"),
    "mIoU, %": ("miou", 1, 1, "max"),
    "loss": ("val_loss", 1, 3, "min"),
}

Seeds = dict[int, Run]  # the runs of one setting
Cells = dict[Setting, Seeds]
Interval = tuple[float, float, str]  # its ends, and what it is over
Settings = dict[str, Seeds]  # the runs of each setting, by its name


class Estimate(NamedTuple):
    """A value with its 95 % interval (nan without one)."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    basis: str = ""  # what the interval is over; empty where there is no estimate
    weak: str = ""  # why it decides nothing; empty if it does
    leans: bool = True  # whether it says anything at all


def missing(what: str) -> Estimate:
    """No estimate, and what it would need."""
    return Estimate(weak=what, leans=False)


def label(of: Setting) -> str:
    """Such as "SegNet BN, minibatch 4, rate 0.08"."""
    network, norm = NAMES.get(of.network, of.network), NAMES.get(of.norm, of.norm)
    return f"{network} {norm}, minibatch {of.minibatch}, rate {of.rate:g}"


def cells(runs: list[Run]) -> tuple[Cells, list[str]]:
    """Runs by setting (its rate to four digits) and seed, and a line for each reason why some must stay out.

    Of every network, the largest group of runs with the same settings stays; BN and AGC may have options of their own,
    but of each norm's runs only those with the commonest options stay.
    """

    def options(run: Run, wanted: bool = True) -> dict[str, str]:
        words = {key: text for key, text in run.words.items() if key not in PAIRED}
        return {key: text for key, text in words.items() if key.startswith(f"{run.norm}:") == wanted}

    kept: Cells = {}
    notes: list[str] = []
    for network in dict.fromkeys(run.network for run in runs):
        group = _alike([run for run in runs if run.network == network], partial(options, wanted=False), notes)
        for norm in dict.fromkeys(run.norm for run in group):
            for run in _alike([run for run in group if run.norm == norm], options, notes):
                of = Setting(run.network, run.norm, run.minibatch, float(f"{run.rate:.4g}"))
                keep(kept.setdefault(of, {}), run, notes)
    return kept, notes


def keep(seeds: Seeds, run: Run, notes: list[str]) -> None:
    """Of two runs with the same settings and seed, the one that went further stays."""
    other = seeds.setdefault(run.seed, run)
    if other is not run:
        best, rest = sorted((other, run), key=lambda r: (r.state == "unfinished", -r.last_epoch))
        seeds[run.seed] = best
        notes.append(f"not compared, since {best.name} has the same settings and seed: {rest.name}")


def _alike(runs: list[Run], settings: Callable[[Run], dict], notes: list[str]) -> list[Run]:
    """The largest group of runs that agree in their settings; why the others are not in it goes to the notes."""
    usual = dict(Counter(tuple(settings(run).items()) for run in runs).most_common(1)[0][0])
    apart: dict[str, list[str]] = {}  # what differs -> names of runs
    alike = []
    for run in runs:
        here = settings(run)
        keys = [key for key in sorted(here.keys() | usual.keys()) if here.get(key) != usual.get(key)]
        if keys:
            what = ", ".join(f"{here.get(key, key)}, not {usual.get(key)}" for key in keys)
            apart.setdefault(what, []).append(run.name)
        else:
            alike.append(run)
    notes += [f"not compared with the others, for {what}: {', '.join(apart[what])}" for what in apart]
    return alike


def is_figure1(runs: list[Run], kept: Cells) -> bool:
    """Whether a folder holds the paper's experiment: runs of that name, or most of its twelve settings."""
    named = any("figure1" in str(run.settings.get("name")) for run in runs)
    return (named and any(of in kept for of in RUNS)) or sum(of in kept for of in RUNS) > len(RUNS) / 2


def by_setting(runs: list[Run]) -> tuple[Settings, list[str]]:
    """Runs by setting and seed, in the order of their names (of norms: the order of `NORM_TITLES`), and notes on twins.

    A setting is named by what differs between any of the runs, such as "instance", "background window" or
    "momentum 0.9875, rate 0.0025"; what is so in nearly all settings is said only where it is not so.
    """

    def name(run: Run) -> str:
        texts = [text for key, text in run.words.items() if key in keys and text != common.get(key)]
        return ", ".join([text for text in texts if text not in UNSAID] or texts or [run.words["norm"]])

    keys, common = varying(runs), usual(runs)
    groups: Settings = {}
    notes: list[str] = []
    names = {run.name: name(run) for run in runs}
    for run in sorted(runs, key=lambda run: ([*NORM_TITLES, run.norm].index(run.norm), _natural(names[run.name]))):
        keep(groups.setdefault(names[run.name], {}), run, notes)
    return groups, notes


def varying(runs: list[Run]) -> list[str]:
    """The keys of `describe` in which runs differ; options of a norm or a network are compared among its runs only,
    parts of an augmentation among its."""

    def differs(key: str) -> bool:
        owner = key.partition(":")[0] if ":" in key else ""
        of = [run for run in runs if not owner or owner in (run.norm, run.network)]
        kinds = [run.words["augment"] if key.startswith("augment.") else "" for run in of]
        return len({*zip(kinds, (run.words.get(key) for run in of), strict=True)}) > len({*kinds})

    return [key for key in dict.fromkeys(key for run in runs for key in run.words) if differs(key)]


def usual(runs: list[Run]) -> dict[str, str]:
    """What is so in more than two thirds of the settings, though not in all: key of `describe` -> words."""
    keys, answer = varying(runs), {}
    settings = {tuple(run.words.get(key) for key in keys) for run in runs}
    for key, column in zip(keys, zip(*settings, strict=True), strict=False):
        said = [text for text in column if text is not None]
        text, times = Counter(said).most_common(1)[0]
        if 3 * times > 2 * len(said):
            answer[key] = text
    return answer


def reference_of(groups: Settings, name: str | None = None) -> str:
    """The setting that the others are compared with: the one named, or else the one nearest to the defaults.

    That is the fewest keys off the defaults (AGC, no noise, ...) or off what is so in nearly all settings; of several
    the one with most seeds.

    Raises:
        UserError: there is no setting of that name.
    """
    if name is not None:
        for known in groups:
            if known.casefold() == name.casefold():
                return known
        raise UserError(f"no setting is named {name!r}; choose from: {'; '.join(groups)}")
    runs = all_runs(groups)
    keys = varying(runs)
    default = describe({"norm": {"name": "agc"}, "network": {"name": "segnet"}}) | usual(runs)

    def rank(known: str) -> tuple[int, int]:
        words = next(iter(groups[known].values())).words
        return sum(words.get(key, default.get(key)) != default.get(key) for key in keys), -len(groups[known])

    return min(groups, key=rank)


def of_settings(runs: list[Run]) -> bool:
    """Whether an experiment compares settings that the paper's claims do not speak of."""
    return bool({*varying(runs)} - PAPER_VARIES) or not {run.norm for run in runs} <= {"bn", "agc"}


def like(runs: list[Run], reference: Run) -> list[Run]:
    """Those set up as the reference but for norm, minibatch and rate: what the paper's claims are about."""
    return [run for run in runs if {*varying([reference, run])} <= PAIRED]


def all_runs(groups: Mapping[Any, Seeds]) -> list[Run]:
    """Of all settings and seeds."""
    return [run for seeds in groups.values() for run in seeds.values()]


def firsts(groups: Settings) -> dict[str, Run]:
    """A run of each setting: what it is set up like."""
    return {name: next(iter(seeds.values())) for name, seeds in groups.items()}


def common_epoch(runs: list[Run]) -> int:
    """The last epoch that all have reached, diverged runs apart; 0 if there is none."""
    return min([run.last_epoch for run in runs if run.held] or [run.last_epoch for run in runs], default=0)


def epoch_of(groups: Settings) -> int:
    """At which settings are compared: the last that all finished runs have, or if none is finished, all runs."""
    return common_epoch([run for run in all_runs(groups) if run.state == "finished"] or all_runs(groups))


def reached(run: Run, epoch: int, column: str = "pixel_error", last: int = 1) -> float:
    """Mean of a column of metrics.csv over the `last` epochs up to one (0: over all), `SCALE` times.

    Infinite for a diverged run, nan where something was not measured.
    """
    values = run.column(column).reindex(range(1, epoch + 1)).iloc[-last:]
    return SCALE.get(column, 1) * float(values.mean(skipna=False)) if run.held else math.inf


def speeds(run: Run) -> np.ndarray:
    """Images per second of each epoch, the first left out where there are others: it warms up."""
    values = run.column("images_per_second").to_numpy(float)
    values = values[1:] if len(values) > 1 else values
    return values[np.isfinite(values) & (values > 0)]


def speed(run: Run) -> float:
    """Median images per second."""
    return float(np.median(speeds(run))) if len(speeds(run)) else math.nan


def unsteady(runs: Iterable[Run]) -> str:
    """What makes the speed of runs of one setting say little: that it varied; empty if it did not.

    By no more than `STEADY` in the middle 80 % of their epochs; else other programs used the device too.
    """
    values = np.concatenate([np.empty(0), *map(speeds, runs)])
    span = np.ptp(np.percentile(values, (10, 90))) / np.median(values) if len(values) else 0.0
    return f"it varied by {span:.0%} within one setting, as if other programs ran too" if span > STEADY else ""


def memory(run: Run, of: str = "training") -> float:
    """MiB; nan where it was not measured.

    Args:
        of: "training": peak of what training adds to the idle network; "kept": for backward in a step; "process": peak
            of the whole process, Python and torch included, or on a GPU of CUDA's counter.
    """
    columns = {"training": "training_memory_mib", "kept": "kept_for_backward_mib", "process": "peak_memory_mib"}
    values = run.column(columns[of])
    return float(values[values > 0].max())


def measured(groups: Settings) -> pd.DataFrame:
    """`MEASURES` by setting and seed at the epoch of comparison; nan for what is not finite.

    Of the runs that have come to it and did not diverge.
    """
    epoch = epoch_of(groups)
    rows = [
        {"setting": name, "seed": seed} | {heading: reached(run, epoch, *of[:2]) for heading, of in MEASURES.items()}
        for name, seeds in groups.items()
        for seed, run in seeds.items()
        if run.held and run.last_epoch >= epoch
    ]
    table = pd.DataFrame(rows, columns=["setting", "seed", *MEASURES]).set_index(["setting", "seed"]).astype(float)
    return table.where(np.isfinite(table))


def by_error(groups: Settings) -> list[str]:
    """The names of settings by their final error; those that have none are the last."""
    means = measured(groups)["error, %"].groupby("setting").mean().reindex([*groups])
    return means.sort_values(kind="stable").index.tolist()


def unlike(runs: list[Run]) -> str:
    """Why times and memory of runs cannot be compared, or empty.

    Runs of AGC must have one implementation, and those of one network compute the same share again in backward.
    """
    unknown = [run.name for run in runs if not run.device]
    if unknown:
        return f"needs the name of the device in result.json of {', '.join(unknown)}"
    agc_runs, recompute = [run for run in runs if run.norm in ("agc", "center")], "network.options.recompute"
    computed = ("channels_last", "compile", "graph", "deterministic")
    compared: dict[str, set] = {
        "device": {run.device for run in runs},
        **{key: {run.settings.get(key) for run in runs} for key in computed},
        "network.implementation": {run.settings.get("network.implementation") for run in agc_runs},
    }
    for run in agc_runs:
        compared.setdefault(f"{recompute} of {run.network}", set()).add(run.settings.get(recompute))
    for what, values in compared.items():
        if len(values) > 1:
            return f"the runs differ in {what}: {', '.join(sorted(map(str, values)))}"
    return ""


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of at least two values (Student's t)."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def over_seeds(values: Sequence[float], one: Interval | None = None, how: str = "") -> Interval:
    """Ends of the 95 % interval of a mean, and what it is over; of a single seed, `one`."""
    if len(values) > 1:
        return *t_interval(values), f"{len(values)} seeds{how}"
    return one or (math.nan, math.nan, "one seed, no interval")


def bootstrap(statistic: Callable[..., np.ndarray], *samples: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of a statistic of paired samples, drawn 2000 times from a fixed seed.

    Args:
        statistic: of samples along the last axis.
        samples: of at least two values each; with fewer the interval is nan.
    """
    if len(samples[0]) < 2:
        return math.nan, math.nan
    drawn = stats.bootstrap(
        samples, lambda *parts, axis=-1: statistic(*parts), paired=True, vectorized=True, n_resamples=2000,
        method="percentile", rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def relative(ours, theirs):
    """How much larger one is, such as 0.1 for a tenth; of numbers or arrays."""
    return np.divide(ours, theirs) - 1


def paired(
    ours: Seeds,
    theirs: Seeds,
    measure: Callable[[Run, int], float],
    gap: Callable[[float, float], float] = sub,
    resample: Callable[[Run, Run, int], Interval | None] | None = None,
    source: str = "metrics.csv",
) -> Estimate:
    """How far one side is from the other, paired by seed, at the last epoch that all these runs have reached.

    Args:
        measure: of a run up to an epoch; infinite for failure, nan if it was not measured.
        gap: of two measures.
        resample: interval and its basis for a single pair of runs; it is shown, but does not decide.
        source: the file that `measure` needs.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return missing("needs runs with the same seed on both sides")
    runs = [side[seed] for seed in seeds for side in (ours, theirs)]
    epoch, going = common_epoch(runs), any(run.held for run in runs)
    if not epoch and going:
        return missing("needs an epoch that all of the runs have finished")
    values = [measure(run, epoch) for run in runs]
    unmeasured = [run.name for run, value in zip(runs, values, strict=True) if math.isnan(value)]
    if unmeasured:
        return missing(f"needs {source} of {', '.join(unmeasured)}")
    pairs = zip(values[::2], values[1::2], strict=True)
    gaps = [(sub if math.inf in pair else gap)(*pair) for pair in pairs if pair != (math.inf, math.inf)]
    if not gaps:
        return missing("both sides diverged")
    n, weak, leans = len(gaps), "", True
    if np.isinf(gaps).any():
        low, high, basis = min(gaps), max(gaps), f"{n} seed{'s' * (n > 1)}"
    else:
        found = resample(runs[0], runs[1], epoch) if resample and len(seeds) == 1 else None
        low, high, basis = over_seeds(gaps, found, ", paired")
        weak = "one seed" * (n == 1)
    diverged = sum(not run.held for run in runs)
    basis += f", {diverged} of {len(runs)} runs diverged" * (diverged > 0)
    if epoch < runs[0].epochs and going:
        basis, weak = f"{basis}, at epoch {epoch} of {runs[0].epochs}", "the runs are unfinished"
        leans = not math.isnan(low)
    if all(run.at("pixel_error", epoch) >= run.commonest_class_error for run in runs):
        weak, leans = "no run is better than naming the commonest class", False
    with np.errstate(invalid="ignore"):  # of infinite gaps to both sides there is no mean
        return Estimate(float(np.mean(gaps)), low, high, basis, weak, leans)


def by_images(column: str, gap: Callable = sub, scale: float = 1) -> Callable:
    """For `paired`: resampling of validation images, paired; of a column of `Run.images`."""

    def resample(ours: Run, theirs: Run, epoch: int) -> Interval | None:
        if ours.images is None or theirs.images is None or {*ours.images.index} != {*theirs.images.index}:
            return None
        if {ours.last_epoch, theirs.last_epoch} != {epoch}:
            return None  # images.csv is of the last epoch only
        both = pd.concat([ours.images[column], theirs.images[column]], axis=1).to_numpy() * scale
        both = both[np.isfinite(both).all(1)]
        if not len(both):
            return None
        low, high = bootstrap(lambda a, b: gap(a.mean(-1), b.mean(-1)), *both.T)
        return low, high, f"one seed; over its {len(both)} validation images only, not over trainings"

    return resample


def _natural(text: str) -> list:
    """For sorting: numbers by their value."""
    return [(0, float(part), "") if part[:1].isdigit() else (1, 0, part) for part in re.split(r"(\d+\.?\d*)", text)]
