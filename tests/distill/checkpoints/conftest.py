from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def copy(mini_vega: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mini_vega, tmp_path / "copy"))
