"""What happened in a run, for programs that read no checkpoint: its tables, and the figures of its layers."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from agcseg.networks import ClassNet, SegNet
from agcseg.networks.foreign import Foreign
from agcseg.nn import AGC2d, ConvUnit
from agcseg.record.files import write, write_csv

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
ALIVE = ("lambda_mean", "lambda_std", "lambda_negative", "lambda_above_1")
LEVELS = ["lambda_min", *(f"lambda_q{round(100 * q):02d}" for q in QUANTILES[1:-1]), "lambda_max"]


def write_tables(
    folder: Path,
    rows: list[dict],
    layers: list[dict],
    losses: Tensor,
    lambdas: dict[int, Tensor],
    images: list[dict],
    network: nn.Module,
) -> None:
    """What happened so far; whole each time, from what the checkpoint holds. What is empty has no file.

    Args:
        rows: of metrics.csv, one per epoch.
        layers: of layers.csv, see `layer_rows`; epoch 0 is the untrained network.
        losses: for steps.npy, (epochs, steps, parts) float32: the loss of every training step, of the classes and,
            where the network finds contours, of the contour.
        lambdas: for lambdas.npz, of norms with λ: number of steps trained -> `lambdas_of(network)`. The file has an
            array "step", (T,) int64, and for each layer one of its name, (T, C) float32.
        images: of images.csv, the last validation, image by image.
    """
    for name, table in (("metrics.csv", rows), ("layers.csv", layers), ("images.csv", images)):
        if table:
            write_csv(folder / name, table)
    file = io.BytesIO()
    np.save(file, losses.numpy())
    write(folder / "steps.npy", file.getvalue())
    norms = _with_lambda(network)
    if norms and lambdas:
        file = io.BytesIO()
        vectors = torch.stack(list(lambdas.values())).split([norm.num_features for norm in norms.values()], 1)
        layered = {layer: vector.numpy() for layer, vector in zip(norms, vectors, strict=True)}
        np.savez(file, step=np.array(list(lambdas)), **layered)
        write(folder / "lambdas.npz", file.getvalue())


def lambdas_of(network: nn.Module) -> Tensor:
    """λ of all layers that have one, from the image's side to the classes', one after the other: (sum of C,) float32 on
    the network's device, where nothing waits for it."""
    return _joined([norm.mean_scale for norm in _with_lambda(network).values()])


def layer_rows(
    network: nn.Module, epoch: int, signals: dict[str, dict], gems: dict[str, Tensor] | None = None
) -> list[dict]:
    """What the layers do, and where their γ and λ stand, from the image's side to the classes'.

    Args:
        signals: of `agcseg.nn.layer_signals`.
        gems: with GEMS, the factors of its last step, layer by layer, for a column of their means.

    Returns:
        for each layer its name and role (encoder, lateral, decoder, head; in a third-party network what its name starts
        with), its number of filters, the mean of γ, and of λ the mean, smallest, quantiles, largest and the share in
        [0, 2], the range that the paper reports (section 3); then the size of its filters and maps, common-mode ratio,
        share of active points and number of dead filters; of the filters that are not dead the mean and deviation of λ
        and the shares below 0 and above 1. None for what a norm does not have.
    """
    units = {name: unit for name, unit in network.named_modules() if isinstance(unit, ConvUnit)}
    norms, signals = _norms(network), {name.removeprefix("network."): of for name, of in signals.items()}
    gammas = {layer: getattr(m, "weight", None) for layer, m in norms.items()}
    gammas = {layer: gamma for layer, gamma in gammas.items() if isinstance(gamma, Tensor)}
    scales = {layer: module.mean_scale for layer, module in norms.items() if isinstance(module, AGC2d)}
    gammas, scales, factors = _on_cpu(gammas), _on_cpu(scales), _on_cpu(gems or {}, torch.float64)
    rows = []
    for layer in _in_order({**units, **norms}, network):
        unit, signal, gamma, scale = units.get(layer), signals.get(layer, {}), gammas.get(layer), scales.get(layer)
        features = unit.conv.out_channels if unit is not None else None if gamma is None else len(gamma)
        if features is None:
            continue  # no norm behind the classifier
        levels = [None] * len(QUANTILES) if scale is None else scale.quantile(torch.tensor(QUANTILES)).tolist()
        rows.append(
            {
                "epoch": epoch,
                "layer": layer,
                "role": layer.partition(".")[0],
                "num_features": features,
                "gamma_mean": None if gamma is None else gamma.mean().item(),
                "lambda_mean": None if scale is None else scale.mean().item(),
                **dict(zip(LEVELS, levels, strict=True)),
                "lambda_inside": None if scale is None else ((scale >= 0) & (scale <= 2)).float().mean().item(),
                "kernel_size": unit and unit.conv.kernel_size[0],
                **{key: signal.get(key) for key in ("height", "width", "common_mode", "active")},
                "dead": sum(signal["dead"]) if "dead" in signal else None,
                **{f"alive_{key}": signal.get(key) for key in ALIVE},
            }
        )
        if gems is not None:
            rows[-1]["gems_mean"] = factors[layer].mean().item() if layer in factors else None
    return rows


def _joined(vectors: list[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """One after the other; on the CPU and empty if there are none."""
    return torch.cat([vector.detach().flatten().to(dtype) for vector in vectors]) if vectors else torch.empty(0)


def _on_cpu(vectors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """In one copy."""
    parts = _joined(list(vectors.values()), dtype).cpu().split([vector.numel() for vector in vectors.values()])
    return dict(zip(vectors, parts, strict=False))


def _with_lambda(network: nn.Module) -> dict[str, AGC2d]:
    norms = {layer: module for layer, module in _norms(network).items() if isinstance(module, AGC2d)}
    return {layer: norms[layer] for layer in _in_order(norms, network)}


def _norms(network: nn.Module) -> dict[str, nn.Module]:
    """By the names of their layers; those of a third-party network are called as it calls them."""
    if isinstance(network, Foreign):
        return {layer: network.network.get_submodule(layer) for layer in network.layers}
    return {_layer(name): module for name, module in network.named_modules() if name.endswith("norm")}


def _layer(norm: str) -> str:
    return norm.removesuffix(".norm").removesuffix("_norm")


def _in_order(layers: Iterable[str], network: nn.Module) -> list[str]:
    if isinstance(network, Foreign):
        return [layer for layer in network.layers if layer in layers]
    order = cast(SegNet | ClassNet, network).order
    return sorted(layers, key=lambda layer: [layer.startswith(part) for part in order].index(True))
