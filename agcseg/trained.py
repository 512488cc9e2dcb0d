"""What training left, ready to use: a network in eval mode, and what its classes mean."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.nn import functional as F

from agcseg.config import Config, build_network
from agcseg.data.labels import Classes
from agcseg.data.minibatches import MEAN, STD, normalise
from agcseg.errors import UserError, expanded, first_line
from agcseg.networks import Network
from agcseg.networks.foreign import digest_of_source
from agcseg.record.checkpoint import load_checkpoint, weights_of
from agcseg.training.machine import channels_last, settings

log = logging.getLogger("agcseg")


class Trained(NamedTuple):
    """A trained network.

    Attributes:
        network: in eval mode, on the CPU; takes images as `agcseg.data.minibatches.normalise` gives them.
        classes: names, colours and palette of the classes, in the order of the logits.
        config: of its run; `config.data.size` is the (height, width) it was trained at.
        epoch: after which its weights were stored.
        path: of the checkpoint.
    """

    network: Network
    classes: Classes
    config: Config
    epoch: int
    path: Path


def load(path: str | Path, checkpoint: str = "last") -> Trained:
    """Read a trained network.

    Args:
        path: the folder of a run, or a checkpoint (last.pt, best.pt).
        checkpoint: which one of a folder: "last", or "best", that of the lowest validation pixel error. Where weights
            were averaged (`ema=`), it is the averaged ones.

    Raises:
        UserError: there is no checkpoint, it cannot be read, or this version of agcseg cannot do what it was trained
            for: another normalisation of images, another network. Where the file of `network.factory` has changed
            since, a warning says so.
    """
    path = _checkpoint(expanded(path), checkpoint)
    saved = load_checkpoint(path)
    missing = [key for key in ("config", "classes", "normalisation", "epoch") if saved.get(key) is None]
    if missing:
        raise UserError(f"{path}: is not a checkpoint of agcseg-train: it lacks {', '.join(missing)}")
    try:
        config, classes = _config(saved), Classes.from_dict(saved["classes"])
    except (OmegaConfBaseException, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: was written by another version of agcseg ({first_line(error)})") from None
    if saved["normalisation"] != {"mean": list(MEAN), "std": list(STD)}:
        raise UserError(
            f"{path}: its images were normalised by {saved['normalisation']}, those of this version by mean "
            f"{list(MEAN)} and std {list(STD)}"
        )
    try:
        network = build_network(config, len(classes), init=None, download=False)
        network.load_state_dict(weights_of(saved))
    except UserError as error:
        version = "" if config.network.factory else "was written by another version of agcseg: "
        raise UserError(f"{path}: {version}{error}") from None
    except RuntimeError as error:
        fault = " ".join(str(error).splitlines()[1].split()) if "\n" in str(error) else str(error)
        raise UserError(f"{path}: its weights do not fit its configuration's {config.network.name}: {fault}") from None
    factory, source = config.network.factory, saved.get("source")
    if factory and source and digest_of_source(factory) not in ("", source):
        log.warning(f"{path}: the file of network.factory={factory} is another now than it was in training")
    return Trained(network.eval(), classes, config, saved["epoch"], path)


def _config(saved: dict) -> Config:
    """Of a checkpoint; keys that the run is older than have their default."""
    return cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), saved["config"])))


def start_from(
    network: nn.Module, path: str | Path, norm: str | None = None, classes: Sequence[str] | None = None
) -> str:
    """Give a new network the weights of a trained one; where its classes are others, not those whose shape depends on
    their number.

    Args:
        network: of the same kind, norm and width, for these or other classes.
        path: the folder of a run, or a checkpoint.
        norm: the network's, to be compared with that of the run: `agc`, `center` and `agc_std`, for example, have the
            same weights.
        classes: names of the network's classes, to be compared with those of the run. Without them, only the number of
            classes is.

    Returns:
        a line that says what was taken, and what stayed new.

    Raises:
        UserError: there is no checkpoint, or it holds another network.
    """
    path = _checkpoint(expanded(path))
    checkpoint = load_checkpoint(path)
    trained = ((checkpoint.get("config") or {}).get("norm") or {}).get("name")
    if norm and trained and norm != trained:
        raise UserError(f"init_from={path}: was trained with norm={trained}, not norm={norm}")
    saved, own = weights_of(checkpoint), network.state_dict()
    its = checkpoint.get("classes") or {}
    its = its["names"] if isinstance(its, dict) and its else its
    other = sorted(saved.keys() ^ own.keys())
    new = [key for key in own if key not in other and own[key].shape != saved[key].shape]
    renamed = classes is not None and its and [*classes] != [*its]
    if not other and (new or renamed):
        with torch.random.fork_rng([]):
            wider = build_network(_config(checkpoint), len(its) + 1, init=None, download=False).state_dict()
        of_classes = [key for key in own if wider[key].shape != saved[key].shape]
        other = [key for key in new if key not in of_classes or (classes is not None and len(classes) == len(its))]
        new = [key for key in own if key in new or (renamed and key in of_classes)]
    if other:
        raise UserError(f"init_from={path}: is a network of another kind, norm or width ({other[0]} does not fit)")
    network.load_state_dict({key: saved[key] for key in own if key not in new}, strict=False)
    return f"weights from {path}" + (f"; new, for other classes: {', '.join(new)}" if new else "")


def digest_of_start(path: str | Path) -> str:
    """A digest of the checkpoint that `start_from` would take; empty if there is none now."""
    found = hashlib.blake2b(digest_size=16)
    try:
        with open(_checkpoint(expanded(path)), "rb") as file:
            while part := file.read(2**20):
                found.update(part)
    except (UserError, OSError):
        return ""
    return found.hexdigest()


def _checkpoint(path: Path, which: str = "last") -> Path:
    if which not in ("last", "best"):
        raise UserError(f"checkpoint={which}: choose from last, best")
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give the folder of a run, such as outputs/demo/RUN")
    if not path.is_dir():
        if which == "best" and path.name == "last.pt":
            raise UserError(f"checkpoint=best: {path} is the last one; give its folder, or best.pt")
        return path
    if (path / f"{which}.pt").is_file():
        return path / f"{which}.pt"
    runs = sorted(str(file.parent) for file in path.glob("*/last.pt"))
    if runs:
        raise UserError(f"{path}: holds {len(runs)} runs; give one of them, such as\n  " + "\n  ".join(runs[:5]))
    raise UserError(f"{path}: holds no {which}.pt; give the folder of a run, or its checkpoint")


@torch.no_grad()
def logits(trained: Trained, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the network says to images, in the precision and the memory layout that it was trained in.

    Args:
        images: (N, 3, h, w) uint8, RGB, on the network's device, at the size of training.

    Returns:
        float32 logits of the classes, (N, K, h, w), and of the contour, (N, 1, h, w), or None without one.
    """
    if channels_last(trained.config.channels_last, images.device):  # rounds otherwise, in bf16 visibly so
        images = images.contiguous(memory_format=torch.channels_last)
    precision = trained.config.precision
    with (
        settings(precision, torch.are_deterministic_algorithms_enabled()),
        torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        outputs = trained.network(normalise(images))
    classes, contour = (outputs.classes, outputs.contour) if trained.network.contour else (outputs, None)
    return classes.float(), contour if contour is None else contour.float()


def prediction(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The likeliest class of each pixel, the logits resized bilinearly first.

    Args:
        logits: (K, h, w).
        size: (height, width) wanted.

    Returns:
        (height, width) uint8 class numbers.
    """
    best = resized(logits[0], size)
    chosen = torch.zeros_like(best, dtype=torch.uint8)
    for k in range(1, len(logits)):  # one by one: of a large photograph, K maps at once would be gigabytes
        score = resized(logits[k], size)
        chosen = torch.where(score > best, k, chosen)
        best = torch.maximum(best, score)
    return chosen


def resized(one: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (h, w), resized bilinearly to `size`; at its own size it is left as it is, bit for bit."""
    return F.interpolate(one[None, None], size, mode="bilinear", align_corners=False)[0, 0]
