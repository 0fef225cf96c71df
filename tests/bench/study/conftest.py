"""A study drawn by the real road, by contestants that cost nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench.study.drawing import make_study
from bench.study.options import MakeOptions

PROMPTS = {"markup": ['</script><b>bold</b> & "quoted"', "a plain prompt"], "other": ["two", "three"]}


def make_options(folder: Path) -> MakeOptions:
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    return MakeOptions(
        models=["teacher=fake:", "thepupil=fake:"],
        out=folder / "study",
        prompts=folder / "prompts.json",
        steps="3,1",
        resolutions="64x64",
        pairs=4,
        repeats=1,
        same=1,
        device="cpu",
    )


@pytest.fixture(scope="session")
def drawn_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    make_study(make_options(folder))
    return folder


@pytest.fixture
def options(tmp_path: Path) -> MakeOptions:
    return make_options(tmp_path)


@pytest.fixture
def study(drawn_once: Path, tmp_path: Path) -> Path:
    shutil.copytree(drawn_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "study"
