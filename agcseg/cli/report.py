"""The program agcseg-report."""

import argparse
import os
import shlex
import sys
from collections import Counter
from pathlib import Path

from agcseg.cli import program, show
from agcseg.errors import UserError
from agcseg.report import MARGIN, read_folders, write_report

EPILOG = """\
examples:
  agcseg-train -m experiment=demo      make a few runs in outputs/demo
  agcseg-report outputs/demo           compare them
  agcseg-report outputs/a outputs/b    compare the runs of two folders; written into outputs/a+b

A run is a subfolder with config.yaml and metrics.csv. Runs may still be going on: report again whenever you like. Runs
of several folders are compared like those of one; where two folders hold the same run, their settings are told apart by
the folder. A folder without runs among them is noted, and has no part in the name of what is written.

written into FOLDER:
  report.html      everything below in one file that can be sent by itself: what was reached, in words, curves and a
                   table, predictions, the verdicts on the paper's claims, λ, and all details
  report.md        the same as Markdown, beside its pictures
  report.csv       the table of runs for programs: errors are fractions, not %
  figure1.png      the eight panels of the paper's Figure 1, where FOLDER holds the paper's experiment: runs whose
                   configuration is named figure1, or most of its twelve settings
  figure.png       else: validation pixel error and loss, a curve per setting over its seeds, and where each ended
  forest.png       each estimate of the verdicts with its interval, against what the claim allows
  lambda.png       λ of every layer, at the end and over the epochs (where AGC runs have recorded it); where settings
                   differ in its start, at the start and at the end of each
  predictions.png  the first validation image as each setting predicts it (where runs have stored predictions)

exit code: 0 all is well, 1 some files are broken (the other runs are reported), 2 nothing to report or a wrong option
"""


@program("agcseg-report")
def main(argv: list[str] | None = None) -> int:
    """Runs agcseg-report; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="agcseg-report",
        description="Compare training runs: their curves, what they reached, the paper's claims.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="folder with a subfolder per run: outputs/demo")
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
        help='compare settings with this one, named as in the figure, such as "no GEMS" (default: the one nearest to'
        " the program's defaults)",
    )
    parser.add_argument("--out", metavar="FOLDER", help="where to write (default: FOLDER itself; of several: A+B)")
    arguments = parser.parse_args(argv)
    folders = [*{Path(folder).resolve(): Path(folder) for folder in reversed(arguments.folders)}.values()][::-1]
    runs, broken, notes = read_folders(*folders)
    full = [folder for folder in folders if any(run.path.parent == folder for run in runs)]
    joined = full[0].resolve().parent / "+".join(folder.resolve().name for folder in full)
    out = Path(arguments.out) if arguments.out else full[0] if len(full) == 1 else joined
    if len(os.fsencode(out.name)) > 255:  # what file systems take
        raise UserError(f"{len(full)} folders: say where their report goes, with --out FOLDER")
    paths, page = write_report(out, (runs, broken, notes), arguments.margin, arguments.reference)

    states = Counter(run.state for run in runs)
    show(f"{' '.join(map(str, folders))}: " + ", ".join(f"{number} {state}" for state, number in states.items()))
    show(f"{page['headline']}\n")
    show(page["results"].to_string(index=False).replace("**", "") + "\n")
    for answer in page["answers"]:
        show(f"claim {answer.number}: {answer.claim}: {answer.answer}")
    if page["answers"]:
        show("")
    for note in page["notes"]:
        show(f"note: {note}")
    for line in page["broken"]:
        print(f"agcseg-report: broken: {line}", file=sys.stderr)
    for path in paths:
        show(f"wrote {path}")
    show(f"tensorboard --logdir {shlex.quote(str(full[0]))}")
    return 1 if page["broken"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
