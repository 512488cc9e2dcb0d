"""Figures from counts, worked out by hand."""

import math

import pytest
import torch

from agcseg.metrics import count, count_contours, summarise, summarise_contours


def test_by_hand():
    labels = torch.tensor([[[0, 0], [1, 255]], [[1, 1], [1, 1]], [[255, 255], [255, 255]]], dtype=torch.uint8)
    prediction = torch.tensor([[[0, 1], [1, 0]], [[1, 1], [1, 0]], [[0, 1], [2, 0]]])
    wrong, valid, confusion = count(prediction, labels, 3)
    assert wrong.tolist() == [1, 1, 0] and valid.tolist() == [3, 4, 0]
    assert confusion.tolist() == [[1, 1, 0], [1, 4, 0], [0, 0, 0]]
    figures = summarise(wrong, valid, confusion)
    assert figures["pixel_error"] == pytest.approx((1 / 3 + 1 / 4) / 2)  # the unlabelled image counts nowhere
    assert figures["pixel_error_all"] == pytest.approx(2 / 7)
    assert figures["iou"][:2] == pytest.approx([1 / 3, 4 / 6]) and math.isnan(figures["iou"][2])
    assert figures["miou"] == pytest.approx((1 / 3 + 4 / 6) / 2)


def test_counts_add_up_over_minibatches():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (6, 7, 8), generator=generator, dtype=torch.uint8)
    prediction = torch.randint(0, 5, (6, 7, 8), generator=generator)
    whole = summarise(*count(prediction, labels, 5))
    parts = [count(prediction[i : i + 4], labels[i : i + 4], 5) for i in (0, 4)]
    wrong, valid = (torch.cat([part[k] for part in parts]) for k in (0, 1))
    assert summarise(wrong, valid, sum(part[2] for part in parts)) == whole


def test_contours_by_hand():
    """The truth is column 4. Image 0: column 5 and two pixels far away are predicted; image 1: nothing; 2: no truth."""
    labels, contours = torch.zeros(3, 6, 16, dtype=torch.uint8), torch.zeros(3, 6, 16, dtype=torch.uint8)
    contours[:2, :, 4] = 1
    logits = torch.full((3, 1, 6, 16), -20.0)
    logits[0, 0, :, 5] = logits[0, 0, 0, 12] = logits[0, 0, 5, 12] = logits[2] = 20
    labels[0, 0, 12] = 255  # one of the two is void
    iou, counts = count_contours(logits, contours, labels, band=1)
    assert counts.tolist() == [[7, 6, 6, 6], [0, 0, 6, 0], [96, 0, 0, 0]]
    assert iou.tolist() == pytest.approx([1 / 13, 1 / 7, 1])
    figures = summarise_contours(iou, counts)
    precision = 6 / 7
    assert figures["contour_f"] == pytest.approx((2 * precision / (precision + 1) + 0) / 2)
    assert figures["contour_iou"] == pytest.approx((1 / 13 + 1 / 7) / 2)
