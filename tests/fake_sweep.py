"""Writes made-up folders of an experiment's runs, which differ in any keys of the configuration."""

import json
from copy import deepcopy
from dataclasses import asdict

import numpy as np
import yaml
from fake_figure1 import layers, write_csv

from agcseg.config import Config
from agcseg.figure1 import Setting

AGC = {"mean_scale": 1.0, "background": "map", "window": 0.5, "quantile": 0.5}


def make_sweep(folder, settings, seeds=(1, 2, 3), epochs=10, error=lambda number, seed: 30 + number, **options):
    """Runs of each setting and seed.

    Args:
        settings: one dict per setting: key with dots -> value, off the defaults, which are AGC's.
        error: % at the end, of the number of the setting and the seed; None for a run that diverges half-way.
        options: see `make_run`.
    """
    for number, changes in enumerate(settings):
        for seed in seeds:
            make_run(folder / f"run{number:02d}-seed{seed}", changes, seed, epochs, error(number, seed), **options)
    return folder


def make_run(path, changes, seed, epochs, error, reached=None, device="Some GPU", lambdas=None, layer_columns=()):
    """One run.

    Args:
        reached: the last epoch, if it is not finished.
        lambdas: of the start and a layer's level, the mean λ of the layer at the end; None: nothing recorded.
        layer_columns: what layers.csv has beside the columns that are known.
    """
    settings = asdict(Config(name="sweep", epochs=epochs, seed=seed))
    settings["data"] |= {"name": "camvid", "size": [64, 128]}
    norm = changes.get("norm.name", "agc")
    settings["norm"] = {"name": norm, "options": deepcopy(AGC) if norm == "agc" else {}}
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = settings
        for parent in parents:
            node = node[parent]
        node[last] = value
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(settings))
    ended = epochs // 2 if error is None else reached or epochs
    above = 40 * np.exp(-np.arange(1, ended + 1) / (epochs / 4)) * (1 - 1 / (1 + np.arange(ended)[::-1]))
    errors = (70 if error is None else error) + above  # ends at the error itself
    rows = [
        {
            "epoch": epoch, "samples": 100 * epoch, "rate": 0.08, "train_loss": value / 50, "val_loss": value / 50,
            "pixel_error": value / 100, "pixel_error_all": value / 100, "miou": 1 - value / 100, "gradient_norm": 1.0,
            "images_per_second": 100.0, "seconds": 10.0 * epoch, "peak_memory_mib": 500.0,
            "training_memory_mib": 500.0, "kept_for_backward_mib": 500.0,
        }
        for epoch, value in enumerate(errors, start=1)
    ]  # fmt: skip
    write_csv(path / "metrics.csv", rows)
    if error is None or not reached:
        state, reason = ("diverged", "the loss became nan") if error is None else ("finished", "")
        result = {"state": state, "reason": reason, "commonest_class_error": 0.7, "device": device, "processes": 1}
        (path / "result.json").write_text(json.dumps(result))
    if lambdas:
        start = settings["norm"]["options"]["mean_scale"]
        of, rng = Setting("segnet", norm, 4, 0.08), np.random.default_rng(seed)
        rows = layers(of, ended, epochs, lambda level: 1 + lambdas(start, level) - start, 1.0, 0.01, rng)
        for row in rows:  # those of `layers` start at 1
            row |= {key: value + start - 1 for key, value in row.items() if key.startswith("lambda_") and value}
            row |= dict.fromkeys(layer_columns, 0.5)
        write_csv(path / "layers.csv", rows)
