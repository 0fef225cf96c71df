from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from distill.cache import make_cache
from distill.errors import UserError
from distill.recipes import RECIPES, LossWeights, Recipe, Stage, find_recipe
from distill.sources import component_tensors, read_config, resolve
from distill.trainer import TrainOptions, check_successor, train

HALF = "-/1,1/1,1:0:1,1,1/1,1,1/-"  # half of Vega's last transformers: a student that trains in a moment


def small_recipe(teacher: str, **changes) -> Recipe:
    losses = LossWeights(level="layer", normalize=True)
    stage = Stage(
        name="whole", teacher=teacher, student=HALF, steps=6, layer_map="first", losses=losses, warmup_steps=2
    )
    shorter = replace(stage, name="shorten-up", student="-/1,1/2,2:0:1,1,1/1,1,1/-", steps=3, learning_rate=1e-3)
    defaults = {"batch_size": 4, "ema_decay": 0.9, "validation_prompts": ("a small red ring at the top",)}
    return Recipe(name="small", stages=(shorter, stage), **defaults | changes)


@pytest.fixture(scope="module")
def cache(mini_vega: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    make_cache(mini_vega, "shapes:45", folder)
    return folder


@pytest.fixture(scope="module")
def finished(mini_vega: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("students") / "small"
    options = TrainOptions(checkpoint_every=2, log_every=1)
    train(small_recipe(str(mini_vega)), cache=cache, out=out, workdir=out, options=options)
    return out


def test_a_finished_student_is_a_pipeline_that_draws(finished: Path) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(finished)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a small red ring at the top", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (128, 128, 3)
    assert component_tensors(finished / "unet").keys() == pipe.unet.state_dict().keys()


def test_the_whole_recipe_is_in_the_checkpoint(finished: Path, mini_vega: Path) -> None:
    about = json.loads((finished / "slimxl.json").read_text())
    assert about["recipe"] == json.loads(json.dumps(small_recipe(str(mini_vega)).as_dict()))
    assert about["layer_map"]["down_blocks.2.attentions.0"] == [0]


def test_every_term_is_logged_by_name_and_they_sum_to_the_loss(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "losses.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        *(("1-shorten-up", step) for step in range(1, 4)),
        *(("2-whole", step) for step in range(1, 7)),
    ]
    for line in lines:
        assert sum(line["terms"].values()) == pytest.approx(line["loss"], rel=1e-4)
        assert {"task", "output", "feature/mid_block.resnets.0"} <= line["terms"].keys()


def test_the_student_is_not_the_teacher(finished: Path, mini_vega: Path) -> None:
    student, teacher = (component_tensors(folder / "unet") for folder in (finished, mini_vega))
    assert len(student) < len(teacher)
    assert read_config(finished, "unet")["transformer_layers_per_block"] == [1, [1, 1], [1, 1]]


def test_a_second_run_does_nothing(finished: Path, mini_vega: Path, cache: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    train(small_recipe(str(mini_vega)), cache=cache, out=finished, workdir=finished, options=TrainOptions())
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_a_folder_of_another_recipe_is_refused(finished: Path, mini_vega: Path, cache: Path) -> None:
    with pytest.raises(UserError, match="belongs to another recipe"):
        train(small_recipe(str(mini_vega), seed=7), cache=cache, out=finished, workdir=finished)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_trainer import small_recipe
from distill.trainer import TrainOptions, train
cache, teacher, out = sys.argv[1:]
train(small_recipe(teacher), cache=Path(cache), out=Path(out), workdir=Path(out),
      options=TrainOptions(checkpoint_every=2, log_every=1))
"""


def _run(cache: Path, teacher: Path, out: Path, *launcher: str) -> subprocess.Popen:
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    path = out.with_suffix(".py")
    path.write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *launcher, str(path), str(cache), str(teacher), str(out)], env=environment)


def test_killed_at_random_points_the_run_ends_in_the_same_bytes(cache: Path, mini_vega: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert _run(cache, mini_vega, whole).wait() == 0
    killed = tmp_path / "killed"
    rng = random.Random(0)
    marks = ["stages/01-initial", "state/progress.json", "stages/01-shorten-up", "stages/02-initial"]
    for mark in marks:
        process = _run(cache, mini_vega, killed)
        while process.poll() is None and not (killed / mark).exists():
            time.sleep(0.01)
        time.sleep(rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert _run(cache, mini_vega, killed).wait() == 0
    for name in ("unet/diffusion_pytorch_model.safetensors", "samples.png"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    steps = [
        [
            (json.loads(line)["stage"], json.loads(line)["step"], json.loads(line)["loss"])
            for line in (run / "losses.jsonl").open()
        ]
        for run in (whole, killed)
    ]
    assert steps[0] == steps[1]


def test_two_processes_give_the_loss_curve_of_one(cache: Path, mini_vega: Path, finished: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29611")
    assert _run(cache, mini_vega, two, *launcher).wait() == 0
    curves = [[json.loads(line)["loss"] for line in (run / "losses.jsonl").open()] for run in (finished, two)]
    assert curves[0] == pytest.approx(curves[1], rel=2e-4)


def test_a_loss_that_is_not_finite_stops_the_run(cache: Path, mini_vega: Path, tmp_path: Path) -> None:
    recipe = small_recipe(str(mini_vega))
    broken = replace(recipe, stages=(replace(recipe.stages[0], learning_rate=float("inf")),))
    with pytest.raises(UserError, match="is not finite"):
        train(broken, cache=cache, out=tmp_path / "out", workdir=tmp_path)


def test_a_batch_that_cannot_be_shared_is_refused(cache: Path, mini_vega: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be shared"):
        train(
            small_recipe(str(mini_vega)),
            cache=cache,
            out=tmp_path,
            workdir=tmp_path,
            options=TrainOptions(accumulation=3),
        )


def test_a_successor_of_another_depth_or_prediction_is_refused(
    mini_vega: Path, mini_sdxl: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="mid_block_type is 'UNetMidBlock2D', was 'UNetMidBlock2DCrossAttn'"):
        check_successor(mini_sdxl, mini_vega)
    copy = tmp_path / "v"
    resolve("random:mini-vega", tmp_path).rename(copy)
    scheduler = copy / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(UserError, match="predicts 'v_prediction'"):
        check_successor(mini_vega, copy)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_end_in_the_student_they_are_named_after(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe.name == name and recipe.stages[-1].student == name


def test_published_figures_stand_in_the_published_recipes() -> None:
    recipe = find_recipe("ssd-1b")
    assert sum(stage.steps for stage in recipe.stages) == 251_000
    assert recipe.batch_size == 32 * 4 and {stage.learning_rate for stage in recipe.stages} == {1e-5}


def test_ema_starts_from_the_student(mini_vega: Path, cache: Path, tmp_path: Path) -> None:
    recipe = small_recipe(str(mini_vega), ema_decay=0.9999)
    frozen = tuple(replace(stage, learning_rate=0.0) for stage in recipe.stages)
    train(replace(recipe, stages=frozen), cache=cache, out=tmp_path / "out", workdir=tmp_path)
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet").state_dict()
    teacher = UNet2DConditionModel.from_pretrained(mini_vega / "unet").state_dict()
    assert all(torch.allclose(value, teacher[key], atol=1e-6) for key, value in unet.items())
