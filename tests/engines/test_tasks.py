"""A bundle draws from a picture and into one, as diffusers' own classes do with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import engines
from distill.common.errors import UserError
from tests.engines.drawing import MASK, PICTURE, draw, psnr_db, quiet

FROM_PICTURE = {"image": PICTURE, "strength": 0.6, "num_inference_steps": 4, "width": None, "height": None}
INTO_PICTURE = {"image": PICTURE, "mask_image": MASK, "strength": 0.9, "num_inference_steps": 4}


@pytest.mark.parametrize(
    ("task", "name", "arguments"),
    [
        ("image-to-image", "StableDiffusionXLImg2ImgPipeline", FROM_PICTURE),
        ("image-to-image", "StableDiffusionXLImg2ImgPipeline", FROM_PICTURE | {"num_images_per_prompt": 3}),
        ("inpaint", "StableDiffusionXLInpaintPipeline", INTO_PICTURE),
        ("inpaint", "StableDiffusionXLInpaintPipeline", INTO_PICTURE | {"guidance_scale": 1.0, "strength": 0.5}),
    ],
)
def test_the_picture_of_diffusers(
    mini_bundle: Path, pipeline: Any, reference: Any, task: Any, name: str, arguments: dict[str, Any]
) -> None:
    kind = getattr(diffusers, name)
    wanted = draw(quiet(kind(**reference.components)), **arguments)
    loaded = quiet(engines.load(mini_bundle, task=task))
    assert isinstance(loaded, kind)
    for ours in (loaded, quiet(kind(**pipeline.components))):
        assert psnr_db(draw(ours, **arguments), wanted) >= 40


def test_auto_pipelines_find_the_class_by_the_loaded_one(pipeline: Any) -> None:
    for auto, task in (("AutoPipelineForImage2Image", "Img2Img"), ("AutoPipelineForInpainting", "Inpaint")):
        found = getattr(diffusers, auto).from_pipe(pipeline)
        assert type(found).__name__ == f"StableDiffusionXL{task}Pipeline" and found.unet is pipeline.unet


def test_the_vae_encodes_as_diffusers_vae(pipeline: Any, reference: Any) -> None:
    pixels = torch.rand(2, 3, 96, 160) * 2 - 1
    with torch.no_grad():
        ours, wanted = (each.vae.encode(pixels).latent_dist for each in (pipeline, reference))
        assert torch.allclose(ours.mean, wanted.mean, atol=1e-4) and torch.allclose(ours.std, wanted.std, atol=1e-4)
        whole, other = (each.vae(pixels).sample for each in (pipeline, reference))
        assert torch.allclose(whole, other, atol=1e-3)


def test_a_bundle_without_an_encoder_says_how_to_add_it(toy_bundle: Path) -> None:
    line = "no onnxruntime engine for vae_encoder.*--flavor onnxruntime --components vae_encoder"
    with pytest.raises(UserError, match=line):
        engines.load(toy_bundle, "onnxruntime", task="image-to-image")
    with pytest.raises(UserError, match=line):
        engines.load(toy_bundle, "onnxruntime").vae.encode(torch.zeros(1, 3, 128, 128))
    with pytest.raises(UserError, match=r"unknown task 'img2img': known are .*image-to-image, inpaint, text-to-image"):
        engines.load(toy_bundle, task="img2img")  # type: ignore[arg-type]
