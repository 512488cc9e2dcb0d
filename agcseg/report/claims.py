"""The paper's seven claims, and what the runs say about each.

A claim has parts, each an estimate with a 95 % interval and the band that it must lie in: the part is supported if the
whole interval is inside, not supported if all of it is outside, and otherwise there is not enough data. All parts must
hold for a claim to be supported; one that does not hold is enough against it. Intervals are not corrected for their
number. A part that may not decide (one seed, unfinished runs) says where it leans.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from agcseg.errors import UserError
from agcseg.figure1 import SCALED, Setting
from agcseg.report import measures
from agcseg.report.compare import Cells, Estimate, Seeds, by_images, compare, label, relative, unlike
from agcseg.report.measures import NOT_ENOUGH, bootstrap, combine, decide, spikes, t_interval
from agcseg.report.read import NAMES, Run

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

CLAIMS = (
    "AGC equals batch normalisation (BN) in final error",
    "with the rate scaled by the minibatch, AGC's error curves coincide, and BN's do not at minibatch 1",
    "at minibatch 8, AGC's best rate is 0.16",
    "AGC's validation loss is slightly higher",
    "training spikes are more frequent and larger with BN",
    "λ is between 0 and 2, about 1 in the deepest layers, near 0 at the classifier",
    "AGC is faster and takes significantly less memory",
)


Condition = tuple[str, int, float]  # network, minibatch and rate: what the two sides of BN against AGC share

ABOVE_0 = (0, math.inf), "above 0"
ERRORS = partial(compare, measure=measures.final_error, resample=by_images("wrong", scale=100))
LOSSES = partial(compare, measure=measures.final_loss, gap=relative, resample=by_images("loss", relative))


class Part(NamedTuple):
    """One comparison that a claim rests on."""

    what: str
    estimate: Estimate | str  # or what is missing for one
    band: tuple[float, float]  # in which it must lie
    wanted: str  # the band in words
    form: str = "+.2f"

    @property
    def known(self) -> bool:
        return isinstance(self.estimate, Estimate)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the estimate; where it has none, the value twice."""
        assert isinstance(self.estimate, Estimate)
        value, low, high, *_ = self.estimate
        return (value, value) if math.isnan(low) else (low, high)

    @property
    def leaning(self) -> str:
        """What the estimate would say, if it could decide."""
        return (
            decide(self.interval, self.band)
            if isinstance(self.estimate, Estimate) and self.estimate.leans
            else NOT_ENOUGH
        )

    @property
    def verdict(self) -> str:
        return NOT_ENOUGH if isinstance(self.estimate, str) or self.estimate.weak else self.leaning

    @property
    def measured(self) -> str:
        """Such as "+0.12 (-0.30 to +0.51)": the estimate and its interval, or what is missing."""
        if isinstance(self.estimate, str):
            return self.estimate
        value, low, high, *_ = self.estimate
        return f"{value:{self.form}}" + ("" if math.isnan(low) else f" ({low:{self.form}} to {high:{self.form}})")

    @property
    def basis(self) -> str:
        """What the interval is over, such as "3 seeds, paired"."""
        return self.estimate.basis if isinstance(self.estimate, Estimate) else ""

    @property
    def answer(self) -> str:
        """The verdict, and why there is none."""
        weak = self.estimate.weak if isinstance(self.estimate, Estimate) else ""
        return self.verdict + f": {weak}" * bool(weak)


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
    pairs, timed = [("segnet", 4, 0.08), ("classnet", 4, 0.08)], [("segnet", 8, 0.16)]
    agc = [Setting(network, "agc", minibatch, rate) for network, minibatch, rate in pairs]
    if not figure1:
        agc = [of for of in cells if of.norm == "agc"]
        timed = pairs = [(of.network, of.minibatch, of.rate) for of in agc if of._replace(norm="bn") in cells]
    answers = [Verdict(number, claim, []) for number, claim in enumerate(CLAIMS, start=1)]
    asked = [
        *_of_pairs(pairs, margin),
        *_of_minibatches(margin),
        *_of_rates(),
        *_of_lambda(agc),
        *_of_costs(cells, timed),
    ]
    for number, what, how, settings, *expected in asked:
        lacking = [label(of) for of in settings if of not in cells]
        estimate = f"needs {' and '.join(lacking)}" if lacking else how(*(cells[of] for of in settings))
        answers[number - 1].parts.append(Part(what, estimate, *expected))
    return [answer for answer in answers if figure1 or any(part.known for part in answer.parts)]


# What is asked of the runs: number of the claim, what is measured, how, of which settings; band, band in words, format.


def _of_pairs(pairs: list[Condition], margin: float) -> Iterator[tuple]:
    slightly = (0, SLIGHTLY), f"above 0 and below {SLIGHTLY:.0%}", "+.1%"
    for agc, bn, where in map(_both, pairs):
        often, large = f"{where}: spikes per 1000 steps, BN − AGC", f"{where}: size of a spike in doublings, BN − AGC"
        yield 1, f"{where}: error of AGC − BN, points", ERRORS, (agc, bn), (-margin, margin), f"within ±{margin:g}"
        yield 4, f"{where}: loss of AGC ÷ BN − 1", LOSSES, (agc, bn), *slightly
        yield 5, often, partial(_spikes, measures.spike_rate), (bn, agc), *ABOVE_0
        yield 5, large, partial(_spikes, measures.spike_size), (bn, agc), *ABOVE_0


def _of_minibatches(margin: float) -> Iterator[tuple]:
    one, four, eight = SCALED
    within, above = ((-margin, margin), f"within ±{margin:g}"), ((margin, math.inf), f"above {margin:g}")
    table = (
        ("agc", one, four, within),
        ("agc", eight, four, within),
        ("agc", one, eight, within),
        ("bn", one, four, above),
    )
    for norm, ours, theirs, expected in table:
        settings = Setting("segnet", norm, *ours), Setting("segnet", norm, *theirs)
        what = f"SegNet {NAMES[norm]}, error at minibatch {ours[0]} − {theirs[0]}, points"
        yield 2, f"{what}, at the end", ERRORS, settings, *expected
        yield 2, f"{what}, mean over the epochs", partial(compare, measure=measures.mean_error), settings, *expected


def _of_rates() -> Iterator[tuple]:
    best = Setting("segnet", "agc", 8, 0.16)
    for rate in (0.08, 0.32, 0.64):
        what = f"SegNet AGC, error at rate {rate:g} − 0.16, points"
        yield 3, what, ERRORS, (best._replace(rate=rate), best), *ABOVE_0


def _of_lambda(settings: list[Setting]) -> Iterator[tuple]:
    table = (
        ("share of λ in [0, 2]", measures.lambda_inside, (INSIDE, math.inf), f"above {INSIDE:g}"),
        ("mean λ of the deepest layers", measures.lambda_deepest, ABOUT_ONE, "{} to {}".format(*ABOUT_ONE)),
        ("mean λ before the classifier", measures.lambda_last, NEAR_ZERO, "{} to {}".format(*NEAR_ZERO)),
        ("correlation of λ with depth", measures.lambda_correlation, *ABOVE_0),
    )
    for of in settings:
        for what, measure, *expected in table:
            yield 6, f"{label(of)}: {what}", partial(_layers, measure), (of,), *expected, ".2f"


def _of_costs(cells: Cells, pairs: list[Condition]) -> Iterator[tuple]:
    faster = (FASTER, math.inf), f"above {FASTER} (paper: 1.3 at minibatch 8)", ".2f"
    for agc, bn, where in map(_both, pairs):
        yield 7, f"{where}: images/s, AGC ÷ BN", partial(_ratio, measures.speed), (agc, bn), *faster
        for what, memory in _memories([*cells.get(agc, {}).values(), *cells.get(bn, {}).values()]):
            lighter = (-math.inf, LIGHTER), f"below {LIGHTER}", ".2f"
            yield 7, f"{where}: {what}, AGC ÷ BN", partial(_ratio, memory), (agc, bn), *lighter


def _both(condition: Condition) -> tuple[Setting, Setting, str]:
    """AGC, BN, and what they share in words."""
    network, minibatch, rate = condition
    agc, bn = (Setting(network, norm, minibatch, rate) for norm in ("agc", "bn"))
    return agc, bn, f"{NAMES.get(network, network)}, minibatch {minibatch}, rate {rate:g}"


def _spikes(measure: Callable, bn: Seeds, agc: Seeds) -> Estimate | str:
    """As `compare`; with one seed the rate is resampled by epochs, paired. Short runs say nothing."""

    def by_epochs(ours: Run, theirs: Run, epoch: int) -> tuple[float, float, str]:
        counts = [measures.spikes_per_epoch(run, epoch) for run in (ours, theirs)]
        epochs = min(map(len, counts))
        more = (counts[0][-epochs:] - counts[1][-epochs:]) * 1000 / ours.steps.shape[1]
        interval = bootstrap(lambda drawn: drawn.mean(-1), more)
        return *interval, f"one seed; over {epochs} epochs, not over trainings"

    resample = by_epochs if measure is measures.spike_rate else None
    estimate = compare(bn, agc, measure, resample=resample, source="steps.npy")
    if isinstance(estimate, str):
        return estimate
    if measure is measures.spike_rate:
        estimate = estimate._replace(basis=f"{estimate.basis}; BN: {_counted(bn)}; AGC: {_counted(agc)}")
    runs = [run for seeds in (bn, agc) for run in seeds.values() if run.held]
    steps = min((measures.step_losses(run, run.last_epoch).size for run in runs), default=FEWEST_STEPS)
    short = f"a run has only {steps} steps, fewer than {FEWEST_STEPS}"
    return estimate._replace(weak=short, leans=False) if steps < FEWEST_STEPS else estimate


def _counted(seeds: Seeds) -> str:
    """Such as "12 spikes in 3000 steps, on average 5.1 and up to 9.0 times the median"."""
    found = [measures.step_losses(run, run.last_epoch).ravel() for run in seeds.values()]
    sizes = np.concatenate([spikes(losses)[1] for losses in found])
    counted = f"{len(sizes)} in {sum(map(len, found))} steps"
    if not len(sizes):
        return counted
    return f"{counted}, on average {2 ** np.log2(sizes).mean():.1f} and up to {sizes.max():.1f} times the median"


def _layers(measure: Callable[[Run], float], seeds: Seeds) -> Estimate | str:
    """Mean over the seeds that did not diverge."""
    runs = [run for run in seeds.values() if run.held]
    lacking = [run.name for run in runs if run.layers is None]
    if lacking or not runs:
        return f"needs layers.csv of {', '.join(lacking)}" if runs else "every run diverged"
    values = [measure(run) for run in runs]
    if not np.isfinite(values).all():
        return "there is no such layer"
    reached, planned = sorted({run.last_epoch for run in runs}), runs[0].epochs
    unfinished = reached[0] < planned
    weak = "one seed" if len(runs) == 1 else "the runs are unfinished" if unfinished else ""
    still = any(measures.lambda_moved(run.layers) < MOVED for run in runs if run.layers is not None)
    if still:
        weak = f"λ has hardly left its start, in half of the layers by less than {MOVED:g}"
    several = len(runs) > 1
    interval, basis = t_interval(values) if several else (math.nan, math.nan), f"{len(runs)} seeds"
    basis = basis if several else "one seed, no interval"
    basis += f", at epoch {' and '.join(map(str, reached))} of {planned}" * unfinished
    return Estimate(float(np.mean(values)), *interval, basis, weak, not still)


def _memories(runs: list[Run]) -> list[tuple[str, Callable[[Run], float]]]:
    """What tells the memory of training, in runs that recorded it; of older ones the peak of the whole process."""
    if any(math.isfinite(measures.training_memory(run)) for run in runs):
        kept = ("memory kept for backward", measures.kept_memory)
        return [("peak memory that training adds", measures.training_memory), kept]
    return [("peak memory" + " of the whole process" * any(_on_cpu(run) for run in runs), measures.process_memory)]


def _on_cpu(run: Run) -> bool:
    return run.device.startswith("CPU")


def _ratio(measure: Callable[[Run], float], agc: Seeds, bn: Seeds) -> Estimate | str:
    """One pair of runs decides too: time and memory do not depend on how the training goes."""
    if why := unlike([*agc.values(), *bn.values()]):
        return why
    pairs = [(agc[seed], bn[seed]) for seed in sorted(agc.keys() & bn.keys())]
    if not pairs:
        return "needs runs with the same seed on both sides"
    pairs = [pair for pair in pairs if all(measure(run) > 0 for run in pair)]  # not those that failed at once
    ratios = [measure(ours) / measure(theirs) for ours, theirs in pairs]
    if not ratios:
        return f"needs {'images_per_second' if measure is measures.speed else 'the memory'} of both sides"
    epochs = min(len(measures.speeds(run)) for pair in pairs for run in pair)
    weak = f"fewer than {FEWEST_EPOCHS} epochs were timed" if epochs < FEWEST_EPOCHS else ""
    if measure is measures.speed and not weak:
        weak = measures.unsteady([ours for ours, _ in pairs]) or measures.unsteady([theirs for _, theirs in pairs])
    if measure is measures.process_memory and any(_on_cpu(run) for pair in pairs for run in pair):
        weak = "older runs measured the whole process, Python and torch included"
    on = f" on {pairs[0][0].device}, {pairs[0][0].settings.get('network.implementation')} AGC"
    if len(ratios) > 1:
        return Estimate(float(np.mean(ratios)), *t_interval(ratios), f"{len(ratios)} seeds, paired,{on}", weak)
    if measure is not measures.speed:
        return Estimate(ratios[0], math.nan, math.nan, f"one seed, a peak and no sample,{on}", weak)
    ours, theirs = (measures.speeds(run)[-epochs:] for run in pairs[0])
    interval = bootstrap(lambda a, b: np.median(a, -1) / np.median(b, -1), ours, theirs)
    return Estimate(ratios[0], *interval, f"one seed, over {epochs} epochs,{on}", weak)
