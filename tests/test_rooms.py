"""The four rooms stand in a row, and imports point back along it only."""

from __future__ import annotations

import ast
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


@pytest.mark.parametrize("room", ROOMS)
def test_no_two_files_of_a_room_need_each_other(room: str) -> None:
    """Imports inside functions and for type checkers count too. CycleError names the files of a circle."""
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in (ROOT / room).rglob("*.py")}
    needs = {}
    for name, file in files.items():
        nodes = [
            node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom) and node.module
        ]
        imported = {node.module for node in nodes} | {
            f"{node.module}.{one.name}" for node in nodes for one in node.names
        }
        needs[name] = imported & files.keys() - {name}
    assert set(TopologicalSorter(needs).static_order()) == files.keys()
