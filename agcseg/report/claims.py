"""The paper's seven claims, and what the runs say about each.

A claim has parts, each an estimate with a 95 % interval and the band that it must lie in: the part is supported if the
whole interval is inside, not supported if all of it is outside, and otherwise there is not enough data. All parts must
hold for a claim to be supported; one that does not hold is enough against it. Intervals are not corrected for their
number. A part that may not decide (one seed, unfinished runs) says where it leans.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from agcseg.errors import UserError
from agcseg.figure1 import SCALED, Setting
from agcseg.networks import NETWORKS
from agcseg.report import compare
from agcseg.report.compare import Cells, Estimate, Seeds, missing, over_seeds, reached
from agcseg.report.read import NAMES, Run

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
        value, low, high = self.estimate.value, self.estimate.low, self.estimate.high
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
        if math.isnan(self.estimate.value):
            value = "no mean"  # each side diverged in a seed of its own
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
    sides, answers = _sides(cells, figure1), []
    for number, (claim, *rows) in enumerate(CLAIMS, start=1):
        parts = []
        for kind, what, how, band, form in rows:
            band = {EQUAL: (-margin, margin), WORSE: (margin, math.inf)}.get(band, band)
            for where, *settings in sides[kind]:
                lacking = " and ".join(compare.label(of) for of in settings if of not in cells)
                found = missing(f"needs {lacking}") if lacking else how(*(cells[of] for of in settings))
                parts.append(Part(where + what, found, band, form))
        answers.append(Verdict(number, claim, parts))
    return [answer for answer in answers if figure1 or any(part.known for part in answer.parts)]


def _sides(cells: Cells, figure1: bool) -> dict[str, list[tuple]]:
    """What is compared with what: kind of `CLAIMS` -> words and settings of each comparison."""

    def pairs(agc: list[Setting]) -> list[tuple]:
        where = "{}, minibatch {}, rate {:g}: "
        return [(where.format(NAMES.get(of.network, of.network), *of[2:]), of, of._replace(norm="bn")) for of in agc]

    def scaled(norm: str, ours: tuple, theirs: tuple) -> tuple:
        what = f"SegNet {NAMES[norm]}, error at minibatch {ours[0]} − {theirs[0]}, points, "
        return what, Setting("segnet", norm, *ours), Setting("segnet", norm, *theirs)

    one, four, eight = SCALED
    best = Setting("segnet", "agc", 8, 0.16)
    agc = [Setting(network, "agc", *four) for network in ("segnet", "classnet")]
    alike, timed = pairs(agc), pairs([best])
    if not figure1:
        agc = [of for of in cells if of.norm == "agc"]
        timed = alike = [pair for pair in pairs(agc) if pair[2] in cells]
    others = [best._replace(rate=rate) for rate in (0.08, 0.32, 0.64)]
    return {
        "agc, bn": alike, "bn, agc": [(where, bn, agc) for where, agc, bn in alike],
        "agc scaled": [scaled("agc", one, four), scaled("agc", eight, four), scaled("agc", one, eight)],
        "bn scaled": [scaled("bn", one, four)], "agc": [(f"{compare.label(of)}: ", of) for of in agc],
        "rates": [(f"SegNet AGC, error at rate {of.rate:g} − 0.16, points", of, best) for of in others],
        "timed": timed,
    }  # fmt: skip


def _spikes(measure: Callable[[Run, int], float], bn: Seeds, agc: Seeds) -> Estimate:
    """As `compare.paired`; with one seed the rate is resampled by epochs, paired. Short runs say nothing."""

    def by_epochs(ours: Run, theirs: Run, epoch: int) -> tuple[float, float, str]:
        counts = [spikes_per_epoch(run, epoch) for run in (ours, theirs)]
        epochs = min(map(len, counts))
        more = (counts[0][-epochs:] - counts[1][-epochs:]) * 1000 / ours.steps.shape[1]
        low, high = compare.bootstrap(lambda drawn: drawn.mean(-1), more)
        return low, high, f"one seed; over {epochs} epochs, not over trainings"

    def counted(seeds: Seeds) -> str:
        found = [step_losses(run, run.last_epoch).ravel() for run in seeds.values()]
        sizes = np.concatenate([spikes(losses)[1] for losses in found])
        text = f"{len(sizes)} in {sum(map(len, found))} steps"
        if not len(sizes):
            return text
        return f"{text}, on average {2 ** np.log2(sizes).mean():.1f} and up to {sizes.max():.1f} times the median"

    rate = measure is spike_rate
    found = compare.paired(bn, agc, measure, resample=by_epochs if rate else None, source="steps.npy")
    if not found.basis:
        return found
    if rate:
        found = found._replace(basis=f"{found.basis}; BN: {counted(bn)}; AGC: {counted(agc)}")
    runs = [run for run in (*bn.values(), *agc.values()) if run.held]
    steps = min((step_losses(run, run.last_epoch).size for run in runs), default=FEWEST_STEPS)
    short = f"a run has only {steps} steps, fewer than {FEWEST_STEPS}"
    return found._replace(weak=short, leans=False) if steps < FEWEST_STEPS else found


def _lambdas(what: str, seeds: Seeds) -> Estimate:
    """Mean over the seeds that did not diverge, of `lambdas`."""
    runs = [run for run in seeds.values() if run.held]
    lacking = [run.name for run in runs if run.layers is None]
    if lacking or not runs:
        return missing(f"needs layers.csv of {', '.join(lacking)}" if runs else "every run diverged")
    found = pd.DataFrame([lambdas(run) for run in runs])
    if what not in found:
        return missing("needs SegNet or ClassNet: the names of other networks' layers do not tell how deep they lie")
    if found[what].isna().any():
        return missing("there is no such layer")
    last, planned = sorted({run.last_epoch for run in runs}), runs[0].epochs
    low, high, basis = over_seeds(found[what])
    if last[0] < planned:
        basis += f", at epoch {' and '.join(map(str, last))} of {planned}"
    weak, still = "one seed" if len(runs) == 1 else "the runs are unfinished" * (last[0] < planned), found.moved < MOVED
    weak = f"λ has hardly left its start, in half of the layers by less than {MOVED:g}" if still.any() else weak
    return Estimate(found[what].mean(), low, high, basis, weak, not still.any())


def _ratio(measure: Callable[[Run], float], agc: Seeds, bn: Seeds) -> Estimate:
    """One pair of runs decides too: time and memory do not depend on how the training goes."""
    if why := compare.unlike([*agc.values(), *bn.values()]):
        return missing(why)
    pairs = [(agc[seed], bn[seed]) for seed in sorted(agc.keys() & bn.keys())]
    if not pairs:
        return missing("needs runs with the same seed on both sides")
    pairs = [pair for pair in pairs if all(measure(run) > 0 for run in pair)]  # not those that failed at once
    timed = measure is compare.speed
    if not pairs:
        return missing(f"needs {'images_per_second' if timed else 'the memory'} of both sides")
    ratios, runs = [measure(ours) / measure(theirs) for ours, theirs in pairs], [run for pair in pairs for run in pair]
    epochs = min(len(compare.speeds(run)) for run in runs)
    weak, one = "", (math.nan, math.nan, "one seed, a peak and no sample")
    if epochs < FEWEST_EPOCHS:
        weak = f"fewer than {FEWEST_EPOCHS} epochs were timed"
    elif timed:
        weak = compare.unsteady(runs[::2]) or compare.unsteady(runs[1::2])
    if timed and len(ratios) == 1:
        samples = [compare.speeds(run)[-epochs:] for run in runs]
        low, high = compare.bootstrap(lambda a, b: np.median(a, -1) / np.median(b, -1), *samples)
        one = low, high, f"one seed, over {epochs} epochs"
    low, high, basis = over_seeds(ratios, one, ", paired")
    basis += f", on {runs[0].device}, {runs[0].settings.get('network.implementation')} AGC"
    return Estimate(float(np.mean(ratios)), low, high, basis, weak)


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
    """(epochs, steps): training losses up to an epoch; (0, 0) where none are recorded."""
    return np.empty((0, 0)) if run.steps is None else run.steps[:epoch]


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
    """How often the maps of each layer of SegNet or ClassNet with a λ were halved. SegNet's decoder counts its stages
    from the smallest maps, all others from the largest."""
    names, roles = zip(*run.lambda_means.columns, strict=True)
    stages = np.array([next((int(part) for part in name.split(".") if part.isdigit()), 0) for name in names])
    roles = np.array(roles)
    rising = (roles == "decoder") & (run.network == "segnet")
    halved = np.where(rising, stages[roles == "encoder"].max(initial=0) - stages, stages)
    return np.where(roles == "head", 0, halved)


def lambdas(run: Run) -> dict[str, float]:
    """What claim 6 is about, of the last epoch.

    Returns:
        "inside": share of all filters with λ in [0, 2]; "moved": how far the 5 % or the 95 % quantile went from its
        start, in the median layer. Of SegNet and ClassNet also "deepest": mean over the layers
        on the smallest maps; "last": over those before the classes, which are the decoder's at full resolution and the
        head where it has a norm, nan if there are none; "correlation" of a layer's mean with its level, 0 where all are
        the same.
    """
    end = run.layers.iloc[-1]
    means, away = end["lambda_mean"], (end - run.layers.iloc[0]).abs()
    found = {
        "inside": np.average(end["lambda_inside"], weights=end["num_features"]),
        "moved": np.maximum(away["lambda_q05"], away["lambda_q95"]).median(),
    }
    if run.network not in NETWORKS:  # a number in a layer's name may be that of a block
        return found
    level = levels(run)
    classes = (level == 0) & means.index.isin(("decoder", "head"), level="role")
    return found | {
        "deepest": means[level == level.max()].mean(),
        "last": means[classes].mean(),
        "correlation": np.corrcoef(level, means)[0, 1] if means.std(ddof=0) > 0 and level.std() > 0 else 0.0,
    }


ERRORS = partial(compare.paired, measure=reached, resample=compare.by_images("wrong", scale=100))
MEANS = partial(compare.paired, measure=partial(reached, last=0))
LOSSES = partial(
    compare.paired,
    measure=partial(reached, column="val_loss"),
    gap=compare.relative,
    resample=compare.by_images("loss", compare.relative),
)
TRAINING, KEPT = (partial(compare.memory, of=kind) for kind in ("training", "kept"))
EQUAL, WORSE, ABOVE_0 = "within the margin", "beyond the margin", (0, math.inf)
FAST, LIGHT = (FASTER, math.inf), (-math.inf, LIGHTER)
# each with its parts: what is compared (of `_sides`), what is measured, how, the band for it, its format
CLAIMS: tuple[tuple[Any, ...], ...] = (
    ("AGC equals batch normalisation (BN) in final error",
     ("agc, bn", "error of AGC − BN, points", ERRORS, EQUAL, "+.2f")),
    ("with the rate scaled by the minibatch, AGC's error curves coincide, and BN's do not at minibatch 1",
     ("agc scaled", "at the end", ERRORS, EQUAL, "+.2f"), ("agc scaled", "mean over the epochs", MEANS, EQUAL, "+.2f"),
     ("bn scaled", "at the end", ERRORS, WORSE, "+.2f"), ("bn scaled", "mean over the epochs", MEANS, WORSE, "+.2f")),
    ("at minibatch 8, AGC's best rate is 0.16", ("rates", "", ERRORS, ABOVE_0, "+.2f")),
    ("AGC's validation loss is slightly higher", ("agc, bn", "loss of AGC ÷ BN − 1", LOSSES, (0, SLIGHTLY), "+.1%")),
    ("training spikes are more frequent and larger with BN",
     ("bn, agc", "spikes per 1000 steps, BN − AGC", partial(_spikes, spike_rate), ABOVE_0, "+.2f"),
     ("bn, agc", "size of a spike in doublings, BN − AGC", partial(_spikes, spike_size), ABOVE_0, "+.2f")),
    ("λ is between 0 and 2, about 1 in the deepest layers, near 0 at the classifier",
     ("agc", "share of λ in [0, 2]", partial(_lambdas, "inside"), (INSIDE, math.inf), ".2f"),
     ("agc", "mean λ of the deepest layers", partial(_lambdas, "deepest"), ABOUT_ONE, ".2f"),
     ("agc", "mean λ before the classifier", partial(_lambdas, "last"), NEAR_ZERO, ".2f"),
     ("agc", "correlation of λ with depth", partial(_lambdas, "correlation"), ABOVE_0, ".2f")),
    ("AGC is faster and takes significantly less memory",
     ("timed", "images/s, AGC ÷ BN (paper: 1.3 at minibatch 8)", partial(_ratio, compare.speed), FAST, ".2f"),
     ("timed", "peak memory that training adds, AGC ÷ BN", partial(_ratio, TRAINING), LIGHT, ".2f"),
     ("timed", "memory kept for backward, AGC ÷ BN", partial(_ratio, KEPT), LIGHT, ".2f")),
)  # fmt: skip
