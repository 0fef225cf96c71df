"""KOALA's cut and models that predict v go the whole road."""

from __future__ import annotations

from pathlib import Path

import torch

import engines
from distill.checkpoints.folder import find_architecture_of
from distill.checkpoints.load import load_pipeline
from distill.checkpoints.sources import resolve
from distill.checkpoints.surgery import make_student
from distill.models.architectures import find_architecture
from engines.building.build import build_bundle
from export import ExportOptions, export_checkpoint
from tests.engines.drawing import draw, psnr_db, quiet


def test_a_bundle_draws_what_diffusers_draws_at_all_its_sizes(mini_sdxl: Path, tmp_path: Path) -> None:
    plan = make_student(mini_sdxl, find_architecture("mini-koala-700m"), "first", tmp_path / "student")
    assert plan.unused and not any(name.startswith("mid_block") for name in plan.sources)
    assert find_architecture_of(tmp_path / "student").name == "mini-koala-700m"
    export_checkpoint(tmp_path / "student", tmp_path / "onnx", options=ExportOptions(precision="fp32", check=False))
    build_bundle(tmp_path / "onnx", tmp_path / "bundle", gpus=[], flavor="onnxruntime")
    ours, theirs = quiet(engines.load(tmp_path / "bundle")), quiet(load_pipeline(tmp_path / "student", torch.float32))
    sizes = find_architecture("mini-koala-700m").family.resolutions
    assert [str(size) for size in sizes] == ours.unet.component.resolutions and len(sizes) == 9
    for size in sizes:
        asked = {"width": size.width, "height": size.height, "num_inference_steps": 2}
        assert psnr_db(draw(ours, **asked), draw(theirs, **asked)) > 60, size


def test_a_model_that_predicts_v_is_exported_and_drawn_with_as_that(workdir: Path, tmp_path: Path) -> None:
    """SD 2.1's way, on the narrow SD: the scheduler goes along, and without it the picture is another."""
    theirs = quiet(load_pipeline(resolve("random:mini-sd-1.5", workdir), torch.float32))
    plain = draw(theirs)
    theirs.scheduler = type(theirs.scheduler).from_config(theirs.scheduler.config, prediction_type="v_prediction")
    theirs.save_pretrained(tmp_path / "v")
    export_checkpoint(tmp_path / "v", tmp_path / "onnx", options=ExportOptions(precision="fp32", check=False))
    build_bundle(tmp_path / "onnx", tmp_path / "bundle", gpus=[], flavor="onnxruntime")
    ours = quiet(engines.load(tmp_path / "bundle"))
    assert ours.scheduler.config.prediction_type == "v_prediction"
    wanted = draw(theirs)
    assert psnr_db(draw(ours), wanted) > 60 > psnr_db(plain, wanted)
