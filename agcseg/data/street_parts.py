"""What street scenes are made of: label ids, colours, vehicles and flat figures. Tables only."""

from typing import NamedTuple

import numpy as np

# Label ids of Cityscapes; the first is void.
EGO = 1
ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN = 7, 8, 11, 12, 13, 17, 19, 20
VEGETATION, TERRAIN, SKY = 21, 22, 23
PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = 24, 25, 26, 27, 28, 31, 32, 33

# fmt: off
PLASTER = ((196, 178, 148), (172, 164, 152), (150, 96, 78), (188, 148, 108), (128, 124, 120), (206, 198, 182),
           (146, 118, 96), (164, 128, 112), (112, 104, 98), (182, 172, 128))
LEAVES = ((62, 88, 40), (78, 100, 46), (48, 76, 44), (96, 104, 48), (120, 98, 44), (56, 70, 36))
CLOTHES = ((38, 40, 52), (60, 66, 84), (122, 40, 44), (176, 168, 154), (66, 84, 62), (150, 120, 60), (30, 30, 32),
           (92, 58, 96), (196, 196, 200), (70, 104, 140))
STEEL = ((112, 114, 114), (70, 76, 72), (150, 150, 146))
COLORS = {  # the colours that each material may have
    "road": ((92, 92, 94), (112, 108, 104), (78, 78, 82)), "kerb": ((158, 156, 150),),
    "paving": ((142, 134, 126), (120, 116, 114)), "bark": ((74, 62, 50), (92, 84, 74)), "leaves": LEAVES,
    "grass": ((92, 108, 54), (112, 112, 66), (120, 106, 78), (76, 100, 50)),
    "plaster": PLASTER, "roof": ((122, 62, 48), (84, 78, 78), (104, 74, 62), (70, 72, 80)),
    "pane": ((52, 60, 70), (72, 84, 96), (40, 44, 50), (110, 124, 136)),
    "frame": ((208, 204, 196), (110, 96, 84), (170, 160, 150)),
    "wall": PLASTER, "fence": ((96, 72, 52), (60, 62, 62), (176, 172, 160), (70, 84, 70)), "hedge": LEAVES,
    "body": ((28, 28, 32), (58, 60, 66), (150, 154, 160), (204, 206, 208), (128, 24, 26), (34, 54, 104),
             (96, 100, 104), (62, 78, 66), (168, 150, 120), (80, 96, 122)),
    "lorry": ((206, 206, 202), (170, 172, 170), (60, 86, 130), (150, 52, 40), (196, 170, 70), (84, 108, 84)),
    "bus": ((196, 152, 32), (150, 30, 32), (220, 216, 206), (48, 92, 128), (92, 128, 62)),
    "tram": ((204, 188, 130), (160, 34, 36), (214, 216, 216), (54, 106, 88), (196, 160, 44)),
    "glass": ((52, 60, 70), (72, 84, 96)), "tyre": ((24, 24, 26),), "metal": STEEL, "pole": STEEL,
    "legs": CLOTHES, "top": CLOTHES, "hair": ((40, 32, 28), (96, 70, 46), (150, 130, 100)),
    "skin": ((214, 168, 140), (172, 122, 92), (108, 74, 56), (228, 188, 164)),
    "red": ((172, 30, 32),), "white": ((214, 214, 208),), "blue": ((34, 72, 148),), "yellow": ((214, 176, 40),),
    "box": ((34, 36, 34), (60, 62, 56)), "off": ((58, 54, 50),),
    "go": ((40, 190, 90),), "soon": ((236, 170, 40),), "stop": ((226, 40, 34),),
    "bonnet": ((40, 42, 46), (120, 122, 126), (70, 76, 90)),
}
TYRE, METAL, WHITE = COLORS["tyre"][0], STEEL[0], COLORS["white"][0]


class Vehicle(NamedTuple):
    """A kind of vehicle: an outline seen from its right side, stretched over its width.

    The corners of `outline` and of each window are in fractions of length (0 rear, 1 front) and height.
    """

    label: int
    size: tuple[float, float, float]  # length, width, height in metres
    taper: float  # how much narrower the roof is than the body, as a fraction
    outline: tuple[tuple[float, float], ...]
    glass: tuple[int, ...]  # the corners of the outline at which an edge of glass starts
    windows: tuple[tuple[tuple[float, float], ...], ...]
    wheels: tuple[float, ...]
    radius: float  # of a wheel, in metres
    color: str


def _panes(first: float, last: float, count: int, bottom: float, top: float) -> tuple:
    left, wide = np.linspace(first, last, count, endpoint=False).tolist(), 0.88 * (last - first) / count
    return tuple(((s, bottom), (s + wide, bottom), (s + wide, top), (s, top)) for s in left)


VEHICLES = {
    "saloon": Vehicle(
        CAR, (4.6, 1.82, 1.46), 0.24,
        ((0, 0.2), (0, 0.64), (0.1, 0.68), (0.24, 0.99), (0.52, 1), (0.74, 0.66), (0.98, 0.54), (1, 0.2)), (2, 4),
        (((0.2, 0.66), (0.4, 0.65), (0.4, 0.93), (0.28, 0.92)),
         ((0.43, 0.65), (0.69, 0.64), (0.55, 0.93), (0.43, 0.93))), (0.19, 0.81), 0.32, "body"),
    "hatchback": Vehicle(
        CAR, (4.0, 1.76, 1.5), 0.22,
        ((0, 0.2), (0, 0.6), (0.09, 0.97), (0.5, 1), (0.75, 0.64), (0.97, 0.54), (1, 0.2)), (1, 3),
        (((0.12, 0.62), (0.37, 0.62), (0.37, 0.94), (0.19, 0.92)),
         ((0.4, 0.62), (0.7, 0.62), (0.55, 0.94), (0.4, 0.94))), (0.18, 0.82), 0.31, "body"),
    "van": Vehicle(
        CAR, (4.9, 1.92, 1.95), 0.12,
        ((0, 0.17), (0, 0.56), (0.03, 0.95), (0.72, 1), (0.9, 0.56), (0.99, 0.46), (1, 0.17)), (1, 3),
        (((0.66, 0.58), (0.85, 0.55), (0.78, 0.9), (0.66, 0.9)),), (0.17, 0.82), 0.33, "body"),
    "lorry": Vehicle(
        TRUCK, (8.0, 2.45, 3.4), 0,
        ((0, 0.22), (0, 1), (0.74, 1), (0.76, 0.8), (0.95, 0.78), (1, 0.46), (1, 0.16)), (4,),
        (((0.83, 0.46), (0.97, 0.46), (0.94, 0.7), (0.83, 0.7)),), (0.16, 0.28, 0.86), 0.48, "lorry"),
    "bus": Vehicle(
        BUS, (11.5, 2.5, 3.05), 0.03,
        ((0, 0.12), (0, 0.5), (0.005, 0.86), (0.01, 1), (0.99, 1), (0.995, 0.9), (1, 0.36), (1, 0.12)), (1, 5),
        _panes(0.04, 0.99, 8, 0.46, 0.84), (0.22, 0.78), 0.48, "bus"),
    "tram": Vehicle(
        TRAIN, (27.0, 2.4, 3.5), 0.08,
        ((0, 0.08), (0, 0.42), (0.02, 0.84), (0.03, 1), (0.97, 1), (0.98, 0.84), (1, 0.42), (1, 0.08)), (1, 5),
        _panes(0.03, 0.97, 14, 0.42, 0.8), (), 0.3, "tram"),
}
# Which kinds of vehicle are seen where, as often as they are named.
PARKED = 12 * ("saloon",) + 13 * ("hatchback",) + 5 * ("van",) + ("lorry",)
DRIVING = 9 * ("saloon",) + 7 * ("hatchback",) + 3 * ("van",) + 2 * ("lorry", "bus")

# Flat figures, in metres: a disc (u, v, radius), a ring likewise, a limb (thickness, u, v, u, v) or an area of corners
# (u, v, u, v, ...), each with the name of its material.
BICYCLE_PARTS = (
    ("ring", "tyre", -0.52, 0.34, 0.34), ("ring", "tyre", 0.52, 0.34, 0.34),
    ("limb", "body", 0.05, -0.52, 0.34, -0.05, 0.3), ("limb", "body", 0.05, -0.05, 0.3, -0.2, 0.9),
    ("limb", "body", 0.05, -0.17, 0.78, 0.34, 0.8), ("limb", "body", 0.05, -0.05, 0.3, 0.36, 0.74),
    ("limb", "body", 0.05, 0.52, 0.34, 0.32, 1.0), ("limb", "body", 0.04, -0.52, 0.34, -0.17, 0.78),
    ("limb", "tyre", 0.07, -0.34, 0.92, -0.1, 0.92), ("limb", "tyre", 0.05, 0.2, 1.02, 0.38, 1.0),
)
MOTORCYCLE_PARTS = (
    ("disc", "tyre", -0.66, 0.31, 0.31), ("disc", "tyre", 0.68, 0.31, 0.31),
    ("disc", "metal", -0.66, 0.31, 0.15), ("disc", "metal", 0.68, 0.31, 0.15),
    ("area", "metal", -0.3, 0.22, 0.3, 0.22, 0.36, 0.6, -0.34, 0.6), ("limb", "metal", 0.09, 0.68, 0.31, 0.42, 0.98),
    ("area", "tyre", -0.92, 0.74, -0.86, 0.88, -0.1, 0.8, -0.08, 0.68, -0.6, 0.6),
    ("area", "body", -0.14, 0.62, -0.1, 0.88, 0.18, 0.98, 0.46, 0.84, 0.36, 0.58),
    ("limb", "tyre", 0.06, 0.24, 1.1, 0.46, 0.96), ("disc", "white", 0.52, 0.86, 0.1),
)
RIDER_PARTS = (
    ("limb", "legs", 0.17, -0.16, 0.95, 0.14, 0.7), ("limb", "legs", 0.14, 0.14, 0.7, -0.04, 0.28),
    ("area", "top", -0.32, 0.92, -0.06, 0.88, 0.2, 1.36, 0.06, 1.5, -0.12, 1.42),
    ("limb", "top", 0.12, 0.08, 1.36, 0.18, 1.12), ("limb", "skin", 0.09, 0.18, 1.12, 0.34, 1.02),
    ("disc", "skin", 0.17, 1.6, 0.12), ("area", "body", 0.02, 1.62, 0.06, 1.74, 0.18, 1.78, 0.3, 1.72, 0.32, 1.64),
)
SIGNS = (
    (("disc", "red", 0, 0, 0.36), ("disc", "white", 0, 0, 0.25)),
    (("disc", "blue", 0, 0, 0.36), ("limb", "white", 0.1, -0.16, -0.12, 0.14, 0.14)),
    (("area", "red", -0.42, -0.32, 0.42, -0.32, 0, 0.42), ("area", "white", -0.24, -0.22, 0.24, -0.22, 0, 0.22)),
    (("area", "white", -0.4, 0, 0, -0.4, 0.4, 0, 0, 0.4), ("area", "yellow", -0.3, 0, 0, -0.3, 0.3, 0, 0, 0.3)),
    (("limb", "blue", 0.68, -0.32, 0, 0.32, 0), ("area", "white", -0.14, -0.2, 0, 0.2, 0.14, -0.2)),
    (("area", "yellow", -0.7, -0.24, 0.7, -0.24, 0.9, 0, 0.7, 0.24, -0.7, 0.24), ("limb", "off", 0.1, -0.5, 0, 0.5, 0)),
    (("disc", "red", 0, 0, 0.38), ("limb", "white", 0.14, -0.26, 0, 0.26, 0)),
)
LAMPS = ("go", "soon", "stop")  # of a traffic light, from below
