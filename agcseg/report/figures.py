"""The figures, as matplotlib figures that are yet to be saved."""

import math
from collections.abc import Sequence
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageDraw, ImageFont, ImageOps

from agcseg.figure1 import PANELS, Panel, Setting
from agcseg.report.compare import Cells, Seeds, label
from agcseg.report.read import NAMES, NORMS, SHORT, Run
from agcseg.report.settings import Settings, by_error, epoch_of, held, shared
from agcseg.report.statistics import t_interval

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # safe for the colour-blind
LINESTYLES = ("-", (0, (4, 1.5)), (0, (1, 1)), "-.")
END_MARKERS = {"diverged": {"marker": "x", "ms": 9, "mew": 2}, "unfinished": {"marker": "o", "ms": 7, "mfc": "white"}}
STYLES = {  # of Figure 1: minibatch and rate of the panels that compare these, norm of the others
    (1, 0.02): ("#E69F00", "-"), (4, 0.08): ("#009E73", (0, (5, 1))), (8, 0.16): ("#CC79A7", "-"),
    (8, 0.08): ("#56B4E9", (0, (5, 1))), (8, 0.32): ("#000000", (0, (2, 1))), (8, 0.64): ("#D55E00", "-."),
    "bn": ("#D55E00", "-"), "agc": ("#0072B2", (0, (5, 1))),
}  # fmt: skip
SAME_SCALE = ("ab", "cd", "e", "f", "gh")  # panels that the paper compares; ClassNet's loss has one part more
ROLES = {"encoder": "#0072B2", "lateral": "#009E73", "decoder": "#D55E00", "head": "#000000"}
LABEL = 32  # letters in a line of a setting's name
TITLE = 150  # letters in a line of what settings share

Curve = tuple[Run, np.ndarray]  # a run and its points (n, 2), finite ones only


def figure(runs: list[Run]) -> Figure:
    """Pixel error (%) and loss against the epoch: a column per normalisation, two rows per `Run.title`."""
    norms = sorted({run.norm for run in runs}, key=lambda norm: ([*NORMS, norm].index(norm), norm))
    colours = dict(zip(sorted({run.minibatch for run in runs}), COLOURS * len(runs), strict=False))
    groups = {run.title: [r for r in runs if r.title == run.title] for run in runs}
    fig = Figure(figsize=(3.6 * max(2, len(norms)) + 2.6, 5.8 * len(groups)), dpi=120, layout="constrained")
    fig.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    for part, (title, group) in zip(fig.subfigures(len(groups), 1, squeeze=False).flat, groups.items(), strict=True):
        styles = _line_styles(group, colours)
        commonest = sorted({round(100 * r.commonest_class_error, 1) for r in group if r.commonest_class_error >= 0})
        part.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
        axes = part.subplots(2, len(norms), sharex=True, sharey="row", squeeze=False)
        axes[0, 0].set(ylabel="validation pixel error, %", xlim=(0.5, group[0].epochs + 0.5))
        axes[0, 0].locator_params(axis="x", integer=True)
        axes[1, 0].set_ylabel("validation loss")
        for norm, (top, bottom) in zip(norms, axes.T, strict=True):
            top.set_title(NORMS.get(norm, norm), loc="left", fontsize=11)
            bottom.set_xlabel("epoch")
        high = _draw_row(axes[0], norms, group, styles, "pixel_error", commonest)
        _draw_row(axes[1], norms, group, styles, "val_loss", [])
        legend = [Line2D([], [], **style) for style in {s["label"]: s for s in styles.values()}.values()]
        names = [f"commonest class: {error} %" + "\n(off the scale)" * (error > high) for error in commonest]
        legend += [Line2D([], [], color="0.5", ls="--", lw=1, label=name) for name in names]
        ends = {run.state: END_MARKERS[run.state] for run in group if run.state in END_MARKERS}
        legend += [Line2D([], [], color="0.3", ls="", label=state, **marker) for state, marker in ends.items()]
        part.legend(handles=legend, loc="outside right upper", fontsize=9, frameon=False)
    return fig


def figure1(cells: Cells) -> Figure:
    """The eight panels of the paper's Figure 1, drawn for whatever of their runs is there.

    A line is the mean over the seeds that reached the epoch, a band their smallest and largest value; diverged runs are
    thin lines of their own that end in a cross. What the paper compares has one scale.
    """
    fig = Figure(figsize=(11, 15), dpi=120, layout="constrained")
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    axes = dict(zip((panel.letter for panel in PANELS), fig.subplots(4, 2).flat, strict=True))
    sizes = {run.size for seeds in cells.values() for run in seeds.values()}
    for letters in SAME_SCALE if len(sizes) < 2 else ("ab", "c", "d", "e", "f", "gh"):
        panels = [panel for panel in PANELS if panel.letter in letters]
        runs = [run for p in panels for of in p.runs for run in cells.get(of, {}).values()]
        low, high = y_range([(run, points(run, panels[0].metric)) for run in runs], reach=1.5)
        for panel in panels:
            _draw_panel(axes[panel.letter], panel, cells, high)
            axes[panel.letter].set_ylim(low, high)
    titles = dict.fromkeys(run.title for seeds in cells.values() for run in seeds.values())
    note = "line: mean over seeds, band: smallest to largest; cross: diverged, circle: unfinished"
    fig.suptitle("\n".join([*titles, note]), fontsize=10)
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


def settings_figure(groups: Settings, reference: str) -> Figure:
    """Pixel error (%) and loss of each setting: against the epoch (above), and at the epoch of the tables (below).

    A curve is the mean over the seeds; where there are few settings a band shows the smallest and the largest. Below,
    a dot is a seed and a bar the mean, with its 95 % interval from three seeds on. The rows are the legend.

    Args:
        groups: of `agcseg.report.settings.by_setting`.
        reference: the name of the setting that is drawn thicker.
    """
    epoch, styles = epoch_of(groups), setting_styles([*groups])
    order = by_error(groups, epoch)
    runs = [run for seeds in groups.values() for run in seeds.values()]
    lines = max(fill(name, LABEL).count("\n") + 1 for name in order)
    above, below = 4.1, 0.75 + (0.07 + 0.16 * lines) * len(order)
    fig = Figure(figsize=(10, above + below), dpi=120, layout="constrained")
    fig.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    fig.suptitle(fill(shared(runs), TITLE), x=0.02, ha="left", fontsize=9, color="0.35")
    axes = fig.subplots(2, 2, height_ratios=(above, below))
    commonest = {round(100 * run.commonest_class_error, 1) for run in runs if run.commonest_class_error >= 0}
    measures = (("pixel_error", "validation pixel error, %", sorted(commonest)), ("val_loss", "validation loss", []))
    for (curves, rows), (metric, title, levels) in zip(axes.T, measures, strict=True):
        drawn = [(run, points(run, metric)) for run in runs]
        low, high = y_range(drawn, levels)
        for level in levels:
            curves.axhline(level, color="0.6", ls=":", lw=1)
            if low < level < high:  # a text elsewhere would take the room of the axes
                at = {"xy": (0.995, level), "xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
                curves.annotate("commonest class", **at, size=8, color="0.4", zorder=1)
        for name, seeds in groups.items():
            width = 2.6 if name == reference else 1.5
            _draw_setting(curves, [*seeds.values()], metric, high, {**styles[name], "lw": width}, len(groups) <= 4)
        curves.set(xlim=(0.5, max(run.epochs for run in runs) + 0.5), ylim=(low, high), xlabel="epoch")
        curves.set_title(title, loc="left", fontsize=10)
        curves.annotate(_off(drawn, high), (1, 1.02), xycoords="axes fraction", ha="right", va="bottom", size=8)
        curves.locator_params(axis="x", integer=True)
        curves.grid(alpha=0.25)
        values = {name: _values_at(groups[name], metric, epoch) for name in order}
        limit = _usual_limit([np.mean(of) for of in values.values() if of])
        texts = [
            _draw_row_of_seeds(rows, row, values[name], limit, groups[name], styles[name]["color"])
            for row, name in enumerate(order)
        ]
        left, right = rows.get_xlim()
        rows.set_xlim(left, right + 0.35 * (right - left) * any(texts))  # room for the text
        rows.set(ylim=(len(order) - 0.5, -0.5), yticks=range(len(order)), yticklabels=[])
        what = "seeds, mean, 95 % interval" if any(len(of) > 2 for of in values.values()) else "seeds and mean"
        rows.set_title(f"epoch {epoch}: {what}", loc="left", fontsize=9)
        rows.tick_params(axis="y", length=0)
        rows.grid(alpha=0.25)
    _label_rows(axes[1, 0], order, reference, styles)
    return fig


def setting_styles(names: Sequence[str]) -> dict[str, dict]:
    """Colour and dashes of each setting: of a norm always the same, else by its place among the names."""
    norms = [SHORT.get(norm, norm) for norm in NORMS]
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
        groups: of `agcseg.report.settings.lambda_starts`.
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


def strip(run: Run) -> np.ndarray:
    """The first row of a run's predictions.png under a caption: (height, 1200, 3) uint8.

    Raises:
        OSError, SyntaxError: the picture cannot be read.
    """
    with Image.open(run.path / "predictions.png") as picture:
        panels = max(4, picture.width // (run.size[1] + 2))  # side by side, each in its frame; a contour is the fifth
        height = min(picture.height, round(picture.width / panels * run.size[0] / run.size[1]))
        scene = ImageOps.contain(picture.convert("RGB").crop((0, 0, picture.width, height)), (1200, 1200))
    page = ImageOps.expand(scene, (0, 36, 0, 0), "white")
    text = f"{run.name}, {run.state}: image, prediction, truth and wrong pixels" + ", contour" * (panels > 4)
    ImageDraw.Draw(page).text((8, 8), text, fill="black", font=ImageFont.load_default(18))
    return np.asarray(page)


def points(run: Run, metric: str) -> np.ndarray:
    """(n, 2): epoch and value where it is finite; errors in %."""
    scale = 100 if metric == "pixel_error" else 1
    values = zip(run.column("epoch"), run.column(metric), strict=True)
    return np.array([(epoch, scale * value) for epoch, value in values if math.isfinite(value)]).reshape(-1, 2)


def y_range(curves: Sequence[Curve], levels: Sequence[float] = (), reach: float = 3) -> tuple[float, float]:
    """The scale: made for the better 70 % of each run that held; it reaches further, but not as far as a spike.

    Args:
        levels: values to be shown if they are near.
        reach: how much further at most, times what the better 70 % span.
    """
    there = [curve[:, 1] for _, curve in curves if len(curve)]
    values = np.concatenate(there or [np.ones(1)])
    steady = [curve[:, 1] for run, curve in curves if len(curve) and run.state != "diverged"] or [values]
    low, usual = values.min(), max(np.percentile(v, 70, method="nearest") for v in steady)
    high = max(
        [values[values <= usual + reach * (usual - low)].max(), *(level for level in levels if level <= 2 * usual)]
    )
    margin = 0.06 * (high - low) or 0.1 * high
    return float(max(0, low - margin)), float(high + margin)


def _line_styles(group: list[Run], colours: dict[int, str]) -> dict[str, dict]:
    styles = {}
    for run in sorted(group, key=lambda run: (run.minibatch, run.rate)):  # the order of the legend
        same = [r for r in group if (r.norm, r.minibatch, r.rate) == (run.norm, run.minibatch, run.rate)]
        twins = [r.name for r in same if r.seed == run.seed]  # these differ in something that only the name can tell
        rates = sorted({r.rate for r in group if r.minibatch == run.minibatch})
        text = f"minibatch {run.minibatch}, rate {run.rate:.4g}" + ", each seed" * (len(same) > len(twins))
        styles[run.name] = {
            "label": text + f"\n({run.name})" * (len(twins) > 1), "color": colours[run.minibatch],
            "lw": 0.9 if len(same) > len(twins) else 1.7,
            "ls": LINESTYLES[(rates.index(run.rate) + twins.index(run.name)) % len(LINESTYLES)],
        }  # fmt: skip
    return styles


def _draw_row(axes, norms: list[str], group: list[Run], styles: dict, metric: str, levels: list) -> float:
    curves = [(run, points(run, metric)) for run in group]
    low, high = y_range(curves, levels)
    for axis, norm in zip(axes, norms, strict=True):
        panel = [(run, curve) for run, curve in curves if run.norm == norm]
        for run, curve in panel:
            (line,) = axis.plot(*curve.T, marker="." if len(curve) <= 15 else "", **styles[run.name])
            _mark_end(axis, run, curve, high, line.get_color())
        axis.annotate(_off(panel, high), (1, 1.02), xycoords="axes fraction", ha="right", va="bottom", size=8)
        for level in levels:
            axis.axhline(level, color="0.5", ls="--", lw=1)
        axis.grid(alpha=0.25)
        axis.set_ylim(low, high)
    return high


def _draw_panel(axis: Axes, panel: Panel, cells: Cells, high: float) -> None:
    is_error = panel.metric == "pixel_error"
    axis.set_title(fill(f"({panel.letter}) {panel.caption}", 76), loc="left", fontsize=9)
    axis.set(xlabel="epoch", ylabel="validation pixel error, %" if is_error else "validation loss")
    axis.grid(alpha=0.25)
    curves: list[Curve] = []
    for of in panel.runs:
        seeds = [*cells.get(of, {}).values()]
        colour, line = STYLES[of.norm if panel.letter in "cdef" else of[2:]]
        curves += [(run, points(run, panel.metric)) for run in seeds]
        held = [run for run in seeds if run.state != "diverged"]
        _draw_mean(axis, held, panel.metric, {"color": colour, "ls": line, "label": _caption(of, panel, seeds)})
        for run, curve in curves[len(curves) - len(seeds) :]:
            if run.state == "diverged":
                only = {"label": _caption(of, panel, seeds)} if not held and run is seeds[0] else {}
                axis.plot(*curve.T, color=colour, ls=line, lw=0.8, **only)
            _mark_end(axis, run, curve, high, colour)
    missing = [of for of in panel.runs if of not in cells]
    if missing:
        text = "no run of\n" + "\n".join(map(label, missing))
        middle = len(missing) == len(panel.runs)
        at = {"xy": (0.5, 0.5), "ha": "center", "va": "center"} if middle else {"xy": (0.02, 0.03), "va": "bottom"}
        axis.annotate(text, xycoords="axes fraction", color="0.35", fontsize=10 if middle else 8, **at)
    if curves:
        axis.set_xlim(0.5, max(run.epochs for run, _ in curves) + 0.5)
        axis.plot([], [], ls="", label=_off(curves, high))  # a line of the legend; none if empty
        axis.legend(fontsize=8.5, framealpha=0.7, edgecolor="none", loc="upper right")
        axis.locator_params(axis="x", integer=True)
    else:
        axis.set(xticks=[], yticks=[])


def _caption(of: Setting, panel: Panel, seeds: list[Run]) -> str:
    """What a line of a panel is, what it ends at, and how many seeds it is made of."""
    what = {
        "a": f"minibatch {of.minibatch}, rate {of.rate:g}", "b": f"minibatch {of.minibatch}, rate {of.rate:g}",
        "g": f"rate {of.rate:g}", "h": f"rate {of.rate:g}",
    }.get(panel.letter, NAMES[of.norm])  # fmt: skip
    held = [run for run in seeds if run.state != "diverged"]
    ends = [curve[-1, 1] for run in held if len(curve := points(run, panel.metric))]
    form = ".1f" if panel.metric == "pixel_error" else ".3f"
    end = f": {np.mean(ends):{form}}" + " %" * (panel.metric == "pixel_error") if ends else ""
    lasts = sorted({run.last_epoch for run in held if run.state == "unfinished"})
    until = f" at epoch {'/'.join(map(str, lasts))}" if lasts else ""
    count = f", {len(seeds)} seeds" if len(seeds) > 1 else ""
    diverged = f", {len(seeds) - len(held)} diverged" if held else ", diverged"
    return what + end + until + count + diverged * (len(held) < len(seeds))


def _draw_setting(axis: Axes, runs: list[Run], metric: str, high: float, style: dict, band: bool) -> None:
    _draw_mean(axis, [run for run in runs if run.state != "diverged"], metric, style, band)
    for run in runs:
        curve = points(run, metric)
        if run.state == "diverged":
            axis.plot(*curve.T, **style | {"lw": 0.9})
        _mark_end(axis, run, curve, high, style["color"])


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
    at = {"xy": (0.99, row), "xycoords": ("axes fraction", "data"), "ha": "right", "va": "center"}
    axis.annotate(", ".join(said), **at, size=8.5, color=colour)
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
    epochs = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    values = np.full((len(curves), len(epochs)), np.nan)
    for row, curve in zip(values, curves, strict=True):
        row[np.searchsorted(epochs, curve[:, 0])] = curve[:, 1]
    axis.plot(epochs, np.nanmean(values, 0), marker="." if len(epochs) <= 15 else "", **{"lw": 1.6, **style})
    if len(curves) > 1 and band:
        axis.fill_between(epochs, np.nanmin(values, 0), np.nanmax(values, 0), color=style["color"], alpha=0.18, lw=0)


def _mark_end(axis: Axes, run: Run, curve: np.ndarray, high: float, colour: str) -> None:
    if run.state in END_MARKERS and run.last_epoch:
        x, y = curve[-1] if len(curve) else (run.last_epoch, math.inf)
        axis.plot(x, min(y, high), c=colour, clip_on=False, **END_MARKERS[run.state])


def _off(curves: Sequence[Curve], high: float) -> str:
    peak = max((curve[:, 1].max() for _, curve in curves if len(curve)), default=-1)
    return "nothing measured" if peak < 0 else f"off the scale: up to {peak:.4g}" if peak > high else ""
