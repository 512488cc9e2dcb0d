"""Files that are written whole or not at all."""

import contextlib
import csv
import io
import json
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any


def write(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one; a failure leaves nothing beside it.

    Raises:
        OSError: it names the file.
    """
    name = path.name if len(os.fsencode(path.name)) < 230 else f"{zlib.crc32(os.fsencode(path.name)):08x}"
    temporary = path.with_name(f".{name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # a full disk names none
        raise


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left half-written; for whoever is alone in the folder."""
    for path in folder.glob(".*.*"):
        if re.fullmatch(r"\..+\.\d+", path.name):
            path.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """What is not finite becomes null: JSON has no NaN."""
    write(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [*map(_finite, content)]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_csv(path: Path, rows: list[dict]) -> None:
    """With a column for each key; the cells of what a row lacks are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue())


def tell(state: str, epoch: int, epochs: int, figures: dict, reason: str = "") -> None:
    """Tell the program that started this process, if it asked by RUN_STATUS_FILE, how the run goes.

    Args:
        figures: a row of metrics.csv, or a result; empty if there is none yet.
    """
    path = os.environ.get("RUN_STATUS_FILE")
    if path:
        status = {"state": state, "progress": f"epoch {epoch}/{epochs}", "reason": reason}
        if figures.get("epoch"):
            status |= {"error": f"{figures['pixel_error']:.1%}".replace("%", " %")}
            status |= {"eta_s": figures["seconds"] / epoch * (epochs - epoch)}
        with contextlib.suppress(OSError):  # nobody to tell is no reason to stop
            write_json(Path(path), status)
