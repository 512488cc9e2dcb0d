"""One training run, from its configuration to its result, top to bottom."""

import contextlib
import logging
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from agcseg import class_weights
from agcseg.config import Config, check, momentum, rate
from agcseg.data import open_data, streets_root
from agcseg.data.minibatches import MEAN, STD, Split, choose, histogram, minibatches, open_split
from agcseg.errors import UserError
from agcseg.figure1 import panels_of
from agcseg.networks import NETWORKS, build
from agcseg.nn import GEMS, add_noise, layer_signals
from agcseg.record.files import (
    TensorBoard,
    lambdas_of,
    layer_rows,
    load_checkpoint,
    picture,
    save_checkpoint,
    tell,
    write,
    write_csv,
    write_json,
    write_picture,
    write_tables,
)
from agcseg.record.folder import check_same_run, finished, free_folder, lock, result_line
from agcseg.trained import start_from
from agcseg.training import parallel
from agcseg.training.machine import device_name, find_device, peak_memory, reset_peak_memory
from agcseg.training.passes import backward, constant_error, loss_figures, shown_images, validate

log = logging.getLogger("agcseg")

SIGNAL_IMAGES = 4  # validation images by which the layers are described after each epoch


def run(config: Config, folder: Path) -> dict:
    """Train one network; continue or skip if `folder` holds the run already.

    The folder gets config.yaml, class_weights.json, run.log, metrics.csv (one row per epoch), layers.csv (signals,
    γ and λ of every layer, epoch by epoch), lambdas.npz (every λ), steps.npy (the loss of every step), images.csv (the
    last validation, image by image), TensorBoard events, predictions.png, last.pt (after every epoch; all that a
    continuation needs) and, at the end, result.json.

    Started by torchrun, the processes train one network together: `config.minibatch` images per step are shared out
    among them, and so are the validation images, none of them twice. Process 0 writes the folder.

    Args:
        config: see `agcseg.config`; it is checked first.
        folder: the run's own folder. With `config.resume` false and the folder taken, FOLDER-2, FOLDER-3, ... is used.

    Returns:
        the content of result.json: "state" is "finished" or "diverged", with the last epoch's figures.

    Raises:
        UserError: configuration or data cannot be used, the folder holds another run, or another process trains it.
    """
    check(config)
    device = find_device(parallel.join(config.device))
    first, processes = parallel.rank() == 0, parallel.world()
    if not first:
        log.setLevel(logging.WARNING)
    if config.minibatch % (processes * config.accumulate):
        raise UserError(
            f"minibatch={config.minibatch} cannot be shared by {processes} processes in {config.accumulate} parts each"
        )
    folder = folder if config.resume else parallel.from_first(free_folder(folder))
    result = parallel.from_first(finished(config, folder) if first else None)
    if result:
        return result
    data = config.data
    root = data.root
    if root is None:
        streets = data.streets
        root = streets_root(data.cache_dir, streets.train, streets.val, tuple(streets.size), streets.seed, log.info)
    layout, cached = open_data(data.name, root, tuple(data.size), data.cache_dir, _progress, log.info)
    contours = NETWORKS[config.network.name].contour
    train, val = (
        open_split(cached[split], _choose(split, len(cached[split].names), wanted, data.choice_seed), device, contours)
        for split, wanted in (("train", data.train_images), ("val", data.val_images))
    )
    if config.minibatch > len(train):
        raise UserError(f"minibatch={config.minibatch}: there are {len(train)} training images")
    if processes > len(val):
        raise UserError(f"{processes} processes cannot share {len(val)} validation images; start fewer")
    if not any(histogram(val, len(layout.classes))):
        raise UserError(f"{layout.title}: the labels of the {len(val)} validation images hold no labelled pixel")
    arguments = config, folder, device, layout, train, val, cached["train"].folder
    if not first:  # waits until process 0 has the lock
        return parallel.from_first(None) or _train(*arguments)

    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder)
    log_file = logging.FileHandler(folder / "run.log")
    log_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(log_file)
    try:
        # Another process may have finished it before it gave the lock away.
        return parallel.from_first(finished(config, folder)) or _train(*arguments)
    finally:
        log.removeHandler(log_file)
        log_file.close()
        held.release()


def _train(config: Config, folder: Path, device, layout, train: Split, val: Split, cache_folder: Path) -> dict:
    classes, num_classes, settings = layout.classes, len(layout.classes), asdict(config)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(config.deterministic)
    share, first = (parallel.rank(), parallel.world()), parallel.rank() == 0

    pixels = histogram(train, num_classes)
    weighting = class_weights.describe(classes.names, pixels, config.class_weights)
    weights = torch.tensor([row["weight"] for row in weighting["classes"]], device=device)
    constant = constant_error(max(range(num_classes), key=pixels.__getitem__), val, num_classes, device)

    torch.manual_seed(config.seed)
    network = build(
        config.network.name,
        norm=config.norm.name,
        norm_options=config.norm.options,
        num_classes=num_classes,
        width=config.network.width,
        init=config.network.init,
        implementation=config.network.implementation,
        **config.network.options,
    ).to(device)
    if config.init_from and not (folder / "last.pt").exists():
        log.info(start_from(network, config.init_from, config.norm.name))
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
    if config.sync_bn and parallel.world() > 1:
        if device.type == "cpu":
            raise UserError("sync_bn=true: torch synchronises batch normalisation on GPUs only")
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    noise = gems = None
    if config.noise.gain or config.noise.shift:
        noise = add_noise(network, config.noise.gain, config.noise.shift, config.seed * share[1] + share[0])
    if config.gems.mode:
        gems = GEMS(network, **asdict(config.gems))
    learning_rate = rate(config)
    groups = _parameter_groups(network, config.weight_decay)
    optimizer = torch.optim.SGD(groups, learning_rate, momentum(config), fused=True)

    steps, parts = len(train) // config.minibatch, 1 + network.contour  # parts of the loss: classes, contour
    watched = next(iter(minibatches(val, SIGNAL_IMAGES, device)))[0] if first else None
    epoch, samples, seconds, rows, peak = 0, 0, 0.0, [], 0.0
    layers = layer_rows(network, 0, layer_signals(network, watched), gems and {}) if first else []
    lambdas = {0: lambdas_of(network)}  # by the number of steps
    history = torch.empty(0, steps, parts)  # of `losses`, epoch by epoch
    if (folder / "last.pt").exists():
        saved = load_checkpoint(folder / "last.pt")
        check_same_run(saved, settings, pixels, folder)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        if noise:
            noise.set_state(saved["noise"][share[0] % len(saved["noise"])])
        if gems:
            gems.averages = saved.get("gems") or {}
        epoch, samples, rows = saved["epoch"], saved["samples"], saved["rows"]
        layers, lambdas = saved.get("layers", []), saved.get("lambdas", {})  # a run may be older than these
        history = saved.get("losses", torch.full((epoch, steps, parts), torch.nan))
        seconds = rows[-1]["seconds"]
        if first:
            write_tables(folder, rows, layers, history, lambdas)
            (folder / "result.json").unlink(missing_ok=True)  # of fewer epochs
    if first:
        write(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(settings)))
        beside_cache = f"{cache_folder.name}-{config.class_weights}-{len(train)}-choice{config.data.choice_seed}.json"
        write_json(folder / "class_weights.json", weighting)
        with contextlib.suppress(OSError):  # the cache may lie on a disk that is only read
            write_json(cache_folder.with_name(beside_cache), weighting)

    log.info(
        f"{folder}\n  {config.network.name}, width {config.network.width:g}, norm {config.norm.name}, init "
        f"{config.network.init}, {sum(p.numel() for p in network.parameters()):,} parameters, {config.precision} on "
        f"{device_name(device)}\n"
        f"  {layout.title}: {len(train)} training and {len(val)} validation images of {config.data.size[0]}x"
        f"{config.data.size[1]}; always naming the commonest class errs on {constant:.1%}\n"
        f"  minibatch {config.minibatch}, rate {learning_rate:g}, momentum {momentum(config):g}, seed {config.seed}, "
        f"epochs {epoch + 1} to {config.epochs}"
    )
    log.info(f"  class weights ({weighting['formula']}): " + _weights_line(weighting))
    if parallel.world() > 1:
        log.info(f"  {_sharing(config)}")

    model = torch.compile(network) if config.compile else network
    trained = model
    if parallel.world() > 1:
        idle_head = network.contour and config.contour.loss == "class_iou"  # of the contour: it gets no gradient
        trained = nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=True, find_unused_parameters=idle_head
        )
    panels = panels_of(config.network.name, config.norm.name, config.minibatch, learning_rate)
    board = TensorBoard(folder, epoch, samples, panels) if first else None
    hidden = not first or not sys.stderr.isatty()
    bar = tqdm(total=config.epochs * steps, initial=epoch * steps, unit="step", disable=hidden)
    state, reason = "finished", ""
    losses = torch.empty(steps, parts, device=device)
    reset_peak_memory(device)
    try:
        while epoch < config.epochs:
            epoch += 1
            start = time.perf_counter()
            network.train()
            gradient_norm, checked, bad = torch.zeros((), device=device), 0, None
            order = (config.seed, epoch)
            shuffled = minibatches(train, config.minibatch, device, order, config.data.flip, share)
            for step, (images, labels, *contours) in enumerate(shuffled):
                optimizer.zero_grad()
                losses[step] = backward(trained, images, labels, weights, config, *contours)
                parallel.add(losses[step]).div_(parallel.world())
                if gems:
                    for counts in (*gems.active.values(), *gems.points.values()):
                        parallel.add(counts)
                    gems.scale_gradients()
                gradients = [p.grad for p in network.parameters() if p.grad is not None]
                gradient_norm += torch.nn.utils.get_total_norm(gradients)
                optimizer.step()
                if epoch == 1 and (step + 1).bit_count() == 1:  # λ moves most at first
                    lambdas[step + 1] = lambdas_of(network)
                # Looking at the loss waits for the device: every step on the CPU, now and then on a GPU.
                if device.type == "cpu" or step % 50 == 49 or step == steps - 1:
                    finite = losses[checked : step + 1].isfinite().all(1)
                    if not finite.all():
                        bad = checked + int((~finite).nonzero()[0])
                        break
                    checked = step + 1
                    bar.set_postfix(_postfix(epoch, losses[step].sum().item(), rows), refresh=False)
                bar.update()
            if bad is not None:
                state, reason = "diverged", _divergence(epoch, bad, steps, losses.sum(1), rows)
                break
            train_seconds = time.perf_counter() - start
            samples += steps * config.minibatch
            network.eval()
            parallel.share_buffers(network)
            figures, by_image, shown, shown_contours = validate(model, val, weights, num_classes, config, device)
            seconds += time.perf_counter() - start
            iou, peak = figures.pop("iou"), max(peak, peak_memory(device))
            rows.append(
                {
                    "epoch": epoch,
                    "samples": samples,
                    "rate": learning_rate,
                    **loss_figures("train", losses),
                    **figures,
                    "gradient_norm": gradient_norm.item() / steps,
                    "images_per_second": steps * config.minibatch / train_seconds,
                    "seconds": seconds,
                    "peak_memory_mib": peak,
                    **{f"iou/{name}": value for name, value in zip(classes.names, iou, strict=True)},
                }
            )
            lambdas[epoch * steps] = lambdas_of(network)
            history = torch.cat([history, losses.float().cpu().unsqueeze(0)])
            noises = parallel.gather([noise.get_state()]) if noise else None  # one per process
            if not first:
                continue
            layers += layer_rows(network, epoch, layer_signals(network, watched), gems and gems.factors)
            reset_peak_memory(device)  # looking at the layers is not training
            painted = None
            if shown is not None and (epoch == config.epochs or epoch.bit_count() == 1):  # 1, 2, 4, 8, ... and last
                chosen = torch.from_numpy(val.indices[shown_images(val, config.images)])
                painted = picture(val.images[chosen], shown, val.labels[chosen], classes.palette(), shown_contours)
                write_picture(folder / "predictions.png", painted)
            save_checkpoint(
                folder / "last.pt",
                {
                    "epoch": epoch,
                    "samples": samples,
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "rng": torch.get_rng_state(),
                    "noise": noises,
                    "gems": gems and gems.averages,
                    "rows": rows,
                    "layers": layers,
                    "lambdas": lambdas,
                    "losses": history,
                    "config": settings,
                    "classes": list(classes.names),
                    "histogram": pixels,
                    "normalisation": {"mean": list(MEAN), "std": list(STD)},
                },
            )
            write_tables(folder, rows, layers, history, lambdas)
            write_csv(folder / "images.csv", by_image)
            board.log(rows[-1], [row for row in layers if row["epoch"] == epoch], painted)
            tell("running", epoch, config.epochs, rows[-1])
            bar.set_postfix(_postfix(epoch, rows[-1]["train_loss"], rows))
            (log.debug if not bar.disable else log.info)(_epoch_line(rows[-1], config.epochs))
        last = {key: value for key, value in (rows[-1] if rows else {}).items() if not key.startswith("iou/")}
        result = {"state": state, "reason": reason, "epochs": len(rows), **last, "commonest_class_error": constant}
        result |= {"device": device_name(device), "processes": parallel.world(), "torch": torch.__version__}
        if first:
            board.end(_hparams(config), {key: last[key] for key in ("pixel_error", "miou", "val_loss") if key in last})
    finally:
        bar.close()
        if first:
            board.close()
        torch.use_deterministic_algorithms(False)
    if first:
        write_json(folder / "result.json", result)
        tell(state, len(rows), config.epochs, last, reason)
    parallel.wait()
    log.info(result_line(folder, result))
    return result


def _parameter_groups(network: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay acts on filters only: on λ, γ and β it would pull the very thing the paper observes to 0."""
    filters = [p for p in network.parameters() if p.dim() > 1]
    vectors = [p for p in network.parameters() if p.dim() <= 1]
    return [{"params": filters, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _choose(split: str, available: int, wanted: int | None, seed: int):
    if wanted is not None and wanted > available:
        raise UserError(f"data.{split}_images={wanted}: there are {available} {split} images")
    return choose(available, wanted, seed)


def _divergence(epoch: int, bad: int, steps: int, losses: Tensor, rows: list[dict]) -> str:
    finite = losses[:bad].tolist() or [row["train_loss"] for row in rows]
    before = f"the last finite loss was {finite[-1]:.4g}" if finite else "no loss before it was finite"
    return f"the loss became {losses[bad].item()} in epoch {epoch}, step {bad + 1} of {steps}; {before}"


def _progress(items, total: int):
    return tqdm(items, "decoding", total, unit="image", disable=not sys.stderr.isatty())


def _postfix(epoch: int, loss: float, rows: list[dict]) -> dict:
    postfix = {"epoch": epoch, "loss": f"{loss:.3f}"}
    if rows:
        postfix |= {"error": f"{rows[-1]['pixel_error']:.1%}", "images/s": f"{rows[-1]['images_per_second']:.0f}"}
    return postfix


def _epoch_line(row: dict, epochs: int) -> str:
    left = row["seconds"] / row["epoch"] * (epochs - row["epoch"])
    return (
        f"  epoch {row['epoch']:>3}/{epochs}  loss {row['train_loss']:.3f}  val loss {row['val_loss']:.3f}  "
        f"error {row['pixel_error']:6.2%}  mIoU {row['miou']:.3f}  {row['images_per_second']:.1f} images/s  "
        f"{_duration(left)} left"
    )


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60) if seconds >= 60 else 0
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _sharing(config: Config) -> str:
    each, processes = config.minibatch // parallel.world(), parallel.world()
    line = f"{processes} processes: each minibatch of {config.minibatch} is {processes} x {each} images"
    if config.norm.name != "bn":
        return line
    return line + f"; batch statistics over {'all of them' if config.sync_bn else f'the {each} of each process'}"


def _weights_line(weighting: dict) -> str:
    absent = [row["class"] for row in weighting["classes"] if not row["pixels"]]
    line = ", ".join(f"{row['class']} {row['weight']:.2f}" for row in weighting["classes"])
    return line + (f"; no pixel of {', '.join(absent)}" if absent else "")


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
