"""Procedural street scenes in the Cityscapes layout: data for a demonstration or a test, without any download.

A scene is planned in metres, here; `street_view` says how it is painted, `street_things` and `street_parts` of what.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image

from agcseg.data import street_parts as parts
from agcseg.data import street_things as things
from agcseg.data.street_view import View, grain, noise
from agcseg.errors import UserError

CITIES = {"train": ("ashford", "brixen"), "val": ("corvey",)}
FAR = 130.0  # metres to the end of the street
STYLES = "city", "city", "city", "suburb", "suburb", "park"
BARRIERS = "none", "wall", "wall", "fence", "fence", "fence", "hedge", "hedge"
GROUND = "road", "kerb", "grass", "paving", "grass"  # outwards
GROUND_LABELS = parts.ROAD, parts.SIDEWALK, parts.TERRAIN, parts.SIDEWALK, parts.TERRAIN


class Side(NamedTuple):
    """What lies along one side of the street, all in metres; `sign` is -1 on the left."""

    sign: int
    style: str
    curb: float  # x where the road ends
    walk: float  # x where the pavement begins, behind the verge if there is one
    back: float  # x where the pavement ends
    line: float  # x of the facades
    parked: bool


class Street:
    """The plan of a scene: the ground and what stands or moves on it."""

    def __init__(self, view: View):
        self.view, self.rng, rng = view, view.rng, view.rng
        self.lane = rng.uniform(3.0, 3.7)
        self.tram = rng.random() < 0.15
        self.crossing = rng.uniform(14, 60) if rng.random() < 0.45 else math.inf  # z of a street across
        self.sides = [self._side(sign, lanes + (rng.random() < 0.3)) for sign, lanes in ((-1, 1.5), (1, 0.5))]
        self.things: list[tuple] = []  # (z, painter, x, arguments)

    def _side(self, sign: int, lanes: float) -> Side:
        rng = self.rng
        style, parked = self.view.one(STYLES), rng.random() < 0.55
        curb = lanes * self.lane + (2.2 if parked else 0.4)
        walk = curb + (rng.uniform(1, 2.5) if rng.random() < (0.2 if style == "city" else 0.5) else 0.15)
        back = walk + rng.uniform(2, 4.2)
        line = back + {"city": 0, "suburb": rng.uniform(3, 6), "park": 28}[style]
        return Side(sign, style, sign * curb, sign * walk, sign * back, sign * line, parked)

    def background(self) -> None:
        """Compute sky and ground per pixel and start the view's canvas with them."""
        view, haze = self.view, np.array(self.view.haze, np.float32)
        ids = np.full((view.height, view.width), parts.SKY, np.int32)
        colors = np.empty((view.height, view.width, 3), np.uint8)
        first = min(int(view.horizon) + 1, view.height - 1)  # row of the ground
        colors[:first] = np.asarray(self.sky().resize((view.width, first), Image.Resampling.BICUBIC))
        rows = np.arange(first, view.height, dtype=np.float32)[:, None] + 0.5
        z = view.focal * view.eye / np.maximum(rows - view.horizon, 0.5)
        x = (np.arange(view.width, dtype=np.float32) + 0.5 - view.center) * z / view.focal - view.bend * z * z
        strip, ground = self.ground(x, z)
        ids[first:] = np.take(GROUND_LABELS, strip)
        colors[first:] = np.clip(haze + (ground - haze) * np.exp(-z / view.visibility)[..., None], 0, 255)
        view.canvas(colors, ids)

    def sky(self) -> Image.Image:
        """A small picture of the sky; it has no edges."""
        rng, size, haze = self.rng, (48, 96), np.array(self.view.haze)
        overcast, up = rng.uniform(), np.linspace(1, 0, size[0])[:, None, None]
        blue = rng.uniform((90, 140, 200), (140, 175, 235))
        cloud = sum(noise(rng, grid, size) / n for n, grid in enumerate([(4, 7), (9, 14), (20, 40)], 1))
        cloud = np.clip(cloud + 0.6 * overcast - 0.1, 0, 1)[..., None] * 0.8
        sky = haze + (blue - haze) * (1 - overcast) * up**0.8
        return Image.fromarray((sky + (237 * (1 - 0.2 * overcast) - sky) * cloud).astype(np.uint8))

    def ground(self, x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ground where the pixels see it: which strip along the street it is, by its place in GROUND, and colours.

        x (H, W) and z (H, 1) are in metres.
        """
        rng, rough, fade = self.rng, grain()[0], np.exp(-z / 22)
        strip = np.zeros(x.shape, np.int8)
        for side in self.sides:
            for edge in (side.curb, side.curb + 0.15 * side.sign, side.walk, side.back):
                strip += x * side.sign > edge * side.sign
        strip[((z > self.crossing) & (z < self.crossing + 7))[:, 0]] = 0
        ground = np.array([self.view.pick(name, 9) for name in GROUND], np.float32).take(strip, 0)

        fine, coarse = (
            rough.take(((along * z).astype(int) % 512) * 512 + ((across * x + 9999).astype(int) & 511))
            for along, across in ((60, 60), (5, 20))
        )
        joints = ((np.cos(x * rng.uniform(6, 12)) > 0.98) | (np.cos(z * rng.uniform(5, 12)) > 0.98)) & (strip == 3)
        ground *= (1 + (0.14 * fade * fine + 0.1 * coarse) - 0.22 * joints * fade)[..., None]
        painted = (strip == 0) & self.markings(x, z)
        ground[painted] += (np.array(parts.WHITE) - ground[painted]) * rng.uniform(0.35, 0.9)
        if self.tram:
            rails = abs(abs(abs(x + 0.5 * self.lane) - 1.6) - 0.7) < 0.05  # two tracks
            ground[(strip == 0) & rails] = (64, 62, 62)
        return strip, ground

    def markings(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Where a road is painted white: lanes, parking bays, and stop line and zebra before a crossing."""
        x, ahead = x + 0.5 * self.lane, self.crossing - z  # x from the middle of the road
        dashes = (z % 9 < 4.5) & (abs(abs(x) - self.lane) < 0.07)
        middle = (abs(x) < 0.07) & ((z % 6 < 3) | (self.rng.random() < 0.4))
        bays = [abs(x - 0.5 * self.lane - side.curb + 2.2 * side.sign) < 0.06 for side in self.sides if side.parked]
        along = np.any([dashes, middle, *bays], axis=0) & ((ahead > 5) | (ahead < -8))
        zebra = (ahead > 1) & (ahead < 4) & (np.sin(math.tau * x) > 0)
        return along | zebra | ((ahead > 5) & (ahead < 5.5) & (x > 0))

    def stand(self, painter: Callable, x: float, z: float, *arguments) -> None:
        """Plan a thing at (x, z)."""
        self.things.append((z, painter, x, arguments))

    def line_up(self, side: Side) -> None:
        """Plan the houses and gardens of one side, from here to the end of the street."""
        rng, z, corner, kind = self.rng, 1.0, True, self.view.one(BARRIERS)
        while z < FAR:
            end = following = z + rng.uniform(9, 20)
            if self.crossing - 3 < end and z < self.crossing + 7:
                end, following = self.crossing - 2, self.crossing + 9
            if end - z > 4:
                detached = side.style == "suburb" and end - z > 8
                if side.style != "park":
                    length, city = end - z - 3 * detached, side.style == "city"
                    self.stand(things.building, side.line, z + length, length, side.sign, city, corner or detached)
                if side.style != "city":
                    self.garden(side, z, end, kind)
            z, corner = following, following != end
            if rng.random() < 0.2:
                kind = self.view.one(BARRIERS)

    def garden(self, side: Side, start: float, end: float, kind: str) -> None:
        """Trees behind the pavement and, between both, a barrier in short pieces, so that near things hide far ones."""
        rng, park = self.rng, side.style == "park"
        for _ in range(rng.poisson(4 if park else 1.1)):
            x = side.back + side.sign * rng.uniform(1.5, 14 if park else 3)
            self.stand(things.tree, x, rng.uniform(start, end))
        if kind != "none":
            look = side.sign, kind, rng.uniform(0.9, 2), self.view.pick(kind)
            for z in np.arange(start, end, 2).tolist():
                self.stand(things.barrier, side.back + side.sign * 0.2, z, min(end, z + 2), *look)

    def distance(self, low: float = 7.0, high: float = 60.0) -> float:
        """A random z, more often a near one."""
        return low + (high - low) * self.rng.random() ** 1.5

    def furnish(self, side: Side) -> None:
        """Plan what stands and who walks beside the road."""
        rng = self.rng
        at_kerb, inward = side.curb + side.sign * 0.5, -side.sign * rng.uniform(1, 2.2)
        if rng.random() < (0.65 if abs(side.walk - side.curb) > 0.5 else 0.28):
            for z in np.arange(rng.uniform(8, 20), 80, rng.uniform(9, 16)).tolist():
                self.stand(things.tree, (side.curb + side.walk) / 2 + side.sign * 0.3, z)
        for z in np.arange(rng.uniform(8, 22), 110, rng.uniform(20, 30)).tolist():
            self.stand(things.lamp_post, at_kerb, z, inward)
        for _ in range(rng.poisson(1.4)):
            self.stand(things.sign, at_kerb, self.distance())
        corner = self.crossing - 5 if self.crossing < FAR else self.distance(10, 40)
        for z in (corner, corner + 14)[: self.view.one((0, 0, 1, 2))]:
            self.stand(things.traffic_light, at_kerb, z, inward)
        for _ in range(rng.poisson(2.2)):  # people walk alone or together
            z = self.distance()
            for _ in range(rng.integers(1, 4)):
                self.stand(
                    things.person,
                    rng.uniform(min(side.walk, side.back), max(side.walk, side.back)),
                    z + rng.uniform(0, 2),
                )
        for label, chance, most in ((parts.BICYCLE, 0.35, 4), (parts.MOTORCYCLE, 0.12, 2)):
            z = self.distance(7, 35)
            for i in range(rng.integers(1, most + 1) if rng.random() < chance else 0):
                self.stand(things.two_wheeler, at_kerb + side.sign * 0.4, z + 1.1 * i, label, False)

    def drive(self, side: Side) -> None:
        """Plan what is parked and what drives on one side of the road."""
        rng, heading = self.rng, 0.0 if side.sign > 0 else math.pi
        parked = parts.PARKED, side.curb - side.sign * 1.1, rng.uniform(4.5, 12), 75, 0.72, (1, 3)
        driving = parts.DRIVING, min(0.0, side.sign * self.lane), rng.uniform(12, 40), 110, 0.5, (5, 25)
        for kinds, x, z, last, chance, gap in (parked, driving)[not side.parked :]:
            while z < last:
                name = self.view.one(kinds)
                length = parts.VEHICLES[name].size[0]
                if rng.random() < chance and not self.crossing - 5 - length < z < self.crossing + 9:
                    self.stand(things.vehicle, x + rng.normal(0, 0.15), z + length / 2, name, heading)
                z += length + rng.uniform(*gap)
        for label, chance in ((parts.BICYCLE, 0.24), (parts.MOTORCYCLE, 0.1)):
            if rng.random() < chance:
                x = side.curb - side.sign * (3.0 if side.parked else 0.9)
                self.stand(things.two_wheeler, x, self.distance(8, 40), label, True)

    def paint(self) -> None:
        """Plan everything and paint it, far to near."""
        self.background()
        things.skyline(self.view, FAR)
        for side in self.sides:
            self.line_up(side)
            self.furnish(side)
            self.drive(side)
        if self.tram:
            self.stand(things.vehicle, -0.5 * self.lane - 1.6, self.rng.uniform(24, 50), "tram", math.pi)
        if self.crossing < FAR and self.rng.random() < 0.4:
            heading, x = self.view.one((-1, 1)) * math.pi / 2, self.rng.uniform(-8, 8)
            self.stand(things.vehicle, x, self.crossing + 3.5, self.view.one(parts.DRIVING), heading)
        for z, painter, x, arguments in sorted(self.things, key=lambda thing: -thing[0]):
            painter(self.view, x, z, *arguments)
        if self.rng.random() < 0.8:
            things.bonnet(self.view)


def street(rng: Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one scene.

    Args:
        rng: every choice comes from it, so that the same state gives the same scene.
        size: (height, width) in pixels. The choices do not depend on it: another size shows the same street.

    Returns:
        The image (H, W, 3) uint8; label ids (H, W) uint8, of which id 1 is void; instance ids (H, W) uint16,
        that is the label id for stuff and label id * 1000 + k for the k-th person, rider or vehicle of its label.
    """
    view = View(rng, size)
    Street(view).paint()
    ids = np.asarray(view.ids)[::2, ::2]
    labels = np.where(ids >= 1000, ids // 1000, ids).astype(np.uint8)
    image = np.asarray(view.image.reduce(2), np.float32)
    texture = 0.04 * (noise(rng, (96, 192), size) + noise(rng, (24, 48), size)) * (labels != parts.SKY)
    light, warmth = rng.normal(1, 0.09) * (1 + 0.06 * noise(rng, (3, 4), size)), rng.normal(0, 0.04)
    image *= ((1 + texture) * light)[..., None] * np.array([1 + warmth, 1, 1 - warmth], np.float32)
    image += rng.uniform(2, 6) * rng.standard_normal(image.shape, np.float32)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), labels, ids.astype(np.uint16)


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
            cities = CITIES[split]
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
