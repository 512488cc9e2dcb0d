"""Predictions of a trained network on pictures of any size, as files."""

import glob
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agcseg.data.cache import resize_image
from agcseg.data.labels import CITYSCAPES, IGNORE
from agcseg.data.pictures import each, is_picture, left_out, list_files, open_picture, read_image
from agcseg.errors import UserError, expanded
from agcseg.record.files import write
from agcseg.record.pictures import png
from agcseg.trained import Trained, logits, prediction, resized

# What the Cityscapes benchmark takes: label ids, not class numbers.
BENCHMARK_NAME = re.compile(r"[A-Za-z-]+_\d{6}_\d{6}(?=_leftImg8bit\.png$)")
BENCHMARK_SIZE = (1024, 2048)  # height, width
_numbered = {number: label_id for label_id, number in CITYSCAPES.from_file.items() if number != IGNORE}
LABEL_IDS = np.array([_numbered[number] for number in range(len(CITYSCAPES))], dtype=np.uint8)


def find_images(wanted: str, output: Path, say: Callable[[str], None] = print) -> dict[str, Path]:
    """The pictures that a file, a folder (searched through and through) or a pattern such as "film/*.png" names.

    Args:
        say: told of the files of a folder that are no pictures.

    Returns:
        paths by the names that their predictions get: relative to the folder, or to the part of the pattern without
        wildcards, and without suffix. What lies in `output` is left out.

    Raises:
        UserError: there is none, or two would get one name.
    """
    base, output = expanded(wanted), os.path.realpath(expanded(output))

    def elsewhere(path: Path) -> bool:
        return not os.path.realpath(path).startswith(os.path.join(output, ""))

    if base.is_file():
        return {base.stem: base}
    if base.is_dir():
        files = list_files(base)
        paths = [path for path in files if is_picture(path)]
        others = [path for path in files if not is_picture(path) and elsewhere(path)]
        kinds = f", only {len(others)} other files" if others else ""
        if others and paths:
            say(f"{base}: {left_out(others)}")
    elif not glob.has_magic(str(base)):
        raise UserError(f"input={wanted}: no such file or folder")
    else:
        matches = [Path(path) for path in sorted(glob.glob(str(base), recursive=True)) if Path(path).is_file()]
        # ** goes round and round where a link points to a folder above: of several ways to a file the shortest
        nearest = sorted(matches, key=lambda path: -len(path.parts))
        paths, kinds = sorted({path.parent.resolve() / path.name: path for path in nearest}.values()), ""
        while glob.has_magic(str(base)):
            base = base.parent
    found, paths = paths, [path for path in paths if elsewhere(path)]
    if found and not paths:
        raise UserError(
            f"input={wanted}: all pictures there lie in the output folder {output}, whose pictures are taken for "
            "predictions; give another output="
        )
    if not paths:
        raise UserError(f"input={wanted}: no pictures there{kinds}")
    images: dict[str, Path] = {}
    for path in paths:
        other = images.setdefault(path.relative_to(base).with_suffix("").as_posix(), path)
        if other != path:
            raise UserError(f"{path} and {other}: their predictions would get the same name; give one of them")
    return images


def predict(
    trained: Trained, paths: Iterable[Path], minibatch: int, skip: Callable[[UserError], None]
) -> Iterator[tuple[Path, Image.Image, Tensor, Tensor | None]]:
    """Run the network over pictures, resized to the training size (whatever their proportions).

    Args:
        trained: its network on the device that computes.
        minibatch: pictures at once.
        skip: told of each picture that cannot be used; the others go on.

    Yields:
        path, picture (RGB, upright), and at the training size logits of the classes, (K, h, w), and of the contour,
        (h, w), or None without one.
    """
    (height, width), paths = trained.config.data.size, list(paths)
    device = next(trained.network.parameters()).device

    def read(path: Path):
        try:
            picture = read_image(path)
        except UserError as error:
            return error
        return path, picture, resize_image(picture, (height, width))

    for start in range(0, len(paths), minibatch):
        good = []
        for part in each(read, paths[start : start + minibatch]):
            if isinstance(part, UserError):
                skip(part)
            else:
                good.append(part)
        if good:
            small = np.stack([part[2] for part in good])
            classes, contours = logits(trained, torch.from_numpy(small).to(device))
            for i, (path, picture, _) in enumerate(good):
                yield path, picture, classes[i], None if contours is None else contours[i, 0]


def write_prediction(
    trained: Trained, base: Path, picture: Image.Image, classes: Tensor, contour: Tensor | None, probabilities: bool
) -> None:
    """Write what `predict` gave of one picture, at its size, beside `base`, a path without suffix.

    BASE_classes.png (class numbers, painted by its palette), BASE_overlay.png, BASE_contour.png with a contour (white
    where sure), and on demand BASE_probabilities.npz: `probabilities`, (K, h, w) float16 at the training size, and
    `classes`, their names.
    """
    size = picture.size[::-1]
    numbers = prediction(classes, size).cpu().numpy()
    base.parent.mkdir(parents=True, exist_ok=True)
    painted = Image.fromarray(numbers)
    painted.putpalette(trained.classes.palette().tobytes())
    _write_image(base, "classes", painted)
    _write_image(base, "overlay", Image.blend(picture, painted.convert("RGB"), 0.5))
    if contour is not None:
        sure = 255 * resized(contour, size).sigmoid()
        _write_image(base, "contour", Image.fromarray(sure.round().byte().cpu().numpy()))
    if probabilities:
        buffer = io.BytesIO()
        shares = classes.softmax(0).half().cpu().numpy()
        np.savez_compressed(buffer, probabilities=shares, classes=np.array(trained.classes.names))
        write(base.with_name(f"{base.name}_probabilities.npz"), buffer.getvalue())


def _write_image(base: Path, what: str, image: Image.Image) -> None:
    write(base.with_name(f"{base.name}_{what}.png"), png(image))


def write_submission(folder: Path, path: Path, picture: Image.Image, classes: Tensor) -> Path:
    """Write the file that the Cityscapes benchmark wants of one test image: CITY_SEQUENCE_FRAME_labelIds.png.

    Raises:
        UserError: the picture is none of the benchmark's, by its name or size.
    """
    stem = BENCHMARK_NAME.match(path.name)
    if not stem:
        raise UserError(f"{path}: the benchmark's images are called CITY_000000_000019_leftImg8bit.png")
    size = picture.size[::-1]
    if size != BENCHMARK_SIZE:
        raise UserError(f"{path}: {size[0]}x{size[1]}, the benchmark's images are 1024x2048")
    folder.mkdir(parents=True, exist_ok=True)
    numbers = prediction(classes, size).cpu().numpy()
    _write_image(folder / stem[0], "labelIds", Image.fromarray(LABEL_IDS[numbers]))
    return folder / f"{stem[0]}_labelIds.png"


def check_submission(folder: Path, written: list[Path]) -> list[str]:
    """Read back what `write_submission` wrote into `folder`; one line for each file that would be refused."""
    problems = [f"{path}: two pictures have this name" for path, times in Counter(written).items() if times > 1]
    problems += [f"{path}: is not of this submission" for path in sorted({*folder.rglob("*.png")} - {*written})]
    for path in written:
        image = open_picture(path)
        if image.mode != "L" or image.size[::-1] != BENCHMARK_SIZE or not np.isin(np.asarray(image), LABEL_IDS).all():
            problems.append(f"{path}: is not an 8-bit map of the 19 label ids at 1024x2048")
    return problems
