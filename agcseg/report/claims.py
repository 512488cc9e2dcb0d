"""The paper's seven claims, and what the runs say about each.

A claim has parts, each an estimate with a 95 % interval and the band that it must lie in: the part is supported if the
whole interval is inside, not supported if all of it is outside, and otherwise there is not enough data. All parts must
hold for a claim to be supported; one that does not hold is enough against it. Intervals are not corrected for their
number. A part that may not decide (one seed, unfinished runs) says where it leans.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from agcseg.errors import UserError
from agcseg.figure1 import SCALED, Setting
from agcseg.report import measures
from agcseg.report.compare import Cells, Estimate, Seeds, by_images, compare, label, relative, unlike
from agcseg.report.read import NAMES, Run
from agcseg.report.statistics import NOT_ENOUGH, bootstrap, combine, decide, spikes, t_interval

# About a tenth of the paper's errors; five times the differences that it calls almost identical (0.16 and 0.19 points),
# half of the one that it calls considerable (2 points).
MARGIN = 1.0
SLIGHTLY = 0.25  # "slightly higher" loss: by less than a quarter of it
INSIDE = 0.95  # share of λ in [0, 2]; the paper itself saw some below
ABOUT_ONE, NEAR_ZERO = (0.75, 1.25), (-0.25, 0.25)  # the mean λ of a layer
MOVED = 0.1  # λ in half of the layers has left its start by this much; before that it only tells how it started
FASTER, LIGHTER = 1.15, 0.9  # half of the paper's gain in speed; at least a tenth less memory
FEWEST_EPOCHS = 5  # to time a run
FEWEST_STEPS = 500  # to count a run's spikes

Condition = tuple[str, int, float]  # network, minibatch and rate: what the two sides of BN against AGC share


class Part(NamedTuple):
    text: str
    verdict: str
    leaning: str  # what the estimate would say, if it could decide
    known: bool  # whether there is an estimate


class Verdict(NamedTuple):
    """What the runs say about one claim of the paper."""

    number: int
    claim: str
    parts: list[Part]

    @property
    def verdict(self) -> str:
        """One of "supported", "not supported" and "not enough data"."""
        return combine([part.verdict for part in self.parts])

    @property
    def leaning(self) -> str:
        """With "not enough data": "supported" or "not supported", if all parts together lean there; else empty."""
        leaning = combine([part.leaning for part in self.parts])
        return leaning if self.verdict == NOT_ENOUGH and leaning != NOT_ENOUGH else ""

    @property
    def answer(self) -> str:
        """The verdict, and where the runs lean that cannot give one."""
        return f"{self.verdict} (leans to {self.leaning})" if self.leaning else self.verdict


def verdicts(cells: Cells, margin: float = MARGIN, figure1: bool = True) -> list[Verdict]:
    """What runs say about the claims of the paper.

    Args:
        cells: of `agcseg.report.compare.cells`.
        margin: points of pixel error within which two errors count as equal.
        figure1: whether to judge the paper's own comparisons, missing runs or not; else every pair of BN and AGC at the
            same minibatch and rate that is there, and only claims about which some run says something.

    Raises:
        UserError: the margin is not a positive number.
    """
    if not 0 < margin < math.inf:
        raise UserError(f"margin {margin:g}: must be positive, in points of pixel error (1 is usual)")
    if figure1:
        pairs, timed = [("segnet", 4, 0.08), ("classnet", 4, 0.08)], [("segnet", 8, 0.16)]
        shown = [Setting(network, "agc", minibatch, rate) for network, minibatch, rate in pairs]
    else:
        shown = [of for of in cells if of.norm == "agc"]
        pairs = [(of.network, of.minibatch, of.rate) for of in shown if of._replace(norm="bn") in cells]
        timed = pairs
    claims = {
        "AGC equals batch normalisation (BN) in final error": _equal_errors(cells, pairs, margin),
        "with the rate scaled by the minibatch, AGC's error curves coincide, and BN's do not at minibatch 1":
            _minibatches(cells, margin),
        "at minibatch 8, AGC's best rate is 0.16": _sweet_spot(cells),
        "AGC's validation loss is slightly higher": _losses(cells, pairs),
        "training spikes are more frequent and larger with BN": _spikes(cells, pairs),
        "λ is between 0 and 2, about 1 in the deepest layers, near 0 at the classifier": _lambda(cells, shown),
        "AGC is faster and takes significantly less memory": _costs(cells, timed),
    }  # fmt: skip
    answers = [Verdict(number, *claim) for number, claim in enumerate(claims.items(), start=1)]
    return [answer for answer in answers if figure1 or any(part.known for part in answer.parts)]


def _judge(what: str, estimate: Estimate | str, band: tuple[float, float], wanted: str, form: str = "+.2f") -> Part:
    """A part of a claim: `estimate` must lie in `band`, which `wanted` puts into words."""
    if isinstance(estimate, str):
        return Part(f"{NOT_ENOUGH}: {what}: {estimate}", NOT_ENOUGH, NOT_ENOUGH, False)
    value, low, high, basis, weak, leans = estimate
    known = not math.isnan(low)
    leaning = decide((low, high) if known else (value, value), band) if leans else NOT_ENOUGH
    verdict = NOT_ENOUGH if weak else leaning
    range_of = "95 % interval" if math.isfinite(high - low) else "from seed to seed"  # diverged runs are infinitely bad
    interval = f", {range_of} {low:{form}} to {high:{form}}" if known else ""
    why = f" ({weak})" if weak else ""
    text = f"{verdict}{why}: {what}: {value:{form}}{interval} ({basis}); expected {wanted}"
    return Part(text, verdict, leaning, True)


def _missing(cells: Cells, *wanted: Setting) -> str:
    lacking = [label(of) for of in wanted if of not in cells]
    return f"needs {' and '.join(lacking)}" if lacking else ""


def _pair(cells: Cells, ours: Setting, theirs: Setting, *arguments, **options) -> Estimate | str:
    return _missing(cells, ours, theirs) or compare(cells[ours], cells[theirs], *arguments, **options)


def _both(condition: Condition) -> tuple[Setting, Setting, str]:
    """AGC, BN, and what they share in words."""
    network, minibatch, rate = condition
    agc, bn = (Setting(network, norm, minibatch, rate) for norm in ("agc", "bn"))
    return agc, bn, f"{NAMES.get(network, network)}, minibatch {minibatch}, rate {rate:g}"


def _equal_errors(cells: Cells, pairs: list[Condition], margin: float) -> list[Part]:
    parts = []
    for agc, bn, where in map(_both, pairs):
        estimate = _pair(cells, agc, bn, measures.final_error, resample=by_images(0))
        wanted = f"within ±{margin:g}"
        parts.append(_judge(f"{where}: error of AGC − BN, points", estimate, (-margin, margin), wanted))
    return parts


def _minibatches(cells: Cells, margin: float) -> list[Part]:
    one, four, eight = SCALED
    within, above = ((-margin, margin), f"within ±{margin:g}"), ((margin, math.inf), f"above {margin:g}")
    parts = []
    for norm, ours, theirs, wanted in (
        ("agc", one, four, within),
        ("agc", eight, four, within),
        ("agc", one, eight, within),
        ("bn", one, four, above),
    ):
        settings = Setting("segnet", norm, *ours), Setting("segnet", norm, *theirs)
        what = f"SegNet {NAMES[norm]}, error at minibatch {ours[0]} − {theirs[0]}, points"
        end = _pair(cells, *settings, measures.final_error, resample=by_images(0))
        throughout = _pair(cells, *settings, measures.mean_error)
        parts += [_judge(f"{what}, at the end", end, *wanted)]
        parts += [_judge(f"{what}, mean over the epochs", throughout, *wanted)]
    return parts


def _sweet_spot(cells: Cells) -> list[Part]:
    best, parts = Setting("segnet", "agc", 8, 0.16), []
    for rate in (0.08, 0.32, 0.64):
        estimate = _pair(cells, best._replace(rate=rate), best, measures.final_error, resample=by_images(0))
        parts.append(_judge(f"SegNet AGC, error at rate {rate:g} − 0.16, points", estimate, (0, math.inf), "above 0"))
    return parts


def _losses(cells: Cells, pairs: list[Condition]) -> list[Part]:
    parts = []
    for agc, bn, where in map(_both, pairs):
        estimate = _pair(cells, agc, bn, measures.final_loss, relative, by_images(1, relative))
        wanted = f"above 0 and below {SLIGHTLY:.0%}"
        parts.append(_judge(f"{where}: loss of AGC ÷ BN − 1", estimate, (0, SLIGHTLY), wanted, "+.1%"))
    return parts


def _spikes(cells: Cells, pairs: list[Condition]) -> list[Part]:
    parts = []
    for agc, bn, where in map(_both, pairs):
        often = _pair(cells, bn, agc, measures.spike_rate, resample=_by_epochs, source="steps.npy")
        large = _pair(cells, bn, agc, measures.spike_size, source="steps.npy")
        often, large = (_if_long_enough(estimate, cells, bn, agc) for estimate in (often, large))
        counted = "" if isinstance(often, str) else f" ({_counted(cells[bn], 'BN')}; {_counted(cells[agc], 'AGC')})"
        parts.append(_judge(f"{where}: spikes per 1000 steps, BN − AGC{counted}", often, (0, math.inf), "above 0"))
        parts.append(_judge(f"{where}: size of a spike in doublings, BN − AGC", large, (0, math.inf), "above 0"))
    return parts


def _by_epochs(ours: Run, theirs: Run, epoch: int) -> tuple[float, float, str]:
    """For `compare`: resampling of epochs, paired."""
    counts = [measures.spikes_per_epoch(run, epoch) for run in (ours, theirs)]
    epochs = min(map(len, counts))
    more = (counts[0][-epochs:] - counts[1][-epochs:]) * 1000 / ours.steps.shape[1]
    return *bootstrap(lambda drawn: more[drawn].mean(1), epochs), f"one seed; over {epochs} epochs, not over trainings"


def _if_long_enough(estimate: Estimate | str, cells: Cells, *settings: Setting) -> Estimate | str:
    if isinstance(estimate, str):
        return estimate
    runs = [run for of in settings for run in cells[of].values() if run.state != "diverged"]
    steps = min((measures.step_losses(run, run.last_epoch).size for run in runs), default=FEWEST_STEPS)
    short = f"a run has only {steps} steps, fewer than {FEWEST_STEPS}"
    return estimate._replace(weak=short, leans=False) if steps < FEWEST_STEPS else estimate


def _counted(seeds: Seeds, norm: str) -> str:
    """Such as "BN 12 spikes in 3000 steps, on average 5.1 and up to 9.0 times the median"."""
    found = [measures.step_losses(run, run.last_epoch).ravel() for run in seeds.values()]
    sizes = np.concatenate([spikes(losses)[1] for losses in found])
    counted = f"{norm}: {len(sizes)} in {sum(map(len, found))} steps"
    if not len(sizes):
        return counted
    return f"{counted}, on average {2 ** np.log2(sizes).mean():.1f} and up to {sizes.max():.1f} times the median"


def _lambda(cells: Cells, settings: list[Setting]) -> list[Part]:
    wanted = (
        ("share of λ in [0, 2]", measures.lambda_inside, (INSIDE, math.inf), f"above {INSIDE:g}"),
        ("mean λ of the deepest layers", measures.lambda_deepest, ABOUT_ONE, "between {} and {}".format(*ABOUT_ONE)),
        ("mean λ before the classifier", measures.lambda_last, NEAR_ZERO, "between {} and {}".format(*NEAR_ZERO)),
        ("correlation of λ with depth", measures.lambda_correlation, (0, math.inf), "above 0"),
    )
    parts = []
    for of in settings:
        for what, measure, *band in wanted:
            estimate = _missing(cells, of) or _of_layers(cells[of], measure)
            parts.append(_judge(f"{label(of)}: {what}", estimate, *band, ".2f"))
    return parts


def _of_layers(seeds: Seeds, measure: Callable[[Run], float]) -> Estimate | str:
    """Mean over the seeds that did not diverge."""
    runs = [run for run in seeds.values() if run.state != "diverged"]
    lacking = [run.name for run in runs if run.layers is None]
    if lacking or not runs:
        return f"needs layers.csv of {', '.join(lacking)}" if runs else "every run diverged"
    values = [measure(run) for run in runs]
    if not np.isfinite(values).all():
        return "there is no such layer"
    reached, planned = sorted({run.last_epoch for run in runs}), runs[0].epochs
    unfinished = reached[0] < planned
    weak = "one seed" if len(runs) == 1 else "the runs are unfinished" if unfinished else ""
    still = any(measures.lambda_moved(run.layers) < MOVED for run in runs)
    if still:
        weak = f"λ has hardly left its start, in half of the layers by less than {MOVED:g}"
    interval, basis = (math.nan, math.nan), "one seed, no interval"
    if len(runs) > 1:
        interval, basis = t_interval(values), f"{len(runs)} seeds"
    basis += f", at epoch {' and '.join(map(str, reached))} of {planned}" * unfinished
    return Estimate(float(np.mean(values)), *interval, basis, weak, not still)


def _costs(cells: Cells, pairs: list[Condition]) -> list[Part]:
    parts = []
    for agc, bn, where in map(_both, pairs):
        faster = lighter = _missing(cells, agc, bn) or _unlike(cells[agc], cells[bn])
        if not faster:
            faster, lighter = (_ratio(cells[agc], cells[bn], of) for of in (measures.speed, measures.memory))
            one = next(iter(cells[agc].values()))
            where += f", {one.device}, {one.settings.get('network.implementation')} AGC"
        speed, memory = (FASTER, math.inf), (-math.inf, LIGHTER)
        parts.append(
            _judge(f"{where}: images/s, AGC ÷ BN", faster, speed, f"above {FASTER} (paper: 1.3 at minibatch 8)", ".2f")
        )
        parts.append(_judge(f"{where}: peak memory, AGC ÷ BN", lighter, memory, f"below {LIGHTER}", ".2f"))
    return parts


def _unlike(agc: Seeds, bn: Seeds) -> str:
    """Why times and memory cannot be compared, or empty."""
    why = unlike([*agc.values(), *bn.values()])
    return why or ("" if agc.keys() & bn.keys() else "needs runs with the same seed on both sides")


def _ratio(agc: Seeds, bn: Seeds, measure: Callable[[Run], float]) -> Estimate | str:
    """One pair of runs decides too: time and memory do not depend on how the training goes."""
    pairs = [(agc[seed], bn[seed]) for seed in sorted(agc.keys() & bn.keys())]
    pairs = [pair for pair in pairs if all(measure(run) > 0 for run in pair)]  # not those that failed at once
    ratios = [measure(ours) / measure(theirs) for ours, theirs in pairs]
    if not ratios:
        return "needs images_per_second and peak_memory_mib in metrics.csv"
    epochs = min(len(measures.speeds(run)) for pair in pairs for run in pair)
    weak = f"fewer than {FEWEST_EPOCHS} epochs were timed" if epochs < FEWEST_EPOCHS else ""
    if measure is measures.speed and not weak:
        weak = measures.unsteady([ours for ours, _ in pairs]) or measures.unsteady([theirs for _, theirs in pairs])
    if len(ratios) > 1:
        return Estimate(float(np.mean(ratios)), *t_interval(ratios), f"{len(ratios)} seeds, paired", weak)
    if measure is measures.memory:
        return Estimate(ratios[0], math.nan, math.nan, "one seed, a peak and no sample", weak)
    ours, theirs = (measures.speeds(run)[-epochs:] for run in pairs[0])
    interval = bootstrap(lambda drawn: np.median(ours[drawn], 1) / np.median(theirs[drawn], 1), epochs)
    return Estimate(ratios[0], *interval, f"one seed, over {epochs} epochs", weak)
