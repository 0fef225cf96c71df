"""What a command may write over or remove: only what an earlier run of it has written.

Every folder that a command fills has a *marker*, a JSON file with keys that no other program's file has. A folder that holds
something and has no such marker is somebody else's, and is refused before anything in it is touched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from distill.common.errors import UserError
from distill.common.files import read_json

LEFTOVERS = re.compile(r"\.lock|\.partial|\..+\.(lock|partial|old)|lost\+found|\.DS_Store")
"""Names that say nothing of whose folder it is: locks and what a killed run left, and what systems put into new folders."""

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""How one begins that was made a path."""


def read_marker(path: Path, keys: Collection[str]) -> dict[str, Any] | None:
    """The JSON object of a file that we wrote: one that has all `keys`. None for any other file."""
    try:
        value = read_json(path)
    except (UserError, OSError):
        return None
    return value if isinstance(value, dict) and all(key in value for key in keys) else None


def require_our_folder(
    folder: Path,
    what: str,
    markers: Iterable[str],
    keys: Collection[str],
    *,
    leftovers: Collection[str] = (),
    option: str = "--out",
) -> None:
    """Raises UserError for a file, for a folder that cannot be made, and for one that holds anything and none of the
    `markers` (glob patterns of files in it) has the `keys` that ours have. `what` says what is written there, e.g. "a
    bundle"; `leftovers` are names of what a killed run may leave before it has written a marker."""
    if not folder.exists():
        if folder.is_symlink():
            raise UserError(f"{folder} is a link to nothing; {option} takes a folder for {what}")
        _require_place(folder, option)
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; {option} takes a folder for {what}")
    strange = (path for path in folder.iterdir() if not LEFTOVERS.fullmatch(path.name) and path.name not in leftovers)
    found = sorted(path.name for path in strange if _holds_a_file(path))
    if not found or any(read_marker(path, keys) is not None for one in markers for path in folder.glob(one)):
        return
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    raise UserError(
        f"{folder} is not {what} of slimxl: it holds {found[0]}{more}; nothing was touched, choose an empty or a new "
        f"folder for {option}"
    )


def _holds_a_file(path: Path) -> bool:
    return path.is_symlink() or not path.is_dir() or any(not inner.is_dir() for inner in path.rglob("*"))


def require_our_files(
    folder: Path, names: Iterable[str], marker: str, keys: Collection[str], option: str = "--out"
) -> None:
    """Raises UserError where one of the files `names` is in `folder`, and `marker`, written first, has not the `keys` that
    ours has."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; {option} takes a folder")
    found = [name for name in names if os.path.lexists(folder / name)]
    if found and read_marker(folder / marker, keys) is None:
        raise UserError(
            f"{folder / found[0]} was not written by slimxl and would be written over; nothing was touched, choose another "
            f"{option} or move it away"
        )


def require_writable_file(path: Path, keys: Collection[str], option: str = "--out") -> None:
    """Raises UserError for an --out that is a folder, lies where nothing may be written, or is a file that we did not write,
    whose JSON has not all `keys`: before hours of measuring, not after. An empty file holds nothing to lose."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; it takes the file to write, e.g. {path / 'results.json'}")
    _require_place(path, option)
    if path.exists() and not path.is_file():
        raise UserError(f"{option} {path} is no plain file; choose another name")
    if path.exists() and path.stat().st_size and read_marker(path, keys) is None:
        raise UserError(
            f"{option} {path} is a file that this command did not write; it was not touched, choose another name or move "
            "it away"
        )


def _require_place(path: Path, option: str) -> None:
    if URL.match(str(path)):
        raise UserError(
            f"{option} {path} is an URL; it takes a place on this machine, from where what is made is copied"
        )
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{option} {path} cannot be made: {place} is no folder that may be written")


def require_apart(one: Path, other: Path, options: tuple[str, str]) -> None:
    """Raises UserError where one folder is the other or lies inside it."""
    first, second = one.resolve(), other.resolve()
    if first.is_relative_to(second) or second.is_relative_to(first):
        said = "the same folder" if first == second else "one inside the other"
        raise UserError(f"{options[0]} {one} and {options[1]} {other} are {said}; choose another {options[0]}")
