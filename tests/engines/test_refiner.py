"""SDXL's refiner is a family like any other: a bundle of it finishes a picture as diffusers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline

import engines
from bench.contestants.contestant import find_family
from bench.contestants.spec import make_contestant, parse_specs
from distill.checkpoints.folder import find_architecture_of
from distill.checkpoints.load import load_pipeline
from distill.checkpoints.sources import resolve
from distill.common.errors import UserError
from distill.data.make_cache import make_cache
from distill.models.architectures import find_architecture
from distill.training.recipes import find_recipe
from distill.training.recipes.recipe import stage_modules
from engines.building.build import build_bundle
from engines.bundle import read_manifest
from engines.serving.options import Serving
from engines.serving.repository import write_repository
from export import ExportOptions, export_checkpoint
from export.prompts import read_prompts
from tests.engines.drawing import MASK, PICTURE, draw, psnr_db, quiet


@pytest.fixture(scope="module")
def checkpoint(workdir: Path) -> Path:
    return resolve("random:mini-refiner", workdir)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("refiner")
    export_checkpoint(checkpoint, out / "onnx", options=ExportOptions(precision="fp32", check=False))
    components = ["unet", "vae_decoder", "vae_encoder", "text_encoder_2"]
    build_bundle(out / "onnx", out / "bundle", gpus=[], flavor="onnxruntime", components=components)
    return out / "bundle"


def test_it_finishes_pictures_and_latents_as_diffusers_does(checkpoint: Path, bundle: Path) -> None:
    assert find_architecture_of(checkpoint).name == "mini-refiner"
    ours, theirs = quiet(engines.load(bundle)), quiet(load_pipeline(checkpoint, torch.float32))
    assert type(ours).__name__ == type(theirs).__name__ == StableDiffusionXLImg2ImgPipeline.__name__
    assert ours.config.requires_aesthetics_score
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    for asked in (
        {"image": PICTURE, "strength": 0.6, "num_inference_steps": 5, "aesthetic_score": 7.0},
        {"image": latents, "denoising_start": 0.6, "num_inference_steps": 6, "negative_prompt": "a ring"},
    ):
        drawn, wanted = (draw(pipe, width=None, height=None, **asked) for pipe in (ours, theirs))
        assert psnr_db(drawn, wanted) > 60, asked
    inpaint = quiet(engines.load(bundle, task="inpaint"))
    assert draw(inpaint, image=PICTURE, mask_image=MASK, strength=0.9).shape == (1, 128, 128, 3)


def test_base_and_refiner_share_the_steps_as_in_diffusers(
    pipeline: Any, reference: Any, checkpoint: Path, bundle: Path
) -> None:
    """The first steps by one bundle, the last by the other."""
    theirs = quiet(load_pipeline(checkpoint, torch.float32))
    pictures = []
    for base, refiner in ((pipeline, quiet(engines.load(bundle))), (reference, theirs)):
        asked = {"prompt": "a red circle", "num_inference_steps": 5, "generator": torch.Generator().manual_seed(7)}
        latents = base(**asked, denoising_end=0.6, output_type="latent", width=128, height=128).images
        pictures.append(refiner(**asked, image=latents, denoising_start=0.6, output_type="np").images)
    assert psnr_db(*pictures) >= 40


def test_it_draws_nothing_from_text_alone(bundle: Path) -> None:
    assert read_manifest(bundle).source.pipeline == "StableDiffusionXLImg2ImgPipeline"
    with pytest.raises(
        UserError, match=r"unknown task of this model 'text-to-image': known are controlnet, .*image-to-image, inpaint"
    ):
        engines.load(bundle, task="text-to-image")


def test_what_draws_from_text_alone_refuses_it(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    def contestant() -> None:
        [spec] = parse_specs(["one=eager:random:mini-refiner"])
        find_family([make_contestant(spec, "cpu", workdir=tmp_path)])

    for what in (
        lambda: write_repository(bundle, tmp_path / "repository", Serving()),
        lambda: read_prompts(None, checkpoint),
        contestant,
        lambda: make_cache(checkpoint, "shapes:2", tmp_path / "cache"),
        lambda: stage_modules(find_recipe("mini-vega"), find_architecture("mini-refiner")),
    ):
        with pytest.raises(UserError, match=r"is SDXL's refiner, which finishes .*; give the base model"):
            what()
    assert not list(tmp_path.iterdir())
