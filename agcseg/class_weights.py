"""Class weights from each class's frequency (ENet, Paszke et al. 2016), scaled to mean 1 (Deep Control, section 3)."""

import math

from agcseg.errors import UserError

FORMULA = {
    "enet": "1/ln(1.02 + p), scaled to mean 1 over the classes that occur; 1 for a class that does not",
    "enet_raw": "1/ln(1.02 + p)",
    "none": "1",
}
CLASS_WEIGHTS = tuple(FORMULA)


def class_weights(histogram: list[int], kind: str = "enet") -> list[float]:
    """Weight of each class in the loss.

    Args:
        histogram: labelled training pixels of each class; p is a class's share of their sum.
        kind: "enet": 1/ln(1.02 + p), scaled so that the weights' mean is 1; "enet_raw": not scaled (their mean on
            Cityscapes is 30.6, which multiplies the learning rate by as much); "none": 1 everywhere.

    Returns:
        one weight per class. A class that does not occur is left out of the scaling and gets 1 ("enet"), so the mean
        over all classes is 1 too.

    Raises:
        UserError: unknown kind, or no labelled pixel at all.
    """
    if kind not in CLASS_WEIGHTS:
        raise UserError(f"class_weights={kind!r} is not known; choose from {', '.join(CLASS_WEIGHTS)}")
    total = sum(histogram)
    if not total:
        raise UserError("the training labels hold no labelled pixel: check that they are label ids, not colours")
    if kind == "none":
        return [1.0] * len(histogram)
    raw = [1 / math.log(1.02 + count / total) for count in histogram]
    if kind == "enet_raw":
        return raw
    present = [weight for weight, count in zip(raw, histogram, strict=True) if count]
    scale = len(present) / sum(present)
    return [weight * scale if count else 1.0 for weight, count in zip(raw, histogram, strict=True)]


def describe(names: tuple[str, ...], histogram: list[int], kind: str) -> dict:
    """The weights with histogram and formula, ready for JSON, for whoever asks how they came about."""
    weights = class_weights(histogram, kind)
    total = sum(histogram)
    return {
        "class_weights": kind,
        "formula": FORMULA[kind],
        "labelled_pixels": total,
        "mean": sum(weights) / len(weights),
        "classes": [
            {"class": name, "pixels": count, "share": count / total, "weight": weight}
            for name, count, weight in zip(names, histogram, weights, strict=True)
        ],
    }
