"""How street scenes are painted: the camera, the light and the two pictures, one of colours and one of ids.

A scene is a small world in metres: x to the right of the camera, y up from the ground, z ahead. Things are painted far
to near as flat polygons seen through a pinhole camera. Each polygon goes into two pictures with the same coordinates,
both at twice the final size: one of colours, which is averaged down and so has smooth edges, and one of ids, of which
every second pixel is kept and so stays exact.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache, reduce
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from agcseg.data.street_parts import COLORS, VEGETATION

Color = tuple[float, float, float]
Point = tuple[float, float, float]
Plane = tuple[float, float, float, float]  # an upright plane: x and z of its origin and of one step along it
CIRCLE = [(math.cos(math.tau * i / 12), math.sin(math.tau * i / 12)) for i in range(12)]


def noise(rng: Generator, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Smooth noise of `size`, about -1 to 1, from a coarse grid that does not depend on it."""
    coarse = Image.fromarray(rng.uniform(-1, 1, grid).astype(np.float32))
    return np.asarray(coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC))


@cache
def grain() -> tuple[np.ndarray, np.ndarray]:
    """A patch of (512, 512) noise of all sizes, the same in every scene, and how it looks lit from above."""
    rng = np.random.default_rng(0)
    layers = (noise(rng, (n, n), (512, 512)) / k for k, n in enumerate((12, 28, 64, 140, 300), 2))
    rough = reduce(np.add, layers)
    return rough, rough - np.roll(rough, (-7, -4), (0, 1))


class View:
    """The camera, the light and the two pictures that are painted; every random choice of a scene comes from `rng`."""

    def __init__(self, rng: Generator, size: tuple[int, int]):
        self.rng = rng
        self.height, self.width = 2 * size[0], 2 * size[1]
        self.focal = rng.uniform(1.5, 1.8) * self.height
        self.eye = rng.uniform(1.3, 1.7)  # metres above the ground
        self.horizon = rng.uniform(0.42, 0.5) * self.height
        self.center = rng.uniform(0.42, 0.58) * self.width
        self.bend = rng.normal(0, 3e-4)  # the street bends sideways by bend * z^2
        self.sun = self.one((-1, 1))  # the side whose facades are in the shade
        self.contrast = rng.uniform(0.05, 0.3)  # of sun against shade; small under clouds
        grey = rng.uniform(180, 225)
        self.haze = (grey, grey * rng.uniform(1.0, 1.03), grey * rng.uniform(1.0, 1.1))
        self.visibility = rng.uniform(120, 700)  # metres
        self.counts: Counter[int] = Counter()

    def canvas(self, colors: np.ndarray, ids: np.ndarray) -> None:
        """Start painting over a picture (H, W, 3) uint8 and its ids (H, W) int32."""
        self.image, self.ids = Image.fromarray(colors), Image.fromarray(ids)
        self.draw, self.mark = ImageDraw.Draw(self.image), ImageDraw.Draw(self.ids)
        self.glaze = ImageDraw.Draw(self.image, "RGBA")

    def instance(self, label: int) -> int:
        """The id of one more thing of this label."""
        self.counts[label] += 1
        return label * 1000 + self.counts[label] - 1

    def one(self, options: Sequence) -> Any:
        """Any one of the options."""
        return options[int(self.rng.random() * len(options))]

    def pick(self, material: str, spread: float = 14) -> Color:
        """One of the colours of a material, a little different each time."""
        (r, g, b), (shift, *own) = self.one(COLORS[material]), self.rng.normal(0, spread, 4).tolist()
        r, g, b = r + shift + own[0] / 3, g + shift + own[1] / 3, b + shift + own[2] / 3
        return min(245.0, max(8.0, r)), min(245.0, max(8.0, g)), min(245.0, max(8.0, b))

    def tint(self, color: Color, z: float, light: float = 1.0) -> tuple[int, int, int]:
        """The colour as seen from z metres away."""
        clear = math.exp(-z / self.visibility)
        light, fog = light * clear, 1 - clear
        (r, g, b), (hr, hg, hb) = color, self.haze
        r, g, b = int(r * light + hr * fog), int(g * light + hg * fog), int(b * light + hb * fog)
        return min(255, r), min(255, g), min(255, b)

    def side_light(self, side: float) -> float:
        """Light on a wall that faces x = -side."""
        return 1 + self.contrast * side * self.sun

    def foot(self, x: float, z: float) -> tuple[float, float]:
        """The column of the picture in which something is, and the pixels of a metre there."""
        z = 0.8 if z < 0.8 else z
        scale = self.focal / z
        return self.center + (x + self.bend * z * z) * scale, scale

    def pixel(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Where in the picture a point is."""
        column, scale = self.foot(x, z)
        return column, self.horizon + (self.eye - y) * scale

    def polygon(self, flat: list[tuple[float, float]], color: tuple[int, int, int], ident: int | None) -> None:
        """Paint a polygon of the picture; `ident` None leaves the ids as they are."""
        self.draw.polygon(flat, color)
        if ident is not None:
            self.mark.polygon(flat, ident)

    def fill(self, corners: list[Point], color: Color, ident: int | None, light: float = 1.0) -> None:
        """Paint a polygon of the world."""
        flat = [self.pixel(*corner) for corner in corners]
        if max(flat)[0] > 0 and min(flat)[0] < self.width:
            self.polygon(flat, self.tint(color, corners[0][2], light), ident)

    def panel(self, plane: Plane, span: tuple, color: Color, ident: int | None = None, light: float = 1.0) -> None:
        """Paint the rectangle (left, right, low, high) of an upright plane."""
        (x, z, dx, dz), (left, right, low, high) = plane, span
        (a, near), (b, far) = self.foot(x + dx * left, z + dz * left), self.foot(x + dx * right, z + dz * right)
        if max(a, b) > 0 and min(a, b) < self.width:
            low, high, y = self.eye - low, self.eye - high, self.horizon
            flat = [(a, y + low * near), (b, y + low * far), (b, y + high * far), (a, y + high * near)]
            self.polygon(flat, self.tint(color, z + dz * left, light), ident)

    def shadow(self, corners: Iterable[Point], strength: float) -> None:
        """Darken the ground inside the corners; the strength is that of full sun."""
        ink = (16, 18, 26, int(255 * min(1.0, strength * (0.5 + 1.8 * self.contrast))))
        self.glaze.polygon([self.pixel(*corner) for corner in corners], ink)

    def cast(self, x: float, z: float, reach: float) -> None:
        """The shadow of something that stands at (x, z), on the ground away from the sun."""
        x -= 0.6 * reach * self.sun
        self.shadow([(x + reach * u, 0, z + 0.5 * reach * v) for u, v in CIRCLE], 0.4)

    def figure(self, parts: Iterable[tuple], at: Point, ident: int, scale: float = 1.0, squeeze: float = 1.0) -> None:
        """Paint a flat figure that faces the camera; `squeeze` scales the width, below 0 it turns the figure round."""
        unit, colors = scale * self.focal / max(at[2], 0.8), {}
        left, base = self.pixel(*at)
        for shape, material, *numbers in parts:
            if material not in colors:
                colors[material] = self.tint(self.pick(material), at[2])
            color = colors[material]
            if shape in ("disc", "ring"):
                u, v, r = (n * unit for n in numbers)
                x, y, half = left + u * squeeze, base - v, max(0.5, r * abs(squeeze))
                box = (x - half, y - r, x + half, y + r)
                self.mark.ellipse(box, ident)  # of a ring too: what is seen between the spokes counts as wheel
                self.draw.ellipse(box, color if shape == "disc" else None, color, max(1, round(0.06 * unit)))
                continue
            thick = numbers.pop(0) if shape == "limb" else 0
            flat = [(left + u * squeeze * unit, base - v * unit) for u, v in zip(*[iter(numbers)] * 2, strict=True)]
            if thick:
                self.draw.line(flat, color, max(1, round(thick * unit)))
                self.mark.line(flat, ident, max(1, round(thick * unit)))
            else:
                self.polygon(flat, color, ident)

    def foliage(self, x: float, y: float, z: float, wide: float, high: float, color: Color) -> None:
        """A crown of leaves: an ellipse of half axes `wide` and `high` metres with a ragged edge, lit from above."""
        unit, (left, base), (dx, dy) = self.focal / max(z, 0.8), self.pixel(x, y, z), self.rng.integers(160, 350, 2)
        reach, rise = 1.3 * wide * unit, 1.3 * high * unit
        x0, x1 = max(0, int(left - reach)), min(self.width, int(left + reach) + 1)
        y0, y1 = max(0, int(base - rise)), min(self.height, int(base + rise) + 1)
        if x0 >= x1 or y0 >= y1:
            return
        u = (np.arange(x0, x1, dtype=np.float32) - left) / unit  # metres from the middle, to the right
        v = (np.arange(y0, y1, dtype=np.float32) - base) / unit  # and down
        rows, columns = (v * 30 + dy).astype(int) & 511, (u * 30 + dx).astype(int) & 511
        rough, relief = (patch.take(rows, 0).take(columns, 1) for patch in grain())
        u, v = u / wide, v[:, None] / high
        mask = Image.fromarray(u**2 + v**2 < 0.85 - 0.9 * rough)
        light = np.clip(16 * relief + (28.2 - 7 * v) - 3.8 * self.sun * u, 0, 63)
        leaves = Image.fromarray(light.astype(np.uint8))
        clear = math.exp(-z / self.visibility)
        shades = np.outer(np.arange(64) * clear / 32, color) + np.multiply(self.haze, 1 - clear)
        leaves.putpalette(np.minimum(shades, 255).astype(np.uint8).tobytes())
        self.image.paste(leaves, (x0, y0), mask)
        self.ids.paste(VEGETATION, (x0, y0, x1, y1), mask)
