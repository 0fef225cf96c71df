"""One captioned picture, fitted to a resolution of the family: resized, flipped, cropped, with what SDXL is told of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from distill.common.errors import require_between
from distill.models.families import Family
from distill.models.resolution import Resolution

SmallPictures = Literal["upscale", "skip"]
Text = Literal["cached", "online"]
"""What is kept of captions: what the UNet reads of them, or their tokens, which the trainer encodes in each step."""

DIRECTION = "left right leftmost rightmost leftward rightward clockwise counterclockwise anticlockwise"
WRITING = (
    "text sign signs signage letter letters lettering word words writing written handwriting reads says saying spelling "
    "logo logos slogan title number numbers"
)
UNFLIPPED = re.compile(rf'\b({"|".join(f"{DIRECTION} {WRITING}".split())})\b|["“”„«»「」『』]', re.IGNORECASE)
"""A picture whose caption has one of these words, or quotes something, is never mirrored: the caption would be wrong."""

MOST_CHARACTERS = 10_000
"""Of a caption, of which the encoders read 77 tokens: a longer one is another file."""


class BadSample(Exception):
    """A sample that cannot be used; the message names it and says why. It is skipped and counted."""


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How pictures become samples: `small_pictures` says what happens to one smaller than its bucket (None: the family's
    rule), `flip` whether it may be mirrored, `variants` how many samples it gives."""

    small_pictures: SmallPictures | None = None
    flip: bool = True
    variants: int = 1

    def __post_init__(self) -> None:
        """Raises UserError for fewer than one sample a picture, or more than a thousand."""
        require_between(1, 1000, variants=self.variants)

    def for_family(self, family: Family) -> Fitting:
        """The same with `small_pictures` decided. A UNet that is told a picture's original size learns that enlarged ones
        are blurred; any other would learn to draw blurred."""
        usual: SmallPictures = "upscale" if family.conditioning.takes_sizes else "skip"
        return replace(self, small_pictures=self.small_pictures or usual)


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


def nearest_bucket(width: int, height: int, family: Family) -> Resolution:
    """The family's resolution with the nearest aspect ratio, on a logarithmic scale."""
    return min(family.resolutions, key=lambda r: abs(np.log(width * r.height / (height * r.width))))


def in_eight_bits(image: Image.Image) -> Image.Image:
    """The picture as RGB: grey levels of 16 bits scaled to 8, what is transparent laid on white.

    Raises ValueError for pixels of 32 bits and in floating point, whose black and white nothing states.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating point numbers of no known range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        if np.asarray(image).max() > 65535:
            raise ValueError("its pixels are whole numbers of 32 bits; save it with 8 or 16")
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return image.convert("RGB")


def fit_to_bucket(
    key: str, image: Image.Image, caption: str, family: Family, rng: np.random.Generator, fitting: Fitting
) -> Sample:
    """Resizes to cover the nearest bucket, flips half the time where that keeps the caption true, crops at random.

    Raises BadSample for an empty caption and one of a book's length, for a picture smaller than its bucket where these are
    to be skipped, and for one with fewer pixels than its latent has places.
    """
    if not caption.strip():
        raise BadSample(f"{key}: empty caption")
    if len(caption) > MOST_CHARACTERS:
        raise BadSample(f"{key}: its caption has {len(caption):,} characters; the most are {MOST_CHARACTERS:,}")
    width, height = image.size
    bucket = nearest_bucket(width, height, family)
    scale = max(bucket.width / width, bucket.height / height)
    if scale > 1 and fitting.for_family(family).small_pictures == "skip":
        raise BadSample(f"{key}: {width}x{height} is smaller than its bucket {bucket}")
    if scale > family.vae_scale_factor:
        raise BadSample(f"{key}: {width}x{height} has fewer pixels than the latent of its bucket {bucket} has places")
    resized = in_eight_bits(image).resize(
        (max(bucket.width, round(width * scale)), max(bucket.height, round(height * scale))), Image.Resampling.LANCZOS
    )
    flipped = bool(rng.random() < 0.5) and fitting.flip and not UNFLIPPED.search(caption)  # drawn for the crop's sake
    if flipped:  # before the crop, whose corner is told of the picture that is seen
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left = int(rng.integers(0, resized.width - bucket.width + 1))
    top = int(rng.integers(0, resized.height - bucket.height + 1))
    pixels = np.asarray(resized.crop((left, top, left + bucket.width, top + bucket.height)))
    return Sample(key, pixels, caption, bucket, (height, width), (top, left), flipped)
