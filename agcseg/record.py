"""What a run leaves in its folder: every file is written whole or not at all."""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from agcseg.errors import UserError
from agcseg.nn import AGC2d

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def write(path: Path, content: str | bytes) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: dict) -> None:
    write(path, json.dumps(content, indent=1) + "\n")


def write_metrics(folder: Path, rows: list[dict]) -> None:
    """metrics.csv: one row per epoch. Written whole each time, from the rows that the checkpoint holds."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(folder / "metrics.csv", text.getvalue())


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
    except Exception as error:  # torch raises what pickle, zipfile and the disk raise
        raise UserError(f"{path}: cannot be read as a checkpoint ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict) or "network" not in content:
        raise UserError(f"{path}: is no checkpoint of agcseg")
    return content


def layer_figures(network: nn.Module) -> dict[str, float]:
    """λ and γ of every normalised layer: mean of γ; mean and quantiles of λ over the layer's filters."""
    figures = {}
    for name, module in network.named_modules():
        layer = name.removesuffix(".norm")
        weight = getattr(module, "weight", None)
        if name.endswith("norm") and isinstance(weight, Tensor):
            figures[f"gamma_mean/{layer}"] = weight.detach().mean().item()
        if isinstance(module, AGC2d):
            mean_scale = module.mean_scale.detach().float()
            figures[f"lambda_mean/{layer}"] = mean_scale.mean().item()
            at = torch.tensor(QUANTILES, device=mean_scale.device)
            for q, value in zip(QUANTILES, mean_scale.quantile(at).tolist(), strict=True):
                figures[f"lambda_q{round(100 * q):02d}/{layer}"] = value
    return figures


class TensorBoard:
    """Event files of a run. The curves stand twice: against the epoch, and against the samples seen.

    The second axis has a folder of its own because a resume purges points by step, and the two count differently.
    """

    def __init__(self, folder: Path, epoch: int, samples: int) -> None:
        resumed = epoch > 0
        self.epochs = SummaryWriter(str(folder), purge_step=epoch + 1 if resumed else None)
        self.samples = SummaryWriter(str(folder / "samples"), purge_step=samples + 1 if resumed else None)

    def log(self, row: dict, figures: dict[str, float], picture: np.ndarray | None) -> None:
        scalars = {f"{'iou' if key.startswith('iou/') else 'run'}/{key.removeprefix('iou/')}": row[key] for key in row}
        for key in ("train_loss", "val_loss", "pixel_error", "pixel_error_all", "miou"):
            scalars[f"curves/{key}"] = scalars.pop(f"run/{key}")
        for tag, value in {**scalars, **figures}.items():
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
