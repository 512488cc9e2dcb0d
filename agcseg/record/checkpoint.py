"""The checkpoints of a run: last.pt, and the best one's weights in best.pt."""

import io
from pathlib import Path

import torch

from agcseg.errors import UserError
from agcseg.record.files import write


def save_checkpoint(path: Path, content: dict) -> None:
    """Tensors and plain Python values only, so that `torch.load(weights_only=True)` reads it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getbuffer())


def weights_of(checkpoint: dict) -> dict[str, torch.Tensor]:
    """The weights that were validated: the averaged ones where there are any."""
    average = checkpoint.get("average") or {}
    averaged = {name.removeprefix("module."): value for name, value in average.items() if name.startswith("module.")}
    return averaged or checkpoint["network"]


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint onto the CPU.

    Raises:
        UserError: the file is no checkpoint of this program.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a checkpoint ({error.strerror or error})") from None
    except Exception:  # torch raises what pickle and zipfile raise, and advises to trust the file
        raise UserError(
            f"{path}: cannot be read as a checkpoint; it is empty, cut off, or not written by agcseg-train"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("network"), dict):
        raise UserError(f"{path}: is not a checkpoint of agcseg")
    return content
