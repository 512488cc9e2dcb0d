"""Class tables: which number in a label file means which class, and how it is painted."""

from dataclasses import dataclass

import numpy as np

IGNORE = 255  # class number of pixels that count nowhere: not in the loss, not in the metrics
UNKNOWN = 254  # what `lookup` gives for a number that no label file may contain


@dataclass(frozen=True)
class Classes:
    """The classes of one data set.

    Attributes:
        names: class names; the index is the class number that networks are trained on.
        colors: one (red, green, blue) per class, 0 to 255.
        from_file: label-file number -> class number, or `IGNORE`. A number that is not a key is an error in the file.
    """

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    from_file: dict[int, int]

    def __len__(self) -> int:
        return len(self.names)

    def lookup(self) -> np.ndarray:
        """Table of 256 uint8: `lookup()[label_file_array]` gives class numbers, `IGNORE` or `UNKNOWN`."""
        table = np.full(256, UNKNOWN, dtype=np.uint8)
        for number, train_id in self.from_file.items():
            table[number] = train_id
        return table

    def palette(self) -> np.ndarray:
        """Table of 256 colours, (256, 3) uint8; everything that is not a class is black."""
        table = np.zeros((256, 3), dtype=np.uint8)
        table[: len(self)] = self.colors
        return table


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
