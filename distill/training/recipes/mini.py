"""Recipes of the mini families: the structure of the full-size ones, in minutes on two cores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distill.models.architectures import SDXL_DEPTH, SSD_1B_DEPTH, find_architecture
from distill.models.depth import Depth
from distill.models.families import MINI_FAMILY
from distill.models.module_map import LayerMap
from distill.training.objectives import Distill
from distill.training.objectives.taps import Level
from distill.training.recipes.recipe import Recipe, Stage, shortened
from distill.training.recipes.sd import SEGMIND_TINY_TAPS
from distill.training.schedule import Schedule
from distill.training.student import Pruned

MINI_PROMPTS = (
    "a large red circle at the center on a white background",
    "a small yellow star at the top left and a large blue square at the bottom right on a gray background",
    "a large green triangle at the top and a small pink ring at the bottom on a black background",
    "a small purple cross at the left and a large orange circle at the right on a brown background",
)


def _tuned(level: Level, taps: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Of every stage: found by the ablation on the mini family (results/ablation.md)."""
    objective = Distill(output=1.0, feature=0.2, level=level, taps=taps, normalize=True)
    return {"objective": objective, "learning_rate": 4e-4, "schedule": Schedule(warmup_steps=10)}


def _whole(
    teacher: str,
    student: str,
    layer_map: str | LayerMap,
    steps: int,
    level: Level,
    taps: Mapping[str, str] | None = None,
) -> Stage:
    pruned = Pruned(architecture=student, layer_map=layer_map)
    return Stage(name="whole", teacher=teacher, student=pruned, steps=steps, **_tuned(level, taps))


def _of_stages(name: str, *stages: Stage) -> Recipe:
    tuned: dict[str, Any] = {"batch_size": 16, "weight_decay": 1e-4, "ema_decay": None}
    return Recipe(name=name, stages=stages, validation_prompts=MINI_PROMPTS, **tuned)


def _shortened(
    name: str, student: str, layer_map: str | LayerMap, start: Depth, shorten_steps: int, whole_steps: int
) -> Recipe:
    target = find_architecture(student, MINI_FAMILY).depth
    shorter = shortened(shorten_steps, "mini:sdxl", target, start, layer_map, **_tuned("layer"))
    return _of_stages(name, *shorter, _whole("mini:sdxl", student, layer_map, whole_steps, "layer"))


def mini_ssd_1b(student: str = "mini-ssd-1b", layer_map: str | LayerMap = "first") -> Recipe:
    """The structure of `ssd_1b` on the mini family: minutes on two cores."""
    return _shortened("mini-ssd-1b", student, layer_map, SDXL_DEPTH, 30, 120)


def mini_vega(student: str = "mini-vega", layer_map: str | LayerMap = "first") -> Recipe:
    """The structure of `vega` on the mini family."""
    return _shortened("mini-vega", student, layer_map, SSD_1B_DEPTH, 30, 150)


def mini_koala_1b(student: str = "mini-koala-1b", layer_map: str | LayerMap = "first") -> Recipe:
    """The structure of `koala_1b` on the mini family."""
    return _of_stages("mini-koala-1b", _whole("mini:sdxl", student, layer_map, 180, "self-attention"))


def mini_koala_700m(student: str = "mini-koala-700m", layer_map: str | LayerMap = "first") -> Recipe:
    """The structure of `koala_700m` on the mini family."""
    return _of_stages("mini-koala-700m", _whole("mini:sdxl", student, layer_map, 180, "self-attention"))


def mini_small_sd(student: str = "mini-small-sd", layer_map: str | LayerMap = "first") -> Recipe:
    """The structure of `small_sd` on the mini SD family."""
    return _of_stages("mini-small-sd", _whole("mini:sd", student, layer_map, 300, "block"))


def mini_tiny_sd(student: str = "mini-tiny-sd", layer_map: str | LayerMap = "first") -> Recipe:
    """The structure of `tiny_sd` on the mini SD family."""
    taps = SEGMIND_TINY_TAPS if student == "mini-tiny-sd" else None
    return _of_stages("mini-tiny-sd", _whole("mini:sd", student, layer_map, 300, "block", taps))


RECIPES: dict[str, Callable[..., Recipe]] = {
    "mini-ssd-1b": mini_ssd_1b,
    "mini-vega": mini_vega,
    "mini-koala-1b": mini_koala_1b,
    "mini-koala-700m": mini_koala_700m,
    "mini-small-sd": mini_small_sd,
    "mini-tiny-sd": mini_tiny_sd,
}
