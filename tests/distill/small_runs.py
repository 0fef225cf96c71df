"""Small recipes that train in a moment, here and in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from distill.training.objectives import Distill
from distill.training.recipes import Recipe, Stage
from distill.training.schedule import Schedule
from distill.training.student import Lora, Pruned

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


SCRIPT = """
import sys
from pathlib import Path
from tests.distill import small_runs
from distill.training.options import TrainOptions
from distill.training.trainer import train
recipe, cache, teacher, out, *flags = sys.argv[1:]
train(getattr(small_runs, recipe)(teacher), cache=Path(cache), out=Path(out), workdir=Path(out),
      options=TrainOptions(checkpoint_every=2, log_every=1, **dict.fromkeys(flags, True)))
"""


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")


def run_alone(
    cache: Path, teacher: Path, out: Path, *launcher: str, flags: tuple[str, ...] = (), recipe: str = "small_recipe"
) -> subprocess.Popen:
    path = out.with_suffix(".py")
    path.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(path), recipe, str(cache), str(teacher), str(out), *flags]
    return subprocess.Popen(command, env=environment)


def curve(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "losses.jsonl").open()]
