from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from distill.common.errors import UserError
from distill.data.samples import BadSample, Fitting, Sample, fit_to_bucket, in_eight_bits, nearest_bucket
from distill.models.conditioning import SD
from distill.models.families import MINI_FAMILY, SDXL_FAMILY
from distill.models.resolution import Resolution


def fitted(image: Image.Image, caption: str = "a", seed: int = 0, **fitting: object) -> Sample:
    return fit_to_bucket("x", image, caption, MINI_FAMILY, np.random.default_rng(seed), Fitting(**fitting))


@pytest.mark.parametrize(
    ("size", "bucket"), [((4000, 4000), "1024x1024"), ((3000, 1200), "1536x640"), ((700, 900), "896x1152")]
)
def test_a_picture_goes_to_the_bucket_of_its_shape(size: tuple[int, int], bucket: str) -> None:
    assert nearest_bucket(*size, SDXL_FAMILY) == Resolution.parse(bucket)


@pytest.mark.parametrize("size", [(200, 300), (40, 60)])
def test_micro_conditioning_is_of_the_sample(size: tuple[int, int]) -> None:
    sample = fitted(Image.new("RGB", size))
    bucket = sample.resolution
    assert sample.image.shape == (bucket.height, bucket.width, 3)
    assert sample.original_size == (size[1], size[0])


def test_the_crops_corner_is_of_the_picture_that_is_seen() -> None:
    columns = np.broadcast_to(np.arange(250, dtype=np.uint8)[None, :, None], (96, 250, 3))
    seen = set()
    for seed in range(20):
        sample = fitted(Image.fromarray(columns.copy()), seed=seed)
        left = sample.crop_top_left[1]
        assert sample.image[0, 0, 0] == (249 - left if sample.flipped else left)
        seen.add((sample.flipped, left > 0))
    assert {(True, True), (False, True)} <= seen


@pytest.mark.parametrize(
    ("caption", "flip", "flipped"),
    [
        ("a cat on a chair", True, True),
        ("a cat on a chair", False, False),
        ("The LEFT of two cats", True, False),
        ("a left-hand glove", True, False),
        ("a stop sign", True, False),
        ("a mug that says hello", True, False),
        ('a mug with "hello"', True, False),
        ("a mug with “hello”", True, False),
        ("copyrighted designs of a cat's leftovers", True, True),
    ],
)
def test_what_is_named_by_side_or_holds_writing_is_not_mirrored(caption: str, flip: bool, flipped: bool) -> None:
    samples = [fitted(Image.new("RGB", (250, 150)), caption, seed, flip=flip) for seed in range(12)]
    assert any(sample.flipped for sample in samples) == flipped
    crops = [fitted(Image.new("RGB", (250, 150)), "a", seed).crop_top_left for seed in range(12)]
    assert [sample.crop_top_left for sample in samples] == crops


def test_deep_greys_keep_their_levels_and_what_is_transparent_is_white() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    data = BytesIO()
    Image.fromarray(ramp).save(data, "PNG")
    assert np.array_equal(np.asarray(in_eight_bits(Image.open(data)))[0, :, 1], np.arange(256))
    clear = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    clear.putpixel((1, 0), (0, 0, 0, 0))
    palette = clear.quantize()
    data = BytesIO()
    palette.save(data, "PNG")
    for image in (clear, palette, Image.open(data)):
        assert np.asarray(in_eight_bits(image))[0].tolist() == [[200, 0, 0], [255, 255, 255]]
    for mode, color, message in (("F", 0.5, "floating point"), ("I", 1 << 20, "32 bits")):
        with pytest.raises(ValueError, match=message):
            in_eight_bits(Image.new(mode, (2, 2), color))


@pytest.mark.parametrize(
    ("size", "caption", "small_pictures", "message"),
    [
        ((100, 100), "a", "skip", "100x100 is smaller than its bucket 128x128"),
        ((12, 12), "a", "upscale", "12x12 has fewer pixels than the latent of its bucket 128x128"),
        ((200, 200), " ", "upscale", "empty caption"),
        ((200, 200), "a" * 10_001, "upscale", "its caption has 10,001 characters"),
    ],
)
def test_too_small_and_captionless_pictures_are_bad_samples(size, caption, small_pictures, message: str) -> None:
    with pytest.raises(BadSample, match=f"x: {message}"):
        fitted(Image.new("RGB", size), caption, small_pictures=small_pictures)


def test_small_pictures_are_scaled_up_where_the_unet_is_told_their_size() -> None:
    assert Fitting().for_family(MINI_FAMILY).small_pictures == "upscale"
    untold = replace(MINI_FAMILY, conditioning=SD)
    assert Fitting().for_family(untold).small_pictures == "skip"
    assert Fitting(small_pictures="upscale").for_family(untold).small_pictures == "upscale"


@pytest.mark.parametrize("variants", [0, -1, float("nan")])
def test_a_picture_gives_one_sample_at_least(variants: float) -> None:
    with pytest.raises(UserError, match="--variants is"):
        Fitting(variants=variants)
