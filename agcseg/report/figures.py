"""The figures, as matplotlib figures that are yet to be saved."""

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from PIL import Image, ImageDraw, ImageFont

from agcseg.figure1 import PANELS, Panel, Setting
from agcseg.report.claims import Verdict
from agcseg.report.compare import Cells, Seeds, Settings, by_error, epoch_of, held, label, of_settings
from agcseg.report.measures import NOT_SUPPORTED, SUPPORTED, t_interval
from agcseg.report.read import NAMES, NORMS, Run

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # safe for the colour-blind
LINESTYLES = ("-", (0, (4, 1.5)), (0, (1, 1)), "-.")
END_MARKERS: dict[str, dict[str, Any]] = {
    "diverged": {"marker": "x", "ms": 9, "mew": 2},
    "unfinished": {"marker": "o", "ms": 7, "mfc": "white"},
}
STYLES = {  # of Figure 1: minibatch and rate of the panels that compare these, norm of the others
    (1, 0.02): ("#E69F00", "-"), (4, 0.08): ("#009E73", (0, (5, 1))), (8, 0.16): ("#CC79A7", "-"),
    (8, 0.08): ("#56B4E9", (0, (5, 1))), (8, 0.32): ("#000000", (0, (2, 1))), (8, 0.64): ("#D55E00", "-."),
    "bn": ("#D55E00", "-"), "agc": ("#0072B2", (0, (5, 1))),
}  # fmt: skip
SAME_SCALE = ("ab", "cd", "e", "f", "gh")  # panels that the paper compares; ClassNet's loss has one part more
ROLES = {"encoder": "#0072B2", "lateral": "#009E73", "decoder": "#D55E00", "head": "#000000"}
VERDICTS = {SUPPORTED: "#0072B2", NOT_SUPPORTED: "#D55E00"}
LABEL = 32  # letters in a line of a setting's name
METRICS = (("pixel_error", "validation pixel error, %"), ("val_loss", "validation loss"))

Curve = tuple[Run, np.ndarray]  # a run and its points (n, 2), finite ones only


def figure(groups: Settings, reference: str) -> Figure:
    """Pixel error (%) and loss of each setting: against the epoch (above), and at the epoch of the tables (below).

    A curve is the mean over the seeds; where there are few settings a band shows the smallest and the largest. Below,
    a dot is a seed and a bar the mean, with its 95 % interval from three seeds on. The rows are the legend. Where BN
    and AGC are compared at several minibatches or rates, each has a panel of its own, on the same scale.

    Args:
        groups: of `agcseg.report.compare.by_setting`.
        reference: the name of the setting that is drawn thicker.
    """
    epoch, styles = epoch_of(groups), setting_styles([*groups])
    order, runs = by_error(groups, epoch), [run for seeds in groups.values() for run in seeds.values()]
    norms = sorted({run.norm for run in runs}, reverse=True)  # BN, as in the paper, first
    apart = not of_settings(runs) and len(groups) > len(norms) > 1
    lines = max(fill(name, LABEL).count("\n") + 1 for name in order)
    above, below = 3.4 * (1 + apart), 0.75 + (0.07 + 0.16 * lines) * len(order)
    fig = Figure(figsize=(10, above + below), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    axes = fig.subplots(2 + apart, 2, height_ratios=[above / (1 + apart)] * (1 + apart) + [below])
    commonest = sorted({round(100 * run.commonest_class_error, 1) for run in runs if run.commonest_class_error >= 0})
    for column, (metric, title) in enumerate(METRICS):
        levels = commonest if metric == "pixel_error" else []
        scale = y_range([(run, points(run, metric)) for run in runs], levels)
        panels = [(axes[column, i], [norm]) for i, norm in enumerate(norms)] if apart else [(axes[0, column], norms)]
        for axis, shown in panels:
            part = {name: seeds for name, seeds in groups.items() if next(iter(seeds.values())).norm in shown}
            heading = f"{NORMS.get(shown[0], shown[0])}: {title}" if apart else title
            _draw_curves(axis, part, metric, heading, scale, levels, reference, styles, len(part) <= 4)
        _draw_rows(axes[-1, column], groups, order, metric, epoch, styles)
    _label_rows(axes[-1, 0], order, reference, styles)
    return fig


def _draw_curves(axis, groups: Settings, metric, title, scale, levels, reference, styles, band: bool) -> None:
    runs, (low, high) = [run for seeds in groups.values() for run in seeds.values()], scale
    for level in levels:
        axis.axhline(level, color="0.6", ls=":", lw=1)
        if low < level < high:  # a text elsewhere would take the room of the axes
            at = {"xy": (0.995, level), "xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
            axis.annotate("commonest class", **at, size=8, color="0.4", zorder=1)
    for name, seeds in groups.items():
        style = styles[name] | {"lw": 2.6 if name == reference else 1.5}
        held = [run for run in seeds.values() if run.held]
        _draw_mean(axis, held, metric, style, band)
        for i, run in enumerate(seeds.values()):
            curve = points(run, metric)
            if not run.held:
                axis.plot(*curve.T, **style | {"lw": 0.9, "label": "" if held or i else style.get("label")})
            _mark_end(axis, run, curve, high, style["color"])
    axis.set(xlim=(0.5, max((run.epochs for run in runs), default=1) + 0.5), ylim=scale, xlabel="epoch")
    axis.set_title(title, loc="left", fontsize=10)
    off = _off([(run, points(run, metric)) for run in runs], high)
    axis.annotate(off, (1, 1.02), xycoords="axes fraction", ha="right", va="bottom", size=8)
    axis.locator_params(axis="x", integer=True)
    axis.grid(alpha=0.25)


def _draw_rows(axis: Axes, groups: Settings, order: list[str], metric: str, epoch: int, styles: dict) -> None:
    values = {name: _values_at(groups[name], metric, epoch) for name in order}
    limit = _usual_limit([float(np.mean(of)) for of in values.values() if of])
    texts = [
        _draw_row_of_seeds(axis, row, values[name], limit, groups[name], styles[name]["color"])
        for row, name in enumerate(order)
    ]
    left, right = axis.get_xlim()
    axis.set_xlim(left, right + 0.35 * (right - left) * any(texts))  # room for the text
    axis.set(ylim=(len(order) - 0.5, -0.5), yticks=range(len(order)), yticklabels=[])
    what = "seeds, mean, 95 % interval" if any(len(of) > 2 for of in values.values()) else "seeds and mean"
    what = what if any(len(of) > 1 for of in values.values()) else dict(METRICS)[metric]
    axis.set_title(f"epoch {epoch}: {what}", loc="left", fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.grid(alpha=0.25)


def figure1(cells: Cells) -> Figure:
    """The eight panels of the paper's Figure 1, drawn for whatever of their runs is there.

    A line is the mean over the seeds that reached the epoch, a band their smallest and largest value; diverged runs are
    thin lines of their own that end in a cross. What the paper compares has one scale.
    """
    fig = Figure(figsize=(11, 15), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    axes = dict(zip((panel.letter for panel in PANELS), fig.subplots(4, 2).flat, strict=True))
    sizes = {run.size for seeds in cells.values() for run in seeds.values()}
    for letters in SAME_SCALE if len(sizes) < 2 else ("ab", "c", "d", "e", "f", "gh"):
        panels = [panel for panel in PANELS if panel.letter in letters]
        runs = [run for p in panels for of in p.runs for run in cells.get(of, {}).values()]
        scale = y_range([(run, points(run, panels[0].metric)) for run in runs], reach=1.5)
        for panel in panels:
            _draw_panel(axes[panel.letter], panel, cells, scale)
    return fig


def lambda_figure(runs: list[Run]) -> Figure:
    """λ against the depth at the last epoch (left) and the mean λ of each layer over the epochs (right).

    Args:
        runs: with `layers`; each has a row of its own, its layers from the image at the top to the classes.
    """
    heights = [1.2 + 0.19 * len(run.layers.names) for run in runs]
    fig = Figure(figsize=(11, sum(heights)), dpi=120, layout="constrained")
    rows = fig.subfigures(len(runs), 1, squeeze=False, height_ratios=heights).flat
    for part, run in zip(rows, runs, strict=True):
        layers, last = run.layers, {key: values[-1] for key, values in run.layers.values.items()}
        norm = NAMES.get(run.norm, run.norm)
        where = f"{run.title}: {norm}, minibatch {run.minibatch}, rate {run.rate:.4g}, seed {run.seed}"
        part.suptitle(where, x=0.02, ha="left", fontsize=11, fontweight="bold")
        left, right = part.subplots(1, 2, sharey=True)
        depth = np.arange(len(layers.names))
        colours = [ROLES.get(role, "0.4") for role in layers.roles]
        left.hlines(depth, last["lambda_q05"], last["lambda_q95"], colours, lw=1)
        left.hlines(depth, last["lambda_q25"], last["lambda_q75"], colours, lw=4, alpha=0.5)
        left.scatter(last["lambda_mean"], depth, c=colours, s=22, zorder=3)
        for level in (0, 1, 2):
            left.axvline(level, color="0.5", ls="--" if level == 1 else ":", lw=1, zorder=0)
        left.set_yticks(depth, layers.names, fontsize=7.5)
        left.set_ylim(len(depth) - 0.5, -0.5)
        left.set_xlabel("λ: mean (dot), 25 to 75 % (thick) and 5 to 95 % of the filters (thin)", fontsize=9)
        left.set_title(f"at epoch {layers.epochs[-1]}", fontsize=10)
        left.grid(axis="x", alpha=0.25)
        means = layers.values["lambda_mean"]
        away = max(0.05, math.ceil(20 * np.nanmax(np.abs(means - 1))) / 20)
        edges = np.r_[layers.epochs - 0.5, layers.epochs[-1] + 0.5]
        mesh = right.pcolormesh(
            edges, np.arange(len(depth) + 1) - 0.5, means.T, cmap="PuOr", vmin=1 - away, vmax=1 + away, rasterized=True
        )
        right.set(xlabel="epoch (0: before training)", xlim=(edges[0], edges[-1]))
        right.locator_params(axis="x", integer=True)
        right.set_title("mean λ over the epochs", fontsize=10)
        part.colorbar(mesh, ax=right, label="mean λ")
        seen = [role for role in ROLES if role in layers.roles]
        left.legend(
            handles=[Line2D([], [], color=ROLES[role], lw=3, label=role) for role in seen], fontsize=8, loc="best"
        )
    return fig


def setting_styles(names: Sequence[str]) -> dict[str, dict]:
    """Colour and dashes of each setting: of a norm always the same, else by its place among the names."""
    norms = [NAMES.get(norm, norm) for norm in NORMS]
    of_norms = 2 * len({*names} & {*norms}) > len(names)
    known = list(dict.fromkeys([*norms * of_norms, *names]))
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "ls": LINESTYLES[i // len(COLOURS) % len(LINESTYLES)]}
        for i, name in enumerate(known)
        if name in names
    }


def lambda_starts_figure(groups: Settings, names: Sequence[str]) -> Figure:
    """Mean λ of each layer, in the order of execution, before training and at the end: does it remember its start?

    A line is the mean over the seeds, a band their smallest and largest value; dotted: before training.

    Args:
        groups: of `agcseg.report.tables.lambda_starts`.
        names: of all settings of the report, which decide the colours.
    """
    styles = setting_styles(names)
    fig = Figure(figsize=(10, 5), dpi=120, layout="constrained")
    axis = fig.subplots()
    layers = next(iter(next(iter(groups.values())).values())).layers
    depth = np.arange(len(layers.names))
    for name, seeds in groups.items():
        runs = seeds.values()
        means = np.array([run.layers.values["lambda_mean"][[0, -1]] for run in runs])  # (seeds, 2, layers)
        colour = styles[name]["color"]
        axis.plot(depth, means[:, 0].mean(0), color=colour, ls=":", lw=1.3)
        lasts = "/".join(map(str, sorted({int(run.layers.epochs[-1]) for run in runs})))
        text = f"{name}, epoch {lasts}" + f", {len(runs)} seeds" * (len(runs) > 1)
        axis.plot(depth, means[:, 1].mean(0), color=colour, ls=styles[name]["ls"], marker=".", lw=1.7, label=text)
        axis.fill_between(depth, means[:, 1].min(0), means[:, 1].max(0), color=colour, alpha=0.18, lw=0)
    for change in [i for i in depth[1:] if layers.roles[i] != layers.roles[i - 1]]:
        axis.axvline(change - 0.5, color="0.75", lw=1, zorder=0)
    axis.plot([], [], color="0.3", ls=":", label="before training")
    axis.set(xlim=(-0.5, len(depth) - 0.5), ylabel="mean λ of the layer")
    axis.set_xticks(depth, layers.names, rotation=90, fontsize=8)
    axis.grid(axis="y", alpha=0.25)
    fig.legend(*axis.get_legend_handles_labels(), loc="outside upper left", ncols=4, fontsize=9, frameon=False)
    return fig


def forest(answers: list[Verdict]) -> Figure | None:
    """Each part of the claims that has an estimate: value and 95 % interval against the band that it must lie in.

    A row has a scale of its own, which shows its band (grey) and its interval; an arrow points to what is infinite.
    None where there is no estimate.
    """
    parts = [(answer, part) for answer in answers for part in answer.parts if part.known]
    if not parts:
        return None
    fig = Figure(figsize=(5.6, 0.3 + 0.44 * len(parts)), dpi=150, layout="constrained")
    axis = fig.subplots()
    for row, (answer, part) in enumerate(parts):
        value, (low, high), bounds = part.estimate.value, part.interval, part.band
        known = [end for end in (value, low, high, *bounds) if math.isfinite(end)]
        away = 0.25 * (max(known) - min(known)) or abs(value) or 1
        left, width = min(known) - away, max(known) - min(known) + 2 * away
        places = [(min(max(x, left), left + width) - left) / width for x in (value, low, high, *bounds)]
        value_at, low_at, high_at, *band = places
        axis.barh(row, band[1] - band[0], left=band[0], height=0.36, color="0.88", zorder=0)
        for end, x in zip(bounds, band, strict=True):
            if math.isfinite(end):
                axis.text(x, row, f"{end:{part.form}}", size=6, color="0.45", ha="center", va="center")
        colour = VERDICTS.get(part.leaning, "0.35")
        axis.plot([low_at, high_at], [row, row], color=colour, lw=2, solid_capstyle="butt")
        marker = "o" if math.isfinite(value) else ">" if value > 0 else "<"
        face = colour if part.verdict == part.leaning else "white"
        axis.plot(value_at, row, marker, color=colour, mfc=face, ms=6, clip_on=False, zorder=3)
        axis.text(0, row - 0.36, f"{answer.number}  {part.what}", size=7, va="center")
        axis.text(1, row - 0.36, f"{value:{part.form}}", size=7, color=colour, va="center", ha="right")
    axis.set(xlim=(0, 1), ylim=(len(parts) - 0.6, -0.6), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    return fig


def predictions(groups: Settings, most: int = 12) -> tuple[Image.Image | None, list[str]]:
    """The first validation image as each setting's first seed predicts it, and a line for each picture that is broken.

    None where no run has stored its predictions.
    """
    rows: list[tuple[str, int, Image.Image]] = []
    broken = []
    for name, run in [(n, run) for n, seeds in groups.items() for run in seeds.values()]:
        path = _predicted(run)
        if path is None or name in [row[0] for row in rows] or len(rows) == most:
            continue
        try:
            with Image.open(path) as picture:
                panels = max(4, picture.width // (run.size[1] + 2))  # each in its frame; a contour is the fifth
                height = min(picture.height, round(picture.width / panels * run.size[0] / run.size[1]))
                scene = picture.convert("RGB").crop((0, 0, picture.width, height))
                rows.append((name, panels, scene.resize((1200, round(1200 * height / picture.width)))))
        except (OSError, SyntaxError) as error:
            broken.append(f"{_predicted(run)}: {error}")
    if not rows:
        return None, broken
    page = Image.new("RGB", (1200, 36 + sum(scene.height + 30 for *_, scene in rows)), "white")
    draw, y = ImageDraw.Draw(page), 34
    panels = max(panels for _, panels, _ in rows)
    for i, text in enumerate(("image", "prediction", "truth", "wrong pixels", "contour")[:panels]):
        draw.text((1200 * i // panels + 4, 8), text, fill="gray", font=ImageFont.load_default(17))
    for name, _, scene in rows:
        draw.text((4, y + 2), name, fill="black", font=ImageFont.load_default(19))
        page.paste(scene, (0, y + 28))
        y += scene.height + 30
    return page, broken


def _predicted(run: Run) -> Path | None:
    file = run.path / "predictions.png"
    return file if file.is_file() else None


def points(run: Run, metric: str) -> np.ndarray:
    """(n, 2): epoch and value where it is finite; errors in %."""
    scale = 100 if metric == "pixel_error" else 1
    values = scale * run.column(metric)
    return values[np.isfinite(values)].reset_index().to_numpy(float)


def y_range(curves: Sequence[Curve], levels: Sequence[float] = (), reach: float = 3) -> tuple[float, float]:
    """The scale: made for the better 70 % of each run that held; it reaches further, but not as far as a spike.

    Args:
        levels: values to be shown if they are near.
        reach: how much further at most, times what the better 70 % span.
    """
    there = [curve[:, 1] for _, curve in curves if len(curve)]
    values = np.concatenate(there or [np.ones(1)])
    steady = [curve[:, 1] for run, curve in curves if len(curve) and run.held] or [values]
    low, usual = values.min(), max(np.percentile(v, 70, method="nearest") for v in steady)
    high = max(
        [values[values <= usual + reach * (usual - low)].max(), *(level for level in levels if level <= 2 * usual)]
    )
    margin = 0.06 * (high - low) or 0.1 * high
    return float(max(0, low - margin)), float(high + margin)


def _draw_panel(axis: Axes, panel: Panel, cells: Cells, scale: tuple[float, float]) -> None:
    there = {of: [*cells[of].values()] for of in panel.runs if of in cells}
    names = {of: _caption(of, panel, runs) for of, runs in there.items()}
    looks = {of: STYLES[of.norm if panel.letter in "cdef" else of[2:]] for of in there}
    styles = {names[of]: {"color": looks[of][0], "ls": looks[of][1], "label": names[of]} for of in there}
    title = fill(f"({panel.letter}) {panel.caption}", 56)
    _draw_curves(axis, {names[of]: cells[of] for of in there}, panel.metric, title, scale, [], "", styles, True)
    axis.set_ylabel(dict(METRICS)[panel.metric])
    missing = [of for of in panel.runs if of not in cells]
    if missing:
        text = "no run of\n" + "\n".join(map(label, missing))
        at = {"xy": (0.5, 0.5), "ha": "center"} if not there else {"xy": (0.02, 0.1)}
        axis.annotate(text, xycoords="axes fraction", color="0.35", fontsize=8, va="center", **at)
    if there:
        axis.legend(fontsize=8.5, framealpha=0.7, edgecolor="none", loc="upper right")
    else:
        axis.set(xticks=[], yticks=[])


def _caption(of: Setting, panel: Panel, seeds: list[Run]) -> str:
    """What a line of a panel is, what it ends at, and how many seeds it is made of."""
    what = {
        "a": f"minibatch {of.minibatch}, rate {of.rate:g}", "b": f"minibatch {of.minibatch}, rate {of.rate:g}",
        "g": f"rate {of.rate:g}", "h": f"rate {of.rate:g}",
    }.get(panel.letter, NAMES[of.norm])  # fmt: skip
    held = [run for run in seeds if run.held]
    ends = [curve[-1, 1] for run in held if len(curve := points(run, panel.metric))]
    form = ".1f" if panel.metric == "pixel_error" else ".3f"
    end = f": {np.mean(ends):{form}}" + " %" * (panel.metric == "pixel_error") if ends else ""
    lasts = sorted({run.last_epoch for run in held if run.state == "unfinished"})
    until = f" at epoch {'/'.join(map(str, lasts))}" if lasts else ""
    count = f", {len(seeds)} seeds" if len(seeds) > 1 else ""
    diverged = f", {len(seeds) - len(held)} diverged" if held else ", diverged"
    return what + end + until + count + diverged * (len(held) < len(seeds))


def _values_at(seeds: Seeds, metric: str, epoch: int) -> list[float]:
    """One for each seed that has a finite one; errors in %."""
    scale = 100 if metric == "pixel_error" else 1
    return [value for run in held(seeds, epoch).values() if math.isfinite(value := scale * run.at(metric, epoch))]


def _usual_limit(means: list[float]) -> float:
    """Beyond which a mean is written, not drawn: one setting that fails must not squash all others into a corner."""
    if not means:
        return math.inf
    middle = np.median(means)
    return float(middle + max(3 * (middle - min(means)), middle / 4))


def _draw_row_of_seeds(axis: Axes, row: int, values: list[float], limit: float, seeds: Seeds, colour: str) -> bool:
    """Draws a row; returns whether there is text at its right."""
    states = [run.state for run in seeds.values()]
    said = [f"{states.count('diverged')} of {len(states)} diverged \N{MULTIPLICATION SIGN}"] * ("diverged" in states)
    said += ["unfinished"] * (not values and "unfinished" in states)
    if values and np.mean(values) > limit:
        said.append(f"{np.mean(values):.3g} \N{RIGHTWARDS ARROW}")
    elif values:
        axis.plot(values, [row] * len(values), "o", c=colour, ms=5, alpha=0.55, mew=0)
        axis.plot([np.mean(values)], [row], "|", c=colour, ms=12, mew=2.2)
        if len(values) > 2:
            axis.hlines(row, *t_interval(values), colour, lw=1.2)
    at = ("axes fraction", "data")
    axis.annotate(", ".join(said), (0.99, row), xycoords=at, ha="right", va="center", size=8.5, color=colour)
    return bool(said)


def _label_rows(axis: Axes, names: Sequence[str], reference: str, styles: dict[str, dict]) -> None:
    """The names beside the rows, each with a piece of its curve."""
    for row, name in enumerate(names):
        at = axis.get_yaxis_transform()
        width = 2.6 if name == reference else 1.7
        axis.plot([-0.085, -0.02], [row, row], transform=at, clip_on=False, **styles[name] | {"lw": width})
        weight = "bold" if name == reference else "normal"
        axis.text(-0.1, row, fill(name, LABEL), transform=at, ha="right", va="center", fontsize=9.5, fontweight=weight)


def _draw_mean(axis: Axes, runs: list[Run], metric: str, style: dict, band: bool = True) -> None:
    curves = [curve for run in runs if len(curve := points(run, metric))]
    if not curves:
        return
    table = pd.concat([pd.Series(curve[:, 1], curve[:, 0]) for curve in curves], axis=1).sort_index()
    epochs, low, high = table.index, table.min(axis=1), table.max(axis=1)
    axis.plot(epochs, table.mean(axis=1), marker="." if len(epochs) <= 15 else "", **{"lw": 1.6, **style})
    if len(curves) > 1 and band:
        axis.fill_between(epochs, low, high, color=style["color"], alpha=0.18, lw=0)


def _mark_end(axis: Axes, run: Run, curve: np.ndarray, high: float, colour: str) -> None:
    if run.state in END_MARKERS and run.last_epoch:
        x, y = curve[-1] if len(curve) else (run.last_epoch, math.inf)
        axis.plot(x, min(y, high), c=colour, clip_on=False, **END_MARKERS[run.state])


def _off(curves: Sequence[Curve], high: float) -> str:
    peak = max((curve[:, 1].max() for _, curve in curves if len(curve)), default=-1)
    return "nothing measured" * bool(curves) if peak < 0 else f"off the scale: up to {peak:.4g}" if peak > high else ""
