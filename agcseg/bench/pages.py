"""Tables and pictures of what was measured."""

import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from agcseg.record.files import write, write_csv
from agcseg.record.pictures import png

COLUMNS = (  # key, heading, format
    ("network", "network", ""), ("variant", "variant", ""), ("minibatch", "minibatch", ""),
    ("precision", "precision", ""), ("budget", "budget", ""),
    ("step_ms", "step ms", ".1f"), ("time_to_bn", "time/bn", ".3f"), ("time_to_none", "time/none", ".3f"),
    ("time_to_bn-folded", "time/bn-folded", ".3f"),
    ("host_ms", "host ms", ".1f"), ("launches", "launches", ".0f"), ("waits", "waits", ".0f"),
    ("images_per_second", "images/s", ".2f"), ("kept_mib", "kept MiB", ".1f"), ("kept_to_bn", "kept/bn", ".3f"),
    ("peak_mib", "peak MiB", ".0f"), ("peak_to_bn", "peak/bn", ".3f"), ("parameters", "parameters", ","),
    ("gflop", "GFLOP", ".1f"), ("extra_flop", "extra FLOP", "+.2%"), ("tflop_per_second", "TFLOP/s", ".2f"),
    ("largest", "largest minibatch", ""), ("how", "found", ""), ("failed", "failed", ""),
)  # fmt: skip


def write_results(
    folder: Path, rows: list[dict], where: str, notes: Sequence[str] = (), pictures: bool = True, name="bench"
) -> str:
    """NAME.csv, NAME.md and, if wanted, NAME.png: the rows, below a line that says where they were measured.

    Returns:
        the names of the files, in words; without the picture, if every case failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / f"{name}.csv", rows)
    write(folder / f"{name}.md", f"{where}\n\n{markdown(rows)}\n" + "".join(f"\n{note}\n" for note in notes))
    for key, draw in (("step_ms", _bars), ("extra_flop", _frontier)):
        whole = [row for row in rows if key in row and "failed" not in row]
        if pictures and whole:
            write(folder / f"{name}.png", png(draw(whole, where), dpi=110))
            return f"{name}.csv, {name}.md and {name}.png"
    return f"{name}.csv and {name}.md"


def read_results(path: Path) -> tuple[list[dict], str]:
    """The rows of a bench.csv, numbers as numbers, and the first line of the bench.md beside it."""
    with open(path, newline="") as file:
        rows = [{key: _value(text) for key, text in row.items() if text} for row in csv.DictReader(file)]
    return rows, path.with_name("bench.md").read_text().splitlines()[0]


def _value(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _cells(rows: list[dict]) -> list[list[str]]:
    columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    lines = [[heading for _, heading, _ in columns]]
    for row in rows:
        cells = []
        for key, _, form in columns:
            cell = "" if row.get(key) is None else format(row[key], form)
            if f"{key}_low" in row and key.startswith("time"):
                cell += f" ({row[f'{key}_low']:.2f}-{row[f'{key}_high']:.2f})"
            cells.append(cell)
        lines.append(cells)
    return lines


def plain(rows: list[dict]) -> str:
    lines = _cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


def markdown(rows: list[dict]) -> str:
    head, *lines = _cells(rows)
    ruler = ["---", "---", *["---:"] * (len(head) - 2)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ruler, *lines))


def _bars(rows: list[dict], where: str) -> Figure:
    """One panel per figure, one bar per row."""
    panels = [
        (key, title)
        for key, title in (
            ("step_ms", "ms per step"), ("kept_mib", "MiB kept for backward"), ("peak_mib", "MiB at the peak")
        )
        if any(row.get(key) is not None for row in rows)
    ]  # fmt: skip
    figure = Figure(figsize=(4 + 3.4 * len(panels), 1.2 + 0.34 * len(rows)), layout="constrained")
    said = [key for key in ("network", "variant", "minibatch", "precision") if len({row[key] for row in rows}) > 1]
    names = [", ".join(f"{'minibatch ' * (key == 'minibatch')}{row[key]}" for key in said) for row in rows]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for axes, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        bars = axes.barh(
            range(len(rows)),
            [row.get(key, 0) for row in rows],
            color=[f"C{variants.index(row['variant'])}" for row in rows],
        )
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
        axes.margins(x=0.18)
        axes.set_title(title, fontsize=10)
        axes.set_yticks(range(len(rows)), names, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.suptitle(where, fontsize=8)
    return figure


def _frontier(rows: list[dict], where: str) -> Figure:
    """Bytes kept against arithmetic added: a panel per network, minibatch and precision, a line per variant."""
    groups: dict[tuple, dict[str, list]] = {}
    for row in rows:
        lines = groups.setdefault((row["network"], row["minibatch"], row["precision"]), {})
        lines.setdefault(row["variant"], []).append((100 * row["extra_flop"], row["kept_to_bn"]))
    figure = Figure(figsize=(5.6 * len(groups), 4.2), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axes, ((network, minibatch, precision), lines) in zip(panels, groups.items(), strict=True):
        for number, (variant, points) in enumerate(lines.items()):
            best = [(x, y) for x, y in sorted(points) if all(y <= other for at, other in points if at <= x)]
            axes.plot(*zip(*best, strict=True), "o-", markersize=4, color=f"C{number}", label=variant)
        axes.set_title(f"{network}, minibatch {minibatch}, {precision}", fontsize=10)
        axes.set_xlabel("arithmetic of a step, % more than batch normalisation's", fontsize=9)
        axes.set_ylim(0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("kept for backward ÷ batch normalisation", fontsize=9)
    panels[-1].legend(frameon=False, fontsize=9)
    figure.suptitle(where, fontsize=8)
    return figure
