"""What a run says while it trains: on a terminal a bar, elsewhere a line per epoch."""

import logging
import math
import sys
from dataclasses import asdict

from tqdm import tqdm

from agcseg.config import Config, momentum, rate
from agcseg.nn.norms import OF_MINIBATCHES
from agcseg.record.identity import without_effect
from agcseg.training import parallel
from agcseg.training.machine import device_name
from agcseg.training.state import State

log = logging.getLogger("agcseg")


def on_terminal(stream) -> bool:
    """Whether a person looks at the stream, which may be closed or not be there at all."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def progress(items, total: int | None, what: str = "decoding", unit: str = "image"):
    """The items, with a bar on a terminal."""
    return tqdm(items, what, total, unit=unit, disable=not on_terminal(sys.stderr))


class Bar:
    """The bar of process 0; steps of all epochs."""

    def __init__(self, config: Config, state: State) -> None:
        steps = state.losses.shape[1]
        self.bar = tqdm(
            total=config.epochs * steps,
            initial=state.epoch * steps,
            unit="step",
            disable=parallel.rank() > 0 or not on_terminal(sys.stderr),
        )
        self.update, self.close, self.rows = self.bar.update, self.bar.close, state.rows

    def tell(self, epoch: int, loss: float) -> None:
        figures = {"epoch": epoch, "loss": f"{loss:.3f}"}
        if self.rows:
            row = self.rows[-1]
            figures |= {"error": f"{row['pixel_error']:.1%}", "images/s": f"{row['images_per_second']:.0f}"}
        self.bar.set_postfix(figures, refresh=False)

    def end_epoch(self, epochs: int) -> None:
        """The line goes to run.log in any case, and on the screen where no bar stands in its place."""
        row = self.rows[-1]
        self.tell(row["epoch"], row["train_loss"])
        seen = not self.bar.disable and on_terminal(sys.stdout)
        (log.debug if seen else log.info)(_epoch_line(row, epochs))


def introduction(config: Config, folder, state: State, data, device) -> str:
    """Where the run goes, what is trained, and on what."""
    size, first = config.data.size, state.epoch + 1
    lines = [
        f"{folder}",
        f"{config.network.name}, width {config.network.width:g}, norm {config.norm.name}, init "
        f"{config.network.init or 'its own'}, {sum(p.numel() for p in state.network.parameters()):,} parameters, "
        f"{config.precision} on {device_name(device)}",
        f"{data.layout.title}: {len(data.train)} training and {len(data.val)} validation images of {size[0]}x{size[1]};"
        f" always naming the commonest class errs on {data.constant_error:.1%}",
        f"minibatch {config.minibatch}, rate {rate(config):g}, momentum {momentum(config):g}, seed {config.seed}, "
        f"epochs {first} to {config.epochs}",
        f"class weights ({data.weighting['formula']}): " + _weights(data.weighting),
    ]
    if parallel.world() > 1:
        lines.append(_sharing(config))
    if idle := without_effect(asdict(config)):
        lines.append(f"without effect: {'; '.join(idle)}")
    return "\n  ".join(lines)


def divergence(epoch: int, step: int, losses, rows: list[dict]) -> str:
    """What is to be said of the first loss, of step `step` (from 0), that is not finite.

    Args:
        losses: (steps,), of this epoch.
    """
    finite = losses[:step].tolist() or [row["train_loss"] for row in rows]
    before = f"the last finite loss was {finite[-1]:.4g}" if finite else "no loss before it was finite"
    return f"the loss became {losses[step].item()} in epoch {epoch}, step {step + 1} of {len(losses)}; {before}"


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
    if config.norm.name not in OF_MINIBATCHES:
        return line
    return line + f"; batch statistics over {'all of them' if config.sync_bn else f'the {each} of each process'}"


def _weights(weighting: dict) -> str:
    absent = [row["class"] for row in weighting["classes"] if not row["pixels"]]
    line = ", ".join(f"{row['class']} {row['weight']:.2f}" for row in weighting["classes"])
    return line + (f"; no pixel of {', '.join(absent)}" if absent else "")
