"""What process 0 keeps of a run in its folder, epoch by epoch."""

import time
from pathlib import Path

import numpy as np
from PIL import Image

from agcseg.figure1 import Panel
from agcseg.record.checkpoint import save_checkpoint
from agcseg.record.files import write, write_json
from agcseg.record.pictures import png
from agcseg.record.tables import write_tables
from agcseg.record.tensorboard import TensorBoard


class Record:
    """The files of a run that grow with it.

    last.pt is what counts. TensorBoard's points are on the disk before it, and cut off behind it when the run goes on.
    All other files are written after it, from what it holds, and once more when the run goes on: whatever a kill left
    undone, they are then as of last.pt.

    Args:
        state: `agcseg.training.state.State`, new or as loaded.
        about: what else a checkpoint holds: the configuration, the data's identity, the classes.
        panels: of Figure 1, that show the run.
        save_every: seconds between two saves, of last.pt and of best.pt where there is a better one; the first epoch's
            and the last one's are always saved.
        sizes: of the event files, as the checkpoint tells; empty for a run from its beginning.
    """

    def __init__(
        self, folder: Path, state, about: dict, panels: list[Panel], save_every: float, sizes: dict[str, int]
    ) -> None:
        self.folder, self.about, self.save_every = folder, about, save_every
        if state.epoch:
            (folder / "result.json").unlink(missing_ok=True)  # of fewer epochs
            self._write(state)
        self.board = TensorBoard(folder, state.epoch, state.last("samples"), panels, sizes)
        self.saved: float | None = None
        self.best: dict | None = None  # for best.pt, until it is written

    def add(self, state, picture: np.ndarray | None, last: bool) -> None:
        """Take up the epoch that is just done."""
        if picture is not None:
            state.picture = png(Image.fromarray(picture))
        self.board.log(state.rows[-1], [row for row in state.layers if row["epoch"] == state.epoch], picture)
        if state.is_best:
            weights = {name: value.cpu().clone() for name, value in state.result.state_dict().items()}
            self.best = {"epoch": state.epoch, "network": weights} | self.about
        if last or self.saved is None or time.monotonic() - self.saved >= self.save_every:
            self._write_best()  # first: whatever comes behind last.pt is trained again
            save_checkpoint(self.folder / "last.pt", state.saved() | self.about | {"events": self.board.sizes()})
            self._write(state)
            self.saved = time.monotonic()

    def end(self, state, result: dict, hparams: dict) -> None:
        """The run is over. One that diverged has epochs behind its last checkpoint: they are told of."""
        if result["state"] == "diverged" and state.epoch:
            self._write(state)
            self._write_best()
        figures = {key: result[key] for key in ("pixel_error", "miou", "val_loss") if key in result}
        self.board.end(state.epoch, hparams, figures)
        self.board.close()
        write_json(self.folder / "result.json", result)

    def close(self) -> None:
        self.board.close()

    def _write_best(self) -> None:
        if self.best:
            save_checkpoint(self.folder / "best.pt", self.best)
            self.best = None

    def _write(self, state) -> None:
        write_tables(self.folder, state.rows, state.layers, state.losses, state.lambdas, state.images, state.network)
        if state.picture:
            write(self.folder / "predictions.png", state.picture)
