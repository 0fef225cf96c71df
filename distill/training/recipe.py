"""What a recipe is: the stages of a distillation in order, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from distill.common.errors import UserError
from distill.common.validation import STRICT
from distill.training.objectives import Distill, Objective
from distill.training.schedule import Schedule
from distill.training.student import Student

Fraction = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]
"""It becomes part of a folder name."""

SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
PREVIOUS = "previous"
"""As a stage's teacher: the student of the stage before."""
MINI_PROMPTS = (
    "a large red circle at the center on a white background",
    "a small yellow star at the top left and a large blue square at the bottom right on a gray background",
    "a large green triangle at the top and a small pink ring at the bottom on a black background",
    "a small purple cross at the left and a large orange circle at the right on a brown background",
)


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
    batch_size: PositiveInt = 128
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
        """Raises ValueError, which pydantic tells with its place, for a first stage without a teacher, and for adapters on a
        student that would not stay."""
        if self.stages and self.stages[0].teacher == PREVIOUS:
            raise ValueError(f"the first stage has no {PREVIOUS} student to learn from: name its teacher")
        adapted = [stage.name for stage in self.stages if stage.student.adapter]
        if adapted and len(self.stages) > 1:
            raise ValueError(
                f"stage {adapted[0]} trains a LoRA, kept apart from what it is put on, so it must be the only stage; "
                "train the others first, and name the finished student's folder as the teacher of this one"
            )

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
