"""The procedural captioned world that the mini family learns, and its exact reader.

A `Scene` is one or two shapes on a plain background. `render` draws it, `caption` says it, and `read_scene` reads
it back from pixels without any learned part, so "does the picture show what its caption says" has an exact answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from distill.architectures import Resolution

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

WORDS = tuple(
    dict.fromkeys(
        " ".join(["a", *SIZES, *COLORS, *SHAPES, "at the", *POSITIONS, "and on", *BACKGROUNDS, "background"]).split()
    )
)

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


def render(scene: Scene, resolution: Resolution, rng: np.random.Generator | None = None) -> np.ndarray:
    """The picture as uint8 (height, width, 3), edges anti-aliased; `rng` moves each thing a little inside its cell."""
    supersample = 3
    image = np.tile(np.array(BACKGROUNDS[scene.background], np.float32), (resolution.height, resolution.width, 1))
    for thing in scene.things:
        left, top, cell_width, cell_height = _grid_cell(thing.position, resolution)
        radius = SIZES[thing.size] * min(cell_width, cell_height) / 2
        slack_x, slack_y = cell_width / 2 - radius, cell_height / 2 - radius
        shift = rng.uniform(-0.5, 0.5, 2) if rng is not None else (0.0, 0.0)
        center_x = left + cell_width / 2 + shift[0] * slack_x
        center_y = top + cell_height / 2 + shift[1] * slack_y
        ys = (np.arange(resolution.height * supersample) + 0.5) / supersample
        xs = (np.arange(resolution.width * supersample) + 0.5) / supersample
        rows = slice(int(top) * supersample, int(np.ceil(top + cell_height)) * supersample)
        columns = slice(int(left) * supersample, int(np.ceil(left + cell_width)) * supersample)
        y, x = np.meshgrid((ys[rows] - center_y) / radius, (xs[columns] - center_x) / radius, indexing="ij")
        mask = _inside(thing.shape, x, y).astype(np.float32)
        mask = mask.reshape(mask.shape[0] // supersample, supersample, -1, supersample).mean((1, 3))[..., None]
        window = image[int(top) : int(np.ceil(top + cell_height)), int(left) : int(np.ceil(left + cell_width))]
        window += mask * (np.array(COLORS[thing.color], np.float32) - window)
    return np.rint(image).astype(np.uint8)


def _cropped(mask: np.ndarray, side: int = 24) -> np.ndarray:
    """`mask` cut to its bounding box and sampled at `side` x `side` points, so that masks of any size compare."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    sample = (np.arange(side) + 0.5) / side
    return box[(sample * box.shape[0]).astype(int)][:, (sample * box.shape[1]).astype(int)]


def _templates(side: int = 480) -> np.ndarray:
    axis = (np.arange(side) + 0.5) / side * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return np.stack([_cropped(_inside(shape, x, y)) for shape in SHAPES])


_TEMPLATES = _templates()


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
        # foreground: nearer to some object colour than halfway from the background
        window = image[rows, columns].astype(np.float32)
        colors = np.bincount(labels[rows, columns].ravel(), minlength=len(_PALETTE))[: len(COLORS)]
        color = int(colors.argmax())
        axis = _PALETTE_RGB[color] - _PALETTE_RGB[background]
        share = ((window - _PALETTE_RGB[background]) @ axis) / (axis @ axis)
        mask = share > 0.5
        diameter = min(cell_width, cell_height)
        if mask.sum() < 0.15 * (SIZES["small"] * diameter) ** 2:
            continue
        box = _cropped(mask)
        overlap = (_TEMPLATES & box).sum((1, 2)) / (_TEMPLATES | box).sum((1, 2))
        extent = max(np.ptp(np.flatnonzero(mask.any(axis))) + 1 for axis in (0, 1)) / diameter
        size = min(SIZES, key=lambda name: abs(SIZES[name] - extent))
        things.append(Thing(size, _PALETTE_NAMES[color], SHAPES[int(overlap.argmax())], position))
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
