"""Writes made-up folders of Figure 1's runs, as `agcseg.training.run` would leave them."""

import csv
import json
import math
from collections.abc import Callable

import numpy as np

from agcseg.figure1 import RUNS, Setting

CONFIG = """
name: {name}
network: {{name: {network}, width: {width}}}
norm: {{name: {norm}}}
minibatch: {minibatch}
epochs: {epochs}
seed: {seed}
lr: {{base: 0.02, value: {value}}}
data: {{name: streets, root: null, size: [128, 256]}}
"""
# Points above the others at the end, as the paper has it.
PAPER = {
    ("bn", 1, 0.02): 2.5,
    ("agc", 8, 0.08): 0.8,
    ("bn", 8, 0.08): 0.8,
    ("agc", 8, 0.32): 2.0,
    ("agc", 8, 0.64): 9.0,
}
LEVELS = [*range(5), *range(5)[::-1]]  # of SegNet's ten stages


def make_figure1(
    folder,
    seeds=(1, 2, 3),
    runs=RUNS,
    epochs=20,
    noise=0.1,
    shift: Callable[[Setting], float] = lambda of: PAPER.get(of[1:], 0.0),
    loss: Callable[[Setting], float] = lambda of: 1.1 if of.norm == "agc" else 1.0,
    spikes: Callable[[Setting], int] = lambda of: 12 if of.norm == "bn" else 3,
    size: Callable[[Setting], float] = lambda of: 12 if of.norm == "bn" else 5,
    lambdas: Callable[[int], float] = lambda level: level / 4,
    spread=1.0,
    speed: Callable[[Setting], float] = lambda of: 130.0 if of.norm == "agc" else 100.0,
    memory: Callable[[Setting], float] = lambda of: 600.0 if of.norm == "agc" else 1000.0,
    reached: Callable[[Setting, int], int] | None = None,
    diverged: Callable[[Setting, int], bool] = lambda of, seed: False,
    device: Callable[[Setting], str] = lambda of: "Some GPU",
    width: Callable[[Setting], float] = lambda of: 0.25,
    old=False,
    name="figure1",
):
    """Runs of the paper's outcome, unless an argument makes them otherwise.

    Args:
        noise: of a seed, in points; the same for BN and AGC only in part.
        shift: points of error above the common curve, growing in with the epochs.
        loss: factor on the validation loss.
        spikes, size: how many per run, and how large.
        lambdas, spread: mean λ by level, at the end, and how far its filters lie apart; all start at 1.
        reached: the last epoch of a run that goes on; None for all.
        diverged: half-way.
        old: without steps.npy, layers.csv, images.csv and the device.
    """
    for of in runs:
        for seed in seeds:
            path = folder / f"{of.name}-seed{seed}"
            path.mkdir(parents=True)
            ended = epochs // 2 if diverged(of, seed) else min(reached(of, seed), epochs) if reached else epochs
            state = "diverged" if diverged(of, seed) else "finished" if ended == epochs else "unfinished"
            rng = np.random.default_rng([seed, RUNS.index(of) if of in RUNS else 99])
            (path / "config.yaml").write_text(
                CONFIG.format(
                    name=name, network=of.network, norm=of.norm, minibatch=of.minibatch, seed=seed, epochs=epochs,
                    width=width(of), value="null" if math.isclose(of.rate, 0.02 * of.minibatch) else of.rate,
                )
            )  # fmt: skip
            end = (10 if of.network == "segnet" else 6) + shift(of) + noise * rng.standard_normal()
            errors = (
                end + 50 * np.exp(-np.arange(1, epochs + 1) / (epochs / 6)) + 0.3 * noise * rng.standard_normal(epochs)
            )
            rows = [
                {
                    "epoch": epoch, "samples": 100 * epoch, "rate": of.rate, "train_loss": error / 30,
                    "val_loss": loss(of) * error / 20 * (1 + 0.01 * noise * rng.standard_normal()),
                    "pixel_error": error / 100, "pixel_error_all": error / 99, "miou": 0.5, "gradient_norm": 1.0,
                    "images_per_second": speed(of) * (1 + 0.01 * rng.standard_normal()), "seconds": 10.0 * epoch,
                    "peak_memory_mib": memory(of), "training_memory_mib": memory(of),
                    "kept_for_backward_mib": memory(of),
                }
                for epoch, error in enumerate(errors[:ended], start=1)
            ]  # fmt: skip
            write_csv(path / "metrics.csv", rows)
            if state != "unfinished":
                result = {"state": state, "reason": "the loss became nan" if state == "diverged" else ""}
                result |= {"commonest_class_error": 0.6} | ({} if old else {"device": device(of), "processes": 1})
                (path / "result.json").write_text(json.dumps(result))
            if not old:
                np.save(path / "steps.npy", step_losses(of, errors[:ended], spikes(of), size(of), rng))
                write_csv(path / "images.csv", images(errors[ended - 1] / 100, rows[-1]["val_loss"], rng))
                write_csv(path / "layers.csv", layers(of, ended, epochs, lambdas, spread, 0.3 * noise, rng))
    return folder


def step_losses(of: Setting, errors, spikes: int, size: float, rng) -> np.ndarray:
    """(epochs, 50, parts) float32, with spikes of two steps spread over the run."""
    losses = np.repeat(errors[:, None] / 30, 50, axis=1) * np.exp(0.05 * rng.standard_normal((len(errors), 50)))
    flat = losses.reshape(-1)
    for step in np.linspace(150, flat.size - 10, spikes).astype(int) if spikes and flat.size > 170 else ():
        flat[step : step + 2] *= size * np.exp(0.1 * rng.standard_normal())
    parts = [losses] if of.network == "segnet" else [0.7 * losses, 0.3 * losses]
    return np.stack(parts, axis=2).astype(np.float32)


def images(error: float, loss: float, rng, number=40) -> list[dict]:
    """Rows of images.csv; the images are as hard in every run, but for a little."""
    hard = np.random.default_rng(5).uniform(0.5, 1.5, number)
    hard *= 1 + 0.02 * rng.standard_normal(number)
    hard /= hard.mean()
    return [
        {"image": f"scene{i}", "wrong_pixels": round(error * h * 100_000), "labelled_pixels": 100_000, "loss": loss * h}
        for i, h in enumerate(hard)
    ]


def layers(of: Setting, ended: int, epochs: int, lambdas: Callable[[int], float], spread, noise, rng) -> list[dict]:
    """Rows of layers.csv: ten stages with a layer each, named as the networks name theirs."""
    segnet = of.network == "segnet"
    names = [f"encoder.{i}.0" if segnet else f"encoder.{i}.final" for i in range(5)]
    names += [f"decoder.{i}.0" if segnet else f"decoder.{4 - i}.final" for i in range(5)]
    offsets, rows = noise * rng.standard_normal(len(names)), []
    for epoch in range(ended + 1):
        for layer, level, offset in zip(names, LEVELS, offsets, strict=True):
            mean = 1 + (lambdas(level) + offset - 1) * epoch / epochs
            levels = {"mean": 0, "min": -0.4, "q05": -0.2, "q25": -0.1, "q50": 0, "q75": 0.1, "q95": 0.2, "max": 0.4}
            cells = {f"lambda_{key}": mean + spread * by * epoch / epochs for key, by in levels.items()}
            cells["lambda_inside"] = float(np.clip(1 - abs(mean - 1) + 1, 0, 1)) if not 0 <= mean <= 2 else 0.99
            if of.norm != "agc":
                cells = dict.fromkeys(cells)
            row = {
                "epoch": epoch,
                "layer": layer,
                "role": layer.partition(".")[0],
                "num_features": 8,
                "gamma_mean": 1.0,
            }
            rows.append(row | cells)
    return rows


def write_csv(path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
