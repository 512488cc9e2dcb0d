"""The runs of a folder, read from what a training run leaves there. Nothing is trusted: a broken file is named."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from agcseg.config import Config, momentum, rate
from agcseg.errors import UserError

NORMS = {"bn": "Batch normalisation", "agc": "AGC", "none": "No normalisation", "group": "Group normalisation",
         "layer": "Layer normalisation", "instance": "Instance normalisation",
         "center": "AGC, λ fixed", "agc_std": "AGC by deviation", "mean_only": "Mean-only batch norm.",
         "frn": "Filter response norm.", "ws": "Weight standardisation",
         "dyt": "Dynamic tanh", "derf": "Dynamic erf"}  # fmt: skip
NAMES = {"segnet": "SegNet", "classnet": "ClassNet", "cityscapes": "Cityscapes", "camvid": "CamVid", "bn": "BN",
         "agc": "AGC"}  # fmt: skip
SHORT = NAMES | {"none": "no norm", "frn": "FRN", "ws": "WS", "dyt": "DyT", "derf": "Derf"}
# Settings that change nothing that is computed: where things lie, and how fast they go.
FREE = {
    "name", "run", "device", "channels_last", "compile", "deterministic", "resume", "save_every", "images",
    "data.root", "data.cache_dir", "network.implementation", "network.options.recompute",
}  # fmt: skip
COLUMNS = """epoch samples rate train_loss val_loss pixel_error pixel_error_all miou gradient_norm images_per_second
seconds peak_memory_mib""".split()
LAMBDA = tuple(f"lambda_{what}" for what in "mean min q05 q25 q50 q75 q95 max inside".split())

_UNREADABLE = (OSError, ValueError, TypeError, KeyError, EOFError, csv.Error, YAMLError, OmegaConfBaseException)


@dataclass
class Layers:
    """λ of every layer that has one, in the order of execution (layers.csv)."""

    names: list[str]
    roles: list[str]  # encoder, lateral, decoder or head
    num_features: np.ndarray  # (layers,)
    epochs: np.ndarray  # (epochs,); 0 is the untrained network
    values: dict[str, np.ndarray]  # column of layers.csv -> (epochs, layers)


@dataclass
class Run:
    """One run: how it was set up, how it ended, and what it measured."""

    name: str
    path: Path
    network: str
    width: float | None
    norm: str
    minibatch: int
    rate: float  # the effective one: agcseg.config.rate
    seed: int | None
    epochs: int  # asked for
    data: str
    size: tuple[int, int]  # height, width
    state: str  # "finished", "diverged" or "unfinished"
    reason: str
    commonest_class_error: float
    rows: dict[str, list[float]]  # known column of metrics.csv -> one number per row, nan where the cell is empty
    settings: dict[str, Any] = field(default_factory=dict)  # the whole configuration, its keys with dots
    words: dict[str, str] = field(default_factory=dict)  # the same as `describe` puts it
    device: str = ""  # empty: not recorded
    processes: int = 1
    steps: np.ndarray | None = None  # (epochs, steps) training loss of each step, or None: not recorded
    layers: Layers | None = None  # None: not recorded, or no λ
    images: dict[str, tuple[float, float]] | None = None  # of the last epoch: name -> share of wrong pixels, loss

    @property
    def title(self) -> str:
        """What the runs of one panel have in common, such as "SegNet, width 0.25, streets 64x128, 10 epochs"."""
        network = NAMES.get(self.network, self.network) + ("" if self.width is None else f", width {self.width:g}")
        return f"{network}, {NAMES.get(self.data, self.data)} {self.size[0]}x{self.size[1]}, {self.epochs} epochs"

    def column(self, key: str) -> list[float]:
        """One column of metrics.csv from epoch 1 on; nan where nothing was measured."""
        values = self.rows.get(key, [math.nan] * len(self.rows["epoch"]))
        return [value for epoch, value in zip(self.rows["epoch"], values, strict=True) if epoch >= 1]

    @property
    def last_epoch(self) -> int:
        return int(max(self.column("epoch"), default=0))

    def at(self, key: str, epoch: int) -> float:
        """A figure of metrics.csv at one epoch; nan if it is not there."""
        return dict(zip(self.column("epoch"), self.column(key), strict=True)).get(epoch, math.nan)


def read_runs(folder: str | Path) -> list[Run]:
    """The readable runs of a folder, ordered by network, normalisation, minibatch, rate and seed. See `read_folder`."""
    return read_folder(folder)[0]


def read_folder(folder: str | Path) -> tuple[list[Run], list[str], list[str]]:
    """The runs of a folder, a line for each broken file, and a line for each half-written run.

    A run whose configuration, metrics or result is broken is left out; one whose steps, layers or images are broken is
    reported without them.

    Raises:
        UserError: the folder is missing or holds no run that can be read.
    """
    folder, advice = Path(folder), "make runs with: agcseg-train -m experiment=demo"
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; expected a folder of runs, such as outputs/demo; {advice}")
    runs, broken, notes = [], [], []
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        missing = [name for name in ("config.yaml", "metrics.csv") if not (path / name).is_file()]
        try:
            if missing == ["metrics.csv"] and (_read(path / "result.json", _result) or {}).get("state") == "diverged":
                runs.append(_read_run(path, broken))  # in its first epoch
            elif len(missing) == 1:
                notes.append(f"{path.name} is left out: it has no {missing[0]} (perhaps it has just begun)")
            elif not missing:
                runs.append(_read_run(path, broken))
        except UserError as error:
            broken.append(str(error))
    if not runs:
        advice = "this is a single run: give its parent folder" if (folder / "metrics.csv").is_file() else advice
        found = f"no run to report in {folder}: looked for {folder / 'RUN'}/config.yaml and metrics.csv"
        raise UserError("; ".join([found, *broken, *notes, advice]))
    runs.sort(key=lambda r: (r.title, [*NORMS, r.norm].index(r.norm), r.norm, r.minibatch, r.rate, r.seed or 0, r.name))
    return runs, broken, notes


def flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings with their keys joined by dots."""
    answer = {}
    for key, value in settings.items():
        answer |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return answer


def describe(settings: dict[str, Any], processes: int = 1) -> dict[str, str]:
    """What decides a run's outcome, seed apart, in words; several keys that are one thing, such as noise, are one.

    The key of an option begins with the norm or network that it belongs to, such as "agc:λ".
    """
    rest = {key: value for key, value in settings.items() if key not in FREE | {"seed"}}
    rate_of = SimpleNamespace(lr=SimpleNamespace(base=rest.pop("lr.base"), value=rest.pop("lr.value")))
    for key in ("minibatch", "momentum", "momentum_match"):
        setattr(rate_of, key, rest.pop(key))
    norm, network = rest.pop("norm.name"), rest.pop("network.name")
    words = {"norm": SHORT.get(norm, norm)}
    start, background, window, quantile, gradient = (
        rest.pop(f"norm.options.{key}", None)
        for key in ("mean_scale", "background", "window", "quantile", "median_gradient")
    )
    if start is not None:
        words[f"{norm}:λ"] = ("λ {:g}" if norm == "center" else "λ from {:g}").format(start)
    if background is not None:
        extent = {"window": window, "trimmed": quantile, "median": "with gradient" if gradient else None}.get(
            background
        )
        words[f"{norm}:background"] = f"background {background}" + f" {extent}" * (extent not in (None, 0.5))
    words["network"] = SHORT.get(network, network)
    words["width"] = f"width {rest.pop('network.width')}"
    words["data"] = SHORT.get(rest["data.name"], rest.pop("data.name"))
    words["size"] = "x".join(map(str, rest.pop("data.size")))
    words["init"] = f"init {rest.pop('network.init')}"
    words["minibatch"] = f"minibatch {rate_of.minibatch}"
    words["momentum"], words["rate"] = f"momentum {momentum(rate_of):.6g}", f"rate {rate(rate_of):.4g}"
    gain, shift = rest.pop("noise.gain"), rest.pop("noise.shift")
    words["noise"] = f"noise gain {gain:g} shift {shift:g}" if gain or shift else "no noise"
    mode, limit, ema, gate = (rest.pop(f"gems.{key}") for key in ("mode", "limit", "ema", "gate"))
    details = f" at most {limit:g}" * (limit != 10) + f" ema {ema:g}" * (ema != 0) + f" gate {gate}" * (gate != "relu")
    words["gems"] = f"GEMS {mode}{details}" if mode else "no GEMS"
    weights = rest.pop("init_from", None)
    words["init_from"] = f"from {Path(str(weights).removesuffix('/last.pt')).name}" if weights else "from scratch"
    words["processes"] = f"{processes} processes"
    for key, value in rest.items():
        owner = {"norm.options": f"{norm}:", "network.options": f"{network}:"}.get(key.rpartition(".")[0], "")
        word = key.rpartition(".")[2].replace("_", " ")
        words[owner + key] = "no " * (not value) + word if isinstance(value, bool) else f"{word} {value}"
    return words


def _read_run(path: Path, broken: list[str]) -> Run:
    result = _read(path / "result.json", _result) or {"state": "unfinished"}
    rows = _read(path / "metrics.csv", _metrics) or {"epoch": []}
    run = _read(path / "config.yaml", lambda file: _run(path, result, rows, OmegaConf.load(file)))
    for name, reader in (("steps.npy", _steps), ("layers.csv", _layers), ("images.csv", _images)):
        try:
            setattr(run, name.partition(".")[0], _read(path / name, reader))
        except UserError as error:
            broken.append(str(error))
    return run


def _read(file: Path, reader: Callable[[Path], Any]) -> Any:
    """What `reader` makes of a file, None where there is none; any trouble is a UserError that names the file."""
    try:
        return reader(file) if file.is_file() else None
    except _UNREADABLE as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error


def _run(path: Path, result: dict, rows: dict, config) -> Run:
    def get(key: str, kind: type, needed: bool = True):
        value = OmegaConf.select(config, key)
        if value is None and needed:
            raise ValueError(f"{key} is missing")
        return None if value is None else kind(value)

    minibatch, effective, size = get("minibatch", int), get("lr.value", float, False), get("data.size", list)
    if effective is None:
        effective = get("lr.base", float) * minibatch * minibatch / (get("momentum_match", int, False) or minibatch)
    height, width = size
    commonest = result.get("commonest_class_error")
    settings = flat(asdict(Config())) | flat(OmegaConf.to_container(config))  # a run may be older than a key
    processes = int(result.get("processes") or 1)
    return Run(
        name=path.name, path=path, network=get("network.name", str), width=get("network.width", float, False),
        norm=get("norm.name", str), minibatch=minibatch, seed=get("seed", int, False), epochs=get("epochs", int),
        rate=effective, data=get("data.name", str),
        size=(int(height), int(width)), state=result["state"], reason=str(result.get("reason") or ""), rows=rows,
        commonest_class_error=math.nan if commonest is None else float(commonest),
        settings=settings, words=describe(settings, processes), device=str(result.get("device") or ""),
        processes=processes,
    )  # fmt: skip


def _result(file: Path) -> dict:
    result = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(result, dict) or result.get("state") not in ("finished", "diverged"):
        raise ValueError('"state" is neither "finished" nor "diverged"')
    if result.get("commonest_class_error") is not None:
        float(result["commonest_class_error"])
    return result


def _metrics(file: Path) -> dict[str, list[float]]:
    header, *lines = [*csv.reader(file.read_text(encoding="utf-8").splitlines())] or [[]]
    if not {"epoch", "pixel_error", "val_loss"} <= {*header}:
        raise ValueError("expected at least the columns epoch, pixel_error and val_loss")
    known = [column for column in header if column in COLUMNS or column.startswith("iou/")]
    rows: list[dict[str, float]] = []
    for number, cells in enumerate(lines, start=2):
        try:
            texts = dict(zip(header, cells, strict=True))
            row = {column: float(texts[column].strip() or "nan") for column in known}
            row["epoch"] = int(row["epoch"])
        except (ValueError, OverflowError) as error:
            raise ValueError(f"line {number}: {error}; expected {len(header)} cells of numbers") from None
        rows = [r for r in rows if r["epoch"] < row["epoch"]] + [row]  # a resumed run goes through some epochs again
    return {column: [row[column] for row in rows] for column in known}


def _steps(file: Path) -> np.ndarray:
    losses = np.load(file, allow_pickle=False)
    if losses.ndim != 3 or not np.issubdtype(losses.dtype, np.floating):
        raise ValueError(f"expected numbers of shape (epochs, steps, parts), found {losses.dtype} of {losses.shape}")
    return losses.sum(2)


def _dicts(file: Path, expected: set[str]) -> list[dict[str, str]]:
    with open(file, encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        if not expected <= {*(reader.fieldnames or ())}:
            raise ValueError(f"expected the columns {', '.join(sorted(expected))}")
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num}: expected {len(reader.fieldnames)} cells")
            rows.append(row)
    return rows


def _layers(file: Path) -> Layers | None:
    rows = _dicts(file, {"epoch", "layer", "role", "num_features", *LAMBDA})
    cells = {(int(row["epoch"]), row["layer"]): row for row in rows if row["lambda_mean"].strip()}
    epochs = sorted({epoch for epoch, _ in cells})
    names = [layer for epoch, layer in cells if epoch == epochs[-1]]
    if not names:
        return None  # a norm without λ
    if len(cells) != len(epochs) * len(names):
        raise ValueError(f"expected {len(names)} layers in each of {len(epochs)} epochs, found {len(cells)} rows")
    last = [cells[epochs[-1], name] for name in names]
    return Layers(
        names=names,
        roles=[row["role"] for row in last],
        num_features=np.array([int(row["num_features"]) for row in last]),
        epochs=np.array(epochs),
        values={key: np.array([[float(cells[e, n][key]) for n in names] for e in epochs]) for key in LAMBDA},
    )


def _images(file: Path) -> dict[str, tuple[float, float]]:
    """Per image the share of wrong pixels, nan where none is labelled, and the loss."""
    images = {}
    for row in _dicts(file, {"image", "wrong_pixels", "labelled_pixels", "loss"}):
        wrong, labelled = float(row["wrong_pixels"]), float(row["labelled_pixels"])
        images[row["image"]] = (wrong / labelled if labelled else math.nan, float(row["loss"]))
    return images
