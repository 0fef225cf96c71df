"""Recipes of SDXL's students.

SSD-1B and Vega follow what is published (arXiv 2401.02677): lr 1e-5, batch 32 x 4 = 128, 1024 px, losses 1 / 0.5 / 0.5,
one part of the UNet shortened at a time, then SDXL, ZavyChromaXL and JuggernautXL as teachers in succession, 251k steps
in all for SSD-1B; Vega's here are 226k, since its middle is short already. How the steps were divided, and which blocks
were kept, was not published: both stand here as data to change.

KOALA (arXiv 2312.04005) is cut at once and taught 100k steps by SDXL with self-attention features.
"""

from __future__ import annotations

from collections.abc import Callable

from distill.models.architectures import SDXL_DEPTH, SSD_1B_DEPTH, find_architecture
from distill.models.depth import Depth
from distill.models.module_map import LayerMap
from distill.training.objectives import Distill
from distill.training.recipes.recipe import Recipe, Stage, shortened
from distill.training.student import Pruned

SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
ZAVY_CHROMA_XL = "stablediffusionapi/zavychromaxl-v80"
JUGGERNAUT_XL = "RunDiffusion/Juggernaut-XL-v9"


def _successive(name: str, student: str, layer_map: str | LayerMap, start: Depth) -> Recipe:
    """Shortened from `start`, then the whole student under each teacher in turn."""
    teachers = (
        ("sdxl", SDXL_BASE, 76_000),
        ("zavychroma", ZAVY_CHROMA_XL, 50_000),
        ("juggernaut", JUGGERNAUT_XL, 50_000),
    )
    target = find_architecture(student).depth
    whole = Pruned(architecture=student, layer_map=layer_map)
    return Recipe(
        name=name,
        stages=(
            *shortened(25_000, SDXL_BASE, target, start, layer_map),
            *(Stage(name=stage, teacher=teacher, student=whole, steps=steps) for stage, teacher, steps in teachers),
        ),
    )


def ssd_1b(student: str = "ssd-1b", layer_map: str | LayerMap = "similarity") -> Recipe:
    """SSD-1B, or another depth with the same stages."""
    return _successive("ssd-1b", student, layer_map, SDXL_DEPTH)


def vega(student: str = "vega", layer_map: str | LayerMap = "similarity") -> Recipe:
    """Vega from an SSD-1B student (`--start`), or, with none given, all the way from SDXL."""
    return _successive("vega", student, layer_map, SSD_1B_DEPTH)


def _koala(name: str, student: str, layer_map: str | LayerMap) -> Recipe:
    objective = Distill(output=1.0, feature=1.0, level="self-attention")
    pruned = Pruned(architecture=student, layer_map=layer_map)
    stage = Stage(name="sdxl", teacher=SDXL_BASE, student=pruned, steps=100_000, objective=objective)
    return Recipe(name=name, stages=(stage,))


def koala_1b(student: str = "koala-1b", layer_map: str | LayerMap = "first") -> Recipe:
    """KOALA-1B: two layers of three a level, six transformer blocks of ten."""
    return _koala("koala-1b", student, layer_map)


def koala_700m(student: str = "koala-700m", layer_map: str | LayerMap = "first") -> Recipe:
    """KOALA-700M: no middle block, five transformer blocks of ten."""
    return _koala("koala-700m", student, layer_map)


RECIPES: dict[str, Callable[..., Recipe]] = {
    "ssd-1b": ssd_1b,
    "vega": vega,
    "koala-1b": koala_1b,
    "koala-700m": koala_700m,
}
