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
import pandas as pd

from agcseg.errors import UserError
from agcseg.figure1 import SCALED, Setting
from agcseg.report import compare
from agcseg.report.compare import Cells, Estimate, Seeds, missing, reached, t_interval
from agcseg.report.read import NAMES, Layers, Run

SUPPORTED, NOT_SUPPORTED, NOT_ENOUGH = "supported", "not supported", "not enough data"

# About a tenth of the paper's errors; five times the differences that it calls almost identical (0.16 and 0.19 points),
# half of the one that it calls considerable (2 points).
MARGIN = 1.0
SLIGHTLY = 0.25  # "slightly higher" loss: by less than a quarter of it
INSIDE = 0.95  # share of λ in [0, 2]; the paper itself saw some below
ABOUT_ONE, NEAR_ZERO = (0.75, 1.25), (-0.25, 0.25)  # the mean λ of a layer
MOVED = 0.1  # λ in half of the layers has left its start by this much; before that it only tells how it started
FASTER, LIGHTER = 1.15, 0.9  # half of the paper's gain in speed (1.3 at minibatch 8); at least a tenth less memory
FEWEST_EPOCHS = 5  # to time a run
FEWEST_STEPS = 500  # to count a run's spikes
WINDOW, SHORTEST, FACTOR = 100, 20, 3.0  # of `spikes`

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
Band = tuple[float, float]


class Part(NamedTuple):
    """One comparison that a claim rests on."""

    what: str
    estimate: Estimate
    band: Band  # in which it must lie
    form: str = "+.2f"

    @property
    def known(self) -> bool:
        return bool(self.estimate.basis)

    @property
    def interval(self) -> Band:
        """Of the estimate; where it has none, the value twice."""
        assert isinstance(self.estimate, Estimate)
        value, low, high, *_ = self.estimate
        return (value, value) if math.isnan(low) else (low, high)

    @property
    def leaning(self) -> str:
        """What the estimate would say, if it could decide."""
        return decide(self.interval, self.band) if self.estimate.leans else NOT_ENOUGH

    @property
    def verdict(self) -> str:
        return NOT_ENOUGH if self.estimate.weak else self.leaning

    @property
    def answer(self) -> str:
        """The verdict, and why there is none."""
        return f"{self.verdict}: {self.estimate.weak}" if self.known and self.estimate.weak else self.verdict

    @property
    def measured(self) -> str:
        """Such as "+0.12 (-0.30 to +0.51)": the estimate and its interval, or what is missing."""
        if not self.known:
            return self.estimate.weak
        value, low, high = (f"{number:{self.form}}" for number in self.estimate[:3])
        return value if math.isnan(self.estimate.low) else f"{value} ({low} to {high})"

    @property
    def wanted(self) -> str:
        """The band in words."""
        low, high = (f"{end:{'.0%' if '%' in self.form and end else 'g'}}" for end in self.band)
        if math.isinf(self.band[1]) or math.isinf(self.band[0]):
            return f"above {low}" if math.isinf(self.band[1]) else f"below {high}"
        return f"within ±{high}" if self.band[0] == -self.band[1] else f"{low} to {high}"


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
    for number, what, how, settings, *expected in _questions(cells, margin, pairs, agc, timed):
        lacking = [compare.label(of) for of in settings if of not in cells]
        found = missing(f"needs {' and '.join(lacking)}") if lacking else how(*(cells[of] for of in settings))
        answers[number - 1].parts.append(Part(what, found, *expected))
    return [answer for answer in answers if figure1 or any(part.known for part in answer.parts)]


def _questions(
    cells: Cells, margin: float, pairs: list[Condition], agc: list[Setting], timed: list[Condition]
) -> Iterator[tuple]:
    """What is asked of the runs: number of the claim, what is measured, how, of which settings; band, format."""
    errors = partial(compare.paired, measure=reached, resample=compare.by_images("wrong", scale=100))
    loss, mean = partial(reached, column="val_loss"), partial(compare.paired, measure=partial(reached, last=0))
    losses = partial(
        compare.paired, measure=loss, gap=compare.relative, resample=compare.by_images("loss", compare.relative)
    )
    above_0, equal = (0, math.inf), (-margin, margin)
    for of in pairs:
        where, ours, theirs = _both(of)
        yield 1, f"{where}: error of AGC − BN, points", errors, (ours, theirs), equal
        yield 4, f"{where}: loss of AGC ÷ BN − 1", losses, (ours, theirs), (0, SLIGHTLY), "+.1%"
        yield 5, f"{where}: spikes per 1000 steps, BN − AGC", _spike_rates, (theirs, ours), above_0
        yield 5, f"{where}: size of a spike in doublings, BN − AGC", _spike_sizes, (theirs, ours), above_0
    one, four, eight = SCALED
    for norm, *two, band in (
        ("agc", one, four, equal),
        ("agc", eight, four, equal),
        ("agc", one, eight, equal),
        ("bn", one, four, (margin, math.inf)),
    ):
        what = "SegNet {}, error at minibatch {} − {}, points".format(NAMES[norm], *(minibatch for minibatch, _ in two))
        settings = [Setting("segnet", norm, *of) for of in two]
        yield 2, f"{what}, at the end", errors, settings, band
        yield 2, f"{what}, mean over the epochs", mean, settings, band
    best = Setting("segnet", "agc", 8, 0.16)
    for rate in (0.08, 0.32, 0.64):
        yield 3, f"SegNet AGC, error at rate {rate:g} − 0.16, points", errors, (best._replace(rate=rate), best), above_0
    for of in agc:
        for what, measure, band in (
            ("share of λ in [0, 2]", lambda_inside, (INSIDE, math.inf)),
            ("mean λ of the deepest layers", lambda_deepest, ABOUT_ONE),
            ("mean λ before the classifier", lambda_last, NEAR_ZERO),
            ("correlation of λ with depth", lambda_correlation, above_0),
        ):
            yield 6, f"{compare.label(of)}: {what}", partial(_lambdas, measure), (of,), band, ".2f"
    for of in timed:
        where, *sides = _both(of)
        yield (
            7,
            f"{where}: images/s, AGC ÷ BN (paper: 1.3 at minibatch 8)",
            partial(_ratio, "speed"),
            sides,
            (FASTER, math.inf),
            ".2f",
        )
        for what, kind in _memories(compare.all_runs({side: cells.get(side, {}) for side in sides})).items():
            yield 7, f"{where}: {what}, AGC ÷ BN", partial(_ratio, kind), sides, (-math.inf, LIGHTER), ".2f"


def _both(condition: Condition) -> tuple[str, Setting, Setting]:
    """What AGC and BN share in words, and the two."""
    network, minibatch, rate = condition
    sides = [Setting(network, norm, minibatch, rate) for norm in ("agc", "bn")]
    return f"{NAMES.get(network, network)}, minibatch {minibatch}, rate {rate:g}", *sides


def _memories(runs: list[Run]) -> dict[str, str]:
    """What tells the memory of training, in runs that recorded it; of older ones the peak of the whole process."""
    if any(math.isfinite(compare.memory(run)) for run in runs):
        return {"peak memory that training adds": "training", "memory kept for backward": "kept"}
    return {"peak memory" + " of the whole process" * any(_on_cpu(run) for run in runs): "process"}


def _on_cpu(run: Run) -> bool:
    return run.device.startswith("CPU")


def _spike_rates(bn: Seeds, agc: Seeds) -> Estimate:
    """As `compare.paired`; with one seed the rate is resampled by epochs, paired."""

    def by_epochs(ours: Run, theirs: Run, epoch: int) -> tuple[float, float, str]:
        counts = [spikes_per_epoch(run, epoch) for run in (ours, theirs)]
        epochs = min(map(len, counts))
        more = (counts[0][-epochs:] - counts[1][-epochs:]) * 1000 / ours.steps.shape[1]
        interval = compare.bootstrap(lambda drawn: drawn.mean(-1), more)
        return *interval, f"one seed; over {epochs} epochs, not over trainings"

    def counted(seeds: Seeds) -> str:
        found = [step_losses(run, run.last_epoch).ravel() for run in seeds.values()]
        sizes = np.concatenate([spikes(losses)[1] for losses in found])
        text = f"{len(sizes)} in {sum(map(len, found))} steps"
        if not len(sizes):
            return text
        return f"{text}, on average {2 ** np.log2(sizes).mean():.1f} and up to {sizes.max():.1f} times the median"

    found = _if_long(compare.paired(bn, agc, spike_rate, resample=by_epochs, source="steps.npy"), bn, agc)
    basis = f"{found.basis}; BN: {counted(bn)}; AGC: {counted(agc)}" if found.basis else ""
    return found._replace(basis=basis)


def _spike_sizes(bn: Seeds, agc: Seeds) -> Estimate:
    return _if_long(compare.paired(bn, agc, spike_size, source="steps.npy"), bn, agc)


def _if_long(found: Estimate, *sides: Seeds) -> Estimate:
    """An estimate of spikes; short runs say nothing."""
    runs = [run for seeds in sides for run in seeds.values() if run.held]
    steps = min((step_losses(run, run.last_epoch).size for run in runs), default=FEWEST_STEPS)
    if steps >= FEWEST_STEPS or not found.basis:
        return found
    return found._replace(weak=f"a run has only {steps} steps, fewer than {FEWEST_STEPS}", leans=False)


def _lambdas(measure: Callable[[Run], float], seeds: Seeds) -> Estimate:
    """Mean over the seeds that did not diverge."""
    runs = [run for run in seeds.values() if run.held]
    lacking = [run.name for run in runs if run.layers is None]
    if lacking or not runs:
        return missing(f"needs layers.csv of {', '.join(lacking)}" if runs else "every run diverged")
    values = [measure(run) for run in runs]
    if not np.isfinite(values).all():
        return missing("there is no such layer")
    reached, planned, several = sorted({run.last_epoch for run in runs}), runs[0].epochs, len(runs) > 1
    unfinished = reached[0] < planned
    still = any(lambda_moved(run.layers) < MOVED for run in runs)
    weak = "the runs are unfinished" * unfinished if several else "one seed"
    weak = f"λ has hardly left its start, in half of the layers by less than {MOVED:g}" if still else weak
    basis = f"{len(runs)} seeds" if several else "one seed, no interval"
    basis += f", at epoch {' and '.join(map(str, reached))} of {planned}" * unfinished
    return Estimate(np.mean(values), *(t_interval(values) if several else (math.nan,) * 2), basis, weak, not still)


def _ratio(kind: str, agc: Seeds, bn: Seeds) -> Estimate:
    """One pair of runs decides too: time and memory do not depend on how the training goes.

    Args:
        kind: "speed", or of `agcseg.report.compare.memory`.
    """
    if why := compare.unlike(compare.all_runs({"agc": agc, "bn": bn})):
        return missing(why)
    pairs = [(agc[seed], bn[seed]) for seed in sorted(agc.keys() & bn.keys())]
    if not pairs:
        return missing("needs runs with the same seed on both sides")
    measure = compare.speed if kind == "speed" else partial(compare.memory, of=kind)
    pairs = [pair for pair in pairs if all(measure(run) > 0 for run in pair)]  # not those that failed at once
    ratios, runs = [measure(ours) / measure(theirs) for ours, theirs in pairs], sum(pairs, ())
    if not ratios:
        return missing(f"needs {'images_per_second' if kind == 'speed' else 'the memory'} of both sides")
    epochs = min(len(compare.speeds(run)) for run in runs)
    weak = f"fewer than {FEWEST_EPOCHS} epochs were timed" if epochs < FEWEST_EPOCHS else ""
    if kind == "speed" and not weak:
        weak = compare.unsteady(runs[::2]) or compare.unsteady(runs[1::2])
    if kind == "process" and any(_on_cpu(run) for run in runs):
        weak = "older runs measured the whole process, Python and torch included"
    interval, over = (math.nan, math.nan), "one seed, a peak and no sample"
    if len(ratios) > 1:
        interval, over = t_interval(ratios), f"{len(ratios)} seeds, paired"
    elif kind == "speed":
        samples = [compare.speeds(run)[-epochs:] for run in runs]
        interval = compare.bootstrap(lambda a, b: np.median(a, -1) / np.median(b, -1), *samples)
        over = f"one seed, over {epochs} epochs"
    on = f"on {runs[0].device}, {runs[0].settings.get('network.implementation')} AGC"
    return Estimate(float(np.mean(ratios)), *interval, f"{over}, {on}", weak)


def decide(interval: Band, band: Band) -> str:
    """Whether a value known to an interval lies in a band: yes if all of it does, no if none of it does.

    Values may be infinite, as the error of a diverged run is, and so may the band's ends. One that diverged is enough
    against a band with finite ends.
    """
    (low, high), (lower, upper) = interval, band
    bounded = math.isfinite(upper - lower)
    if high <= lower or low >= upper and upper < math.inf or bounded and not math.isfinite(high - low):
        return NOT_SUPPORTED
    return SUPPORTED if lower < low and (high < upper or upper == math.inf) else NOT_ENOUGH


def combine(answers: list[str]) -> str:
    """One answer for a claim of several parts: each must hold, and one that does not is enough against it."""
    if NOT_SUPPORTED in answers:
        return NOT_SUPPORTED
    return SUPPORTED if answers and {*answers} == {SUPPORTED} else NOT_ENOUGH


def step_losses(run: Run, epoch: int) -> np.ndarray:
    """(epochs, steps): training losses up to an epoch, without the epochs that were not recorded."""
    losses = np.empty((0, 0)) if run.steps is None else run.steps[:epoch]
    return losses[np.isfinite(losses).all(1)]


def spikes(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spikes of a training loss: steps above 3 times the median of the (up to) 100 steps before them.

    The first 20 steps have too little before them and are never spikes. Consecutive steps above are one spike.

    Args:
        losses: (steps,), finite.

    Returns:
        the step at which each spike begins, and its size: the largest loss divided by its median, over the spike.
    """
    before = pd.Series(losses).rolling(WINDOW, min_periods=SHORTEST).median().shift()
    ratio = pd.Series(losses / before.to_numpy()).fillna(0)
    above = ratio > FACTOR
    begins = above & ~above.shift(fill_value=False)
    return np.flatnonzero(begins), ratio[above].groupby(begins.cumsum()).max().to_numpy()


def spike_rate(run: Run, epoch: int) -> float:
    """Spikes per 1000 steps. Divergence is one; in the first epoch, of which no steps are kept, infinitely many."""
    losses = step_losses(run, epoch).ravel()
    if not run.held and not run.last_epoch:
        return math.inf
    return 1000 * (len(spikes(losses)[0]) + (not run.held)) / len(losses) if len(losses) else math.nan


def spike_size(run: Run, epoch: int) -> float:
    """Mean log2 of a run's spikes (peak / median); where it has none, of the threshold; infinite for a diverged run."""
    losses = step_losses(run, epoch).ravel()
    if not run.held and (len(losses) or not run.last_epoch):
        return math.inf
    sizes = spikes(losses)[1] if len(losses) else [math.nan]
    return float(np.log2(sizes).mean()) if len(sizes) else math.log2(FACTOR)


def spikes_per_epoch(run: Run, epoch: int) -> np.ndarray:
    """(epochs,): how many spikes begin in each of the recorded epochs."""
    losses = step_losses(run, epoch)
    return np.bincount(spikes(losses.ravel())[0] // losses.shape[1], minlength=len(losses))


def levels(run: Run) -> np.ndarray:
    """How often the maps of each layer with a λ were halved. SegNet's decoder counts its stages from the smallest maps,
    all others from the largest."""
    roles = np.array(run.layers.roles)
    stages = np.array([next((int(s) for s in name.split(".") if s.isdigit()), 0) for name in run.layers.names])
    rising = (roles == "decoder") & (run.network == "segnet")
    halved = np.where(rising, stages[roles == "encoder"].max(initial=0) - stages, stages)
    return np.where(roles == "head", 0, halved)


def lambda_inside(run: Run) -> float:
    """Share of all filters with λ in [0, 2]."""
    return float(np.average(run.layers.values["lambda_inside"][-1], weights=run.layers.num_features))


def lambda_deepest(run: Run) -> float:
    """Mean over the layers on the smallest maps."""
    return float(run.layers.values["lambda_mean"][-1][levels(run) == levels(run).max()].mean())


def lambda_last(run: Run) -> float:
    """Mean over the layers before the classes: the decoder's at full resolution, and the head where it has a norm."""
    after = np.isin(run.layers.roles, ("decoder", "head")) & (levels(run) == 0)
    return float(run.layers.values["lambda_mean"][-1][after].mean()) if after.any() else math.nan


def lambda_correlation(run: Run) -> float:
    """Of a layer's mean λ with its level; 0 where all are the same."""
    means = run.layers.values["lambda_mean"][-1]
    return float(np.corrcoef(levels(run), means)[0, 1]) if means.std() > 0 < levels(run).std() else 0.0


def lambda_moved(layers: Layers) -> float:
    """How far the 5 % or the 95 % quantile of λ went from its start, in the median layer; nan if that is unknown."""
    if layers.epochs[0] != 0:
        return math.nan
    away = [abs(layers.values[key][-1] - layers.values[key][0]) for key in ("lambda_q05", "lambda_q95")]
    return float(np.median(np.maximum(*away)))
