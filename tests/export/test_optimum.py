"""Optimum's ONNX Runtime pipeline reads the folder and draws what diffusers draws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel

from distill.checkpoints.load import load_pipeline
from distill.models.architectures import ARCHITECTURES
from export.folder import export_checkpoint
from export.job import ExportOptions

optimum = pytest.importorskip("optimum.onnxruntime")


def psnr(folder: Path, checkpoint: Path, *, steps: int = 4, bound: bool = False, **kwargs: float) -> float:
    """Of one 160x96 picture, in dB; `bound` as on a GPU, where optimum reads the sizes of outputs, as in 8 * height, from
    the graph."""
    pictures = []
    for pipe in (
        optimum.ORTStableDiffusionXLPipeline.from_pretrained(folder, use_io_binding=bound),
        load_pipeline(checkpoint, torch.float32),
    ):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        size = {"width": 160, "height": 96, "num_inference_steps": steps, "output_type": "np"}
        pictures.append(pipe("a red circle at the left", generator=generator, **size, **kwargs).images)
    ours, theirs = pictures
    assert ours.shape == (1, 96, 160, 3) and theirs.std() > 0.01
    return float(-10 * np.log10(max(((ours - theirs) ** 2).mean(), 1e-20)))


def test_the_picture_is_diffusers(onnx_fp32: Path, mini_vega: Path) -> None:
    assert psnr(onnx_fp32, mini_vega, bound=True) > 90  # 40 are promised


def test_half_precision_draws_nearly_the_same(onnx_fp16: Path, mini_vega: Path) -> None:
    assert psnr(onnx_fp16, mini_vega) > 40


def test_a_consistency_student_runs_in_few_steps(mini_vega: Path, onnx_fp32: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpoint = tmp_path / "lcm"
    shutil.copytree(mini_vega, checkpoint, ignore=shutil.ignore_patterns("unet"))
    UNet2DConditionModel(**ARCHITECTURES["mini-vega"].unet_config, time_cond_proj_dim=32).save_pretrained(
        checkpoint / "unet"
    )
    LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        checkpoint / "scheduler"
    )
    index = json.loads((checkpoint / "model_index.json").read_text()) | {"scheduler": ["diffusers", "LCMScheduler"]}
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    export_checkpoint(checkpoint, tmp_path / "out", options=ExportOptions(precision="fp32", reuse=(onnx_fp32,)))
    assert psnr(tmp_path / "out", checkpoint, steps=2, guidance_scale=8.0) > 90
