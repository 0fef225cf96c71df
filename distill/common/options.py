"""What an option of any command may be, by its type: numbers are finite and fit 64 bits, a path is not empty.

An empty path is an unset shell variable, as in `--out "$OUT"`, and would mean the working directory. What else bounds one
option stands where its command reads it (`require_least`, `require_above`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

LARGEST = 1e15


def whole_number(text: str) -> int:
    """Raises ValueError for anything but a number of 64 bits."""
    number = int(text) if len(text) <= 20 or not text.strip("+-").isdecimal() else 1 << 64
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError(f"{text[:24]} is beyond 64 bits")
    return number


def finite_number(text: str) -> float:
    """Raises ValueError for NaN, infinity, what is no number, and numbers beyond any use, whose products are infinite."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    if abs(number) > LARGEST:
        raise ValueError(f"{text} is beyond {LARGEST:g}")
    return number


def stated_path(text: str) -> Path:
    """Raises ValueError for a path of nothing, and for one that no system has."""
    if not text.strip() or "\0" in text:
        raise ValueError("an empty path names nothing (is a variable of the shell not set?)")
    return Path(text)


def parse_names(text: str) -> list[str]:
    """Those between commas, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


_READERS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    int: ("INT", whole_number),
    float: ("FLOAT", finite_number),
    Path: ("PATH", stated_path),
}
OPTIONS = ConstructorRegistry()
"""Entered around every command line, by `exit_on_user_error`."""


@OPTIONS.primitive_rule
def _read(about: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    kind = about.type
    if kind not in _READERS:
        return None
    metavar, read = _READERS[kind]
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: (
            isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        ),
        str_from_instance=lambda value: [str(value)],
    )
