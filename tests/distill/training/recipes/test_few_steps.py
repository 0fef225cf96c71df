"""Few-step stages in the training loop: one after another, stopped and gone on with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline

from distill.checkpoints.folder import read_config
from distill.checkpoints.sampling import sampling_of
from distill.checkpoints.surgery import extend_unet
from distill.checkpoints.tensors import component_tensors
from distill.common.errors import UserError
from distill.common.validation import from_json
from distill.training.objectives import Consistency, Distill, Guidance, GuidanceRange, Halving
from distill.training.options import TrainOptions
from distill.training.output.state import TrainingState
from distill.training.recipes import PREVIOUS, Recipe, Stage
from distill.training.step import Pair
from distill.training.trainer import train
from tests.distill.small_runs import HALF, curve, small_recipe

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def _recipe(teacher: Path) -> Recipe:
    """Pruned and guided in one pass, then in fewer steps, then consistent: each learns from the one before."""
    recipe = small_recipe(str(teacher), ema_decay=None, validation_prompts=())
    guided = replace(recipe.stages[1], name="guidance", steps=2, objective=Guidance(), learning_rate=1e-3)
    halved = Halving(steps=4, guidance=GuidanceRange(low=0.0, high=14.0))
    return replace(
        recipe,
        stages=(
            guided,
            replace(guided, name="halving", teacher=PREVIOUS, objective=halved),
            replace(guided, name="consistency", teacher=PREVIOUS, objective=Consistency(), steps=3),
        ),
    )


def test_few_step_stages_follow_each_other_and_go_on_where_they_were(
    cache: Path, mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in each stage, the last time with a target average that has moved; once with micro-batches."""
    options = TrainOptions(checkpoint_every=1, log_every=1)
    train(_recipe(mini_vega), cache=cache, out=tmp_path / "whole", workdir=tmp_path, options=options)
    save, saves = TrainingState.save, []

    def stop_at_times(self: TrainingState, folder: Path) -> None:
        saves.append(folder.name)
        if len(saves) in (2, 4, 6):
            raise KeyboardInterrupt
        save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "save", stop_at_times)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                train(_recipe(mini_vega), cache=cache, out=tmp_path / "stopped", workdir=tmp_path, options=options)
        train(_recipe(mini_vega), cache=cache, out=tmp_path / "stopped", workdir=tmp_path, options=options)
    assert (tmp_path / "stopped" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    accumulated = replace(options, accumulation=2)
    train(_recipe(mini_vega), cache=cache, out=tmp_path / "parts", workdir=tmp_path, options=accumulated)
    assert curve(tmp_path / "parts") == pytest.approx(curve(tmp_path / "whole"), rel=1e-3)

    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "whole")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.config.time_cond_proj_dim == 256 and pipe.unet.time_embedding.cond_proj.weight.abs().sum() > 0
    assert pipe("a small red ring", num_inference_steps=2, output_type="np").images.shape == (1, 128, 128, 3)
    assert sampling_of(tmp_path / "whole") == Consistency().sampling(None) and type(pipe.scheduler) is LCMScheduler
    terms = [next(iter(json.loads(line)["terms"])) for line in (tmp_path / "whole" / "losses.jsonl").open()]
    assert terms == ["guidance"] * 2 + ["halving"] * 2 + ["consistency"] * 3


def test_the_target_is_a_running_average() -> None:
    pair = object.__new__(Pair)
    pair.options = TrainOptions()
    pair.student, pair.target = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for net, value in ((pair.student, 2.0), (pair.target, 1.0)):
        torch.nn.init.constant_(net.weight, value)
    pair._move_target(0.95)
    assert pair.target.weight.item() == pytest.approx(0.95 * 1 + 0.05 * 2)


def test_a_unet_that_is_told_w_begins_as_it_was(mini_vega: Path, tmp_path: Path) -> None:
    shutil.copytree(mini_vega / "unet", tmp_path / "unet")
    before = _tensor_bytes(tmp_path / "unet")
    for _ in range(2):  # the second time nothing is to do
        extend_unet(tmp_path / "unet", {"time_cond_proj_dim": 256})
    after = _tensor_bytes(tmp_path / "unet")
    added = after.pop("time_embedding.cond_proj.weight")
    assert not any(added) and len(added) == 256 * 32 * 4 and after == before
    assert read_config(tmp_path, "unet")["time_cond_proj_dim"] == 256


def _tensor_bytes(folder: Path) -> dict[str, bytes]:
    return {key: b"".join(record.chunks()) for key, record in component_tensors(folder).items()}


def test_stages_that_cannot_follow_each_other_are_refused(cache: Path, mini_vega: Path, tmp_path: Path) -> None:
    stated = json.loads(json.dumps(_recipe(mini_vega).as_dict()))
    stated["stages"] = stated["stages"][1:]
    with pytest.raises(ValueError, match="the first stage has no previous student to learn from: name its teacher"):
        from_json(Recipe, stated)
    stages = _recipe(mini_vega).stages
    for objective in (Halving(steps=4), Distill()):
        with pytest.raises(
            ValueError, match=f"stage halving learns from .* stage guidance, .* {objective.kind!r} tells it none"
        ):
            replace(_recipe(mini_vega), stages=(stages[0], replace(stages[1], objective=objective)))
    stage = replace(_recipe(mini_vega).stages[0], objective=Halving(steps=501))
    with pytest.raises(UserError, match=r"stage guidance: 501 steps are 1002 of the teacher"):
        train(replace(_recipe(mini_vega), stages=(stage,)), cache=cache, out=tmp_path / "out", workdir=tmp_path)
    assert not (tmp_path / "out").exists() and isinstance(stage, Stage) and stage.student.architecture == HALF
