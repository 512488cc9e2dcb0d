"""The class loss: weighted cross-entropy, counted per image and divided by the number of labelled pixels."""

import torch
from torch import Tensor
from torch.nn import functional as F

from agcseg.data.labels import IGNORE


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
    """
    return _Loss.apply(logits, labels, class_weights)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, class_weights):
        ctx.save_for_backward(logits, labels, class_weights)
        classes, weights = _pixels(logits, labels, class_weights)
        loss = F.log_softmax(logits, 1, dtype=weights.dtype).gather(1, classes)
        return -(loss * weights).sum((1, 2, 3))

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("segmentation_loss has no second derivative (create_graph=True)")
        logits, labels, class_weights = ctx.saved_tensors
        classes, weights = _pixels(logits, labels, class_weights)
        error = F.softmax(logits, 1, dtype=weights.dtype)
        error.scatter_(1, classes, error.gather(1, classes) - 1)
        return error.mul_(weights * grad.view(-1, 1, 1, 1)).to(logits.dtype), None, None


def _pixels(logits: Tensor, labels: Tensor, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Class (int64) and weight w[label] / max(1, |V|) of each pixel, 0 where it does not count, both (N, 1, H, W)."""
    labels = labels.unsqueeze(1)
    valid = labels != IGNORE
    classes = torch.where(valid, labels, 0).long()
    weights = valid.to(torch.promote_types(logits.dtype, torch.float32))
    weights /= valid.sum((1, 2, 3), keepdim=True).clamp(min=1)
    return classes, weights if class_weights is None else weights.mul_(class_weights[classes])
