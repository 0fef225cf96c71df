"""The four rooms stand in a row, and imports point back along it only."""

from __future__ import annotations

import ast
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
