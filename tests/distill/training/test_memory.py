"""The memory counted against what torch's allocator says of the same step done for real."""

from __future__ import annotations

import gc
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile

from distill.__main__ import main
from distill.common.errors import UserError
from distill.models.architectures import ARCHITECTURES, Architecture
from distill.models.catalogue import count_parameters
from distill.models.module_map import make_module_map
from distill.training.memory import count_memory, count_recipe_memory, describe_memory
from distill.training.objectives import Distill
from distill.training.objectives.interface import Nets
from distill.training.recipes import find_recipe
from distill.training.step import predict
from distill.training.student import Pruned

TEACHER, STUDENT = ARCHITECTURES["mini-ssd-1b"], ARCHITECTURES["mini-vega"]
WHOLE = Pruned(architecture="mini-vega")
OBJECTIVE = Distill(level="layer", normalize=True)
BASE = STUDENT.family.resolutions[0]


def _allocated_peak(teacher: Architecture, student: Architecture, batch: int, *, checkpointing: bool) -> int:
    """Most bytes that a forward and backward pass took from the CPU allocator, by its own record."""
    nets = [UNet2DConditionModel(**a.unet_config) for a in (teacher, student)]
    nets[0].requires_grad_(False)
    if checkpointing:
        nets[1].train().enable_gradient_checkpointing()
    both = Nets(
        student=nets[1],
        teacher=nets[0],
        modules=make_module_map("first", teacher.depth, student.depth),
        alphas_cumprod=torch.linspace(0.99, 0.01, 1000),
        unconditional={},
    )
    gc.collect()
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record,
        OBJECTIVE.prepare(both) as terms_of,
    ):
        shape = (batch, 4, 16, 16)
        part = {
            "noise": torch.randn(shape),
            "sample": torch.randn(shape),
            "timestep": torch.full((batch,), 500),
            "encoder_hidden_states": torch.randn(batch, 32, 128),
            "text_embeds": torch.randn(batch, 64),
            "time_ids": torch.zeros(batch, 6),
        }
        terms = terms_of(partial(predict, nets[1]), torch.no_grad()(partial(predict, nets[0])), part, 0)
        torch.stack(list(terms.values())).sum().backward()
    live = peak = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize(("batch", "checkpointing"), [(2, False), (8, False), (8, True)])
def test_the_plan_is_what_the_allocator_gives(batch: int, checkpointing: bool) -> None:
    use = count_memory(
        TEACHER, WHOLE, OBJECTIVE, resolution=BASE, micro_batch=batch, gradient_checkpointing=checkpointing
    )
    real = _allocated_peak(TEACHER, STUDENT, batch, checkpointing=checkpointing)
    print(f"batch {batch}, checkpointing {checkpointing}: planned {use.gradients + use.work:,}, real {real:,} bytes")
    assert use.gradients + use.work == pytest.approx(real, rel=0.01)


def test_what_lies_still_is_counted_to_the_byte() -> None:
    with torch.device("meta"):
        parameters, of_teacher = (count_parameters(UNet2DConditionModel(**a.unet_config)) for a in (STUDENT, TEACHER))
    options = {"resolution": BASE, "micro_batch": 1, "half": torch.bfloat16, "ema": True}
    use = count_memory(TEACHER, WHOLE, OBJECTIVE, gradients_stay=True, **options)
    assert (use.frozen, use.student, use.ema) == (2 * of_teacher, 4 * parameters, 4 * parameters)
    assert (use.optimizer, use.gradients) == (8 * parameters, 4 * parameters)
    alone = count_memory(TEACHER, WHOLE, Distill(output=0, feature=0), **options)
    assert alone.frozen == 0 and alone.work < use.work
    shared = count_memory(TEACHER, WHOLE, OBJECTIVE, gradients_stay=True, shards=4, **options)
    assert shared.optimizer == 2 * parameters and use.work < shared.work < use.work + 4 * parameters


def test_half_precision_and_checkpointing_save_activations() -> None:
    sizes = {"resolution": BASE, "micro_batch": 16}
    full = count_memory(TEACHER, WHOLE, OBJECTIVE, **sizes)
    assert count_memory(TEACHER, WHOLE, OBJECTIVE, half=torch.bfloat16, **sizes).work < 0.85 * full.work
    assert count_memory(TEACHER, WHOLE, OBJECTIVE, gradient_checkpointing=True, **sizes).work < 0.6 * full.work


def test_whether_it_fits_is_said() -> None:
    use = count_memory(TEACHER, WHOLE, OBJECTIVE, resolution=BASE, micro_batch=1)
    lines = describe_memory({"small": use, "large": replace(use, work=10**11)}, "title", "a GPU", 24_000_000_000)
    assert lines[-2].startswith("small: fits a GPU, 24 GB") and lines[-1].startswith("large: does NOT fit")


def test_the_plan_is_of_the_stage_that_needs_most() -> None:
    """Not of the first of two of one depth: the second has a target average, and the student before as its teacher."""
    recipe = find_recipe("mini-lcm-vega")
    recipe = replace(
        recipe, stages=(replace(recipe.stages[-2], objective=Distill(output=0, feature=0)), recipe.stages[-1])
    )
    options = {"optimizer": "adamw", "processes": 1, "accumulation": 1, "fsdp": False}
    title, uses = count_recipe_memory(recipe, ARCHITECTURES["mini-sdxl"], half=torch.bfloat16, **options)
    with torch.device("meta"):
        parameters = count_parameters(UNet2DConditionModel(**STUDENT.unet_config))
    assert "mini-lcm-vega, stage lcm: " in title
    for use in uses.values():
        assert use.frozen == 2 * parameters and use.ema == use.student > 4 * parameters


@pytest.mark.parametrize(("processes", "accumulation"), [(0, 1), (1, 0), (3, 1)])
def test_a_batch_that_cannot_be_shared_is_not_planned(processes: int, accumulation: int) -> None:
    with pytest.raises(UserError, match=f"cannot be shared by {processes} processes x {accumulation}"):
        find_recipe("ssd-1b").micro_batch(processes, accumulation)


def test_full_size_is_planned_without_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    arguments = ["memory", "--recipe", "ssd-1b", "--processes", "8", "--accumulation", "4", "--memory-gb", "80"]
    arguments += ["--text", "online", "--mixed-precision", "bf16"]
    monkeypatch.setattr("sys.argv", ["distill", *arguments])
    assert main() == 0
    told = capsys.readouterr().out
    assert "captions encoded in each step (0.4% of its arithmetic)" in told
    assert re.search(r"text encoders +1\.64 GB", told)  # 123 and 695 million parameters in two bytes each
    assert "plain: does NOT fit the GPU, 80 GB" in told and "gradient checkpointing: fits the GPU" in told
