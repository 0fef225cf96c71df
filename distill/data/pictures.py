"""Captioned pictures, from wherever they lie, one sample at a time.

shapes:N          N pictures of the procedural world, made as they are read
FOLDER            pictures with captions beside them (NAME.txt, NAME.caption) or in metadata.jsonl, .csv or .parquet;
                  shards; tables in parquet; what `save_to_disk` wrote
PATTERN.tar       local WebDataset shards (`data-{000..099}.tar`, `data-*.tar`)
hf:ORG/NAME       a Hugging Face dataset, its split `train`
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import ImageOps

from distill.common.errors import UserError
from distill.data.folders import open_folder
from distill.data.rows import Found
from distill.data.samples import BadSample, Fitting, Sample, fit_to_bucket
from distill.data.shapes import random_scene, render
from distill.data.shards import find_shards, is_pattern_of_shards, open_shards
from distill.data.tables import open_dataset
from distill.models.families import Family

MOST_SHAPES = 10**9


class ShapesSource:
    """The procedural world, every resolution in turn. Never flipped: its captions name left and right."""

    def __init__(self, count: int, family: Family, seed: int) -> None:
        self.count, self.family, self.seed, self.identity = count, family, seed, ["shapes", count]
        self.notes: list[str] = []

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Sample:
        rng = np.random.default_rng([self.seed, index])
        resolution = self.family.resolutions[index % len(self.family.resolutions)]
        scene = random_scene(rng)
        size = (resolution.height, resolution.width)
        return Sample(f"shape-{index}", render(scene, resolution, rng), scene.caption, resolution, size, (0, 0), False)


class PictureSource:
    """Pictures of files or tables, read one at a time by index: first one sample of each, then its other variants."""

    def __init__(self, found: Found, family: Family, seed: int, fitting: Fitting) -> None:
        self.rows, self.notes, self.family, self.seed = found.rows, found.notes, family, seed
        self.fitting = fitting.for_family(family)
        self.identity = [found.identity, asdict(self.fitting)]

    def __len__(self) -> int:
        return len(self.rows) * self.fitting.variants

    def read(self, index: int) -> Sample:
        """Raises BadSample for one that cannot be decoded, has no caption, or is too small."""
        variant, number = divmod(index, len(self.rows))
        key = f"row {number}"
        try:
            row = self.rows[number]
            key = f"{row.key}#{variant}" if variant else row.key
            with row.open() as image:
                rng = np.random.default_rng([self.seed, number, variant])
                return fit_to_bucket(key, ImageOps.exif_transpose(image), row.caption(), self.family, rng, self.fitting)
        except BadSample:
            raise
        except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, zlib.error, …
            raise BadSample(f"{key}: {type(error).__name__}: {error}") from None


Source = ShapesSource | PictureSource


def open_source(spec: str, family: Family, seed: int, fitting: Fitting | None = None) -> Source:
    """The source that `spec` names. Raises UserError for an unknown form, an empty or caption-less data set."""
    fitting = fitting or Fitting()
    if not spec.strip():
        raise UserError("--data is empty: is a variable of the shell not set?")
    if spec.startswith("shapes:"):
        return ShapesSource(_number_of_shapes(spec, fitting), family, seed)
    return PictureSource(_find(spec), family, seed, fitting)


def _number_of_shapes(spec: str, fitting: Fitting) -> int:
    count = spec.removeprefix("shapes:")
    if not (count.isascii() and count.isdecimal() and len(count) <= len(str(MOST_SHAPES)) and int(count)):
        raise UserError(f"data {spec!r}: shapes:N needs a whole number from 1 to {MOST_SHAPES}, e.g. shapes:2000")
    if fitting.variants > 1:
        raise UserError(f"--variants {fitting.variants}: {spec} makes every picture anew; ask for more of them instead")
    return int(count)


def _find(spec: str) -> Found:
    name = spec.removeprefix("hf:")
    if not name.strip():
        raise UserError(f"data {spec!r}: hf:ORG/NAME needs the name of a dataset")
    if Path(name).is_dir():
        return open_folder(Path(name))
    if spec.startswith("hf:"):
        return open_dataset(name)
    if is_pattern_of_shards(spec):
        return open_shards(find_shards(spec), spec)
    if Path(name).is_file():
        raise UserError(f"data {spec!r} is a file; give the folder that holds it, unpacked where it is an archive")
    raise UserError(f"data {spec!r} is no folder and no known form: shapes:N, FOLDER, SHARDS.tar or hf:ORG/NAME")
