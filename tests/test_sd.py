"""Another family goes the whole road by its entry in the catalogue alone: Stable Diffusion 1.5's topology, narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import engines
from distill.checkpoints.folder import find_architecture_of
from distill.checkpoints.load import load_pipeline
from distill.checkpoints.sources import resolve
from distill.checkpoints.surgery import make_student
from distill.models.architectures import find_architecture
from engines.building.build import build_bundle
from export import ExportOptions, export_checkpoint


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


def draw(pipe: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    asked = {"width": 192, "height": 128, "num_inference_steps": 3, "output_type": "np"}
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", negative_prompt="a ring", generator=generator, **asked).images


def psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(1 / np.mean((one - other) ** 2)))


def test_a_student_is_a_pipeline_of_its_family(student: Path) -> None:
    assert find_architecture_of(student).name == "mini-tiny-sd"
    pipe = load_pipeline(student, torch.float32)
    assert isinstance(pipe, StableDiffusionPipeline) and pipe.unet.mid_block is None


def test_engines_and_optimum_draw_what_diffusers_draws(student: Path, onnx: Path) -> None:
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    build_bundle(onnx, onnx.parent / "bundle", gpus=[], flavor="onnxruntime")
    pipe = engines.load(onnx.parent / "bundle", device="cpu")
    assert isinstance(pipe, StableDiffusionPipeline)
    wanted = draw(load_pipeline(student, torch.float32))
    assert wanted.std() > 0.01
    for other in (pipe, ORTStableDiffusionPipeline.from_pretrained(onnx, provider="CPUExecutionProvider")):
        assert psnr_db(draw(other), wanted) > 80
