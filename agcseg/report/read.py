"""The runs of a folder, read from what a training run leaves there. Nothing is trusted: a broken file is named."""

import csv
import json
import math
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from agcseg.errors import UserError
from agcseg.record.identity import FREE, complete, deciding, flat

NORM_TITLES = {"bn": "Batch normalisation", "agc": "AGC", "none": "No normalisation", "group": "Group normalisation",
               "layer": "Layer normalisation", "instance": "Instance normalisation",
               "center": "AGC, λ fixed", "agc_std": "AGC by deviation", "mean_only": "Mean-only batch norm.",
               "frn": "Filter response norm.", "ws": "Weight standardisation",
               "dyt": "Dynamic tanh", "derf": "Dynamic erf"}  # fmt: skip
NAMES = {"segnet": "SegNet", "classnet": "ClassNet", "cityscapes": "Cityscapes", "camvid": "CamVid", "bn": "BN",
         "agc": "AGC", "none": "no norm", "frn": "FRN", "ws": "WS", "dyt": "DyT", "derf": "Derf"}  # fmt: skip
ADVICE = "make runs with: agcseg-train -m experiment=demo"
REQUIRED = ("network.name", "network.width", "norm.name", "data.name", "data.size", "minibatch", "epochs", "seed")
COLUMNS = """epoch samples rate train_loss val_loss pixel_error pixel_error_all miou gradient_norm images_per_second
seconds peak_memory_mib training_memory_mib kept_for_backward_mib""".split()
LAMBDA = tuple(f"lambda_{what}" for what in "mean min q05 q25 q50 q75 q95 max inside".split())

_UNREADABLE = (
    OSError, ValueError, TypeError, KeyError, EOFError, OverflowError, csv.Error, YAMLError, OmegaConfBaseException,
)  # fmt: skip


@dataclass
class Run:
    """One run: how it was set up, how it ended, and what it measured."""

    name: str
    path: Path
    network: str
    width: float
    norm: str
    minibatch: int
    rate: float  # the effective one: agcseg.config.rate
    seed: int
    epochs: int  # asked for
    data: str
    size: tuple[int, int]  # height, width
    state: str  # "finished", "diverged" or "unfinished"
    reason: str
    commonest_class_error: float
    metrics: pd.DataFrame  # the numbers of metrics.csv by epoch, 1, 2, ...; nan where nothing was measured
    settings: dict[str, Any] = field(default_factory=dict)  # of `agcseg.record.identity.complete`
    words: dict[str, str] = field(default_factory=dict)  # the same as `describe` puts it
    device: str = ""  # empty: not recorded
    start: str = ""  # digest of the weights that init_from named; empty: none, or not recorded
    source: str = ""  # of the file of network.factory
    digests: tuple[str, ...] = ()  # of the images and labels of each split as they were used; empty: not recorded
    environment: dict[str, Any] | None = None  # of environment.json, its keys with dots
    steps: np.ndarray | None = None  # (epochs, steps) training loss of each step, or None: not recorded
    # λ, None: not recorded, or the norm has none; epoch 0 is the untrained network
    layers: pd.DataFrame | None = None  # of layers.csv: epoch x (column, layer, role), layers in the order of execution
    images: pd.DataFrame | None = None  # of the last epoch, by name: "wrong" (share of the labelled pixels), "loss"

    @property
    def title(self) -> str:
        """What the runs of one panel have in common, such as "SegNet, width 0.25, streets 64x128, 10 epochs"."""
        network = f"{NAMES.get(self.network, self.network)}, width {self.width:g}"
        return f"{network}, {NAMES.get(self.data, self.data)} {self.size[0]}x{self.size[1]}, {self.epochs} epochs"

    @property
    def lambda_means(self) -> pd.DataFrame:
        """(epochs, layers): mean λ, of a run with `layers`."""
        assert self.layers is not None
        return self.layers["lambda_mean"]

    @property
    def held(self) -> bool:
        return self.state != "diverged"

    @property
    def last_epoch(self) -> int:
        return len(self.metrics)

    def column(self, key: str) -> pd.Series:
        """One column of metrics.csv by epoch; nan where nothing was measured."""
        return self.metrics.get(key, pd.Series(math.nan, self.metrics.index))

    def at(self, key: str, epoch: int) -> float:
        """A figure of metrics.csv at one epoch; nan if it is not there."""
        return float(self.column(key).get(epoch, math.nan))


def read_runs(*folders: str | Path) -> list[Run]:
    """The readable runs of some folders. See `read_folders`."""
    return read_folders(*folders)[0]


def read_folders(*folders: str | Path) -> tuple[list[Run], list[str], list[str]]:
    """The runs of one folder or several, a line for each broken file, and a line for each half-written run.

    They are ordered by network, normalisation, minibatch, rate and seed. A run whose configuration, metrics or result
    is broken is left out; one whose other files are broken is reported without them. Runs of several folders have their
    folder in their name; where two folders hold the same run, the folder is one of the settings that differ. Of several
    folders, one without runs has a line too.

    Raises:
        UserError: a folder is missing, or none holds a run that can be read.
    """
    runs: list[Run] = []
    broken: list[str] = []
    notes: list[str] = []
    empty, advice = [], ADVICE
    names = [Path(folder).resolve().name for folder in folders]
    for folder, name in zip(folders, names, strict=True):
        found = _read_folder(Path(folder), broken, notes)
        if not found:
            empty.append(f"no run to report in {folder}: looked for {Path(folder) / 'RUN'}/config.yaml and metrics.csv")
        if (Path(folder) / "metrics.csv").is_file():
            advice = "this is a single run: give its parent folder"
        elif not found and (within := sorted({path.parent.parent for path in Path(folder).glob("*/*/metrics.csv")})):
            advice = f"give one of the folders in it that hold runs: {', '.join(map(str, within))}"
        for run in found if len(folders) > 1 else ():
            run.name = f"{name if names.count(name) < 2 else folder}/{run.name}"
        runs += found
    if not runs:
        raise UserError("; ".join([*empty, *broken, *notes, advice]))
    _tell_data_apart(runs)
    _take_processes(runs)
    _shorten_weights(runs)
    _tell_versions_apart(runs)
    _name_defaults(runs)
    places: dict[tuple, set[Path]] = {}
    for run in runs:
        places.setdefault((*run.words.items(), run.seed), set()).add(run.path.parent)
    if any(len(its) > 1 for its in places.values()):
        for run in runs:
            run.words["folder"] = f"folder {run.name.rpartition('/')[0]}"
    runs.sort(
        key=lambda r: (r.title, [*NORM_TITLES, r.norm].index(r.norm), r.norm, r.minibatch, r.rate, r.seed, r.name)
    )
    return runs, broken, empty + notes


def _tell_data_apart(runs: list[Run]) -> None:
    """Where data lie is no setting; but runs that saw other images are not the same, though they call them the same.

    An unfinished run has not recorded what it saw: it is taken to be what others saw at the same place.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        asked = [(key, value) for key, value in run.settings.items() if key.startswith("data.") and key not in FREE]
        if run.digests or run.state == "unfinished":
            alike.setdefault(repr((run.network, asked)), []).append(run)
    for its in alike.values():
        there: dict[str, set[tuple[str, ...]]] = {}
        for run in its:
            there.setdefault(_place(run), set()).update([run.digests] if run.digests else [])
        seen: dict[tuple[str, ...], list[Run]] = {}
        for run in its:
            others = there[_place(run)]
            theirs = min(others) if len(others) == 1 else ("", _place(run))  # not known, but other than elsewhere
            seen.setdefault(run.digests or theirs, []).append(run)
        for digests, same in seen.items() if len(seen) > 1 else ():
            place = same[0].settings.get("data.root") or "the cache"
            for run in same:
                run.words["data"] += f" of {place}" + f" ({digests[0][:6]})" * bool(digests[0])


def _place(run: Run) -> str:
    """Where a run's data lie, however that is written."""
    root = run.settings.get("data.root")
    return os.path.realpath(os.path.expanduser(str(root))) if root else ""


def _take_processes(runs: list[Run]) -> None:
    """How many processes an unfinished run has is not recorded: it is taken to be as many as others like it had."""
    said: dict[tuple, set[str]] = {}
    for run in runs:
        if run.state != "unfinished":
            said.setdefault(_but_processes(run), set()).add(run.words["processes"])
    for run in runs:
        of_others = said.get(_but_processes(run), set())
        if run.state == "unfinished" and len(of_others) == 1:
            run.words["processes"] = min(of_others)


def _but_processes(run: Run) -> tuple:
    return tuple((key, text) for key, text in run.words.items() if key != "processes")


def _shorten_weights(runs: list[Run]) -> None:
    """Weights that runs began with are named by the end of their path: two parts, or as many as tell them apart."""
    texts = {run.words["init_from"] for run in runs} - {"from scratch"}
    parts = {text: Path(text.removeprefix("from ")).parts for text in texts}
    length = 2
    while len({path[-length:] for path in parts.values()}) < len(parts):
        length += 1
    for run in runs:
        if run.words["init_from"] in parts:
            run.words["init_from"] = f"from {'/'.join(parts[run.words['init_from']][-length:])}"


def _tell_versions_apart(runs: list[Run]) -> None:
    """Weights to begin with and the file of a factory may have changed from run to run: their digests tell."""
    seen: dict[tuple[str, str], set[str]] = {}
    for turn in range(2):
        for run in runs:
            for key, digest in (("init_from", run.start), (f"{run.network}:network.factory", run.source)):
                known = seen.setdefault((key, run.words.get(key, "")), set())
                if turn == 0 and digest:
                    known.add(digest)
                elif turn and digest and len(known) > 1:
                    run.words[key] += f" ({digest[:6]})"


def _name_defaults(runs: list[Run]) -> None:
    """A factory's own default is not known: a run that leaves an option to it is no run that gives the option."""
    given: dict[str, set[str]] = {}
    for run in runs:
        its = {key for key in run.words if key.startswith(f"{run.network}:network.options.")}
        given.setdefault(run.network, set()).update(its)
    for run in runs:
        for key in sorted(given[run.network] - run.words.keys()):
            run.words[key] = f"{key.rpartition('.')[2].replace('_', ' ')} by default"


def _read_folder(folder: Path, broken: list[str], notes: list[str]) -> list[Run]:
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; expected a folder of runs, such as outputs/demo; {ADVICE}")
    runs = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        try:
            missing = [name for name in ("config.yaml", "metrics.csv") if not (path / name).is_file()]
            if missing == ["metrics.csv"] and (_read(path / "result.json", _result) or {}).get("state") == "diverged":
                missing = []  # in its first epoch
            if not missing:
                runs.append(_read_run(path, broken))
            elif len(missing) == 1:
                notes.append(f"{path.name} is left out: it has no {missing[0]} (perhaps it has just begun)")
        except UserError as error:
            broken.append(str(error))
        except PermissionError:
            broken.append(f"{path}: cannot be entered")
    return runs


def describe(settings: dict[str, Any], processes: int = 1) -> dict[str, str]:
    """What decides a run's outcome, seed apart, in words; several keys that are one thing, such as noise, are one.

    The key of an option begins with the norm or network that it belongs to, such as "agc:λ". Weights to begin with are
    named by their whole path.
    """
    rest: dict[str, Any] = {"seed": None, "images per process": None} | deciding(settings, processes)
    del rest["seed"], rest["images per process"]
    take = rest.pop
    norm, network = take("norm.name"), take("network.name")
    start, background, window, quantile, gradient = (
        take(f"norm.options.{key}", None)
        for key in ("mean_scale", "background", "window", "quantile", "median_gradient")
    )
    extent = {"window": window, "trimmed": quantile, "median": "with gradient" if gradient else None}.get(background)
    gain, shift, weights, augment = (
        take("noise.gain"),
        take("noise.shift"),
        take("init_from", None),
        take("augment.name"),
    )
    mode, usual = take("gems.mode"), {"limit": 10, "ema": 0, "gate": "relu"}  # without a mode the others say nothing
    limit, ema, gate = (take(f"gems.{key}", value) for key, value in usual.items())
    details = f" at most {limit:g}" * (limit != 10) + f" ema {ema:g}" * (ema != 0) + f" gate {gate}" * (gate != "relu")
    data = take("data.name")
    words: dict[str, str] = {"network": NAMES.get(network, network), "norm": NAMES.get(norm, norm)}
    if start is not None:
        words[f"{norm}:λ"] = ("λ {:g}" if norm == "center" else "λ from {:g}").format(start)
    if background is not None:
        words[f"{norm}:background"] = f"background {background}" + f" {extent}" * (extent not in (None, 0.5))
    words |= {
        "width": f"width {take('network.width')}",
        "data": NAMES.get(data, data),
        "size": "x".join(map(str, take("data.size"))),
        "init": f"init {take('network.init')}",
        "minibatch": f"minibatch {take('minibatch')}",
        "momentum": f"momentum {take('momentum'):.6g}",
        "rate": f"rate {take('rate'):.4g}",
        "noise": f"noise gain {gain:g} shift {shift:g}" if gain or shift else "no noise",
        "gems": f"GEMS {mode}{details}" if mode else "no GEMS",
        "init_from": f"from {weights}" if weights else "from scratch",
        "augment": "no augmentation" if augment == "none" else f"augmentation {augment}",
        "processes": f"{processes} processes",
    }
    owners = {"norm.options": f"{norm}:", "network.options": f"{network}:", "network": f"{network}:"}
    for key, value in rest.items():
        group, _, word = key.replace("_", " ").rpartition(".")
        flag = value is None or isinstance(value, bool)
        none = "all " if key in ("data.train_images", "data.val_images") else "no "
        words[owners.get(group, "") + key] = none * (not value) + word if flag else f"{word} {value}"
    return words


def _read_run(path: Path, broken: list[str]) -> Run:
    result = _read(path / "result.json", _result) or {"state": "unfinished"}
    metrics = _read(path / "metrics.csv", _metrics)
    if metrics is None:
        metrics = pd.DataFrame(index=pd.Index([], dtype=int, name="epoch"))
    run = _read(path / "config.yaml", lambda file: _run(path, result, metrics, OmegaConf.load(file)))
    readers = {"steps.npy": _steps, "layers.csv": _layers, "images.csv": _images, "environment.json": _environment}
    for name, reader in readers.items():
        try:
            setattr(run, Path(name).stem, _read(path / name, reader))
        except UserError as error:
            broken.append(str(error))
    return run


def _read(file: Path, reader: Callable[[Path], Any]) -> Any:
    """What `reader` makes of a file, None where there is none; any trouble is a UserError that names the file."""
    try:
        return reader(file) if file.is_file() else None
    except _UNREADABLE as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error


def _run(path: Path, result: dict, metrics: pd.DataFrame, config) -> Run:
    missing = [key for key in REQUIRED if OmegaConf.select(config, key) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)}: missing")
    given: Any = OmegaConf.to_container(config, resolve=True)
    processes = int(result.get("processes") or 1)
    minibatch, epochs, settings = int(config.minibatch), int(config.epochs), complete(given)
    height, width = settings["data.size"]
    return Run(
        name=path.name, path=path, network=str(settings["network.name"]), norm=str(settings["norm.name"]),
        width=float(settings["network.width"]), minibatch=minibatch, epochs=epochs,
        rate=float(deciding(given, processes)["rate"]), seed=int(settings["seed"]),
        data=str(settings["data.name"]), size=(int(height), int(width)), state=result["state"],
        reason=str(result.get("reason") or ""), metrics=metrics, settings=settings, words=describe(given, processes),
        commonest_class_error=float(result.get("commonest_class_error", math.nan)),
        device=str(result.get("device") or ""),
        start=str(result.get("start") or ""), source=str(result.get("source") or ""),
        digests=tuple(str(digest) for split, digest in (result.get("data") or {}).items() if split != "classes"),
    )  # fmt: skip


def _result(file: Path) -> dict:
    result = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(result, dict) or result.get("state") not in ("finished", "diverged"):
        raise ValueError('"state" is neither "finished" nor "diverged"')
    if not isinstance(result.get("data") or {}, dict):
        raise ValueError('"data" is no mapping')
    float(result.get("commonest_class_error", math.nan))  # here, where the error names this file
    return result


def _environment(file: Path) -> dict[str, Any]:
    return flat(dict(json.loads(file.read_text(encoding="utf-8"))))


def _table(file: Path, numbers: Collection[str], *needed: str) -> pd.DataFrame:
    """The columns that are known or needed; those of `numbers` as numbers, nan for an empty cell.

    Raises:
        ValueError: a column is missing, a cell is no number, or a line is cut off.
    """
    with open(file, encoding="utf-8", errors="surrogateescape", newline="") as lines:  # names of images may be no text
        header, *rows = [*csv.reader(lines)] or [[]]
    missing = [key for key in needed if key not in header]
    if missing:
        raise ValueError(f"expected the columns {', '.join(missing)}")
    for line, row in enumerate(rows, start=2):  # pandas would fill a line that is cut off
        try:
            cells = dict(zip(header, row, strict=True))
            row[:] = [float(cells[key].strip() or "nan") if key in numbers else cells[key] for key in header]
        except ValueError as error:
            raise ValueError(f"line {line}: {error}; expected {len(header)} cells") from None
    table = pd.DataFrame(rows, columns=header).astype({key: float for key in header if key in numbers})
    return table[[key for key in header if key in (*numbers, *needed)]]


def _metrics(file: Path) -> pd.DataFrame:
    table = _table(file, COLUMNS, "epoch", "pixel_error", "val_loss")
    wrong = table.epoch != np.arange(1, len(table) + 1)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"line {row + 2}: epoch {table.epoch[row]:g}, expected {row + 1}")
    return table.astype({"epoch": int}).set_index("epoch")


def _steps(file: Path) -> np.ndarray:
    try:
        losses = np.load(file, allow_pickle=False)
    except ValueError:  # which says how to load it all the same, unsafely
        raise ValueError("is not what numpy.save writes of numbers") from None
    if not isinstance(losses, np.ndarray):
        raise ValueError("holds several arrays, expected one of numpy.save")
    if losses.ndim != 3 or not np.issubdtype(losses.dtype, np.floating):
        raise ValueError(f"expected numbers of shape (epochs, steps, parts), found {losses.dtype} of {losses.shape}")
    return losses.sum(2)


def _layers(file: Path) -> pd.DataFrame | None:
    table = _table(file, ("epoch", "num_features", *LAMBDA), "epoch", "layer", "role", "num_features", *LAMBDA)
    table = table[table.lambda_mean.notna()].astype({"epoch": int})
    if not len(table):
        return None  # a norm without λ
    order = pd.MultiIndex.from_frame(table.loc[table.epoch == table.epoch.max(), ["layer", "role"]])
    epochs = table.epoch.max() + 1  # with 0, the untrained network
    if len(table) != epochs * len(order):
        raise ValueError(f"expected {len(order)} layers in each of {epochs} epochs, found {len(table)} rows")
    layers = table.pivot(index="epoch", columns=["layer", "role"])
    return pd.concat({key: layers[key][order] for key in ("num_features", *LAMBDA)}, axis=1)


def _images(file: Path) -> pd.DataFrame:
    numbers = ("wrong_pixels", "labelled_pixels", "loss")
    table = _table(file, numbers, "image", *numbers).set_index("image")
    return pd.DataFrame(
        {"wrong": table.wrong_pixels / table.labelled_pixels.where(table.labelled_pixels > 0), "loss": table.loss}
    )
