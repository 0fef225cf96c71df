from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter
from transformers import CLIPTokenizer

from distill.checkpoints.assemble import tokenizers_and_scheduler
from distill.data.shapes import ATTRIBUTES, SHAPES, SIZES, Scene, Thing, follows, random_scene, read_scene, render
from distill.models.families import MINI_FAMILY, SDXL_FAMILY, SHAPES_WORDS
from distill.models.resolution import Resolution

SCENE = Scene((Thing("large", "red", "circle", "top left"), Thing("small", "blue", "ring", "bottom")), "white")


@pytest.mark.parametrize("resolution", MINI_FAMILY.resolutions, ids=str)
def test_the_reader_reads_every_picture_right(resolution: Resolution) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        scene = random_scene(rng)
        assert read_scene(render(scene, resolution, rng)) == scene


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_soft_edges_and_noise_are_read_too(shape: str, size: str) -> None:
    rng = np.random.default_rng(0)
    for resolution in MINI_FAMILY.resolutions:
        scene = Scene((Thing(size, "blue", shape, "center"),), "white")
        sharp = Image.fromarray(render(scene, resolution))
        soft = np.asarray(sharp.filter(ImageFilter.GaussianBlur(1.4)))
        coarse = np.asarray(sharp.resize((resolution.width // 2, resolution.height // 2), Image.Resampling.BOX))
        noisy = np.asarray(sharp) + rng.normal(0, 12, (resolution.height, resolution.width, 3))
        for image in (soft, coarse, noisy.clip(0, 255).astype(np.uint8)):
            assert read_scene(image) == scene


def test_captions_are_read_back() -> None:
    assert Scene.parse(SCENE.caption) == SCENE
    with pytest.raises(ValueError, match="not a caption"):
        Scene.parse("a photograph of a cat")


@pytest.mark.parametrize(
    ("attribute", "other"),
    [
        ("color", SCENE.things[0]._replace(color="green")),
        ("shape", SCENE.things[0]._replace(shape="square")),
        ("size", SCENE.things[0]._replace(size="small")),
    ],
)
def test_each_wrong_attribute_is_told_from_the_others(attribute: str, other: Thing) -> None:
    image = render(Scene((other, SCENE.things[1]), "white"), MINI_FAMILY.resolutions[0])
    assert {name for name, right in follows(SCENE, image).items() if not right} == {attribute}


def test_a_missing_thing_and_a_wrong_background_are_told() -> None:
    image = render(Scene(SCENE.things[:1], "gray"), MINI_FAMILY.resolutions[0])
    result = follows(SCENE, image)
    assert not result["background"] and not result["position"] and set(result) == set(ATTRIBUTES)


def test_noise_follows_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert not all(follows(SCENE, noise).values())


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return tokenizers_and_scheduler(MINI_FAMILY)["tokenizer"]


def test_every_word_is_one_token_and_anything_else_is_bytes(tokenizer: CLIPTokenizer) -> None:
    assert len(tokenizer(SCENE.caption).input_ids) == len(SCENE.caption.split()) + 2
    ids = tokenizer("héllo 漢").input_ids
    assert ids[0] == 1022 and ids[-1] == 1023 and max(ids[1:-1]) < 1022
    scenes = [random_scene(np.random.default_rng(seed)) for seed in range(200)]
    assert {word for scene in scenes for word in scene.caption.split()} == set(SHAPES_WORDS)


@pytest.fixture(scope="module")
def clips() -> CLIPTokenizer:
    return tokenizers_and_scheduler(SDXL_FAMILY)["tokenizer"]


@pytest.mark.parametrize(
    ("text", "ids"),
    [  # as OpenAI's own tokenizer has them
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        (
            "isometric city block at night; neon (4k), trending on artstation",
            [595, 38702, 1305, 4593, 536, 930, 282, 13919, 263, 275, 330, 2361, 6087, 525, 1486, 2631],
        ),
        ("héllo wörld —", [71, 3459, 19293, 86, 31762, 730, 2005]),
    ],
)
def test_clips_own_tokenizer_is_clips(clips: CLIPTokenizer, text: str, ids: list[int]) -> None:
    assert len(clips) == 49408
    assert clips(text).input_ids == [49406, *ids, 49407]
