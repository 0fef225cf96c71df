"""A few-step checkpoint knows how it is drawn with, and every room reads it from there."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler
from safetensors.torch import save_file

from bench.contestants.contestant import Contestant
from bench.contestants.spec import Spec, make_contestant
from bench.floor.roofline import ModelConfigs, component_costs
from bench.run import taught
from bench.workload import Workload
from distill.checkpoints.load import load_parts
from distill.checkpoints.sampling import Sampling, sampling_of
from distill.checkpoints.sources import MINI_TEACHERS
from distill.common.errors import UserError
from distill.common.files import read_json
from distill.models.architectures import ARCHITECTURES
from distill.models.resolution import Resolution
from distill.training.objectives import Consistency, Distill, Guidance, GuidanceRange, Halving, Objective
from engines.building import build
from engines.building.contents import starting_manifest
from engines.bundle import read_manifest, write_manifest
from engines.modules.pipelines import drawing_as
from engines.onnx_folder import read_onnx_folder
from engines.serving.request import DEFAULTS, read_values
from export import ExportOptions, export_checkpoint

FIXED = GuidanceRange(low=4.0, high=4.0, embedding=None)
LCM = Consistency().sampling(None)


@pytest.mark.parametrize(
    ("stages", "scheduler", "steps", "guidance_scale", "one_pass"),
    [
        ([Consistency()], "LCMScheduler", 4, 10.0, True),
        ([Consistency(guidance=FIXED)], "LCMScheduler", 4, 1.0, True),
        ([Consistency(guidance=None)], "LCMScheduler", 4, None, False),
        ([Guidance(guidance=GuidanceRange(low=0.0, high=8.0))], None, None, 5.0, True),
        ([Halving(steps=8)], "DDIMScheduler", 8, None, False),
        ([Halving(steps=8, guidance=FIXED), Halving(steps=4)], "DDIMScheduler", 4, 1.0, True),
        ([Guidance(), Halving(steps=8), Distill()], "DDIMScheduler", 8, 8.0, True),
    ],
)
def test_a_student_is_drawn_as_it_was_taught_and_else_as_its_teacher(
    stages: list[Objective], scheduler: str | None, steps: int | None, guidance_scale: float | None, one_pass: bool
) -> None:
    sampling = None
    for objective in stages:
        sampling = objective.sampling(sampling)
    assert sampling is not None and (sampling.scheduler, sampling.steps) == (scheduler, steps)
    assert (sampling.guidance_scale, sampling.one_pass) == (guidance_scale, one_pass)


@pytest.mark.parametrize(
    ("objective", "kind", "timesteps"),
    [(Consistency(), LCMScheduler, [999, 759, 499, 259]), (Halving(steps=4), DDIMScheduler, [999, 749, 499, 249])],
)
def test_diffusers_loads_the_scheduler_with_the_same_noise_levels(
    objective: Objective, kind: type, timesteps: list[int], tmp_path: Path
) -> None:
    shutil.copytree(MINI_TEACHERS["sdxl"], tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    sampling = objective.sampling(None)
    assert sampling is not None
    sampling.write_scheduler(tmp_path / "model")
    scheduler = load_parts(tmp_path / "model")["scheduler"]
    assert type(scheduler) is kind
    teacher = EulerDiscreteScheduler.from_pretrained(MINI_TEACHERS["sdxl"], subfolder="scheduler")
    assert scheduler.alphas_cumprod.tolist() == teacher.alphas_cumprod.tolist()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == timesteps


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"steps": 0}, r"damaged at sampling.steps: input should be greater than 0"),
        ({"guidance_scale": "5"}, "sampling.guidance_scale: input should be a valid number"),
        ({"stepz": 4}, "sampling.stepz: unexpected keyword argument"),
    ],
)
def test_what_a_folder_says_is_checked(stated: dict, message: str, tmp_path: Path) -> None:
    assert sampling_of(tmp_path) is None
    (tmp_path / "slimxl.json").write_text(json.dumps({"sampling": stated}))
    with pytest.raises(UserError, match=message):
        sampling_of(tmp_path)


@pytest.mark.parametrize("by_lora", [False, True])
def test_it_goes_with_the_model_into_the_onnx_folder_and_the_manifest(by_lora: bool, tmp_path: Path) -> None:
    """With the checkpoint, or with the LoRA that is fused into one: then its scheduler goes too."""
    model, about, loras = MINI_TEACHERS["sdxl"], tmp_path / "lora", ((tmp_path / "lora" / "x.safetensors", 1.0),)
    if by_lora:
        about.mkdir()
        layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        halves = {f"{layer}.lora_A.weight": torch.ones(4, 64), f"{layer}.lora_B.weight": torch.ones(64, 4)}
        save_file(halves, about / "x.safetensors")
    else:
        loras, about = (), tmp_path / "model"
        model = shutil.copytree(model, about)
    (about / "slimxl.json").write_text(json.dumps({"sampling": asdict(LCM)}))
    options = ExportOptions(precision="fp32", components=("text_encoder",), loras=loras)
    export_checkpoint(model, tmp_path / "onnx", options=options, workdir=tmp_path)
    folder = read_onnx_folder(tmp_path / "onnx")
    assert folder.sampling == LCM
    write_manifest(tmp_path, starting_manifest(tmp_path / "bundle", folder, replace=False))
    assert read_manifest(tmp_path).source.sampling == LCM
    if by_lora:
        assert read_json(tmp_path / "onnx" / "scheduler" / "scheduler_config.json")["_class_name"] == "LCMScheduler"
        assert read_json(tmp_path / "onnx" / "model_index.json")["scheduler"] == ["diffusers", "LCMScheduler"]
        assert type(load_parts(MINI_TEACHERS["sdxl"])["scheduler"]) is EulerDiscreteScheduler


def test_an_engine_pipeline_takes_its_own_steps_unless_told_otherwise() -> None:
    class Pipe:
        def __call__(self, prompt: str, num_inference_steps: int = 50, guidance_scale: float = 5.0) -> tuple:
            return prompt, num_inference_steps, guidance_scale

    pipe: Any = drawing_as(Pipe, LCM)()
    assert isinstance(pipe, Pipe) and type(pipe).__name__ == "Pipe" and drawing_as(Pipe, None) is Pipe
    assert pipe("a") == ("a", 4, 10.0)
    assert pipe("a", 8) == ("a", 8, 10.0) and pipe("a", guidance_scale=3.0) == ("a", 4, 3.0)
    with pytest.raises(UserError, match=r"51 steps are more than this model's schedule has \(50\); .* draw in 4"):
        pipe("a", num_inference_steps=51)


def test_a_server_takes_its_model_s_own_steps_unless_told_otherwise() -> None:
    asked = {"prompt": np.array([b"a"], dtype=object)}
    values = read_values(asked, ["128x128"], LCM)
    assert (values["steps"], values["guidance"]) == (4, 10.0)
    assert read_values(asked, ["128x128"])["steps"] == DEFAULTS["steps"]
    with pytest.raises(UserError, match="51 steps are more than"):
        read_values(asked | {"steps": np.array([51])}, ["128x128"], LCM)


@pytest.mark.parametrize(
    ("sampling", "guidance", "expected"),
    [
        (LCM, None, "never"),
        (LCM, "any", "any"),
        (None, None, "always"),
        (Halving(steps=4).sampling(None), None, "always"),
    ],
)
def test_a_build_takes_the_guidance_that_the_model_needs(
    sampling: Sampling | None, guidance: Any, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Listed(Exception):
        pass

    def listed(_folder: Any, **options: Any) -> None:
        raise Listed(options["guidance"])

    monkeypatch.setattr(build, "read_onnx_folder", lambda root: SimpleNamespace(root=root, sampling=sampling))
    monkeypatch.setattr(build, "list_jobs", listed)
    with pytest.raises(Listed, match=expected):
        build.build_bundle(tmp_path / "onnx", tmp_path / "out", gpus=[], guidance=guidance)


def test_a_contestant_may_draw_as_it_was_taught_whatever_is_asked() -> None:
    class Taught(Contestant):
        sampling = replace(LCM, guidance_scale=1.0)

    asked = Workload(resolution=Resolution(128, 128), steps=8)
    assert Taught("a").asked(asked) == asked
    own = Taught("a", as_taught=True).asked(asked)
    assert (own.steps, own.guided, own.resolution) == (4, False, asked.resolution)
    words = make_contestant(Spec.parse("a=bundle@onnxruntime+taught+shared:folder"), "cpu")
    assert words.as_taught and (words.runtime, words.layout) == ("slimxl bundle, onnxruntime, shared", "shared")
    assert not make_contestant(Spec.parse("a=eager@fp32:folder"), "cpu").as_taught


def test_a_unet_that_is_told_w_computes_one_pass() -> None:
    configs = ARCHITECTURES["mini-vega"].configs
    told = configs | {"unet": configs["unet"] | {"time_cond_proj_dim": 256}}
    work = Workload(resolution=Resolution(128, 128), steps=4, guidance_scale=5.0)
    two, one = (component_costs(ModelConfigs.of(some), work)["unet"][1].flops for some in (configs, told))
    assert one == pytest.approx(two / 2, rel=0.01)


def test_a_benchmark_takes_what_all_were_taught() -> None:
    def contestants(*known: Sampling | None) -> Any:
        return [SimpleNamespace(sampling=sampling) for sampling in known]

    assert taught(contestants(LCM, LCM), "steps", "30") == "4"
    assert taught(contestants(LCM, None), "steps", "30") == "30"
    assert taught(contestants(None), "guidance_scale", "5") == "5"
