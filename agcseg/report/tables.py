"""What the runs reached, in rows and columns of text, and in words. **Bold** is marked as in Markdown."""

import math
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from agcseg.figure1 import PANELS, PAPER_ERRORS, RUNS
from agcseg.report import measures
from agcseg.report.compare import (
    Cells,
    Seeds,
    Settings,
    by_error,
    common_epoch,
    epoch_of,
    held,
    label,
    unlike,
    varying,
)
from agcseg.report.measures import t_interval
from agcseg.report.read import NAMES, Run

FOLLOWED = ("agc", "agc_std")  # norms whose λ is trained
MOST_COLUMNS = 5  # of settings; more would not fit, and a name in words takes their place
MEASURES = (  # heading, measure, decimals, what is best
    ("error, %", measures.final_error, 1, "min"),
    ("last three, %", measures.late_error, 1, "min"),
    ("all epochs, %", measures.mean_error, 1, "min"),
    ("mIoU, %", measures.final_miou, 1, "max"),
    ("loss", measures.final_loss, 3, "min"),
)
RUN_COLUMNS = {  # what is shown of a run: key of `summarise` -> heading, format
    "run": ("run", ""), "state": ("state", ""), "epochs": ("epochs", ""), "final_error": ("error", ".2%"),
    "mean_error_last5": ("last 5", ".2%"), "best_error": ("best", ".2%"), "best_epoch": ("at", ""),
    "error_all_pixels": ("all px", ".2%"), "miou": ("mIoU", ".2%"), "val_loss": ("loss", ".3f"),
    "minutes": ("min", ".1f"), "images_per_second": ("img/s", ".1f"), "peak_memory_mib": ("MiB", ".0f"),
    "training_memory_mib": ("training MiB", ".0f"), "kept_for_backward_mib": ("kept MiB", ".0f"),
}  # fmt: skip


def summarise(run: Run) -> dict:
    """One row of report.csv: settings, and what the run reached on the validation images.

    Errors and mIoU are fractions, what was not measured is None; epoch 0, the untrained network, counts nowhere.
    """
    errors = run.column("pixel_error")
    errors = errors[np.isfinite(errors)]
    row = {
        "run": run.name, "network": run.network, "width": run.width, "data": run.data,
        "size": f"{run.size[0]}x{run.size[1]}", "norm": run.norm, "minibatch": run.minibatch, "rate": run.rate,
        "seed": run.seed, "epochs": run.last_epoch, "epochs_planned": run.epochs, "state": run.state,
        "final_error": run.at("pixel_error", run.last_epoch),
        "mean_error_last5": errors[errors.index.isin(run.metrics.index[-5:])].mean(),
        "best_error": errors.min(), "best_epoch": int(errors.idxmin()) if len(errors) else None,
        "error_all_pixels": run.at("pixel_error_all", run.last_epoch), "miou": run.at("miou", run.last_epoch),
        "val_loss": run.at("val_loss", run.last_epoch), "commonest_class_error": run.commonest_class_error,
        "peak_memory_mib": measures.process_memory(run), "training_memory_mib": measures.training_memory(run),
        "kept_for_backward_mib": measures.kept_memory(run),
        "images_per_second": run.column("images_per_second").median(),
        "minutes": run.at("seconds", run.last_epoch) / 60,
    }  # fmt: skip
    return {key: None if value != value else value for key, value in row.items()}


def runs_table(runs: list[Run]) -> pd.DataFrame:
    """A line per run; errors and mIoU in %, columns that nobody measured left out."""
    rows = pd.DataFrame([summarise(run) for run in runs], dtype=object).dropna(axis=1, how="all")
    shown = {key: (heading, form) for key, (heading, form) in RUN_COLUMNS.items() if key in rows}
    return pd.DataFrame(
        {head: ["" if pd.isna(v) else format(v, form) for v in rows[key]] for key, (head, form) in shown.items()}
    )


def settings_table(groups: Settings, reference: str) -> pd.DataFrame:
    """What the settings reached, the best first, by name; the best figures are bold.

    What varies has a column each where there are few such keys; speed and memory are there if `costs_compared` says so.
    """
    epoch, (speed, memory, _) = epoch_of(groups), costs_compared(groups)
    names, first = by_error(groups, epoch), {name: next(iter(seeds.values())) for name, seeds in groups.items()}
    keys = varying([*first.values()])
    table = pd.DataFrame(index=names)
    if 0 < len(keys) <= MOST_COLUMNS:
        for key in keys:
            heading = key.rpartition(":")[2].rpartition(".")[2].replace("_", " ")
            table[heading] = [_cell(heading, first[name].words.get(key, "")) for name in names]
    else:
        table["setting"] = names
    table["n"] = [_counted(len(held(groups[name], epoch)), groups[name].values(), epoch) for name in names]
    there = {name: held(groups[name], epoch).values() for name in names}
    for heading, of, digits, best in MEASURES:
        values = {name: _finite(of(run, epoch) for run in there[name]) for name in names}
        texts = [spread(values[name], digits) for name in names]
        means = pd.Series([round(float(np.mean(values[n])), digits) if values[n] else math.nan for n in names])
        tops = means.groupby([f"{first[n].network} {first[n].data}" for n in names]).transform(best)
        bold = (means == tops) & (len(names) > 1)
        table[heading] = [f"**{text}**" if top else text for text, top in zip(texts, bold, strict=True)]
    for heading, cost, digits in [("img/s", measures.speed, 1)] * speed + [("MiB", _memory(groups), 0)] * memory:
        values = [_finite(cost(run) for run in there[name]) for name in names]
        table[heading] = [f"{np.mean(each):.{digits}f}" if each else "" for each in values]
    return table


def differences_table(groups: Settings, reference: str) -> pd.DataFrame:
    """How far each setting is from the reference, paired by seed; in the order of `settings_table`."""
    epoch, base = epoch_of(groups), groups[reference]
    names = [name for name in by_error(groups, epoch) if name != reference]
    table = pd.DataFrame({f"setting − {reference}": names}, index=names)
    pairs = {n: sorted(held(base, epoch).keys() & held(groups[n], epoch).keys()) for n in names}
    all_pairs = {
        n: [run for s in sorted(base.keys() & groups[n].keys()) for run in (base[s], groups[n][s])] for n in names
    }
    table["n"] = [_counted(len(pairs[name]), all_pairs[name], epoch) for name in names]
    for heading, of, digits, _ in MEASURES:
        gaps = {n: _finite(of(groups[n][seed], epoch) - of(base[seed], epoch) for seed in pairs[n]) for n in names}
        table[heading.replace("%", "points")] = [spread(gaps[name], digits, "+") for name in names]
    return table


def spread(values: list[float], digits: int, sign: str = "") -> str:
    """Mean of values over seeds with what may be said of its error; empty without values."""
    if not values:
        return ""

    def text(value: float) -> str:
        return format(round(float(value), digits) + 0.0, f"{sign}.{digits}f")  # + 0.0: no negative zero

    mean = text(float(np.mean(values)))
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
    old = _memory(groups) is measures.process_memory
    which = "peak memory of the process (older runs recorded no other)" if old else "peak memory that training adds"
    varied = [why for runs in seeds if (why := measures.unsteady(runs))]
    if varied or not any(len(measures.speeds(run)) for runs in seeds for run in runs):
        return False, True, f"MiB: {which}. Speed is not compared{f': {varied[0]}' if varied else ''}."
    return True, True, f"img/s: median; MiB: {which}."


def _memory(groups: Settings) -> Callable[[Run], float]:
    runs = [run for seeds in groups.values() for run in seeds.values() if run.state == "finished"]
    new = all(math.isfinite(measures.training_memory(run)) for run in runs)
    return measures.training_memory if new else measures.process_memory


def panel_table(cells: Cells) -> pd.DataFrame:
    """The last values in every panel of Figure 1 beside the paper's, at the epoch that all its runs have reached."""
    lines = []
    for panel in PANELS:
        epoch = common_epoch([run for of in panel.runs for run in cells.get(of, {}).values()])
        form = ".2%" if panel.metric == "pixel_error" else ".3f"
        for of in panel.runs:
            runs = [*cells.get(of, {}).values()]
            values = _finite(run.at(panel.metric, epoch) for run in runs if run.held)
            texts = [format(np.mean(values), form)] if values else []
            texts[:1] = [f"{texts[0]} ({min(values):{form}} to {max(values):{form}})"] if len(values) > 1 else texts
            diverged = sum(not run.held for run in runs)
            here = ", ".join(texts + [f"{diverged} diverged"] * (diverged > 0)) or "no run"
            paper = f"{PAPER_ERRORS[of]:.2%}" if panel.metric == "pixel_error" and of in PAPER_ERRORS else ""
            lines.append([panel.letter, label(of), str(len(runs)), str(epoch or ""), here, paper])
    return pd.DataFrame(lines, columns=["panel", "run", "seeds", "epoch", "here", "paper"])


def reached_table(cells: Cells) -> pd.DataFrame:
    """How many epochs AGC takes to BN's last error, and BN to AGC's: the first epoch at most as bad; each seed."""

    def last(run: Run) -> str:
        if not run.held or not run.last_epoch:
            return "" if run.held else "diverged"
        return f"{run.at('pixel_error', run.last_epoch):.2%}" + f" at epoch {run.last_epoch}" * (
            run.state == "unfinished"
        )

    def reached(run: Run, aim: Run) -> str:
        if not aim.held or not aim.last_epoch:
            return ""
        there = run.column("pixel_error") <= aim.at("pixel_error", aim.last_epoch)
        return f"epoch {there.idxmax()}" if there.any() else f"not in {run.last_epoch} epochs"

    lines = []
    for bn in [of for of in cells if of.norm == "bn"]:
        agc = bn._replace(norm="agc")
        for seed in sorted(cells[bn].keys() & cells.get(agc, {}).keys()):
            ours, theirs = cells[agc][seed], cells[bn][seed]
            aims = [last(theirs), reached(ours, theirs), last(ours), reached(theirs, ours)]
            lines.append([NAMES.get(bn.network, bn.network), str(bn.minibatch), f"{bn.rate:g}", str(seed), *aims])
    heads = ["network", "minibatch", "rate", "seed", "BN's error", "AGC is there at", "AGC's error", "BN is there at"]
    return pd.DataFrame(lines, columns=heads)


def environment_table(runs: list[Run]) -> pd.DataFrame:
    """What runs were made with, where it is recorded and differs: commit, versions, device ..., but for the command."""
    known = pd.DataFrame({run.name: run.environment for run in runs if run.environment}).astype(object)
    lines = []
    for key, row in known.iterrows():
        values = Counter("not recorded" if pd.isna(value) else str(value) for value in row)
        if len(values) > 1 and key != "command":
            texts = [f"{value} ({number} runs)" for value, number in values.most_common()]
            lines.append([key, "; ".join(texts)])
    return pd.DataFrame(lines, columns=["recorded", "in how many runs"])


def lambda_starts(groups: Settings) -> Settings:
    """The settings that start with different λ, with their runs that trained it, recorded it, and did not diverge.

    None where all start alike, or have different layers.
    """

    def followed(run: Run) -> bool:
        return run.held and run.norm in FOLLOWED and run.layers is not None and run.layers.epochs[0] == 0

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


def headline(runs: list[Run], groups: Settings, of_paper: bool) -> str:
    """What was compared, how many runs and seeds, and which norm ended where, in a paragraph."""
    states, seeds, epoch = Counter(run.state for run in runs), {run.seed for run in runs}, epoch_of(groups)
    alike = [
        " and ".join(dict.fromkeys(values)) if len({*values}) < 4 else f"{len({*values})} {what}"
        for what, values in {
            "networks": [run.words["network"] for run in runs], "widths": [run.words["width"] for run in runs],
            "data sets": [run.words["data"] for run in runs], "sizes": [run.words["size"] for run in runs],
            "lengths": [f"{run.epochs} epochs" for run in runs],
        }.items()
    ]  # fmt: skip
    several = f" with {len(seeds)} seeds" if len(seeds) > 1 else " with one seed" if len(runs) > 1 else ""
    texts = [f"{len(runs)} run{'s' * (len(runs) > 1)}{several}: {', '.join(alike)}."]
    if of_paper:
        there = sum((run.network, run.norm, run.minibatch, float(f"{run.rate:.4g}")) in RUNS for run in _firsts(groups))
        texts.append(f"{there} of the {len(RUNS)} settings of Figure 1 are there.")
    elif len(groups) > 1:
        keys = [key.rpartition(":")[2].replace("_", " ") for key in varying(_firsts(groups))]
        texts.append(f"{len(groups)} settings, which differ in {', '.join(keys)}.")
    others = [f"{number} {state}" for state, number in states.items() if state != "finished"]
    texts += [f"Not all finished: {', '.join(others)}."] * bool(others)
    for network in dict.fromkeys(run.network for run in _firsts(groups)):
        ends = []
        for norm in {run.norm for run in _firsts(groups) if run.network == network}:
            firsts = zip(groups, _firsts(groups), strict=True)
            here = [name for name, run in firsts if (run.network, run.norm) == (network, norm)]
            means = {name: float(np.mean(errors)) for name in here if (errors := _errors(groups[name], epoch))}
            if means:
                best, about = min(means, key=means.__getitem__), {NAMES.get(network), NAMES.get(norm)}
                where = ", ".join(part for part in best.split(", ") if part not in about)
                to = f" to {max(means.values()):.1f} %" + f" (best with {where})" * bool(where)
                ends.append((means[best], f"{NAMES.get(norm, norm)} {means[best]:.1f}{to if len(means) > 1 else ' %'}"))
        if ends:
            said = ", ".join(text for _, text in sorted(ends))
            texts.append(f"Pixel error of {NAMES.get(network, network)} at epoch {epoch}: {said}.")
    commonest = sorted({round(100 * run.commonest_class_error, 1) for run in runs if run.commonest_class_error >= 0})
    texts += [f"Always naming the commonest class errs on {' or '.join(map(str, commonest))} %."] * bool(commonest)
    texts += ["One seed does not say how much of a difference is chance."] * (len(seeds) == 1 < len(groups))
    return " ".join(texts)


def _firsts(groups: Settings) -> list[Run]:
    return [next(iter(seeds.values())) for seeds in groups.values()]


def _errors(seeds: Seeds, epoch: int) -> list[float]:
    return _finite(measures.final_error(run, epoch) for run in held(seeds, epoch).values())


def _cell(heading: str, words: str) -> str:
    """Words without what the heading says: "minibatch 4" -> "4", "no noise" -> "none"."""
    if words.casefold() == heading:
        return "yes"
    if words.startswith("no ") and len(words.split()) == 2:
        return "none"
    return words[len(heading) :].strip() if words.casefold().startswith(f"{heading} ") else words


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _counted(n: int, runs: Iterable[Run], epoch: int) -> str:
    """Such as "2 (1 diverged)"."""
    runs = [*runs]
    diverged = sum(not run.held for run in runs)
    late = sum(run.held and run.last_epoch < epoch for run in runs)
    why = [f"{diverged} diverged"] * (diverged > 0) + [f"{late} unfinished"] * (late > 0)
    return f"{n}" + f" ({', '.join(why)})" * bool(why)
