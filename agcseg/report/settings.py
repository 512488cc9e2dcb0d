"""The settings that an experiment compares: what differs between its runs, seeds apart, in a few plain words."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict

import numpy as np

from agcseg.config import Config
from agcseg.errors import UserError
from agcseg.report import measures
from agcseg.report.compare import Seeds, cells, common_epoch, is_figure1, keep, unlike
from agcseg.report.read import NORMS, Run, describe, flat
from agcseg.report.statistics import t_interval

Settings = dict[str, Seeds]  # the runs of each setting, by its name

# What the figure with one column per normalisation shows; where runs differ in more, their settings are compared.
COLUMNS_SHOW = {"norm", "network", "width", "data", "size", "epochs", "minibatch", "rate"}
UNSAID = ("no noise", "no GEMS", "background map")  # said only where there is nothing else to say
FOLLOWED = ("agc", "agc_std")  # norms whose λ is trained
MEASURES = (  # heading, measure, decimals
    ("error, %", measures.final_error, 1),
    ("last three, %", measures.late_error, 1),
    ("all epochs, %", measures.mean_error, 1),
    ("mIoU, %", measures.final_miou, 1),
    ("loss", measures.final_loss, 3),
)
INTERVALS = """From three seeds on, ± is the 95 % interval of the mean (Student's t; not corrected for the number of
comparisons). Two seeds allow no useful interval: both values are in brackets. One seed says nothing about how trainings
vary."""
SETTINGS = """Validation, at epoch {epoch}: pixel error, mean error of the last three epochs (less noisy) and of all
epochs, mIoU and loss; n: seeds. Diverged runs are counted, not averaged."""
DIFFERENCES = """Setting − {reference}, paired by seed (n: pairs). Below zero is better, but for mIoU."""


def compared(runs: list[Run], reference: str | None = None) -> tuple[Settings, str, list[str]]:
    """The runs by setting, the setting that the others are compared with, and notes on runs left out.

    No settings where the report shows the paper's Figure 1, or curves with a column for BN and one for AGC, unless a
    reference is named.

    Raises:
        UserError: no setting has the name of the reference.
    """
    groups, notes = by_setting(runs)
    more = bool({*varying(runs)} - COLUMNS_SHOW) or not {run.norm for run in runs} <= {"bn", "agc"}
    if reference is None and (not more or len(groups) < 2 or is_figure1(runs, cells(runs)[0])):
        return {}, "", []
    return groups, reference_of(groups, reference), notes


def by_setting(runs: list[Run]) -> tuple[Settings, list[str]]:
    """Runs by setting and seed, in the order of their names (of norms: the order of `NORMS`), and notes on twins.

    A setting is named by what differs between any of the runs, such as "instance", "background window" or
    "momentum 0.9875, rate 0.0025"; what is so in nearly all settings is said only where it is not so.
    """
    keys, groups, notes = varying(runs), {}, []
    common = usual(runs)
    names = {run.name: _name(run.words, keys, common) for run in runs}
    for run in sorted(runs, key=lambda run: ([*NORMS, run.norm].index(run.norm), _natural(names[run.name]))):
        keep(groups.setdefault(names[run.name], {}), run, notes)
    return groups, notes


def varying(runs: list[Run]) -> list[str]:
    """The keys of `describe` in which runs differ; options of a norm or a network are compared among its runs only."""

    def differs(key: str) -> bool:
        owner = key.partition(":")[0] if ":" in key else ""
        return len({run.words.get(key) for run in runs if not owner or owner in (run.norm, run.network)}) > 1

    return [key for key in dict.fromkeys(key for run in runs for key in run.words) if differs(key)]


def usual(runs: list[Run]) -> dict[str, str]:
    """What is so in more than two thirds of the settings, though not in all: key of `describe` -> words."""
    keys = varying(runs)
    settings = {tuple(run.words.get(key) for key in keys) for run in runs}
    columns = [[text for text in column if text is not None] for column in zip(*settings, strict=True)]
    commonest = [Counter(column).most_common(1)[0] for column in columns]
    return {
        key: text
        for key, (text, times), column in zip(keys, commonest, columns, strict=True)
        if 3 * times > 2 * len(column)
    }


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
    runs = [run for seeds in groups.values() for run in seeds.values()]
    keys, default = varying(runs), flat(asdict(Config())) | {"norm.options.mean_scale": 1.0}
    default = describe(default | {"norm.options.background": "map"}) | usual(runs)

    def rank(known: str) -> tuple[int, int]:
        words = next(iter(groups[known].values())).words
        return sum(words.get(key, default.get(key)) != default.get(key) for key in keys), -len(groups[known])

    return min(groups, key=rank)


def like(runs: list[Run], reference: Run) -> list[Run]:
    """Those set up as the reference but for norm, minibatch and rate: what the paper's claims are about."""
    pairs = ([reference, run] for run in runs)
    return [pair[1] for pair in pairs if {*varying(pair)} <= {"norm", "minibatch", "rate"}]


def shared(runs: list[Run]) -> str:
    """What the settings share, such as "SegNet, width 0.25, CamVid 64x128, 30 epochs; AGC, init he, minibatch 4"."""
    keys, words = varying(runs), runs[0].words
    texts = [words[key] for key in ("norm", "init", "minibatch", "momentum", "rate") if key not in keys]
    texts += [f"{text} unless said" for text in usual(runs).values() if text not in UNSAID]
    return "; ".join([*dict.fromkeys(run.title for run in runs), *[", ".join(texts)][: len(texts)]])


def epoch_of(groups: Settings) -> int:
    """At which settings are compared: the last that all finished runs have, or if none is finished, all runs."""
    runs = [run for seeds in groups.values() for run in seeds.values()]
    return common_epoch([run for run in runs if run.state == "finished"] or runs)


def held(seeds: Seeds, epoch: int) -> Seeds:
    """The seeds that have come to an epoch and did not diverge."""
    return {seed: run for seed, run in seeds.items() if run.state != "diverged" and run.last_epoch >= epoch}


def by_error(groups: Settings, epoch: int) -> list[str]:
    """The names of settings by their final error; those that have none are the last."""

    def error(name: str) -> float:
        values = _finite(measures.final_error(run, epoch) for run in held(groups[name], epoch).values())
        return float(np.mean(values)) if values else math.inf

    return sorted(groups, key=error)


def settings_table(groups: Settings, reference: str) -> list[list[str]]:
    """What the settings reached, the best first; speed and memory where `costs_compared` says so."""
    epoch, (speed, memory, _) = epoch_of(groups), costs_compared(groups)
    costs = [("img/s", measures.speed, 1)] * speed + [("MiB", measures.memory, 0)] * memory
    lines = [["setting", "n", *(heading for heading, *_ in (*MEASURES, *costs))]]
    for name in by_error(groups, epoch):
        runs = held(groups[name], epoch).values()
        cells = [spread(_finite(of(run, epoch) for run in runs), digits) for _, of, digits in MEASURES]
        for _, cost, digits in costs:
            values = _finite(cost(run) for run in runs)
            cells.append(f"{np.mean(values):.{digits}f}" if values else "")
        text = f"{name} (reference)" if name == reference else name
        lines.append([text, _counted(len(runs), groups[name].values(), epoch), *cells])
    return lines


def differences_table(groups: Settings, reference: str) -> list[list[str]]:
    """How far each setting is from the reference, paired by seed; in the order of `settings_table`."""
    epoch = epoch_of(groups)
    base = groups[reference]
    lines = [[f"setting − {reference}", "n", *(heading.replace("%", "points") for heading, *_ in MEASURES)]]
    for name in by_error(groups, epoch):
        if name == reference:
            continue
        both = sorted(held(base, epoch).keys() & held(groups[name], epoch).keys())
        paired = [run for seed in sorted(base.keys() & groups[name].keys()) for run in (base[seed], groups[name][seed])]
        cells = []
        for _, of, digits in MEASURES:
            gaps = _finite(of(groups[name][seed], epoch) - of(base[seed], epoch) for seed in both)
            cells.append(spread(gaps, digits, "+"))
        lines.append([name, _counted(len(both), paired, epoch), *cells])
    return lines


def spread(values: list[float], digits: int, sign: str = "") -> str:
    """Mean of values over seeds with what may be said of its error; empty without values."""
    if not values:
        return ""

    def text(value: float) -> str:
        return format(round(float(value), digits) + 0.0, f"{sign}.{digits}f")  # + 0.0: no negative zero

    mean = text(np.mean(values))
    if len(values) < 3:
        return mean if len(values) == 1 else f"{mean} ({text(values[0])}, {text(values[1])})"
    low, high = t_interval(values)
    return f"{mean} ± {(high - low) / 2:.{digits}f}"


def costs_compared(groups: Settings) -> tuple[bool, bool, str]:
    """Whether speed and memory of the settings can be compared, and what to say about it.

    Both only on one device; speed only if it kept steady within each setting, for otherwise others used the device too.
    """
    seeds = [[run for run in seeds.values() if run.state == "finished"] for seeds in groups.values()]
    why = unlike([run for runs in seeds for run in runs]) if any(seeds) else "no run has finished"
    if why:
        return False, False, f"Speed and memory are not compared: {why}."
    varied = [why for runs in seeds if (why := measures.unsteady(runs))]
    if varied or not any(len(measures.speeds(run)) for runs in seeds for run in runs):
        return False, True, f"MiB: peak memory. Speed is not compared{f': {varied[0]}' if varied else ''}."
    return True, True, "img/s: median; MiB: peak memory."


def lambda_starts(groups: Settings) -> Settings:
    """The settings that start with different λ, with their runs that trained it, recorded it, and did not diverge.

    None where all start alike, or have different layers.
    """

    def followed(run: Run) -> bool:
        return run.state != "diverged" and run.norm in FOLLOWED and run.layers is not None and run.layers.epochs[0] == 0

    chosen = {name: {s: run for s, run in seeds.items() if followed(run)} for name, seeds in groups.items()}
    runs = [run for seeds in chosen.values() for run in seeds.values()]
    if len({tuple(run.layers.names) for run in runs}) != 1:
        return {}
    starts = {round(float(run.layers.values["lambda_mean"][0].mean()), 3) for run in runs}
    return {name: seeds for name, seeds in chosen.items() if seeds} if len(starts) > 1 else {}


def lambda_memory(groups: Settings) -> float:
    """How far the settings' mean λ lie apart at the end ÷ at the start, both averaged over the layers.

    1: nothing of the start is forgotten; 0: all ends are the same. What seeds differ by is in it too.
    """
    ends = [
        np.mean([run.layers.values["lambda_mean"][[0, -1]] for run in seeds.values()], 0) for seeds in groups.values()
    ]
    before, after = np.ptp(ends, axis=0).mean(1)
    return float(after / before)


def _name(words: dict[str, str], keys: list[str], common: dict[str, str]) -> str:
    texts = [text for key, text in words.items() if key in keys and text != common.get(key)]
    return ", ".join([text for text in texts if text not in UNSAID] or texts or [words["norm"]])


def _natural(text: str) -> list:
    """For sorting: numbers by their value."""
    return [(0, float(part), "") if part[:1].isdigit() else (1, 0, part) for part in re.split(r"(\d+\.?\d*)", text)]


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _counted(n: int, runs: Iterable[Run], epoch: int) -> str:
    """Such as "2 (1 diverged)"."""
    diverged = sum(run.state == "diverged" for run in runs)
    late = sum(run.state != "diverged" and run.last_epoch < epoch for run in runs)
    why = [f"{diverged} diverged"] * (diverged > 0) + [f"{late} unfinished"] * (late > 0)
    return f"{n}" + f" ({', '.join(why)})" * bool(why)
