"""The losses, counted per image: weighted cross-entropy of the classes, and one of the contour near its place."""

import torch
from torch import Tensor
from torch.nn import functional as F

from agcseg.data.labels import IGNORE
from agcseg.nn.passes import kernels

CONTOUR_LOSSES = ("iou", "bce", "class_iou")


def image_losses(
    outputs: Tensor | tuple,
    labels: Tensor,
    class_weights: Tensor | None = None,
    contours: Tensor | None = None,
    kind: str = "iou",
    band: int = 3,
) -> list[Tensor]:
    """All that a network's outputs cost, in parts which are simply added (Deep Control, section 3, ii).

    Args:
        outputs: class logits, or a `ClassNetOutput`. What its `deep` ones cost is added to the parts, measured against
            the nearest labels, and contours wherever a coarse pixel covers one (so that no instances need be kept).
        labels, class_weights: see `segmentation_loss`.
        contours, kind, band: see `contour_loss`; needed for a `ClassNetOutput` only.

    Returns:
        the class loss of each image, (N,), and if `outputs` has a contour, the contour loss of each, (N,).
    """
    if isinstance(outputs, Tensor):
        return [segmentation_loss(outputs, labels, class_weights)]
    assert contours is not None
    classes, contour, deep = outputs
    parts = [
        segmentation_loss(classes, labels, class_weights),
        contour_loss(classes if kind == "class_iou" else contour, contours, labels, kind, band),
    ]
    for coarse in deep:
        step = labels.shape[-1] // coarse.classes.shape[-1]
        nearest = labels[:, step // 2 :: step, step // 2 :: step]
        covered = F.max_pool2d(contours.float(), step) * (nearest != IGNORE)
        added = image_losses(coarse, nearest, class_weights, covered, kind, band)
        parts = [a + b for a, b in zip(parts, added, strict=True)]
    return parts


def segmentation_loss(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Weighted cross-entropy of each image.

    For an image with the labelled pixels V:  1/max(1, |V|) · Σ_V w[label] · -log softmax(logits)[label].
    It divides by the number of pixels, not by the sum of their weights as `torch.nn.CrossEntropyLoss(weight=...)` does:
    only so the weights' mean acts on the learning rate, which is why Deep Control (section 3) fixes it to 1. Per-image
    division makes a minibatch's gradient the mean of its images' gradients; an image without a labelled pixel gives 0.
    Softmax is rebuilt from the logits in backward instead of being kept, and nothing is summed by atomics, so it is
    deterministic on CUDA too.

    Args:
        logits: (N, K, H, W); half precision is computed in float32.
        labels: (N, H, W), integers, class numbers or 255 for pixels that do not count.
        class_weights: (K,), constants, or None for 1.

    Returns:
        (N,) loss per image. It has no second derivative.

    Raises:
        ValueError: labels or weights are of another shape, or labels no integers.
    """
    _check_labels(logits, labels)
    if class_weights is not None and class_weights.shape != logits.shape[1:2]:
        raise ValueError(f"{logits.shape[1]} classes take as many weights; got {tuple(class_weights.shape)}")
    return _Loss.apply(logits, labels, class_weights)


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    if labels.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(f"logits of shape {tuple(logits.shape)} do not fit labels of shape {tuple(labels.shape)}")
    if labels.is_floating_point():
        raise ValueError(f"labels are class numbers, integers; got {labels.dtype}")


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, class_weights):
        ctx.kernels = None if torch.compiler.is_compiling() else kernels(logits)
        if ctx.kernels:
            loss, number = ctx.kernels.class_loss(logits, labels, class_weights, IGNORE)
            ctx.save_for_backward(logits, labels, class_weights, number)
            return loss
        ctx.save_for_backward(logits, labels, class_weights)
        classes, weights = _pixels(logits, labels, class_weights)
        loss = F.log_softmax(logits, 1, dtype=weights.dtype).gather(1, classes)
        loss = torch.where(weights != 0, loss * weights, 0)  # a pixel that does not count may have a loss of infinity
        return -loss.sum((1, 2, 3))

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("segmentation_loss has no second derivative (create_graph=True)")
        logits, labels, class_weights, *number = ctx.saved_tensors
        if number:
            d = ctx.kernels.class_loss_gradient(logits, labels, class_weights, IGNORE, grad / number[0])
            return d, None, None
        classes, weights = _pixels(logits, labels, class_weights)
        error = F.softmax(logits, 1, dtype=weights.dtype)
        # A comparison, no scatter: torch's deterministic algorithms would sort every pixel for one.
        numbers = torch.arange(error.shape[1], device=error.device).view(-1, 1, 1)
        error.add_(torch.eq(classes, numbers, out=torch.empty_like(error, dtype=torch.bool)), alpha=-1)
        return error.mul_(weights * grad.view(-1, 1, 1, 1)).to(logits.dtype), None, None


def _pixels(logits: Tensor, labels: Tensor, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Class (int64) and weight w[label] / max(1, |V|) of each pixel, 0 where it does not count, both (N, 1, H, W)."""
    labels = labels.unsqueeze(1)
    valid = labels != IGNORE
    classes = torch.where(valid, labels, 0).long()
    weights = valid.to(torch.promote_types(logits.dtype, torch.float32))
    weights /= valid.sum((1, 2, 3), keepdim=True).clamp(min=1)
    return classes, weights if class_weights is None else weights.mul_(class_weights[classes])


def contour_loss(logits: Tensor, contours: Tensor, labels: Tensor, kind: str = "iou", band: int = 3) -> Tensor:
    """Loss of each image over the labelled pixels near a contour, and no others.

    The paper names "the intersection over union (IoU) of only the points near the instance boundaries" (section 3, ii)
    and no formula. With the probability p, the contour b and sums over the band, "iou" is the soft one:
    1 - (Σ p·b + 1) / (Σ (p + b - p·b) + 1). An image without a contour gives 0.

    Args:
        logits: of the contour, (N, 1, H, W); for "class_iou" of the classes, (N, K, H, W).
        contours: b, (N, H, W), 0 or 1.
        labels: (N, H, W), class numbers or 255.
        kind: "iou"; "bce", binary cross-entropy, mean over the band; or "class_iou", the soft IoU of each class in the
            band, mean over those that occur there (a contour head then gets no gradient).
        band: how far from a contour "near" is, in pixels (the larger of rows and columns).

    Returns:
        (N,), in at least float32.

    Raises:
        ValueError: contours or labels are of another shape, labels no integers, or there is no such kind.
    """
    _check_labels(logits, labels)
    if contours.shape != labels.shape:
        raise ValueError(f"contours of shape {tuple(contours.shape)} do not fit labels of {tuple(labels.shape)}")
    if kind not in CONTOUR_LOSSES:
        raise ValueError(f"contour loss {kind!r} is not one of {', '.join(CONTOUR_LOSSES)}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    inside = (dilate(contours, band) & (labels != IGNORE)).unsqueeze(1)
    truth = (contours.unsqueeze(1) * inside).to(logits.dtype)
    if kind == "bce":
        costs = F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * inside
        return costs.sum((1, 2, 3)) / inside.sum((1, 2, 3)).clamp(min=1)
    if kind == "class_iou":
        numbers = torch.arange(logits.shape[1], dtype=labels.dtype, device=labels.device).view(-1, 1, 1)
        probability, truth = logits.softmax(1), ((labels.unsqueeze(1) == numbers) & inside).to(logits.dtype)
    else:
        probability = logits.sigmoid()
    hit, there = (probability * truth).sum((2, 3)), truth.sum((2, 3))
    union = (probability * inside).sum((2, 3)) + there - hit
    counts = there > 0
    return ((1 - (hit + 1) / (union + 1)) * counts).sum(1) / counts.sum(1).clamp(min=1)


def dilate(marks: Tensor, distance: int) -> Tensor:
    """Pixels at most `distance` rows and columns away from a marked one; (N, H, W) -> bool."""
    return F.max_pool2d(marks.float(), 2 * distance + 1, stride=1, padding=distance) > 0
