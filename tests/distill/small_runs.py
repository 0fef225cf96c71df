"""Small recipes that train in a moment, here and in processes of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from distill.training.objectives import Distill
from distill.training.options import TrainOptions
from distill.training.recipes import Recipe, Stage
from distill.training.schedule import Schedule
from distill.training.student import Lora, Pruned
from distill.training.trainer import train

HALF = "-/1,1/1,1:0:1,1,1/1,1,1/-"  # half of Vega's last transformers: a student that trains in a moment


def small_recipe(teacher: str, **changes) -> Recipe:
    stage = Stage(
        name="whole",
        teacher=teacher,
        student=Pruned(architecture=HALF, layer_map="first"),
        steps=6,
        objective=Distill(level="layer", normalize=True),
        schedule=Schedule(warmup_steps=2),
    )
    longer = replace(stage.student, architecture="-/1,1/2,2:0:1,1,1/1,1,1/-")
    shorter = replace(stage, name="shorten-up", student=longer, steps=3, learning_rate=1e-3)
    defaults = {"batch_size": 4, "ema_decay": 0.9, "validation_prompts": ("a small red ring at the top",)}
    return Recipe(name="small", stages=(shorter, stage), **defaults | changes)


def short_recipe(teacher: Path, **changes) -> Recipe:
    """One stage, of four steps if not told otherwise."""
    recipe = small_recipe(str(teacher), validation_prompts=(), ema_decay=None)
    return replace(recipe, stages=(replace(recipe.stages[1], **({"steps": 4} | changes)),))


def lora_recipe(teacher: str, **changes) -> Recipe:
    """Four steps of adapters on the teacher itself."""
    stage = Stage(
        name="adapt",
        teacher=teacher,
        student=Lora(rank=4, alpha=8),
        steps=4,
        objective=Distill(level="layer", normalize=True),
        learning_rate=1e-2,
        schedule=Schedule(warmup_steps=1),
    )
    options = {"batch_size": 4, "ema_decay": 0.9, "validation_prompts": ("a small red ring at the top",)}
    return Recipe(name="lora", stages=(replace(stage, **changes),), **options)


def run(recipe: Recipe, cache: Path, out: Path, *flags: str) -> None:
    """In a process of its own, as a rule."""
    options = TrainOptions(checkpoint_every=2, log_every=1, **dict.fromkeys(flags, True))
    train(recipe, cache=cache, out=out, workdir=out, options=options)


def curve(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "losses.jsonl").open()]
