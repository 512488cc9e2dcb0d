"""The program agcseg-bench."""

import argparse
import platform
import re
import sys
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agcseg.bench.measure import delivery
from agcseg.bench.pages import markdown, plain, read_results, write_results
from agcseg.bench.step import FOLDED, TRAINED, VARIANTS, Case
from agcseg.bench.table import Failed, frontier_table, largest_minibatch, table
from agcseg.cli import program
from agcseg.errors import UserError
from agcseg.networks import NETWORKS
from agcseg.nn import NORMS
from agcseg.training.lines import on_terminal
from agcseg.training.machine import device_name, find_device

FRONTIER = ["bn", "bn-compiled", "none-compiled", "agc-compiled", "agc"]
EPILOG = (
    """\
examples:
  agcseg-bench --width 0.25 --size 64x128               a quick look, a minute on a CPU
  agcseg-bench --variants bn,agc,none                   the full SegNet at 256x512
  agcseg-bench --budget 12GiB --variants bn,agc         the largest minibatch that fits, the paper's comparison
  agcseg-bench --inference                              forward alone, with the norms folded into the convolutions
  agcseg-bench --frontier                               what is kept for backward, against what is computed again for it
  agcseg-bench --data                                   images/s that the cache delivers, and its share of a step
  agcseg-bench --device cuda --precision bf16 --channels-last --minibatch 1,8 --variants bn-compiled,agc-compiled

variants: every norm ("""
    + ", ".join(NORMS)
    + """);
agc-literal, the paper's formula; agc-window, agc-median and agc-trimmed, other backgrounds; agc-gems and agc-noise, in
training only; bn-folded and agc-onepass, in inference only, the norm being part of the convolution; each but gems and
noise also with -compiled (torch.compile), -graphs (the same with CUDA graphs) or -graph (all of a step as one)

columns: step = forward, backward and update, median over the rounds; time/bn, time/none = ratio to the same step with
batch normalisation or none, round by round, with its extremes; kept = MiB that autograd keeps for backward; peak = MiB
above the idle network and its data, gradients and momentum included; on CUDA also the host's milliseconds until it has
asked for all of a step, its launches of kernels and its waits for the device. A case that fails is a row that says why;
the others go on, and the exit code is 1

--frontier counts bytes and operations, and takes no times: a row for each budget, of AGC's network.options.recompute
and, for compiled variants, of torch's activation_memory_budget; kept/bn and extra FLOP are to batch normalisation as it
is; frontier.csv, frontier.md and frontier.png into --out. Default variants: """
    + ", ".join(FRONTIER)
    + """

written into the folder of --out while it measures: bench.csv, bench.md; at the end bench.png. Of --budget: budget.csv,
budget.md
"""
)
INFERENCE = ["agc-onepass", "agc", "agc-literal", "bn-folded", "bn", "none"]


@program("agcseg-bench")
def main(argv: list[str] | None = None) -> int:
    """Runs agcseg-bench; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="agcseg-bench",
        description="Measure time and memory of training steps, normalisations side by side in one run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--network", type=_names(NETWORKS), default=["segnet"], help=f"of {', '.join(NETWORKS)} (default: segnet)")
    add("--variants", type=_names(VARIANTS), help="see below (default: bn,agc,none)")
    add("--minibatch", type=_numbers, default=[1], help="such as 1,4,8 (default: 1)")
    add(
        "--precision",
        type=_precisions,
        default=["fp32"],
        help="of fp32, tf32, bf16; both: fp32 and bf16 (default: fp32)",
    )
    add("--size", type=_size, default=(256, 512), help="height x width (default: 256x512)")
    add("--width", type=float, default=1.0, help="factor on the network's widths (default: 1)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    add("--threads", type=_number, help="CPU threads (default: torch's choice)")
    add("--channels-last", action="store_true", help="images and weights in channels-last order")
    add("--rounds", type=_number, default=7, help="how often the variants take turns (default: 7)")
    add("--inference", action="store_true", help="forward only, in eval mode; times only, and other default variants")
    add("--no-memory", action="store_true", help="times only, on a CPU all in one process: a quick look")
    add("--budget", type=_bytes, help="find the largest minibatch within so much memory, such as 12GiB, instead")
    add(
        "--frontier",
        action="store_true",
        help="memory kept against arithmetic spent again, see below, instead of times",
    )
    add("--data", action="store_true", help="also measure what the cache delivers")
    add(
        "--show",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="measure nothing: one table of these, with --out a picture too",
    )
    add("--out", type=Path, help="folder of the results (default: outputs/bench; of --show none)")
    arguments = parser.parse_args(argv)
    if not arguments.show:
        arguments.out = arguments.out or Path("outputs/bench")
    try:
        return _show(arguments.show, arguments.out) if arguments.show else _bench(arguments)
    except KeyboardInterrupt:
        print("\nagcseg-bench: stopped; what was measured is in the folder of --out", file=sys.stderr)
        return 130


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = find_device(arguments.device)
    multiple = max(NETWORKS[name].multiple for name in arguments.network)
    if any(side % multiple for side in arguments.size):
        raise UserError(f"--size {arguments.size[0]}x{arguments.size[1]}: must be multiples of {multiple}")
    variants = arguments.variants or (
        INFERENCE if arguments.inference else FRONTIER if arguments.frontier else ["bn", "agc", "none"]
    )
    if arguments.frontier:  # bn first: what all are compared with
        variants = ["bn", *(variant for variant in variants if variant != "bn")]
    folded = [variant for variant in variants if variant.startswith(FOLDED)]
    if folded and not arguments.inference:
        raise UserError(f"--variants {','.join(folded)}: cannot be trained; measure them with --inference")
    trained = [variant for variant in variants if variant in TRAINED]
    if trained and arguments.inference:
        raise UserError(f"--variants {','.join(trained)}: act in training alone; measure them without --inference")
    if (arguments.budget is not None) + arguments.frontier + arguments.data > 1:
        raise UserError("--budget, --frontier and --data: only one of them at a time")
    if not 0 < arguments.width <= 100:
        raise UserError(f"--width {arguments.width:g}: must be positive, and at most 100")
    if arguments.inference and (arguments.budget is not None or arguments.data or arguments.frontier):
        raise UserError("--inference measures forward passes: leave --budget, --data and --frontier out")
    cases = [
        Case(
            network,
            variant,
            minibatch,
            precision,
            arguments.size,
            arguments.width,
            str(device),
            arguments.channels_last,
            inference=arguments.inference,
        )
        for network in arguments.network
        for minibatch in arguments.minibatch
        for precision in arguments.precision
        for variant in variants
    ]
    where = (
        f"{device_name(device)} ({platform.machine()}), torch {torch.__version__}, {date.today()}; "
        f"{arguments.size[0]}x{arguments.size[1]}, width {arguments.width:g}"
        + (", channels last" if arguments.channels_last else "")
        + (", inference" if arguments.inference else "")
    )
    print(where, flush=True)
    if arguments.budget is not None:
        return _budget(cases, arguments, where)
    if arguments.frontier:
        save = partial(write_results, arguments.out, where=where, name="frontier")
        rows = frontier_table(cases, partial(save, pictures=False))
        written = save(rows)
        print(f"{plain(rows)}\nwrote {written} into {arguments.out}")
        return int(any("failed" in row for row in rows))
    memory = not (arguments.no_memory or arguments.inference)
    rows = table(
        cases, arguments.rounds, memory, _say, lambda rows: write_results(arguments.out, rows, where, pictures=False)
    )
    notes = _delivered(rows, arguments, str(device)) if arguments.data else []
    written = write_results(arguments.out, rows, where, notes)
    print("\n".join([plain(rows), *notes, f"wrote {written} into {arguments.out}"]))
    return int(any("failed" in row for row in rows) or any(": failed" in note for note in notes))


def _delivered(rows: list[dict], arguments: argparse.Namespace, device: str) -> list[str]:
    """A line for each minibatch size."""
    notes = []
    for minibatch in arguments.minibatch:
        what = f"cache and minibatches of {minibatch}"
        try:
            speed = delivery(arguments.size, minibatch, device)
        except Exception as error:  # the steps have been measured all the same
            notes.append(f"{what}: failed ({type(error).__name__}: {error})")
            continue
        fastest = max((row.get("images_per_second", 0) for row in rows if row["minibatch"] == minibatch), default=0)
        notes.append(
            f"{what} deliver {speed:.0f} images/s with no network: {fastest / speed:.2%} of the time of the fastest "
            "step above"
        )
    return notes


def _budget(cases: list[Case], arguments: argparse.Namespace, where: str) -> int:
    if arguments.minibatch != [1]:
        raise UserError("--budget finds the minibatch: leave --minibatch out")
    rows = []
    for case in cases:
        _say(f"{case.network}, {case.variant}, {case.precision}")
        row: dict[str, Any] = {"network": case.network, "variant": case.variant, "precision": case.precision}
        try:
            row["largest"], row["how"] = largest_minibatch(case, arguments.budget)
        except Failed as failed:
            row["failed"] = str(failed)
        rows.append(row)
        title = f"{where}; at most {arguments.budget / 2**30:g} GiB for torch"
        write_results(arguments.out, rows, title, name="budget")
    print(plain(rows))
    print(f"wrote budget.csv and budget.md into {arguments.out}")
    return int(any("failed" in row for row in rows))


def _show(folders: list[Path], out: Path | None) -> int:
    """One table and one picture of what several calls have measured."""
    if out and len(folders) > 1 and out.resolve() in [folder.resolve() for folder in folders]:
        raise UserError(f"--out {out}: the table of all would replace what was measured there; give another folder")
    missing = [str(folder) for folder in folders if not (folder / "bench.csv").exists()]
    if len(missing) == len(folders):
        raise UserError(f"--show: no bench.csv in {', '.join(missing)}")
    if missing:
        print(f"agcseg-bench: no bench.csv in {', '.join(missing)}: left out", file=sys.stderr)
    found = [read_results(folder / "bench.csv") for folder in folders if str(folder) not in missing]
    rows = [row for rows, _ in found for row in rows]
    where = " | ".join(dict.fromkeys(where for _, where in found))
    if out:
        write_results(out, rows, where)
    print(f"{where}\n\n{markdown(rows)}")
    return 0


def _say(line: str) -> None:
    if on_terminal(sys.stderr):
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def _names(known):
    def names(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not known; choose from {', '.join(known)}")
        return text.split(",")

    return names


def _precisions(text: str) -> list[str]:
    return ["fp32", "bf16"] if text == "both" else _names(("fp32", "tf32", "bf16"))(text)


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a number, at least 1")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_number(part) for part in text.split(",")]


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text}: give height x width, such as 256x512")
    return int(height), int(width)


def _bytes(text: str) -> int:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("GB", 10**9), ("MB", 10**6)):
        if re.fullmatch(rf"[0-9]*\.?[0-9]+{unit}", text):
            return int(float(text[: -len(unit)]) * factor)
    raise argparse.ArgumentTypeError(f"{text}: give a number with GiB, MiB, GB or MB, such as 12GiB")


if __name__ == "__main__":
    raise SystemExit(main())
