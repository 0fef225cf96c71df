"""Recipes: a recipe is a function that returns one, in the file of its family; `RECIPES` are those that have a name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

from distill.common.errors import UserError, unknown
from distill.models.module_map import LayerMap, read_layer_map
from distill.training.recipes import few_steps, lora, mini, sd, sdxl
from distill.training.recipes.recipe import PREVIOUS, Recipe, Stage, peek_teacher, read_recipe, shortened, stage_modules

__all__ = [
    "PREVIOUS",
    "RECIPES",
    "Recipe",
    "Stage",
    "find_recipe",
    "peek_teacher",
    "read_recipe",
    "shortened",
    "stage_modules",
]

RECIPES: dict[str, Callable[..., Recipe]] = {
    name: recipe for family in (sdxl, sd, few_steps, lora, mini) for name, recipe in family.RECIPES.items()
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
            stage.student.check()
    elif name in RECIPES:
        if others := changes.keys() - inspect.signature(RECIPES[name]).parameters.keys():
            raise UserError(
                f"the recipe {name} adapts its teacher as it is: it takes no {' and no '.join(sorted(others))}"
            )
        recipe = RECIPES[name](**changes)
        stage_modules(recipe, peek_teacher(recipe))
    else:
        raise unknown("recipe", name, [*RECIPES, "FILE.json"])
    return recipe
