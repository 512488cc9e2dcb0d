"""Procedural street scenes in the Cityscapes layout: data for a demonstration or a test, without any download.

A scene is a small world in metres: x to the right of the camera, y up from the ground, z ahead. The ground and the
sky are computed per pixel; everything else is painted far to near as flat polygons seen through a pinhole camera.
Each polygon goes into two pictures with the same coordinates, both at twice the final size: one of colours, which is
averaged down and so has smooth edges, and one of ids, of which every second pixel is kept and so stays exact.
"""

import itertools
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from agcseg.errors import UserError

# Label ids of Cityscapes; the first two are void.
EGO, STATIC = 1, 4
ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN = 7, 8, 11, 12, 13, 17, 19, 20
VEGETATION, TERRAIN, SKY = 21, 22, 23
PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = 24, 25, 26, 27, 28, 31, 32, 33

SPLITS = {"train": ("ashford", "brixen"), "val": ("corvey",)}
FAR = 130.0  # metres to the end of the street
WHEEL = [math.tau * i / 12 for i in range(12)]  # angles of its corners

Color = tuple[float, float, float]
Point = tuple[float, float, float]
Plane = Callable[[float, float], Point]

PLASTER = ((196, 178, 148), (172, 164, 152), (150, 96, 78), (188, 148, 108), (128, 124, 120), (206, 198, 182),
           (146, 118, 96), (164, 128, 112), (112, 104, 98), (182, 172, 128))  # fmt: skip
ROOFS = ((122, 62, 48), (84, 78, 78), (104, 74, 62), (70, 72, 80))
LEAVES = ((62, 88, 40), (78, 100, 46), (48, 76, 44), (96, 104, 48), (120, 98, 44), (56, 70, 36))
PAINTS = ((28, 28, 32), (58, 60, 66), (150, 154, 160), (204, 206, 208), (128, 24, 26), (34, 54, 104), (96, 100, 104),
          (62, 78, 66), (168, 150, 120), (80, 96, 122))  # fmt: skip
CLOTHES = ((38, 40, 52), (60, 66, 84), (122, 40, 44), (176, 168, 154), (66, 84, 62), (150, 120, 60), (30, 30, 32),
           (92, 58, 96), (196, 196, 200), (70, 104, 140))  # fmt: skip
HAIRS = ((40, 32, 28), (96, 70, 46), (150, 130, 100))
SKINS = ((214, 168, 140), (172, 122, 92), (108, 74, 56), (228, 188, 164))
FENCES = ((96, 72, 52), (60, 62, 62), (176, 172, 160), (70, 84, 70))
PANES = ((52, 60, 70), (72, 84, 96), (40, 44, 50), (110, 124, 136))
FRAMES = ((208, 204, 196), (110, 96, 84), (170, 160, 150))
STEEL = ((112, 114, 114), (70, 76, 72), (150, 150, 146))
BINS = ((60, 84, 62), (70, 72, 74), (120, 100, 60), (52, 62, 96))
GROUND = {
    "road": ((92, 92, 94), (112, 108, 104), (78, 78, 82)),
    "paving": ((142, 134, 126), (120, 116, 114)),
    "grass": ((92, 108, 54), (112, 112, 66), (120, 106, 78), (76, 100, 50)),
    "kerb": ((158, 156, 150),),
}
BOXES = ((34, 36, 34), (60, 62, 56))
BARKS = ((74, 62, 50), (92, 84, 74))
TYRE, METAL, WHITE = (24, 24, 26), (112, 114, 114), (214, 214, 208)
BARRIERS = {"wall": (PLASTER, 1.0, 2.2), "fence": (FENCES, 0.9, 1.8), "hedge": (LEAVES, 0.9, 1.9)}  # colours, heights


@dataclass(frozen=True)
class Vehicle:
    """A kind of vehicle: an outline seen from its right side, stretched over its width.

    `outline`, `windows` and `panels` are in fractions of length (0 rear, 1 front) and height. `outline` names after
    each corner what the edge that starts there is made of.
    """

    label: int
    size: Point  # length, width, height in metres
    taper: float  # how much narrower the roof is than the body, as a fraction
    outline: tuple[tuple[float, float, str], ...]
    windows: tuple[tuple[tuple[float, float], ...], ...]
    wheels: tuple[float, ...]
    wheel: float  # radius in metres
    colors: tuple[Color, ...]
    cab: float = 1.0  # fraction of the length from which on the side is the driver's cab, of another colour


def _panes(first: float, last: float, count: int, bottom: float, top: float) -> tuple:
    step = (last - first) / count
    spans = [(first + i * step, first + (i + 0.88) * step) for i in range(count)]
    return tuple(((a, bottom), (b, bottom), (b, top), (a, top)) for a, b in spans)


VEHICLES = {
    "saloon": Vehicle(
        CAR, (4.6, 1.82, 1.46), 0.24,
        ((0, 0.2, "body"), (0.0, 0.64, "body"), (0.1, 0.68, "glass"), (0.24, 0.99, "roof"), (0.52, 1, "glass"),
         (0.74, 0.66, "body"), (0.98, 0.54, "body"), (1, 0.2, "body")),
        (((0.2, 0.66), (0.4, 0.65), (0.4, 0.93), (0.28, 0.92)),
         ((0.43, 0.65), (0.69, 0.64), (0.55, 0.93), (0.43, 0.93))),
        (0.19, 0.81), 0.32, PAINTS),
    "hatchback": Vehicle(
        CAR, (4.0, 1.76, 1.5), 0.22,
        ((0, 0.2, "body"), (0.0, 0.6, "glass"), (0.09, 0.97, "roof"), (0.5, 1, "glass"), (0.75, 0.64, "body"),
         (0.97, 0.54, "body"), (1, 0.2, "body")),
        (((0.12, 0.62), (0.37, 0.62), (0.37, 0.94), (0.19, 0.92)),
         ((0.4, 0.62), (0.7, 0.62), (0.55, 0.94), (0.4, 0.94))), (0.18, 0.82), 0.31, PAINTS),
    "van": Vehicle(
        CAR, (4.9, 1.92, 1.95), 0.12,
        ((0, 0.17, "body"), (0.0, 0.56, "glass"), (0.03, 0.95, "roof"), (0.72, 1, "glass"), (0.9, 0.56, "body"),
         (0.99, 0.46, "body"), (1, 0.17, "body")),
        (((0.66, 0.58), (0.85, 0.55), (0.78, 0.9), (0.66, 0.9)),), (0.17, 0.82), 0.33, PAINTS),
    "lorry": Vehicle(
        TRUCK, (8.0, 2.45, 3.4), 0.0,
        ((0, 0.22, "body"), (0, 1, "roof"), (0.74, 1, "body"), (0.76, 0.8, "body"), (0.95, 0.78, "glass"),
         (1, 0.46, "body"), (1, 0.16, "body")),
        (((0.83, 0.46), (0.97, 0.46), (0.94, 0.7), (0.83, 0.7)),), (0.16, 0.28, 0.86), 0.48,
        ((206, 206, 202), (170, 172, 170), (60, 86, 130), (150, 52, 40), (196, 170, 70), (84, 108, 84)), cab=0.77),
    "bus": Vehicle(
        BUS, (11.5, 2.5, 3.05), 0.03,
        ((0, 0.12, "body"), (0, 0.5, "glass"), (0.005, 0.86, "body"), (0.01, 1, "roof"), (0.99, 1, "body"),
         (0.995, 0.9, "glass"), (1, 0.36, "body"), (1, 0.12, "body")),
        _panes(0.04, 0.99, 8, 0.46, 0.84), (0.22, 0.78), 0.48,
        ((196, 152, 32), (150, 30, 32), (220, 216, 206), (48, 92, 128), (92, 128, 62))),
    "tram": Vehicle(
        TRAIN, (27.0, 2.4, 3.5), 0.08,
        ((0, 0.08, "body"), (0, 0.42, "glass"), (0.02, 0.84, "body"), (0.03, 1, "roof"), (0.97, 1, "body"),
         (0.98, 0.84, "glass"), (1, 0.42, "body"), (1, 0.08, "body")),
        _panes(0.03, 0.97, 14, 0.42, 0.8), (), 0.3,
        ((204, 188, 130), (160, 34, 36), (214, 216, 216), (54, 106, 88), (196, 160, 44))),
}  # fmt: skip

# Flat figures that face the camera, in metres: a disc (u, v, radius), a ring likewise, a limb (thickness, u, v, u, v),
# a box (u, v, half its width, half its height) or an area of corners, each with the name of what it is made of.
BICYCLE_PARTS = (
    ("ring", "tyre", -0.52, 0.34, 0.34), ("ring", "tyre", 0.52, 0.34, 0.34),
    ("limb", "body", 0.05, -0.52, 0.34, -0.05, 0.3), ("limb", "body", 0.05, -0.05, 0.3, -0.2, 0.9),
    ("limb", "body", 0.05, -0.17, 0.78, 0.34, 0.8), ("limb", "body", 0.05, -0.05, 0.3, 0.36, 0.74),
    ("limb", "body", 0.05, 0.52, 0.34, 0.32, 1.0), ("limb", "body", 0.04, -0.52, 0.34, -0.17, 0.78),
    ("limb", "tyre", 0.07, -0.34, 0.92, -0.1, 0.92), ("limb", "tyre", 0.05, 0.2, 1.02, 0.38, 1.0),
)  # fmt: skip
MOTORCYCLE_PARTS = (
    ("disc", "tyre", -0.66, 0.31, 0.31), ("disc", "tyre", 0.68, 0.31, 0.31),
    ("disc", "metal", -0.66, 0.31, 0.15), ("disc", "metal", 0.68, 0.31, 0.15),
    ("area", "metal", -0.3, 0.22, 0.3, 0.22, 0.36, 0.6, -0.34, 0.6), ("limb", "metal", 0.09, 0.68, 0.31, 0.42, 0.98),
    ("area", "tyre", -0.92, 0.74, -0.86, 0.88, -0.1, 0.8, -0.08, 0.68, -0.6, 0.6),
    ("area", "body", -0.14, 0.62, -0.1, 0.88, 0.18, 0.98, 0.46, 0.84, 0.36, 0.58),
    ("limb", "metal", 0.11, -0.8, 0.3, 0.0, 0.26), ("limb", "tyre", 0.06, 0.24, 1.1, 0.46, 0.96),
    ("disc", "lamp", 0.52, 0.86, 0.1), ("limb", "body", 0.08, 0.44, 0.66, 0.9, 0.62),
)  # fmt: skip
RIDER_PARTS = (
    ("limb", "legs", 0.17, -0.16, 0.95, 0.14, 0.7), ("limb", "legs", 0.14, 0.14, 0.7, -0.04, 0.28),
    ("area", "top", -0.32, 0.92, -0.06, 0.88, 0.2, 1.36, 0.06, 1.5, -0.12, 1.42),
    ("limb", "top", 0.12, 0.08, 1.36, 0.18, 1.12), ("limb", "skin", 0.09, 0.18, 1.12, 0.34, 1.02),
    ("disc", "skin", 0.17, 1.6, 0.12), ("area", "hair", 0.02, 1.62, 0.06, 1.74, 0.18, 1.78, 0.3, 1.72, 0.32, 1.64),
)  # fmt: skip
SIGNS = (
    (("disc", "red", 0, 0, 0.36), ("disc", "white", 0, 0, 0.25)),
    (("disc", "blue", 0, 0, 0.36), ("limb", "white", 0.1, -0.16, -0.12, 0.14, 0.14)),
    (("area", "red", -0.42, -0.32, 0.42, -0.32, 0, 0.42), ("area", "white", -0.24, -0.22, 0.24, -0.22, 0, 0.22)),
    (("area", "white", -0.4, 0, 0, -0.4, 0.4, 0, 0, 0.4), ("area", "yellow", -0.3, 0, 0, -0.3, 0.3, 0, 0, 0.3)),
    (("box", "blue", 0, 0, 0.32, 0.34), ("area", "white", -0.14, -0.2, 0, 0.2, 0.14, -0.2)),
    (("area", "yellow", -0.7, -0.24, 0.7, -0.24, 0.86, 0, 0.7, 0.24, -0.7, 0.24), ("box", "dark", 0, 0, 0.5, 0.05)),
    (("disc", "red", 0, 0, 0.38), ("box", "white", 0, 0, 0.26, 0.07)),
    (("disc", "metal", 0, 0, 0.36),),
)  # fmt: skip
SIGN_COLORS = {"red": (172, 30, 32), "white": (222, 222, 218), "blue": (34, 72, 148), "yellow": (214, 176, 40),
               "dark": (40, 40, 40), "metal": (138, 140, 140)}  # fmt: skip
LAMPS = ((40, 190, 90), (236, 170, 40), (226, 40, 34))  # of a traffic light, from below
# How often each kind of vehicle is seen where.
PARKED = {"saloon": 0.38, "hatchback": 0.42, "van": 0.17, "lorry": 0.03}
DRIVING = {"saloon": 0.39, "hatchback": 0.32, "van": 0.14, "lorry": 0.08, "bus": 0.07}
CROSSING = {"saloon": 0.35, "hatchback": 0.28, "van": 0.1, "lorry": 0.1, "bus": 0.12, "tram": 0.05}
STYLES = {"city": 0.5, "suburb": 0.34, "park": 0.16}


class View:
    """The camera, the light and the two pictures that are painted."""

    def __init__(self, rng: Generator, size: tuple[int, int]):
        self.height, self.width = 2 * size[0], 2 * size[1]
        self.focal = rng.uniform(1.5, 1.8) * self.height
        self.eye = rng.uniform(1.3, 1.7)  # metres above the ground
        self.horizon = rng.uniform(0.42, 0.5) * self.height
        self.center = rng.uniform(0.42, 0.58) * self.width
        self.bend = rng.normal(0, 3e-4)  # the street bends sideways by bend * z^2
        self.sun = int(rng.choice((-1, 1)))  # the side whose facades are in the shade
        self.contrast = rng.uniform(0.05, 0.3)  # of sun against shade; small under clouds
        self.overcast = rng.uniform()
        grey = rng.uniform(180, 225)
        self.haze = (grey, grey * rng.uniform(1.0, 1.03), grey * rng.uniform(1.0, 1.1))
        self.visibility = rng.uniform(120, 700)  # metres
        self.counts: Counter[int] = Counter()

    def canvas(self, colors: np.ndarray, ids: np.ndarray) -> None:
        """Start painting over a picture (H, W, 3) uint8 and its ids (H, W) int32."""
        self.image, self.ids = Image.fromarray(colors), Image.fromarray(ids)
        self.draw, self.glaze, self.mark = (
            ImageDraw.Draw(self.image), ImageDraw.Draw(self.image, "RGBA"), ImageDraw.Draw(self.ids),
        )  # fmt: skip

    def instance(self, label: int) -> int:
        self.counts[label] += 1
        return label * 1000 + self.counts[label] - 1

    def pixel(self, x: float, y: float, z: float) -> tuple[float, float]:
        z = 0.8 if z < 0.8 else z
        scale = self.focal / z
        return self.center + (x + self.bend * z * z) * scale, self.horizon + (self.eye - y) * scale

    def tint(self, color: Color, z: float, light: float = 1.0) -> tuple[int, int, int]:
        """The colour as seen from z metres away."""
        clear = math.exp(-z / self.visibility)
        light, fog = light * clear, 1 - clear
        (r, g, b), (hr, hg, hb) = color, self.haze
        mixed = r * light + hr * fog, g * light + hg * fog, b * light + hb * fog
        return min(255, int(mixed[0])), min(255, int(mixed[1])), min(255, int(mixed[2]))

    def fill(self, corners: list[Point], color: Color, ident: int | None, light: float = 1.0) -> None:
        """Paint a polygon; `ident` None leaves the ids as they are."""
        flat = [self.pixel(*corner) for corner in corners]
        if max(flat)[0] < 0 or min(flat)[0] > self.width:  # quite out of sight
            return
        self.draw.polygon(flat, self.tint(color, corners[0][2], light))
        if ident is not None:
            self.mark.polygon(flat, ident)

    def panel(self, at: Plane, span: tuple, color: Color, ident: int | None = None, light: float = 1.0) -> None:
        """Paint the rectangle (left, right, low, high) of a plane; `at` gives the point for a place on the plane."""
        left, right, low, high = span
        self.fill([at(left, low), at(right, low), at(right, high), at(left, high)], color, ident, light)

    def shadow(self, corners: Iterable[Point], strength: float) -> None:
        """Darken the ground inside the corners; the strength is that of full sun."""
        ink = (16, 18, 26, int(255 * min(1.0, strength * (0.5 + 1.8 * self.contrast))))
        self.glaze.polygon([self.pixel(*corner) for corner in corners], ink)

    def outline(self, corners: list[Point], color: Color) -> None:
        flat = [self.pixel(*corner) for corner in corners]
        z = max(0.8, corners[0][2])
        self.draw.line([*flat, flat[0]], self.tint(color, z), max(1, round(0.07 * self.focal / z)))

    def side_light(self, side: float) -> float:
        """Light on a wall that faces x = -side."""
        return 1 + self.contrast * side * self.sun

    def figure(self, parts: Iterable[tuple], at: Point, looks: dict, scale: float = 1.0, squeeze: float = 1.0) -> None:
        """Paint a flat figure that faces the camera.

        `looks` gives (colour, id) for each material; `squeeze` scales the width, below 0 it turns the figure round.
        """
        unit = scale * self.focal / max(at[2], 0.8)
        left, base = self.pixel(*at)
        for shape, role, *numbers in parts:
            color, ident = looks[role]
            color = self.tint(color, at[2])
            if shape in ("disc", "ring"):
                u, v, r = (n * unit for n in numbers)
                half = max(0.5, r * (abs(squeeze) if shape == "ring" else min(1.0, abs(squeeze) + 0.2)))
                box = (left + u * squeeze - half, base - v - r, left + u * squeeze + half, base - v + r)
                self.mark.ellipse(box, ident)  # of a ring too: what is seen between the spokes counts as wheel
                if shape == "disc":
                    self.draw.ellipse(box, color)
                else:
                    self.draw.ellipse(box, None, color, max(1, round(0.06 * unit)))
                continue
            if shape == "box":
                u, v, wide, high = numbers
                numbers = [u - wide, v - high, u + wide, v - high, u + wide, v + high, u - wide, v + high]
            elif shape == "limb":
                thick, *numbers = numbers
            pairs = zip(numbers[::2], numbers[1::2], strict=True)
            flat = [(left + u * squeeze * unit, base - v * unit) for u, v in pairs]
            for target, value in ((self.draw, color), (self.mark, ident)):
                if shape == "limb":
                    target.line(flat, value, max(1, round(thick * unit)))
                else:
                    target.polygon(flat, value)


def _pick(rng: Generator, colors: tuple[Color, ...], spread: float = 14) -> Color:
    """One of the colours, a little different each time."""
    base, (shift, r, g, b) = colors[rng.integers(len(colors))], rng.normal(0, spread, 4).tolist()
    return tuple(min(245.0, max(8.0, c + shift + own / 3)) for c, own in zip(base, (r, g, b), strict=True))


def _looks(rng: Generator, ident: int, **materials: tuple[Color, ...]) -> dict[str, tuple[Color, int]]:
    return {name: (_pick(rng, colors), ident) for name, colors in materials.items()}


def _draw(rng: Generator, chances: dict[str, float]) -> str:
    return str(rng.choice(list(chances), p=list(chances.values())))


def _noise(rng: Generator, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Smooth noise of `size`, about -1 to 1, from a coarse grid that does not depend on it."""
    coarse = Image.fromarray(rng.uniform(-1, 1, grid).astype(np.float32))
    return np.asarray(coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC))


@cache
def _grain() -> tuple[np.ndarray, np.ndarray]:
    """A patch of (512, 512) noise of all sizes, the same in every scene, and how it looks lit from above."""
    rng = np.random.default_rng(0)
    grain = sum(_noise(rng, (n, n), (512, 512)) / k for k, n in enumerate((12, 28, 64, 140, 300), 2))
    return grain, grain - np.roll(grain, (-7, -4), (0, 1))


@dataclass
class Side:
    """What lies along one side of the street, all in metres; `sign` is -1 on the left."""

    sign: int
    style: str
    curb: float  # x where the road ends
    walk: float  # x where the pavement begins, behind the verge if there is one
    back: float  # x where the pavement ends
    line: float  # x of the facades
    parked: bool


class Street:
    """The plan of a scene: ground and what stands on it."""

    def __init__(self, rng: Generator, view: View):
        self.rng, self.view = rng, view
        self.grain, self.relief = _grain()
        self.lane = rng.uniform(3.0, 3.7)
        self.tram = rng.random() < 0.14
        self.crossing = rng.uniform(14, 60) if rng.random() < 0.45 else math.inf  # z of a street across
        self.sides = [self._side(sign, lanes + (rng.random() < 0.3)) for sign, lanes in ((-1, 1.5), (1, 0.5))]
        self.things: list[tuple] = []  # (z, painter, *arguments)

    def _side(self, sign: int, lanes: float) -> Side:
        rng = self.rng
        style = _draw(rng, STYLES)
        parked = rng.random() < 0.55
        curb = lanes * self.lane + (2.2 if parked else 0.4)
        walk = curb + (rng.uniform(1, 2.5) if rng.random() < (0.2 if style == "city" else 0.5) else 0.15)
        back = walk + rng.uniform(2, 4.2)
        line = back + {"city": 0, "suburb": rng.uniform(3, 6), "park": 28}[style]
        return Side(sign, style, sign * curb, sign * walk, sign * back, sign * line, parked)

    def background(self) -> None:
        """Compute sky and ground per pixel and start the view's canvas with them."""
        rng, view = self.rng, self.view
        shape = (view.height, view.width)
        first = min(int(view.horizon) + 1, view.height - 1)
        ids = np.full(shape, SKY, np.int32)
        colors = np.empty((*shape, 3), np.float32)

        half = ((first + 1) // 2, view.width // 2)  # the sky has no edges: half the resolution does
        up = np.linspace(1, 0, half[0], dtype=np.float32)[:, None, None]
        blue = np.array([rng.uniform(90, 140), rng.uniform(140, 175), rng.uniform(200, 235)])
        haze = np.array(view.haze, np.float32)
        zenith = blue + (haze - blue) * view.overcast
        cloud = sum(_noise(rng, grid, half) / n for n, grid in enumerate([(4, 7), (9, 14), (20, 40)], 1))
        cloud = np.clip(cloud + 0.6 * view.overcast - 0.1, 0, 1)[..., None] * 0.8
        sky = haze + (zenith - haze) * up**0.8
        sky = sky + (np.array((236, 236, 238)) * (1 - 0.2 * view.overcast) - sky) * cloud
        colors[:first] = sky.repeat(2, 0).repeat(2, 1)[:first]

        rows = np.arange(first, view.height, dtype=np.float32)[:, None] + 0.5
        z = view.focal * view.eye / np.maximum(rows - view.horizon, 0.5)
        x = (np.arange(view.width, dtype=np.float32) + 0.5 - view.center) * z / view.focal - view.bend * z * z
        labels, tones, strip, paved = self.strips(x, z)
        ids[first:], ground = labels[strip], np.take(tones, strip, axis=0)

        fade = np.exp(-z / 22)
        grain = 0.14 * fade * self.grain[(z * 60).astype(np.int32) & 511, (x * 60 + 256).astype(np.int32) & 511]
        grain += 0.1 * self.grain[(z * 5).astype(np.int32) & 511, (x * 20 + 256).astype(np.int32) & 511]
        slabs = ((x % rng.uniform(0.5, 1.0) < 0.05) | (z % rng.uniform(0.5, 1.2) < 0.06)) & paved
        ground *= (1 + grain * np.where(ids[first:] == TERRAIN, 2.4, 1) - 0.22 * slabs * fade)[..., None]
        on_road = ids[first:] == ROAD
        painted = on_road & self.markings(x, z)
        ground[painted] += (np.array(WHITE) - ground[painted]) * rng.uniform(0.35, 0.9)
        if self.tram:
            rails = np.any([abs(x + 0.5 * self.lane - a) < 0.05 for a in (-2.3, -0.9, 0.9, 2.3)], axis=0)
            ground[on_road & rails] = (64, 62, 62)
        colors[first:] = haze + (ground - haze) * np.exp(-z / view.visibility)[..., None]
        view.canvas(np.clip(colors, 0, 255).astype(np.uint8), ids)

    def strips(self, x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The strips the ground is made of: labels and colours, which one each pixel is on, whether it is paved."""
        tones = {name: _pick(self.rng, colors, 9) for name, colors in GROUND.items()}
        left, right = self.sides
        edges, strips = [], [(TERRAIN, "grass")]  # from left to right, each to the edge of the same place
        for side, order in ((left, -1), (right, 1)):
            verge = (TERRAIN, "grass") if abs(side.walk - side.curb) > 0.5 else (SIDEWALK, "paving")
            within = [(ROAD, "road"), (SIDEWALK, "kerb"), verge, (SIDEWALK, "paving"), (TERRAIN, "grass")]
            bounds = [side.curb, side.curb + 0.15 * side.sign, side.walk, side.back]
            edges += bounds[::order]
            strips += within[1:] if order > 0 else within[-2::-1]
        strip = sum((x > edge).astype(np.int8) for edge in edges)
        strip[np.broadcast_to((z > self.crossing) & (z < self.crossing + 7), strip.shape)] = 4  # the road
        labels, names = zip(*strips, strict=True)
        paved = np.array([name == "paving" for name in names])[strip]
        return np.array(labels), np.array([tones[name] for name in names], np.float32), strip, paved

    def markings(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Where a road is painted white: lanes, parking bays, and stop line and zebra before a crossing."""
        x, ahead = x + 0.5 * self.lane, self.crossing - z  # x from the middle of the road
        dashes = (z % 9 < 4.5) & ((abs(x - self.lane) < 0.07) | (abs(x + self.lane) < 0.07))
        middle = (abs(x) < 0.07) & ((z % 6 < 3) | (self.rng.random() < 0.4))
        bays = [abs(x - 0.5 * self.lane - side.curb + 2.2 * side.sign) < 0.06 for side in self.sides if side.parked]
        along = np.any([dashes, middle, *bays], axis=0) & ((ahead > 5) | (ahead < -8))
        return along | ((ahead > 1) & (ahead < 4) & (x % 1.0 < 0.5)) | ((ahead > 5) & (ahead < 5.5) & (x > 0))

    def add(self, z: float, painter: Callable, *arguments) -> None:
        self.things.append((z, painter, *arguments))

    def stand(self, painter: Callable, x: float, z: float, *arguments) -> None:
        self.add(z, painter, x, z, *arguments)

    def paint(self) -> None:
        for _, painter, *arguments in sorted(self.things, key=lambda thing: -thing[0]):
            painter(*arguments)
        self.things.clear()

    # ---- what lines the street

    def skyline(self) -> None:
        """Close the end of the street with far houses and trees."""
        rng, x = self.rng, -90.0
        while x < 90:
            width, z = rng.uniform(8, 20), FAR + rng.uniform(0, 20)
            if rng.random() < 0.5:
                top, slope = rng.uniform(5, 15), 0.3 * width
                wall = [(x, 0, z), (x + width, 0, z), (x + width, top, z), (x, top, z)]
                roof = [(x, top, z), (x + width, top, z), (x + width - slope, top + 3, z), (x + slope, top + 3, z)]
                self.view.fill(wall, _pick(rng, PLASTER), BUILDING)
                self.view.fill(roof, _pick(rng, ROOFS), BUILDING)
            else:
                self.foliage(x + width / 2, rng.uniform(4, 5.5), z, width * 0.7, 4.5, _pick(rng, LEAVES))
            x += width * 0.8

    def line_up(self, side: Side) -> None:
        """Plan the houses, gardens and fences of one side, from here to the end of the street."""
        rng, z, corner = self.rng, 1.0, True
        kinds = ("none", *BARRIERS)
        barrier = rng.choice(kinds, p=(0.2, 0.22, 0.32, 0.26))
        while z < FAR:
            end = following = z + rng.uniform(9, 20)
            if self.crossing - 3 < end and z < self.crossing + 7:
                end, following = self.crossing - 2, self.crossing + 9
            if end - z > 4:
                detached = side.style == "suburb" and end - z > 8
                if side.style != "park":
                    stop = end - 3 if detached else end
                    self.add(stop, self.building, side, z, stop, corner or detached)
                if side.style != "city":
                    self.garden(side, z, end, barrier)
            z, corner = following, following != end
            if rng.random() < 0.2:
                barrier = rng.choice(kinds)

    def building(self, side: Side, start: float, end: float, free: bool) -> None:
        """One house: roof, gable, facade, and windows in rows; on the wall towards the camera only if it is free."""
        rng, view, x = self.rng, self.view, side.line
        city, light = side.style == "city", view.side_light(side.sign)
        floors, tall = int(rng.integers(2, 6) if city else rng.integers(1, 4)), rng.uniform(2.8, 3.5)
        depth, top = side.sign * rng.uniform(8, 12), floors * tall + 0.6
        color, glass, frame = _pick(rng, PLASTER), _pick(rng, PANES, 8), _pick(rng, FRAMES)
        shop = frame if rng.random() < 0.7 else SIGN_COLORS["red"]
        ridge, peak = x + depth / 2, top + rng.uniform(1.5, 4)
        roof = [(x, top, start), (x, top, end), (ridge, peak, end), (ridge, peak, start)]
        gable = [(x, 0, start), (x + depth, 0, start), (x + depth, top, start), (ridge, peak, start), (x, top, start)]
        view.fill(roof, _pick(rng, ROOFS), BUILDING, light)
        view.fill(gable, color, BUILDING, 0.94)

        def facade(u, v):
            return x, v, start + u

        def gable_wall(u, v):
            return x + math.copysign(u, depth), v, start

        shops = city and rng.random() < 0.5
        view.panel(facade, (0, end - start, 0, top), color, BUILDING, light)
        for at, length, bright in ((facade, end - start, light), (gable_wall, abs(depth), 0.94))[: 1 + free]:
            columns = max(1, int(length / rng.uniform(1.9, 3.6)))
            step, lit = length / columns, rng.uniform(0.75, 1.25, (floors, columns)).tolist()
            half, sill, head = 0.5 * step * rng.uniform(0.36, 0.62), rng.uniform(0.7, 1.1), rng.uniform(2.2, 2.6)
            view.panel(at, (0, length, 0, 0.6), color, None, 0.75 * bright)
            for floor in range(floors):
                low = floor * tall
                if floor == 0 and shops:
                    view.panel(at, (0.3, length - 0.3, 0.5, 2.5), glass, None, bright)
                    view.panel(at, (0.1, length - 0.1, 2.5, 3.0), shop, None, bright)
                    continue
                if floor:
                    view.panel(at, (0, length, low + 0.1, low + 0.28), color, None, 0.86 * bright)
                for column, shine in enumerate(lit[floor]):
                    door, u = floor == 0 and shine > 1.15, (column + 0.5) * step
                    base = low if door else low + sill
                    if start < 30:  # the frame cannot be seen from farther away
                        around = (u - half - 0.12, u + half + 0.12, base - 0.12, low + head + 0.12)
                        view.panel(at, around, frame, None, bright)
                    tone = frame if door else glass
                    view.panel(at, (u - half, u + half, base, low + head), tone, None, 0.8 * shine if door else shine)
            view.panel(at, (0, length, top - 0.35, top), color, None, 0.8 * bright)

    def garden(self, side: Side, start: float, end: float, kind: str) -> None:
        """Trees behind the pavement and, between both, a barrier in short pieces, so that near things hide far ones."""
        rng, park = self.rng, side.style == "park"
        for _ in range(rng.poisson(4 if park else 1.1)):
            x = side.back + side.sign * rng.uniform(1.5, 14 if park else 3)
            self.stand(self.tree, x, rng.uniform(start, end))
        if kind == "none":
            return
        colors, lowest, highest = BARRIERS[kind]
        look = kind, rng.uniform(lowest, highest), _pick(rng, colors), rng.random() < 0.4
        while start < end:
            stop = min(end, start + (2 if start < 30 else 6))
            self.add(start + 0.5, self.barrier, side, start, stop, *look)
            start = stop

    def barrier(self, side: Side, start: float, end: float, kind: str, high: float, color: Color, solid: bool) -> None:
        """A piece of a wall, fence or hedge; what is seen through a fence that is not solid counts as fence."""
        view, x, light, near = self.view, side.back + side.sign * 0.2, self.view.side_light(side.sign), start < 30

        def at(z, y):
            return x, y, z

        if kind == "hedge":
            view.panel(at, (start, end, 0, high), color, VEGETATION, 0.8 * light)
            if start < 60:
                self.foliage(x, high * 0.55, start, 1.0, high * 0.55, color)
        elif kind == "wall":
            view.panel(at, (start, end, 0, high), color, WALL, light)
            for y in np.arange(0.3, high, 0.3 if near else 0.9).tolist():
                view.panel(at, (start, end, y, y + 0.04), color, None, 0.85 * light)
            view.panel(at, (start, end, high - 0.1, high), color, None, 1.2 * light)
        else:
            flat = [view.pixel(x, y, z) for z, y in ((start, 0), (end, 0), (end, high), (start, high))]
            view.mark.polygon(flat, FENCE)
            view.glaze.polygon(flat, (*view.tint(color, start, light), 255 if solid else 70))
            for y in (0.15, high - 0.08):
                view.panel(at, (start, end, y, y + 0.08), color, None, 0.8 * light)
            for z in np.arange(start, end, 0.3 if near else 1.5).tolist():
                view.panel(at, (z, z + 0.06, 0, high), color, None, 0.75 * light)

    def foliage(self, x: float, y: float, z: float, wide: float, high: float, color: Color) -> None:
        """A crown of leaves: an ellipse of half axes `wide` and `high` metres with a ragged edge, lit from above."""
        view = self.view
        unit, (left, base), (dx, dy) = view.focal / max(z, 0.8), view.pixel(x, y, z), self.rng.integers(160, 350, 2)
        reach, rise = 1.3 * wide * unit, 1.3 * high * unit
        x0, x1 = max(0, int(left - reach)), min(view.width, int(left + reach) + 1)
        y0, y1 = max(0, int(base - rise)), min(view.height, int(base + rise) + 1)
        if x0 >= x1 or y0 >= y1:
            return
        u = (np.arange(x0, x1, dtype=np.float32) - left) / unit  # metres from the middle, to the right
        v = (np.arange(y0, y1, dtype=np.float32) - base)[:, None] / unit  # and down
        spot = (v * 30 + dy).astype(int) & 511, (u * 30 + dx).astype(int) & 511
        mask = Image.fromarray((u / wide) ** 2 + (v / high) ** 2 + 0.9 * self.grain[spot] < 0.85)
        light = 0.5 * self.relief[spot] + (0.88 - 0.22 * (v / high)) - 0.12 * view.sun * (u / wide)
        clear = math.exp(-z / view.visibility)
        shades = np.outer(np.arange(64) * clear / 32, color) + np.multiply(view.haze, 1 - clear)
        shade = np.clip(light * 32, 0, 63).astype(np.uint8)
        leaves = np.take(np.minimum(shades, 255).astype(np.uint8), shade, axis=0)
        view.image.paste(Image.fromarray(leaves), (x0, y0), mask)
        view.ids.paste(VEGETATION, (x0, y0, x1, y1), mask)

    def tree(self, x: float, z: float) -> None:
        rng = self.rng
        high, thick, looks = rng.uniform(4.5, 10), rng.uniform(0.12, 0.25), _looks(rng, VEGETATION, bark=BARKS)
        wide, bare = high * rng.uniform(0.22, 0.36), high * rng.uniform(0.2, 0.35)
        self.cast(x, z, wide, 0.35)
        trunk = ("area", "bark", -thick, 0, thick, 0, 0.7 * thick, 0.6 * high, -0.7 * thick, 0.6 * high)
        boughs = [("limb", "bark", thick, 0, bare, lean * wide, bare + 0.25 * high) for lean in (-0.5, -0.1, 0.45)]
        self.view.figure([trunk, *boughs], (x, 0, z), looks)
        self.foliage(x, (high + bare) / 2 + 0.3, z, wide, (high - bare) / 2, _pick(rng, LEAVES))

    def cast(self, x: float, z: float, reach: float, strength: float) -> None:
        """The shadow of something that stands at (x, z), on the ground away from the sun."""
        x -= 0.6 * reach * self.view.sun
        around = [math.tau * i / 10 for i in range(10)]
        self.view.shadow([(x + reach * math.cos(a), 0, z + 0.5 * reach * math.sin(a)) for a in around], strength)

    # ---- what is on the street

    def vehicle(self, x: float, z: float, name: str, heading: float) -> None:
        """A vehicle with its middle at (x, z); at heading 0 it drives away from the camera, at pi / 2 to the right."""
        rng, view, kind = self.rng, self.view, VEHICLES[name]
        length, width, high = (n * rng.uniform(0.95, 1.05) for n in kind.size)
        sin, cos = math.sin(heading), math.cos(heading)
        ident, body, glass = view.instance(kind.label), _pick(rng, kind.colors), _pick(rng, PANES[:2], 8)

        def at(s: float, q: float, t: float) -> Point:  # fractions: along, across (-1 to 1), up
            across = q * width / 2 * (1 - kind.taper * max(0.0, t - 0.6) / 0.4)
            return x + (s - 0.5) * length * sin + across * cos, t * high, z + (s - 0.5) * length * cos - across * sin

        def across_at(s: float) -> Plane:
            return lambda q, t: at(s, q, t)

        shift = x + view.bend * z * z
        ahead, beside = -shift * sin - z * cos, -shift * cos + z * sin  # the camera, seen from the vehicle
        front, low = ahead > 0, kind.outline[0][1]
        view.shadow([at(s, q, 0) for s, q in ((-0.03, -1.15), (1.03, -1.15), (1.03, 1.15), (-0.03, 1.15))], 0.7)
        view.panel(across_at(0.04), (-0.92, 0.92, 0.05, low + 0.05), TYRE, ident)
        for end in (0.06, 0.94) if front else (0.94, 0.06):
            for q in (-1, 0.72):
                view.panel(across_at(end), (q, q + 0.28, 0, low + 0.1), TYRE, ident)
        edges = list(zip(kind.outline, kind.outline[1:], strict=False))
        for (s, t, role), (s2, t2, _) in edges if front else edges[::-1]:  # the far end first
            corners = [at(s, -1, t), at(s, 1, t), at(s2, 1, t2), at(s2, -1, t2)]
            view.fill(corners, glass if role == "glass" else body, ident, 1.15 if role == "roof" else 0.92)
            if role == "glass":
                view.outline(corners, body)
        if abs(ahead) > length / 2:
            end, lamps = across_at(1 if front else 0), (226, 224, 208) if front else (150, 24, 26)
            for q in (-0.96, 0.66):
                view.panel(end, (q, q + 0.3, low + 0.16, low + 0.26), lamps)
            view.panel(end, (-0.26, 0.26, low + 0.06, low + 0.14), WHITE)
        if abs(beside) > width / 2:
            q = math.copysign(1, beside)
            light = 1 - 0.5 * view.contrast * q * cos * view.sun
            view.fill([at(s, q, t) for s, t, _ in kind.outline], body, ident, light)
            if kind.cab < 1:
                cab = [at(max(s, kind.cab), q, min(t, 0.8)) for s, t, _ in kind.outline[2:]]
                view.fill([*cab, at(kind.cab, q, low)], _pick(rng, PAINTS), None, light)
            for window in kind.windows:
                view.fill([at(s, q, t) for s, t in window], glass, None)
            for s, (radius, tone) in itertools.product(kind.wheels, ((kind.wheel, TYRE), (kind.wheel * 0.55, METAL))):
                turn = [(radius * math.cos(a) / length, radius * math.sin(a) / high) for a in WHEEL]
                view.fill([at(s + u, q, kind.wheel / high + v) for u, v in turn], tone, ident)

    def person(self, x: float, z: float) -> None:
        rng, view = self.rng, self.view
        left, right, arm = -0.07 - rng.uniform(0, 0.32), 0.07 + rng.uniform(0, 0.26), rng.uniform(0.22, 0.42)
        scale, coat = 0.7 if rng.random() < 0.1 else rng.normal(1, 0.05), rng.uniform(0.5, 0.85)
        looks = _looks(rng, view.instance(PERSON), legs=CLOTHES, top=CLOTHES, skin=SKINS, hair=HAIRS, shoe=(TYRE,))
        self.cast(x, z, 0.4, 0.4)
        view.figure((
            ("limb", "legs", 0.15, -0.07, 0.9, left, 0.06), ("limb", "legs", 0.16, 0.07, 0.9, right, 0.04),
            ("box", "shoe", left + 0.04, 0.04, 0.08, 0.04), ("box", "shoe", right + 0.04, 0.04, 0.08, 0.04),
            ("limb", "top", 0.11, -0.2, 1.4, -arm, 0.95), ("limb", "top", 0.11, 0.2, 1.4, arm, 0.95),
            ("disc", "skin", -arm, 0.88, 0.06), ("disc", "skin", arm, 0.88, 0.06),
            ("area", "top", -0.18, coat, 0.18, coat, 0.17, 1.0, 0.24, 1.4, 0.1, 1.5, -0.1, 1.5, -0.24, 1.4, -0.17, 1.0),
            ("box", "skin", 0, 1.52, 0.05, 0.08), ("disc", "hair", 0, 1.66, 0.125), ("disc", "skin", 0.02, 1.62, 0.1),
        ), (x, 0, z), looks, scale, float(rng.choice((-1, 1))) * rng.uniform(0.75, 1))  # fmt: skip

    def two_wheeler(self, x: float, z: float, label: int, ridden: bool) -> None:
        """A bicycle or motorcycle, with or without its rider, more or less turned towards the camera."""
        rng, view = self.rng, self.view
        squeeze = float(rng.choice((-1, 1))) * rng.uniform(0.3, 1)
        looks = _looks(rng, view.instance(label), tyre=(TYRE,), body=PAINTS, metal=STEEL, lamp=(WHITE,))
        self.cast(x, z, 0.7, 0.5)
        view.figure(BICYCLE_PARTS if label == BICYCLE else MOTORCYCLE_PARTS, (x, 0, z), looks, squeeze=squeeze)
        if ridden:
            looks = _looks(rng, view.instance(RIDER), legs=CLOTHES, top=CLOTHES, skin=SKINS, hair=PAINTS)
            view.figure(RIDER_PARTS, (x, 0, z), looks, squeeze=math.copysign(max(abs(squeeze), 0.7), squeeze))

    def lamp_post(self, x: float, z: float, reach: float) -> None:
        high = self.rng.uniform(5, 8)
        parts = (("limb", "pole", 0.14, 0, 0, 0, high), ("limb", "pole", 0.1, 0, high, reach, high + 0.3),
                 ("limb", "pole", 0.2, reach * 0.7, high + 0.25, reach, high + 0.3))  # fmt: skip
        self.view.figure(parts, (x, 0, z), _looks(self.rng, POLE, pole=STEEL))

    def sign(self, x: float, z: float) -> None:
        rng = self.rng
        high, plate, light = rng.uniform(2.1, 2.8), SIGNS[rng.integers(len(SIGNS))], rng.uniform(0.75, 1.1)
        self.view.figure([("limb", "pole", 0.08, 0, 0, 0, high + 0.3)], (x, 0, z), _looks(rng, POLE, pole=STEEL[:1]))
        looks = {name: (tuple(light * c for c in tone), SIGN) for name, tone in SIGN_COLORS.items()}
        self.view.figure(plate, (x, high, z), looks, rng.uniform(0.9, 1.3))

    def traffic_light(self, x: float, z: float, reach: float) -> None:
        rng = self.rng
        high, state = rng.uniform(2.6, 3.4), rng.integers(3)
        poles, heads = [("limb", "pole", 0.12, 0, 0, 0, high)], [(0, high)]
        if rng.random() < 0.4:  # one more hangs over the road
            poles = [("limb", "pole", 0.14, 0, 0, 0, 5.6), ("limb", "pole", 0.1, 0, 5.6, reach, 5.7)]
            heads.append((reach, 5.2))
        looks = _looks(rng, POLE, pole=STEEL) | _looks(rng, LIGHT, box=BOXES, off=((58, 54, 50),))
        looks["on"] = (LAMPS[state], LIGHT)
        for u, v in heads:
            lamps = [("disc", "on" if i == state else "off", u, v + 0.3 * (i - 1), 0.12) for i in range(3)]
            poles += [("box", "box", u, v, 0.18, 0.48), *lamps]
        self.view.figure(poles, (x, 0, z), looks)

    def bin(self, x: float, z: float) -> None:
        parts = ("area", "box", -0.28, 0, 0.28, 0, 0.34, 0.95, -0.34, 0.95), ("box", "lid", 0, 0.98, 0.37, 0.06)
        self.cast(x, z, 0.4, 0.4)
        self.view.figure(parts, (x, 0, z), _looks(self.rng, STATIC, box=BINS, lid=BINS))

    def distance(self, low: float = 7.0, high: float = 60.0) -> float:
        """A random z, more often a near one."""
        return low + (high - low) * self.rng.random() ** 1.5

    def furnish(self, side: Side) -> None:
        """Plan what stands and who walks beside the road."""
        rng, sign = self.rng, side.sign
        at_kerb, inward = side.curb + sign * 0.5, -sign * rng.uniform(1, 2.2)
        if rng.random() < (0.65 if abs(side.walk - side.curb) > 0.5 else 0.28):
            for z in np.arange(rng.uniform(8, 20), 80, rng.uniform(9, 16)).tolist():
                self.stand(self.tree, (side.curb + side.walk) / 2 + sign * 0.3, z)
        for z in np.arange(rng.uniform(8, 22), 110, rng.uniform(20, 30)).tolist():
            self.stand(self.lamp_post, at_kerb, z, inward)
        for painter, mean, x in ((self.sign, 1.4, at_kerb), (self.bin, 0.5, (side.walk + side.back) / 2)):
            for _ in range(rng.poisson(mean)):
                self.stand(painter, x, self.distance())
        corner = self.crossing - 5 if self.crossing < FAR else self.distance(10, 40)
        for z in (corner, corner + 14)[: rng.choice(3, p=(0.45, 0.3, 0.25))]:
            self.stand(self.traffic_light, at_kerb, z, inward)
        for _ in range(rng.poisson(2.2)):  # people walk alone or together
            z = self.distance()
            for _ in range(rng.integers(1, 4)):
                self.stand(self.person, side.walk + (side.back - side.walk) * rng.random(), z + rng.uniform(0, 2))
        for label, chance, most in ((BICYCLE, 0.35, 4), (MOTORCYCLE, 0.12, 2)):
            z = self.distance(7, 35)
            for i in range(rng.integers(1, most + 1) if rng.random() < chance else 0):
                self.stand(self.two_wheeler, at_kerb + sign * 0.4, z + 1.1 * i, label, False)

    def drive(self, side: Side) -> None:
        """Plan what is parked and what drives on one side of the road."""
        rng, sign, heading = self.rng, side.sign, 0.0 if side.sign > 0 else math.pi
        z = rng.uniform(4.5, 12)  # where the next vehicle's near end may be
        while side.parked and z < 75:
            name = _draw(rng, PARKED)
            length = VEHICLES[name].size[0]
            if rng.random() < 0.72 and not self.crossing - 5 - length < z < self.crossing + 9:
                self.stand(self.vehicle, side.curb - sign * 1.1, z + length / 2, name, heading)
            z += length + rng.uniform(1, 3)
        for label, chance in ((BICYCLE, 0.24), (MOTORCYCLE, 0.1)):
            if rng.random() < chance:
                x = side.curb - sign * (3.0 if side.parked else 0.9)
                self.stand(self.two_wheeler, x, self.distance(8, 40), label, True)
        z, lane = rng.uniform(12, 40), 0.0 if sign > 0 else -self.lane
        while z < 110:
            name = _draw(rng, DRIVING)
            length = VEHICLES[name].size[0]
            if rng.random() < 0.5:
                self.stand(self.vehicle, lane + rng.normal(0, 0.2), z + length / 2, name, heading)
            z += length + rng.uniform(5, 25)

    def plan(self) -> None:
        """Plan everything that stands or moves on the street."""
        rng = self.rng
        for side in self.sides:
            self.line_up(side)
            self.furnish(side)
            self.drive(side)
        if self.tram:
            self.stand(self.vehicle, -0.5 * self.lane - 1.6, rng.uniform(24, 50), "tram", math.pi)
        if self.crossing < FAR and rng.random() < 0.4:
            heading = math.copysign(0.5 * math.pi, rng.uniform(-1, 1))
            self.stand(self.vehicle, rng.uniform(-8, 8), self.crossing + 3.5, _draw(rng, CROSSING), heading)


ROUGH = np.full(34, 0.04, np.float32)  # how strong the texture of each label is
ROUGH[[VEGETATION, TERRAIN, BUILDING, WALL, SKY, ROAD]] = 0.22, 0.14, 0.07, 0.09, 0.012, 0.05


def street(rng: Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one scene.

    Args:
        rng: every choice comes from it, so that the same state gives the same scene.
        size: (height, width) in pixels. The choices do not depend on it: another size shows the same street.

    Returns:
        The image (H, W, 3) uint8; label ids (H, W) uint8, of which ids 1 and 4 are void; instance ids (H, W) uint16,
        that is the label id for stuff and label id * 1000 + k for the k-th person, rider or vehicle of its label.
    """
    view = View(rng, size)
    scene = Street(rng, view)
    scene.background()
    scene.skyline()
    scene.plan()
    scene.paint()
    if rng.random() < 0.8:
        bonnet(rng, view)

    ids = np.asarray(view.ids)[::2, ::2]
    labels = np.where(ids >= 1000, ids // 1000, ids).astype(np.uint8)
    image = np.asarray(view.image.reduce(2), np.float32)
    texture = 0.6 * _noise(rng, (96, 192), size) + 0.6 * _noise(rng, (24, 48), size)
    light = rng.normal(1, 0.09) * (1 + 0.06 * _noise(rng, (3, 4), size))
    warmth = rng.normal(0, 0.04)
    image *= ((1 + ROUGH[labels] * texture) * light)[..., None] * np.array([1 + warmth, 1, 1 - warmth], np.float32)
    image += rng.uniform(2, 6) * rng.standard_normal(image.shape, np.float32)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), labels, ids.astype(np.uint16)


def bonnet(rng: Generator, view: View) -> None:
    """The front of the camera's own car, along the lower edge."""
    top, color = rng.uniform(0.9, 0.96) * view.height, _pick(rng, ((40, 42, 46), (120, 122, 126), (70, 76, 90)))
    for step in range(6):
        y = top + step * 0.012 * view.height
        box = (-0.15 * view.width, y, 1.15 * view.width, y + 0.6 * view.height)
        view.draw.ellipse(box, tuple(int(c * (1.25 - 0.12 * step)) for c in color))
        view.mark.ellipse(box, EGO)


def make_streets(
    root: str | Path,
    train: int = 128,
    val: int = 32,
    size: tuple[int, int] = (128, 256),
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> Path:
    """Write a set of street scenes in the folder layout of Cityscapes.

    Args:
        root: folder to make; it gets `leftImg8bit/SPLIT/CITY/*.png` and `gtFine/SPLIT/CITY/*.png`. It appears whole,
            when everything is written, or not at all; a killed run may leave `.NAME.partial-PID` beside it.
        train, val: number of scenes per split. A scene depends on `seed`, its split and its index only.
        size: (height, width) in pixels.
        seed: of all random choices, 0 or more.
        progress: wraps the list of scenes that is worked through, as `tqdm` does.

    Returns:
        `root` as a path.

    Raises:
        UserError: `root` exists and is not an empty folder, or a number is out of range.
    """
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root}: exists and is not an empty folder; name a new folder or remove this one")
    if min(train, val, seed) < 0 or min(size) < 32:
        raise UserError(f"train={train}, val={val}, seed={seed} must be 0 or more, size={tuple(size)} 32 x 32 or more")
    part = root.absolute().with_name(f".{root.absolute().name}.partial-{os.getpid()}")
    jobs = [(0, "train", index) for index in range(train)] + [(1, "val", index) for index in range(val)]
    try:
        for number, split, index in progress(jobs) if progress else jobs:
            cities = SPLITS[split]
            city = cities[index % len(cities)]
            stem = f"{city}_{index // len(cities):06d}_000019"
            image, labels, instances = street(np.random.default_rng([seed, number, index]), size)
            for folder, suffix, array in (
                ("leftImg8bit", "leftImg8bit", image),
                ("gtFine", "gtFine_labelIds", labels),
                ("gtFine", "gtFine_instanceIds", instances),
            ):
                path = part / folder / split / city / f"{stem}_{suffix}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path, compress_level=1)
        part.mkdir(parents=True, exist_ok=True)
        if root.exists():
            root.rmdir()
        part.rename(root)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return root
