"""The program agcseg-report."""

import argparse
import os
import shlex
import sys
from collections import Counter

from agcseg.errors import UserError
from agcseg.report import MARGIN, compared, read_folder, settings_table, summarise, table_text, write_report

# To fit a terminal, these columns are dropped from the table where all runs agree in them, and said once above it.
SAID_ONCE = ("network", "width", "data", "size", "seed", "commonest class")

EPILOG = """\
example:
  agcseg-train -m experiment=demo      make a few runs in outputs/demo
  agcseg-report outputs/demo           compare them

A run is a subfolder with config.yaml and metrics.csv. Runs may still be going on: report again whenever you like.

written into FOLDER:
  report.html      everything below in one file that can be sent by itself: verdicts on the paper's claims, the curves,
                   tables, λ, predictions, and how each diverged run ended
  report.md        the same as Markdown, beside its pictures
  report.csv       the table of runs for programs: errors are fractions, not %
  figure1.png      the eight panels of the paper's Figure 1, where FOLDER holds the paper's experiment: runs whose
                   configuration is named figure1, or most of its twelve settings
  figure.png       else: validation pixel error and loss against the epoch: a column for BN and one for AGC, where the
                   runs differ in nothing else but minibatch and rate; otherwise a curve per setting, over its seeds
  lambda.png       λ of every layer, at the end and over the epochs (where AGC runs have recorded it); where settings
                   differ in its start, at the start and at the end of each
  predictions.png  the first validation image as each run predicts it (where runs have stored predictions)

exit code: 0 all is well, 1 some files are broken (the other runs are reported), 2 nothing to report or a wrong option
"""


def main(argv: list[str] | None = None) -> int:
    """Runs agcseg-report; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="agcseg-report",
        description="Compare the training runs of one folder: their curves, what they reached, the paper's claims.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder with one subfolder per run, such as outputs/demo")
    parser.add_argument(
        "--margin",
        type=float,
        default=MARGIN,
        metavar="POINTS",
        help="pixel errors no further apart than this count as equal in the verdicts (default: %(default)g)",
    )
    parser.add_argument(
        "--reference",
        metavar="SETTING",
        help='compare settings with this one, named as in the table of settings, such as "no GEMS" (default: the one'
        " nearest to the program's defaults; given, settings are compared whatever the runs differ in)",
    )
    arguments = parser.parse_args(argv)
    folder = arguments.folder
    try:
        runs, broken, notes = read_folder(folder)
        paths, answers = write_report(folder, (runs, broken, notes), arguments.margin, arguments.reference)
        groups, reference, _ = compared(runs, arguments.reference)
    except (UserError, OSError) as error:
        print(f"agcseg-report: error: {error}", file=sys.stderr)
        return 2

    states = Counter(run.state for run in runs)
    print(f"{folder}: " + ", ".join(f"{number} {state}" for state, number in states.items()))
    ending = _common_ending([run.name for run in runs])
    columns = list(zip(*table_text([summarise(run) for run in runs]), strict=True))
    columns[0] = (columns[0][0], *(name.removesuffix(ending) for name in columns[0][1:]))
    once = [column for column in columns if column[0] in SAID_ONCE and len({*column[1:]} - {""}) < 2]
    print(", ".join(f"{column[0]} {max(column[1:])}" for column in once if max(column[1:])))
    print(f"all names end in {ending}\n" if ending else "")
    _print_table([column for column in columns if column not in once], left=("run", "norm", "state"))
    if groups:
        _print_table([*zip(*settings_table(groups, reference), strict=True)], left=("setting",))
    for answer in answers:
        print(f"claim {answer.number}: {answer.claim}: {answer.answer}")
    print("\n" * bool(answers), end="")
    for note in [*(f"{run.name} diverged: {run.reason}" for run in runs if run.reason), *notes]:
        print(f"note: {note}")
    for line in broken:
        print(f"agcseg-report: broken: {line}", file=sys.stderr)
    for path in paths:
        print(f"wrote {path}")
    print(f"tensorboard --logdir {shlex.quote(folder)}")
    return 1 if broken else 0


def _print_table(columns: list[tuple[str, ...]], left: tuple[str, ...]) -> None:
    """With the columns of these headings flush left, the others right."""
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns, strict=True):
        cells = zip(line, widths, columns, strict=True)
        texts = [text.ljust(width) if column[0] in left else text.rjust(width) for text, width, column in cells]
        print("  ".join(texts).rstrip())
    print()


def _common_ending(names: list[str]) -> str:
    """What all names end in, from a hyphen on: overrides that all runs share make names too long for a terminal."""
    shared = os.path.commonprefix([name[::-1] for name in names])[::-1] if len(names) > 1 else ""
    return shared[shared.find("-") :] if "-" in shared and len(shared) > 20 else ""


if __name__ == "__main__":
    raise SystemExit(main())
