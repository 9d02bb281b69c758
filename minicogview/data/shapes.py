"""Generated scenes of simple shapes, their captions, and an exact check of what a picture shows.

"A small red circle above a big blue square": one or two things, each with a size, a colour and a shape, and their
relation. A tiny model learns them in a minute, and `check` tells which words of the caption a picture obeys; no judge
has to be trained for it.

How `check` works: every clear pixel gets the nearest palette colour; a blurred pixel between two areas gets the
colour of a clear neighbour; connected components are objects; their shape and size are those of the template that
overlaps the component best. So the blur that a VQ-VAE leaves does no harm.

Shapes: S pixels a side. Things are placed in quarters of the canvas, so that a token of S/4 or S/8 pixels sees few
different patches.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product

import numpy as np

from minicogview.errors import MiniCogViewError

COLOURS = {
    "red": (225, 40, 40),
    "green": (30, 165, 70),
    "blue": (40, 90, 225),
    "yellow": (250, 205, 40),
    "purple": (150, 60, 200),
    "black": (25, 25, 25),
}
WHITE = (255, 255, 255)
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "big")
RELATIONS = ("above", "below", "left of", "right of")
ATTRIBUTES = ("count", "colour", "shape", "size", "relation")
# Pairs that training never sees, one for each shape; each colour and each shape is common in other pairs.
HELDOUT_PAIRS = frozenset({("red", "circle"), ("green", "square"), ("blue", "triangle"), ("yellow", "cross")})

CHINESE = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "black": "黑色",
    "circle": "圆形", "square": "方形", "triangle": "三角形", "cross": "叉形", "small": "小", "big": "大",
    "above": "上面", "below": "下面", "left of": "左边", "right of": "右边",
}  # fmt: skip
CLEAR = 58.0  # a pixel is clear within this RGB distance of a palette colour (half the least distance)
LEAST_OVERLAP = 0.6  # below this the shape of a component is unknown


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """One or two things of different colours; `relation` tells where the first is, seen from the second.

    The caption does not tell `place`: the quarter (0..3) of a single thing, or the column or row (0, 1) of a pair.
    """

    things: tuple[Thing, ...]
    relation: str | None
    place: int


def random_scene(rng: random.Random, heldout: bool = False) -> Scene:
    """A random scene without held-out pairs of colour and shape or, if `heldout`, with one in its first thing."""
    first = _random_thing(rng, heldout)
    if rng.random() < 0.3:
        return Scene(things=(first,), relation=None, place=rng.randrange(4))
    second = _random_thing(rng, heldout=False)
    while second.colour == first.colour:  # two things of one colour that touch would be one component
        second = _random_thing(rng, heldout=False)
    return Scene(things=(first, second), relation=rng.choice(RELATIONS), place=rng.randrange(2))


def _random_thing(rng: random.Random, heldout: bool) -> Thing:
    pairs = [pair for pair in product(COLOURS, SHAPES) if (pair in HELDOUT_PAIRS) == heldout]
    colour, shape = rng.choice(pairs)
    return Thing(size=rng.choice(SIZES), colour=colour, shape=shape)


def caption(scene: Scene, lang: str) -> str:
    """Words such as "a small red circle above a big blue square", or "小红色圆形在大蓝色方形上面".

    Raises:
        MiniCogViewError: for a language other than "en" and "zh".
    """
    if lang not in ("en", "zh"):
        raise MiniCogViewError(f"no captions in language {lang!r}: choose one of en, zh")
    if lang == "en":
        names = [f"a {thing.size} {thing.colour} {thing.shape}" for thing in scene.things]
        to_the = "to the " if scene.relation in ("left of", "right of") else ""
        return f"{names[0]} {to_the}{scene.relation} {names[1]}" if scene.relation else names[0]
    names = [CHINESE[thing.size] + CHINESE[thing.colour] + CHINESE[thing.shape] for thing in scene.things]
    return f"{names[0]}在{names[1]}{CHINESE[scene.relation]}" if scene.relation else names[0]


@lru_cache(maxsize=64)
def mask(shape: str, side: int) -> np.ndarray:
    """The pixels that belong to a shape, in its square box: (side, side) bool."""
    centres = (np.arange(side) + 0.5) / side * 2 - 1  # of the pixels, in -1..1
    y, x = centres[:, None], centres[None, :]
    if shape == "circle":
        return np.asarray(y**2 + x**2 <= 1)
    if shape == "square":
        return np.ones((side, side), dtype=bool)
    if shape == "triangle":
        half_width = np.ceil((np.arange(side) + 1) / 2)  # pixels: 1, 1, 2, 2, ... from the top
        return np.asarray(np.abs(x) * side / 2 < half_width[:, None])
    if shape == "cross":
        return np.asarray(np.abs(np.abs(x) - np.abs(y)) < 0.3)
    raise MiniCogViewError(f"unknown shape {shape!r}: choose one of {', '.join(SHAPES)}")


def side_of(size: str, canvas: int) -> int:
    """Pixels of a thing's box: half the canvas when big, a quarter when small."""
    return canvas // 2 if size == "big" else canvas // 4


def _corner(thing: Thing, row: int, column: int, canvas: int) -> tuple[int, int]:
    """Top-left pixel of a thing in its quarter; a small one is centred, on a grid of 4 pixels."""
    inset = 0 if thing.size == "big" else canvas // 8 // 4 * 4
    return row * canvas // 2 + inset, column * canvas // 2 + inset


def _quarters(scene: Scene) -> list[tuple[int, int]]:
    """(row, column) of each thing's quarter."""
    if scene.relation is None:
        return [divmod(scene.place, 2)]
    near, far = (0, 1) if scene.relation in ("above", "left of") else (1, 0)
    if scene.relation in ("above", "below"):
        return [(near, scene.place), (far, scene.place)]
    return [(scene.place, near), (scene.place, far)]


def draw(scene: Scene, size: int) -> np.ndarray:
    """Draw a scene on white, without smoothing: (S, S, 3) uint8, S = `size` pixels.

    Raises:
        MiniCogViewError: unless `size` is a positive multiple of 16.
    """
    if size < 16 or size % 16:
        raise MiniCogViewError(f"scenes cannot be drawn {size} pixels wide: choose a multiple of 16")
    picture = np.full((size, size, 3), WHITE, dtype=np.uint8)
    for thing, (row, column) in zip(scene.things, _quarters(scene), strict=True):
        top, left = _corner(thing, row, column, size)
        side = side_of(thing.size, size)
        picture[top : top + side, left : left + side][mask(thing.shape, side)] = COLOURS[thing.colour]
    return picture


@dataclass(frozen=True)
class Found:
    """An object found in a picture. `thing.shape` is "unknown" if no template fits; `centre` is in pixels."""

    thing: Thing
    centre: tuple[float, float]  # (row, column)


def check(picture: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Which attributes of `scene` a picture shows.

    Args:
        picture: (S, S, 3) uint8, S a multiple of 16.

    Returns:
        "count", "colour", "shape", "size" and, for two things, "relation", each True or False. The objects that
        are found are matched with the scene's things in the way that fits the scene best, so that one wrong
        attribute is reported as that attribute alone.
    """
    found = find(picture)
    n = len(scene.things)
    candidates: list[Found | None] = [*found, *[None] * n]
    results = [_compare(matched, scene) for matched in permutations(candidates, n)]
    # Of equally good matches take the one with the right colours: green above red instead of red above green has a
    # wrong relation, not two wrong colours.
    best = max(results, key=lambda result: (sum(result.values()), *result.values()))
    return {"count": len(found) == n, **best}


def _compare(matched: Sequence[Found | None], scene: Scene) -> dict[str, bool]:
    pairs = list(zip(matched, scene.things, strict=True))
    result = {
        "colour": all(seen is not None and seen.thing.colour == thing.colour for seen, thing in pairs),
        "shape": all(seen is not None and seen.thing.shape == thing.shape for seen, thing in pairs),
        "size": all(seen is not None and seen.thing.size == thing.size for seen, thing in pairs),
    }
    if scene.relation:
        first, second = matched
        result["relation"] = bool(first and second and relation_of(first, second) == scene.relation)
    return result


def relation_of(first: Found, second: Found) -> str:
    """Where the first object is, seen from the second, along the axis on which they are further apart."""
    down, right = first.centre[0] - second.centre[0], first.centre[1] - second.centre[1]
    if abs(down) >= abs(right):
        return "above" if down < 0 else "below"
    return "left of" if right < 0 else "right of"


def find(picture: np.ndarray) -> list[Found]:
    """All objects in a picture, (S, S, 3) uint8; specks far smaller than the smallest shape are ignored."""
    canvas = picture.shape[0]
    labels = nearest_colours(picture)
    least = mask("cross", side_of("small", canvas)).sum() / 2
    found = []
    for number, colour in enumerate(COLOURS, start=1):
        for component in components(labels == number):
            if component.sum() >= least:
                shape, size = _best_template(component)
                rows, columns = np.nonzero(component)
                thing = Thing(size=size, colour=colour, shape=shape)
                found.append(Found(thing=thing, centre=(float(rows.mean()), float(columns.mean()))))
    return found


def nearest_colours(picture: np.ndarray) -> np.ndarray:
    """Index of each pixel's palette colour, 0 = white: (S, S) int64.

    A blurred pixel between red and white is pink, and pink may be nearest to a third colour. So only clear pixels
    get the nearest colour of all; the others get the nearest among the colours of the clear pixels around them.
    """
    palette = np.array([WHITE, *COLOURS.values()], dtype=np.float32)  # (K, 3)
    distance = np.linalg.norm(picture[:, :, None].astype(np.float32) - palette, axis=-1)  # (S, S, K)
    clear = distance.min(axis=-1) < CLEAR
    certain = (distance.argmin(axis=-1)[..., None] == np.arange(len(palette))) & clear[..., None]  # (S, S, K)
    nearby = _grow(certain)
    allowed = np.where(clear[..., None], certain, nearby | ~nearby.any(axis=-1, keepdims=True))
    return np.asarray(np.where(allowed, distance, np.inf).argmin(axis=-1))


def _grow(area: np.ndarray) -> np.ndarray:
    """An area and the eight neighbours of each of its pixels: (S, S, ...) bool -> the same shape."""
    height, width = area.shape[:2]
    padded = np.pad(area, [(1, 1), (1, 1)] + [(0, 0)] * (area.ndim - 2))
    shifted = [padded[i : i + height, j : j + width] for i, j in product(range(3), repeat=2)]
    return np.asarray(np.any(shifted, axis=0))


def components(area: np.ndarray) -> list[np.ndarray]:
    """Connected parts of an area, diagonals included: (S, S) bool -> list of (S, S) bool."""
    left, parts = area.copy(), []
    while left.any():
        part = np.zeros_like(left)
        part.flat[left.argmax()] = True
        size = 0
        while part.sum() > size:
            size = int(part.sum())
            part = _grow(part) & left
        parts.append(part)
        left &= ~part
    return parts


def _best_template(component: np.ndarray) -> tuple[str, str]:
    """(shape, size) of the template with the best intersection over union, over shifts of up to 1 pixel."""
    canvas = component.shape[0]
    framed = np.pad(component, canvas // 2 + 2)
    middle = np.argwhere(framed).mean(axis=0) + 0.5
    best = (LEAST_OVERLAP, "unknown", _size_of_box(component))
    for shape, size in product(SHAPES, SIZES):
        template = mask(shape, side_of(size, canvas))
        corner = np.round(middle - np.argwhere(template).mean(axis=0) - 0.5).astype(int)
        for shift in product((-1, 0, 1), repeat=2):
            top, left = corner + shift
            window = framed[top : top + len(template), left : left + len(template)]
            both = (window & template).sum()
            overlap = float(both / (framed.sum() + template.sum() - both))
            if overlap > best[0]:
                best = (overlap, shape, size)
    return best[1], best[2]


def _size_of_box(component: np.ndarray) -> str:
    rows, columns = np.nonzero(component)
    longest = max(np.ptp(rows), np.ptp(columns)) + 1
    return "big" if longest > 3 * component.shape[0] // 8 else "small"
