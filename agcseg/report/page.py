"""The report as a page: page.jinja, filled once as one HTML file with its pictures inside, and once as Markdown.

A table is a data frame of texts for both; **bold** is marked as in Markdown.
"""

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from matplotlib import rc_context
from PIL import Image

from agcseg.figure1 import PANELS, PAPER_ERRORS, RUNS
from agcseg.record.files import write
from agcseg.record.pictures import png
from agcseg.report import compare, figures
from agcseg.report.claims import MARGIN, Verdict, verdicts
from agcseg.report.compare import MEASURES, Cells, Settings, all_runs, epoch_of, firsts, label, measured, t_interval
from agcseg.report.read import NAMES, Run, read_folders

FOLLOWED = ("agc", "agc_std")  # norms whose λ is trained
OF_PAPER = {("cityscapes", (256, 512), 150, 1.0)}  # data, size, epochs, width
MOST_COLUMNS = 5  # of settings; more would not fit, and a name in words takes their place
RUN_COLUMNS = {  # what is shown of a run: key of `summarise` -> heading, format
    "run": ("run", ""), "state": ("state", ""), "epochs": ("epochs", ""), "final_error": ("error", ".2%"),
    "mean_error_last5": ("last 5", ".2%"), "best_error": ("best", ".2%"), "best_epoch": ("at", ""),
    "error_all_pixels": ("all px", ".2%"), "miou": ("mIoU", ".2%"), "val_loss": ("loss", ".3f"),
    "minutes": ("min", ".1f"), "images_per_second": ("img/s", ".1f"), "peak_memory_mib": ("MiB", ".0f"),
    "training_memory_mib": ("training MiB", ".0f"), "kept_for_backward_mib": ("kept MiB", ".0f"),
}  # fmt: skip


def write_report(
    folder: str | Path,
    found: tuple[list[Run], list[str], list[str]] | None = None,
    margin: float = MARGIN,
    reference: str | None = None,
) -> tuple[list[Path], dict]:
    """Writes report.html, report.md, report.csv and the pictures; see `agcseg-report --help`.

    Args:
        folder: where to; it is made if need be.
        found: the answer of `read_folders`, by default of this folder.
        margin: see `agcseg.report.verdicts`.
        reference: name of the setting that the others are compared with; see `agcseg.report.compare.reference_of`.

    Returns:
        the paths that were written, and what the page says: "headline", "results" (a table), "answers" (verdicts),
        "broken" (files, pictures among them), "notes" (why some of the runs are not compared among them) ...

    Raises:
        UserError: the folder holds nothing to report, the margin is not positive, or there is no such reference.
    """
    folder, (runs, broken, notes) = Path(folder), found or read_folders(folder)
    groups, twins = compare.by_setting(runs)
    kept, apart = compare.cells(runs)
    base = compare.reference_of(groups, reference)
    of_paper = reference is None and compare.is_figure1(runs, kept)
    alike = not of_paper and (reference is not None or compare.of_settings(runs))
    if alike:
        kept, apart = compare.cells(compare.like(runs, firsts(groups)[base]))
    notes = [*notes, *dict.fromkeys(twins + apart)]
    answers = verdicts(kept, margin, of_paper)
    shown, starts = _with_lambda(kept), lambda_starts(groups)
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context({"text.parse_math": False}):  # the name of a setting may hold dollars
        curves = figures.figure1(kept) if of_paper else figures.figure(groups, base)
        drawn: dict[str, Any] = {"figure1.png" if of_paper else "figure.png": curves}
        of_starts = figures.lambda_starts_figure(starts, [*groups]) if starts else None
        drawn["lambda.png"] = of_starts or figures.lambda_figure(shown)
        drawn["forest.png"] = figures.forest(answers)
        drawn["predictions.png"], unreadable = figures.predictions(groups)
        paths = [_written(folder / name, png(picture)) for name, picture in drawn.items() if picture]
    broken = [*broken, *unreadable]
    content = {
        "title": folder.resolve().name, "headline": headline(runs, groups, of_paper), "broken": broken,
        "results": settings_table(groups), "answers": answers, "claims": claims_table(answers),
        "epoch": epoch_of(groups), "costs": costs_compared(groups)[2], "alike": alike, "base": base,
        "forgotten": lambda_memory(starts) if starts else None, "panels": PANELS, "paper": PAPER_ERRORS,
        "as_paper": {(run.data, run.size, run.epochs, run.width) for run in all_runs(kept)} == OF_PAPER,
        "ends": panel_table(kept) if of_paper else [], "differences": differences_table(groups, base),
        "reached": reached_table(kept), "runs": runs_table(runs), "environments": environment_table(runs),
        "notes": [f"{run.name} diverged: {run.reason}" for run in runs if run.reason] + notes,
    }  # fmt: skip
    texts = {
        "report.html": fill(content, {path.name: _inline(path) for path in paths}, html=True),
        "report.md": fill(content, {path.name: path.name for path in paths}, html=False),
        "report.csv": pd.DataFrame(map(summarise, runs), dtype=object).to_csv(index=False, lineterminator="\n"),
    }
    paths += [_written(folder / name, text) for name, text in texts.items()]
    return paths, content


def fill(content: dict, pictures: dict[str, str], html: bool) -> str:
    """The page as HTML or Markdown.

    Args:
        pictures: file name -> source.
    """

    def cell(text: str) -> str:
        bold = re.fullmatch(r"\*\*(.*)\*\*", text)
        return (Markup("<b>{}</b>").format(bold[1]) if bold else escape(text)) if html else text.replace("|", r"\|")

    def kind(text: str) -> str:
        """The class of a verdict, or of what is missing for one."""
        found = re.match(r"(?:\*\*)?(not supported|not enough data|supported|needs)", text)
        return found[1].replace(" ", "-") if found else ""

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=html, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"cell": cell, "kind": kind}
    text = page.get_template("page.jinja").render(content, pictures=pictures, html=html)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def headline(runs: list[Run], groups: Settings, of_paper: bool) -> str:
    """What was compared, how many runs and seeds, and which norm ended where, in a paragraph."""
    first, seeds = firsts(groups), {run.seed for run in runs}
    keys = {"network": "networks", "width": "widths", "data": "data sets", "size": "sizes", "epochs": "lengths"}
    words = pd.DataFrame([run.words | {"epochs": f"{run.epochs} epochs"} for run in runs])[[*keys]].rename(columns=keys)
    unique = {what: words[what].unique() for what in words}
    alike = [" and ".join(said) if len(said) < 4 else f"{len(said)} {what}" for what, said in unique.items()]
    several = f" with {len(seeds)} seeds" if len(seeds) > 1 else " with one seed" if len(runs) > 1 else ""
    texts = [f"{len(runs)} run{'s' * (len(runs) > 1)}{several}: {', '.join(alike)}."]
    if of_paper:
        there = [(run.network, run.norm, run.minibatch, float(f"{run.rate:.4g}")) in RUNS for run in first.values()]
        texts.append(f"{sum(there)} of the {len(RUNS)} settings of Figure 1 are there.")
    elif len(groups) > 1:
        keys = [key.rpartition(":")[2].replace("_", " ") for key in compare.varying([*first.values()])]
        texts.append(f"{len(groups)} settings, which differ in {', '.join(dict.fromkeys(keys))}.")
    others = Counter(run.state for run in runs if run.state != "finished")
    texts += [f"Not all finished: {', '.join(f'{n} {state}' for state, n in others.items())}."] * bool(others)
    means = measured(groups)["error, %"].groupby("setting").mean()
    ends = pd.DataFrame([(run.network, run.norm, means.get(name)) for name, run in first.items()], [*first]).dropna()
    for network, of_network in ends.groupby(0, sort=False):
        said = []
        for norm, errors in of_network.sort_values(2, kind="stable").groupby(1, sort=False)[2]:
            about = {NAMES.get(network), NAMES.get(norm)}
            where = ", ".join(part for part in errors.index[0].split(", ") if part not in about)
            to = f" to {errors.max():.1f} %" + f" (best with {where})" * bool(where)
            said.append(f"{NAMES.get(norm, norm)} {errors.min():.1f}" + (to if len(errors) > 1 else " %"))
        texts.append(f"Pixel error of {NAMES.get(network, network)} at epoch {epoch_of(groups)}: {', '.join(said)}.")
    commonest = " or ".join(map(str, figures.commonest(runs)))
    texts += [f"Always naming the commonest class errs on {commonest} %."] * bool(commonest)
    stuck = {name: sum(map(_learnt_nothing, seeds.values())) for name, seeds in groups.items()}
    where = "; ".join(f"{name} ({number} of {len(groups[name])})" for name, number in stuck.items() if number)
    texts += [f"Runs that were never better, and learnt nothing, but count in the means: {where}."] * bool(where)
    texts += ["One seed does not say how much of a difference is chance."] * (len(seeds) == 1 and len(groups) > 1)
    return " ".join(texts)


def _learnt_nothing(run: Run) -> bool:
    return run.held and run.last_epoch > 0 and run.column("pixel_error").min() >= run.commonest_class_error


def settings_table(groups: Settings) -> pd.DataFrame:
    """What the settings reached, the best first, by name; the best figures are bold.

    What varies has a column each where there are few such keys; speed and memory are there if `costs_compared` says so.
    """
    names, first, values = compare.by_error(groups), firsts(groups), measured(groups)
    keys = compare.varying([*first.values()])
    table = pd.DataFrame(index=names)
    if 0 < len(keys) <= MOST_COLUMNS:
        for key in keys:
            heading = key.rpartition(":")[2].rpartition(".")[2].replace("_", " ")
            cells = [_cell(heading, first[name].words.get(key, "")) for name in names]
            if heading in table and ":" in key:  # another norm's or network's, such as λ of AGC and of center
                cells = [cell or other for cell, other in zip(cells, table[heading], strict=True)]
            elif heading in table:
                heading = key
            table[heading] = cells
    else:
        table["setting"] = names
    table["n"] = _counts(values, groups, [[name] for name in names])
    for heading, (*_, digits, best) in MEASURES.items():
        texts, means = _spreads(values[heading], names, digits), values[heading].groupby("setting").mean()
        means = means.reindex(names).round(digits)
        tops = means == means.groupby(
            [first[name].words["network"] + first[name].words["data"] for name in names]
        ).transform(best)
        table[heading] = [f"**{t}**" if top and len(names) > 1 else t for t, top in zip(texts, tops, strict=True)]
    speed, memory, _ = costs_compared(groups)
    for heading, cost, digits in [("img/s", compare.speed, 1)] * speed + [("MiB", compare.memory, 0)] * memory:
        costs = pd.Series([cost(groups[name][seed]) for name, seed in values.index], values.index)
        costs = costs.groupby("setting").mean().reindex(names)
        table[heading] = [f"{cost:.{digits}f}" if math.isfinite(cost) else "" for cost in costs]
    return table


def differences_table(groups: Settings, reference: str) -> pd.DataFrame:
    """How far each setting is from the reference, paired by seed; in the order of `settings_table`."""
    names = [name for name in compare.by_error(groups) if name != reference]
    values = measured(groups)
    base = values[values.index.get_level_values("setting") == reference].droplevel("setting")
    seeds = values.index.get_level_values("seed")
    gaps = (values - base.reindex(seeds).set_axis(values.index))[seeds.isin(base.index)]
    table = pd.DataFrame({f"setting − {reference}": names}, index=names)
    table["n"] = _counts(gaps, groups, [[name, reference] for name in names])
    for heading, (*_, digits, _) in MEASURES.items():
        table[heading.replace("%", "points")] = _spreads(gaps[heading], names, digits, "+")
    return table


def spread(values: list[float], digits: int, sign: str = "") -> str:
    """Mean of values over seeds with what may be said of its error; empty without values."""

    def text(value: float) -> str:
        return format(round(float(value), digits) + 0.0, f"{sign}.{digits}f")  # + 0.0: no negative zero

    if len(values) < 3:
        both = f" ({', '.join(map(text, values))})" * (len(values) == 2)
        return text(float(np.mean(values))) + both if values else ""
    low, high = t_interval(values)
    return f"{text(float(np.mean(values)))} ± {(high - low) / 2:.{digits}f}"


def costs_compared(groups: Settings) -> tuple[bool, bool, str]:
    """Whether speed and memory of the settings can be compared, and what to say about it.

    Both only on one device; speed only if it kept steady within each setting, for otherwise others used the device too.
    """
    seeds = [[run for run in seeds.values() if run.state == "finished"] for seeds in groups.values()]
    why = compare.unlike(sum(seeds, [])) if any(seeds) else "no run has finished"
    if why:
        return False, False, f"Speed and memory are not compared: {why}."
    memory = "MiB: peak memory that training adds."
    varied = next(filter(None, map(compare.unsteady, seeds)), "")
    if varied or not any(len(compare.speeds(run)) for runs in seeds for run in runs):
        return False, True, f"{memory} Speed is not compared{f': {varied}' if varied else ''}."
    return True, True, f"img/s: median; {memory}"


def _spreads(values: pd.Series, names: list[str], digits: int, sign: str = "") -> list[str]:
    """`spread` of each setting."""
    there = {name: part.tolist() for name, part in values.dropna().groupby("setting")}
    return [spread(there.get(name, []), digits, sign) for name in names]


def _counts(values: pd.DataFrame, groups: Settings, compared: list[list[str]]) -> list[str]:
    """How many seeds of the first of some settings have values, such as "2 (1 diverged)", of seeds that all have."""
    counts, texts = values.groupby("setting").size(), []
    for names in compared:
        seeds = set.intersection(*({*groups[name]} for name in names))
        runs = [groups[name][seed] for name in names for seed in seeds]
        diverged = sum(not run.held for run in runs)
        late = sum(run.held and run.last_epoch < epoch_of(groups) for run in runs)
        why = ", ".join([f"{diverged} diverged"] * (diverged > 0) + [f"{late} unfinished"] * (late > 0))
        texts.append(f"{counts.get(names[0], 0)}" + f" ({why})" * bool(why))
    return texts


def _cell(heading: str, words: str) -> str:
    """Words without what the heading says: "minibatch 4" -> "4", "no noise" -> "none"."""
    if words.casefold() == heading:
        return "yes"
    if words.startswith("no ") and len(words.split()) == 2:
        return "none"
    return words[len(heading) :].strip() if words.casefold().startswith(f"{heading} ") else words


def claims_table(answers: list[Verdict]) -> pd.DataFrame:
    """All claims and their parts."""
    lines = []
    for answer in answers:
        lines.append([f"**{answer.number}. {answer.claim}**", "", "", f"**{answer.answer}**"])
        for part in answer.parts:
            basis = f" ({part.estimate.basis})" * part.known
            lines.append([part.what + basis, part.measured, part.wanted, part.answer])
    heads = ["claim, and what was measured", "estimate (95 % interval)", "expected", "verdict"]
    return pd.DataFrame(lines, columns=heads)


def panel_table(cells: Cells) -> pd.DataFrame:
    """What the runs of each panel of Figure 1 ended at, beside the paper's."""
    lines = []
    for panel in PANELS:
        epoch = compare.common_epoch(all_runs({of: cells.get(of, {}) for of in panel.runs}))
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
        at = f" at epoch {run.last_epoch}" * (run.state == "unfinished")
        return f"{run.at('pixel_error', run.last_epoch):.2%}{at}"

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


def summarise(run: Run) -> dict:
    """One row of report.csv: settings, and what the run reached on the validation images.

    Errors and mIoU are fractions, what was not measured is None.
    """
    errors, last = run.column("pixel_error").where(np.isfinite), run.last_epoch
    row = {
        "run": run.name, "network": run.network, "width": run.width, "data": run.data,
        "size": f"{run.size[0]}x{run.size[1]}", "norm": run.norm, "minibatch": run.minibatch, "rate": run.rate,
        "seed": run.seed, "epochs": last, "epochs_planned": run.epochs, "state": run.state,
        "final_error": run.at("pixel_error", last),
        "mean_error_last5": errors.tail(5).mean(), "best_error": errors.min(),
        "best_epoch": int(errors.idxmin()) if errors.notna().any() else None,
        "error_all_pixels": run.at("pixel_error_all", last), "miou": run.at("miou", last),
        "val_loss": run.at("val_loss", last), "commonest_class_error": run.commonest_class_error,
        "peak_memory_mib": compare.memory(run, "process"), "training_memory_mib": compare.memory(run),
        "kept_for_backward_mib": compare.memory(run, "kept"),
        "images_per_second": compare.speed(run), "minutes": run.at("seconds", last) / 60,
    }  # fmt: skip
    return {key: None if value != value else value for key, value in row.items()}


def runs_table(runs: list[Run]) -> pd.DataFrame:
    """A line per run; errors and mIoU in %, columns that nobody measured left out."""
    rows = pd.DataFrame(map(summarise, runs), dtype=object).dropna(axis=1, how="all")
    shown = {key: (heading, form) for key, (heading, form) in RUN_COLUMNS.items() if key in rows}
    return pd.DataFrame(
        {head: ["" if pd.isna(v) else format(v, form) for v in rows[key]] for key, (head, form) in shown.items()}
    )


def environment_table(runs: list[Run]) -> pd.DataFrame:
    """What runs were made with, where it is recorded and differs: commit, versions, device ..., but for the command."""
    known = pd.DataFrame([run.environment for run in runs if run.environment], dtype=object).fillna("not recorded")
    counts = {key: known[key].astype(str).value_counts() for key in known if key != "command"}
    lines = [
        [key, "; ".join(f"{value} ({number} runs)" for value, number in of.items())]
        for key, of in counts.items()
        if len(of) > 1
    ]
    return pd.DataFrame(lines, columns=["recorded", "in how many runs"])


def lambda_starts(groups: Settings) -> Settings:
    """The settings that start with different λ, with their runs that trained it, recorded it, and did not diverge.

    Empty where all start alike, or have different layers.
    """

    def followed(run: Run) -> bool:
        return run.held and run.norm in FOLLOWED and run.layers is not None

    chosen = {name: {s: run for s, run in seeds.items() if followed(run)} for name, seeds in groups.items()}
    layers = {tuple(run.lambda_means) for run in all_runs(chosen)}
    starts = {round(float(run.lambda_means.iloc[0].mean()), 3) for run in all_runs(chosen)}
    return {name: seeds for name, seeds in chosen.items() if seeds} if len(layers) == 1 and len(starts) > 1 else {}


def lambda_memory(groups: Settings) -> float:
    """How far the settings' mean λ lie apart at the end ÷ at the start, both averaged over the layers.

    1: nothing of the start is forgotten; 0: all ends are the same. What seeds differ by is in it too.
    """
    ends = [np.mean([run.lambda_means.iloc[[0, -1]] for run in of.values()], 0) for of in groups.values()]
    before, after = np.ptp(ends, axis=0).mean(1)
    return float(after / before)


def _with_lambda(kept: Cells) -> list[Run]:
    """Of each network a run that recorded λ: at minibatch 4 and rate 0.08 where there is one, the first seed."""
    chosen: dict[str, Run] = {}
    for of in sorted(kept, key=lambda of: (of.minibatch, of.rate) != (4, 0.08)):
        for seed in sorted(kept[of]):
            if kept[of][seed].layers is not None:
                chosen.setdefault(of.network, kept[of][seed])
    return [*chosen.values()]


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _inline(path: Path) -> str:
    """A picture as a data URL; photographs as JPEG, which is a tenth of the size."""
    kind, data = "png", path.read_bytes()
    if path.name == "predictions.png":
        buffer = io.BytesIO()
        Image.open(path).save(buffer, "jpeg", quality=85)
        kind, data = "jpeg", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _written(path: Path, content: str | bytes) -> Path:
    write(path, content)
    return path
