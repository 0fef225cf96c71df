"""Another family goes the whole road by its entry in the catalogue alone: Stable Diffusion 1.5's topology, narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import engines
from distill.checkpoints.folder import find_architecture_of
from distill.checkpoints.load import load_pipeline
from distill.checkpoints.sources import resolve
from distill.checkpoints.surgery import make_student
from distill.common.errors import UserError
from distill.models.architectures import find_architecture
from engines.building.build import build_bundle
from export import ExportOptions, export_checkpoint
from tests.engines import drawing
from tests.engines.drawing import MASK, PICTURE, psnr_db, quiet


@pytest.fixture(scope="module")
def student(workdir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cut from a random teacher: a level, the middle and half of the layers are gone."""
    out = tmp_path_factory.mktemp("sd") / "tiny"
    teacher = resolve("random:mini-sd-1.5", workdir)
    plan = make_student(teacher, find_architecture("mini-tiny-sd"), "first", out)
    assert plan.unused and plan.sources["up_blocks.0.resnets.1.conv1.bias"] == "up_blocks.1.resnets.2.conv1.bias"
    return out


@pytest.fixture(scope="module")
def onnx(student: Path) -> Path:
    out = student.parent / "onnx"
    export_checkpoint(student, out, options=ExportOptions(precision="fp32"))
    return out


SIZE = {"width": 192, "height": 128}


def draw(pipe: Any, **arguments: Any) -> np.ndarray:
    return drawing.draw(quiet(pipe), negative_prompt="a ring", **(SIZE | arguments))


def test_a_student_is_a_pipeline_of_its_family(student: Path) -> None:
    assert find_architecture_of(student).name == "mini-tiny-sd"
    pipe = load_pipeline(student, torch.float32)
    assert isinstance(pipe, StableDiffusionPipeline) and pipe.unet.mid_block is None


def test_engines_and_optimum_draw_what_diffusers_draws(student: Path, onnx: Path) -> None:
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    components = ["unet", "vae_decoder", "vae_encoder", "text_encoder"]
    build_bundle(onnx, onnx.parent / "bundle", gpus=[], flavor="onnxruntime", components=components)
    pipe = engines.load(onnx.parent / "bundle", device="cpu")
    assert isinstance(pipe, StableDiffusionPipeline)
    theirs = load_pipeline(student, torch.float32)
    wanted = draw(theirs)
    for other in (pipe, ORTStableDiffusionPipeline.from_pretrained(onnx, provider="CPUExecutionProvider")):
        assert psnr_db(draw(other), wanted) > 80
    with pytest.raises(UserError, match="without hidden state -2, it has last_hidden_state"):
        draw(pipe, clip_skip=1)
    asked: dict[str, Any] = {"image": PICTURE.resize((192, 128)), "strength": 0.7, "num_inference_steps": 3}
    for task, kind, more in (
        ("image-to-image", diffusers.StableDiffusionImg2ImgPipeline, {"width": None, "height": None}),
        ("inpaint", diffusers.StableDiffusionInpaintPipeline, {"mask_image": MASK}),
    ):
        ours = engines.load(onnx.parent / "bundle", device="cpu", task=task)  # type: ignore[arg-type]
        assert isinstance(ours, kind)
        assert psnr_db(draw(ours, **asked, **more), draw(kind.from_pipe(theirs), **asked, **more)) > 40
