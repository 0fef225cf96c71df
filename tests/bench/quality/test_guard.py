import base64
import io

import numpy as np
import pytest
from PIL import Image

from bench.contestants.pictures import Pictures
from bench.quality.guard import cosine, follows_caption, guard, png_base64, psnr_db
from distill.data.shapes import Scene, Thing, render, shares
from distill.models.resolution import Resolution


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (1, 32, 48, 3), np.uint8)


def latents(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, 4, 4, 6)).astype(np.float32)


def test_psnr_of_a_known_difference():
    image = np.full((8, 8, 3), 100, np.uint8)
    assert psnr_db(image + np.uint8(1), image) == pytest.approx(48.13, abs=0.01)
    assert psnr_db(image, image) == np.inf


def test_cosine_knows_direction_and_refuses_what_is_not_finite():
    assert cosine(latents(), 3 * latents()) == pytest.approx(1)
    assert cosine(latents(), -latents()) == pytest.approx(-1)
    assert cosine(latents(), np.full((1, 4, 4, 6), np.nan)) == 0


def test_the_same_picture_passes_and_another_fails():
    same = guard(Pictures(picture(), latents()), Pictures(picture(), latents()))
    assert same.passed and same.identical and same.psnr_db is None
    other = guard(Pictures(picture(1), latents(1)), Pictures(picture(), latents()))
    assert other.passed is False
    assert any("PSNR" in word for word in other.words) and any("cosine" in word for word in other.words)


@pytest.mark.parametrize(
    ("images", "values", "word"),
    [
        (np.zeros((1, 8, 8, 3), np.uint8), latents(), "black"),
        (np.full((1, 8, 8, 3), 90, np.uint8), latents(), "flat"),
        (picture(), np.full((1, 4, 4, 6), np.nan, np.float32), "NaN"),
    ],
)
def test_a_broken_picture_fails_even_without_a_reference(images, values, word):
    found = guard(Pictures(images, values), None)
    assert found.passed is False and word in found.words[0]


def test_nothing_to_compare_with_is_not_a_pass():
    found = guard(Pictures(picture(), latents()), None, "no checkpoint")
    assert found.passed is None and found.words == ["no checkpoint"]
    assert Pictures(picture()).faults() == []


def test_another_size_fails():
    found = guard(Pictures(picture(), latents()), Pictures(picture()[:, :16], latents()))
    assert found.passed is False and "shape" in found.words[0]


def test_captions_of_the_shapes_world_are_checked_exactly():
    scene = Scene((Thing("large", "red", "circle", "center"),), "white")
    image = render(scene, Resolution(128, 128))
    assert all(follows_caption(scene.caption, image).values())
    wrong = Scene((Thing("large", "blue", "circle", "center"),), "white")
    assert follows_caption(wrong.caption, image)["color"] is False
    assert follows_caption("a lighthouse at dusk", image) is None
    found = shares([follows_caption(one.caption, image) for one in (scene, wrong)])
    assert found["color"] == 0.5 and found["all"] == 0.5 and found["background"] == 1.0


def test_the_png_holds_the_very_pixels():
    image = picture()[0]
    decoded = np.array(Image.open(io.BytesIO(base64.b64decode(png_base64(image)))))
    assert (decoded == image).all()
