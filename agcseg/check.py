"""What of a configuration can work, found out before any data is touched."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from agcseg.class_weights import CLASS_WEIGHTS
from agcseg.config import Config, DataConfig, build_network
from agcseg.data import LAYOUTS, NAMES
from agcseg.data.folder import fault_of_pattern, read_classes
from agcseg.errors import UserError, expanded, first_line
from agcseg.losses import CONTOUR_LOSSES
from agcseg.networks import Network, kind
from agcseg.networks.foreign import Foreign
from agcseg.nn import GEMS, IMPLEMENTATIONS, INITS, NORMS

SCHEDULES = ("constant", "poly", "cosine", "step")
OPTIMIZERS = ("sgd", "adamw")


def check(config: Config) -> None:
    """Refuse a configuration that cannot work.

    Raises:
        UserError: one line for each value that cannot be used.
    """
    data = config.data
    problems, expect, one_of = _collector()
    foreign = kind(config.network.name) is Foreign
    if config.network.init is not None or not foreign:
        one_of("network.init", config.network.init, INITS)
    one_of("network.implementation", config.network.implementation, IMPLEMENTATIONS)
    one_of("norm", config.norm.name, NORMS)
    one_of("class_weights", config.class_weights, CLASS_WEIGHTS)
    one_of("contour.loss", config.contour.loss, CONTOUR_LOSSES)
    one_of("precision", config.precision, ("fp32", "tf32", "bf16"))
    expect(config.channels_last in ("auto", True, False), f"channels_last={config.channels_last}: auto, true or false")
    width = config.network.width
    expect(0 < width <= 100, f"network.width={width}: must be positive, and at most 100")
    expect(config.contour.band >= 1, f"contour.band={config.contour.band}: must be at least 1")
    expect(config.minibatch >= 1, f"minibatch={config.minibatch}: must be at least 1")
    expect(
        1 <= config.accumulate and (config.minibatch < 1 or config.minibatch % config.accumulate == 0),
        f"accumulate={config.accumulate}: must divide minibatch={config.minibatch}",
    )
    expect(config.epochs >= 1, f"epochs={config.epochs}: must be at least 1")
    expect(0 <= config.seed < 2**63, f"seed={config.seed}: must not be negative, and below 2^63")
    key, value = ("lr.base", config.lr.base) if config.lr.value is None else ("lr.value", config.lr.value)
    expect(0 < value < float("inf"), f"{key}={value}: a learning rate must be positive and finite")
    expect(0 <= config.momentum < 1, f"momentum={config.momentum}: must be at least 0 and below 1")
    match = config.momentum_match
    if match is not None:
        key = f"momentum_match={match}"
        expect(match >= config.minibatch, f"{key}: must be at least minibatch={config.minibatch}, or null")
        expect(config.lr.value is None, f"{key} sets the rate from lr.base: leave lr.value null")
    expect(0 <= config.noise.gain <= 1, f"noise.gain={config.noise.gain}: must be between 0 and 1")
    shift = config.noise.shift
    expect(0 <= shift < float("inf"), f"noise.shift={shift}: must be finite and not negative")
    noisy = config.noise.gain or shift
    expect(
        not (config.sync_bn and config.norm.name == "mean_only"),
        "sync_bn=true: torch synchronises norm=bn, and not norm=mean_only",
    )
    expect(not (config.compile and (noisy or config.gems.mode)), "compile=true: not together with noise or gems")
    expect(
        not (config.graph and config.gems.mode),
        "graph=true: not together with gems, whose counts lie elsewhere in each step",
    )
    expect(not (foreign and (noisy or config.gems.mode)), f"noise and gems: not in {config.network.name}")
    expect(
        0 <= config.weight_decay < float("inf"),
        f"weight_decay={config.weight_decay}: must be finite and not negative",
    )
    expect(config.save_every >= 0, f"save_every={config.save_every}: must not be negative")
    _check_recipe(config, expect, one_of)
    expect(config.images >= 0, f"images={config.images}: must not be negative")
    _check_names(config, expect)
    _check_data(data, expect, one_of)
    multiple = kind(config.network.name).multiple
    expect(
        all(side % multiple == 0 for side in data.size),
        f"data.size={data.size}: {config.network.name} takes [height,width] in multiples of {multiple}",
    )
    if not problems:  # the network knows its own options; on the meta device it costs no memory
        try:
            if foreign:
                _try_foreign(config)
            else:
                with torch.device("meta"):
                    built = _try_network(config)
                    if config.gems.mode is not None:
                        GEMS(built, **asdict(config.gems))
        except UserError as error:
            problems.append(str(error))
    train = data.train_images or (_images_available(data) or {}).get("train")
    if train and train >= 1:
        expect(config.minibatch <= train, f"minibatch={config.minibatch}: there are {train} training images")
    _refuse(problems)


def check_data(data: DataConfig) -> None:
    """The part of `check` that knows of no network.

    Raises:
        UserError: one line for each value that cannot be used.
    """
    problems, expect, one_of = _collector()
    _check_data(data, expect, one_of)
    _refuse(problems)


def _collector() -> tuple[list[str], Callable, Callable]:
    problems: list[str] = []

    def expect(good: bool, message: str) -> None:
        if not good:
            problems.append(message)

    def one_of(key: str, value: str | None, known) -> None:
        expect(value in known, f"{key}={value}: choose from {', '.join(known)}")

    return problems, expect, one_of


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UserError("\n  ".join(["the configuration cannot be used:"] * (len(problems) > 1) + problems))


def _check_names(config: Config, expect: Callable) -> None:
    expect(config.init_from != "", "init_from: must not be empty; null for none")
    if kind(config.network.name) is not Foreign:  # whose options may mean anything
        channels = config.network.options.get("in_channels", 3)
        expect(channels == 3, f"network.options.in_channels={channels}: images have 3 channels, red, green and blue")
    expect(bool(config.name), "name: must not be empty")
    run = config.run or ""
    expect(
        "/" not in run and not run.startswith("."), f"run={run}: must be the name of one folder, without a dot in front"
    )
    named = config.network.name
    expect("/" not in named, f"network.name={named}: stands in the names of folders, and must not hold a slash")
    name = config.name
    expect(".." not in name.split("/") and not name.startswith("/"), f"name={name}: must stay inside outputs/")
    for key, value in (("name", name), ("run", run)):
        shown = value.encode(errors="replace").decode()
        expect(value == shown, f"{key}={shown}: not in UTF-8; set LC_ALL=C.UTF-8")


def _check_data(data: DataConfig, expect: Callable, one_of: Callable) -> None:
    one_of("data", data.name, NAMES)
    for key in ("root", "cache_dir"):
        value = getattr(data, key)
        try:
            Path(value or "").expanduser()
        except RuntimeError:
            expect(False, f"data.{key}={value}: there is no home folder here; give data.{key}=FOLDER")
    expect(bool(data.cache_dir), "data.cache_dir: must not be empty")
    needs_root = data.name not in ("streets", "folder")  # the one is made, and of the other its reader says more
    expect(data.root is not None or not needs_root, f"data.root: give the folder of {data.name}")
    expect(
        len(data.size) == 2 and all(side > 0 for side in data.size),
        f"data.size={data.size}: must be [height,width], at least 1 each",
    )
    expect(data.choice_seed >= 0, f"data.choice_seed={data.choice_seed}: must not be negative")
    available = _images_available(data)
    for split, wanted in (("train", data.train_images), ("val", data.val_images)):
        key = f"data.{split}_images={wanted}"
        expect(wanted is None or wanted >= 1, f"{key}: must be at least 1, or null for all")
        if wanted is not None and available:
            expect(wanted <= available[split], f"{key}: {data.name} has {available[split]} {split} images")
    if data.name == "streets":
        streets = data.streets
        expect(streets.train >= 1 and streets.val >= 1, "data.streets.train and data.streets.val: must be at least 1")
        expect(
            len(streets.size) == 2 and all(side >= 64 for side in streets.size),
            f"data.streets.size={streets.size}: must be [height,width], at least 64 each",
        )
    share = data.val_share
    expect(share is None or 0 < share < 1, f"data.val_share={share}: must be between 0 and 1, or null")
    if data.name == "folder":
        for key in ("images", "labels", "instances"):
            pattern = getattr(data.folder, key)
            expect(
                pattern is None or share is not None or "{split}" in pattern,
                f"data.folder.{key}={pattern}: must hold {{split}}; or give data.val_share for a single folder",
            )
            fault = fault_of_pattern(pattern, key)
            expect(not fault, f"data.folder.{key}={pattern}: {fault}")
        for key in ("train", "val"):
            named = getattr(data.folder, key)
            expect(not {*named} & {*"{}"}, f"data.folder.{key}={named}: must be the name of one folder, without braces")
        divisor = data.folder.instance_divisor
        expect(divisor is None or divisor > 1, f"data.folder.instance_divisor={divisor}: must be above 1, or null")


def _check_recipe(config: Config, expect: Callable, one_of: Callable) -> None:
    one_of("schedule", config.schedule, SCHEDULES)
    one_of("optimizer", config.optimizer, OPTIMIZERS)
    warmup, lr = config.warmup, config.lr
    expect(0 <= warmup < max(config.epochs, 1), f"warmup={warmup}: must be at least 0 and below epochs={config.epochs}")
    expect(0 < lr.power < float("inf"), f"lr.power={lr.power}: must be positive and finite")
    expect(lr.step_epochs >= 1, f"lr.step_epochs={lr.step_epochs}: must be at least 1")
    expect(0 < lr.step_factor <= 1, f"lr.step_factor={lr.step_factor}: must be above 0 and at most 1")
    if config.optimizer == "adamw":
        expect(lr.value is not None, "optimizer=adamw: its rate does not go with the minibatch; give lr.value=0.001")
        expect(not config.nesterov, "nesterov=true: of optimizer=sgd only")
    expect(not config.nesterov or config.momentum > 0, "nesterov=true: needs a momentum")
    clip, ema = config.clip_norm, config.ema
    expect(clip is None or 0 < clip < float("inf"), f"clip_norm={clip}: must be positive and finite, or null for none")
    expect(ema is None or 0 < ema < 1, f"ema={ema}: must be above 0 and below 1, such as 0.999, or null for none")
    augment, size = config.augment, config.data.size
    scale, crop = augment.scale, augment.crop
    expect(
        len(scale) == 2 and 0 < scale[0] <= scale[1] <= 100,
        f"augment.scale={scale}: must be [smallest,largest], both positive, and at most 100",
    )
    expect(
        len(scale) != 2 or len(size) != 2 or scale[0] * min(size) >= 1,
        f"augment.scale={scale}: leaves nothing of images of data.size={size}",
    )
    if crop is not None:
        multiple = kind(config.network.name).multiple
        expect(
            len(crop) == 2 and all(side > 0 and side % multiple == 0 for side in crop),
            f"augment.crop={crop}: {config.network.name} takes [height,width] in multiples of {multiple}",
        )
        expect(
            len(crop) != 2 or len(size) != 2 or (crop[0] <= size[0] and crop[1] <= size[1]),
            f"augment.crop={crop}: is larger than the images, data.size={size}",
        )
    expect(0 <= augment.flip <= 1, f"augment.flip={augment.flip}: a probability, from 0 to 1")
    for key in ("brightness", "contrast", "saturation"):
        value = getattr(augment, key)
        expect(0 <= value <= 100, f"augment.{key}={value}: must be from 0 to 100")
    expect(0 <= augment.hue <= 0.5, f"augment.hue={augment.hue}: must be from 0 to 0.5")
    expect(not (augment.flip and config.data.flip), "data.flip=true: augment.flip does it already")


def _try_network(config: Config) -> Network:
    """Build the network; at its smallest size also feed it, for some norms refuse the single pixel that may be left."""
    network, norm, size = config.network, config.norm, config.data.size
    module = build_network(config, implementation="literal")
    if max(size) == module.multiple:
        images = config.minibatch // config.accumulate
        try:
            module(torch.empty(images, 3, *size))
        except ValueError as error:
            raise UserError(
                f"data.size={size}: the deepest maps of {network.name} are too small there for norm={norm.name} and "
                f"{images} image(s) at once ({error}); take a larger size, or another norm such as agc"
            ) from None
    return module


def _try_foreign(config: Config) -> None:
    """Build a third-party network, on the CPU as its factory may insist on, and feed it images without computing."""
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)  # what became of its norms is told once, where it is trained
    try:
        with torch.random.fork_rng([]):
            module = build_network(config, _number_of_classes(config.data), implementation="literal", download=False)
    finally:
        logging.disable(disabled)
    shape = config.minibatch // config.accumulate, 3, *config.data.size
    try:
        with torch.device("meta"):
            module.to("meta").train()(torch.empty(shape))
    except ValueError as error:  # a UserError, or of a norm that one value is not enough for
        shown = f"{shape[0]} image(s) of {shape[2]}x{shape[3]} at once"
        raise UserError(f"network={config.network.name}, norm={config.norm.name}, {shown}: {error}") from None
    except Exception as error:  # whatever somebody's forward does
        if "meta" in str(error).lower():  # it looks at values, which there are none of
            return
        raise UserError(
            f"network={config.network.name} cannot be fed images of {shape[2]}x{shape[3]} ({first_line(error)})"
        ) from None


def _number_of_classes(data: DataConfig) -> int:
    """Of the data, where the file that says so can be read here; what is wrong with it, the data's reader tells."""
    if data.name in LAYOUTS:
        return len(LAYOUTS[data.name].classes)
    try:
        return len(read_classes(expanded(data.root or "."), data.folder.classes))
    except UserError:
        return 19


def _images_available(data: DataConfig) -> dict[str, int] | None:
    """How many images each split of a data set has, as far as that is known without looking."""
    if data.name == "streets" and data.root is None and data.val_share is None:
        return {"train": data.streets.train, "val": data.streets.val}
    return LAYOUTS[data.name].expected if data.name in LAYOUTS and data.val_share is None else None
