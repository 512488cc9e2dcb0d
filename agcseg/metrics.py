"""Validation figures from integer counts: every image once, count first, divide last."""

from typing import Any

import torch
from torch import Tensor

from agcseg.data.labels import IGNORE
from agcseg.losses import contour_loss, dilate


def count(prediction: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count right and wrong pixels.

    Args:
        prediction: (N, H, W) class numbers.
        labels: (N, H, W) class numbers, 255 where a pixel does not count.

    Returns:
        wrong pixels per image (N,), labelled pixels per image (N,), and the confusion matrix (K, K) with the truth in
        rows; all int64.
    """
    valid = labels != IGNORE
    wrong = ((prediction != labels) & valid).sum((1, 2))
    cells = num_classes**2  # and one more, for pixels that do not count
    pairs = torch.where(valid, labels.long() * num_classes + prediction, cells).flatten()
    # Neither labels[valid] nor bincount: both wait for the device to say how much there is.
    confusion = pairs.new_zeros(cells + 1).scatter_add_(0, pairs, pairs.new_ones(1).expand_as(pairs))
    return wrong, valid.sum((1, 2)), confusion[:cells].view(num_classes, num_classes)


def summarise(wrong: Tensor, valid: Tensor, confusion: Tensor) -> dict[str, Any]:
    """Figures of a whole validation set from the counts of `count`: per image concatenated, the matrix summed.

    Returns:
        pixel_error: mean over images of the share of wrong pixels (Deep Control, section 3: "mean fraction of
            incorrectly labelled pixels"); images without a labelled pixel are left out.
        pixel_error_all: the same share over all pixels together.
        iou: intersection over union per class, NaN for a class neither labelled nor predicted.
        miou: their mean over the classes that have one.
    """
    labelled = valid > 0
    shares = wrong[labelled].double() / valid[labelled].double()
    hit = confusion.diagonal().double()
    union = confusion.sum(0).double() + confusion.sum(1).double() - hit
    iou = hit / union  # 0/0 is NaN
    return {
        "pixel_error": shares.mean().item(),
        "pixel_error_all": (wrong.sum().double() / valid.sum().double()).item(),
        "miou": iou.nanmean().item(),
        "iou": iou.tolist(),
    }


def count_contours(logits: Tensor, contours: Tensor, labels: Tensor, band: int) -> tuple[Tensor, Tensor]:
    """Compare contours, each way within `band` pixels.

    Args:
        logits: (N, 1, H, W), of a contour; predicted where positive, all over the labelled pixels.
        contours: (N, H, W), 0 or 1.
        labels: (N, H, W), class numbers or 255.

    Returns:
        soft IoU in the band per image (N,), see `agcseg.losses.contour_loss`; and int64 counts per image, (N, 4):
        predicted pixels, those of them near the truth, true pixels, those of them near a prediction.
    """
    predicted, truth = (logits.squeeze(1) > 0) & (labels != IGNORE), contours.bool()
    counts = [predicted, predicted & dilate(truth, band), truth, truth & dilate(predicted, band)]
    return 1 - contour_loss(logits, contours, labels, "iou", band), torch.stack([c.sum((1, 2)) for c in counts], 1)


def summarise_contours(iou: Tensor, counts: Tensor) -> dict[str, float]:
    """Figures of a whole validation set from what `count_contours` gave, concatenated.

    Returns:
        contour_iou, and contour_f: harmonic mean of the share of predicted pixels near a true one and of true pixels
        near a predicted one. Means over the images that have a contour.
    """
    has = counts[:, 2] > 0
    predicted, right, true, found = counts[has].double().unbind(1)
    precision, recall = right / predicted.clamp(min=1), found / true
    f = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return {"contour_iou": iou[has].double().mean().item(), "contour_f": f.mean().item()}
