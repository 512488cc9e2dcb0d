"""Class tables: which number or colour in a label file means which class, and how it is painted."""

import colorsys
import functools
from dataclasses import dataclass, field

import numpy as np

IGNORE = 255  # class number of pixels that count nowhere: not in the loss, not in the metrics
UNKNOWN = 254  # what `lookup` gives for a number that no label file may contain
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Classes:
    """The classes of one data set.

    Attributes:
        names: class names; the index is the class number that networks are trained on.
        colors: one (red, green, blue) per class, 0 to 255.
        from_file: label-file number -> class number, or `IGNORE`. A number that is not a key is an error in the file.
        from_color: the same for label files that are colour pictures; empty if they never are.
        numbered: the numbers were given; else they count the classes, for want of others.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    from_file: dict[int, int]
    from_color: dict[Color, int] = field(default_factory=dict)
    numbered: bool = field(default=True, compare=False)

    def __len__(self) -> int:
        return len(self.names)

    def lookup(self) -> np.ndarray:
        """Table of 256 uint8: `lookup()[label_file_array]` gives class numbers, `IGNORE` or `UNKNOWN`."""
        table = np.full(256, UNKNOWN, dtype=np.uint8)
        for number, train_id in self.from_file.items():
            if number < 256:
                table[number] = train_id
        return table

    @functools.cached_property
    def _of_colors(self) -> np.ndarray:
        table = np.full(2**24, UNKNOWN, dtype=np.uint8)
        for color, train_id in self.from_color.items():
            table[packed(np.array(color))] = train_id
        return table

    def translate(self, stored: np.ndarray) -> np.ndarray:
        """Class numbers, `IGNORE` or `UNKNOWN`, (H, W) uint8.

        Args:
            stored: numbers, (H, W), or colours, (H, W, 3) uint8, of a label file.
        """
        if stored.ndim == 3:
            return self._of_colors[packed(stored)]
        if stored.dtype == np.uint8:
            return self.lookup()[stored]
        known = np.array(sorted(self.from_file), dtype=np.int64)  # they may be far apart
        if not len(known):
            return np.full(stored.shape, UNKNOWN, dtype=np.uint8)
        at = np.searchsorted(known, stored).clip(max=len(known) - 1)
        meaning = np.array([self.from_file[number] for number in known.tolist()], dtype=np.uint8)
        return np.where(known[at] == stored, meaning[at], np.uint8(UNKNOWN))

    def palette(self) -> np.ndarray:
        """Table of 256 colours, (256, 3) uint8; everything that is not a class is black."""
        table = np.zeros((256, 3), dtype=np.uint8)
        table[: len(self)] = self.colors
        return table

    def to_dict(self) -> dict:
        """Lists of plain values, for a checkpoint."""
        return {
            "names": list(self.names),
            "colors": [list(color) for color in self.colors],
            "from_file": [list(item) for item in self.from_file.items()],
            "from_color": [[*color, number] for color, number in self.from_color.items()],
            "numbered": self.numbered,
        }

    @classmethod
    def from_dict(cls, stored: dict) -> "Classes":
        """What `to_dict` gave."""
        return cls(
            tuple(stored["names"]),
            tuple(tuple(color) for color in stored["colors"]),
            dict(map(tuple, stored["from_file"])),
            {tuple(color): number for *color, number in stored["from_color"]},
            stored.get("numbered", True),
        )


def packed(colors: np.ndarray) -> np.ndarray:
    """One whole number for each colour, (..., 3) to (...)."""
    red, green, blue = np.moveaxis(colors.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def unpacked(number: int) -> Color:
    """The colour of which `packed` made this number."""
    return number >> 16, number >> 8 & 255, number & 255


def some_color(number: int) -> Color:
    """A colour for a class that has none: hues a golden angle apart, in three brightnesses."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.75, (0.95, 0.7, 0.5)[number % 3])
    return round(255 * red), round(255 * green), round(255 * blue)


# The Cityscapes label ids (Cordts et al. 2016) and the 19 of them that are evaluated, with the benchmark's colours.
_CITYSCAPES = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
CITYSCAPES = Classes(
    names=tuple(name for _, name, _ in _CITYSCAPES),
    colors=tuple(color for _, _, color in _CITYSCAPES),
    # Ids run from 0 to 33; the licence plate's -1 is stored as 255 in an 8-bit file.
    from_file={**dict.fromkeys([*range(34), 255], IGNORE), **{row[0]: i for i, row in enumerate(_CITYSCAPES)}},
)

# The 11 classes that the SegNet authors train on, in the order of their annotation files; 11 is void.
CAMVID = Classes(
    names=(
        "sky", "building", "pole", "road", "pavement", "tree",
        "sign symbol", "fence", "car", "pedestrian", "bicyclist",
    ),
    colors=(
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    ),
    from_file={**{i: i for i in range(11)}, 11: IGNORE},
)  # fmt: skip

TABLES = {"cityscapes": CITYSCAPES, "camvid": CAMVID}
