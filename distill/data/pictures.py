"""Captioned pictures, from wherever they lie, one sample at a time.

shapes:N          N pictures of the procedural world, made as they are read
folder            pictures with captions beside them (`name.txt`) or in `metadata.jsonl` (file_name, text)
pattern.tar       local WebDataset shards (`data-{000..099}.tar`) with jpg/png/webp and txt
hf:org/name       a Hugging Face dataset with a column of pictures and one of captions: `text`, `caption` or `prompt`;
                  a local folder of parquet files too (needs the package `datasets`)
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from distill.common.errors import UserError
from distill.common.files import sha256_file
from distill.data.shapes import random_scene, render
from distill.models.families import Family
from distill.models.resolution import Resolution

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
CAPTION_COLUMNS = ("text", "caption", "prompt")


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


def in_eight_bits(image: Image.Image) -> Image.Image:
    """The picture as RGB: grey levels of 16 bits scaled to 8, what is transparent laid on white."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return image.convert("RGB")


def fit_to_bucket(key: str, image: Image.Image, caption: str, family: Family, rng: np.random.Generator) -> Sample:
    """Resizes to cover the nearest bucket, flips half the time, crops at a random place.

    Raises BadSample for an empty caption or a picture smaller than its bucket (SDXL would learn upscaling blur).
    """
    if not caption.strip():
        raise BadSample(f"{key}: empty caption")
    width, height = image.size
    bucket = nearest_bucket(width, height, family)
    scale = max(bucket.width / width, bucket.height / height)
    if scale > 1:
        raise BadSample(f"{key}: {width}x{height} is smaller than its bucket {bucket}")
    resized = in_eight_bits(image).resize(
        (max(bucket.width, round(width * scale)), max(bucket.height, round(height * scale))), Image.Resampling.LANCZOS
    )
    flipped = bool(rng.random() < 0.5)
    if flipped:  # before the crop, whose corner is told of the picture that is seen
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left = int(rng.integers(0, resized.width - bucket.width + 1))
    top = int(rng.integers(0, resized.height - bucket.height + 1))
    pixels = np.asarray(resized.crop((left, top, left + bucket.width, top + bucket.height)))
    return Sample(key, pixels, caption, bucket, (height, width), (top, left), flipped)


class ShapesSource:
    """The procedural world, every resolution in turn. Never flipped: its captions name left and right."""

    def __init__(self, count: int, family: Family, seed: int) -> None:
        self.count, self.family, self.seed, self.identity = count, family, seed, count

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Sample:
        rng = np.random.default_rng([self.seed, index])
        resolution = self.family.resolutions[index % len(self.family.resolutions)]
        scene = random_scene(rng)
        size = (resolution.height, resolution.width)
        return Sample(f"shape-{index}", render(scene, resolution, rng), scene.caption, resolution, size, (0, 0), False)


@dataclass(frozen=True)
class Row:
    """One captioned picture not yet read: `open` gives it as PIL's or raises whatever a decoder raises."""

    key: str
    open: Callable[[], Image.Image]
    caption: Callable[[], str]


class PictureSource:
    """Pictures of a folder, of WebDataset shards or of a Hugging Face dataset, read one at a time by index."""

    def __init__(self, rows: Sequence[Row] | HubRows, family: Family, seed: int, identity: object) -> None:
        self.rows, self.family, self.seed, self.identity = rows, family, seed, identity

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Sample:
        """Raises BadSample for one that cannot be decoded, has no caption, or is smaller than its bucket."""
        key = f"row {index}"
        try:
            row = self.rows[index]
            key = row.key
            with row.open() as image:
                rng = np.random.default_rng([self.seed, index])
                return fit_to_bucket(key, ImageOps.exif_transpose(image), row.caption(), self.family, rng)
        except BadSample:
            raise
        except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, zlib.error, …
            raise BadSample(f"{key}: {type(error).__name__}: {error}") from None


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of change, by which an edited file is known; None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _folder_rows(folder: Path) -> tuple[list[Row], object]:
    """Its rows and its identity, which an edited picture or caption changes."""
    metadata = folder / "metadata.jsonl"
    if metadata.is_file():
        rows, captioned = [], False
        for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                try:
                    entry = json.loads(line)
                    name, text = str(entry["file_name"]), str(entry.get("text") or "")
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise UserError(
                        f'{metadata}, line {number}: not of the form {{"file_name": "a.jpg", "text": "its caption"}}'
                    ) from None
                captioned |= bool(text.strip())
                rows.append(Row(name, partial(Image.open, folder / name), partial(str, text)))
        identity: list[object] = [sha256_file(metadata), *((row.key, _stamp(folder / row.key)) for row in rows)]
    else:
        images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        texts = [path.with_suffix(".txt") for path in images]
        rows = [
            Row(str(path.relative_to(folder)), partial(Image.open, path), partial(text.read_text, encoding="utf-8"))
            for path, text in zip(images, texts, strict=True)
        ]
        stamps = [_stamp(text) for text in texts]
        captioned = any(stamps)
        identity = [(row.key, _stamp(path), stamp) for row, path, stamp in zip(rows, images, stamps, strict=True)]
    if not rows:
        raise UserError(f"{folder} holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if not captioned:
        raise UserError(f"{folder} holds no captions: give NAME.txt beside each picture, or metadata.jsonl")
    return rows, identity


def _part_of(shard: Path, start: int, size: int) -> bytes:
    with shard.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _missing(what: str) -> Any:
    raise BadSample(what)


def _shard_rows(pattern: str) -> tuple[list[Row], object]:
    """The members of local WebDataset shards, found by their headers and read when wanted: what precedes the first dot
    of a file's name is its sample's key (https://github.com/webdataset/webdataset#the-webdataset-format). And their
    identity, which any change of a shard changes."""
    import braceexpand

    rows, captioned = [], False
    shards = [Path(name) for name in braceexpand.braceexpand(pattern)]
    for shard in shards:
        try:
            with tarfile.open(shard, "r:") as tar:
                places = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{shard} is no whole, uncompressed tar file that can be read here ({error})") from None
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        for name, start, size in places:
            folder, slash, base = name.rpartition("/")
            stem, _, suffix = base.partition(".")
            samples.setdefault(f"{folder}{slash}{stem}", {})[f".{suffix.lower()}"] = (start, size)
        for key, parts in samples.items():
            named = f"{shard.name}/{key}"
            image = next((place for suffix, place in parts.items() if suffix in IMAGE_SUFFIXES), None)
            text = parts.get(".txt")
            captioned |= text is not None
            rows.append(
                Row(
                    named,
                    partial(lambda s, p: Image.open(BytesIO(_part_of(s, *p))), shard, image)
                    if image
                    else partial(_missing, f"{named}: no picture ({', '.join(sorted(IMAGE_SUFFIXES))})"),
                    partial(lambda s, p: _part_of(s, *p).decode("utf-8"), shard, text) if text else partial(str, ""),
                )
            )
    if not rows:
        raise UserError(f"{pattern} holds no samples")
    if not captioned:
        raise UserError(f"{pattern} holds no captions: each sample needs KEY.txt beside its picture")
    return rows, [_stamp(shard) for shard in shards]


class HubRows:
    """Rows of a Hugging Face dataset, pictures left undecoded until they are opened."""

    def __init__(self, name: str) -> None:
        """Raises UserError where the dataset cannot be had, is empty, or has no column of pictures or of captions."""
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"data 'hf:{name}' needs the package `datasets`: pip install -c constraints.txt datasets"
            ) from None
        datasets.disable_progress_bars()
        try:
            dataset = datasets.load_dataset(name, split="train")
        except Exception as error:  # its builders raise anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"the dataset {name!r} cannot be had ({reason})") from None
        columns = dataset.features
        pictures = [column for column, kind in columns.items() if isinstance(kind, datasets.Image)]
        captions = [column for column in CAPTION_COLUMNS if column in columns]
        if not len(dataset):
            raise UserError(f"the dataset {name!r} is empty")
        if not pictures or not captions:
            raise UserError(
                f"the dataset {name!r} has the columns {', '.join(columns)}; wanted are one of type Image and one of "
                f"captions called {' or '.join(CAPTION_COLUMNS)}"
            )
        self.picture, self.caption = pictures[0], captions[0]
        self.fingerprint = dataset._fingerprint
        wanted = dataset.select_columns([self.picture, self.caption])  # another column may not even be readable
        self.dataset = wanted.cast_column(self.picture, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        row = self.dataset[index]
        stored = row[self.picture]
        return Row(
            f"row {index}",
            lambda: Image.open(BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]),
            lambda: row[self.caption] or "",
        )


Source = ShapesSource | PictureSource


def open_source(spec: str, family: Family, seed: int) -> Source:
    """The source that `spec` names. Raises UserError for an unknown form, an empty or caption-less data set."""
    if spec.startswith("shapes:"):
        count = spec.removeprefix("shapes:")
        if not count.isdigit() or not int(count):
            raise UserError(f"data {spec!r}: shapes:N needs a positive number, e.g. shapes:2000")
        return ShapesSource(int(count), family, seed)
    if spec.startswith("hf:"):
        hub = HubRows(spec.removeprefix("hf:"))
        return PictureSource(hub, family, seed, hub.fingerprint)
    if Path(spec).is_dir():
        rows, identity = _folder_rows(Path(spec))
    elif spec.endswith(".tar"):
        rows, identity = _shard_rows(spec)
    else:
        raise UserError(f"data {spec!r} is no folder and no known form: shapes:N, FOLDER, SHARDS.tar or hf:ORG/NAME")
    return PictureSource(rows, family, seed, identity)
