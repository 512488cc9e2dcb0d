"""In which way masks are stored: what single files that a program made smaller, or another one wrote, mean instead."""

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from agcseg.data.labels import IGNORE, UNKNOWN, Classes
from agcseg.data.pictures import each, read_numbers
from agcseg.errors import FileError, UserError


def mixed(paths: list[Path], classes: Classes, others: list[Path]) -> list[FileError]:
    """Label files that are stored in another way than most: numbers beside colours, 1 bit beside 8, with a palette, or
    with another one.

    Programs that make PNGs smaller do this to single files; such a file decodes well, and means something else. What
    cannot be used at all is passed over: whoever decodes it says more.

    Args:
        others: those of other splits, which count for what is usual.
    """

    def look(path: Path) -> tuple[str, bytes]:
        try:
            with Image.open(path) as picture:
                mode, palette = picture.mode, bytes(picture.getpalette() or ())
        except Exception:  # see above
            return "", b""
        if mode in ("RGB", "RGBA") or (mode == "P" and not classes.from_file):
            return ("colours" if classes.from_color else ""), b""
        return {"1": "numbers of 1 bit", "P": "numbers with a palette"}.get(mode, "numbers"), palette

    every = [*paths, *others]
    seen = dict(zip(every, each(look, every), strict=True))
    kinds = Counter(kind for kind, _ in seen.values() if kind)
    usual = max(sorted(kinds), key=lambda kind: kinds[kind], default="")
    advice = "store all label files in one way"
    errors = [
        FileError(path, f"holds {seen[path][0]}, where most label files hold {usual}", advice=advice)
        for path in paths
        if seen[path][0] not in ("", usual)
    ]
    palettes = {path: palette for path, (_, palette) in seen.items() if palette}
    longest = max(palettes.values(), key=len, default=b"")
    if all(longest.startswith(palette) for palette in palettes.values()):
        return errors
    mine = {*paths}
    return errors + [error for error in _repainted(palettes, classes) if error.path in mine]


def _repainted(palettes: dict[Path, bytes], classes: Classes) -> list[FileError]:
    """Files whose palette gives a number that they hold another colour than most files do. Those whose colours are all
    of classes are passed over: `load` compares them with the numbers."""

    def look(path: Path) -> dict[int, tuple[int, ...]]:
        palette = np.frombuffer(palettes[path], np.uint8).reshape(-1, 3)
        try:
            used = np.unique(read_numbers(path))
        except UserError:  # see `mixed`
            return {}
        used = used[used < len(palette)]
        if (classes.translate(palette[used][None]) != UNKNOWN).all():
            return {}
        return {int(number): tuple(palette[number].tolist()) for number in used}

    painted = dict(zip(palettes, each(look, [*palettes]), strict=True))
    colors: dict[int, Counter] = {}
    for its in painted.values():
        for number, color in its.items():
            colors.setdefault(number, Counter())[color] += 1
    usual = {number: max(sorted(found), key=lambda color: found[color]) for number, found in colors.items()}
    cause = "its palette gives its numbers other colours than most label files give them, so they may be others"
    advice = "store all with one palette, or without one as the numbers that are meant"
    errors = []
    for path, its in painted.items():
        at = next((number for number in its if its[number] != usual[number]), None)
        if at is not None:
            errors.append(FileError(path, cause, f"{at} is {its[at]}, elsewhere {usual[at]}", advice))
    return errors


def check_palette(path: Path, stored: np.ndarray, picture: Image.Image, classes: Classes) -> None:
    """Numbers and palette agree, unless the palette has colours that are no class's: then it says nothing. A palette of
    greys alone may hold the numbers themselves, as programs that make files smaller write it.

    Raises:
        FileError: they contradict each other.
    """
    palette = np.array(picture.getpalette(), np.uint8).reshape(-1, 3)
    used = np.unique(stored)
    used = used[used < len(palette)]
    meant, painted = classes.translate(used[None])[0], classes.translate(palette[used][None])[0]
    greys = palette[used, 0]
    its = classes.translate(greys[None])[0]
    if (palette == palette[:, :1]).all() and (its != UNKNOWN).all() and (its != meant).any():
        at = used[its != meant][0]
        raise FileError(
            path,
            "its palette of greys may hold the numbers",
            f"{at} is grey {palette[at, 0]}, and both are numbers that are known",
            "where the greys are the numbers, store it as grey of 8 bits; else with colours, or without a palette",
        )
    used, painted, meant = (part[meant != IGNORE] for part in (used, painted, meant))
    known = painted != UNKNOWN
    if (known.all() or not classes.numbered) and (known & (painted != meant)).any():
        at = used[known & (painted != meant)][0]
        raise FileError(
            path,
            "its palette contradicts its numbers",
            f"{at} is {classes.names[classes.from_file[int(at)]]}, and {palette[at].tolist()} another class's colour",
            "where the colours are right, store it as RGB; where the numbers are, without a palette",
        )
