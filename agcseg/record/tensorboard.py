"""The curves of a run in TensorBoard."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from agcseg.figure1 import PANELS, Panel

EVENTS = "events.out.tfevents.*"


class TensorBoard:
    """Event files of a run. The curves stand twice: against the epoch, and against the samples seen.

    The second axis has a folder of its own because a resume purges points by step, and the two count differently.
    A run that Figure 1 shows also has its curve under figure1/, so that each panel overlays its runs and no others.

    Args:
        folder: of the run.
        epoch, samples: that are done.
        panels: of Figure 1, that show the run.
        sizes: of the event files when those were done (see `sizes`), to which they are cut.
    """

    def __init__(self, folder: Path, epoch: int, samples: int, panels: list[Panel], sizes: dict[str, int]) -> None:
        self.folder = folder
        for path in self._files():
            if size := sizes.get(str(path.relative_to(folder)), 0):
                os.truncate(path, min(size, path.stat().st_size))
            else:
                path.unlink()
        # A TensorBoard that is looking on has points in its memory, and drops these when told to.
        purge = (epoch + 1, samples + 1) if epoch else (None, None)
        self.epochs = SummaryWriter(str(folder), purge_step=purge[0])
        self.samples = SummaryWriter(str(folder / "samples"), purge_step=purge[1])
        self.panels = panels
        if panels and not epoch:
            charts = {f"({panel.letter}) {panel.caption}": ["Multiline", [_tag(panel)]] for panel in PANELS}
            self.epochs.add_custom_scalars({"Figure 1": charts})

    def log(self, row: dict, layers: list[dict], picture: np.ndarray | None) -> None:
        """Add an epoch: its row of metrics.csv, its rows of layers.csv, and the picture where there is one."""
        scalars = {f"{'iou' if key.startswith('iou/') else 'run'}/{key.removeprefix('iou/')}": row[key] for key in row}
        for key in ("train_loss", "val_loss", "pixel_error", "pixel_error_all", "miou"):
            scalars[f"curves/{key}"] = scalars.pop(f"run/{key}")
        scalars |= {_tag(panel): row[panel.metric] for panel in self.panels}
        about = ("epoch", "layer", "role", "num_features", "kernel_size", "height", "width")
        for layer in layers:
            scalars |= {f"{key}/{layer['layer']}": layer[key] for key in layer.keys() - about if layer[key] is not None}
        with self._named():
            for tag, value in scalars.items():
                self.epochs.add_scalar(tag, value, row["epoch"])
                if tag.startswith("curves/"):
                    self.samples.add_scalar(f"curves_by_samples/{tag.removeprefix('curves/')}", value, row["samples"])
            if picture is not None:
                tag = "validation/image_prediction_truth_error"
                self.epochs.add_image(tag, picture, row["epoch"], dataformats="HWC")
            self.epochs.flush()
            self.samples.flush()

    def sizes(self) -> dict[str, int]:
        """Bytes of every event file, for a checkpoint."""
        return {str(path.relative_to(self.folder)): path.stat().st_size for path in self._files()}

    def end(self, epoch: int, settings: dict, figures: dict[str, float]) -> None:
        """The row of the HParams page. `run_name="."` keeps it from becoming a run of its own."""
        figures = {f"final/{key}": value for key, value in figures.items()}
        with self._named():
            self.epochs.add_hparams(settings, figures, run_name=".", global_step=epoch)

    def close(self) -> None:
        with self._named():
            self.epochs.close()
            self.samples.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """The thread that writes passes its errors on, and names no file."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self.folder / EVENTS)
            raise

    def _files(self) -> list[Path]:
        return [*self.folder.glob(EVENTS), *self.folder.glob(f"samples/{EVENTS}")]


def _tag(panel: Panel) -> str:
    return f"figure1/{panel.letter}"
