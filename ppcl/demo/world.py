"""A procedural world of coloured shapes, with captions in GenEval's categories and a checker that reads pixels alone.

One scene holds one to four shapes on a light canvas, in two sizes, none touching another. Captions follow the six
categories of GenEval (Ghosh et al. 2023, arXiv 2310.11513): single object, two objects, counting, colours, position,
colour attribution. Part of the caption combinations is held out of training, by a hash of the caption, so that the
score measures composition and not memory.

`check` decides from an image and its caption whether the image shows what the caption says. It knows nothing of how
the image was made: it segments the foreground into connected components, names each component's shape by matching
templates and its colour by the nearest palette entry.
"""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

CANVAS = 64
BACKGROUND = np.array([238, 238, 230], dtype=np.float32)
PALETTE = {
    "red": (214, 40, 40),
    "green": (44, 160, 70),
    "blue": (38, 84, 214),
    "yellow": (240, 200, 30),
    "purple": (140, 60, 170),
    "black": (30, 30, 34),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {"two": 2, "three": 3, "four": 4}
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RADII = (5, 6)
CELL = 16  # pixels: shapes sit in the middle of the cells of a 4 × 4 board, one cell for each token of the transformer

_MIN_AREA = 24  # pixels: less is noise, not an object
_FOREGROUND_DISTANCE = 60.0  # Euclidean distance in RGB from the background
_TEMPLATE_SIDE = 24
_MIN_TEMPLATE_IOU = 0.72
_MAX_COLOUR_DISTANCE = 90.0


@dataclass(frozen=True)
class Thing:
    """One shape of a scene: centre (x, y) and radius in pixels."""

    shape: str
    colour: str
    x: int
    y: int
    radius: int


@dataclass(frozen=True)
class Caption:
    """A caption and what it demands; `held_out` captions are never trained on."""

    text: str
    category: str
    held_out: bool


@dataclass(frozen=True)
class Seen:
    """One connected component as the checker sees it; `shape` or `colour` is None where nothing matches."""

    shape: str | None
    colour: str | None
    x: float
    y: float


@functools.cache
def _mask(shape: str, radius: int) -> np.ndarray:
    """Coverage in [0, 1] of a shape of that radius, `(2r + 3, 2r + 3)`, antialiased by 8 × 8 supersampling."""
    side, factor = 2 * radius + 3, 8
    axis = (np.arange(side * factor) + 0.5) / factor - side / 2
    x, y = np.meshgrid(axis, axis)
    r = radius
    if shape == "circle":
        inside = x**2 + y**2 <= r**2
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.86 * r
    elif shape == "triangle":
        inside = (y <= 0.9 * r) & (y >= -r + 1.75 * abs(x))
    elif shape == "cross":
        arm = 0.34 * r
        inside = (np.maximum(abs(x), abs(y)) <= r) & (np.minimum(abs(x), abs(y)) <= arm)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    return inside.reshape(side, factor, side, factor).mean(axis=(1, 3)).astype(np.float32)


def render(things: list[Thing]) -> np.ndarray:
    """Draw a scene: `(64, 64, 3)` uint8."""
    image = np.broadcast_to(BACKGROUND, (CANVAS, CANVAS, 3)).copy()
    for thing in things:
        mask = _mask(thing.shape, thing.radius)[..., None]
        half = mask.shape[0] // 2
        window = np.s_[thing.y - half : thing.y + half + 1, thing.x - half : thing.x + half + 1]
        image[window] = image[window] * (1 - mask) + np.asarray(PALETTE[thing.colour], np.float32) * mask
    return image.round().astype(np.uint8)


def _place(rng: np.random.Generator, count: int) -> list[tuple[int, int, int]]:
    """`count` centres and radii (x, y, r) in different cells of the board."""
    side = CANVAS // CELL
    cells = rng.choice(side * side, size=count, replace=False)
    return [
        (CELL * int(cell % side) + CELL // 2, CELL * int(cell // side) + CELL // 2, int(rng.choice(RADII)))
        for cell in cells
    ]


def board(rng: np.random.Generator) -> list[Thing]:
    """Shapes in a random share of the cells, of no caption: an autoencoder learns its strokes faster from these."""
    return [
        Thing(str(rng.choice(SHAPES)), str(rng.choice(list(PALETTE))), x, y, r)
        for x, y, r in _place(rng, int(rng.integers(1, 17)))
    ]


def _held_out(text: str, share: float = 0.2) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] < 256 * share


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


@functools.cache
def captions() -> tuple[Caption, ...]:
    """Every caption of the world. `single_object` has four captions only: all of them are trained on."""
    made: list[Caption] = []

    def add(category: str, text: str, may_hold_out: bool = True) -> None:
        text = f"a photo of {text}"
        made.append(Caption(text, category, may_hold_out and _held_out(text)))

    for s in SHAPES:
        add("single_object", f"{_article(s)} {s}", may_hold_out=False)
        for c in PALETTE:
            add("colors", f"{_article(c)} {c} {s}")
        for word in COUNTS:
            for c in PALETTE:
                add("counting", f"{word} {c} {s}{'es' if s == 'cross' else 's'}")
        for t in SHAPES:
            if s == t:
                continue
            for c in PALETTE:
                add("two_object", f"{_article(c)} {c} {s} and {_article(t)} {t}")
            for relation in RELATIONS:
                for c in PALETTE:
                    add("position", f"{_article(c)} {c} {s} {relation} {_article(t)} {t}")
            for c in PALETTE:
                for d in PALETTE:
                    if c != d:
                        add("color_attr", f"{_article(c)} {c} {s} and {_article(d)} {d} {t}")
    return tuple(made)


_OBJECT = re.compile(r"(?:an?|two|three|four) (?:(\w+) )?(circle|square|triangle|cross)(?:s|es)?$")


def parse(text: str) -> tuple[list[tuple[str, str | None]], str | None, int]:
    """What a caption demands: the objects as (shape, colour or None), the relation between the first two, the count.

    Raises `ValueError` for a caption that is not of this world.
    """
    body = text.removeprefix("a photo of ")
    relation = next((r for r in RELATIONS if f" {r} " in body), None)
    parts = body.split(f" {relation} ") if relation else body.split(" and ")
    objects = []
    for part in parts:
        match = _OBJECT.match(part)
        if not match or (match[1] and match[1] not in PALETTE):
            raise ValueError(f"not a caption of the shapes world: {text!r}")
        objects.append((match[2], match[1]))
    first = body.split(" ", 1)[0]
    return objects, relation, COUNTS.get(first, 1)


def scene(text: str, rng: np.random.Generator) -> list[Thing]:
    """A random scene that the caption describes; what the caption leaves open is drawn at random.

    Two shapes in a relation stand in opposite halves of the board, so that each half can be learnt from the caption
    without looking at the other shape; `check` asks for the relation alone.
    """
    objects, relation, count = parse(text)
    if count > 1:
        objects = objects * count
    colours = [c or str(rng.choice(list(PALETTE))) for _, c in objects]
    while True:
        places = _place(rng, len(objects))
        if relation is None or (_related(relation, *(p[:2] for p in places)) and _opposite(relation, *places)):
            break
    return [
        Thing(shape, colour, x, y, r) for (shape, _), colour, (x, y, r) in zip(objects, colours, places, strict=True)
    ]


def _related(relation: str, a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether `a` stands in that relation to `b`: the offset along its axis dominates, as in GenEval."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    sign = -1 if relation in ("left of", "above") else 1
    return sign * along > 0 and abs(along) > abs(across)


def _opposite(relation: str, a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    """Whether the two stand in opposite halves of the canvas, along the relation's axis."""
    axis = 0 if relation in ("left of", "right of") else 1
    return (a[axis] < CANVAS / 2) != (b[axis] < CANVAS / 2)


@functools.cache
def _template(shape: str) -> np.ndarray:
    """The shape's mask cropped to its bounding box and resized to a square, boolean."""
    mask = _mask(shape, 24) > 0.5
    return _fit_square(mask)


def _fit_square(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = Image.fromarray((crop * 255).astype(np.uint8)).resize(
        (_TEMPLATE_SIDE, _TEMPLATE_SIDE), Image.Resampling.BILINEAR
    )
    return np.asarray(image) > 127


def look(image: np.ndarray) -> list[Seen]:
    """The objects in an image, `(64, 64, 3)` uint8, from its pixels alone."""
    pixels = image.astype(np.float32)
    foreground = np.linalg.norm(pixels - BACKGROUND, axis=-1) > _FOREGROUND_DISTANCE
    labels, count = ndimage.label(foreground)
    seen = []
    for index in range(1, count + 1):
        mask = labels == index
        if mask.sum() < _MIN_AREA:
            continue
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        aspect = (rows[-1] - rows[0] + 1) / (columns[-1] - columns[0] + 1)
        fitted = _fit_square(mask)
        overlap = {s: (fitted & _template(s)).sum() / (fitted | _template(s)).sum() for s in SHAPES}
        shape = max(overlap, key=overlap.__getitem__)
        known_shape = overlap[shape] >= _MIN_TEMPLATE_IOU and 0.7 <= aspect <= 1.4
        # The rim is blended with the background; the inside tells the colour.
        inside = ndimage.binary_erosion(mask)
        colour_value = np.median(pixels[inside if inside.sum() >= 8 else mask], axis=0)
        distance = {c: float(np.linalg.norm(colour_value - np.asarray(v, np.float32))) for c, v in PALETTE.items()}
        colour = min(distance, key=distance.__getitem__)
        seen.append(
            Seen(
                shape if known_shape else None,
                colour if distance[colour] <= _MAX_COLOUR_DISTANCE else None,
                x=float((columns[0] + columns[-1]) / 2),
                y=float((rows[0] + rows[-1]) / 2),
            )
        )
    return seen


def check(image: np.ndarray, text: str) -> bool:
    """Whether the image, `(64, 64, 3)` uint8, shows exactly what the caption says: no object more, none less."""
    objects, relation, count = parse(text)
    if count > 1:
        objects = objects * count
    seen = look(image)
    if len(seen) != len(objects) or any(s.shape is None or s.colour is None for s in seen):
        return False
    orders = [seen] if len(seen) == 1 else [seen, seen[::-1]] if len(seen) == 2 else [seen]
    for order in orders:
        fits = all(s.shape == shape and colour in (None, s.colour) for s, (shape, colour) in zip(order, objects))
        if fits and (relation is None or _related(relation, (order[0].x, order[0].y), (order[1].x, order[1].y))):
            return True
    return False
