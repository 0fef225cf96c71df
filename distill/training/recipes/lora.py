"""Recipes for few steps by adapters alone (LCM-LoRA, arXiv 2311.05556): a file of megabytes that makes a finished model draw
in two to eight steps, in one pass each.

| | published | here |
| --- | --- | --- |
| rank, α | 64, 64 (lcm-lora-sdxl, lcm-lora-ssd-1b); 128 (Segmind-VegaRT) | the same, α as the rank |
| learning rate, weight decay, distance | 1e-4, 0, Huber (diffusers' example for SDXL) | the same |
| batch, steps | 12, 1000 (the same example); of the three files: not stated | 12, 1000 |
| w | all between 3 and 15 equally likely | the same |
| average of the adapters | none | none |
"""

from __future__ import annotations

from collections.abc import Callable

from distill.training.objectives import Consistency, GuidanceRange
from distill.training.recipes.mini import MINI_PROMPTS
from distill.training.recipes.recipe import Recipe, Stage
from distill.training.recipes.sdxl import SDXL_BASE
from distill.training.schedule import Schedule
from distill.training.student import Lora

SSD_1B = "segmind/SSD-1B"
SEGMIND_VEGA = "segmind/Segmind-Vega"


def lcm_lora_sdxl(name: str = "lcm-lora-sdxl", base: str = SDXL_BASE, rank: int = 64) -> Recipe:
    """The `base` is its own teacher, with its adapters off."""
    stage = Stage(
        name="lcm",
        teacher=base,
        student=Lora(rank=rank),
        steps=1000,
        objective=Consistency(guidance=GuidanceRange(low=3.0, high=15.0, embedding=None), target_decay=None),
        learning_rate=1e-4,
        schedule=Schedule(shape="constant", warmup_steps=0),
    )
    return Recipe(name=name, stages=(stage,), batch_size=12, caption_dropout=0.0, weight_decay=0.0, ema_decay=None)


def lcm_lora_ssd_1b() -> Recipe:
    return lcm_lora_sdxl("lcm-lora-ssd-1b", SSD_1B)


def vega_rt() -> Recipe:
    return lcm_lora_sdxl("vega-rt", SEGMIND_VEGA, 128)


def mini_lcm_lora() -> Recipe:
    """The same on the mini teacher, at the scale that its pictures are judged with (w + 1 = 5): minutes on a core."""
    stage = Stage(
        name="lcm",
        teacher="mini:sdxl",
        student=Lora(rank=16),
        steps=150,
        objective=Consistency(guidance=GuidanceRange(low=4.0, high=4.0, embedding=None), target_decay=None),
        learning_rate=2e-3,
        schedule=Schedule(warmup_steps=10),
    )
    return Recipe(
        name="mini-lcm-lora",
        stages=(stage,),
        batch_size=8,
        caption_dropout=0.0,
        weight_decay=0.0,
        ema_decay=None,
        validation_prompts=MINI_PROMPTS,
    )


RECIPES: dict[str, Callable[..., Recipe]] = {
    "lcm-lora-sdxl": lcm_lora_sdxl,
    "lcm-lora-ssd-1b": lcm_lora_ssd_1b,
    "vega-rt": vega_rt,
    "mini-lcm-lora": mini_lcm_lora,
}
