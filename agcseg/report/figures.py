"""The figures, as matplotlib figures that are yet to be saved."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, product
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
from agcseg.report import compare
from agcseg.report.claims import NOT_SUPPORTED, SUPPORTED, Verdict
from agcseg.report.compare import SCALE, Cells, Seeds, Settings, all_runs, measured, t_interval
from agcseg.report.read import NAMES, NORM_TITLES, Run

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
METRICS = {"pixel_error": "validation pixel error, %", "val_loss": "validation loss"}


def figure(groups: Settings, reference: str) -> Figure:
    """Pixel error (%) and loss of each setting: against the epoch (above), and at the epoch of the tables (below).

    A curve is the mean over the seeds; where there are few settings a band shows the smallest and the largest. Below,
    a dot is a seed and a bar the mean, with its 95 % interval from three seeds on. The rows are the legend. Where BN
    and AGC are compared at several minibatches or rates, each has a panel of its own, on the same scale.

    Args:
        groups: of `agcseg.report.compare.by_setting`.
        reference: the name of the setting that is drawn thicker.
    """
    styles, order, runs = setting_styles([*groups]), compare.by_error(groups), all_runs(groups)
    styles[reference]["lw"] = 2.6
    norms = sorted({run.norm for run in runs}, reverse=True)  # BN, as in the paper, first
    apart = not compare.of_settings(runs) and len(groups) > len(norms) > 1
    lines = max(fill(name, LABEL).count("\n") + 1 for name in order)
    above, below = [3.4] * (1 + apart), 0.75 + (0.07 + 0.16 * lines) * len(order)
    fig = Figure(figsize=(10, sum(above) + below), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    axes = fig.subplots(2 + apart, 2, height_ratios=[*above, below])
    for column, (metric, title) in enumerate(METRICS.items()):
        levels = commonest(runs) if metric == "pixel_error" else []
        scale = y_range(runs, metric, levels)
        for i, shown in enumerate([[norm] for norm in norms] if apart else [norms]):
            part = {name: groups[name] for name, run in compare.firsts(groups).items() if run.norm in shown}
            heading = f"{NORM_TITLES.get(shown[0], shown[0])}: {title}" if apart else title
            axis = axes[column, i] if apart else axes[0, column]
            _draw_curves(axis, part, metric, heading, scale, styles, len(part) <= 4)
            for level in levels:
                axis.axhline(level, color="0.6", ls=":", lw=1, zorder=1)
                if scale[0] < level < scale[1]:  # a text elsewhere would take the room of the axes
                    at: dict[str, Any] = {
                        "xy": (0.995, level),
                        "xycoords": ("axes fraction", "data"),
                        "ha": "right",
                        "va": "bottom",
                    }
                    axis.annotate("commonest class", **at, size=8, color="0.4", zorder=1)
        _draw_rows(axes[-1, column], groups, order, metric, styles)
    for row, name in enumerate(order):  # its name beside each row, with a piece of its curve
        at = axes[-1, 0].get_yaxis_transform()
        axes[-1, 0].plot([-0.085, -0.02], [row, row], transform=at, clip_on=False, **{"lw": 1.7, **styles[name]})
        weight = "bold" if name == reference else "normal"
        text = {"ha": "right", "va": "center", "fontsize": 9.5, "fontweight": weight}
        axes[-1, 0].text(-0.1, row, fill(name, LABEL), transform=at, **text)
    return fig


def _draw_curves(
    axis: Axes,
    groups: Mapping[Any, Seeds],
    metric: str,
    title: str,
    scale: tuple[float, float],
    styles: dict,
    band: bool,
) -> None:
    """A panel of curves: each setting's mean over the seeds that held and, if wanted, a band of their extremes; the
    others are thin lines of their own."""
    runs = all_runs(groups)
    for name, seeds in groups.items():
        style = {"lw": 1.5, **styles[name]}
        curves = pd.DataFrame({seed: points(run, metric) for seed, run in seeds.items() if run.held})
        curves = curves.dropna(axis=1, how="all")
        if curves.size:
            axis.plot(curves.mean(axis=1), marker="." if len(curves) <= 15 else "", **style)
        if curves.shape[1] > 1 and band:
            extremes = curves.min(axis=1), curves.max(axis=1)
            axis.fill_between(curves.index, *extremes, color=style["color"], alpha=0.18, lw=0)
        for i, run in enumerate(seeds.values()):
            curve = points(run, metric)
            if not run.held:
                named = not i and not any(run.held for run in seeds.values())
                axis.plot(curve, **style | {"lw": 0.9, "label": style.get("label") if named else ""})
            if run.state in END_MARKERS and run.last_epoch:
                x, y = (curve.index[-1], curve.iloc[-1]) if len(curve) else (run.last_epoch, math.inf)
                axis.plot(x, min(y, scale[1]), c=style["color"], clip_on=False, **END_MARKERS[run.state])
    axis.set(xlim=(0.5, max((run.epochs for run in runs), default=1) + 0.5), ylim=scale, xlabel="epoch")
    axis.set_title(title, loc="left", fontsize=10)
    peak = max((points(run, metric).max() for run in runs if len(points(run, metric))), default=-1)
    off = "nothing measured" * bool(runs) if peak < 0 else f"off the scale: up to {peak:.4g}" * bool(peak > scale[1])
    axis.annotate(off, (1, 1.02), xycoords="axes fraction", ha="right", va="bottom", size=8)
    axis.locator_params(axis="x", integer=True)
    axis.grid(alpha=0.25)


def _draw_rows(axis: Axes, groups: Settings, order: list[str], metric: str, styles: dict) -> None:
    """A row for each setting: its seeds, their mean and its interval at the epoch of the tables.

    Beyond a limit a mean is written, not drawn: one setting that fails must not squash all others into a corner."""
    values = measured(groups)["error, %" if metric == "pixel_error" else "loss"].dropna().groupby("setting")
    means, middle = values.mean(), values.mean().median()
    limit = middle + max(3 * (middle - means.min()), middle / 4)
    for row, name in enumerate(order):
        colour, states = styles[name]["color"], [run.state for run in groups[name].values()]
        said = [f"{states.count('diverged')} of {len(states)} diverged ×"] * ("diverged" in states)
        said += ["unfinished"] * (name not in means and "unfinished" in states)
        if name in means and means[name] > limit:
            said.append(f"{means[name]:.3g} →")
        elif name in means:
            of = values.get_group(name).tolist()
            axis.plot(of, [row] * len(of), "o", c=colour, ms=5, alpha=0.55, mew=0)
            axis.plot([means[name]], [row], "|", c=colour, ms=12, mew=2.2)
            if len(of) > 2:
                axis.hlines(row, *t_interval(of), colour, lw=1.2)
        at: dict[str, Any] = {"xy": (0.99, row), "xycoords": ("axes fraction", "data"), "ha": "right", "va": "center"}
        axis.annotate(", ".join(said), **at, size=8.5, color=colour)
    left, right = axis.get_xlim()
    axis.set_xlim(left, right + 0.35 * (right - left) * any(text.get_text() for text in axis.texts))  # room for it
    axis.set(ylim=(len(order) - 0.5, -0.5), yticks=range(len(order)), yticklabels=[])
    most = max(values.size(), default=0)
    what = METRICS[metric] if most < 2 else "seeds, mean, 95 % interval" if most > 2 else "seeds and mean"
    axis.set_title(f"epoch {compare.epoch_of(groups)}: {what}", loc="left", fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.grid(alpha=0.25)


def figure1(cells: Cells) -> Figure:
    """The eight panels of the paper's Figure 1, drawn for whatever of their runs is there.

    A line is the mean over the seeds that reached the epoch, a band their smallest and largest value; diverged runs are
    thin lines of their own that end in a cross. What the paper compares has one scale.
    """
    fig = Figure(figsize=(11, 15), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    axes = dict(zip((panel.letter for panel in PANELS), fig.subplots(4, 2).flat, strict=True))
    sizes = {run.size for run in all_runs(cells)}
    for letters in SAME_SCALE if len(sizes) < 2 else ("ab", "c", "d", "e", "f", "gh"):
        panels = [panel for panel in PANELS if panel.letter in letters]
        runs = all_runs({of: cells.get(of, {}) for panel in panels for of in panel.runs})
        scale = y_range(runs, panels[0].metric, reach=1.5)
        for panel in panels:
            _draw_panel(axes[panel.letter], panel, cells, scale)
    return fig


def _draw_panel(axis: Axes, panel: Panel, cells: Cells, scale: tuple[float, float]) -> None:
    there = {of: cells[of] for of in panel.runs if of in cells}
    looks = {of: STYLES[of.norm if panel.letter in "cdef" else of[2:]] for of in there}
    captions = {of: _caption(of, panel, all_runs({of: seeds})) for of, seeds in there.items()}
    styles = {of: {"color": looks[of][0], "ls": looks[of][1], "label": captions[of]} for of in there}
    _draw_curves(axis, there, panel.metric, fill(f"({panel.letter}) {panel.caption}", 56), scale, styles, True)
    axis.set_ylabel(METRICS[panel.metric])
    missing = [compare.label(of) for of in panel.runs if of not in cells]
    if missing:
        at: dict[str, Any] = {"xy": (0.02, 0.1), "ha": "left"} if there else {"xy": (0.5, 0.5), "ha": "center"}
        text = "\n".join(["no run of", *missing])
        axis.annotate(text, xycoords="axes fraction", color="0.35", fontsize=8, va="center", **at)
    if there:
        axis.legend(fontsize=8.5, framealpha=0.7, edgecolor="none", loc="upper right")
    else:
        axis.set(xticks=[], yticks=[])


def _caption(of: Setting, panel: Panel, seeds: list[Run]) -> str:
    """What a line of a panel is, what it ends at, and how many seeds it is made of."""
    what = {"ab": f"minibatch {of.minibatch}, rate {of.rate:g}", "cdef": NAMES[of.norm], "gh": f"rate {of.rate:g}"}
    text = next(words for letters, words in what.items() if panel.letter in letters)
    held = [run for run in seeds if run.held]
    ends = [curve.iloc[-1] for run in held if len(curve := points(run, panel.metric))]
    if ends:
        text += f": {np.mean(ends):.1f} %" if panel.metric == "pixel_error" else f": {np.mean(ends):.3f}"
    lasts = sorted({run.last_epoch for run in held if run.state == "unfinished"})
    text += f" at epoch {'/'.join(map(str, lasts))}" * bool(lasts) + f", {len(seeds)} seeds" * (len(seeds) > 1)
    return text + (f", {len(seeds) - len(held)} diverged" if held else ", diverged") * (len(held) < len(seeds))


def lambda_figure(runs: list[Run]) -> Figure | None:
    """λ against the depth at the last epoch (left) and the mean λ of each layer over the epochs (right).

    Args:
        runs: with `layers`; each has a row of its own, its layers from the image at the top to the classes.
    """
    if not runs:
        return None
    heights = [1.2 + 0.19 * len(run.lambda_means.columns) for run in runs]
    fig = Figure(figsize=(11, sum(heights)), dpi=120, layout="constrained")
    rows = fig.subfigures(len(runs), 1, squeeze=False, height_ratios=heights).flat
    for part, run in zip(rows, runs, strict=True):
        last, means = run.layers.iloc[-1], run.lambda_means
        norm = NAMES.get(run.norm, run.norm)
        where = f"{run.title}: {norm}, minibatch {run.minibatch}, rate {run.rate:.4g}, seed {run.seed}"
        part.suptitle(where, x=0.02, ha="left", fontsize=11, fontweight="bold")
        left, right = part.subplots(1, 2, sharey=True)
        (names, roles), depth = zip(*means.columns, strict=True), np.arange(means.shape[1])
        colours = [ROLES.get(role, "0.4") for role in roles]
        left.hlines(depth, last["lambda_q05"], last["lambda_q95"], colours, lw=1)
        left.hlines(depth, last["lambda_q25"], last["lambda_q75"], colours, lw=4, alpha=0.5)
        left.scatter(last["lambda_mean"], depth, c=colours, s=22, zorder=3)
        for level in (0, 1, 2):
            left.axvline(level, color="0.5", ls="--" if level == 1 else ":", lw=1, zorder=0)
        left.set_yticks(depth, names, fontsize=7.5)
        left.set_ylim(len(depth) - 0.5, -0.5)
        left.set_xlabel("λ: mean (dot), 25 to 75 % (thick) and 5 to 95 % of the filters (thin)", fontsize=9)
        left.set_title(f"at epoch {means.index[-1]}", fontsize=10)
        left.grid(axis="x", alpha=0.25)
        seen = [Line2D([], [], color=ROLES[role], lw=3, label=role) for role in ROLES if role in roles]
        left.legend(handles=seen, fontsize=8, loc="best")
        far = abs(means.to_numpy() - 1)  # infinite where a run diverged
        away = max(0.05, math.ceil(20 * far[np.isfinite(far)].max(initial=0)) / 20)
        edges = np.r_[means.index - 0.5, means.index[-1] + 0.5], np.arange(len(depth) + 1) - 0.5
        mesh = right.pcolormesh(*edges, means.T, cmap="PuOr", vmin=1 - away, vmax=1 + away, rasterized=True)
        right.set(xlabel="epoch (0: before training)", xlim=edges[0][[0, -1]])
        right.locator_params(axis="x", integer=True)
        right.set_title("mean λ over the epochs", fontsize=10)
        part.colorbar(mesh, ax=right, label="mean λ")
    return fig


def lambda_starts_figure(groups: Settings, names: Sequence[str]) -> Figure:
    """Mean λ of each layer, in the order of execution, before training and at the end: does it remember its start?

    A line is the mean over the seeds, a band their smallest and largest value; dotted: before training.

    Args:
        groups: of `agcseg.report.page.lambda_starts`.
        names: of all settings of the report, which decide the colours.
    """
    fig = Figure(figsize=(10, 5), dpi=120, layout="constrained")
    axis, (layers, roles) = fig.subplots(), zip(*all_runs(groups)[0].lambda_means.columns, strict=True)
    depth = np.arange(len(roles))
    for name, seeds in groups.items():
        runs, style = [*seeds.values()], setting_styles(names)[name]
        means = np.array([run.lambda_means.iloc[[0, -1]] for run in runs])  # (seeds, 2, layers)
        lasts = "/".join(map(str, sorted({run.layers.index[-1] for run in runs})))
        text = f"{name}, epoch {lasts}" + f", {len(runs)} seeds" * (len(runs) > 1)
        axis.plot(depth, means[:, 0].mean(0), color=style["color"], ls=":", lw=1.3)
        axis.plot(depth, means[:, 1].mean(0), **style, marker=".", lw=1.7, label=text)
        axis.fill_between(depth, means[:, 1].min(0), means[:, 1].max(0), color=style["color"], alpha=0.18, lw=0)
    for change in [i for i in depth[1:] if roles[i] != roles[i - 1]]:
        axis.axvline(change - 0.5, color="0.75", lw=1, zorder=0)
    axis.plot([], [], color="0.3", ls=":", label="before training")
    axis.set(xlim=(-0.5, len(depth) - 0.5), ylabel="mean λ of the layer")
    axis.set_xticks(depth, layers, rotation=90, fontsize=8)
    axis.grid(axis="y", alpha=0.25)
    handles, texts = axis.get_legend_handles_labels()
    columns = max(1, min(4, 140 // (max(map(len, texts)) + 7)))  # as many as the width takes
    fig.legend(handles, texts, loc="outside upper left", ncols=columns, fontsize=9, frameon=False)
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
        ends = np.array([part.estimate.value, *part.interval, *part.band])
        known = ends[np.isfinite(ends)]
        away = 0.25 * np.ptp(known) or abs(known[0]) or 1
        value, *interval, left, right = np.clip((ends - known.min() + away) / (np.ptp(known) + 2 * away), 0, 1)
        axis.barh(row, right - left, left=left, height=0.36, color="0.88", zorder=0)
        for end, x in zip(part.band, (left, right), strict=True):
            if math.isfinite(end):
                axis.text(x, row + 0.32, f"{end:{part.form}}", size=6, color="0.45", ha="center", va="center")
        colour = VERDICTS.get(part.leaning, "0.35")
        axis.plot(interval, [row, row], color=colour, lw=2, solid_capstyle="butt")
        marker = "o" if math.isfinite(ends[0]) else ">" if ends[0] > 0 else "<"
        face = colour if part.verdict == part.leaning else "white"
        axis.plot(value, row, marker, color=colour, mfc=face, ms=6, clip_on=False, zorder=3)
        axis.text(0, row - 0.36, f"{answer.number}  {part.what}", size=7, va="center")
        axis.text(1, row - 0.36, f"{ends[0]:{part.form}}", size=7, color=colour, va="center", ha="right")
    axis.set(xlim=(0, 1), ylim=(len(parts) - 0.6, -0.6), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    return fig


def predictions(groups: Settings, most: int = 12) -> tuple[Image.Image | None, list[str]]:
    """The first validation image as each setting's first seed predicts it, and a line for each picture that is broken.

    None where no run has stored its predictions.
    """
    scenes: dict[str, Image.Image] = {}
    broken: list[str] = []
    columns = 4
    for name, run in [(name, run) for name, seeds in groups.items() for run in seeds.values()]:
        file = run.path / "predictions.png"
        if name in scenes or len(scenes) == most or not file.is_file():
            continue
        try:
            with Image.open(file) as picture:
                columns = max(4, picture.width // (run.size[1] + 2))  # each in its frame; a contour is the fifth
                height = min(picture.height, round(picture.width / columns * run.size[0] / run.size[1]))
                scene = picture.convert("RGB").crop((0, 0, picture.width, height))
                scenes[name] = scene.resize((1200, round(1200 * height / picture.width)))
        except (OSError, SyntaxError, ValueError) as error:
            broken.append(f"{file}: {error}")
    if not scenes:
        return None, broken
    page = Image.new("RGB", (1200, 36 + sum(scene.height + 30 for scene in scenes.values())), "white")
    draw, y = ImageDraw.Draw(page), 34
    for i, text in enumerate(("image", "prediction", "truth", "wrong pixels", "contour")[:columns]):
        draw.text((1200 * i // columns + 4, 8), text, fill="gray", font=ImageFont.load_default(17))
    for name, scene in scenes.items():
        draw.text((4, y + 2), name, fill="black", font=ImageFont.load_default(19))
        page.paste(scene, (0, y + 28))
        y += scene.height + 30
    return page, broken


def commonest(runs: list[Run]) -> list[float]:
    """What always naming the commonest class errs on, %; of several data sets several."""
    return sorted({round(100 * run.commonest_class_error, 1) for run in runs if run.commonest_class_error >= 0})


def setting_styles(names: Sequence[str]) -> dict[str, dict]:
    """Colour and dashes of each setting: of a norm always the same, else by its place among the names."""
    norms = [NAMES.get(norm, norm) for norm in NORM_TITLES]
    of_norms = 2 * len({*names} & {*norms}) > len(names)
    looks = zip(dict.fromkeys([*norms * of_norms, *names]), cycle(product(LINESTYLES, COLOURS)))
    return {name: {"color": colour, "ls": dashes} for name, (dashes, colour) in looks if name in names}


def points(run: Run, metric: str) -> pd.Series:
    """The finite values of a metric by epoch, `SCALE` times."""
    values = SCALE.get(metric, 1) * run.column(metric)
    return values[np.isfinite(values)]


def y_range(runs: list[Run], metric: str, levels: Sequence[float] = (), reach: float = 3) -> tuple[float, float]:
    """The scale: made for the better 70 % of each run that held; it reaches further, but not as far as a spike.

    Args:
        levels: values to be shown if they are near.
        reach: how much further at most, times what the better 70 % span.
    """
    curves = {run.name: points(run, metric) for run in runs if len(points(run, metric))}
    values = np.concatenate([*curves.values()] or [np.ones(1)])
    steady = [curves[run.name] for run in runs if run.name in curves and run.held] or [values]
    low, usual = values.min(), max(np.percentile(of, 70, method="nearest") for of in steady)
    near = values[values <= usual + reach * (usual - low)].max()
    high = max([near, *(level for level in levels if level <= 2 * usual)])
    margin = 0.06 * (high - low) or 0.1 * high
    return float(max(0, low - margin)), float(high + margin)
