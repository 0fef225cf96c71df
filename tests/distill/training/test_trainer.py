from __future__ import annotations

import json
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.checkpoints.folder import file_hashes, read_config
from distill.checkpoints.sources import resolve
from distill.checkpoints.surgery import make_student
from distill.checkpoints.tensors import component_tensors
from distill.common.errors import UserError
from distill.data.make_cache import make_cache
from distill.models.architectures import find_architecture
from distill.models.families import MINI_FAMILY
from distill.models.module_map import make_module_map
from distill.training.accelerator import check_fsdp, make_accelerator
from distill.training.guard import DivergenceGuard
from distill.training.objectives import Distill
from distill.training.objectives.taps import Level
from distill.training.options import TrainOptions
from distill.training.output.state import TrainingState, gather_student
from distill.training.prepare import check_successor
from distill.training.recipes import Recipe, Stage
from distill.training.step import Pair
from distill.training.trainer import train
from tests.distill.small_runs import HALF, curve, short_recipe, small_recipe


def test_a_finished_student_is_a_pipeline_that_draws(finished: Path) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(finished)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a small red ring at the top", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (128, 128, 3)
    assert component_tensors(finished / "unet").keys() == pipe.unet.state_dict().keys()
    assert not (finished / "stages").exists() and not (finished / "state").exists()


def test_the_whole_recipe_is_in_the_checkpoint(finished: Path, mini_vega: Path) -> None:
    about = json.loads((finished / "slimxl.json").read_text())
    assert about["recipe"] == json.loads(json.dumps(small_recipe(str(mini_vega)).as_dict()))
    assert about["module_map"]["paths"]["down_blocks.2.attentions.0.transformer_blocks.0"].endswith(
        ".0.transformer_blocks.0"
    )


def test_a_finished_student_says_how_it_was_made_and_not_where(finished: Path, mini_vega: Path) -> None:
    """The pictures of every stage stay; no config and no card names a folder of this machine."""
    assert [path.name for path in sorted((finished / "samples").iterdir())] == ["01-shorten-up.png", "02-whole.png"]
    card = ModelCard.load(finished / "README.md")
    assert card.data.library_name == "diffusers" and card.data.base_model is None, "the teacher is a local folder"
    for told in ("shapes:45", "| whole | random-mini-vega |", "feature", "](samples/02-whole.png)", "licences"):
        assert told in card.text, told
    for path in [finished / "README.md", *finished.glob("*/*.json"), finished / "model_index.json"]:
        assert str(mini_vega.parent) not in path.read_text() and str(finished.parent) not in path.read_text(), path


def _with_another_vae(teacher: Path, folder: Path) -> Path:
    shutil.copytree(teacher, folder)
    [weights] = (folder / "vae").glob("*.safetensors")
    save_file(
        {key: value + 0 if "bias" not in key else value + 1 for key, value in load_file(weights).items()}, weights
    )
    return folder


def test_a_student_ships_the_networks_that_its_cache_was_made_with(
    cache: Path, mini_vega: Path, tmp_path: Path
) -> None:
    """Where a later teacher has another VAE, its stage names its cache, or is refused before training."""
    other = _with_another_vae(mini_vega, tmp_path / "other")
    make_cache(other, "shapes:9", tmp_path / "cache")
    first, second = (
        replace(stage, steps=1) for stage in small_recipe(str(mini_vega), ema_decay=None, validation_prompts=()).stages
    )
    recipe = small_recipe(str(mini_vega), ema_decay=None, validation_prompts=())

    def ships(name: str, stage: Stage) -> Path:
        options = {"cache": cache, "out": tmp_path / name, "workdir": tmp_path}
        train(replace(recipe, stages=(first, stage)), **options)
        hashes = [file_hashes(folder, ["vae"]) for folder in (tmp_path / name, mini_vega, other)]
        return (mini_vega, other)[hashes[1:].index(hashes[0])]

    with pytest.raises(UserError, match=r'made with other files of vae than .*name it as that stage\'s "cache"'):
        ships("refused", replace(second, teacher=str(other)))
    assert not (tmp_path / "refused").exists()
    assert ships("own", replace(second, teacher=str(other), cache=str(tmp_path / "cache"))) == other
    assert ships("shared", replace(second, teacher=str(other), cache=str(cache))) == mini_vega


def test_the_loss_scale_of_fp16_begins_anew_in_each_stage() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    unet = UNet2DConditionModel(**find_architecture("mini-vega").unet_config)
    depth = find_architecture("mini-vega").depth
    recipe = Recipe(name="one", stages=())
    Pair(accelerator, None, unet, make_module_map("first", depth, depth), torch.ones(1), {}, recipe, TrainOptions())
    assert accelerator.scaler.get_scale() == 65536.0


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


def test_a_second_run_does_nothing_and_says_so(finished: Path, mini_vega: Path, cache: Path, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    train(small_recipe(str(mini_vega)), cache=cache, out=finished, workdir=finished, options=TrainOptions())
    assert capsys.readouterr().out == f"{finished} is finished, nothing is to do\n"
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_a_folder_of_another_recipe_is_refused(finished: Path, mini_vega: Path, cache: Path) -> None:
    with pytest.raises(UserError, match="belongs to another recipe"):
        train(small_recipe(str(mini_vega), seed=7), cache=cache, out=finished, workdir=finished)


def test_a_model_that_no_training_made_is_not_written_over(cache: Path, mini_vega: Path, tmp_path: Path) -> None:
    shutil.copytree(mini_vega, tmp_path / "foreign")
    make_student(mini_vega, find_architecture(HALF, MINI_FAMILY), "first", tmp_path / "untrained")
    for out in (tmp_path / "foreign", tmp_path / "untrained"):
        before = sorted(out.rglob("*"))
        with pytest.raises(UserError, match="is not a training run of slimxl: it holds model_index"):
            train(small_recipe(str(mini_vega)), cache=cache, out=out, workdir=tmp_path)
        assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "processes", "message"),
    [
        ({}, 1, "start it with torchrun"),
        ({"mixed_precision": "fp16"}, 2, "use --mixed-precision bf16"),
        ({"optimizer": "adamw-8bit"}, 2, "shards adamw only"),
    ],
)
def test_what_fsdp_cannot_do_is_refused(options: dict[str, str], processes: int, message: str) -> None:
    asked = {"mixed_precision": "bf16", "optimizer": "adamw"} | options
    with pytest.raises(UserError, match=message):
        check_fsdp(processes, **asked)


def test_fsdp_by_accelerates_launcher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="give --fsdp"):
        make_accelerator(TrainOptions(), tmp_path)


def test_gradient_checkpointing_and_accumulation_change_no_loss(
    short: list[float], cache: Path, mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are on: the blocks run again in backward, and each step has as many of these as it accumulates."""
    micro_batches: list[int] = []
    resnet_batches: list[int] = []

    class Watched(Pair):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            assert self.student.is_gradient_checkpointing
            for module, seen in ((self.student, micro_batches), (self.student.up_blocks[0].resnets[0], resnet_batches)):
                module.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.append(len(inputs[0])))

    monkeypatch.setattr("distill.training.stage.Pair", Watched)
    options = TrainOptions(log_every=1, gradient_checkpointing=True, accumulation=2)
    train(short_recipe(mini_vega), cache=cache, out=tmp_path / "out", workdir=tmp_path, options=options)
    assert curve(tmp_path / "out") == pytest.approx(short, rel=1e-4)
    assert micro_batches == [2] * (4 * 2)
    assert resnet_batches == [2] * (4 * 2 * 2)


@pytest.mark.parametrize("level", ["layer", "self-attention"])
def test_compiled_blocks_are_tapped_as_before(
    level: Level, cache: Path, mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the graphs captured and differentiated ahead of time, but run by eager kernels: what taps could break is
    the capture, and generating code takes minutes."""
    compiled = []
    real = torch.nn.Module.compile

    def compile_eagerly(module: torch.nn.Module, *_args: object, **_options: object) -> None:
        compiled.append(module)
        real(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    torch._dynamo.reset()
    recipe = short_recipe(mini_vega, steps=2, objective=Distill(level=level, normalize=True))
    for name, compile in (("plain", False), ("compiled", True)):
        options = TrainOptions(log_every=1, compile=compile)
        train(recipe, cache=cache, out=tmp_path / name, workdir=tmp_path, options=options)
    assert len(compiled) == 10 + 15 and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert curve(tmp_path / "compiled") == pytest.approx(curve(tmp_path / "plain"), rel=1e-4)


def test_pictures_at_fixed_seeds_and_curves_along_the_way(
    cache: Path, mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student that draws one is gone, from the GPU too, when training goes on."""
    drawing: list[weakref.ref[UNet2DConditionModel]] = []

    def gathered(state: TrainingState) -> UNet2DConditionModel | None:
        assert all(student() is None for student in drawing)
        student = gather_student(state)
        drawing.append(weakref.ref(student))
        return student

    monkeypatch.setattr("distill.training.stage.gather_student", gathered)
    recipe = replace(short_recipe(mini_vega, learning_rate=0.0), validation_prompts=("a small red ring at the top",))
    options = TrainOptions(validate_every=1, report_to="tensorboard", log_every=1)
    train(recipe, cache=cache, out=tmp_path / "out", workdir=tmp_path, options=options)
    pictures = sorted((tmp_path / "out" / "samples").glob("01-whole-0*.png"))
    assert [path.stem[-1] for path in pictures] == ["1", "2", "3"]
    assert len(drawing) == 4
    assert len({path.read_bytes() for path in pictures}) == 1, "the same weights, so the same pictures"
    events = EventAccumulator(str(tmp_path / "out" / "trackers" / "slimxl")).Reload()
    for line in map(json.loads, (tmp_path / "out" / "losses.jsonl").read_text().splitlines()):
        for name, value in line["terms"].items():
            assert events.Scalars(name)[line["step"] - 1].value == pytest.approx(value)


def test_the_guard_tells_a_bad_step_from_a_bad_road() -> None:
    guard = DivergenceGuard(factor=5, patience=10)
    assert not any(guard.diverged(1.0 + 0.1 * (i % 3)) for i in range(30))
    assert not any(guard.diverged(loss) for loss in (50.0, 50.0, 1.0, 50.0))
    assert [guard.diverged(50.0) for _ in range(9)] == [False] * 8 + [True]


def test_a_disk_too_small_for_the_checkpoints_is_refused_first(
    cache: Path, mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(UserError, match="what this run has yet to keep needs"):
        train(short_recipe(mini_vega), cache=cache, out=tmp_path / "out", workdir=tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamw-8bit"}, "needs the package bitsandbytes"),
        ({"report_to": "tensorboard"}, "--report-to tensorboard needs the package tensorboard"),
        ({"report_to": "tensorbord"}, "unknown tracker 'tensorbord'.*did you mean 'tensorboard'"),
        ({"mixed_precision": "fp16"}, "needs a GPU"),
    ],
)
def test_what_is_not_there_is_one_line(
    options: dict, message: str, cache: Path, mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("bitsandbytes", "bitsandbytes.optim", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        train(short_recipe(mini_vega), cache=cache, out=tmp_path, workdir=tmp_path, options=TrainOptions(**options))


def test_a_loss_that_is_not_finite_stops_the_run(cache: Path, mini_vega: Path, tmp_path: Path) -> None:
    recipe = small_recipe(str(mini_vega))
    broken = replace(recipe, stages=(replace(recipe.stages[0], learning_rate=float("inf")),))
    with pytest.raises(UserError, match="is not finite"):
        train(broken, cache=cache, out=tmp_path / "out", workdir=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulation": 0}, "--accumulation is 0; the least is 1"),
        ({"checkpoint_every": 0}, "--checkpoint-every is 0; the least is 1"),
        ({"keep_checkpoints": 0}, "--keep-checkpoints is 0; the least is 1"),
        ({"validate_every": -1}, "--validate-every is -1; the least is 0"),
    ],
)
def test_a_number_out_of_range_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainOptions(**options)


def test_pictures_of_no_prompts_are_refused(cache: Path, mini_vega: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="validation_prompts, and it has none"):
        train(
            short_recipe(mini_vega), cache=cache, out=tmp_path, workdir=tmp_path, options=TrainOptions(validate_every=2)
        )


def test_a_batch_that_cannot_be_shared_is_refused(cache: Path, mini_vega: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be shared"):
        train(
            small_recipe(str(mini_vega)),
            cache=cache,
            out=tmp_path,
            workdir=tmp_path,
            options=TrainOptions(accumulation=3),
        )


def test_a_teacher_of_another_depth_or_prediction_is_refused(
    cache: Path, mini_vega: Path, mini_sdxl: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="mid_block_type is 'UNetMidBlock2D', was 'UNetMidBlock2DCrossAttn'"):
        check_successor(mini_sdxl, mini_vega)
    copy = tmp_path / "v"
    resolve("random:mini-vega", tmp_path).rename(copy)
    scheduler = copy / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(UserError, match=r"predicts 'v_prediction', the first, .* 'epsilon'"):
        check_successor(mini_vega, copy)
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(UserError, match="stage whole: the teacher predicts 'sample'; the objective 'distill' needs"):
        train(short_recipe(copy), cache=cache, out=tmp_path / "out", workdir=tmp_path)


def test_gradients_are_clipped(cache: Path, mini_vega: Path, tmp_path: Path) -> None:
    """To nothing at all, and so the student stays what surgery made it, whatever the learning rate."""
    recipe = replace(short_recipe(mini_vega, learning_rate=0.1), max_grad_norm=0.0, weight_decay=0.0)
    train(recipe, cache=cache, out=tmp_path / "out", workdir=tmp_path)
    student, teacher = (
        load_file(next((folder / "unet").glob("*.safetensors"))) for folder in (tmp_path / "out", mini_vega)
    )
    assert all(torch.equal(value, teacher[key]) for key, value in student.items())


def test_ema_starts_from_the_student(mini_vega: Path, cache: Path, tmp_path: Path) -> None:
    recipe = small_recipe(str(mini_vega), ema_decay=0.9999)
    frozen = tuple(replace(stage, learning_rate=0.0) for stage in recipe.stages)
    train(replace(recipe, stages=frozen), cache=cache, out=tmp_path / "out", workdir=tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet").state_dict()
    teacher = UNet2DConditionModel.from_pretrained(mini_vega / "unet").state_dict()
    assert all(torch.allclose(value, teacher[key], atol=1e-6) for key, value in unet.items())


def test_weights_that_the_last_update_broke_are_no_student(mini_vega: Path, cache: Path, tmp_path: Path) -> None:
    recipe = short_recipe(mini_vega, steps=1, learning_rate=1e300)
    with pytest.raises(UserError, match="stage whole: the student's weights are not finite any more"):
        train(recipe, cache=cache, out=tmp_path / "out", workdir=tmp_path)
    assert not (tmp_path / "out" / "slimxl.json").exists()
