"""What is measured of one run: each a number per run, infinite for failure, nan for what was not recorded."""

import math
from collections.abc import Iterable

import numpy as np

from agcseg.report.read import Layers, Run
from agcseg.report.statistics import FACTOR, spikes

STEADY = 0.1


def final_error(run: Run, epoch: int) -> float:
    """%; infinite for a diverged run."""
    return math.inf if run.state == "diverged" else 100 * run.at("pixel_error", epoch)


def mean_error(run: Run, epoch: int) -> float:
    """Over the epochs so far, %; infinite for a diverged run."""
    return math.inf if run.state == "diverged" else 100 * float(np.mean(run.column("pixel_error")[:epoch]))


def late_error(run: Run, epoch: int) -> float:
    """Over the last three epochs, %; infinite for a diverged run."""
    values = run.column("pixel_error")[max(0, epoch - 3) : epoch]
    return math.inf if run.state == "diverged" else 100 * float(np.mean(values or math.nan))


def final_miou(run: Run, epoch: int) -> float:
    """%; nan for a diverged run."""
    return math.nan if run.state == "diverged" else 100 * run.at("miou", epoch)


def final_loss(run: Run, epoch: int) -> float:
    """Infinite for a diverged run."""
    return math.inf if run.state == "diverged" else run.at("val_loss", epoch) or math.nan


def step_losses(run: Run, epoch: int) -> np.ndarray:
    """(epochs, steps): training losses up to an epoch, without the epochs that were not recorded."""
    losses = np.empty((0, 0)) if run.steps is None else run.steps[:epoch]
    return losses[np.isfinite(losses).all(1)]


def spike_rate(run: Run, epoch: int) -> float:
    """Spikes per 1000 steps. Divergence is one; in the first epoch, of which no steps are kept, infinitely many."""
    losses = step_losses(run, epoch).ravel()
    if run.state == "diverged" and not run.last_epoch:
        return math.inf
    return 1000 * (len(spikes(losses)[0]) + (run.state == "diverged")) / len(losses) if len(losses) else math.nan


def spike_size(run: Run, epoch: int) -> float:
    """Mean log2 of a run's spikes (peak / median); where it has none, of the threshold; infinite for a diverged run."""
    losses = step_losses(run, epoch).ravel()
    if run.state == "diverged" and (len(losses) or not run.last_epoch):
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
    values = np.array(run.column("images_per_second"))
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


def memory(run: Run) -> float:
    """Peak, MiB."""
    return max((value for value in run.column("peak_memory_mib") if value > 0), default=math.nan)
