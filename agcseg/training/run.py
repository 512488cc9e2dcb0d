"""One training run, from its configuration to its result, top to bottom."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from agcseg.check import check
from agcseg.config import Config, momentum, rate
from agcseg.data.augment import transform
from agcseg.data.minibatches import MEAN, STD, minibatches
from agcseg.errors import UserError, first_line
from agcseg.figure1 import panels_of
from agcseg.networks.foreign import Foreign, digest_of_source
from agcseg.nn import layer_signals
from agcseg.record.checkpoint import load_checkpoint
from agcseg.record.environment import environment
from agcseg.record.files import tell, write, write_json
from agcseg.record.folder import expect_checkpoint, expect_same_run, finished, lock, new_folder, result_line
from agcseg.record.identity import differences
from agcseg.record.pictures import picture
from agcseg.record.record import Record
from agcseg.record.tables import lambdas_of, layer_rows
from agcseg.trained import digest_of_start, start_from
from agcseg.training import parallel
from agcseg.training.dataset import Data, on_device, open_wanted
from agcseg.training.lines import Bar, divergence, introduction
from agcseg.training.machine import (
    added_memory,
    compiled,
    device_name,
    find_device,
    idle_memory,
    keeping,
    peak_memory,
    reset_peak_memory,
    settings,
)
from agcseg.training.passes import loss_figures, shown_images, validate
from agcseg.training.state import State, begin
from agcseg.training.step import make_step

log = logging.getLogger("agcseg")

SIGNAL_IMAGES = 4  # validation images by which the layers are described after each epoch


class Diverged(Exception):
    """A loss is no longer finite."""


def run(config: Config, folder: Path) -> dict:
    """Train one network; continue or skip if `folder` holds the run already.

    The folder gets config.yaml, class_weights.json, run.log, metrics.csv (one row per epoch), layers.csv (signals,
    γ and λ of every layer, epoch by epoch), lambdas.npz (every λ), steps.npy (the loss of every step), images.csv (the
    last validation, image by image), TensorBoard events, predictions.png, environment.json, last.pt (all that a
    continuation needs; after the first and the last epoch, and after every one that ends `config.save_every` seconds or
    more after the last time), with it best.pt (the weights of the epoch with the lowest validation pixel error so far)
    and, at the end, result.json.

    Started by torchrun, the processes train one network together: `config.minibatch` images per step are shared out
    among them, and so are the validation images, none of them twice. Process 0 writes the folder.

    Args:
        config: see `agcseg.config`; it is checked first.
        folder: the run's own folder. With `config.resume` false and the folder taken, FOLDER-2, FOLDER-3, ... is made.

    Returns:
        the content of result.json: "state" is "finished" or "diverged", with the last epoch's figures.

    Raises:
        UserError: configuration or data cannot be used, the folder holds another run, or another process trains it.
    """
    check(config)
    device = find_device(parallel.join(config.device))
    first, processes = parallel.rank() == 0, parallel.world()
    if config.graph and device.type == "cpu":
        raise UserError("graph=true: the CPU has no graphs; use graph=false")
    if config.graph and processes > 1:
        raise UserError(f"graph=true: a step that {processes} processes share is not captured; use graph=false")
    if not first:
        log.setLevel(logging.WARNING)
    if config.minibatch % (processes * config.accumulate):
        raise UserError(
            f"minibatch={config.minibatch} cannot be shared by {processes} processes in {config.accumulate} parts each"
        )
    me = {"config": asdict(config), "processes": processes}
    me["start"] = digest_of_start(config.init_from) if config.init_from else ""
    me["source"] = digest_of_source(config.network.factory) if config.network.factory else ""
    try:
        opened, unseen = open_wanted(config), ""
        me["data"] = opened.digests
    except UserError as error:
        opened, unseen = error, first_line(error)
    differ = differences(parallel.from_first(me), me)
    if differ:
        raise UserError(f"process {parallel.rank()} has another run to train than process 0:\n  " + "\n  ".join(differ))
    if config.resume:
        result = parallel.from_first(finished(me, config.epochs, folder, unseen) if first else None)
        if result:
            return result
    if isinstance(opened, UserError):
        raise opened
    if not config.resume:
        folder = parallel.from_first(new_folder(folder) if first else None)
    with _at_work(folder) if first else contextlib.nullcontext():  # the others wait here until process 0 is in
        # Another process may have finished it before it gave the lock away.
        result = parallel.from_first(finished(me, config.epochs, folder) if first else None)
        if result:
            return result
        with settings(config.precision, config.deterministic):
            return _train(config, folder, device, me, on_device(config, opened, device))


def _train(config: Config, folder: Path, device: torch.device, me: dict, data: Data) -> dict:
    idle = idle_memory(device)
    state = begin(config, len(data.layout.classes), len(data.train) // config.minibatch, device)
    state.idle_mib = idle_memory(device) if device.type == "cuda" else idle
    first = parallel.rank() == 0
    watched = next(iter(minibatches(data.val, SIGNAL_IMAGES, device)))[0] if first else None
    normalisation, classes = {"mean": list(MEAN), "std": list(STD)}, data.layout.classes.to_dict()
    about = me | {"classes": classes, "normalisation": normalisation}
    sizes = _go_on_or_start(config, folder, state, about, watched)
    begun = parallel.from_first(state.epoch)
    if begun != state.epoch:
        raise UserError(
            f"{folder}: process 0 finds {begun} epochs done there, process {parallel.rank()} {state.epoch}; "
            "the processes of a run need one folder, on a disk that their machines share"
        )
    log.info(introduction(config, folder, state, data, device))
    model, trained = _wrapped(state.network, config)
    train = make_step(config, state, trained, data.weights)
    reset_peak_memory(device)
    reason = ""
    with (
        contextlib.closing(Bar(config, state)) as bar,
        _recorded(config, folder, state, data, device, about, sizes) as record,
    ):
        try:
            while state.epoch < config.epochs:
                shown = _epoch(config, state, data, model, train, device, bar)
                if record and watched is not None:
                    _describe_layers(state, state.epoch, watched)
                    reset_peak_memory(device)  # looking at the layers is not training
                    record.add(state, _painted(config, state, data, *shown), state.epoch == config.epochs)
                    tell("running", state.epoch, config.epochs, state.rows[-1])
                    bar.end_epoch(config.epochs)
        except Diverged as diverged:
            reason = str(diverged)
        result = _result(state, data, about, device, reason)
        if record:
            record.end(state, result, _hparams(config))
            tell(result["state"], state.epoch, config.epochs, result, reason)
    parallel.wait()
    log.info(result_line(folder, result))
    return result


def _epoch(config, state: State, data: Data, model, train, device, bar: Bar) -> tuple[Tensor | None, Tensor | None]:
    """Train and validate once more, and remember it in `state`.

    Returns:
        predictions of the validation images that are shown, and their contours.
    """
    start = time.perf_counter()
    losses, lambdas, gradient_norm = _steps(config, state, data, train, device, bar)
    trained_at = time.perf_counter()
    model = state.result.eval() if state.average else model
    state.network.eval()
    parallel.share_buffers(state.result)
    num_classes = len(data.layout.classes)
    figures, images, *shown = validate(model, data.val, data.weights, num_classes, config, device)
    if any(image["labelled_pixels"] and not math.isfinite(image["loss"]) for image in images):  # by the last step
        raise Diverged(f"the validation loss became {figures['val_loss']} in epoch {state.epoch + 1}")
    iou, epoch, samples = figures.pop("iou"), state.epoch + 1, len(losses) * config.minibatch
    row = {
        "epoch": epoch,
        "samples": state.last("samples") + samples,
        "rate": state.optimizer.param_groups[0]["lr"],
        **loss_figures("train", losses),
        **figures,
        "gradient_norm": gradient_norm.item() / len(losses),
        "images_per_second": samples / (trained_at - start),
        "seconds": state.last("seconds") + time.perf_counter() - start,
        "peak_memory_mib": max(state.last("peak_memory_mib"), peak_memory(device)),
        "training_memory_mib": max(state.last("training_memory_mib"), added_memory(device, state.idle_mib)),
        "kept_for_backward_mib": state.kept_mib,
        **{f"iou/{name}": value for name, value in zip(data.layout.classes.names, iou, strict=True)},
    }
    state.lambdas |= dict(zip(lambdas, torch.stack(list(lambdas.values())).cpu(), strict=True))
    state.losses = torch.cat([state.losses, losses.float().cpu().unsqueeze(0)])
    if state.noise:
        state.noises = parallel.gather([state.noise.get_state()])  # one per process
    state.images = images
    state.rows.append(row)
    if state.schedule:
        state.schedule.step()
    return tuple(shown)


def _steps(config, state: State, data: Data, train, device, bar: Bar) -> tuple[Tensor, dict[int, Tensor], Tensor]:
    """All steps of an epoch.

    Returns:
        the losses, (steps, parts); λ after the steps where it is kept, the last one among them, see
        `agcseg.record.tables.lambdas_of`; the sum of the gradient's norms. All on the device: nothing waits for it but
        a look at the loss now and then.

    Raises:
        Diverged: the loss is no longer finite.
    """
    network, epoch = state.network.train(), state.epoch + 1
    own = np.random.SeedSequence([config.seed, epoch, parallel.rank()]).generate_state(1, np.uint64).item()
    torch.manual_seed(own)  # of dropout: another one in each process, the same where a run goes on
    losses = torch.empty(state.losses.shape[1:], device=device)
    lambdas, gradient_norm, looked = {}, torch.zeros((), device=device), 0
    order, share = (config.seed, epoch), (parallel.rank(), parallel.world())
    shuffled = minibatches(data.train, config.minibatch, device, order, config.data.flip, share, _augment(config))
    for step, minibatch in enumerate(shuffled, 1):
        kept: contextlib.AbstractContextManager[dict[int, int]]
        kept = contextlib.nullcontext({}) if state.kept_mib else keeping(network)
        with kept as storages:
            losses[step - 1], norm = train(*minibatch)
        state.kept_mib = state.kept_mib or sum(storages.values()) / 2**20
        gradient_norm += norm
        if state.average:
            state.average.update_parameters(network)
        if step == len(losses) or (epoch == 1 and step.bit_count() == 1):  # λ moves most at first
            lambdas[(epoch - 1) * len(losses) + step] = lambdas_of(network)
        if step == 1 and len(losses) > 1 and device.type == "cuda":
            reset_peak_memory(device)  # cuDNN tried its algorithms, with workspace that no later step takes
        # Looking at the loss waits for the device: every step on the CPU, now and then on a GPU.
        if device.type == "cpu" or step % 50 == 0 or step == len(losses):
            new = parallel.add(losses[looked:step]).div_(parallel.world())
            finite = new.isfinite().all(1)
            failed, last = torch.stack([(~finite).sum(), new[-1].sum()]).tolist()  # one wait for both
            if failed:
                bad = looked + int((~finite).nonzero()[0])
                raise Diverged(divergence(epoch, bad, losses.sum(1), state.rows))
            looked = step
            bar.tell(epoch, last)
        bar.update()
    return losses, lambdas, gradient_norm


def _augment(config: Config) -> Callable | None:
    options = {key: value for key, value in asdict(config.augment).items() if key != "name"}
    height, width = config.data.size
    return transform((height, width), **options)


def _go_on_or_start(config: Config, folder: Path, state: State, about: dict, watched: Tensor | None) -> dict[str, int]:
    """Bring the state to where the run stands.

    Returns:
        the sizes of the event files there, for `Record`.
    """
    path = folder / "last.pt"
    if path.exists():
        saved = load_checkpoint(path)
        try:
            expect_same_run(saved, about, folder)
            state.load(saved)
        except UserError:
            raise
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: is not the checkpoint of this run ({why}); resume=false starts afresh") from None
        return saved["events"]
    expect_checkpoint(folder)
    if config.init_from:
        log.info(start_from(state.network, config.init_from, config.norm.name, about["classes"]["names"]))
    state.lambdas = {0: lambdas_of(state.network).cpu()}
    if watched is not None:
        _describe_layers(state, 0, watched)
    return {}


def _describe_layers(state: State, epoch: int, watched: Tensor) -> None:
    signals = layer_signals(state.network, watched)
    factors = None if state.gems is None else state.gems.factors if epoch else {}
    state.layers += layer_rows(state.network, epoch, signals, factors)
    dead = [row for row in state.layers if row["dead"] == row["num_features"]]
    before = {row["layer"] for row in dead if row["epoch"] == epoch - 1}
    for row in dead:
        if row["epoch"] == epoch and row["layer"] not in before:
            log.warning(
                f"epoch {epoch}: {row['layer']} is dead: no point of its {row['dead']} maps passes the ReLU, in any of"
                f" {len(watched)} validation images, and what lies in front of it learns nothing through it; try a"
                " smaller learning rate or other initial weights"
            )


def _recorded(config, folder: Path, state: State, data: Data, device, about: dict, sizes: dict[str, int]) -> Any:
    """The record, which process 0 keeps; None in the others."""
    if parallel.rank() > 0:
        return contextlib.nullcontext()
    write(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(about["config"])))
    write_json(folder / "class_weights.json", data.weighting)
    write_json(folder / "environment.json", environment(device))
    with contextlib.suppress(OSError):  # a copy for people, where they may write
        write_json(data.beside_cache, data.weighting)
    panels = panels_of(config.network.name, config.norm.name, config.minibatch, rate(config))
    return contextlib.closing(Record(folder, state, about, panels, config.save_every, sizes))


def _wrapped(network: nn.Module, config: Config) -> tuple[nn.Module, nn.Module]:
    """The network as it is called in validation, and in training."""
    model = compiled(network) if config.compile else network
    if parallel.world() == 1:
        return model, model
    # Compiled inside: called by DDP, the compiler still splits its graphs where buckets end, so that these overlap.
    # What may get no gradient: the contour's head, and whatever others made and do not use.
    idle = isinstance(network, Foreign) or (network.contour and config.contour.loss == "class_iou")
    return model, nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=idle)


@contextlib.contextmanager
def _at_work(folder: Path) -> Iterator[None]:
    """Alone in the folder of the run, with its run.log."""
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder)
    log_file = logging.FileHandler(folder / "run.log", encoding="utf-8", errors="backslashreplace")
    log_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(log_file)
    try:
        yield
    finally:
        log.removeHandler(log_file)
        log_file.close()
        held.release()


def _painted(config, state: State, data: Data, shown: Tensor | None, contours: Tensor | None) -> np.ndarray | None:
    """The picture of epochs 1, 2, 4, 8, ... and of the last one."""
    if shown is None or not (state.epoch == config.epochs or state.epoch.bit_count() == 1):
        return None
    val = data.val
    chosen = torch.from_numpy(val.indices[shown_images(val, config.images)])
    return picture(val.images[chosen], shown, val.labels[chosen], data.layout.classes.palette(), contours)


def _result(state: State, data: Data, about: dict, device: torch.device, reason: str) -> dict:
    row = {key: value for key, value in (state.rows or [{}])[-1].items() if not key.startswith("iou/")}
    return {
        "state": "diverged" if reason else "finished",
        "reason": reason,
        "epochs": state.epoch,
        **row,
        "commonest_class_error": data.constant_error,
        "device": device_name(device),
        "processes": about["processes"],
        "data": about["data"],
        "start": about["start"],
        "source": about["source"],
        "torch": torch.__version__,
    }


def _hparams(config: Config) -> dict:
    return {
        "network": config.network.name,
        "width": config.network.width,
        "init": config.network.init,
        "norm": config.norm.name,
        "minibatch": config.minibatch,
        "rate": rate(config),
        "momentum": momentum(config),
        "seed": config.seed,
    }
