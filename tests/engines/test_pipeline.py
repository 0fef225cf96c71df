"""The bundle as a diffusers pipeline: the same pictures as diffusers itself, and all that a sampler may ask for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)

import engines
from distill.architectures import MINI_FAMILY
from distill.errors import UserError
from export import ExportOptions, export_checkpoint


@pytest.fixture(scope="module")
def reference(mini_vega: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(mini_vega)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def mini_bundle(tmp_path_factory: pytest.TempPathFactory, mini_vega: Path) -> Path:
    """A true export of the mini family at Vega's depth, in fp32, as ONNX Runtime engines."""
    root = tmp_path_factory.mktemp("mini")
    components = ("unet", "vae_decoder", "text_encoder", "text_encoder_2")
    export_checkpoint(mini_vega, root / "onnx", options=ExportOptions(precision="fp32", components=components))
    engines.build_bundle(root / "onnx", root / "bundle", gpus=[], flavor="onnxruntime")
    return root / "bundle"


@pytest.fixture(scope="module")
def pipeline(mini_bundle: Path) -> StableDiffusionXLPipeline:
    pipeline = engines.load(mini_bundle, threads=1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: StableDiffusionXLPipeline, **arguments: object) -> np.ndarray:
    settings = {"num_inference_steps": 3, "width": 128, "height": 128, "prompt": "a red circle"} | arguments
    return np.stack(pipeline(generator=torch.Generator().manual_seed(7), output_type="np", **settings).images)


def psnr_db(image: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of pictures in [0, 1]."""
    assert image.shape == other.shape and np.isfinite(image).all() and image.std() > 0.01
    return float(-10 * np.log10(max(np.mean((image - other) ** 2), 1e-12)))


@pytest.mark.parametrize(
    "arguments",
    [{"width": resolution.width, "height": resolution.height} for resolution in MINI_FAMILY.resolutions]
    + [
        {"negative_prompt": "a blue star"},
        {"guidance_scale": 1.0},
        {"guidance_scale": 9.0, "guidance_rescale": 0.7},
        {"num_images_per_prompt": 3},
        {"prompt": ["a red circle", "a blue star"], "negative_prompt": ["", "green"]},
        {"original_size": (64, 64), "crops_coords_top_left": (8, 0)},
    ],
    ids=str,
)
def test_same_seed_same_picture(
    reference: StableDiffusionXLPipeline, pipeline: StableDiffusionXLPipeline, arguments: dict
) -> None:
    assert psnr_db(draw(pipeline, **arguments), draw(reference, **arguments)) >= 40


def test_group_norms_are_spelled_as_the_cpu_is_quickest_with_them(mini_bundle: Path) -> None:
    [file] = mini_bundle.glob("unet/*/model.onnx")
    kinds = Counter(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)
    assert (kinds["GroupNormalization"], kinds["InstanceNormalization"], kinds["Attention"]) == (0, 43, 30)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        HeunDiscreteScheduler,
        LCMScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_any_scheduler(
    reference: StableDiffusionXLPipeline, pipeline: StableDiffusionXLPipeline, scheduler: type
) -> None:
    results = []
    for each in (pipeline, reference):
        original = each.scheduler
        each.scheduler = scheduler.from_config(original.config)
        results.append(draw(each, num_inference_steps=4))
        each.scheduler = original
    assert psnr_db(*results) >= 40


def test_callbacks_see_and_may_change_the_latents(pipeline: StableDiffusionXLPipeline) -> None:
    seen = []

    def callback(pipe: object, step: int, timestep: torch.Tensor, values: dict) -> dict:
        seen.append((step, tuple(values["latents"].shape)))
        return {"latents": torch.zeros_like(values["latents"])}

    zeroed = draw(pipeline, callback_on_step_end=callback)
    assert seen == [(step, (1, 4, 16, 16)) for step in range(3)]
    assert not np.allclose(zeroed, draw(pipeline))


def test_latents_out_and_embeddings_in(pipeline: StableDiffusionXLPipeline) -> None:
    embeddings = pipeline.encode_prompt("a red circle")
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = dict(zip(names, embeddings, strict=True))
    assert np.allclose(draw(pipeline, prompt=None, **given), draw(pipeline), atol=1e-5)
    latents = pipeline("x", width=160, height=96, num_inference_steps=1, output_type="latent").images
    assert latents.shape == (1, 4, 12, 20)


def test_resolution_that_the_bundle_lacks(pipeline: StableDiffusionXLPipeline) -> None:
    with pytest.raises(UserError, match=r"resolution 256x256 is not in the bundle's unet: it has 128x128, .*96x224"):
        draw(pipeline, width=256, height=256)


def test_what_an_engine_cannot_do_is_said(pipeline: StableDiffusionXLPipeline) -> None:
    with pytest.raises(UserError, match="clip_skip"):
        draw(pipeline, clip_skip=1)
    with pytest.raises(UserError, match="compiled without cross_attention_kwargs"):
        draw(pipeline, cross_attention_kwargs={"scale": 0.5})
    with pytest.raises(UserError, match="cannot move to cuda"):
        pipeline.to("cuda")
    assert pipeline.to("cpu") is pipeline


def test_unknown_or_absent_flavor(mini_bundle: Path) -> None:
    with pytest.raises(UserError, match="unknown flavor 'openvino'"):
        engines.load(mini_bundle, flavor="openvino")
    with pytest.raises(UserError, match="has no tensorrt engines, it has onnxruntime"):
        engines.load(mini_bundle, flavor="tensorrt")
    with pytest.raises(UserError, match="needs ONNX Runtime's CUDAExecutionProvider"):
        engines.load(mini_bundle, device="cuda:0")


def test_a_bundle_of_several_flavors_loads_what_runs_here(toy_bundle: Path) -> None:
    pipeline = engines.load(toy_bundle)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.component.outputs["out_sample"].dtype == "float32"
    assert draw(pipeline).shape == (1, 128, 128, 3)
