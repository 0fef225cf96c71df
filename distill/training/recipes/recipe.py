"""What a recipe is: the stages of a distillation in order, as data. Its faults are told before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from distill.checkpoints.sources import peek_architecture
from distill.common.errors import UserError
from distill.common.files import read_json
from distill.common.validation import STRICT, from_json
from distill.models.architectures import Architecture
from distill.models.depth import Depth
from distill.models.families import SDXL_FAMILY
from distill.models.module_map import LayerMap, ModuleMap
from distill.training.objectives import Distill, Objective
from distill.training.schedule import Schedule
from distill.training.student import Pruned, Student

Fraction = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$", max_length=100)]
"""It becomes part of a folder name."""
PREVIOUS = "previous"
"""As a stage's teacher: the student of the stage before."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run of the training loop: `student` says what is trained, `objective` what it is taught by the `teacher` (a
    source, or `previous`: the student of the stage before, as that stage left it);
    `learning_rate` is the highest that `schedule` reaches. `cache` is a latent cache of its own, where the teacher has
    another VAE or other text encoders than the run's cache was made with."""

    __pydantic_config__ = STRICT
    name: Name
    teacher: str
    student: Student
    steps: PositiveInt
    objective: Objective = field(default_factory=Distill)
    learning_rate: PositiveFloat = 1e-5
    schedule: Schedule = field(default_factory=Schedule)
    cache: Annotated[str, Field(min_length=1)] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError, which pydantic tells with its place, for an objective that adapters cannot learn."""
        if self.student.adapter and (self.objective.student_config or self.objective.target_decay is not None):
            raise ValueError(
                "a LoRA leaves its UNet as it is: no objective that widens it (guidance embedding) or averages it (target)"
            )

    def learning_rate_at(self, step: int) -> float:
        return self.schedule.rate(self.learning_rate, step, self.steps)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """`batch_size` is global: over all processes and accumulation steps."""

    __pydantic_config__ = STRICT
    name: Name
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    batch_size: Annotated[PositiveInt, Field(le=1_000_000)] = 128
    caption_dropout: Fraction = 0.1
    weight_decay: NonNegativeFloat = 1e-2
    max_grad_norm: PositiveFloat = 1.0
    ema_decay: Fraction | None = 0.9999
    seed: NonNegativeInt = 0
    validation_prompts: tuple[str, ...] = (
        "a portrait of an old fisherman, golden hour, 85 mm",
        "a red fox in fresh snow, wide shot",
        "an isometric city block at night, neon",
        "a still life of pears and a blue jug, oil on canvas",
    )

    def __post_init__(self) -> None:
        """Raises ValueError, which pydantic tells with its place, for a first stage without a teacher, for adapters on a
        student that would not stay, and for a teacher that waits for a guidance scale and is told none."""
        if self.stages and self.stages[0].teacher == PREVIOUS:
            raise ValueError(f"the first stage has no {PREVIOUS} student to learn from: name its teacher")
        adapted = [stage.name for stage in self.stages if stage.student.adapter]
        if adapted and len(self.stages) > 1:
            raise ValueError(
                f"stage {adapted[0]} trains a LoRA, kept apart from what it is put on, so it must be the only stage; "
                "train the others first, and name the finished student's folder as the teacher of this one"
            )
        told = None
        for stage in self.stages:
            objective = stage.objective
            if (
                told
                and stage.teacher == PREVIOUS
                and objective.needs_teacher
                and not getattr(objective, "guidance", None)
            ):
                raise ValueError(
                    f"stage {stage.name} learns from the student of stage {told}, whose UNet is told a guidance scale, and "
                    f"its objective {objective.kind!r} tells it none: give it a guidance range, or another teacher"
                )
            told = told or (objective.student_config and stage.name)

    def micro_batch(self, processes: int, accumulation: int) -> int:
        """Samples that one process passes at once. Raises UserError where the batch cannot be shared so."""
        parts = processes * accumulation
        if min(processes, accumulation) < 1 or self.batch_size % parts:
            raise UserError(
                f"batch size {self.batch_size} cannot be shared by {processes} processes x {accumulation} accumulation steps"
            )
        return self.batch_size // parts

    def as_dict(self) -> dict[str, Any]:
        """The whole recipe as JSON-ready data: what is saved inside every checkpoint."""
        return asdict(self)


def shortened(
    steps: int, teacher: str, target: Depth, start: Depth, layer_map: str | LayerMap, **stage: Any
) -> tuple[Stage, ...]:
    """Middle, then up, then down made as short as `target`, `steps` each; parts that are already so are left out. A
    middle block that stays must be as deep as the last down block, so there the two go together."""
    parts, depth = [], start
    for sides in (("mid",), ("up",), ("down",)) if not target.mid else (("up",), ("mid", "down")):
        shorter = replace(depth, **{side: getattr(target, side) for side in sides})
        if shorter != depth:
            name, student = "shorten-" + "-".join(sides), str(shorter)
            pruned = Pruned(architecture=student, layer_map=layer_map)
            parts.append(Stage(name=name, teacher=teacher, student=pruned, steps=steps, **stage))
        depth = shorter
    return tuple(parts)


def peek_teacher(recipe: Recipe) -> Architecture:
    """The first teacher by what is at hand; one on the hub that no recipe names counts as the whole model of its student's
    family, else as SDXL. Raises UserError for an unknown student or `random:` name."""
    stage = recipe.stages[0]
    return peek_architecture(stage.teacher, stage.student.family or SDXL_FAMILY)


def stage_modules(recipe: Recipe, teacher: Architecture, start: ModuleMap | None = None) -> list[ModuleMap]:
    """What each stage's student is made from, in the teacher's names; `start` is the map of the student that the first
    begins with.

    Raises UserError for a student of another family or deeper than the one before, and for layer maps that do not fit
    the teacher or are not nested: before the first step of the first stage.
    """
    teacher.family.conditioning.require_drawing_from_text(f"teacher {recipe.stages[0].teacher}")
    for stage in recipe.stages:
        student = stage.student.architecture_of(teacher)
        if not student.family.fits(teacher.unet_config):
            raise UserError(
                f"stage {stage.name}: {student.name} is of the family {student.family.name}, its teacher of "
                f"{teacher.family.name}"
            )
    maps: list[ModuleMap] = []
    for stage in recipe.stages:
        try:
            maps.append(stage.student.modules(teacher, maps[-1] if maps else start))
        except UserError as error:
            raise UserError(f"stage {stage.name}: {error}") from None
    return maps


def read_recipe(path: Path) -> Recipe:
    """The recipe that a JSON file is, or holds as its `recipe` (a student's slimxl.json does). Raises UserError with the
    first fault."""
    stated = read_json(path)
    if isinstance(stated, dict):
        if "recipe" not in stated and "module_map" in stated:
            raise UserError(
                f"{path} is of a student made by surgery, without a recipe; `python -m distill recipe ssd-1b` prints one"
            )
        stated = stated.get("recipe", stated)
    try:
        return from_json(Recipe, stated)
    except ValueError as error:
        raise UserError(f"{path} is no recipe: {error}; `python -m distill recipe ssd-1b` prints one") from None
