"""The stages of a recipe made ready: each with the folders, layers and cache that it is trained by, all checked."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distill.checkpoints.folder import (
    alphas_cumprod_of,
    find_architecture_of,
    prediction_type_of,
    read_config,
)
from distill.checkpoints.sources import is_known, peek_architecture, resolve
from distill.common.errors import UserError
from distill.common.files import read_object
from distill.data.cache import LatentCache
from distill.models.conditioning import conditioning_of
from distill.models.depth import Depth
from distill.models.families import SDXL_FAMILY
from distill.models.module_map import ModuleMap
from distill.training.accelerator import decided_by_first, require_alike
from distill.training.recipes import PREVIOUS, Recipe, Stage, stage_modules


@dataclass(frozen=True, kw_only=True)
class PreparedStage:
    """A `stage` of a recipe, its `number` from 0, and all that it is trained by.

    `teacher` is the folder of its teacher, `previous` that of the student that it begins with (None: its teacher), `folder`
    where its own student will be; `pipeline` is the folder of the VAE and text encoders that `latents` was made with, which
    the student is drawn and shipped with; `modules` says what the student is made from; `first_step` counts the steps of
    all stages before."""

    number: int
    stage: Stage
    teacher: Path
    previous: Path | None
    folder: Path
    pipeline: Path
    modules: ModuleMap
    latents: LatentCache
    first_step: int

    @property
    def title(self) -> str:
        """As its folder and pictures are called."""
        return self.folder.name


def prepare_stages(recipe: Recipe, cache: str, start: Path | None, out: Path, workdir: Path) -> list[PreparedStage]:
    """The recipe's stages in order, as `train` in `trainer.py` runs them; every process must call this.

    Raises UserError for layer maps that are not nested, a teacher that cannot succeed the one before or serve its stage's
    objective, a cache that a teacher does not fit, and for processes that have other caches or packages than the first.
    """
    places = [stage.cache or cache for stage in recipe.stages]
    caches = {place: LatentCache(place, batch_size=recipe.batch_size, seed=recipe.seed) for place in set(places)}
    latents = [caches[place] for place in places]
    _check_families(recipe, latents)
    teachers = {stage.teacher: resolve(stage.teacher, workdir) for stage in recipe.stages if stage.teacher != PREVIOUS}
    first = next(iter(teachers.values()))
    for teacher in teachers.values():  # the first too: what it predicts is checked
        check_successor(first, teacher)
    _check_objectives(recipe, teachers)
    modules = stage_modules(recipe, find_architecture_of(first), ModuleMap.of_student(start) if start else None)
    versions = {package: version(package) for package in ("slimxl", "torch", "diffusers")}
    require_alike(versions | {f"the cache {place}": cached.digest[:12] for place, cached in caches.items()})
    pipelines = decided_by_first(lambda: _find_pipelines(recipe, teachers, latents, start))
    stages: list[PreparedStage] = []
    for number, stage in enumerate(recipe.stages):
        before = stages[-1] if stages else None
        prepared = PreparedStage(
            number=number,
            stage=stage,
            teacher=before.folder if before and stage.teacher == PREVIOUS else teachers[stage.teacher],
            previous=before.folder if before else start,
            folder=out / "stages" / f"{number + 1:02d}-{stage.name}",
            pipeline=pipelines[number],
            modules=modules[number],
            latents=latents[number],
            first_step=before.first_step + before.stage.steps if before else 0,
        )
        stages.append(prepared)
    return stages


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


def _check_objectives(recipe: Recipe, teachers: dict[str, Path]) -> None:
    """Raises UserError for a stage whose objective its teacher cannot serve; a student predicts what its teacher did."""
    teacher = next(iter(teachers.values()))
    for stage in recipe.stages:
        teacher = teachers.get(stage.teacher, teacher)
        try:
            stage.objective.check(prediction_type_of(teacher), len(alphas_cumprod_of(teacher)))
        except UserError as error:
            raise UserError(f"stage {stage.name}: {error}") from None


def _check_families(recipe: Recipe, latents: list[LatentCache]) -> None:
    """Raises UserError, before a teacher is fetched or made, for a stage with a cache of another family."""
    for stage, cache in zip(recipe.stages, latents, strict=True):
        family = stage.student.family
        if stage.teacher != PREVIOUS and (family or is_known(stage.teacher)):
            teacher = peek_architecture(stage.teacher, family or SDXL_FAMILY)
            cache.check_family(teacher.family, stage.teacher)


def _find_pipelines(
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
