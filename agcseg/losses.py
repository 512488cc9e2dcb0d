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

    Args:
        logits: (N, K, H, W); half precision is raised to float32.
        labels: (N, H, W), integers, class numbers or 255 for pixels that do not count.
        class_weights: (K,), or None for 1.

    Returns:
        (N,) loss per image.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    valid = labels != IGNORE
    classes = torch.where(valid, labels, 0).long()
    # gather, not NLLLoss: the same number, and deterministic on CUDA
    loss = -F.log_softmax(logits, dim=1).gather(1, classes.unsqueeze(1)).squeeze(1)
    weights = valid.to(loss.dtype) if class_weights is None else class_weights[classes] * valid
    return (loss * weights).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
