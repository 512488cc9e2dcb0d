"""Reads the runs of one folder and draws them: a figure, a table, and the runs' predictions under each other.

Errors are fractions in [0, 1] in code and in report.csv, and % wherever people read them."""

import csv
import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image, ImageDraw, ImageFont, ImageOps
from yaml import YAMLError

from agcseg.errors import UserError

NORMS = {"bn": "Batch normalisation", "agc": "AGC", "none": "No normalisation", "group": "Group normalisation",
         "layer": "Layer normalisation", "instance": "Instance normalisation",
         "center": "AGC, λ fixed", "agc_std": "AGC by deviation", "mean_only": "Mean-only batch norm.",
         "frn": "Filter response norm.", "ws": "Weight standardisation"}  # fmt: skip
NAMES = {"segnet": "SegNet", "classnet": "ClassNet", "cityscapes": "Cityscapes", "camvid": "CamVid"}
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # safe for the colour-blind
LINESTYLES = ("-", (0, (4, 1.5)), (0, (1, 1)), "-.")
END_MARKERS = {"diverged": {"marker": "x", "ms": 9, "mew": 2}, "unfinished": {"marker": "o", "ms": 7, "mfc": "white"}}
COLUMNS = """epoch samples rate train_loss val_loss pixel_error pixel_error_all miou gradient_norm images_per_second
seconds peak_memory_mib""".split()
TABLE = (  # what is shown: key of `summarise`, heading, format
    ("run", "run", ""), ("network", "network", ""), ("width", "width", "g"), ("data", "data", ""), ("size", "size", ""),
    ("norm", "norm", ""), ("minibatch", "minibatch", ""), ("rate", "rate", ".4g"), ("seed", "seed", ""),
    ("epochs", "epochs", ""), ("state", "state", ""), ("final_error", "error", ".2%"),
    ("mean_error_last5", "last 5", ".2%"), ("best_error", "best", ".2%"), ("best_epoch", "at", ""),
    ("error_all_pixels", "all px", ".2%"), ("miou", "mIoU", ".2%"), ("val_loss", "loss", ".3f"),
    ("commonest_class_error", "commonest class", ".2%"), ("minutes", "min", ".1f"),
    ("images_per_second", "img/s", ".1f"), ("peak_memory_mib", "MiB", ".0f"),
)  # fmt: skip
EXPLAINED = """error, mIoU, loss: validation, last epoch; last 5: mean error, last five epochs; best: smallest error
and its epoch; all px: error over all pixels; commonest class: error of naming it always; img/s: median."""


@dataclass
class Run:
    """One run: how it was set up, how it ended, and its metrics."""

    name: str
    path: Path
    network: str
    width: float | None
    norm: str
    minibatch: int
    rate: float  # the effective one: agcseg.config.rate
    seed: int | None
    epochs: int  # asked for
    data: str
    size: tuple[int, int]  # height, width
    state: str  # "finished", "diverged" or "unfinished"
    reason: str
    commonest_class_error: float
    rows: dict[str, list[float]]  # known column of metrics.csv -> one number per row, nan where the cell is empty

    @property
    def title(self) -> str:
        """What the runs of one panel have in common, such as "SegNet, width 0.25, streets 64x128, 10 epochs"."""
        network = NAMES.get(self.network, self.network) + ("" if self.width is None else f", width {self.width:g}")
        return f"{network}, {NAMES.get(self.data, self.data)} {self.size[0]}x{self.size[1]}, {self.epochs} epochs"

    def column(self, key: str) -> list[float]:
        """One column of metrics.csv from epoch 1 on; nan where nothing was measured."""
        values = self.rows.get(key, [math.nan] * len(self.rows["epoch"]))
        return [value for epoch, value in zip(self.rows["epoch"], values, strict=True) if epoch >= 1]


def read_runs(folder: str | Path) -> list[Run]:
    """The readable runs of a folder, ordered by network, normalisation, minibatch, rate and seed. See `read_folder`."""
    return read_folder(folder)[0]


def read_folder(folder: str | Path) -> tuple[list[Run], list[str], list[str]]:
    """The runs of a folder, a line for each broken file (its run is left out), and a line for each half-written run.

    Raises UserError if the folder is missing or holds no run that can be read.
    """
    folder, advice = Path(folder), "make runs with: agcseg-train -m experiment=demo"
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; expected a folder of runs, such as outputs/demo; {advice}")
    runs, broken, notes = [], [], []
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        missing = [name for name in ("config.yaml", "metrics.csv") if not (path / name).is_file()]
        try:
            if len(missing) == 1:
                notes.append(f"{path.name} is left out: it has no {missing[0]} (perhaps it has just begun)")
            elif not missing:
                runs.append(_read_run(path))
        except UserError as error:
            broken.append(str(error))
    if not runs:
        advice = "this is a single run: give its parent folder" if (folder / "metrics.csv").is_file() else advice
        found = f"no run to report in {folder}: looked for {folder / 'RUN'}/config.yaml and metrics.csv"
        raise UserError("; ".join([found, *broken, *notes, advice]))
    runs.sort(key=lambda r: (r.title, [*NORMS, r.norm].index(r.norm), r.norm, r.minibatch, r.rate, r.seed or 0, r.name))
    return runs, broken, notes


def _read_run(path: Path) -> Run:
    def get(key: str, kind: type, needed: bool = True):
        value = OmegaConf.select(config, key)
        if value is None and needed:
            raise ValueError(f"{key} is missing")
        return None if value is None else kind(value)

    file, result = path / "result.json", {"state": "unfinished"}
    try:
        if file.is_file():
            result = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(result, dict) or result.get("state") not in ("finished", "diverged"):
                raise ValueError('"state" is neither "finished" nor "diverged"')
        commonest = result.get("commonest_class_error")
        file = path / "metrics.csv"
        rows = _read_metrics(file)
        file = path / "config.yaml"
        config = OmegaConf.load(file)
        minibatch, rate, (height, width) = get("minibatch", int), get("lr.value", float, False), get("data.size", list)
        if rate is None:  # agcseg.config.rate, without importing torch for it
            rate = get("lr.base", float) * minibatch * minibatch / (get("momentum_match", int, False) or minibatch)
        return Run(
            name=path.name, path=path, network=get("network.name", str), width=get("network.width", float, False),
            norm=get("norm.name", str), minibatch=minibatch, seed=get("seed", int, False), epochs=get("epochs", int),
            rate=rate, data=get("data.name", str),
            size=(int(height), int(width)), state=result["state"], reason=str(result.get("reason") or ""),
            rows=rows, commonest_class_error=math.nan if commonest is None else float(commonest),
        )  # fmt: skip
    except (OSError, ValueError, TypeError, csv.Error, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error


def _read_metrics(file: Path) -> dict[str, list[float]]:
    header, *lines = [*csv.reader(file.read_text(encoding="utf-8").splitlines())] or [[]]
    if not {"epoch", "pixel_error", "val_loss"} <= {*header}:
        raise ValueError("expected at least the columns epoch, pixel_error and val_loss")
    known = [column for column in header if column in COLUMNS or column.startswith("iou/")]
    rows: list[dict[str, float]] = []
    for number, cells in enumerate(lines, start=2):
        try:
            texts = dict(zip(header, cells, strict=True))
            row = {column: float(texts[column].strip() or "nan") for column in known}
            row["epoch"] = int(row["epoch"])
        except (ValueError, OverflowError) as error:
            raise ValueError(f"line {number}: {error}; expected {len(header)} cells of numbers") from None
        rows = [r for r in rows if r["epoch"] < row["epoch"]] + [row]  # a resumed run goes through some epochs again
    return {column: [row[column] for row in rows] for column in known}


def summarise(run: Run) -> dict:
    """One row of the table: settings, and what the run reached on the validation images.

    Errors and mIoU are fractions, what was not measured is None; epoch 0, the untrained network, counts nowhere.
    """
    epochs, errors = run.column("epoch"), run.column("pixel_error")
    last = {key: (run.column(key) or [math.nan])[-1] for key in COLUMNS}
    finite = {key: [v for v in run.column(key) if math.isfinite(v)] or [math.nan] for key in COLUMNS}
    best = min(finite["pixel_error"])
    row = {
        "run": run.name, "network": run.network, "width": run.width, "data": run.data,
        "size": f"{run.size[0]}x{run.size[1]}", "norm": run.norm, "minibatch": run.minibatch, "rate": run.rate,
        "seed": run.seed, "epochs": int(max(epochs, default=0)), "epochs_planned": run.epochs, "state": run.state,
        "final_error": last["pixel_error"],
        "mean_error_last5": float(np.mean([e for e in errors[-5:] if math.isfinite(e)] or math.nan)),
        "best_error": best, "best_epoch": int(epochs[errors.index(best)]) if math.isfinite(best) else None,
        "error_all_pixels": last["pixel_error_all"], "miou": last["miou"], "val_loss": last["val_loss"],
        "commonest_class_error": run.commonest_class_error, "peak_memory_mib": max(finite["peak_memory_mib"]),
        "images_per_second": float(np.median(finite["images_per_second"])), "minutes": last["seconds"] / 60,
    }  # fmt: skip
    return {key: None if value != value else value for key, value in row.items()}


def figure(runs: list[Run], path: str | Path) -> None:
    """Draws pixel error (%) and loss against the epoch: a column per normalisation, two rows per `Run.title`; PNG."""
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
        high = _draw_row(axes[0], norms, group, styles, "pixel_error", 100, commonest)
        _draw_row(axes[1], norms, group, styles, "val_loss", 1, [])
        legend = [Line2D([], [], **style) for style in {s["label"]: s for s in styles.values()}.values()]
        names = [f"commonest class: {error} %" + "\n(off the scale)" * (error > high) for error in commonest]
        legend += [Line2D([], [], color="0.5", ls="--", lw=1, label=name) for name in names]
        ends = {run.state: END_MARKERS[run.state] for run in group if run.state in END_MARKERS}
        legend += [Line2D([], [], color="0.3", ls="", label=state, **marker) for state, marker in ends.items()]
        part.legend(handles=legend, loc="outside right upper", fontsize=9, frameon=False)
    _replace(Path(path), lambda temporary: fig.savefig(temporary, format="png"))


def _line_styles(group: list[Run], colours: dict[int, str]) -> dict[str, dict]:
    styles = {}
    for run in sorted(group, key=lambda run: (run.minibatch, run.rate)):  # the order of the legend
        same = [r for r in group if (r.norm, r.minibatch, r.rate) == (run.norm, run.minibatch, run.rate)]
        twins = [r.name for r in same if r.seed == run.seed]  # these differ in something that only the name can tell
        rates = sorted({r.rate for r in group if r.minibatch == run.minibatch})
        label = f"minibatch {run.minibatch}, rate {run.rate:.4g}" + ", each seed" * (len(same) > len(twins))
        styles[run.name] = {
            "label": label + f"\n({run.name})" * (len(twins) > 1), "color": colours[run.minibatch],
            "lw": 0.9 if len(same) > len(twins) else 1.7,
            "ls": LINESTYLES[(rates.index(run.rate) + twins.index(run.name)) % len(LINESTYLES)],
        }  # fmt: skip
    return styles


def _draw_row(axes, norms: list[str], group: list[Run], styles: dict, key: str, scale: int, levels: list) -> float:
    curves = []
    for run in group:
        points = [(e, scale * v) for e, v in zip(run.column("epoch"), run.column(key), strict=True) if math.isfinite(v)]
        curves.append((run, np.array(points).reshape(-1, 2)))
    # The axis is made for the better 70 % of each run that held; it reaches further, but not as far as a spike.
    values = np.concatenate([curve[:, 1] for _, curve in curves] if any(len(c) for _, c in curves) else [np.ones(1)])
    steady = [curve[:, 1] for run, curve in curves if len(curve) and run.state != "diverged"] or [values]
    low, usual = values.min(), max(np.percentile(v, 70, method="nearest") for v in steady)
    high = max([values[values <= usual + 3 * (usual - low)].max(), *(level for level in levels if level <= 2 * usual)])
    margin = 0.06 * (high - low) or 0.1 * high
    for axis, norm in zip(axes, norms, strict=True):
        panel = [(run, curve) for run, curve in curves if run.norm == norm]
        for run, curve in panel:
            (line,) = axis.plot(*curve.T, marker="." if len(curve) <= 15 else "", **styles[run.name])
            if run.state in END_MARKERS and run.column("epoch"):
                x, y = curve[-1] if len(curve) else (run.column("epoch")[-1], math.inf)
                axis.plot(x, min(y, high + margin), c=line.get_color(), clip_on=False, **END_MARKERS[run.state])
        peak = max((curve[:, 1].max() for _, curve in panel if len(curve)), default=-1)
        note = "nothing measured" if peak < 0 else f"off the scale: up to {peak:.4g}" if peak > high + margin else ""
        axis.annotate(note, (1, 1.02), xycoords="axes fraction", ha="right", va="bottom", size=8)
        for level in levels:
            axis.axhline(level, color="0.5", ls="--", lw=1)
        axis.grid(alpha=0.25)
        axis.set_ylim(max(0, low - margin), high + margin)
    return float(high + margin)


def table_text(rows: list[dict]) -> list[list[str]]:
    """The table as text: headings, then a line per row; errors and mIoU in %, empty where nothing was measured."""
    lines = [["" if row[key] is None else format(row[key], form) for key, _, form in TABLE] for row in rows]
    return [[heading for _, heading, _ in TABLE], *lines]


def write_table(rows: list[dict], folder: str | Path, notes: list[str] = ()) -> list[Path]:
    """Writes rows of `summarise` as report.md (errors in %, `notes` under the table) and report.csv (fractions)."""
    head, *body = [[cell.replace("|", "\\|") for cell in line] for line in table_text(rows)]
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body)]
    lines = [f"# {Path(folder).resolve().name}", "", *lines, "", *(f"- {note}" for note in notes), "", EXPLAINED, ""]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([rows[0], *map(dict.values, rows)])
    texts = {"report.md": "\n".join(lines), "report.csv": table.getvalue()}
    return [_replace(Path(folder) / name, lambda p, t=text: p.write_text(t, "utf-8")) for name, text in texts.items()]


def write_report(folder: str | Path, found: tuple[list[Run], list[str], list[str]] | None = None) -> list[Path]:
    """Writes figure.png, report.md, report.csv and, where runs have one, predictions.png; returns their paths.

    Broken pictures are added to the broken files in `found`, the answer of `read_folder`. Raises what that raises.
    """
    folder, (runs, broken, notes) = Path(folder), found or read_folder(folder)
    figure(runs, folder / "figure.png")
    strips = []
    for run in runs:
        try:
            strips += [_strip(run)] if (run.path / "predictions.png").is_file() else []
        except (OSError, SyntaxError) as error:
            broken.append(f"{run.path / 'predictions.png'}: {error}")
    notes = [*(f"{run.name} diverged: {run.reason}" for run in runs if run.reason), *broken, *notes]
    paths = [folder / "figure.png", *write_table([summarise(run) for run in runs], folder, notes)]
    if strips:
        paths.append(_replace(folder / "predictions.png", Image.fromarray(np.vstack(strips)).save))
    return paths


def _strip(run: Run) -> np.ndarray:
    with Image.open(run.path / "predictions.png") as picture:
        panels = max(4, picture.width // (run.size[1] + 2))  # side by side, each in its frame; a contour is the fifth
        height = min(picture.height, round(picture.width / panels * run.size[0] / run.size[1]))
        strip = ImageOps.contain(picture.convert("RGB").crop((0, 0, picture.width, height)), (1200, 1200))
    page = ImageOps.expand(strip, (0, 36, 0, 0), "white")
    text = f"{run.name}, {run.state}: image, prediction, truth and wrong pixels" + ", contour" * (panels > 4)
    ImageDraw.Draw(page).text((8, 8), text, fill="black", font=ImageFont.load_default(18))
    return np.asarray(page)


def _replace(path: Path, write) -> Path:
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    write(temporary)
    os.replace(temporary, path)  # at once, so that nobody ever reads half a file
    return path
