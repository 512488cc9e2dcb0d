"""Pixel error and IoU of a trained network on a data set, with what they owe to the choice of images."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from agcseg import metrics
from agcseg.data.cache import contours, digest, digests, resize_image, resize_truth
from agcseg.data.labels import IGNORE
from agcseg.data.layout import Layout, Sample, load
from agcseg.data.pictures import each
from agcseg.errors import UserError
from agcseg.trained import Trained, logits, prediction

RESAMPLES = 1000


def evaluate(
    trained: Trained,
    layout: Layout,
    samples: list[Sample],
    full: bool = False,
    minibatch: int = 4,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict:
    """Compare a network's predictions with the labels of a data set.

    Args:
        trained: its network on the device that computes.
        layout: of the samples; its classes must have the names of the network's.
        samples: what is evaluated, from `agcseg.data.layout.list_samples`.
        full: at the labels' own resolution, the logits resized to it, as benchmarks do. Else at the training size, as
            in training, where a network with contours gets their figures too.
        minibatch: images at once.
        progress: wraps the iteration over minibatches.

    Returns:
        ready for JSON: images; digest, of the images as they were seen (`agcseg.data.cache.Cached.digest`);
        pixel_error, pixel_error_all and miou as in `agcseg.metrics.summarise`, the first and the last with `_interval`,
        [low, high], 95 % by the bootstrap over images (None below two images); classes, a list of class, iou,
        iou_interval, recall and share (of the labelled pixels), None where a class does not occur;
        confusion, pixels of the true class (rows) by the predicted one.

    Raises:
        UserError: other classes, a file that cannot be used (it is named), or no labelled pixel at all.
    """
    if layout.classes.names != trained.classes.names:
        raise UserError(
            f"{trained.path}: tells {', '.join(trained.classes.names)} apart; {layout.title} has "
            f"{', '.join(layout.classes.names)}"
        )
    (height, width), band = trained.config.data.size, trained.config.contour.band
    size = height, width
    device = next(trained.network.parameters()).device

    def read(sample: Sample):
        image, *truth = load(sample, layout)
        small = [resize_truth(part, size) for part in truth]
        seen = resize_image(image, size), small[0], contours(*small)
        its = (sample.name, *digests(*seen)[: 1 + trained.network.contour])
        return seen[0], truth[0] if full else small[0], seen[2], its

    counted, compared, labelled = [], [], False
    seen: list[tuple[str, ...]] = []
    for start in progress(range(0, len(samples), minibatch)):
        images, labels, borders, its = zip(*each(read, samples[start : start + minibatch]), strict=True)
        seen += its
        labelled = labelled or any((label != IGNORE).any() for label in labels)
        scores, contour = logits(trained, torch.from_numpy(np.stack(images)).to(device))
        labels = [torch.tensor(label, device=device) for label in labels]
        for score, label in zip(scores, labels, strict=True):
            predicted = prediction(score, (label.shape[0], label.shape[1]))
            counted.append(metrics.count(predicted[None], label[None], len(layout.classes)))
        if contour is not None and not full:
            truth = torch.from_numpy(np.stack(borders)).to(device)
            compared.append(metrics.count_contours(contour, truth, torch.stack(labels), band))
    wrong, valid = (torch.cat([count[i] for count in counted]).cpu() for i in (0, 1))
    confusions = torch.stack([count[2] for count in counted]).cpu()
    if not labelled:
        raise UserError(f"{layout.title}: the labels of these {len(samples)} images hold no labelled pixel")
    figures = metrics.summarise(wrong, valid, confusions.sum(0))
    if compared:
        figures |= metrics.summarise_contours(*map(torch.cat, zip(*compared, strict=True)))
    return {
        "images": len(samples),
        "digest": digest(seen),
        **_with_intervals(figures, wrong, valid, confusions, layout.classes.names),
    }


def _with_intervals(figures: dict, wrong: Tensor, valid: Tensor, confusions: Tensor, names: tuple[str, ...]) -> dict:
    confusion, iou = confusions.sum(0), figures.pop("iou")
    error, miou, class_iou = intervals(wrong, valid, confusions) or (None, None, [None] * len(names))
    labelled = confusion.sum(1)
    recall, share = confusion.diagonal() / labelled, labelled / labelled.sum()
    columns = zip(names, iou, class_iou, recall.tolist(), share.tolist(), strict=True)
    keys = ("class", "iou", "iou_interval", "recall", "share")
    return {
        **{key: _finite(value) for key, value in figures.items()},
        "pixel_error_interval": error,
        "miou_interval": miou,
        "classes": [dict(zip(keys, map(_finite, row), strict=True)) for row in columns],
        "confusion": confusion.tolist(),
    }


def intervals(wrong: Tensor, valid: Tensor, confusions: Tensor) -> tuple[list, list, list] | None:
    """95 % intervals by the percentile bootstrap: images are drawn anew with replacement, 1000 times, seeded.

    They tell how far a figure depends on the choice of images, taken as independent (frames of one film are not), and
    nothing of how it varies from one training to the next.

    Args:
        wrong, valid, confusions: per image, (n,), (n,) and (n, K, K), from `agcseg.metrics.count`.

    Returns:
        [low, high] of pixel_error, of miou, and of each class's IoU; None for fewer than two images.
    """
    labelled = valid > 0
    wrong, valid, confusions = wrong[labelled].double(), valid[labelled].double(), confusions[labelled].double()
    n = len(valid)
    if n < 2:
        return None
    drawn = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(0))
    error = (wrong / valid)[drawn].mean(1)
    times = torch.zeros(RESAMPLES, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    confusion = (times @ confusions.flatten(1)).view(RESAMPLES, *confusions.shape[1:])
    hit = confusion.diagonal(dim1=1, dim2=2)
    iou = hit / (confusion.sum(1) + confusion.sum(2) - hit)
    at = torch.tensor([0.025, 0.975], dtype=torch.float64)
    of_classes = iou.nanquantile(at, 0).T.tolist()
    return error.quantile(at).tolist(), iou.nanmean(1).quantile(at).tolist(), of_classes


def _finite(value):
    """None for what is not a number: JSON has no NaN."""
    if isinstance(value, list):
        return None if any(number != number for number in value) else value
    return None if value != value else value


def confusion_figure(confusion: list[list[int]], names: tuple[str, ...], title: str) -> Figure:
    """The confusion matrix as shares of each true class, in percent; rows of classes that do not occur are empty."""
    counts = np.array(confusion, dtype=float)
    with np.errstate(invalid="ignore"):
        shares = counts / counts.sum(1, keepdims=True)
    names, title = tuple(name.replace("$", r"\$") for name in names), title.replace("$", r"\$")  # no formulas
    side = 2.5 + 0.42 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(shares >= 0.005):
        share = shares[row, column]
        axes.text(
            column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7,
            color="white" if share > 0.5 else "black",
        )  # fmt: skip
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=9)
    axes.spines[:].set_visible(False)
    return figure
