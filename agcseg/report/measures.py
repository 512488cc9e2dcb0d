"""What is measured of one run, each a number per run (infinite for failure, nan for what was not recorded); intervals,
spikes and decisions."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from agcseg.report.read import Layers, Run

SUPPORTED, NOT_SUPPORTED, NOT_ENOUGH = "supported", "not supported", "not enough data"
STEADY = 0.1
WINDOW, SHORTEST, FACTOR = 100, 20, 3.0  # of `spikes`


def final_error(run: Run, epoch: int) -> float:
    """%; infinite for a diverged run."""
    return 100 * run.at("pixel_error", epoch) if run.held else math.inf


def mean_error(run: Run, epoch: int) -> float:
    """Over the epochs so far, %; infinite for a diverged run."""
    return 100 * float(run.column("pixel_error")[:epoch].mean(skipna=False)) if run.held else math.inf


def late_error(run: Run, epoch: int) -> float:
    """Over the last three epochs, %; infinite for a diverged run."""
    return 100 * float(run.column("pixel_error")[:epoch].tail(3).mean(skipna=False)) if run.held else math.inf


def final_miou(run: Run, epoch: int) -> float:
    """%; nan for a diverged run."""
    return 100 * run.at("miou", epoch) if run.held else math.nan


def final_loss(run: Run, epoch: int) -> float:
    """Infinite for a diverged run."""
    return run.at("val_loss", epoch) or math.nan if run.held else math.inf


def step_losses(run: Run, epoch: int) -> np.ndarray:
    """(epochs, steps): training losses up to an epoch, without the epochs that were not recorded."""
    losses = np.empty((0, 0)) if run.steps is None else run.steps[:epoch]
    return losses[np.isfinite(losses).all(1)]


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
    if not len(losses):
        return math.nan
    sizes = spikes(losses)[1]
    return float(np.log2(sizes).mean()) if len(sizes) else math.log2(FACTOR)


def spikes_per_epoch(run: Run, epoch: int) -> np.ndarray:
    """(epochs,): how many spikes begin in each of the recorded epochs."""
    losses = step_losses(run, epoch)
    return np.bincount(spikes(losses.ravel())[0] // losses.shape[1], minlength=len(losses))


def levels(run: Run) -> np.ndarray:
    """How often the maps of each layer with a λ were halved. SegNet's decoder counts its stages from the smallest maps,
    all others from the largest."""
    roles = run.layers.roles
    stages = [next((int(part) for part in name.split(".") if part.isdigit()), 0) for name in run.layers.names]
    deepest = max((stage for stage, role in zip(stages, roles, strict=True) if role == "encoder"), default=0)
    up = ["segnet" == run.network and role == "decoder" for role in roles]
    halved = [deepest - stage if rising else stage for stage, rising in zip(stages, up, strict=True)]
    return np.array([0 if role == "head" else level for level, role in zip(halved, roles, strict=True)])


def lambda_inside(run: Run) -> float:
    """Share of all filters with λ in [0, 2]."""
    return float(np.average(run.layers.values["lambda_inside"][-1], weights=run.layers.num_features))


def lambda_deepest(run: Run) -> float:
    """Mean over the layers on the smallest maps."""
    return float(run.layers.values["lambda_mean"][-1][levels(run) == levels(run).max()].mean())


def lambda_last(run: Run) -> float:
    """Mean over the layers before the classes: the decoder's at full resolution, and the head where it has a norm."""
    after = np.array([role in ("decoder", "head") for role in run.layers.roles]) & (levels(run) == 0)
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


def speeds(run: Run) -> np.ndarray:
    """Images per second of each epoch, the first left out where there are others: it warms up."""
    values = run.column("images_per_second").to_numpy(float)
    values = values[1:] if len(values) > 1 else values
    return values[np.isfinite(values) & (values > 0)]


def unsteady(runs: Iterable[Run]) -> str:
    """What makes the speed of runs of one setting say little: that it varied; empty if it did not.

    By no more than `STEADY` in the middle 80 % of their epochs; else other programs used the device too.
    """
    values = np.concatenate([np.empty(0), *(speeds(run) for run in runs)])
    span = np.ptp(np.percentile(values, (10, 90))) / np.median(values) if len(values) else 0.0
    return f"it varied by {span:.0%} within one setting, as if other programs ran too" if span > STEADY else ""


def speed(run: Run) -> float:
    """Median images per second."""
    return float(np.median(speeds(run))) if len(speeds(run)) else math.nan


def process_memory(run: Run) -> float:
    """Peak of the whole process, Python and torch included, or on a GPU of CUDA's counter; MiB."""
    peaks = run.column("peak_memory_mib")
    return float(peaks[peaks > 0].max())


def training_memory(run: Run) -> float:
    """Peak of what training adds to the idle network, MiB; nan for a run that is older than this figure."""
    peaks = run.column("training_memory_mib")
    return float(peaks[peaks > 0].max())


def kept_memory(run: Run) -> float:
    """What is kept for backward in a training step, MiB; nan for a run that is older than this figure."""
    return float(run.column("kept_for_backward_mib").max())


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of at least two values (Student's t)."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def bootstrap(statistic: Callable[..., np.ndarray], *samples: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of a statistic of paired samples, drawn 2000 times from a fixed seed.

    Args:
        statistic: of samples along the last axis.
        samples: of at least two values each; with fewer the interval is nan.
    """
    if len(samples[0]) < 2:
        return math.nan, math.nan
    drawn = stats.bootstrap(
        samples, lambda *parts, axis=-1: statistic(*parts), paired=True, vectorized=True, n_resamples=2000,
        method="percentile", rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def decide(interval: tuple[float, float], band: tuple[float, float]) -> str:
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


def spikes(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spikes of a training loss: steps above 3 times the median of the (up to) 100 steps before them.

    The first 20 steps have too little before them and are never spikes. Consecutive steps above are one spike.

    Args:
        losses: (steps,), finite.

    Returns:
        the step at which each spike begins, and its size: the largest loss divided by its median, over the spike.
    """
    before = pd.Series(losses).rolling(WINDOW, min_periods=SHORTEST).median().shift()
    ratio = np.nan_to_num(losses / before.to_numpy(), nan=0.0)
    above = ratio > FACTOR
    begins = np.flatnonzero(above & ~np.r_[False, above[:-1]])
    ends = np.flatnonzero(above & ~np.r_[above[1:], False])
    return begins, np.array([ratio[b : e + 1].max() for b, e in zip(begins, ends, strict=True)])
