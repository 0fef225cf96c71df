"""The four rooms stand in a row, and imports point back along it only."""

from __future__ import annotations

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOMS = ("distill", "export", "engines", "bench")
ROOT = Path(__file__).parents[1]


def imported_rooms(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names} & set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_back_along_the_row(room: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        assert imported_rooms(file.read_text()) <= allowed, file


def needs(room: str) -> dict[str, set[str]]:
    """Module -> the modules of its room that it imports, inside functions and for type checkers too."""
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in (ROOT / room).rglob("*.py")}
    found = {}
    for name, file in files.items():
        nodes = [
            node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom) and node.module
        ]
        imported = {node.module for node in nodes} | {
            f"{node.module}.{one.name}" for node in nodes for one in node.names
        }
        found[name] = imported & files.keys() - {name}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_no_two_files_of_a_room_need_each_other(room: str) -> None:
    """CycleError names the files of a circle."""
    assert list(TopologicalSorter(needs(room)).static_order())


@pytest.mark.parametrize("room", ROOMS)
def test_no_two_folders_of_a_room_need_each_other(room: str) -> None:
    """A folder inside a room counts as one, and each file beside it."""

    def place(module: str) -> str:
        return ".".join(module.split(".")[:2])

    folders: dict[str, set[str]] = {}
    for module, others in needs(room).items():
        folders.setdefault(place(module), set()).update({place(other) for other in others} - {place(module)})
    assert list(TopologicalSorter(folders).static_order())


@pytest.mark.parametrize("room", ROOMS)
def test_no_folder_is_crowded(room: str) -> None:
    """A newcomer finds a file in one guess."""
    for folder in {file.parent for file in (ROOT / room).rglob("*.py")}:
        assert len(list(folder.glob("*.py"))) <= 14, folder


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_there(room: str) -> None:
    """They are imported when first asked for, so a name that has moved breaks nothing until then."""
    module = importlib.import_module(room)
    assert module.__all__ and all(getattr(module, name) is not None for name in module.__all__)


def test_nothing_is_for_linux_alone() -> None:
    """On Windows a file is not renamed over another one (`Path.replace` does it everywhere), and there is no `resource`."""
    renaming, limited = set(), set()
    for file in (file for room in ROOMS for file in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "rename":
                renaming.add(file.name)
            if isinstance(node, ast.Import) and any(alias.name == "resource" for alias in node.names):
                limited.add(file.name)
    assert not renaming
    assert limited == {"worker.py"}, "in one place, behind a look at the system"
