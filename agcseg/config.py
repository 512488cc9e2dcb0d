"""The configuration of a training run: typed, with the paper's values as defaults. Nothing here needs Hydra."""

from dataclasses import dataclass, field
from typing import Any, Optional

from agcseg.errors import UserError
from agcseg.networks import Network, build

# ruff: noqa: UP045 - OmegaConf wants Optional[...] on Python 3.10


@dataclass
class NetworkConfig:
    name: str = "segnet"
    width: float = 1.0
    init: Optional[str] = "he"
    implementation: str = "fast"
    factory: Optional[str] = None
    classes_argument: str = "num_classes"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class NormConfig:
    name: str = "agc"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class StreetsConfig:
    """The built-in streets, made on demand."""

    train: int = 128
    val: int = 32
    size: list[int] = field(default_factory=lambda: [128, 256])
    seed: int = 0


@dataclass
class FolderConfig:
    """Where the files of `data=folder` lie; see `agcseg.data.layout.Layout` for the patterns."""

    images: str = "images/{split}/**/{name}"
    labels: str = "labels/{split}/**/{name}"
    instances: Optional[str] = "instances/{split}/**/{name}"
    train: str = "train"
    val: str = "val"
    classes: str = "classes.yaml"
    instance_divisor: Optional[int] = None


@dataclass
class DataConfig:
    name: str = "cityscapes"
    root: Optional[str] = None
    cache_dir: str = "~/.cache/agcseg"
    size: list[int] = field(default_factory=lambda: [256, 512])
    train_images: Optional[int] = 2750
    val_images: Optional[int] = 500
    choice_seed: int = 0
    flip: bool = False
    streets: StreetsConfig = field(default_factory=StreetsConfig)
    val_share: Optional[float] = None
    folder: FolderConfig = field(default_factory=FolderConfig)


@dataclass
class ContourConfig:
    """Of networks that find contours (ClassNet); others ignore it."""

    loss: str = "iou"
    band: int = 3


@dataclass
class NoiseConfig:
    """Layer-wise noise in training (`agcseg.nn.noise`); 0 and 0 for none."""

    gain: float = 0.0
    shift: float = 0.0


@dataclass
class GemsConfig:
    """Gradients by the number of active points (`agcseg.nn.gems`); no mode for off."""

    mode: Optional[str] = None
    limit: float = 10.0
    ema: float = 0.0
    gate: str = "relu"


@dataclass
class RateConfig:
    base: float = 0.02
    value: Optional[float] = None
    power: float = 0.9
    step_epochs: int = 30
    step_factor: float = 0.1


@dataclass
class AugmentConfig:
    """Training images drawn anew in every epoch (`agcseg.data.augment`); by default they are as they are."""

    name: str = "none"
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    crop: Optional[list[int]] = None
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0


@dataclass
class Config:
    name: str = "cityscapes"
    run: Optional[str] = None
    network: NetworkConfig = field(default_factory=NetworkConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    data: DataConfig = field(default_factory=DataConfig)
    minibatch: int = 4
    accumulate: int = 1
    lr: RateConfig = field(default_factory=RateConfig)
    momentum: float = 0.9
    momentum_match: Optional[int] = None
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup: int = 0
    optimizer: str = "sgd"
    nesterov: bool = False
    clip_norm: Optional[float] = None
    ema: Optional[float] = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    class_weights: str = "enet"
    contour: ContourConfig = field(default_factory=ContourConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    gems: GemsConfig = field(default_factory=GemsConfig)
    init_from: Optional[str] = None
    epochs: int = 150
    seed: int = 1
    device: str = "auto"
    precision: str = "fp32"
    channels_last: Any = "auto"
    compile: bool = False
    graph: bool = False
    deterministic: bool = False
    sync_bn: bool = False
    resume: bool = True
    save_every: float = 60.0
    images: int = 4


def rate(config: Config) -> float:
    """The effective learning rate: base * minibatch (Deep Control, section 1), unless lr.value is given.

    With `momentum_match`, times minibatch / momentum_match (see `momentum`).
    """
    return config.lr.base * config.minibatch * _matched(config) if config.lr.value is None else config.lr.value


def momentum(config: Config) -> float:
    """The effective momentum: `config.momentum`, or with `momentum_match` that of the twin of a larger minibatch.

    Momentum is an implicit minibatch (Deep Control, sections 1 and 5). A minibatch of B with rate L = base·B and
    momentum m gives each sample the total weight base / (1 - m) and remembers B / (1 - m) samples. To have that of
    B = momentum_match with a smaller minibatch b, 1 - m and the rate are both multiplied by b / B.
    """
    return 1 - (1 - config.momentum) * _matched(config) if config.momentum_match else config.momentum


def _matched(config: Config) -> float:
    return config.minibatch / config.momentum_match if config.momentum_match else 1.0


def build_network(config: Config, num_classes: int = 19, **changes: Any) -> Network:
    """The network that a run trains, see `agcseg.build`; `changes` replace arguments of that."""
    network = config.network
    arguments = {
        "norm": config.norm.name,
        "norm_options": config.norm.options,
        "width": network.width,
        "init": network.init,
        "implementation": network.implementation,
        "factory": network.factory,
        "classes_argument": network.classes_argument,
        "size": tuple(config.data.size),
    }
    if taken := [key for key in network.options if key in ("num_classes", "download", *arguments)]:
        raise UserError(f"network.options.{taken[0]}: agcseg.build has an argument of this name; give yours another")
    return build(network.name, num_classes=num_classes, **{**arguments, **changes}, **network.options)
