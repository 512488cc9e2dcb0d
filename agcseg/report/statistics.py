"""Intervals, spikes and decisions: plain numpy, and the same answer every time."""

import math
from collections.abc import Callable

import numpy as np

SUPPORTED, NOT_SUPPORTED, NOT_ENOUGH = "supported", "not supported", "not enough data"

# 97.5 % quantiles of Student's t for 1 to 10 degrees of freedom; beyond, the expansion in `t_quantile` is good to 1e-4.
T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
DRAWS = 2000
WINDOW, SHORTEST, FACTOR = 100, 20, 3.0  # of `spikes`


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t distribution (Cornish-Fisher expansion for more than 10 degrees of freedom)."""
    if freedom <= len(T):
        return T[freedom - 1]
    z = 1.959964
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2) + third


def t_interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean of at least two values."""
    half = t_quantile(len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], size: int) -> tuple[float, float]:
    """95 % percentile interval of a statistic over a sample drawn with replacement, 2000 times from a fixed seed.

    Args:
        statistic: of indices (draws, size) into the sample, one value per draw.
        size: of the sample.
    """
    chosen = np.random.default_rng(0).integers(size, size=(DRAWS, size))
    low, high = np.percentile(statistic(chosen), (2.5, 97.5))
    return float(low), float(high)


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
    if len(losses) <= SHORTEST:
        return np.empty(0, int), np.empty(0)
    ratio = np.zeros(len(losses))
    for step in range(SHORTEST, min(WINDOW, len(losses))):
        ratio[step] = losses[step] / np.median(losses[:step])
    if len(losses) > WINDOW:
        before = np.lib.stride_tricks.sliding_window_view(losses, WINDOW)[:-1]
        for start in range(0, len(before), 10_000):  # at once, the windows would take 100 times the losses' memory
            medians = np.median(before[start : start + 10_000], axis=1)
            there = slice(WINDOW + start, WINDOW + start + len(medians))
            ratio[there] = losses[there] / medians
    above = ratio > FACTOR
    begins = np.flatnonzero(above & ~np.r_[False, above[:-1]])
    ends = np.flatnonzero(above & ~np.r_[above[1:], False])
    return begins, np.array([ratio[b : e + 1].max() for b, e in zip(begins, ends, strict=True)])
