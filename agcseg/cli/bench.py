"""The program agcseg-bench."""

import argparse
import csv
import io
import platform
import sys
from datetime import date
from pathlib import Path

import torch
from matplotlib.figure import Figure

from agcseg.bench import FOLDED, TRAINED, VARIANTS, Case, delivery, largest_minibatch, table
from agcseg.errors import UserError
from agcseg.networks import NETWORKS
from agcseg.nn import NORMS
from agcseg.record.files import write
from agcseg.training.machine import device_name, find_device

EPILOG = (
    """\
examples:
  agcseg-bench --width 0.25 --size 64x128               a quick look, a minute on a CPU
  agcseg-bench --variants bn,agc,none                   the full SegNet at 256x512
  agcseg-bench --budget 12GiB --variants bn,agc         the largest minibatch that fits, the paper's comparison
  agcseg-bench --inference                              forward alone, with the norms folded into the convolutions
  agcseg-bench --data                                   images/s that the cache delivers, and its share of a step
  agcseg-bench --device cuda --precision bf16 --channels-last --minibatch 1,8 --variants bn-compiled,agc-compiled

variants: every norm ("""
    + ", ".join(NORMS)
    + """);
agc-literal, the paper's formula; agc-window, agc-median and agc-trimmed, other backgrounds; agc-gems and agc-noise, in
training only; bn-folded and agc-onepass, in inference only, the norm being part of the convolution; each but gems and
noise also with -compiled (torch.compile) or -graphs (the same with CUDA graphs)

columns: step = forward, backward and update, median over the rounds; time/bn, time/none = ratio to the same step with
batch normalisation or none, round by round, with its extremes; kept = MiB that autograd keeps for backward; peak = MiB
above the idle network and its data, gradients and momentum included

written into the folder of --out: bench.csv, bench.md, bench.png
"""
)
INFERENCE = ["agc-onepass", "agc", "agc-literal", "bn-folded", "bn", "none"]
COLUMNS = (  # key, heading, format
    ("network", "network", ""), ("variant", "variant", ""), ("minibatch", "minibatch", ""),
    ("precision", "precision", ""),
    ("step_ms", "step ms", ".0f"), ("time_to_bn", "time/bn", ".3f"), ("time_to_none", "time/none", ".3f"),
    ("time_to_bn-folded", "time/bn-folded", ".3f"),
    ("images_per_second", "images/s", ".2f"), ("kept_mib", "kept MiB", ".1f"), ("kept_to_bn", "kept/bn", ".3f"),
    ("peak_mib", "peak MiB", ".0f"), ("peak_to_bn", "peak/bn", ".3f"), ("parameters", "parameters", ","),
    ("gflop", "GFLOP", ".1f"), ("tflop_per_second", "TFLOP/s", ".2f"),
)  # fmt: skip


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
    add("--precision", type=_names(("fp32", "bf16")), default=["fp32"], help="fp32, bf16 or both (default: fp32)")
    add("--size", type=_size, default=(256, 512), help="height x width (default: 256x512)")
    add("--width", type=float, default=1.0, help="factor on the network's widths (default: 1)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--channels-last", action="store_true", help="images and weights in channels-last order")
    add("--rounds", type=int, default=7, help="how often the variants take turns (default: 7)")
    add("--inference", action="store_true", help="forward only, in eval mode; times only, and other default variants")
    add("--no-memory", action="store_true", help="times only")
    add("--budget", type=_bytes, help="find the largest minibatch within so much memory, such as 12GiB, instead")
    add("--data", action="store_true", help="also measure what the cache delivers")
    add("--out", type=Path, default=Path("outputs/bench"), help="folder of the results (default: outputs/bench)")
    arguments = parser.parse_args(argv)
    try:
        return _bench(arguments)
    except (UserError, OSError) as error:
        print(f"agcseg-bench: error: {error}", file=sys.stderr)
        return 2


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = find_device(arguments.device)
    multiple = max(NETWORKS[name].multiple for name in arguments.network)
    if any(side % multiple for side in arguments.size):
        raise UserError(f"--size {arguments.size[0]}x{arguments.size[1]}: must be multiples of {multiple}")
    variants = arguments.variants or (INFERENCE if arguments.inference else ["bn", "agc", "none"])
    folded = [variant for variant in variants if variant.startswith(FOLDED)]
    if folded and not arguments.inference:
        raise UserError(f"--variants {','.join(folded)}: cannot be trained; measure them with --inference")
    trained = [variant for variant in variants if variant in TRAINED]
    if trained and arguments.inference:
        raise UserError(f"--variants {','.join(trained)}: act in training alone; measure them without --inference")
    if arguments.inference and (arguments.budget or arguments.data):
        raise UserError("--inference measures forward passes: leave --budget and --data out")
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
    if arguments.budget:
        return _budget(cases, arguments, where)
    memory = not (arguments.no_memory or arguments.inference)
    rows = table(cases, arguments.rounds, memory, _say)
    print(_text(rows))
    notes = []
    if arguments.data:
        for minibatch in arguments.minibatch:
            speed = delivery(arguments.size, minibatch, str(device))
            fastest = max(row["images_per_second"] for row in rows if row["minibatch"] == minibatch)
            notes.append(
                f"cache and minibatches of {minibatch} deliver {speed:.0f} images/s with no network: "
                f"{fastest / speed:.2%} of the time of the fastest step above"
            )
    print("\n".join(notes))
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(out / "bench.csv", text.getvalue())
    write(out / "bench.md", f"{where}\n\n{_markdown(rows)}\n" + "".join(f"\n{note}\n" for note in notes))
    picture = io.BytesIO()
    _bars(rows, where).savefig(picture, format="png", dpi=110)
    write(out / "bench.png", picture.getvalue())
    print("\n".join(f"wrote {out / name}" for name in ("bench.csv", "bench.md", "bench.png")))
    return 0


def _budget(cases: list[Case], arguments: argparse.Namespace, where: str) -> int:
    if arguments.minibatch != [1]:
        raise UserError("--budget finds the minibatch: leave --minibatch out")
    rows = []
    for case in cases:
        _say(f"{case.network}, {case.variant}, {case.precision}")
        largest, how = largest_minibatch(case, arguments.budget)
        rows.append({"network": case.network, "variant": case.variant, "precision": case.precision, "largest": largest})
        print(f"{case.network} {case.variant} {case.precision}: largest minibatch {largest} ({how})", flush=True)
    lines = [f"| {r['network']} | {r['variant']} | {r['precision']} | {r['largest']} |" for r in rows]
    head = ["| network | variant | precision | largest minibatch |", "| --- | --- | --- | ---: |"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    title = f"{where}; budget {arguments.budget / 2**30:g} GiB, {how}"
    write(arguments.out / "budget.md", "\n".join([title, "", *head, *lines]) + "\n")
    print(f"wrote {arguments.out / 'budget.md'}")
    return 0


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


def _text(rows: list[dict]) -> str:
    lines = _cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


def _markdown(rows: list[dict]) -> str:
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
            range(len(rows)), [row[key] for row in rows], color=[f"C{variants.index(row['variant'])}" for row in rows]
        )
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
        axes.margins(x=0.18)
        axes.set_title(title, fontsize=10)
        axes.set_yticks(range(len(rows)), names, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.suptitle(where, fontsize=8)
    return figure


def _say(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def _names(known):
    def names(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not known; choose from {', '.join(known)}")
        return text.split(",")

    return names


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return numbers


def _size(text: str) -> tuple[int, int]:
    height, width = (int(part) for part in text.lower().split("x"))
    return height, width


def _bytes(text: str) -> int:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("GB", 10**9), ("MB", 10**6)):
        if text.endswith(unit):
            return int(float(text[: -len(unit)]) * factor)
    raise argparse.ArgumentTypeError(f"{text}: give a number with GiB, MiB, GB or MB, such as 12GiB")


if __name__ == "__main__":
    raise SystemExit(main())
