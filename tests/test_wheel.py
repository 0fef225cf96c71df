"""What is installed is whole: every room, its data, and the console script, from an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("distill", "export", "engines", "bench")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked where nothing else is."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves its own folder behind, and what that holds stays in the next wheel
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, source], check=True)
    [wheel] = folder.glob("slimxl-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def run(installed: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, installed / "bin" / "slimxl", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd, env=environment)


def test_every_python_file_of_the_rooms_is_in_it(installed: Path) -> None:
    for room in ROOMS:
        files = {file.relative_to(ROOT) for file in (ROOT / room).rglob("*.py")}
        assert files <= {file.relative_to(installed) for file in (installed / room).rglob("*.py")}


def test_every_room_runs_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    for room in ROOMS:
        done = run(installed, room, "--help", cwd=tmp_path)
        assert done.returncode == 0 and "usage" in done.stdout, done.stderr
    fetched = run(installed, "distill", "fetch", "--model", "mini:sdxl", cwd=tmp_path)
    assert Path(fetched.stdout.strip()) == installed / "distill/mini/teacher", fetched.stderr
    made = run(installed, "distill", "fetch", "--model", "random:mini-vega", cwd=tmp_path)
    assert (tmp_path / made.stdout.strip() / "tokenizer/merges.txt").is_file(), made.stderr
    unknown = run(installed, "distil", cwd=tmp_path)
    assert unknown.returncode == 2 and unknown.stderr == "usage: slimxl {distill,export,engines,bench} …\n"
