"""The program agcseg-eval."""

import contextlib
import csv
import json
import os
import re
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import agcseg
from agcseg.cli import parse_run, program, show
from agcseg.config import DataConfig
from agcseg.data import NAMES, find_data, find_samples
from agcseg.data.layout import Layout, Sample
from agcseg.data.minibatches import choose
from agcseg.errors import UserError, expanded
from agcseg.evaluate import confusion_figure, evaluate
from agcseg.record.checkpoint import load_checkpoint
from agcseg.record.files import write, write_json
from agcseg.record.pictures import png
from agcseg.trained import Trained
from agcseg.training.lines import progress
from agcseg.training.machine import find_device, out_of_memory

FOLDER = ("images", "labels", "instances", "classes")  # of data=folder
KEYS = {
    "checkpoint": "last",
    "data": str,
    "data.root": str,
    "data.cache_dir": str,
    **{f"data.folder.{key}": str for key in FOLDER},
    "split": "val",
    "images": int,
    "resolution": "training",
    "minibatch": 4,
    "device": "auto",
    "output": str,
}

EPILOG = """\
examples:
  agcseg-eval outputs/demo/segnet-agc-mb4-lr0.08-seed1
  agcseg-eval RUN resolution=full
  agcseg-eval RUN data=cityscapes data.root=/data/cityscapes split=val
  agcseg-eval outputs/cityscapes/RUN/last.pt split=train images=500

keys:
  data=NAME            cityscapes, camvid, streets or folder; what the run was trained on, if not given. Its classes
                       must be the run's
  data.root=FOLDER     where it lies, if elsewhere than for the run
  data.cache_dir=FOLDER           where the built-in streets are made, if elsewhere than for the run
  data.folder.images=PATTERN      of data=folder, if otherwise than for the run: see docs/your-data.md
  data.folder.labels=PATTERN
  data.folder.instances=PATTERN
  data.folder.classes=FILE        numbers or colours of the labels; if not given, those of the file of this name in
                       data.root, if elsewhere than for the run, else those that the run knows
  checkpoint=last      which of the run's weights: last, or best, those of the lowest validation pixel error
  split=val            or train, or whatever the data set has labels for (CamVid: test)
  images=N             a fixed, seeded choice of N images; if not given, those of the run on its own data, all of other
                       data
  resolution=training  training: labels resized to the training size, as in training, so the figures are the run's.
                       full: the network sees the same, its logits are resized to the labels' own size, as benchmarks do
  minibatch=4          images at once
  device=auto          CUDA if there is any, else the CPU; or cpu, cuda, cuda:1 ...
  output=FOLDER        where the files go; the run's folder, if not given

written:
  eval-DATA-SPLIT-RESOLUTION.json   every figure below, its interval, and the confusion matrix in pixels
  eval-DATA-SPLIT-RESOLUTION.png    the confusion matrix
DATA is the data set's name; of another folder than the run's, with that folder's name, and of other patterns with
these too. With images=N the names end in -Nimages, with checkpoint=best in -best. In a folder given by output= they
begin with the run's name.

Intervals are 95 %, by the bootstrap over images: how far a figure depends on the choice of images, not how it varies
from one training to the next.

exit code: 0 all is well, 2 the command, the run or the data cannot be used
"""


@program("agcseg-eval")
def main(argv: list[str] | None = None) -> int:
    """Runs agcseg-eval; returns the exit code."""
    try:
        run, keys = parse_run("agcseg-eval", KEYS, "Pixel error and IoU of a trained network.", EPILOG, argv)
        if keys["resolution"] not in ("training", "full"):
            raise UserError(f"resolution={keys['resolution']}: choose from training, full")
        if keys["data"] not in (None, *NAMES):
            raise UserError(f"data={keys['data']}: choose from {', '.join(NAMES)}")
        if Path(keys["split"]).name != keys["split"] or keys["split"] == ".." or {*keys["split"]} & {*"*{}"}:
            raise UserError(f"split={keys['split']}: must be the name of a folder, such as train, val or test")
        device = find_device(keys["device"])
        trained = agcseg.load(run, keys["checkpoint"])
        trained.network.to(device)
        data, layout, root, known_as = _data(trained, keys)
        samples = _samples(trained, data, layout, root, keys)
        base = expanded(keys["output"] or trained.path.parent)
        base.mkdir(parents=True, exist_ok=True)  # first: nobody should wait for figures that cannot be written
        if not os.access(base, os.W_OK):
            raise UserError(f"{base}: cannot be written; give another folder with output=")
        full = keys["resolution"] == "full"
        bar = partial(progress, total=None, what="evaluating", unit="minibatch")
        figures = evaluate(trained, layout, samples, full, keys["minibatch"], bar)
        notes = [_behind(trained), _others(trained, [sample.name for sample in samples], figures["digest"], keys)]
        what = {"run": str(trained.path), "epoch": trained.epoch, "data": layout.name, "root": str(root)}
        what |= {"split": keys["split"], "resolution": keys["resolution"]}
        what |= {"folder": asdict(data.folder)} if data.name == "folder" else {}
        size = {"training_size": list(trained.config.data.size)}
        some = f"-{keys['images']}images" if keys["images"] else ""
        best = "-best" if trained.path.name == "best.pt" else ""
        its = f"{trained.path.resolve().parent.name}-" if keys["output"] else ""  # there may be those of other runs
        base /= f"{its}eval-{known_as}-{keys['split']}-{keys['resolution']}{some}{best}"
        title = (
            f"{trained.config.network.name}, {trained.config.norm.name}: {layout.title}, {keys['split']}, "
            f"{len(samples)} images, in % of the true class"
        )
        write(Path(f"{base}.png"), png(confusion_figure(figures["confusion"], layout.classes.names, title), dpi=110))
        write_json(Path(f"{base}.json"), {**what, **size, **figures})
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError("out of memory; try a smaller minibatch=") from None
    show(f"{title.removesuffix(', in % of the true class')}, {keys['resolution']} resolution, epoch {trained.epoch}")
    for note in filter(None, notes):
        show(note)
    show(_table(figures))
    show(f"wrote {base}.json\nwrote {base}.png")
    return 0


def _data(trained: Trained, keys: dict) -> tuple[DataConfig, Layout, Path, str]:
    """Configuration of the data, layout, folder, and what files call it."""
    own = data = trained.config.data
    if keys["data"] not in (None, own.name):
        data = replace(DataConfig(keys["data"], train_images=None, val_images=None), cache_dir=own.cache_dir)
    its = _found(own.root, trained.path) if data is own and own.root else None
    where = {key: keys[f"data.folder.{key}"] or getattr(data.folder, key) for key in FOLDER}
    given = expanded(keys["data.root"]).resolve() if keys["data.root"] else its
    data = replace(
        data,
        root=None if given is None else str(given),
        folder=replace(data.folder, **where),
        cache_dir=keys["data.cache_dir"] or str(_found(data.cache_dir, trained.path)),
    )
    named = keys["data.folder.classes"] or (given and given != its and (given / data.folder.classes).is_file())
    known = trained.classes if own.name == data.name == "folder" and not named else None
    layout, root = find_data(data, lambda line: None, known)
    root = root.resolve()
    others = [where[key] for key in ("images", "labels") if where[key] != getattr(own.folder, key)]
    if others and own.name == data.name == "folder" and root == its:  # files of which the run chose no part
        data = replace(data, train_images=None, val_images=None, val_share=None)
        patterns = [re.sub(r"[^\w.-]+", "_", one).strip("_") for one in others]
        return data, layout, root, "-".join([data.name, root.name, *patterns])
    elsewhere = keys["data"] in (None, own.name) and (its is None or its.exists())  # else it may have moved
    if not keys["data.root"] or its == root or (root.name.lower() == data.name and not elsewhere):
        return data, layout, root, data.name
    if elsewhere:  # other data, of which the run chose no part
        data = replace(data, train_images=None, val_images=None, val_share=None)
    return data, layout, root, f"{data.name}-{root.name}"


def _found(path: str, run: Path) -> Path:
    """A path of a run's configuration: relative ones are so to where it started, the folder above outputs/NAME/RUN."""
    path, above = expanded(path), list(run.resolve().parents)
    bases = above[3:] + above[:3]  # outputs last: the runs in outputs/camvid are not the data in camvid
    return next((base / path for base in bases if (base / path).exists()), path).resolve()


def _samples(trained: Trained, data: DataConfig, layout: Layout, root: Path, keys: dict) -> list[Sample]:
    """The images to be evaluated: of the run's own data set those that the run used."""
    split, contours = keys["split"], trained.network.contour and keys["resolution"] == "training"
    samples = find_samples(data, layout, root, split, contours, lambda line: print(line, file=sys.stderr))
    wanted = keys["images"] or {"train": data.train_images, "val": data.val_images}.get(split)
    if keys["images"] and keys["images"] > len(samples):
        raise UserError(f"images={keys['images']}: there are {len(samples)} {split} images")
    return [samples[i] for i in choose(len(samples), wanted, data.choice_seed)]


def _behind(trained: Trained) -> str:
    """What to say where a run went on after its last checkpoint: diverged, its figures are those of a later epoch."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # unfinished, or edited
        result = json.loads(trained.path.with_name("result.json").read_text())
        if trained.path.name == "last.pt" and result["state"] == "diverged" and trained.epoch < result["epochs"]:
            last = f"its last checkpoint, evaluated here, is of epoch {trained.epoch}"
            return f"note: the run diverged after epoch {result['epochs']}; {last}"
    return ""


def _others(trained: Trained, names: list[str], digest: str, keys: dict) -> str:
    """What to say where the images are not those of the run, though nobody asked for others."""
    table = trained.path.with_name("images.csv")
    if any(keys[key] for key in ("data", "data.root", "images", "data.folder.images", "data.folder.labels")):
        return ""
    if table.is_file() and keys["split"] == "val":
        with open(table, newline="", encoding="utf-8", errors="surrogateescape") as file:
            its = [row["image"] for row in csv.DictReader(file)]
        gone, new = len({*its} - {*names}), len({*names} - {*its})
        if gone or new:
            return (
                f"note: these are not the images of the run's figures: {gone} of its {len(its)} are not among them, "
                f"{new} of them are new"
            )
    seen = (load_checkpoint(trained.path).get("data") or {}).get(keys["split"])
    return "note: the images or their labels have changed since the run" if seen and seen != digest else ""


def _table(figures: dict) -> str:
    def percent(value) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    def row(name: str, value, interval, recall="", share="") -> str:
        within = f"{percent(interval[0])} to {percent(interval[1])}" if interval else "-"
        return f"{name:<16}{percent(value):>8}{within:>18}{recall:>10}{share:>10}".rstrip()

    rows = [
        f"{'in %':<16}{'':>8}{'95 % interval':>18}",
        row("pixel error", figures["pixel_error"], figures["pixel_error_interval"]),
        row("  of all pixels", figures["pixel_error_all"], None),
        row("mIoU", figures["miou"], figures["miou_interval"]),
        *(row(key, figures[key], None) for key in ("contour_iou", "contour_f") if key in figures),
        f"\n{'class':<16}{'IoU':>8}{'95 % interval':>18}{'recall':>10}{'share':>10}",
    ]
    for one in figures["classes"]:
        rows.append(row(one["class"], one["iou"], one["iou_interval"], percent(one["recall"]), percent(one["share"])))
    return "\n".join(rows)


if __name__ == "__main__":
    raise SystemExit(main())
