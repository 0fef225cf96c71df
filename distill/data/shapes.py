"""The procedural captioned world that the mini family learns, and its exact reader.

A `Scene` is one or two shapes on a plain background. `render` draws it, `caption` says it, and `read_scene` reads
it back from pixels without any learned part, so "does the picture show what its caption says" has an exact answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from distill.models.resolution import Resolution

COLORS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 230),
    "yellow": (245, 215, 30),
    "purple": (140, 40, 190),
    "orange": (250, 130, 20),
    "cyan": (40, 210, 220),
    "pink": (250, 140, 190),
}
BACKGROUNDS = {"white": (250, 250, 250), "black": (10, 10, 10), "gray": (128, 128, 128), "brown": (100, 65, 35)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.60, "large": 0.95}  # diameter as a share of the shorter cell side
POSITIONS = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip

_PALETTE = {**COLORS, **BACKGROUNDS}
_PALETTE_NAMES = tuple(_PALETTE)
_PALETTE_RGB = np.array(list(_PALETTE.values()), np.float32)


class Thing(NamedTuple):
    """One shape; `position` is one of nine cells of a 3x3 grid over the picture."""

    size: str
    color: str
    shape: str
    position: str

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.shape} at the {self.position}"


@dataclass(frozen=True)
class Scene:
    """One or two things at different positions (kept in the order of POSITIONS) on a background."""

    things: tuple[Thing, ...]
    background: str

    @property
    def caption(self) -> str:
        return f"{' and '.join(map(str, self.things))} on a {self.background} background"

    @classmethod
    def parse(cls, caption: str) -> Scene:
        """The inverse of `caption`. Raises ValueError for text that is not a caption of this world."""
        body, _, background = caption.removesuffix(" background").rpartition(" on a ")
        things = []
        for part in body.split(" and "):
            match = re.fullmatch(r"a (\w+) (\w+) (\w+) at the ([\w ]+)", part)
            if match is None:
                raise ValueError(f"not a caption of the shapes world: {caption!r}")
            things.append(Thing(*match.groups()))
        return cls(tuple(things), background)


def random_scene(rng: np.random.Generator) -> Scene:
    count = int(rng.integers(1, 3))
    cells = sorted(rng.choice(len(POSITIONS), count, replace=False))
    return Scene(
        tuple(
            Thing(str(rng.choice(list(SIZES))), str(rng.choice(list(COLORS))), str(rng.choice(SHAPES)), POSITIONS[cell])
            for cell in cells
        ),
        str(rng.choice(list(BACKGROUNDS))),
    )


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mask of `shape` on coordinates where its bounding box is [-1, 1]²; y points down."""
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "ring":
        radius = x**2 + y**2
        return (radius <= 1) & (radius >= 0.5**2)
    if shape == "square":
        return (abs(x) <= 1) & (abs(y) <= 1)
    if shape == "triangle":
        return (y <= 1) & (abs(x) <= (y + 1) / 2)
    if shape == "cross":
        return ((abs(x) <= 1 / 3) | (abs(y) <= 1 / 3)) & (abs(x) <= 1) & (abs(y) <= 1)
    angle = np.mod(np.arctan2(x, -y), 2 * np.pi / 5)  # star: five points, inner radius 0.4
    angle = np.minimum(angle, 2 * np.pi / 5 - angle)
    inner = 0.4
    edge = inner * np.sin(np.pi / 5) / (np.sin(np.pi / 5 - angle) * inner + np.sin(angle))
    return np.hypot(x, y) <= edge


def _grid_cell(position: str, resolution: Resolution) -> tuple[float, float, float, float]:
    """(left, top, width, height) of the cell in pixels."""
    row, column = divmod(POSITIONS.index(position), 3)
    width, height = resolution.width / 3, resolution.height / 3
    return column * width, row * height, width, height


def _coverage(shape: str, x: float, y: float, radius: float, width: int, height: int) -> np.ndarray:
    """Share of each pixel that `shape` covers, (height, width), its bounding box centred at (x, y) pixels."""
    supersample = 3
    ys = (np.arange(height * supersample) + 0.5) / supersample
    xs = (np.arange(width * supersample) + 0.5) / supersample
    down, right = np.meshgrid((ys - y) / radius, (xs - x) / radius, indexing="ij")
    mask = _inside(shape, right, down).astype(np.float32)
    return mask.reshape(height, supersample, width, supersample).mean((1, 3))


def render(scene: Scene, resolution: Resolution, rng: np.random.Generator | None = None) -> np.ndarray:
    """The picture as uint8 (height, width, 3), edges anti-aliased; `rng` moves each thing a little inside its cell."""
    image = np.tile(np.array(BACKGROUNDS[scene.background], np.float32), (resolution.height, resolution.width, 1))
    for thing in scene.things:
        left, top, cell_width, cell_height = _grid_cell(thing.position, resolution)
        radius = SIZES[thing.size] * min(cell_width, cell_height) / 2
        slack_x, slack_y = cell_width / 2 - radius, cell_height / 2 - radius
        shift = rng.uniform(-0.5, 0.5, 2) if rng is not None else (0.0, 0.0)
        center_x = left + cell_width / 2 + shift[0] * slack_x
        center_y = top + cell_height / 2 + shift[1] * slack_y
        window = image[int(top) : int(np.ceil(top + cell_height)), int(left) : int(np.ceil(left + cell_width))]
        height, width, _ = window.shape
        mask = _coverage(thing.shape, center_x - int(left), center_y - int(top), radius, width, height)[..., None]
        window += mask * (np.array(COLORS[thing.color], np.float32) - window)
    return np.rint(image).astype(np.uint8)


def _measure(shape: str, side: int = 480) -> tuple[float, float]:
    """(area, height of the centroid) of `shape` on the box [-1, 1]²."""
    axis = (np.arange(side) + 0.5) / side * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    mask = _inside(shape, x, y)
    return 4 * float(mask.mean()), float(y[mask].mean())


_MEASURES = {shape: _measure(shape) for shape in SHAPES}


def _read_shape(covered: np.ndarray) -> tuple[str, float]:
    """The shape, and its radius in pixels, that covers pixels as `covered` (height, width) says.

    Every shape is drawn with the same area and centroid, neither of which a soft edge moves; the one nearest in squares
    is it.
    """
    height, width = covered.shape
    area = covered.sum()
    y = covered.sum(1) @ (np.arange(height) + 0.5) / area
    x = covered.sum(0) @ (np.arange(width) + 0.5) / area
    errors = {}
    for shape, (unit_area, unit_y) in _MEASURES.items():
        radius = float(np.sqrt(area / unit_area))
        drawn = _coverage(shape, x, y - unit_y * radius, radius, width, height)
        errors[shape] = float(np.square(drawn - covered).sum()), radius
    shape = min(errors, key=lambda name: errors[name][0])
    return shape, errors[shape][1]


def read_scene(image: np.ndarray) -> Scene:
    """What the uint8 picture (height, width, 3) shows. Things are found cell by cell; at least 15 % of a small
    thing's bounding box must be covered for it to count. The result may hold any number of things."""
    height, width, _ = image.shape
    distance = ((image[:, :, None].astype(np.float32) - _PALETTE_RGB) ** 2).sum(-1)
    labels = distance.argmin(-1)
    is_background = np.arange(len(_PALETTE)) >= len(COLORS)
    counts = np.bincount(labels.ravel(), minlength=len(_PALETTE))
    background = int(np.where(is_background, counts, -1).argmax())
    resolution = Resolution(width, height)
    things = []
    for position in POSITIONS:
        left, top, cell_width, cell_height = _grid_cell(position, resolution)
        rows = slice(round(top), round(top + cell_height))
        columns = slice(round(left), round(left + cell_width))
        window = image[rows, columns].astype(np.float32)
        colors = np.bincount(labels[rows, columns].ravel(), minlength=len(_PALETTE))[: len(COLORS)]
        color = int(colors.argmax())
        # how far each pixel is from the background to the object's colour
        axis = _PALETTE_RGB[color] - _PALETTE_RGB[background]
        share = ((window - _PALETTE_RGB[background]) @ axis) / (axis @ axis)
        diameter = min(cell_width, cell_height)
        if (share > 0.5).sum() < 0.15 * (SIZES["small"] * diameter) ** 2:
            continue
        shape, radius = _read_shape(np.where(share > 0.2, share.clip(max=1), 0))
        size = min(SIZES, key=lambda name: abs(SIZES[name] - 2 * radius / diameter))
        things.append(Thing(size, _PALETTE_NAMES[color], shape, position))
    return Scene(tuple(things), _PALETTE_NAMES[background])


ATTRIBUTES = ("background", "position", "color", "shape", "size")


def follows(scene: Scene, image: np.ndarray) -> dict[str, bool]:
    """For each of ATTRIBUTES, whether `image` shows what `scene` says: `position` is right when exactly the named
    cells are filled; the others when every named thing, where it should be, has it."""
    seen = read_scene(image)
    at = {thing.position: thing for thing in seen.things}
    result = {
        "background": seen.background == scene.background,
        "position": set(at) == {thing.position for thing in scene.things},
    }
    for attribute in ("color", "shape", "size"):
        result[attribute] = all(
            thing.position in at and getattr(at[thing.position], attribute) == getattr(thing, attribute)
            for thing in scene.things
        )
    return result


def shares(results: Sequence[Mapping[str, bool]]) -> dict[str, float]:
    """Of what `follows` said of some pictures, the share that shows what it should: for each of ATTRIBUTES, and for `all`
    of them together."""
    found = {attribute: float(np.mean([result[attribute] for result in results])) for attribute in ATTRIBUTES}
    return found | {"all": float(np.mean([all(result.values()) for result in results]))}


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` pictures (Wilson, 1927)."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)
