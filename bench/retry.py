"""A part that is tried again writes its file from nothing. A try that is done stands, else the fuller of the two files, of
equals the newer."""

from __future__ import annotations

from pathlib import Path

from distill.common.errors import UserError
from distill.common.files import read_json


def _earlier(path: Path) -> Path:
    return path.with_suffix(".earlier")


def set_aside(path: Path) -> None:
    """Makes room for the next try, if there was one before."""
    settle(path)
    if path.exists():
        path.replace(_earlier(path))


def settle(path: Path, done: bool = False) -> bool:
    """Puts what was set aside back, unless the try since is `done` or holds as much; whether it was put back."""
    earlier = _earlier(path)
    if not earlier.exists():
        return False
    stands = not done and (not path.exists() or measured(earlier) > measured(path))
    if stands:
        earlier.replace(path)
    else:
        earlier.unlink()
    return stands


def measured(path: Path) -> int:
    """How many figures a part's file holds: rows and their intervals, verdicts of the guard, steps of training, loops and
    their memory, targets that answered; 0 where there is none to read."""
    try:
        value = read_json(path)
    except UserError:
        return 0
    rows = [row["total_ms"][key] for cell in value.get("cells", []) for row in cell["rows"] for key in ("value", "low")]
    verdicts = [one["quality"]["passed"] for one in value.get("contestants", [])]
    loops = value.get("loops", [])
    memory = [one["peak_memory_bytes"] for one in loops]
    answers = [one for one in value.get("rows", []) if not one.get("failed")]
    return sum(one is not None for one in (*rows, *verdicts, *loops, *memory, *answers))
