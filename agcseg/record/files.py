"""What a run leaves in its folder: every file is written whole or not at all."""

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from agcseg.errors import UserError
from agcseg.figure1 import PANELS, Panel
from agcseg.nn import AGC2d, ConvUnit

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
ALIVE = ("lambda_mean", "lambda_std", "lambda_negative", "lambda_above_1")
LEVELS = ["lambda_min", *(f"lambda_q{round(100 * q):02d}" for q in QUANTILES[1:-1]), "lambda_max"]


def write(path: Path, content: str | bytes) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def tell(state: str, epoch: int, epochs: int, figures: dict, reason: str = "") -> None:
    """Tell the program that started this process, if it asked by RUN_STATUS_FILE, how the run goes.

    Args:
        figures: a row of metrics.csv, or a result; empty if there is none yet.
    """
    path = os.environ.get("RUN_STATUS_FILE")
    if path:
        status = {"state": state, "progress": f"epoch {epoch}/{epochs}", "reason": reason}
        if figures.get("epoch"):
            status |= {"error": f"{figures['pixel_error']:.1%}".replace("%", " %")}
            status |= {"eta_s": figures["seconds"] / epoch * (epochs - epoch)}
        with contextlib.suppress(OSError):  # nobody to tell is no reason to stop
            write_json(Path(path), status)


def write_json(path: Path, content: dict) -> None:
    write(path, json.dumps(content, indent=1) + "\n")


def write_csv(path: Path, rows: list[dict]) -> None:
    """The last row names the columns; earlier ones, of an older version, may lack some."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[-1].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue())


def write_tables(
    folder: Path, rows: list[dict], layers: list[dict], losses: Tensor, lambdas: dict[int, dict[str, Tensor]]
) -> None:
    """What happened so far, for programs that read no checkpoint; whole each time, from what the checkpoint holds.

    Args:
        rows: of metrics.csv, one per epoch.
        layers: of layers.csv, see `layer_rows`; epoch 0 is the untrained network.
        losses: for steps.npy, (epochs, steps, parts) float32: the loss of every training step, of the classes and,
            where the network finds contours, of the contour.
        lambdas: for lambdas.npz, of norms with λ: number of steps trained -> layer -> (C,). The file has an array
            "step", (T,) int64, and for each layer one of its name, (T, C) float32.
    """
    write_csv(folder / "metrics.csv", rows)
    if layers:
        write_csv(folder / "layers.csv", layers)
    file = io.BytesIO()
    np.save(file, losses.numpy())
    write(folder / "steps.npy", file.getvalue())
    if any(lambdas.values()):
        file = io.BytesIO()
        vectors = {layer: np.stack([at[layer] for at in lambdas.values()]) for layer in next(iter(lambdas.values()))}
        np.savez(file, step=np.array(list(lambdas)), **vectors)
        write(folder / "lambdas.npz", file.getvalue())


def save_checkpoint(path: Path, content: dict) -> None:
    """Tensors and plain Python values only, so that `torch.load(weights_only=True)` reads it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getbuffer())


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint onto the CPU.

    Raises:
        UserError: the file is no checkpoint of this program.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a checkpoint ({error.strerror or error})") from None
    except Exception:  # torch raises what pickle and zipfile raise, and advises to trust the file
        raise UserError(
            f"{path}: cannot be read as a checkpoint; it is empty, cut off, or not written by agcseg-train"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("network"), dict):
        raise UserError(f"{path}: is no checkpoint of agcseg")
    return content


def lambdas_of(network: nn.Module) -> dict[str, Tensor]:
    """λ of every layer that has one, (C,) float32 each, from the image's side to the classes'."""
    norms = {_layer(name): module for name, module in network.named_modules() if isinstance(module, AGC2d)}
    return {layer: norms[layer].mean_scale.detach().float().cpu().clone() for layer in _in_order(norms, network)}


def layer_rows(
    network: nn.Module, epoch: int, signals: dict[str, dict], gems: dict[str, Tensor] | None = None
) -> list[dict]:
    """What the layers do, and where their γ and λ stand, from the image's side to the classes'.

    Args:
        signals: of `agcseg.nn.layer_signals`.
        gems: with GEMS, the factors of its last step, layer by layer, for a column of their means.

    Returns:
        for each layer its name and role (encoder, lateral, decoder, head), its number of filters, the mean of γ, and of
        λ mean, smallest, quantiles, largest and the share in [0, 2], the range that the paper reports (section 3); then
        the size of its filters and maps, common-mode ratio, share of active points and number of dead filters; of the
        filters that are not dead the mean and deviation of λ and the shares below 0 and above 1. None for what a norm
        does not have.
    """
    units = {name: unit for name, unit in network.named_modules() if isinstance(unit, ConvUnit)}
    norms = {_layer(name): module for name, module in network.named_modules() if name.endswith("norm")}
    rows = []
    for layer in _in_order({**units, **norms}, network):
        norm, unit, signal = norms.get(layer), units.get(layer), signals.get(layer, {})
        gamma = norm.weight.detach().float().cpu() if isinstance(getattr(norm, "weight", None), Tensor) else None
        if unit is None and gamma is None:
            continue  # no norm behind the classifier
        scale = norm.mean_scale.detach().float().cpu() if isinstance(norm, AGC2d) else None
        levels = [None] * len(QUANTILES) if scale is None else scale.quantile(torch.tensor(QUANTILES)).tolist()
        rows.append(
            {
                "epoch": epoch,
                "layer": layer,
                "role": layer.partition(".")[0],
                "num_features": len(gamma) if unit is None else unit.conv.out_channels,
                "gamma_mean": None if gamma is None else gamma.mean().item(),
                "lambda_mean": None if scale is None else scale.mean().item(),
                **dict(zip(LEVELS, levels, strict=True)),
                "lambda_inside": None if scale is None else ((scale >= 0) & (scale <= 2)).float().mean().item(),
                "kernel_size": unit and unit.conv.kernel_size[0],
                **{key: signal.get(key) for key in ("height", "width", "common_mode", "active")},
                "dead": sum(signal["dead"]) if signal else None,
                **{f"alive_{key}": signal.get(key) for key in ALIVE},
            }
        )
        if gems is not None:
            rows[-1]["gems_mean"] = gems[layer].mean().item() if layer in gems else None
    return rows


def _layer(norm: str) -> str:
    return norm.removesuffix(".norm").removesuffix("_norm")


def _in_order(layers: Iterable[str], network: nn.Module) -> list[str]:
    return sorted(layers, key=lambda layer: [layer.startswith(part) for part in network.order].index(True))


class TensorBoard:
    """Event files of a run. The curves stand twice: against the epoch, and against the samples seen.

    The second axis has a folder of its own because a resume purges points by step, and the two count differently.
    A run that Figure 1 shows also has its curve under figure1/, so that each panel overlays its runs and no others.
    """

    def __init__(self, folder: Path, epoch: int, samples: int, panels: list[Panel]) -> None:
        resumed = epoch > 0
        self.epochs = SummaryWriter(str(folder), purge_step=epoch + 1 if resumed else None)
        self.samples = SummaryWriter(str(folder / "samples"), purge_step=samples + 1 if resumed else None)
        self.panels = panels
        if panels:
            charts = {f"({panel.letter}) {panel.caption}": ["Multiline", [_tag(panel)]] for panel in PANELS}
            self.epochs.add_custom_scalars({"Figure 1": charts})

    def log(self, row: dict, layers: list[dict], picture: np.ndarray | None) -> None:
        """Add an epoch: its row of metrics.csv, its rows of layers.csv, and the picture where there is one."""
        scalars = {f"{'iou' if key.startswith('iou/') else 'run'}/{key.removeprefix('iou/')}": row[key] for key in row}
        for key in ("train_loss", "val_loss", "pixel_error", "pixel_error_all", "miou"):
            scalars[f"curves/{key}"] = scalars.pop(f"run/{key}")
        scalars |= {_tag(panel): row[panel.metric] for panel in self.panels}
        about = ("epoch", "layer", "role", "num_features", "kernel_size", "height", "width")
        for layer in layers:
            scalars |= {f"{key}/{layer['layer']}": layer[key] for key in layer.keys() - about if layer[key] is not None}
        for tag, value in scalars.items():
            self.epochs.add_scalar(tag, value, row["epoch"])
            if tag.startswith("curves/"):
                self.samples.add_scalar(f"curves_by_samples/{tag.removeprefix('curves/')}", value, row["samples"])
        if picture is not None:
            self.epochs.add_image("validation/image_prediction_truth_error", picture, row["epoch"], dataformats="HWC")
        self.epochs.flush()
        self.samples.flush()

    def end(self, settings: dict, figures: dict[str, float]) -> None:
        """The row of the HParams page. `run_name="."` keeps it from becoming a run of its own."""
        self.epochs.add_hparams(settings, {f"final/{key}": value for key, value in figures.items()}, run_name=".")

    def close(self) -> None:
        self.epochs.close()
        self.samples.close()


def _tag(panel: Panel) -> str:
    return f"figure1/{panel.letter}"


def picture(
    images: Tensor, predictions: Tensor, labels: Tensor, palette: np.ndarray, contours: Tensor | None = None
) -> np.ndarray:
    """Validation images side by side with prediction, truth and error, one row per image.

    Args:
        images: (n, 3, H, W) uint8.
        predictions, labels: (n, H, W) class numbers; 255 in `labels` is painted black.
        palette: (256, 3) uint8.
        contours: (n, H, W) probabilities, for a fifth column, white where sure.

    Returns:
        (n·H, 4·W or 5·W, 3) uint8 with thin white lines between; wrong pixels are red, right ones dark, unlabelled ones
        black.
    """
    images, predictions, labels = (part.cpu().numpy() for part in (images, predictions, labels))
    error = np.zeros((*labels.shape, 3), dtype=np.uint8)
    error[(predictions == labels)] = (40, 40, 40)
    error[(predictions != labels) & (labels != 255)] = (230, 50, 30)
    panels = [images.transpose(0, 2, 3, 1), palette[predictions], palette[labels], error]
    if contours is not None:
        panels.append((255 * contours.float().cpu()).byte().unsqueeze(-1).expand(-1, -1, -1, 3).numpy())
    framed = [np.pad(panel, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255) for panel in panels]
    return np.concatenate(np.concatenate(framed, axis=2), axis=0)


def write_picture(path: Path, content: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(content).save(buffer, "png")
    write(path, buffer.getvalue())
