"""The one way in which pictures are found and opened: for training, evaluation and prediction."""

import functools
import io
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from agcseg.errors import FileError, UserError

STUBS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"}  # formats that Pillow knows, but cannot decode by itself
LOSSY = {"JPEG", "MPO", "JPEG2000", "AVIF"}  # or may be


@functools.cache
def suffixes() -> frozenset[str]:
    """Of all pictures that Pillow can decode here, in lower case, such as ".png"."""
    Image.init()
    return frozenset(
        suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in STUBS
    )


def list_files(folder: Path) -> list[Path]:
    """Every file below a folder, sorted. Links are followed; names that begin with a dot are left out.

    Raises:
        UserError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None

    found = []
    ways = {os.fspath(folder): [os.path.realpath(folder)]}  # to each folder: the true places of those above it, and its
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        inside = {name: os.path.realpath(os.path.join(parent, name)) for name in folders if not name.startswith(".")}
        # A link to a folder that it lies in, or was come through, would lead round for ever.
        folders[:] = [
            name for name, place in inside.items() if not any(f"{at}/".startswith(f"{place}/") for at in ways[parent])
        ]
        ways |= {os.path.join(parent, name): [*ways[parent], inside[name]] for name in folders}
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(found)


def is_picture(path: Path) -> bool:
    """By its suffix; links to nothing count, so that they can be named, but no pipes and devices."""
    return path.suffix.lower() in suffixes() and (path.is_file() or not path.exists())


def left_out(paths: list[Path]) -> str:
    """A line about files that are not used."""
    names = ", ".join(path.name for path in paths[:3]) + ", ..." * (len(paths) > 3)
    return f"{len(paths)} other file{'s' * (len(paths) > 1)} left out: {names}"


def each(read: Callable, items: Iterable) -> Iterator:
    """`map` in a thread per processor, for what decodes. Pillow's warnings, which name no file, stay silent."""
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield from pool.map(read, items)


def open_picture(path: Path, lossless: bool = False) -> Image.Image:
    """A whole picture, turned upright as its EXIF says, its checksums verified.

    Args:
        lossless: for numbers; refuse what is stored with losses, or may be, what decoding scales or inverts, and more
            than one page.

    Raises:
        UserError: it is missing, damaged, not a picture, or larger than Pillow's limit; it names the file.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileError(path, "missing, a link to nothing" if os.path.islink(path) else "missing") from None
    except OSError as error:
        raise FileError(path, f"cannot be read ({error.strerror})") from None
    try:
        with Image.open(io.BytesIO(content)) as picture:
            kind = picture.format
            if kind == "PNG":
                with Image.open(io.BytesIO(content)) as twin:
                    twin.verify()
            tiles, pages = [(str(tile[0]), tile[3]) for tile in picture.tile], getattr(picture, "n_frames", 1)
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
    except Image.DecompressionBombError as error:
        advice = "make it smaller; from Python, PIL.Image.MAX_IMAGE_PIXELS is the limit"
        raise FileError(path, "has too many pixels", str(error).split(", could")[0], advice) from None
    except Exception as error:  # the decoders' ways to say so are many
        fault = " ".join(str(error).split()) or type(error).__name__
        fault = "no known format" if isinstance(error, Image.UnidentifiedImageError) else fault
        raise FileError(path, "cannot be decoded, truncated or not an image", fault) from None
    inside = {"TIFF": picture.info.get("compression") in ("jpeg", "tiff_jpeg", "webp"), "WEBP": b"VP8L" not in content}
    if lossless and (kind in LOSSY or inside.get(kind or "")):
        fault = f"is a {kind}{' with losses' * (kind in inside)}, which changes the numbers in it"
        raise FileError(path, fault, advice="store labels and instances as PNG")
    bilevel = kind == "BMP" and picture.mode == "1" and content[28] != 1  # Pillow reads one bit of each byte
    if lossless and (bilevel or any(_scaled(*tile, picture.mode) for tile in tiles)):
        fault = "decoding would scale or invert its numbers"
        raise FileError(path, fault, advice="store labels and instances as PNG of 8 or 16 bits")
    if lossless and pages > 1:
        raise FileError(path, f"has {pages} pages", advice="store labels and instances one by one")
    if picture.mode[0] != "I" and any(re.search(";16[BLN]", _raw(how)) for _, how in tiles):
        advice = "convert it to 8 bits: which values are black and white cannot be known"
        raise FileError(path, f"mode {picture.mode} of 16 bits, expected 8 bits a channel", advice=advice)
    return picture


def _raw(how) -> str:
    """The stored form of a tile's numbers, such as "L;4", from what Pillow's decoder is told."""
    return str(how[0] if isinstance(how, tuple) and how else how)


def _scaled(decoder: str, how, mode: str) -> bool:
    """Whether what is decoded are other numbers than those in the file: greys of 2 or 4 bits are stretched to 8, as are
    those of a PGM up to its own maximum; where 0 is white, as in a PBM, they are inverted."""
    if decoder in ("ppm", "ppm_plain") and isinstance(how, tuple):
        return how[-1] != (65535 if mode == "I" else 255)
    return _raw(how).startswith(("L;2", "L;4", "L;I", "1;I"))


def read_image(path: Path) -> Image.Image:
    """A picture as RGB, of 8 bits a channel, whatever its mode.

    Raises:
        UserError: see `open_picture`; or it has more than 8 bits a channel.
    """
    picture = open_picture(path)
    if picture.mode[0] in "IF":
        advice = "convert it to 8 bits: which values are black and white cannot be known"
        raise FileError(path, f"mode {picture.mode}, expected 8 bits a channel", advice=advice)
    try:
        return picture.convert("RGB")
    except Exception as error:
        raise FileError(path, f"mode {picture.mode} cannot become RGB", str(error)) from None


def read_numbers(path: Path) -> np.ndarray:
    """Numbers per pixel, as stored: (H, W), of one channel of up to 32 bits; or colours, (H, W, 3) uint8.

    Raises:
        UserError: see `open_picture`; it is stored with losses; or it has another mode, such as floating point.
    """
    return numbers_of(path, open_picture(path, lossless=True))


def numbers_of(path: Path, picture: Image.Image, colors: bool = False) -> np.ndarray:
    """See `read_numbers`; with `colors`, of a picture with a palette its colours, not the indices."""
    if picture.mode in ("RGB", "RGBA") or (picture.mode == "P" and colors):
        return np.asarray(picture.convert("RGB"))
    if picture.mode not in ("1", "L", "P", "I") and not picture.mode.startswith("I;16"):
        raise FileError(path, f"mode {picture.mode}, expected one channel of whole numbers, or colours")
    numbers = np.asarray(picture)
    return numbers.astype(np.uint8 if picture.mode == "1" else numbers.dtype.newbyteorder("="), copy=False)
