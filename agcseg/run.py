"""One training run, from its configuration to its result, top to bottom."""

import json
import logging
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import filelock
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from agcseg import class_weights, metrics
from agcseg.config import Config, check, rate
from agcseg.data import open_data, streets_root
from agcseg.data.minibatches import MEAN, STD, Split, choose, histogram, minibatches, open_split
from agcseg.errors import UserError
from agcseg.losses import image_losses
from agcseg.machine import device_name, find_device, peak_memory, reset_peak_memory
from agcseg.networks import NETWORKS, build
from agcseg.record import (
    TensorBoard,
    layer_figures,
    load_checkpoint,
    picture,
    save_checkpoint,
    write,
    write_json,
    write_metrics,
    write_picture,
)
from agcseg.trained import start_from

log = logging.getLogger("agcseg")

# What may differ between a run and its continuation: where things lie and how fast they go, not what is computed.
FREE = {
    "name", "run", "epochs", "device", "channels_last", "compile", "resume", "images", "data.root", "data.cache_dir",
    "network.implementation", "network.options.recompute",
}  # fmt: skip


def run(config: Config, folder: Path) -> dict:
    """Train one network; continue or skip if `folder` holds the run already.

    The folder gets config.yaml, class_weights.json, run.log, metrics.csv (one row per epoch), TensorBoard events,
    predictions.png, last.pt (after every epoch; all that a continuation needs) and, at the end, result.json.

    Args:
        config: see `agcseg.config`; it is checked first.
        folder: the run's own folder. With `config.resume` false and the folder taken, FOLDER-2, FOLDER-3, ... is used.

    Returns:
        the content of result.json: "state" is "finished" or "diverged", with the last epoch's figures.

    Raises:
        UserError: configuration or data cannot be used, the folder holds another run, or another process trains it.
    """
    check(config)
    folder = folder if config.resume else _free_folder(folder)
    result = _finished(config, folder)
    if result:
        return result
    device = find_device(config.device)
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

    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(f"{folder}: another process is training this run") from None
    log_file = logging.FileHandler(folder / "run.log")
    log_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(log_file)
    try:
        return _train(config, folder, device, layout, train, val, cached["train"].folder)
    finally:
        log.removeHandler(log_file)
        log_file.close()
        lock.release()


def _train(config: Config, folder: Path, device, layout, train: Split, val: Split, cache_folder: Path) -> dict:
    classes, num_classes, settings = layout.classes, len(layout.classes), asdict(config)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(config.deterministic)

    pixels = histogram(train, num_classes)
    weighting = class_weights.describe(classes.names, pixels, config.class_weights)
    weights = torch.tensor([row["weight"] for row in weighting["classes"]], device=device)
    constant = _always(max(range(num_classes), key=pixels.__getitem__), val, num_classes, device)

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
        log.info(start_from(network, config.init_from))
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
    learning_rate = rate(config)
    groups = _parameter_groups(network, config.weight_decay)
    optimizer = torch.optim.SGD(groups, learning_rate, config.momentum, fused=True)

    epoch, samples, seconds, rows = 0, 0, 0.0, []
    if (folder / "last.pt").exists():
        saved = load_checkpoint(folder / "last.pt")
        _check_same_run(saved, settings, pixels, folder)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        epoch, samples, rows = saved["epoch"], saved["samples"], saved["rows"]
        seconds = rows[-1]["seconds"]
        write_metrics(folder, rows)
        (folder / "result.json").unlink(missing_ok=True)  # of fewer epochs
    write(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(settings)))
    beside_cache = f"{cache_folder.name}-{config.class_weights}-{len(train)}-choice{config.data.choice_seed}.json"
    for path in (folder / "class_weights.json", cache_folder.with_name(beside_cache)):
        write_json(path, weighting)

    log.info(
        f"{folder}\n  {config.network.name}, width {config.network.width:g}, norm {config.norm.name}, init "
        f"{config.network.init}, {sum(p.numel() for p in network.parameters()):,} parameters, {config.precision} on "
        f"{device_name(device)}\n"
        f"  {layout.title}: {len(train)} training and {len(val)} validation images of {config.data.size[0]}x"
        f"{config.data.size[1]}; always naming the commonest class errs on {constant:.1%}\n"
        f"  minibatch {config.minibatch}, rate {learning_rate:g}, momentum {config.momentum:g}, seed {config.seed}, "
        f"epochs {epoch + 1} to {config.epochs}"
    )
    log.info(f"  class weights ({weighting['formula']}): " + _weights_line(weighting))

    model = torch.compile(network) if config.compile else network
    board = TensorBoard(folder, epoch, samples)
    steps = len(train) // config.minibatch
    bar = tqdm(total=config.epochs * steps, initial=epoch * steps, unit="step", disable=not sys.stderr.isatty())
    state, reason = "finished", ""
    losses = torch.empty(steps, 1 + network.contour, device=device)  # the class loss, and that of the contour
    reset_peak_memory(device)
    try:
        while epoch < config.epochs:
            epoch += 1
            start = time.perf_counter()
            network.train()
            gradient_norm, checked, bad = torch.zeros((), device=device), 0, None
            shuffled = minibatches(train, config.minibatch, device, shuffle=(config.seed, epoch), flip=config.data.flip)
            for step, (images, labels, *contours) in enumerate(shuffled):
                optimizer.zero_grad()
                losses[step] = backward(model, images, labels, weights, config, *contours)
                gradients = [p.grad for p in network.parameters() if p.grad is not None]
                gradient_norm += torch.nn.utils.get_total_norm(gradients)
                optimizer.step()
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
            figures, shown, shown_contours = evaluate(model, val, weights, num_classes, config, device)
            seconds += time.perf_counter() - start
            iou = figures.pop("iou")
            rows.append(
                {
                    "epoch": epoch,
                    "samples": samples,
                    "rate": learning_rate,
                    **_loss_figures("train", losses),
                    **figures,
                    "gradient_norm": gradient_norm.item() / steps,
                    "images_per_second": steps * config.minibatch / train_seconds,
                    "seconds": seconds,
                    "peak_memory_mib": peak_memory(device),
                    **{f"iou/{name}": value for name, value in zip(classes.names, iou, strict=True)},
                }
            )
            painted = None
            if len(shown) and (epoch == config.epochs or epoch.bit_count() == 1):  # epochs 1, 2, 4, 8, ... and the last
                chosen = torch.from_numpy(val.indices[_shown(val, config.images)])
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
                    "rows": rows,
                    "config": settings,
                    "classes": list(classes.names),
                    "histogram": pixels,
                    "normalisation": {"mean": list(MEAN), "std": list(STD)},
                },
            )
            write_metrics(folder, rows)
            board.log(rows[-1], layer_figures(network), painted)
            bar.set_postfix(_postfix(epoch, rows[-1]["train_loss"], rows))
            (log.debug if not bar.disable else log.info)(_epoch_line(rows[-1], config.epochs))
        last = {key: value for key, value in (rows[-1] if rows else {}).items() if not key.startswith("iou/")}
        result = {"state": state, "reason": reason, "epochs": len(rows), **last, "commonest_class_error": constant}
        board.end(_hparams(config), {key: last[key] for key in ("pixel_error", "miou", "val_loss") if key in last})
    finally:
        bar.close()
        board.close()
        torch.use_deterministic_algorithms(False)
    write_json(folder / "result.json", result)
    log.info(_result_line(folder, result))
    return result


def backward(
    model: nn.Module, images: Tensor, labels: Tensor, weights: Tensor, config: Config, contours: Tensor | None = None
) -> Tensor:
    """Add the gradient of a minibatch's mean loss to the parameters' `.grad`, in `config.accumulate` parts.

    Summed over images and divided by the whole minibatch, so that the split changes nothing (batch normalisation's
    statistics apart).

    Returns:
        the mean losses that were added, detached: (1,), that of the classes, or (2,), and that of the contour.
    """
    total = 0
    for part in zip(*(t.chunk(config.accumulate) for t in (images, labels, contours) if t is not None), strict=True):
        some, truth, *borders = part
        losses = _losses(_logits(model, some, config), truth, weights, config, *borders)
        losses = losses.sum(1) / len(images)
        losses.sum().backward()
        total += losses.detach()
    return total


@torch.no_grad()
def evaluate(model: nn.Module, val: Split, weights, num_classes: int, config: Config, device):
    """Validation losses and the figures of `agcseg.metrics`; predictions of the images that are shown; and of those,
    where the network finds contours, the contour's probabilities, else None."""
    losses, wrong, valid, shown, position = [], [], [], [], 0
    compared, shown_contours = [], []
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    wanted = set(_shown(val, config.images))
    for images, labels, *contours in minibatches(val, config.minibatch, device):
        outputs = _logits(model, images, config)
        losses.append(_losses(outputs, labels, weights, config, *contours))
        logits, contour = (outputs.classes, outputs.contour) if contours else (outputs, None)
        prediction = logits.argmax(1)
        counts = metrics.count(prediction, labels, num_classes)
        wrong.append(counts[0])
        valid.append(counts[1])
        confusion += counts[2]
        shown += [row for i, row in enumerate(prediction, position) if i in wanted]
        if contours:
            compared.append(metrics.count_contours(contour, *contours, labels, config.contour.band))
            shown_contours += [row for i, row in enumerate(contour.sigmoid()[:, 0], position) if i in wanted]
        position += len(images)
    figures = _loss_figures("val", torch.cat(losses, 1).T.double())
    figures |= metrics.summarise(torch.cat(wrong), torch.cat(valid), confusion)
    if compared:
        figures |= metrics.summarise_contours(*map(torch.cat, zip(*compared, strict=True)))
    shown = torch.stack(shown) if shown else torch.empty(0)
    return figures, shown, torch.stack(shown_contours) if shown_contours else None


def _losses(outputs, labels: Tensor, weights: Tensor, config: Config, contours: Tensor | None = None) -> Tensor:
    """(1, N), or with a contour (2, N): the losses of `image_losses`."""
    return torch.stack(image_losses(outputs, labels, weights, contours, config.contour.loss, config.contour.band))


def _loss_figures(what: str, losses: Tensor) -> dict[str, float]:
    """Means of losses, (n, 1) or (n, 2): their sum and, if there are two, each."""
    figures = {f"{what}_loss": losses.sum(1).mean().item()}
    if losses.shape[1] == 2:
        of_classes, of_contour = losses.mean(0).tolist()
        figures |= {f"{what}_class_loss": of_classes, f"{what}_contour_loss": of_contour}
    return figures


def _logits(model: nn.Module, images: Tensor, config: Config) -> Tensor:
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        return model(images)


def _parameter_groups(network: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay acts on filters only: on λ, γ and β it would pull the very thing the paper observes to 0."""
    filters = [p for p in network.parameters() if p.dim() > 1]
    vectors = [p for p in network.parameters() if p.dim() <= 1]
    return [{"params": filters, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _always(commonest: int, val: Split, num_classes: int, device) -> float:
    """Validation pixel error of naming one class everywhere."""
    counts = []
    for i in val.indices:
        labels = val.labels[int(i)].unsqueeze(0).to(device)
        counts.append(metrics.count(torch.full_like(labels, commonest), labels, num_classes))
    wrong, valid = (torch.cat([count[k] for count in counts]) for k in (0, 1))
    return metrics.summarise(wrong, valid, sum(count[2] for count in counts))["pixel_error"]


def _check_same_run(saved: dict, settings: dict, pixels: list[int], folder: Path) -> None:
    there, here = _flat(asdict(Config())) | _flat(saved["config"]), _flat(settings)  # a run may be older than a key
    differ = [
        f"{key}: {there.get(key)} there, {here.get(key)} here"
        for key in sorted(there.keys() | here.keys())
        if key not in FREE and there.get(key) != here.get(key)
    ]
    if not differ and saved["histogram"] != pixels:
        differ = ["the training images or their labels have changed"]
    if differ:
        raise UserError(
            f"{folder} holds another run:\n  " + "\n  ".join(differ) + "\n"
            "Give this one another place with name= or run=, or start afresh beside it with resume=false"
        )


def _finished(config: Config, folder: Path) -> dict | None:
    """The result of a run that has nothing left to do."""
    try:
        result = json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:
        raise UserError(f"{folder / 'result.json'}: is not readable; delete it to continue from last.pt") from None
    if result["state"] == "finished" and result["epochs"] < config.epochs:
        return None
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder}: has a result.json but no config.yaml, so it cannot be told what ran there")
    settings, saved = asdict(config), OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    _check_same_run({"config": saved, "histogram": None}, settings, None, folder)
    log.info(f"{_result_line(folder, result)} (nothing left to do)")
    return result


def _free_folder(folder: Path) -> Path:
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def _choose(split: str, available: int, wanted: int | None, seed: int):
    if wanted is not None and wanted > available:
        raise UserError(f"data.{split}_images={wanted}: there are {available} {split} images")
    return choose(available, wanted, seed)


def _shown(val: Split, number: int) -> list[int]:
    """Positions of the validation images that are pictured: spread evenly, the same every time."""
    number = min(number, len(val))
    return [i * len(val) // number for i in range(number)]


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


def _result_line(folder: Path, result: dict) -> str:
    error = f", pixel error {result['pixel_error']:.2%}" if "pixel_error" in result else ""
    reason = f": {result['reason']}" if result["reason"] else ""
    return f"{folder}: {result['state']} after {result['epochs']} epochs{error}{reason}"


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60) if seconds >= 60 else 0
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


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
        "momentum": config.momentum,
        "seed": config.seed,
    }


def _flat(settings: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
