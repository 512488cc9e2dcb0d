"""What is computed on images during a run: the gradient of a minibatch, and the validation."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from agcseg import metrics
from agcseg.config import Config
from agcseg.data.minibatches import Split, minibatches
from agcseg.losses import image_losses
from agcseg.training import parallel
from agcseg.training.machine import channels_last


def backward(
    model: Any, images: Tensor, labels: Tensor, weights: Tensor, config: Config, contours: Tensor | None = None
) -> Tensor:
    """Add the gradient of a minibatch's mean loss to the parameters' `.grad`, in `config.accumulate` parts.

    Summed over images and divided by the whole minibatch, so that the split changes nothing (batch normalisation's
    statistics apart). With several processes `images` are this one's share; `model`, a DistributedDataParallel,
    averages the gradients.

    Returns:
        the mean losses that were added, detached: (1,), that of the classes, or (2,), and that of the contour.
    """
    chunks = [t.chunk(config.accumulate) for t in (images, labels, contours) if t is not None]
    left = config.accumulate
    total: Any = 0
    for some, truth, *borders in zip(*chunks, strict=True):
        left -= 1
        with model.no_sync() if left and parallel.world() > 1 else nullcontext():
            losses = _losses(_logits(model, some, config), truth, weights, config, *borders)
            losses = losses.sum(1) / len(images)
            losses.sum().backward()
        total += losses.detach()
    return total


@torch.no_grad()
def validate(model: nn.Module, val: Split, weights, num_classes: int, config: Config, device):
    """Validation losses, means over the images with a labelled pixel, and the figures of `agcseg.metrics`; the same
    image by image; predictions of the images that are shown; and of those, where the network finds contours, the
    contour's probabilities, else None.

    Of n processes the k-th takes the images k, k + n, ..., and they put the answers together."""
    first, step = parallel.rank(), parallel.world()
    mine, wanted = range(first, len(val), step), set(shown_images(val, config.images))
    measured, shown, shown_contours, done = [], [], [], 0
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    for images, labels, *contours in minibatches(val, config.minibatch // step, device, share=(first, step)):
        outputs = _logits(model, images, config)
        prediction = (outputs.classes if contours else outputs).argmax(1)
        wrong, labelled, pairs = metrics.count(prediction, labels, num_classes)
        confusion += pairs
        columns = [wrong, labelled, *_losses(outputs, labels, weights, config, *contours)]
        if contours:
            iou, counts = metrics.count_contours(outputs.contour, contours[0], labels, config.contour.band)
            columns += [iou, *counts.T]
        measured.append(torch.stack([column.double() for column in columns], 1))
        for i, position in enumerate(mine[done : done + len(images)]):
            shown.append(prediction[i].byte() if position in wanted else None)
            if contours:
                shown_contours.append(outputs.contour[i, 0].sigmoid() if position in wanted else None)
        done += len(images)
    # Only here anything waits for the device. Counts are exact in float64 too.
    shown, shown_contours = ([s if s is None else s.cpu() for s in some] for some in (shown, shown_contours))
    table = torch.tensor(parallel.gather(torch.cat(measured).tolist()), dtype=torch.float64)
    shown, shown_contours = ([s for s in parallel.gather(some) if s is not None] for some in (shown, shown_contours))
    wrong, labelled = table[:, 0], table[:, 1]
    losses = table[:, 2:4] if contours else table[:, 2:3]
    figures = loss_figures("val", losses[labelled > 0]) | metrics.summarise(
        wrong, labelled, parallel.add(confusion).cpu()
    )
    if contours:
        figures |= metrics.summarise_contours(table[:, 4], table[:, 5:])
    rows = zip(val.names, wrong.tolist(), labelled.tolist(), losses.sum(1).tolist(), strict=True)
    by_image = [
        {"image": name, "wrong_pixels": int(w), "labelled_pixels": int(n), "loss": loss} for name, w, n, loss in rows
    ]
    stacks = (torch.stack(some) if some else None for some in (shown, shown_contours))
    return figures, by_image, *stacks


def shown_images(val: Split, number: int) -> list[int]:
    """Positions of the validation images that are pictured: spread evenly, the same every time."""
    number = min(number, len(val))
    return [i * len(val) // number for i in range(number)]


def loss_figures(what: str, losses: Tensor) -> dict[str, float]:
    """Means of losses, (n, 1) or (n, 2): their sum and, if there are two, each."""
    figures = {f"{what}_loss": losses.sum(1).mean().item()}
    if losses.shape[1] == 2:
        of_classes, of_contour = losses.mean(0).tolist()
        figures |= {f"{what}_class_loss": of_classes, f"{what}_contour_loss": of_contour}
    return figures


def constant_error(commonest: int, val: Split, num_classes: int, device) -> float:
    """Validation pixel error of naming one class everywhere."""
    counts = []
    for rows in torch.from_numpy(val.indices).split(16):
        labels = val.labels[rows].to(device)
        counts.append(metrics.count(torch.full_like(labels, commonest), labels, num_classes))
    wrong, valid = (torch.cat([count[k] for count in counts]) for k in (0, 1))
    return metrics.summarise(wrong, valid, torch.stack([count[2] for count in counts]).sum(0))["pixel_error"]


def _losses(outputs, labels: Tensor, weights: Tensor, config: Config, contours: Tensor | None = None) -> Tensor:
    """(1, N), or with a contour (2, N): the losses of `image_losses`."""
    return torch.stack(image_losses(outputs, labels, weights, contours, config.contour.loss, config.contour.band))


def _logits(model: nn.Module, images: Tensor, config: Config) -> Any:  # Tensor, or a ClassNetOutput
    if channels_last(config.channels_last, images.device):
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        return model(images)
