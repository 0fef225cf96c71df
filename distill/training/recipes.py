"""Recipes: the stages of a distillation in order, as data. A recipe is a function that returns one.

SSD-1B and Vega follow what is published (arXiv 2401.02677): lr 1e-5, batch 32 x 4 = 128, 1024 px, losses 1 / 0.5 / 0.5,
one part of the UNet shortened at a time, then SDXL, ZavyChromaXL and JuggernautXL as teachers in succession, 251k steps
in all for SSD-1B; Vega's here are 226k, since its middle is short already. How the steps were divided, and which blocks
were kept, was not published: both stand here as data to change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from distill.checkpoints.sources import peek_architecture
from distill.common.errors import UserError, unknown
from distill.common.files import read_json
from distill.common.validation import STRICT, from_json
from distill.models.architectures import SDXL_DEPTH, SSD_1B_DEPTH, Architecture, find_architecture
from distill.models.depth import Depth
from distill.models.families import MINI_FAMILY
from distill.models.module_map import LayerMap, ModuleMap, read_layer_map
from distill.training.objectives import Distill, Objective
from distill.training.schedule import Schedule
from distill.training.student import Pruned, Student

Fraction = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$", max_length=100)]
"""It becomes part of a folder name."""

SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
PREVIOUS = "previous"
"""As a stage's teacher: the student of the stage before."""
ZAVY_CHROMA_XL = "stablediffusionapi/zavychromaxl-v80"
JUGGERNAUT_XL = "RunDiffusion/Juggernaut-XL-v9"


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
        """Raises ValueError, which pydantic tells with its place, for a first stage without a teacher."""
        if self.stages and self.stages[0].teacher == PREVIOUS:
            raise ValueError(f"the first stage has no {PREVIOUS} student to learn from: name its teacher")

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


def stage_modules(recipe: Recipe, teacher: Architecture, start: ModuleMap | None = None) -> list[ModuleMap]:
    """What each stage's student is made from, in the teacher's names; `start` is the map of the student that the first
    begins with.

    Raises UserError for a student of another family or deeper than the one before, and for layer maps that do not fit
    the teacher or are not nested: before the first step of the first stage.
    """
    maps: list[ModuleMap] = []
    for stage in recipe.stages:
        try:
            maps.append(stage.student.modules(teacher, maps[-1] if maps else start))
        except UserError as error:
            raise UserError(f"stage {stage.name}: {error}") from None
    return maps


def _published(name: str, student: str, layer_map: str | LayerMap, start: Depth) -> Recipe:
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
    return _published("ssd-1b", student, layer_map, SDXL_DEPTH)


def vega(student: str = "vega", layer_map: str | LayerMap = "similarity") -> Recipe:
    """Vega from an SSD-1B student (`--start`), or, with none given, all the way from SDXL."""
    return _published("vega", student, layer_map, SSD_1B_DEPTH)


MINI_PROMPTS = (
    "a large red circle at the center on a white background",
    "a small yellow star at the top left and a large blue square at the bottom right on a gray background",
    "a large green triangle at the top and a small pink ring at the bottom on a black background",
    "a small purple cross at the left and a large orange circle at the right on a brown background",
)


def _mini(
    name: str, student: str, layer_map: str | LayerMap, start: Depth, shorten_steps: int, whole_steps: int
) -> Recipe:
    objective = Distill(output=1.0, feature=0.2, level="layer", normalize=True)
    tuned: dict[str, Any] = {"objective": objective, "learning_rate": 4e-4, "schedule": Schedule(warmup_steps=10)}
    target = find_architecture(student, MINI_FAMILY).depth
    return Recipe(
        name=name,
        stages=(
            *shortened(shorten_steps, "mini:sdxl", target, start, layer_map, **tuned),
            Stage(
                name="whole",
                teacher="mini:sdxl",
                student=Pruned(architecture=student, layer_map=layer_map),
                steps=whole_steps,
                **tuned,
            ),
        ),
        batch_size=16,
        weight_decay=1e-4,
        ema_decay=None,
        validation_prompts=MINI_PROMPTS,
    )


def mini_ssd_1b(student: str = "mini-ssd-1b", layer_map: str | LayerMap = "first") -> Recipe:
    """The structure of `ssd_1b` on the mini family: minutes on two cores."""
    return _mini("mini-ssd-1b", student, layer_map, SDXL_DEPTH, 30, 120)


def mini_vega(student: str = "mini-vega", layer_map: str | LayerMap = "first") -> Recipe:
    """The structure of `vega` on the mini family."""
    return _mini("mini-vega", student, layer_map, SSD_1B_DEPTH, 30, 150)


RECIPES: dict[str, Callable[..., Recipe]] = {
    "ssd-1b": ssd_1b,
    "vega": vega,
    "mini-ssd-1b": mini_ssd_1b,
    "mini-vega": mini_vega,
}


def find_recipe(name: str, *, student: str | None = None, layer_map: str | LayerMap | None = None) -> Recipe:
    """The recipe called `name`, with the same stages to another `student` (an architecture's name or a depth pattern) or
    by another `layer_map` (a preset's name, a file or indices) where they are given; or the one that stands in the file
    `name`.

    Raises UserError for an unknown recipe, student or preset, for indices that do not fit the student, and for a file
    that holds no recipe.
    """
    known = read_layer_map(layer_map) if isinstance(layer_map, str) else layer_map
    changes = {key: value for key, value in (("student", student), ("layer_map", known)) if value is not None}
    if name.endswith(".json"):
        if changes:
            raise UserError(f"{name} says its own {' and '.join(changes)}: change it there")
        recipe = read_recipe(Path(name))
        for stage in recipe.stages:  # its layer maps are checked when its teacher is at hand
            find_architecture(stage.student.architecture)
    elif name in RECIPES:
        recipe = RECIPES[name](**changes)
        stage_modules(recipe, peek_architecture(recipe.stages[0].teacher))
    else:
        raise unknown("recipe", name, [*RECIPES, "FILE.json"])
    return recipe


def read_recipe(path: Path) -> Recipe:
    """The recipe that a JSON file is, or holds as its `recipe` (a student's slimxl.json does). Raises UserError with the
    first fault."""
    stated = read_json(path)
    stated = stated.get("recipe", stated) if isinstance(stated, dict) else stated
    try:
        return from_json(Recipe, stated)
    except ValueError as error:
        raise UserError(f"{path} is no recipe: {error}; `python -m distill recipe ssd-1b` prints one") from None
