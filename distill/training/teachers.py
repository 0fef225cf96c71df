"""Whether the teachers of a recipe fit each other, the objectives of their stages and the caches of these."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from distill.checkpoints.folder import prediction_type_of, read_config
from distill.common.errors import UserError
from distill.common.files import read_object
from distill.data.cache import LatentCache
from distill.models.conditioning import conditioning_of
from distill.models.depth import Depth
from distill.training.recipes import Recipe
from distill.training.step import alphas_cumprod_of


def check_successor(first: Path, teacher: Path) -> None:
    """Raises UserError where a later teacher differs from the first in architecture or in what it predicts, and where it
    knows other noise levels than Stable Diffusion's."""
    kinds = [conditioning_of(read_config(folder, "unet"), folder).pipeline for folder in (first, teacher)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"teacher {teacher} is for a {kinds[1]}, the first, {first}, for a {kinds[0]}: one family a recipe"
        )
    before, now = _network_of(first), _network_of(teacher)
    for key in sorted(now):
        if before[key] != now[key]:
            raise UserError(
                f"teacher {teacher} cannot succeed {first}: UNet {key} is {now[key]!r}, was {before[key]!r}"
            )
    if width := now["time_cond_proj_dim"]:
        raise UserError(
            f"teacher {teacher} is a few-step model (LCM): its UNet reads a guidance scale (time_cond_proj_dim {width}); "
            "give the model that it was made from"
        )
    predictions = [prediction_type_of(folder) for folder in (first, teacher)]
    if predictions[0] != predictions[1]:
        raise UserError(f"teacher {teacher} predicts {predictions[1]!r}, the first, {first}, {predictions[0]!r}")
    scheduler = read_object(teacher / "scheduler" / "scheduler_config.json")
    kind, zero_snr = scheduler.get("_class_name", ""), scheduler.get("rescale_betas_zero_snr", False)
    if kind.startswith("EDM") or zero_snr:
        raise UserError(
            f"teacher {teacher} was trained on other noise levels than Stable Diffusion: its scheduler is {kind}, with "
            f"rescale_betas_zero_snr {zero_snr}; such a teacher cannot be distilled"
        )


def _network_of(folder: Path) -> dict[str, Any]:
    """What a UNet's config.json means, whichever diffusers has written it: what it left out, its defaults fill."""
    from diffusers import UNet2DConditionModel

    stated = read_config(folder, "unet")
    parameters = inspect.signature(UNet2DConditionModel).parameters.values()
    meant = json.loads(json.dumps({p.name: stated.get(p.name, p.default) for p in parameters}))
    meant["upcast_attention"] = bool(meant["upcast_attention"])  # null in SDXL's own
    meant["transformer_layers_per_block"] = str(Depth.from_config(meant))
    del meant["reverse_transformer_layers_per_block"], meant["sample_size"]  # told by the depth; a hint only
    return meant


def check_objectives(recipe: Recipe, teachers: dict[str, Path]) -> None:
    """Raises UserError for a stage whose objective its teacher cannot serve; a student predicts what its teacher did."""
    teacher = next(iter(teachers.values()))
    for stage in recipe.stages:
        teacher = teachers.get(stage.teacher, teacher)
        try:
            stage.objective.check(prediction_type_of(teacher), len(alphas_cumprod_of(teacher)))
        except UserError as error:
            raise UserError(f"stage {stage.name}: {error}") from None


def find_pipelines(
    recipe: Recipe, teachers: dict[str, Path], latents: list[LatentCache], start: Path | None
) -> list[Path]:
    """For each stage the folder whose VAE and text encoders its cache was made with: its teacher's as a rule. The student of
    the stage before has those of that stage.

    Raises UserError where the teacher has others and the stage does not name that cache itself, or where no teacher has
    those of the cache.
    """
    pipelines: list[Path] = []
    candidates = [*teachers.values(), *([start] if start else [])]
    for stage, cache in zip(recipe.stages, latents, strict=True):
        teacher = teachers.get(stage.teacher) or pipelines[-1]
        others = cache.check_teacher(teacher)
        fitting = [folder for folder in (teacher, *candidates) if not cache.check_teacher(folder)]
        if others and not (stage.cache and fitting):
            raise UserError(
                f"stage {stage.name}: its cache was made with other files of {', '.join(others)} than {stage.teacher} has; "
                f'make one with `python -m distill cache --model {stage.teacher} …` and name it as that stage\'s "cache" in '
                "the recipe"
            )
        pipelines.append(fitting[0])
    return pipelines
