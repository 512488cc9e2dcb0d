"""The class loss against a count by hand."""

import math

import pytest
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


def literal(logits, labels, class_weights):
    """The formula in torch's own operations, differentiated by autograd."""
    valid = labels != 255
    classes = torch.where(valid, labels, 0).long()
    losses = -F.log_softmax(logits, 1).gather(1, classes.unsqueeze(1)).squeeze(1) * valid * class_weights[classes]
    return losses.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)


def test_gradient_is_that_of_the_literal_formula():
    logits, labels, weights = example()
    logits.requires_grad_()
    back = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad(loss(logits, labels, weights), logits, back)[0] for loss in (segmentation_loss, literal)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_half_precision_is_computed_in_float32():
    logits, labels, weights = example()
    logits = logits.bfloat16().requires_grad_()
    loss = segmentation_loss(logits, labels, weights.float())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, literal(logits.float(), labels, weights.float()))
    assert torch.autograd.grad(loss.sum(), logits)[0].dtype == torch.bfloat16


def test_second_derivative_is_refused():
    logits, labels, weights = example()
    loss = segmentation_loss(logits.requires_grad_(), labels, weights).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_deterministic_algorithms():
    logits, labels, weights = example()
    torch.use_deterministic_algorithms(True)
    try:
        segmentation_loss(logits.requires_grad_(), labels, weights).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
