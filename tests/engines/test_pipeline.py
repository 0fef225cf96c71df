"""The bundle as a diffusers pipeline: the same pictures as diffusers itself, and all that a sampler may ask for."""

from __future__ import annotations

import json
import shutil
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
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

import engines
from distill.common.errors import UserError
from distill.models.architectures import ARCHITECTURES
from distill.models.families import MINI_FAMILY
from engines.flavors import LoadOptions
from engines.flavors.onnxruntime import OnnxRuntimeEngine, OnnxRuntimeFlavor
from export import ExportOptions, export_checkpoint
from tests.engines.drawing import draw, psnr_db
from tests.engines.toys import make_static, make_toy_onnx


@pytest.mark.parametrize(
    "arguments",
    [{"width": resolution.width, "height": resolution.height} for resolution in MINI_FAMILY.resolutions]
    + [
        {"negative_prompt": "a blue star"},
        {"guidance_scale": 1.0},
        {"guidance_scale": 9.0, "guidance_rescale": 0.7},
        {"num_images_per_prompt": 5},  # ten latents, in pieces of eight
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


def test_threads_rest_between_calls(mini_bundle: Path) -> None:
    """They would spin on beside torch and the other components, for which half of the time was once lost."""
    [file] = mini_bundle.glob("vae_decoder/*/model.onnx")
    settings = OnnxRuntimeEngine(file, ["sample"], LoadOptions(device="cpu")).session.get_session_options()
    assert settings.get_session_config_entry("session.force_spinning_stop") == "1"


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
    with pytest.raises(UserError, match="compiled without image_embeds"):
        draw(pipeline, ip_adapter_image_embeds=[torch.zeros(2, 1, 1, 8)])
    with pytest.raises(UserError, match="IP-Adapters run with the checkpoint"):
        pipeline.load_ip_adapter(
            {"image_proj": {}, "ip_adapter": {}}, subfolder="", weight_name="", image_encoder_folder=None
        )
    with pytest.raises(UserError, match="vocabulary is fixed"):
        pipeline.load_textual_inversion({"<toy>": torch.zeros(1, 64)}, token="<toy>")
    with pytest.raises(UserError, match="cannot move to cuda"):
        pipeline.to("cuda")
    assert pipeline.to("cpu") is pipeline
    pipeline.vae.enable_slicing()


@pytest.mark.filterwarnings("ignore:.*this call is padded")
def test_a_static_bundle_draws_the_picture_of_the_dynamic_one(toy_bundle: Path, tmp_path: Path) -> None:
    folder = make_static(make_toy_onnx(tmp_path / "onnx"), ["224x96"], batch=2)
    engines.build_bundle(folder, tmp_path / "bundle", gpus=[], flavor="onnxruntime")
    size = {"width": 224, "height": 96}
    static, dynamic = (draw(engines.load(b, flavor="onnxruntime"), **size) for b in (tmp_path / "bundle", toy_bundle))
    assert np.abs(static - dynamic).max() < 1e-5


def test_a_consistency_student_is_told_its_guidance(mini_vega: Path, mini_onnx: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpoint = tmp_path / "lcm"
    shutil.copytree(mini_vega, checkpoint, ignore=shutil.ignore_patterns("unet"))
    unet = UNet2DConditionModel(**ARCHITECTURES["mini-vega"].unet_config, time_cond_proj_dim=32)
    unet.save_pretrained(checkpoint / "unet")
    components = ("unet", "vae_decoder", "text_encoder", "text_encoder_2")
    options = ExportOptions(precision="fp32", components=components, reuse=(mini_onnx,), check=False)
    export_checkpoint(checkpoint, tmp_path / "onnx", options=options)
    engines.build_bundle(tmp_path / "onnx", tmp_path / "bundle", gpus=[], flavor="onnxruntime", guidance="never")
    pipelines = engines.load(tmp_path / "bundle"), StableDiffusionXLPipeline.from_pretrained(checkpoint)
    for each in pipelines:
        each.scheduler = LCMScheduler.from_config(each.scheduler.config)
    ours, theirs = (draw(each, num_inference_steps=2, guidance_scale=8.0) for each in pipelines)
    assert psnr_db(ours, theirs) >= 40
    with pytest.raises(UserError, match="compiled with timestep_cond; use a pipeline that passes it"):
        given = {"text_embeds": torch.zeros(1, 64), "time_ids": torch.zeros(1, 6)}
        pipelines[0].unet(torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 77, 64), added_cond_kwargs=given)


def test_unknown_or_absent_flavor(mini_bundle: Path) -> None:
    with pytest.raises(UserError, match="unknown flavor 'openvino'"):
        engines.load(mini_bundle, flavor="openvino")
    with pytest.raises(UserError, match="has no tensorrt engines, it has onnxruntime"):
        engines.load(mini_bundle, flavor="tensorrt")
    with pytest.raises(UserError, match="needs ONNX Runtime's CUDAExecutionProvider"):
        engines.load(mini_bundle, device="cuda:0")
    with pytest.raises(UserError, match="device 'gpu' is not known"):
        engines.load(mini_bundle, device="gpu")


def test_cuda_is_the_gpu_that_is_current_at_load(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is made later, in whichever thread, must lie on the GPU that was looked at."""
    opened = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(OnnxRuntimeFlavor, "check_load", lambda *_: None)
    monkeypatch.setattr(OnnxRuntimeFlavor, "load", lambda *given: opened.append(given[-1].device))
    pipeline = engines.load(toy_bundle, flavor="onnxruntime", device="cuda")
    assert str(pipeline.unet.device) == "cuda:1" and opened == ["cuda:1"] * 4


def test_other_weights_are_not_ignored(toy_bundle: Path, toy_onnx: Path, tmp_path: Path) -> None:
    engines.load(toy_bundle, flavor="onnxruntime", weights=toy_onnx)  # its own
    other = make_toy_onnx(tmp_path / "onnx", seed=1)
    with pytest.raises(UserError, match="keeps the weights it was built from"):
        engines.load(toy_bundle, flavor="onnxruntime", weights=other)
    with pytest.raises(UserError, match="holds no component of this pipeline"):
        engines.load(toy_bundle, flavor="onnxruntime", weights=tmp_path)


@pytest.mark.parametrize(
    ("part", "change"),
    [("outputs", {"name": "q"}), ("outputs", {"dtype": "int64"}), ("inputs", {"dtype": "uint8"})],
    ids=str,
)
def test_a_manifest_that_names_other_tensors_than_the_engine_has_is_refused(
    part: str, change: dict[str, str], toy_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    for engine in manifest["engines"]:
        engine[part][0] |= change
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"model\.onnx has .*, the manifest says .*rebuild it with"):
        engines.load(bundle, flavor="onnxruntime")


def test_a_bundle_of_several_flavors_loads_what_runs_here(toy_bundle: Path) -> None:
    pipeline = engines.load(toy_bundle)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.component.outputs["out_sample"].dtype == "float32"
    assert draw(pipeline).shape == (1, 128, 128, 3)
