"""Every image decoded and resized once, into a memory map that all runs share."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import filelock
import numpy as np
from PIL import Image

from agcseg.data.labels import IGNORE
from agcseg.data.layout import Layout, Sample, labels_of, load
from agcseg.data.masks import mixed
from agcseg.data.pictures import each
from agcseg.errors import FileError, UserError, by_cause, first_line

VERSION = 4  # of what is written; a new number leaves old caches unused
PATIENCE = 300.0  # seconds without a sign of life from the process that holds a lock
PARTS = ("images", "labels", "contours")


class Cached(NamedTuple):
    """One split at training size.

    Attributes:
        folder: where it lies.
        images: (n, 3, H, W) uint8, RGB.
        labels: (n, H, W) uint8, class numbers or 255.
        contours: (n, H, W) uint8, 1 on the borders between instances (see `contours`).
        names: n names.
        digests: n pairs of hexadecimal digests: of an image with its labels, and of its contours.
    """

    folder: Path
    images: np.memmap
    labels: np.memmap
    contours: np.memmap
    names: list[str]
    digests: list[list[str]]

    def digest(self, indices: Iterable[int] | None = None, contours: bool = False) -> str:
        """A digest of the data as a run uses them: names, pixels and labels of these images (None: of all), in order.

        Args:
            contours: those belong to it too.
        """
        chosen = range(len(self.names)) if indices is None else indices
        return digest((self.names[i], *self.digests[i][: 1 + contours]) for i in chosen)


def digest(images: Iterable[tuple[str, ...]]) -> str:
    """One digest of many images, each given by its name and its digests; 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps([*images]).encode(), digest_size=16).hexdigest()


def digests(image: np.ndarray, labels: np.ndarray, contours: np.ndarray) -> list[str]:
    """The digests of one image at training size: of image and labels, and of its contours."""
    parts = (image.tobytes() + labels.tobytes(), contours.astype(np.uint8).tobytes())
    return [hashlib.blake2b(part, digest_size=16).hexdigest() for part in parts]


def open_cache(
    layout: Layout,
    samples: list[Sample],
    size: tuple[int, int],
    cache_dir: Path,
    split: str,
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
    say: Callable[[str], None] = print,
    rebuild: bool = False,
    others: Iterable[Sample] = (),
) -> Cached:
    """Open the memory map of these samples, and build it first if it is not there, or damaged.

    Images are resized by Pillow's bilinear filter (antialiased: its support grows with the reduction), labels and
    instances by the nearest neighbour. The folder's name holds a hash of the file list with sizes and times, of the
    training size and of the class table, so changed data are never taken for old ones. A build runs under a lock,
    writes beside the place and is renamed at the end: two processes share one build, and a killed one leaves nothing
    that is taken for whole. A complete cache is only read, and may lie on a disk that cannot be written.

    Args:
        size: (height, width) of training.
        progress: wraps the iteration over the samples; gets their number too.
        rebuild: build it anew even if it is there: for labels changed behind the file system's back.
        others: samples of other splits, whose labels must be stored in the same way.

    Raises:
        UserError: files that cannot be used; too little space on the disk; or another process builds it and does not
            get on.
    """
    key = _key(layout, samples, size)
    folder = cache_dir / f"{layout.name}-{split}-{size[0]}x{size[1]}-{key[:16]}"
    found = None if rebuild else _opened(folder, samples, size)
    if isinstance(found, Cached):
        return found
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with locked(folder, say) as waited:
            found = None if rebuild and not waited else _opened(folder, samples, size)
            if isinstance(found, Cached):  # of the process that was waited for
                return found
            if found:
                say(f"{folder}: is damaged ({found}) and is built anew")
            shutil.rmtree(folder, ignore_errors=True)
            say(f"caching {len(samples)} {split} images at {size[0]}x{size[1]} in {folder}")
            _build(layout, samples, size, folder, progress, others)
    except OSError as error:
        raise not_writable(error, cache_dir) from None
    found = _opened(folder, samples, size)
    if not isinstance(found, Cached):
        raise UserError(f"{folder}: cannot be read back ({found}); give another folder with data.cache_dir=")
    _say_older(folder, say)
    return found


def _opened(folder: Path, samples: list[Sample], size: tuple[int, int]) -> "Cached | str | None":
    """The cache; what is wrong with it; or None where there is none."""
    if not folder.is_dir():
        return None
    try:
        index = json.loads((folder / "index.json").read_text())
        # copy-on-write, so that torch sees a writable array and nobody can change the file
        maps = [np.load(folder / f"{part}.npy", mmap_mode="c") for part in PARTS]
        images, labels, contours = maps
        cached = Cached(folder, images, labels, contours, [*index["names"]], [[*pair] for pair in index["digests"]])
    except PermissionError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror})") from None
    except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile) as error:  # NumPy and JSON have many
        return first_line(error)
    n = len(samples)
    kinds = [("u1", (n, 3, *size)), ("u1", (n, *size)), ("u1", (n, *size))]
    if [(part.dtype, part.shape) for part in maps] != kinds or len(cached.digests) != n:
        return "its files are of another size"
    return cached if cached.names == [sample.name for sample in samples] else "it has other names"


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Hold the lock of a folder while it is made. While another process holds it, wait, as long as that one gets on.

    A process shows that it gets on by touching FOLDER.tmp.

    Yields:
        whether another process was waited for.

    Raises:
        UserError: no sign of life for `PATIENCE`; it names the file of the lock.
    """
    path, began, waited = Path(f"{folder}.lock"), time.time(), False
    lock = filelock.FileLock(path)
    while True:
        try:
            lock.acquire(timeout=1.0 if waited else 0)
            break
        except filelock.Timeout:
            if not waited:
                say(f"waiting for another process that makes {folder} (its lock is {path})")
            waited, sign = True, began
            with contextlib.suppress(OSError):
                sign = max(began, Path(f"{folder}.tmp").stat().st_mtime)
            if time.time() - sign > PATIENCE:
                raise UserError(
                    f"{path}: another process holds this lock, and has not got on for {PATIENCE:g} s; if there is no "
                    "such process, delete the file"
                ) from None
    try:
        yield waited
    finally:
        lock.release()


def _say_older(folder: Path, say: Callable[[str], None]) -> None:
    """Name the caches of the same folder of data, split and size, which nothing may need any more."""
    source, older = (folder / "source.txt").read_bytes(), []
    for other in sorted(folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*/source.txt")):
        if other.parent != folder and other.read_bytes() == source:
            older.append(str(other.parent))
    if older:
        say(f"older caches of {os.fsdecode(source)}, to be deleted unless something needs them: {', '.join(older)}")


def not_writable(error: OSError, cache_dir: Path) -> UserError:
    return UserError(
        f"{error.filename or cache_dir}: cannot be written ({error.strerror or error}); give another folder with "
        "data.cache_dir="
    )


def _key(layout: Layout, samples: list[Sample], size: tuple[int, int]) -> str:
    files, missing = [], []
    folders: dict[Path, Path] = {}
    for path in (path for s in samples for path in (s.image, s.label, s.instance) if path):
        try:
            stat = path.stat()
        except FileNotFoundError:
            missing.append(FileError(path, "missing, a link to nothing" if path.is_symlink() else "missing"))
            continue
        folder = folders.get(path.parent) or path.parent.resolve()
        folders[path.parent] = folder
        files.append((str(folder / path.name), stat.st_size, stat.st_mtime_ns))
    if missing:
        raise UserError("\n  ".join([f"{len(missing)} files of {layout.title} cannot be used:", *by_cause(missing)]))
    meaning = [sorted(table.items()) for table in (layout.classes.from_file, layout.classes.from_color)]
    key = [VERSION, layout.name, meaning, size, files]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def _build(
    layout: Layout, samples: list[Sample], size: tuple[int, int], folder: Path, progress, others: Iterable[Sample]
) -> None:
    height, width = size
    needed = len(samples) * 5 * height * width
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise UserError(
            f"{folder.parent}: the cache needs {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free; "
            "give another folder with data.cache_dir="
        )
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a build that was killed: we hold the lock
    temporary.mkdir()
    try:
        images = _new(temporary / "images.npy", (len(samples), 3, height, width))
        labels = _new(temporary / "labels.npy", (len(samples), height, width))
        borders = _new(temporary / "contours.npy", (len(samples), height, width))
        found: list = [None] * len(samples)

        def convert(i: int) -> UserError | None:
            try:
                image, *truth = load(samples[i], layout)
            except UserError as error:
                return error
            images[i] = resize_image(image, size)
            labels[i], instances = (resize_truth(part, size) for part in truth)
            borders[i] = contours(labels[i], instances)
            found[i] = digests(images[i], labels[i], borders[i])
            os.utime(temporary)  # a sign of life, see `locked`
            return None

        problems: list[UserError] = [*mixed(labels_of(samples), layout.classes, labels_of(others))]
        problems += [error for error in progress(each(convert, range(len(samples))), len(samples)) if error]
        if problems:
            lines = [f"{len(problems)} of {len(samples)} samples cannot be used:", *by_cause(problems)]
            raise UserError("\n  ".join(lines))
        for written in (images, labels, borders):
            written.flush()
        index = {"names": [sample.name for sample in samples], "digests": found}
        (temporary / "index.json").write_text(json.dumps(index))
        source = os.path.commonpath([sample.image.parent.resolve() for sample in samples])
        (temporary / "source.txt").write_bytes(os.fsencode(source))
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def resize_image(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """An RGB image at (height, width), by Pillow's bilinear filter with antialiasing; (3, height, width) uint8."""
    return np.ascontiguousarray(np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR)).transpose(2, 0, 1))


def resize_truth(truth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Labels or instances at (height, width), by the nearest neighbour."""
    return np.asarray(Image.fromarray(truth).resize(size[::-1], Image.Resampling.NEAREST))


def contours(labels: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """Where a labelled pixel has a labelled neighbour (of four) of another instance.

    Both sides of a border are marked, so it is two pixels wide; a border to unlabelled pixels is none. In Cityscapes
    what is no instance has its label id there, so borders between classes count too.

    Args:
        labels: (H, W) class numbers or 255.
        instances: (H, W) integers.

    Returns:
        (H, W) bool.
    """
    valid, marked = labels != IGNORE, np.zeros(labels.shape, dtype=bool)
    for one, other in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        border = (instances[one] != instances[other]) & valid[one] & valid[other]
        marked[one] |= border
        marked[other] |= border
    return marked


def _new(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A file of zeros, mapped. Its space is taken on the disk first: a map on a full disk would end the process."""
    array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    with open(path, "r+b") as file:
        file.seek(array.offset)
        try:
            os.posix_fallocate(file.fileno(), array.offset, array.nbytes)
        except (AttributeError, OSError) as error:  # not everywhere: write zeros
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise OSError(error.errno, error.strerror, str(path)) from None
            for done in range(0, array.nbytes, 2**24):
                file.write(bytes(min(2**24, array.nbytes - done)))
    return array
