"""Figures from counts, worked out by hand."""

import math

import pytest
import torch

from agcseg.metrics import count, summarise


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
