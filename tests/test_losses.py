"""The class loss against a count by hand; the contour losses on maps small enough to see."""

import math

import pytest
import torch
from torch.nn import functional as F

from agcseg.losses import CONTOUR_LOSSES, contour_loss, dilate, image_losses, segmentation_loss
from agcseg.networks.classnet import ClassNetOutput


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


def test_a_masked_class_costs_nothing_where_nothing_counts():
    logits, labels, weights = example()
    logits[:, 0], labels[labels == 0] = -torch.inf, 255
    logits.requires_grad_()
    loss = segmentation_loss(logits, labels, weights)
    torch.testing.assert_close(loss, by_hand(logits, labels, weights.tolist()))
    loss.sum().backward()
    assert logits.grad.isfinite().all()


def test_what_does_not_fit_is_refused():
    logits, labels, weights = example()
    with pytest.raises(ValueError, match=r"logits of shape \(3, 4, 5, 6\) do not fit labels of shape \(1, 5, 6\)"):
        segmentation_loss(logits, labels[:1])
    with pytest.raises(ValueError, match="labels are class numbers, integers; got torch.float32"):
        segmentation_loss(logits, labels.float())
    with pytest.raises(ValueError, match=r"4 classes take as many weights; got \(3,\)"):
        segmentation_loss(logits, labels, weights[:3])
    with pytest.raises(ValueError, match=r"contours of shape \(1, 5, 6\) do not fit labels of \(3, 5, 6\)"):
        contour_loss(logits[:, :1], labels[:1] == 0, labels)
    with pytest.raises(ValueError, match="contour loss 'dice' is not one of iou, bce, class_iou"):
        contour_loss(logits[:, :1], labels == 0, labels, "dice")


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


def contour_example():
    """Two images of 12x16 in two halves, the second with void in its upper part; their contour is two columns wide."""
    labels = torch.zeros(2, 12, 16, dtype=torch.uint8)
    labels[:, :, 8:] = 2
    labels[1, :4] = 255
    contours = torch.zeros_like(labels)
    contours[0, :, 7:9] = contours[1, 4:, 7:9] = 1
    return contours, labels


def sure(contours):
    return (40.0 * contours.double() - 20).unsqueeze(1)  # logits of probability 0 and 1


def test_contour_iou_by_hand():
    contours, labels = contour_example()
    loss = contour_loss(torch.zeros(2, 1, 12, 16).double(), contours, labels, band=3)
    # the band is 8 columns wide, 2 of them contour: hit = half of the contour, union = half of the band + hit
    expected = [1 - (12 + 1) / (48 + 12 + 1), 1 - (8 + 1) / (32 + 8 + 1)]
    torch.testing.assert_close(loss, torch.tensor(expected).double())
    half = contour_loss(torch.zeros(2, 1, 12, 16).bfloat16(), contours, labels, band=3)
    assert half.dtype == torch.float32 and half.tolist() == pytest.approx(expected)


def test_contour_bce_by_hand():
    contours, labels = contour_example()
    logits = torch.full((2, 1, 12, 16), 1.5).double()
    expected = (2 * math.log1p(math.exp(-1.5)) + 6 * math.log1p(math.exp(1.5))) / 8
    assert contour_loss(logits, contours, labels, "bce").tolist() == pytest.approx([expected] * 2)


def test_class_iou_by_hand():
    contours, labels = contour_example()
    loss = contour_loss(torch.zeros(2, 4, 12, 16).double(), contours, labels, "class_iou")
    # two classes of 4 columns each in the band, each with probability 1/4: hit = 1/4 of it, union = 2/4 + 1 - 1/4 of it
    expected = [1 - (12 + 1) / (60 + 1), 1 - (8 + 1) / (40 + 1)]
    torch.testing.assert_close(loss, torch.tensor(expected).double())


def test_perfect_and_inverted_contours():
    contours, labels = contour_example()
    assert contour_loss(sure(contours), contours, labels).max() < 1e-6
    assert contour_loss(-sure(contours), contours, labels).min() > 0.98


@pytest.mark.parametrize("kind", CONTOUR_LOSSES)
def test_no_contour_and_no_label_cost_nothing(kind):
    contours, labels = contour_example()
    contours[0] = 0  # no border
    contours[1], labels[1] = 0, 255  # all void
    logits = torch.randn(2, 4 if kind == "class_iou" else 1, 12, 16, requires_grad=True)
    loss = contour_loss(logits, contours, labels, kind)
    loss.sum().backward()
    assert loss.tolist() == [0, 0] and logits.grad.abs().max() == 0


@pytest.mark.parametrize("kind", CONTOUR_LOSSES)
def test_contours_without_a_label_do_not_count(kind):
    contours, labels = contour_example()
    logits = torch.randn(2, 4 if kind == "class_iou" else 1, 12, 16)
    assert contour_loss(logits, contours, torch.full_like(labels, 255), kind).tolist() == [0, 0]


@pytest.mark.parametrize("kind", CONTOUR_LOSSES)
def test_only_labelled_pixels_near_a_contour_get_a_gradient(kind):
    contours, labels = contour_example()
    logits = torch.randn(2, 4 if kind == "class_iou" else 1, 12, 16, requires_grad=True)
    contour_loss(logits, contours, labels, kind, band=2).sum().backward()
    near = logits.grad.abs().sum(1) > 0
    assert near[0, :, 5:11].all() and near[1, 4:, 5:11].all()
    assert near.sum() == 6 * (12 + 8)


@pytest.mark.parametrize("kind", CONTOUR_LOSSES)
def test_contour_loss_gradient_and_images_on_their_own(kind):
    contours, labels = contour_example()
    logits = torch.randn(2, 4 if kind == "class_iou" else 1, 12, 16, dtype=torch.float64, requires_grad=True)
    whole = contour_loss(logits, contours, labels, kind)
    single = [contour_loss(logits[i : i + 1], contours[i : i + 1], labels[i : i + 1], kind) for i in range(2)]
    torch.testing.assert_close(whole, torch.cat(single))
    torch.autograd.gradcheck(lambda z: contour_loss(z, contours[:1, 4:8], labels[:1, 4:8], kind), logits[:1, :, 4:8])


def test_dilation():
    marks = torch.zeros(1, 7, 9, dtype=torch.uint8)
    marks[0, 3, 4] = 1
    expected = torch.zeros(1, 7, 9, dtype=torch.bool)
    expected[0, 1:6, 2:7] = True
    assert torch.equal(dilate(marks, 2), expected)


def test_image_losses():
    contours, labels = contour_example()
    classes, contour = torch.randn(2, 4, 12, 16), torch.randn(2, 1, 12, 16)
    (alone,) = image_losses(classes, labels)
    parts = image_losses(ClassNetOutput(classes, contour), labels, None, contours)
    assert torch.equal(alone, parts[0]) and torch.equal(parts[1], contour_loss(contour, contours, labels))
    coarse = ClassNetOutput(torch.randn(2, 4, 3, 4), torch.randn(2, 1, 3, 4))
    deep = image_losses(ClassNetOutput(classes, contour, (coarse,)), labels, None, contours)
    covered = torch.tensor([[[0, 1, 1, 0]] * 3, [[0, 0, 0, 0]] + [[0, 1, 1, 0]] * 2], dtype=torch.uint8)
    added = image_losses(coarse, labels[:, 2::4, 2::4], None, covered)
    for i in range(2):
        torch.testing.assert_close(deep[i], parts[i] + added[i])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradient_keeps_the_layout(memory_format):
    logits, labels, weights = example()
    logits = logits.contiguous(memory_format=memory_format).requires_grad_()
    segmentation_loss(logits, labels, weights).sum().backward()
    assert logits.grad.is_contiguous(memory_format=memory_format)
    expected = logits.detach().clone().requires_grad_()
    log_softmax = expected.log_softmax(1).gather(1, labels.long().unsqueeze(1) % 255)
    valid = (labels != 255).unsqueeze(1)
    costs = -log_softmax * weights[labels.long().unsqueeze(1) % 255] * valid / valid.sum((1, 2, 3), keepdim=True)
    costs.sum().backward()
    torch.testing.assert_close(logits.grad, expected.grad)
