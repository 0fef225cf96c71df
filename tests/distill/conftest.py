"""A cache and runs that were not disturbed, for all tests of the trainer, which counts the memory of equal steps once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.data.make_cache import make_cache
from distill.models.architectures import Architecture
from distill.training.memory import count_recipe_memory
from distill.training.options import TrainOptions
from distill.training.recipes import Recipe
from distill.training.schedule import Schedule
from distill.training.trainer import train
from tests.distill.small_runs import curve, short_recipe, small_recipe


@pytest.fixture(scope="session", autouse=True)
def memory_counted_once() -> Iterator[None]:
    """Counting takes longer than the steps of most tests; what is counted depends on no step, rate or picture."""
    counted: dict[str, Any] = {}

    def count(recipe: Recipe, *teacher: Architecture, **options: object) -> Any:
        same = tuple(replace(stage, steps=1, learning_rate=1.0, schedule=Schedule()) for stage in recipe.stages)
        key = repr((replace(recipe, stages=same, seed=0, validation_prompts=()), teacher, sorted(options.items())))
        if key not in counted:
            counted[key] = count_recipe_memory(recipe, *teacher, **options)
        return counted[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.training.trainer.count_recipe_memory", count)
        yield


@pytest.fixture(scope="session")
def cache(mini_vega: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    make_cache(mini_vega, "shapes:45", folder)
    return folder


@pytest.fixture(scope="session")
def finished(mini_vega: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("students") / "small"
    options = TrainOptions(checkpoint_every=2, log_every=1)
    train(small_recipe(str(mini_vega)), cache=cache, out=out, workdir=out, options=options)
    return out


@pytest.fixture(scope="session")
def short(mini_vega: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    out = tmp_path_factory.mktemp("short") / "out"
    train(short_recipe(mini_vega), cache=cache, out=out, workdir=out, options=TrainOptions(log_every=1))
    return curve(out)
