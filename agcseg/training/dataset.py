"""What a run trains on: the images that it wants, on their way into training, and what is known of them before it."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agcseg import class_weights
from agcseg.config import Config
from agcseg.data import open_data
from agcseg.data.cache import Cached
from agcseg.data.layout import Layout
from agcseg.data.minibatches import Split, choose, histogram, open_split
from agcseg.errors import UserError
from agcseg.networks import kind
from agcseg.training import parallel
from agcseg.training.lines import progress
from agcseg.training.passes import constant_error

log = logging.getLogger("agcseg")


class Opened(NamedTuple):
    """A data set's splits, which of their images are wanted, and the digest of those as they are used."""

    layout: Layout
    cached: dict[str, Cached]
    chosen: dict[str, np.ndarray]
    digests: dict[str, Any]


class Data(NamedTuple):
    """What a run trains on and is judged by.

    Attributes:
        weighting: of the classes in the loss, see `agcseg.class_weights.describe`.
        weights: the same as a tensor, (classes,), on the device.
        constant_error: validation pixel error of always naming the commonest class.
        beside_cache: where a copy of the weighting lies.
    """

    layout: Layout
    train: Split
    val: Split
    weighting: dict
    weights: Tensor
    constant_error: float
    beside_cache: Path


def open_wanted(config: Config) -> Opened:
    """Both splits of the data set, and which of their images the run wants.

    Raises:
        UserError: the data cannot be used, or are too few.
    """
    data, contours = config.data, kind(config.network.name).contour
    layout, cached = open_data(data, progress, log.info, contours)
    chosen: dict[str, np.ndarray] = {}
    digests: dict[str, Any] = {"classes": list(layout.classes.names)}
    for split, wanted in (("train", data.train_images), ("val", data.val_images)):
        chosen[split] = choose(len(cached[split].names), wanted, data.choice_seed)
        digests[split] = cached[split].digest(chosen[split], contours)
    train, val, processes = len(chosen["train"]), len(chosen["val"]), parallel.world()
    seen = {cached["train"].digests[i][0] for i in chosen["train"]}
    again = sum(cached["val"].digests[i][0] in seen for i in chosen["val"])
    if again and parallel.rank() == 0:
        log.warning(f"{again} of the {val} validation images are training images too; the error is not of unseen ones")
    if config.minibatch > train:
        raise UserError(f"minibatch={config.minibatch}: there are {train} training images")
    if processes > val:
        raise UserError(f"{processes} processes cannot share {val} validation images; start fewer")
    if not any((cached["val"].labels[i] < len(layout.classes)).any() for i in chosen["val"]):
        raise UserError(f"{layout.title}: the labels of the {val} validation images hold no labelled pixel")
    return Opened(layout, cached, chosen, digests)


def on_device(config: Config, opened: Opened, device: torch.device) -> Data:
    """The data on their way into training, and what is known of them before it."""
    layout, cached, chosen, _ = opened
    contours, classes = kind(config.network.name).contour, layout.classes
    train, val = (open_split(cached[split], chosen[split], device, contours) for split in ("train", "val"))
    pixels = histogram(train, len(classes))
    weighting = class_weights.describe(classes.names, pixels, config.class_weights)
    weights = torch.tensor([row["weight"] for row in weighting["classes"]], device=device)
    commonest = max(range(len(pixels)), key=pixels.__getitem__)
    constant = constant_error(commonest, val, len(pixels), device)
    cache = cached["train"].folder
    name = f"{cache.name}-{config.class_weights}-{len(train)}-choice{config.data.choice_seed}.json"
    return Data(layout, train, val, weighting, weights, constant, cache.with_name(name))
