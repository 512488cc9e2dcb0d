"""ENet's weights against numbers worked out by hand."""

import math

import pytest

from agcseg.class_weights import class_weights, describe
from agcseg.errors import UserError


def test_enet_by_hand():
    # shares 0.5, 0.3, 0.2
    raw = [1 / math.log(1.52), 1 / math.log(1.32), 1 / math.log(1.22)]
    assert class_weights([50, 30, 20], "enet_raw") == pytest.approx(raw)
    assert class_weights([50, 30, 20], "enet_raw")[0] == pytest.approx(2.38829, abs=1e-5)
    assert class_weights([50, 30, 20]) == pytest.approx([3 * w / sum(raw) for w in raw])
    assert sum(class_weights([50, 30, 20])) == pytest.approx(3)
    assert class_weights([50, 30, 20], "none") == [1, 1, 1]


def test_absent_class_gets_1_and_shifts_nobody():
    weights = class_weights([50, 0, 50])
    assert weights == pytest.approx([1, 1, 1])
    assert class_weights([60, 0, 40])[::2] == pytest.approx(class_weights([60, 40]))


def test_rare_classes_weigh_more_but_never_more_than_50_raw():
    weights = class_weights([10**9, 1], "enet_raw")
    assert weights[1] == pytest.approx(1 / math.log(1.02), rel=1e-6) and weights[0] < weights[1]


def test_errors():
    with pytest.raises(UserError, match="class_weights='median' is not known; choose from enet, enet_raw, none"):
        class_weights([1], "median")
    with pytest.raises(UserError, match="no labelled pixel"):
        class_weights([0, 0])


def test_description():
    record = describe(("a", "b"), [3, 1], "enet")
    assert record["labelled_pixels"] == 4 and record["mean"] == pytest.approx(1)
    assert record["classes"][1] == {"class": "b", "pixels": 1, "share": 0.25, "weight": class_weights([3, 1])[1]}
    assert "1/ln(1.02 + p)" in record["formula"]
