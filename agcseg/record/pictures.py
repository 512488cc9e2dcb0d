"""Validation images as people look at them."""

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor


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


def png(picture: Any, **options) -> bytes:
    """The content of a PNG file.

    Args:
        picture: of Pillow, or a figure of matplotlib.
        options: of its `save` or `savefig`, such as dpi.
    """
    file = io.BytesIO()
    save = picture.save if isinstance(picture, Image.Image) else picture.savefig
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # that matplotlib's font lacks: it draws a box
        save(file, format="png", **options)
    return file.getvalue()
