"""The class loss against a count by hand."""

import math

import torch
from torch.nn import functional as F

from agcseg.losses import segmentation_loss


def by_hand(logits, labels, weights):
    losses = []
    for image, truth in zip(logits, labels, strict=True):
        total, valid = 0.0, 0
        for i in range(truth.shape[0]):
            for j in range(truth.shape[1]):
                label = int(truth[i, j])
                if label != 255:
                    values = image[:, i, j].tolist()
                    log_sum = math.log(sum(math.exp(value) for value in values))
                    total += weights[label] * (log_sum - values[label])
                    valid += 1
        losses.append(total / max(1, valid))
    return torch.tensor(losses, dtype=torch.float64)


def example():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (3, 5, 6), generator=generator, dtype=torch.uint8)
    labels[0, :2] = 255
    return logits, labels, torch.tensor([0.5, 1.0, 2.5, 0.0], dtype=torch.float64)


def test_by_hand():
    logits, labels, weights = example()
    torch.testing.assert_close(segmentation_loss(logits, labels, weights), by_hand(logits, labels, weights.tolist()))
    torch.testing.assert_close(segmentation_loss(logits, labels), by_hand(logits, labels, [1.0] * 4))


def test_scales_with_the_weights_unlike_torch():
    logits, labels, weights = example()
    torch.testing.assert_close(
        segmentation_loss(logits, labels, 30 * weights), 30 * segmentation_loss(logits, labels, weights)
    )
    torchs = [F.cross_entropy(logits, labels.long(), w, ignore_index=255) for w in (weights, 30 * weights)]
    torch.testing.assert_close(*torchs)


def test_nothing_labelled_is_zero_and_has_no_gradient():
    logits, labels, weights = example()
    labels[1] = 255
    logits.requires_grad_()
    loss = segmentation_loss(logits, labels, weights)
    loss.sum().backward()
    assert loss[1] == 0 and logits.grad[1].abs().max() == 0 and logits.grad.isfinite().all()


def test_half_precision_is_raised():
    logits, labels, weights = example()
    loss = segmentation_loss(logits.bfloat16(), labels, weights.float())
    assert loss.dtype == torch.float32


def test_deterministic_algorithms():
    logits, labels, weights = example()
    torch.use_deterministic_algorithms(True)
    try:
        segmentation_loss(logits.requires_grad_(), labels, weights).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
