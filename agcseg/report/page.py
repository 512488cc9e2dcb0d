"""The report as a page: the same content as Markdown and as one HTML file with its pictures inside."""

import base64
import csv
import io
import os
from collections import Counter
from collections.abc import Callable
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from agcseg.figure1 import PANELS, PAPER_ERRORS, RUNS
from agcseg.report.claims import MARGIN, Verdict, verdicts
from agcseg.report.compare import Cells, cells, is_figure1
from agcseg.report.figures import figure, figure1, lambda_figure, lambda_starts_figure, settings_figure, strip
from agcseg.report.read import Run, read_folder
from agcseg.report.settings import (
    DIFFERENCES,
    INTERVALS,
    SETTINGS,
    Settings,
    compared,
    costs_compared,
    differences_table,
    epoch_of,
    lambda_memory,
    lambda_starts,
    like,
    settings_table,
    shared,
)
from agcseg.report.tables import EXPLAINED, panel_table, reached_table, summarise, table_text

HOW = """A verdict is "supported" if the whole 95 % interval lies where the claim puts it, "not supported" if all of it
lies elsewhere, else "not enough data". Differences are paired by seed (Student's t). One seed decides nothing that
depends on how a training goes: its interval covers the choice of validation images only, and where it leans is said in
brackets. A diverged run counts as infinitely bad. Time and memory are compared on the same device only, and say nothing
if other programs shared it. A spike is a stretch of steps whose loss is above 3 times the median of the 100 steps
before; its size is peak / median."""
ALIKE = " Judged on the runs that differ from the reference in norm, minibatch and rate only."
PAPER = "The paper: Cityscapes, 256x512, 150 epochs, SegNet and ClassNet at full width, one run each."
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:auto;padding:0 1rem;color:#222}
img{max-width:100%;height:auto}div.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;margin:.5rem 0}
th,td{border-bottom:1px solid #ccc;padding:.25rem .6rem;text-align:left;vertical-align:top}li{margin:.3rem 0}
.supported{background:#d3ebf8}.not-supported{background:#fbdccb}.not-enough-data{background:#eee}
h1,h2,h3{line-height:1.25}"""

# A part of the page: ("h2" or "h3" or "p", text), ("ul", texts), ("table", rows) or ("img", path, what it shows).
Block = tuple


def write_report(
    folder: str | Path, found=None, margin: float = MARGIN, reference: str | None = None
) -> tuple[list[Path], list[Verdict]]:
    """Writes report.html, report.md, report.csv and the pictures; see `agcseg-report --help`.

    Args:
        found: the answer of `read_folder`; broken pictures are added to its broken files, and to its notes why some of
            the runs are not compared.
        margin: see `agcseg.report.verdicts`.
        reference: name of the setting that the others are compared with; see `agcseg.report.settings.compared`.

    Returns:
        the paths that were written, and the verdicts.

    Raises:
        UserError: the folder holds nothing to report, the margin is not positive, or there is no such reference.
    """
    folder, (runs, broken, notes) = Path(folder), found or read_folder(folder)
    groups, reference, twins = compared(runs, reference)
    kept, apart = cells(like(runs, next(iter(groups[reference].values()))) if groups else runs)
    notes += dict.fromkeys(twins + apart)
    of_paper = not groups and is_figure1(runs, kept)
    answers = verdicts(kept, margin, of_paper)
    drawn = settings_figure(groups, reference) if groups else figure1(kept) if of_paper else figure(runs)
    paths = [_save(drawn, folder / ("figure1.png" if of_paper else "figure.png"))]
    shown, starts = _with_lambda(kept), lambda_starts(groups)
    if starts or shown:
        drawn = lambda_starts_figure(starts, [*groups]) if starts else lambda_figure(shown)
        paths.append(_save(drawn, folder / "lambda.png"))
    strips = []
    for run in runs:
        try:
            strips += [strip(run)] if (run.path / "predictions.png").is_file() else []
        except (OSError, SyntaxError) as error:
            broken.append(f"{run.path / 'predictions.png'}: {error}")
    if strips:
        paths.append(_replace(folder / "predictions.png", Image.fromarray(np.vstack(strips)).save))
    diverged = [f"{run.name} diverged: {run.reason}" for run in runs if run.reason]
    pictures = {path.name: path for path in paths}
    blocks = _content(runs, kept, answers, pictures, [*diverged, *broken, *notes], groups, reference)
    title, rows = folder.resolve().name, [summarise(run) for run in runs]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([rows[0], *map(dict.values, rows)])
    texts = {"report.html": html(title, blocks), "report.md": markdown(title, blocks), "report.csv": table.getvalue()}
    for name, text in texts.items():
        paths.append(_replace(folder / name, lambda temporary, t=text: temporary.write_text(t, "utf-8")))
    return paths, answers


def _content(
    runs: list[Run],
    kept: Cells,
    answers: list[Verdict],
    pictures: dict[str, Path],
    notes: list[str],
    groups: Settings,
    reference: str,
) -> list[Block]:
    of_paper = "figure1.png" in pictures
    titles = [shared(runs)] if groups else {run.title: 0 for seeds in kept.values() for run in seeds.values()}
    states = Counter(run.state for run in runs)
    what = ", ".join(f"{number} {state}" for state, number in states.items())
    blocks: list[Block] = [("p", f"{len(runs)} runs: {what}. {'; '.join(titles)}.")]
    if of_paper:
        there = sum(of in kept for of in RUNS)
        blocks.append(("p", f"{there} of the {len(RUNS)} settings of Figure 1 are there. {PAPER} {_same_data(kept)}"))
    curves = ("img", pictures.get("figure.png"), "validation error and loss against the epoch")
    if groups:
        blocks += [("h2", "Settings"), *_settings(groups, reference), curves]
    if answers:
        blocks += [("h2", "The paper's claims"), ("table", [["", "claim", "verdict"]] + [
            [str(answer.number), answer.claim, answer.answer] for answer in answers])]  # fmt: skip
        blocks.append(("p", HOW + ALIKE * bool(groups)))
        for answer in answers:
            blocks.append(("h3", f"{answer.number}. {answer.claim}: {answer.answer}"))
            blocks.append(("ul", [part.text for part in answer.parts]))
    if not of_paper and not groups:
        blocks += [("h2", "Curves"), curves]
    if of_paper:
        blocks += [("h2", "Figure 1"), ("img", pictures["figure1.png"], curves[2])]
        captions = " ".join(f"({panel.letter}) {panel.caption}." for panel in PANELS)
        blocks += [("p", captions), ("h3", "Last values of the panels"), ("table", panel_table(kept))]
        text = "At the last epoch that all runs of a panel reached: mean and, in brackets, extremes over the seeds."
        blocks.append(("p", f"{text} The paper gives {len(PAPER_ERRORS)} numbers. {PAPER} {_same_data(kept)}"))
    reached = reached_table(kept)
    if len(reached) > 1:
        blocks += [("h2", "Epochs to the other's last error"), ("table", reached)]
    starts = lambda_starts(groups)
    if starts:
        text = (
            "Mean λ of each layer before training (dotted) and at the end. How far the settings lie apart at the end is"
        )
        text += f" {lambda_memory(starts):.0%} of how far they did at the start, on average over the layers."
        blocks += [("h2", "λ"), ("img", pictures["lambda.png"], "mean λ of each layer at start and end"), ("p", text)]
    elif "lambda.png" in pictures:
        blocks += [("h2", "λ"), ("img", pictures["lambda.png"], "λ against depth at the end, and over the epochs")]
    blocks += [("h2", "Runs"), ("table", table_text([summarise(run) for run in runs])), ("p", EXPLAINED)]
    if "predictions.png" in pictures:
        blocks += [
            ("h2", "Predictions"),
            ("img", pictures["predictions.png"], "the first validation image, run by run"),
        ]
    if notes:
        blocks += [("h2", "Notes"), ("ul", notes)]
    return blocks


def _settings(groups: Settings, reference: str) -> list[Block]:
    _, _, costs = costs_compared(groups)
    return [
        ("table", settings_table(groups, reference)),
        ("p", f"{SETTINGS.format(epoch=epoch_of(groups))} {INTERVALS} {costs}"),
        ("table", differences_table(groups, reference)),
        ("p", DIFFERENCES.format(reference=reference)),
    ]


def _same_data(kept: Cells) -> str:
    paper = ("cityscapes", (256, 512), 150, 1.0)
    here = {(run.data, run.size, run.epochs, run.width) for seeds in kept.values() for run in seeds.values()}
    same = here == {paper}
    return (
        "These runs have that setting."
        if same
        else "These runs have another: their errors and verdicts hold for it alone."
    )


def _with_lambda(kept: Cells) -> list[Run]:
    """Of each network a run that recorded λ: at minibatch 4 and rate 0.08 where there is one, the first seed."""
    chosen: dict[str, Run] = {}
    for of in sorted(kept, key=lambda of: (of.minibatch, of.rate) != (4, 0.08)):
        for seed in sorted(kept[of]):
            if kept[of][seed].layers is not None:
                chosen.setdefault(of.network, kept[of][seed])
    return [*chosen.values()]


def markdown(title: str, blocks: list[Block]) -> str:
    lines = [f"# {title}", ""]
    for kind, content, *more in blocks:
        if kind == "table":
            head, *body = [[cell.replace("|", "\\|") for cell in row] for row in content]
            lines += ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]
        elif kind == "ul":
            lines += [f"- {item}" for item in content]
        elif kind == "img":
            lines.append(f"![{more[0]}]({content.name})")
        else:
            lines.append({"h2": "## ", "h3": "### ", "p": ""}[kind] + content)
        lines.append("")
    return "\n".join(lines)


def html(title: str, blocks: list[Block]) -> str:
    """One file that needs no other: pictures are inside, there are no scripts."""
    parts = [f"<h1>{escape(title)}</h1>"]
    for kind, content, *more in blocks:
        if kind == "table":
            head, *body = [[_cell(text, "th" if row is content[0] else "td") for text in row] for row in content]
            rows = "\n".join(f"<tr>{''.join(row)}</tr>" for row in (head, *body))
            parts.append(f'<div class="wide"><table>\n{rows}\n</table></div>')
        elif kind == "ul":
            parts.append("<ul>\n" + "\n".join(_cell(item, "li") for item in content) + "\n</ul>")
        elif kind == "img":
            parts.append(f'<p><img alt="{escape(more[0])}" src="{_inline(content)}"></p>')
        else:
            parts.append(f"<{kind}>{escape(content)}</{kind}>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>\n{STYLE}\n</style>"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _cell(text: str, tag: str) -> str:
    kinds = [kind for kind in ("not supported", "not enough data", "supported") if text.startswith(kind)]
    mark = f' class="{kinds[0].replace(" ", "-")}"' if kinds else ""
    return f"<{tag}{mark}>{escape(text)}</{tag}>"


def _inline(path: Path) -> str:
    """A picture as a data URL; photographs as JPEG, which is a tenth of the size."""
    if path.name != "predictions.png":
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.save(buffer, "jpeg", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _save(fig, path: Path) -> Path:
    return _replace(path, lambda temporary: fig.savefig(temporary, format="png"))


def _replace(path: Path, write: Callable[[Path], object]) -> Path:
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    write(temporary)
    os.replace(temporary, path)  # at once, so that nobody ever reads half a file
    return path
