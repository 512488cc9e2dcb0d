"""Painters of what street scenes hold, one function for each kind of thing; each takes the view and a place."""

import math

import numpy as np

from agcseg.data import street_parts as parts
from agcseg.data.street_view import CIRCLE, Color, Plane, Point, View


def building(view: View, x: float, end: float, length: float, sign: int, city: bool, free: bool) -> None:
    """One house with its facade at x; the wall towards the camera has windows only if it is free."""
    rng, light, start = view.rng, view.side_light(sign), end - length
    floors, tall = view.one((2, 3, 4, 5) if city else (1, 2, 3)), rng.uniform(2.8, 3.5)
    depth, top, color = rng.uniform(8, 12), floors * tall + 0.6, view.pick("plaster")
    back, ridge, peak = x + sign * depth, x + sign * depth / 2, top + rng.uniform(1.5, 4)
    roof = [(x, top, start), (x, top, end), (ridge, peak, end), (ridge, peak, start)]
    gable = [(x, 0, start), (back, 0, start), (back, top, start), (ridge, peak, start), (x, top, start)]
    facade, wall = (x, start, 0, 1), (x, start, sign, 0)
    view.fill(roof, view.pick("roof"), parts.BUILDING, light)
    view.fill(gable, color, parts.BUILDING, 0.94)
    view.panel(facade, (0, length, 0, top), color, parts.BUILDING, light)
    glass, frame = view.pick("pane", 8), view.pick("frame")
    shop = None if not city or rng.random() < 0.5 else frame if rng.random() < 0.7 else view.pick("red")
    for plane, wide, bright in ((facade, length, light), (wall, depth, 0.94))[: 1 + free]:
        view.panel(plane, (0, wide, 0, 0.6), color, None, 0.75 * bright)
        view.panel(plane, (0, wide, top - 0.35, top), color, None, 0.8 * bright)
        if shop:
            view.panel(plane, (0.3, wide - 0.3, 0.5, 2.5), glass, None, bright)
            view.panel(plane, (0.1, wide - 0.1, 2.5, 3.0), shop, None, bright)
        for floor in range(1, floors):
            view.panel(plane, (0, wide, floor * tall + 0.1, floor * tall + 0.28), color, None, 0.86 * bright)
        columns = max(1, int(wide / rng.uniform(1.9, 3.6)))
        step, lit = wide / columns, rng.uniform(0.75, 1.25, (floors, columns)).tolist()
        half, sill, head = 0.5 * step * rng.uniform(0.36, 0.62), rng.uniform(0.7, 1.1), rng.uniform(2.2, 2.6)
        for floor in range(1 if shop else 0, floors):
            for column, shine in enumerate(lit[floor]):
                door, u, low = floor == 0 and shine > 1.15, (column + 0.5) * step, floor * tall
                base, high = low if door else low + sill, low + head
                if start < 30:  # the frame cannot be seen from farther away
                    around = (u - half - 0.12, u + half + 0.12, base - 0.12, high + 0.12)
                    view.panel(plane, around, frame, None, bright)
                tone, shine = (frame, 0.8 * shine) if door else (glass, shine)
                view.panel(plane, (u - half, u + half, base, high), tone, None, shine)


def barrier(view: View, x: float, start: float, end: float, sign: int, kind: str, high: float, color: Color) -> None:
    """A piece of a wall, fence or hedge; what is seen through a fence counts as fence."""
    plane, light, near = (x, 0, 0, 1), view.side_light(sign), start < 30
    if kind == "hedge":
        view.panel(plane, (start, end, 0, high), color, parts.VEGETATION, 0.8 * light)
        if start < 40:
            view.foliage(x, high * 0.55, start, 1.0, high * 0.55, color)
    elif kind == "wall":
        view.panel(plane, (start, end, 0, high), color, parts.WALL, light)
        for y in np.arange(0.3, high, 0.3 if near else 0.9).tolist():
            view.panel(plane, (start, end, y, y + 0.04), color, None, 0.85 * light)
        view.panel(plane, (start, end, high - 0.1, high), color, None, 1.2 * light)
    else:
        flat = [view.pixel(x, y, z) for z, y in ((start, 0), (end, 0), (end, high), (start, high))]
        view.mark.polygon(flat, parts.FENCE)
        view.glaze.polygon(flat, (*view.tint(color, start, light), 90))
        for y in (0.15, high - 0.08):
            view.panel(plane, (start, end, y, y + 0.08), color, None, 0.8 * light)
        for z in np.arange(start, end, 0.3 if near else 1.5).tolist():
            view.panel(plane, (z, z + 0.06, 0, high), color, None, 0.75 * light)


def tree(view: View, x: float, z: float) -> None:
    """A tree: trunk, boughs and one crown."""
    rng = view.rng
    high, thick = rng.uniform(4.5, 10), rng.uniform(0.12, 0.25)
    wide, bare = high * rng.uniform(0.22, 0.36), high * rng.uniform(0.2, 0.35)
    view.cast(x, z, wide)
    trunk = ("area", "bark", -thick, 0, thick, 0, 0.7 * thick, 0.6 * high, -0.7 * thick, 0.6 * high)
    boughs = [("limb", "bark", thick, 0, bare, lean * wide, bare + 0.25 * high) for lean in (-0.5, -0.1, 0.45)]
    view.figure([trunk, *boughs], (x, 0, z), parts.VEGETATION)
    view.foliage(x, (high + bare) / 2 + 0.3, z, wide, (high - bare) / 2, view.pick("leaves"))


def skyline(view: View, far: float) -> None:
    """Close the end of the street, `far` metres away, with houses and trees."""
    rng, x = view.rng, -90.0
    while x < 90:
        width, z, top = rng.uniform(8, 20), far + rng.uniform(0, 20), rng.uniform(5, 15)
        if rng.random() < 0.5:
            roof = [(x + u * width, top + v, z) for u, v in ((0, 0), (1, 0), (0.7, 3), (0.3, 3))]
            view.panel((x, z, 1, 0), (0, width, 0, top), view.pick("plaster"), parts.BUILDING)
            view.fill(roof, view.pick("roof"), parts.BUILDING)
        else:
            view.foliage(x + width / 2, 4.5, z, width * 0.7, 4.5, view.pick("leaves"))
        x += width * 0.8


def vehicle(view: View, x: float, z: float, name: str, heading: float) -> None:
    """A vehicle with its middle at (x, z); at heading 0 it drives away from the camera, at pi / 2 to the right."""
    kind = parts.VEHICLES[name]
    length, width, high = (n * view.rng.uniform(0.95, 1.05) for n in kind.size)
    sin, cos = math.sin(heading), math.cos(heading)
    ident, body, glass = view.instance(kind.label), view.pick(kind.color), view.pick("glass", 8)

    def at(s: float, q: float, t: float) -> Point:  # fractions: along, across (-1 to 1), up
        along, across = (s - 0.5) * length, q * width / 2 * (1 - kind.taper * max(0.0, t - 0.6) / 0.4)
        return x + along * sin + across * cos, t * high, z + along * cos - across * sin

    def across_at(s: float) -> Plane:  # from its middle line; a step is half the width
        middle, _, ahead = at(s, 0, 0)
        return middle, ahead, cos * width / 2, -sin * width / 2

    shift = x + view.bend * z * z
    ahead, beside = -shift * sin - z * cos, -shift * cos + z * sin  # the camera, seen from the vehicle
    front, low = ahead > 0, kind.outline[0][1] * high
    view.shadow([at(s, q, 0) for s, q in ((-0.03, -1.15), (1.03, -1.15), (1.03, 1.15), (-0.03, 1.15))], 0.7)
    view.panel(across_at(0.04), (-0.92, 0.92, 0.05, low + 0.05), parts.TYRE, ident)
    for end in (0.06, 0.94) if front else (0.94, 0.06):
        for q in (-1, 0.72):
            view.panel(across_at(end), (q, q + 0.28, 0, low + 0.1), parts.TYRE, ident)
    edges = list(enumerate(zip(kind.outline, kind.outline[1:], strict=False)))
    for i, ((s, t), (s2, t2)) in edges if front else edges[::-1]:  # the far end first
        light = 1.15 if min(t, t2) > 0.9 else 0.92  # on the roof and elsewhere
        for q, tone in ((1, body), (0.88, glass))[: 1 + (i in kind.glass)]:
            view.fill([at(s, -q, t), at(s, q, t), at(s2, q, t2), at(s2, -q, t2)], tone, ident, light)
    if abs(ahead) > length / 2:
        end, lamps = across_at(1 if front else 0), (226, 224, 208) if front else (150, 24, 26)
        for q in (-0.96, 0.66):
            view.panel(end, (q, q + 0.3, low + 0.16 * high, low + 0.26 * high), lamps)
        view.panel(end, (-0.26, 0.26, low + 0.06 * high, low + 0.14 * high), parts.WHITE)
    if abs(beside) > width / 2:
        q = math.copysign(1, beside)
        view.fill([at(s, q, t) for s, t in kind.outline], body, ident, view.side_light(-0.5 * q * cos))
        for window in kind.windows:
            view.fill([at(s, q, t) for s, t in window], glass, None)
        for s in kind.wheels:
            for r, tone in ((kind.radius, parts.TYRE), (0.55 * kind.radius, parts.METAL)):
                rim = [at(s + r * u / length, q, (kind.radius + r * v) / high) for u, v in CIRCLE]
                view.fill(rim, tone, ident)


def person(view: View, x: float, z: float) -> None:
    """Someone who stands or walks."""
    rng = view.rng
    left, right, arm = -0.07 - rng.uniform(0, 0.32), 0.07 + rng.uniform(0, 0.26), rng.uniform(0.22, 0.42)
    scale, coat = 0.7 if rng.random() < 0.1 else rng.normal(1, 0.05), rng.uniform(0.5, 0.85)
    view.cast(x, z, 0.4)
    view.figure((
        ("limb", "legs", 0.15, -0.07, 0.9, left, 0.06), ("limb", "legs", 0.16, 0.07, 0.9, right, 0.04),
        ("limb", "tyre", 0.08, left - 0.04, 0.04, left + 0.12, 0.04),
        ("limb", "tyre", 0.08, right - 0.04, 0.04, right + 0.12, 0.04),
        ("limb", "top", 0.11, -0.2, 1.4, -arm, 0.95), ("limb", "top", 0.11, 0.2, 1.4, arm, 0.95),
        ("disc", "skin", -arm, 0.88, 0.06), ("disc", "skin", arm, 0.88, 0.06),
        ("area", "top", -0.18, coat, 0.18, coat, 0.17, 1.0, 0.24, 1.4, 0.1, 1.5, -0.1, 1.5, -0.24, 1.4, -0.17, 1.0),
        ("limb", "skin", 0.1, 0, 1.44, 0, 1.6), ("disc", "hair", 0, 1.66, 0.125), ("disc", "skin", 0.02, 1.62, 0.1),
    ), (x, 0, z), view.instance(parts.PERSON), scale, view.one((-1, 1)) * rng.uniform(0.75, 1))  # fmt: skip


def two_wheeler(view: View, x: float, z: float, label: int, ridden: bool) -> None:
    """A bicycle or motorcycle, with or without its rider, more or less turned towards the camera."""
    squeeze = view.one((-1, 1)) * view.rng.uniform(0.3, 1)
    figure = parts.BICYCLE_PARTS if label == parts.BICYCLE else parts.MOTORCYCLE_PARTS
    view.cast(x, z, 0.6)
    view.figure(figure, (x, 0, z), view.instance(label), squeeze=squeeze)
    if ridden:
        squeeze = math.copysign(max(abs(squeeze), 0.7), squeeze)
        view.figure(parts.RIDER_PARTS, (x, 0, z), view.instance(parts.RIDER), squeeze=squeeze)


def lamp_post(view: View, x: float, z: float, reach: float) -> None:
    """A street lamp that hangs over by `reach`."""
    high = view.rng.uniform(5, 8)
    post = ("limb", "pole", 0.14, 0, 0, 0, high), ("limb", "pole", 0.1, 0, high, reach, high + 0.3)
    lamp = ("limb", "pole", 0.2, reach * 0.7, high + 0.25, reach, high + 0.3)
    view.figure([*post, lamp], (x, 0, z), parts.POLE)


def sign(view: View, x: float, z: float) -> None:
    """A traffic sign on its pole."""
    high, plate = view.rng.uniform(2.1, 2.8), view.one(parts.SIGNS)
    view.figure([("limb", "metal", 0.08, 0, 0, 0, high + 0.3)], (x, 0, z), parts.POLE)
    view.figure(plate, (x, high, z), parts.SIGN, view.rng.uniform(0.9, 1.3))


def traffic_light(view: View, x: float, z: float, reach: float) -> None:
    """A traffic light, sometimes with a second one that hangs over the road by `reach`."""
    rng = view.rng
    state, heads = rng.integers(3), [(0, rng.uniform(2.6, 3.4)), (reach, 5.2)][: 1 + (rng.random() < 0.4)]
    arm, high = heads[-1]
    poles = ("limb", "pole", 0.12, 0, 0, 0, high), ("limb", "pole", 0.1, 0, high, arm, high)
    view.figure(poles, (x, 0, z), parts.POLE)
    for u, v in heads:
        lamps = [("disc", parts.LAMPS[i] if i == state else "off", u, v + 0.3 * (i - 1), 0.12) for i in range(3)]
        view.figure([("limb", "box", 0.36, u, v - 0.48, u, v + 0.48), *lamps], (x, 0, z), parts.LIGHT)


def bonnet(view: View) -> None:
    """The front of the camera's own car, along the lower edge."""
    top, color = view.rng.uniform(0.9, 0.96) * view.height, view.pick("bonnet")
    for step in range(6):
        y = top + step * 0.012 * view.height
        box = (-0.15 * view.width, y, 1.15 * view.width, y + 0.6 * view.height)
        view.draw.ellipse(box, tuple(int(c * (1.25 - 0.12 * step)) for c in color))
        view.mark.ellipse(box, parts.EGO)
