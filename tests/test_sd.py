"""Another family goes the whole road by its entry in the catalogue alone: Stable Diffusion 1.5's topology, narrow."""

from __future__ import annotations

import hashlib
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
from engines.serving.environment import make_environment
from engines.serving.options import Serving
from engines.serving.repository import write_repository
from engines.serving.server import Server
from export import ExportOptions, export_checkpoint
from tests.engines.drawing import MASK, PICTURE, psnr_db, quiet
from tests.engines.drawing import draw as draw_by
from tests.engines.serving.triton_here import ROOT, ask, drawing, free_address


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


@pytest.fixture(scope="module")
def bundle(onnx: Path) -> Path:
    out = onnx.parent / "bundle"
    components = ["unet", "vae_decoder", "vae_encoder", "text_encoder"]
    build_bundle(onnx, out, gpus=[], flavor="onnxruntime", components=components)
    return out


SIZE = {"width": 192, "height": 128}


def draw(pipe: Any, **arguments: Any) -> np.ndarray:
    return draw_by(quiet(pipe), negative_prompt="a ring", **(SIZE | arguments))


def test_a_student_is_a_pipeline_of_its_family(student: Path) -> None:
    assert find_architecture_of(student).name == "mini-tiny-sd"
    pipe = load_pipeline(student, torch.float32)
    assert isinstance(pipe, StableDiffusionPipeline) and pipe.unet.mid_block is None


def test_engines_and_optimum_draw_what_diffusers_draws(student: Path, onnx: Path, bundle: Path) -> None:
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    pipe = engines.load(bundle, device="cpu")
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
        ours = engines.load(bundle, device="cpu", task=task)  # type: ignore[arg-type]
        assert isinstance(ours, kind)
        assert psnr_db(draw(ours, **asked, **more), draw(kind.from_pipe(theirs), **asked, **more)) > 40


@pytest.mark.slow
def test_triton_serves_it_with_the_same_request(bundle: Path, tmp_path: Path) -> None:
    environment = make_environment(ROOT / "out/triton")
    serving = Serving(flavor="onnxruntime", gpus="none", execution_env=environment.folder, warm_up=False)
    write_repository(bundle, tmp_path / "repo", serving)
    server = Server(tmp_path / "repo", environment, free_address(), tmp_path / "log")
    try:
        server.wait_ready()
        answers = ask(environment, server.address, drawing(**SIZE), drawing("grpc", **SIZE), drawing(width=96))
    finally:
        server.stop()
        server.wait()
    generator = torch.Generator().manual_seed(5)
    wanted = quiet(engines.load(bundle, device="cpu"))(
        "a red circle", num_inference_steps=2, guidance_scale=5.0, generator=generator, **SIZE
    )
    pixels = np.asarray(wanted.images[0]).tobytes()
    assert [answer["sha256"] for answer in answers[:2]] == [hashlib.sha256(pixels).hexdigest()] * 2
    assert "size 96x128 is not served" in answers[2]["error"]
