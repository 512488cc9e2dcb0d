"""The report as a page: page.jinja, filled once as one HTML file with its pictures inside, and once as Markdown."""

import base64
import io
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from PIL import Image

from agcseg.figure1 import PANELS, PAPER_ERRORS
from agcseg.report.claims import MARGIN, Verdict, verdicts
from agcseg.report.compare import Cells, by_setting, cells, epoch_of, is_figure1, like, of_settings, reference_of
from agcseg.report.figures import figure, figure1, forest, lambda_figure, lambda_starts_figure, predictions
from agcseg.report.read import Run, read_folders
from agcseg.report.tables import (
    costs_compared,
    differences_table,
    environment_table,
    headline,
    lambda_memory,
    lambda_starts,
    panel_table,
    reached_table,
    runs_table,
    settings_table,
    summarise,
)

HOW = """A verdict is "supported" if the whole 95 % interval lies where the claim puts it (grey in the figure), "not
supported" if all of it lies elsewhere, else "not enough data". Differences are paired by seed (Student's t). One seed
decides nothing that depends on how a training goes: its interval covers the choice of validation images only, and where
it leans is said in brackets (a hollow dot). A diverged run counts as infinitely bad. Time and memory are compared on
the same device only, and say nothing if other programs shared it. A spike is a stretch of steps whose loss is above 3
times the median of the 100 steps before; its size is peak / median."""
ALIKE = " Judged on the runs that differ from the reference in norm, minibatch and rate only."
RESULTS = """Validation at epoch {epoch}, the best first; best figures bold: pixel error, mean error of the last three
epochs (less noisy) and of all epochs, mIoU, loss; n: seeds. From three seeds on, ± is the 95 % interval of the mean
(Student's t; not corrected for the number of comparisons); of two seeds both values are in brackets. Diverged runs are
counted, not averaged."""
PAPER = "The paper: Cityscapes, 256x512, 150 epochs, SegNet and ClassNet at full width, one run each."
RUNS = """error, mIoU, loss: validation, last epoch; last 5: mean error, last five epochs; best: smallest error and its
epoch; all px: error over all pixels; img/s: median; MiB: peak of the process, on a GPU of CUDA's counter; training: of
what training adds to the idle network; kept: for backward in a step."""


def write_report(
    folder: str | Path, found=None, margin: float = MARGIN, reference: str | None = None
) -> tuple[list[Path], list[Verdict]]:
    """Writes report.html, report.md, report.csv and the pictures; see `agcseg-report --help`.

    Args:
        folder: where to; it is made if need be.
        found: the answer of `read_folders`, by default of this folder; broken pictures are added to its broken files,
            and to its notes why some of the runs are not compared.
        margin: see `agcseg.report.verdicts`.
        reference: name of the setting that the others are compared with; see `agcseg.report.compare.reference_of`.

    Returns:
        the paths that were written, and the verdicts.

    Raises:
        UserError: the folder holds nothing to report, the margin is not positive, or there is no such reference.
    """
    folder, (runs, broken, notes) = Path(folder), found or read_folders(folder)
    groups, twins = by_setting(runs)
    kept, apart = cells(runs)
    base, of_paper, alike = reference_of(groups, reference), is_figure1(runs, kept), False
    if of_settings(runs) and not of_paper or reference is not None:
        alike, of_paper = True, False
        kept, apart = cells(like(runs, next(iter(groups[base].values()))))
    notes += [*dict.fromkeys(twins + apart)]
    answers = verdicts(kept, margin, of_paper)
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Figure | None]
    drawn = {"figure1.png": figure1(kept)} if of_paper else {"figure.png": figure(groups, base)}
    shown, starts = _with_lambda(kept), lambda_starts(groups)
    drawn["lambda.png"] = lambda_starts_figure(starts, [*groups]) if starts else lambda_figure(shown) if shown else None
    drawn["forest.png"] = forest(answers)
    paths = [_replace(folder / name, partial(fig.savefig, format="png")) for name, fig in drawn.items() if fig]
    scenes, unreadable = predictions(groups)
    broken += unreadable
    if scenes:
        paths.append(_replace(folder / "predictions.png", lambda to: scenes.save(to, "png")))
    content = {
        "headline": headline(runs, groups, of_paper), "broken": broken, "answers": answers,
        "results": settings_table(groups, base), "claims": _claims(answers),
        "about_results": f"{' '.join(RESULTS.format(epoch=epoch_of(groups)).split())} {costs_compared(groups)[2]}",
        "about_claims": " ".join(HOW.split()) + ALIKE * alike,
        "about_lambda": _about_lambda(starts), "details": _details(runs, groups, base, kept, of_paper, notes),
    }  # fmt: skip
    title = folder.resolve().name
    table = pd.DataFrame([summarise(run) for run in runs], dtype=object)
    texts = {
        "report.html": fill(title, {path.name: _inline(path) for path in paths}, content, html=True),
        "report.md": fill(title, {path.name: path.name for path in paths}, content, html=False),
        "report.csv": table.to_csv(index=False, lineterminator="\n"),
    }
    for name, text in texts.items():
        paths.append(_replace(folder / name, partial(Path.write_text, data=text, encoding="utf-8")))
    return paths, answers


def fill(title: str, pictures: dict[str, str], content: dict, html: bool) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=html, trim_blocks=True, lstrip_blocks=True)
    text = page.get_template("page.jinja").render(
        content, title=title, pictures=pictures, html=html, bold=_bold if html else str, mark=_mark
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _bold(text: str) -> Markup:
    """Markdown's **bold**, as a table has it."""
    bold = text.startswith("**") and text.endswith("**")
    return Markup("<b>{}</b>").format(text.strip("*")) if bold else escape(text)


def _mark(text: str) -> Markup:
    """The class of a verdict."""
    kinds = [kind for kind in ("not supported", "not enough data", "supported") if text.startswith(kind)]
    return Markup(f' class="{kinds[0].replace(" ", "-")}"' if kinds else "")


def _claims(answers: list[Verdict]) -> pd.DataFrame:
    """All claims and their parts as one table, for Markdown."""
    lines = []
    for number, claim, parts, answer in [(a.number, a.claim, a.parts, a.answer) for a in answers]:
        lines.append([f"**{number}. {claim}**", "", "", f"**{answer}**"])
        lines += [[p.what + f" ({p.basis})" * p.known, p.measured, p.wanted, p.answer] for p in parts]
    heads = ["claim, and what was measured", "estimate (95 % interval)", "expected", "verdict"]
    return pd.DataFrame(lines, columns=heads)


def _about_lambda(starts) -> str:
    if not starts:
        return "Left: λ of the filters of each layer at the end. Right: the mean of each layer over the epochs."
    return f"""Mean λ of each layer before training (dotted) and at the end. At the end the settings lie apart by
{lambda_memory(starts):.0%} of what they did at the start, on average over the layers.""".replace("\n", " ")


def _details(runs: list[Run], groups, base: str, kept: Cells, of_paper: bool, notes: list[str]) -> list[tuple]:
    """What is folded away: (heading, table or None, text or lines)."""
    paper = {("cityscapes", (256, 512), 150, 1.0)}
    here = {(run.data, run.size, run.epochs, run.width) for seeds in kept.values() for run in seeds.values()}
    same = "These runs have that setting."
    other = "These runs have another: their errors and verdicts hold for it alone."
    captions = " ".join(f"({panel.letter}) {panel.caption}." for panel in PANELS)
    panels = f"""At the last epoch that all runs of a panel reached: mean and, in brackets, extremes over the seeds. The
paper gives {len(PAPER_ERRORS)} numbers. {PAPER} {same if here == paper else other} {captions}""".replace("\n", " ")
    notes = [f"{run.name} diverged: {run.reason}" for run in runs if run.reason] + notes
    less = f"Setting − {base}, paired by seed (n: pairs). Below zero is better, but for mIoU."
    return [
        ("Last values of Figure 1's panels, beside the paper's", panel_table(kept) if of_paper else [], panels),
        ("Differences", differences_table(groups, base), less),
        ("Epochs to the other norm's last error", reached_table(kept), "The first epoch that is at least as good."),
        ("All runs", runs_table(runs), " ".join(RUNS.split())),
        ("What the runs were made with differs", environment_table(runs), "As each run's environment.json says."),
        ("Notes", None if notes else [], notes),
    ]


def _with_lambda(kept: Cells) -> list[Run]:
    """Of each network a run that recorded λ: at minibatch 4 and rate 0.08 where there is one, the first seed."""
    chosen: dict[str, Run] = {}
    for of in sorted(kept, key=lambda of: (of.minibatch, of.rate) != (4, 0.08)):
        for seed in sorted(kept[of]):
            if kept[of][seed].layers is not None:
                chosen.setdefault(of.network, kept[of][seed])
    return [*chosen.values()]


def _inline(path: Path) -> str:
    """A picture as a data URL; photographs as JPEG, which is a tenth of the size."""
    if path.name != "predictions.png":
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.save(buffer, "jpeg", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _replace(path: Path, write: Callable[[Path], object]) -> Path:
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    write(temporary)
    os.replace(temporary, path)  # at once, so that nobody ever reads half a file
    return path
