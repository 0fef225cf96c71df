"""Recipes for fewer steps: a whole student that learns to draw in few, or in one pass a step.

lcm-sdxl has the values of diffusers' examples/consistency_distillation/README_sdxl.md (arXiv 2310.04378). guidance-sdxl and
halving-sdxl follow arXiv 2210.03142, whose two stages they are, and 2202.00512: 50,000 updates a halving, the learning rate
falling to 0; neither paper is about SDXL, so their other numbers are this project's. lcm-vega is smaller and quicker in one
recipe: Vega's stages, then one that learns from the student that they leave. Batch, weight decay and average are a recipe's,
and so Vega's there. The mini twins do the same in minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from distill.models.module_map import LayerMap
from distill.training.objectives import Consistency, Guidance, GuidanceRange, Halving, Objective
from distill.training.recipes.mini import mini_vega
from distill.training.recipes.recipe import PREVIOUS, Recipe, Stage
from distill.training.recipes.sdxl import SDXL_BASE, vega
from distill.training.schedule import Schedule
from distill.training.student import Pruned, Student

LCM_RATE = Schedule(shape="constant", warmup_steps=500)
TO_ZERO = Schedule(shape="linear", warmup_steps=0, floor=0.0)
MINI_TO_ZERO = Schedule(shape="linear", warmup_steps=10, floor=0.0)
MINI_WARM = Schedule(warmup_steps=10)


def _followed_by(recipe: Recipe, name: str, *stages: Stage) -> Recipe:
    return replace(recipe, name=name, stages=(*recipe.stages, *stages))


def _of_stages(name: str, *stages: Stage, batch_size: int) -> Recipe:
    """As diffusers' scripts have it: every caption kept, no weight decay, no average but the objective's own."""
    return Recipe(
        name=name, stages=stages, batch_size=batch_size, caption_dropout=0.0, weight_decay=0.0, ema_decay=None
    )


def lcm_sdxl(student: str = "sdxl", layer_map: str | LayerMap = "first") -> Recipe:
    """LCM of the whole of SDXL, told w."""
    stage = Stage(
        name="lcm",
        teacher=SDXL_BASE,
        student=Pruned(architecture=student, layer_map=layer_map),
        steps=1_000,
        objective=Consistency(),
        learning_rate=1e-6,
        schedule=LCM_RATE,
    )
    return _of_stages("lcm-sdxl", stage, batch_size=12)


def lcm_vega(student: str = "vega", layer_map: str | LayerMap = "similarity") -> Recipe:
    """Vega, then its own LCM."""
    recipe = vega(student, layer_map)
    lcm = replace(lcm_sdxl().stages[0], teacher=PREVIOUS, student=recipe.stages[-1].student)
    return _followed_by(recipe, "lcm-vega", lcm)


def guidance_sdxl(student: str = "sdxl", layer_map: str | LayerMap = "first") -> Recipe:
    """SDXL under any guidance scale from 1 to 15 in one pass a step."""
    stage = Stage(
        name="guidance",
        teacher=SDXL_BASE,
        student=Pruned(architecture=student, layer_map=layer_map),
        steps=10_000,
        objective=Guidance(),
        schedule=TO_ZERO,
    )
    return _of_stages("guidance-sdxl", stage, batch_size=128)


def halving_sdxl(student: str = "sdxl", layer_map: str | LayerMap = "first") -> Recipe:
    """SDXL under any guidance scale in one pass a step, then in 32, 16, 8 and 4 steps."""
    recipe = guidance_sdxl(student, layer_map)
    first = recipe.stages[0]
    told = Guidance().guidance
    rounds = (
        replace(
            first, name=f"{steps}-steps", teacher=PREVIOUS, objective=Halving(steps=steps, guidance=told), steps=50_000
        )
        for steps in (32, 16, 8, 4)
    )
    return _followed_by(recipe, "halving-sdxl", *rounds)


def _mini(name: str, student: Student, steps: int, objective: Objective, schedule: Schedule = MINI_TO_ZERO) -> Stage:
    return Stage(
        name=name,
        teacher=PREVIOUS,
        student=student,
        steps=steps,
        objective=objective,
        learning_rate=2e-4,
        schedule=schedule,
    )


def mini_lcm_vega(student: str = "mini-vega", layer_map: str | LayerMap = "first") -> Recipe:
    """The structure of `lcm_vega` on the mini family."""
    recipe = mini_vega(student, layer_map)
    objective = Consistency(guidance=GuidanceRange(low=2.0, high=6.0))
    return _followed_by(recipe, "mini-lcm-vega", _mini("lcm", recipe.stages[-1].student, 400, objective, MINI_WARM))


def mini_lcm(student: str = "mini-vega", layer_map: str | LayerMap = "first") -> Recipe:
    """The last stage alone, in two minutes, on a student that is there (`--start`): at the one guidance scale that the mini
    teacher is judged with, by few large steps of the solver, along which consistency has a short way to go."""
    objective = Consistency(
        solver_steps=20, guidance=GuidanceRange(low=4.0, high=4.0, embedding=None), target_decay=None
    )
    stage = _mini("lcm", Pruned(architecture=student, layer_map=layer_map), 150, objective, MINI_WARM)
    return _of_stages("mini-lcm", replace(stage, teacher="mini:sdxl", learning_rate=4e-4), batch_size=8)


def mini_halving(student: str = "mini-vega", layer_map: str | LayerMap = "first") -> Recipe:
    """Mini Vega in 8 steps at one guidance scale, in one pass each, then in 4."""
    recipe = mini_vega(student, layer_map)
    made = recipe.stages[-1].student
    first = Halving(steps=8, guidance=GuidanceRange(low=4.0, high=4.0, embedding=None))
    rounds = (_mini("8-steps", made, 120, first), _mini("4-steps", made, 120, Halving(steps=4)))
    return _followed_by(recipe, "mini-halving", *rounds)


def mini_guidance(student: str = "mini-vega", layer_map: str | LayerMap = "first") -> Recipe:
    """Mini Vega in one pass a step at guidance scales from 1 to 9."""
    recipe = mini_vega(student, layer_map)
    objective = Guidance(guidance=GuidanceRange(low=0.0, high=8.0))
    return _followed_by(recipe, "mini-guidance", _mini("guidance", recipe.stages[-1].student, 160, objective))


RECIPES: dict[str, Callable[..., Recipe]] = {
    "lcm-sdxl": lcm_sdxl,
    "lcm-vega": lcm_vega,
    "guidance-sdxl": guidance_sdxl,
    "halving-sdxl": halving_sdxl,
    "mini-lcm-vega": mini_lcm_vega,
    "mini-lcm": mini_lcm,
    "mini-halving": mini_halving,
    "mini-guidance": mini_guidance,
}
