"""Recipes of the students of Stable Diffusion 1.x and 2.x: each cut at once and taught in one stage.

Small-SD and Tiny-SD follow Segmind's guide and script (github.com/segmind/distill-sd), BK-SDM its paper (arXiv 2305.15798),
model card and scripts (github.com/Nota-NetsPresso/BK-SDM).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from distill.models.module_map import LayerMap
from distill.training.objectives import Distill
from distill.training.recipes.recipe import Recipe, Stage
from distill.training.schedule import Schedule
from distill.training.student import Pruned

SD_1_4 = "CompVis/stable-diffusion-v1-4"
SD_2_1_BASE = "stabilityai/stable-diffusion-2-1-base"
REALISTIC_VISION = "SG161222/Realistic_Vision_V4.0"


def _ups(levels: int, first: int) -> dict[str, str]:
    """Of a student whose up level 0 is the teacher's level `first`."""
    return {f"up_blocks.{i}": f"up_blocks.{first + i}" for i in range(levels)}


_DOWNS = {f"down_blocks.{i}": f"down_blocks.{i}" for i in range(4)}
_OUTER_DOWNS = {f"down_blocks.{i}": f"down_blocks.{i}" for i in range(2)}
SEGMIND_TINY_TAPS = {**_OUTER_DOWNS, "down_blocks.2": "up_blocks.0", **_ups(3, 1)}
"""The student's lowest level has no sampler at its end, and does the work of all that the teacher has below it."""
_LAST = "down_blocks.2.attentions.{}.proj_out"
_BK_TAPS: Mapping[str, Mapping[str, str]] = {
    "base": {**_DOWNS, **_ups(4, 0)},
    "small": {**_DOWNS, **_ups(4, 0)},
    "tiny": {**_OUTER_DOWNS, _LAST.format(0): _LAST.format(1), **_ups(3, 1)},
}


def _segmind(
    name: str,
    steps: int,
    taps: Mapping[str, str] | None,
    student: str | None = None,
    layer_map: str | LayerMap = "first",
) -> Recipe:
    stage = Stage(
        name="realistic-vision",
        teacher=REALISTIC_VISION,
        student=Pruned(architecture=student or name, layer_map=layer_map),
        objective=Distill(level="block", taps=None if student else taps),
        steps=steps,
        schedule=Schedule(floor=0.0),
    )
    return Recipe(name=name, stages=(stage,), batch_size=32)


def _bk_sdm(
    name: str, teacher: str, batch_size: int, student: str | None = None, layer_map: str | LayerMap = "first"
) -> Recipe:
    taps = None if student else _BK_TAPS[name.rpartition("-")[2]]
    stage = Stage(
        name="whole",
        teacher=teacher,
        student=Pruned(architecture=student or name, layer_map=layer_map),
        objective=Distill(output=1.0, feature=1.0, level="block", taps=taps),
        steps=50_000,
        learning_rate=5e-5,
        schedule=Schedule(shape="constant", warmup_steps=0),
    )
    return Recipe(name=name, stages=(stage,), batch_size=batch_size)


RECIPES: dict[str, Callable[..., Recipe]] = {
    "small-sd": partial(_segmind, "small-sd", 100_000, None),
    "tiny-sd": partial(_segmind, "tiny-sd", 125_000, SEGMIND_TINY_TAPS),
    **{name: partial(_bk_sdm, name, SD_1_4, 256) for name in ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")},
    **{
        name: partial(_bk_sdm, name, SD_2_1_BASE, 128)
        for name in ("bk-sdm-v2-base", "bk-sdm-v2-small", "bk-sdm-v2-tiny")
    },
}
