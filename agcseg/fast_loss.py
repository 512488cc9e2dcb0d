"""The class loss with one map fewer: softmax is rebuilt from the logits in backward instead of being kept."""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = 255


def segmentation_loss(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Weighted cross-entropy of each image: 1/max(1, |V|) · Σ_V w[label] · -log softmax(logits)[label].

    V are the labelled pixels of the image; one without any gives 0.

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
            raise RuntimeError("the fast loss has no second derivative (create_graph=True): use the plain one")
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
