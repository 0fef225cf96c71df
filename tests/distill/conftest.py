"""A cache and runs that were not disturbed, for all tests of the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.data.make_cache import make_cache
from distill.training.options import TrainOptions
from distill.training.trainer import train
from tests.distill.small_runs import curve, short_recipe, small_recipe


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
