"""What the runs reached, in rows and columns."""

import math

import numpy as np

from agcseg.figure1 import PANELS, PAPER_ERRORS
from agcseg.report.compare import Cells, common_epoch, label
from agcseg.report.read import COLUMNS, NAMES, Run

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
        "seed": run.seed, "epochs": run.last_epoch, "epochs_planned": run.epochs, "state": run.state,
        "final_error": last["pixel_error"],
        "mean_error_last5": float(np.mean([e for e in errors[-5:] if math.isfinite(e)] or math.nan)),
        "best_error": best, "best_epoch": int(epochs[errors.index(best)]) if math.isfinite(best) else None,
        "error_all_pixels": last["pixel_error_all"], "miou": last["miou"], "val_loss": last["val_loss"],
        "commonest_class_error": run.commonest_class_error, "peak_memory_mib": max(finite["peak_memory_mib"]),
        "images_per_second": float(np.median(finite["images_per_second"])), "minutes": last["seconds"] / 60,
    }  # fmt: skip
    return {key: None if value != value else value for key, value in row.items()}


def table_text(rows: list[dict]) -> list[list[str]]:
    """The table as text: headings, then a line per row; errors and mIoU in %, empty where nothing was measured."""
    lines = [["" if row[key] is None else format(row[key], form) for key, _, form in TABLE] for row in rows]
    return [[heading for _, heading, _ in TABLE], *lines]


def panel_table(cells: Cells) -> list[list[str]]:
    """The last values in every panel of Figure 1 beside the paper's, at the epoch that all its runs have reached."""
    lines = [["panel", "run", "seeds", "epoch", "here", "paper"]]
    for panel in PANELS:
        epoch = common_epoch([run for of in panel.runs for run in cells.get(of, {}).values()])
        for of in panel.runs:
            runs = [*cells.get(of, {}).values()]
            here = _spread([run for run in runs if run.state != "diverged"], panel.metric, epoch)
            diverged = sum(run.state == "diverged" for run in runs)
            text = ", ".join([here] * bool(here) + [f"{diverged} diverged"] * (diverged > 0)) or "no run"
            paper = f"{PAPER_ERRORS[of]:.2%}" if panel.metric == "pixel_error" and of in PAPER_ERRORS else ""
            lines.append([panel.letter, label(of), str(len(runs)), str(epoch or ""), text, paper])
    return lines


def reached_table(cells: Cells) -> list[list[str]]:
    """How many epochs AGC takes to BN's last error, and BN to AGC's: the first epoch at most as bad; each seed."""
    lines = [["network", "minibatch", "rate", "seed", "BN's error", "AGC is there at", "AGC's error", "BN is there at"]]
    for bn in cells:
        agc = bn._replace(norm="agc")
        for seed in sorted(cells[bn].keys() & cells.get(agc, {}).keys()) if bn.norm == "bn" else ():
            ours, theirs = cells[agc][seed], cells[bn][seed]
            network = NAMES.get(bn.network, bn.network)
            aims = [_last_error(theirs), _reached(ours, theirs), _last_error(ours), _reached(theirs, ours)]
            lines.append([network, str(bn.minibatch), f"{bn.rate:g}", str(seed), *aims])
    return lines


def _spread(runs: list[Run], metric: str, epoch: int) -> str:
    values = [value for run in runs if math.isfinite(value := run.at(metric, epoch))]
    form = ".2%" if metric == "pixel_error" else ".3f"
    if not values:
        return ""
    return format(np.mean(values), form) + (
        f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    )


def _last_error(run: Run) -> str:
    if run.state == "diverged" or not run.last_epoch:
        return "diverged" if run.state == "diverged" else ""
    return f"{run.at('pixel_error', run.last_epoch):.2%}" + f" at epoch {run.last_epoch}" * (run.state == "unfinished")


def _reached(run: Run, aim: Run) -> str:
    if aim.state == "diverged" or not aim.last_epoch:
        return ""
    goal = aim.at("pixel_error", aim.last_epoch)
    there = [epoch for epoch in range(1, run.last_epoch + 1) if run.at("pixel_error", epoch) <= goal]
    return f"epoch {there[0]}" if there else f"not in {run.last_epoch} epochs"
