"""The console script `slimxl ROOM …`: what `python -m ROOM …` is, by one name."""

from __future__ import annotations

import runpy
import sys

ROOMS = ("distill", "export", "engines", "bench")
COMMAND = ["python -m"]
"""How a room was called, for the head of its help."""


def program(room: str) -> str:
    return f"{COMMAND[-1]} {room}"


def main() -> int:
    """Runs the room's own command line; for any other word the usage and exit code 2."""
    room, *arguments = sys.argv[1:] or [""]
    if room not in ROOMS:
        asked = room in ("-h", "--help")
        print(f"usage: slimxl {{{','.join(ROOMS)}}} …", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    sys.argv = [sys.argv[0], *arguments]
    COMMAND.append("slimxl")
    runpy.run_module(room, run_name="__main__", alter_sys=True)
    return 0
