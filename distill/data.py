"""Captioned pictures, from wherever they lie, one sample at a time.

shapes:N          N pictures of the procedural world, made as they are read
folder            pictures with captions beside them (`name.txt`) or in `metadata.jsonl` (file_name, text)
pattern.tar       WebDataset shards (`data-{000..099}.tar`) with jpg/png/webp and txt
hf:org/name       a Hugging Face dataset with columns `image` and `text` (needs the `datasets` package)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from distill.architectures import Family, Resolution
from distill.errors import UserError
from distill.shapes import random_scene, render

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


class BadSample(Exception):
    """A sample that cannot be used; the message names it and says why. It is skipped and counted."""


@dataclass(frozen=True)
class Sample:
    """A picture fitted to a bucket, with SDXL's micro-conditioning (arXiv 2307.01952, section 2.2).

    `image` is uint8 (height, width, 3) at the bucket's resolution; `original_size` and `crop_top_left` are
    (height, width) and (top, left) in pixels, before fitting and of the crop after resizing.
    """

    key: str
    image: np.ndarray
    caption: str
    resolution: Resolution
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    flipped: bool

    @property
    def time_ids(self) -> tuple[int, ...]:
        """(original height, width, crop top, left, target height, width)."""
        return (*self.original_size, *self.crop_top_left, self.resolution.height, self.resolution.width)


def nearest_bucket(width: int, height: int, family: Family) -> Resolution:
    """The family's resolution with the nearest aspect ratio, on a logarithmic scale."""
    return min(family.resolutions, key=lambda r: abs(np.log(width * r.height / (height * r.width))))


def fit_to_bucket(key: str, image: Image.Image, caption: str, family: Family, rng: np.random.Generator) -> Sample:
    """Resizes to cover the nearest bucket, crops at a random place, flips half the time.

    Raises BadSample for an empty caption or a picture smaller than its bucket (SDXL would learn upscaling blur).
    """
    if not caption.strip():
        raise BadSample(f"{key}: empty caption")
    width, height = image.size
    bucket = nearest_bucket(width, height, family)
    scale = max(bucket.width / width, bucket.height / height)
    if scale > 1:
        raise BadSample(f"{key}: {width}x{height} is smaller than its bucket {bucket}")
    resized = image.convert("RGB").resize(
        (max(bucket.width, round(width * scale)), max(bucket.height, round(height * scale))), Image.Resampling.LANCZOS
    )
    left = int(rng.integers(0, resized.width - bucket.width + 1))
    top = int(rng.integers(0, resized.height - bucket.height + 1))
    pixels = np.asarray(resized.crop((left, top, left + bucket.width, top + bucket.height)))
    flipped = bool(rng.random() < 0.5)
    return Sample(key, pixels[:, ::-1] if flipped else pixels, caption, bucket, (height, width), (top, left), flipped)


class ShapesSource:
    """The procedural world, every resolution in turn. Never flipped: its captions name left and right."""

    def __init__(self, count: int, family: Family, seed: int) -> None:
        self.count, self.family, self.seed = count, family, seed

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Sample:
        rng = np.random.default_rng([self.seed, index])
        resolution = self.family.resolutions[index % len(self.family.resolutions)]
        scene = random_scene(rng)
        size = (resolution.height, resolution.width)
        return Sample(f"shape-{index}", render(scene, resolution, rng), scene.caption, resolution, size, (0, 0), False)


class FolderSource:
    """Pictures of a folder, in the order of their names."""

    def __init__(self, folder: Path, family: Family, seed: int) -> None:
        self.family, self.seed = family, seed
        metadata = folder / "metadata.jsonl"
        if metadata.is_file():
            rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines() if line.strip()]
            self.items = [(folder / row["file_name"], row.get("text", "")) for row in rows]
        else:
            images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            self.items = [(path, None) for path in images]
        if not self.items:
            raise UserError(f"{folder} holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))})")
        if all(caption is None and not path.with_suffix(".txt").is_file() for path, caption in self.items):
            raise UserError(f"{folder} holds no captions: give NAME.txt beside each picture, or metadata.jsonl")

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> Sample:
        path, caption = self.items[index]
        try:
            text = path.with_suffix(".txt").read_text(encoding="utf-8") if caption is None else caption
            with Image.open(path) as image:
                return fit_to_bucket(path.name, image, text, self.family, np.random.default_rng([self.seed, index]))
        except (OSError, UnicodeDecodeError, UnidentifiedImageError) as error:
            raise BadSample(f"{path.name}: {error}") from None


class RowsSource:
    """Rows already in memory order: of WebDataset shards or of a Hugging Face dataset."""

    def __init__(self, rows: list | object, family: Family, seed: int) -> None:
        self.rows, self.family, self.seed = rows, family, seed
        if not len(self):
            raise UserError("the data set is empty")

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]

    def read(self, index: int) -> Sample:
        row = self.rows[index]  # type: ignore[index]
        rng = np.random.default_rng([self.seed, index])
        return fit_to_bucket(str(row.get("key", index)), row["image"], row.get("text") or "", self.family, rng)


def open_source(spec: str, family: Family, seed: int) -> ShapesSource | FolderSource | RowsSource:
    """The source that `spec` names. Raises UserError for an unknown form, an empty or caption-less data set."""
    if spec.startswith("shapes:"):
        count = spec.removeprefix("shapes:")
        if not count.isdigit() or not int(count):
            raise UserError(f"data {spec!r}: shapes:N needs a positive number, e.g. shapes:2000")
        return ShapesSource(int(count), family, seed)
    if spec.startswith("hf:"):
        try:
            from datasets import load_dataset
        except ImportError:
            raise UserError(f"data {spec!r} needs the package `datasets`: pip install datasets") from None
        return RowsSource(load_dataset(spec.removeprefix("hf:"), split="train"), family, seed)
    if ".tar" in spec:
        return RowsSource(list(_webdataset_rows(spec)), family, seed)
    if Path(spec).is_dir():
        return FolderSource(Path(spec), family, seed)
    raise UserError(f"data {spec!r} is no folder and no known form: shapes:N, FOLDER, SHARDS.tar or hf:ORG/NAME")


def _webdataset_rows(pattern: str) -> Iterator[dict]:
    import webdataset

    shards = webdataset.WebDataset(pattern, shardshuffle=False, handler=webdataset.warn_and_continue)
    for row in shards.decode("pil", handler=webdataset.warn_and_continue):
        image = next((row[kind] for kind in ("jpg", "jpeg", "png", "webp") if kind in row), None)
        if image is not None:
            yield {"key": row["__key__"], "image": image, "text": row.get("txt", "")}
