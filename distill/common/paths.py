"""Paths on a command line: an empty one, as an unset variable gives, is refused and not taken for the current folder."""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo


def refusing_empty_paths(refusal: type[Exception]) -> ConstructorRegistry:
    """For every room's command line, used while one is parsed: an empty path raises `refusal`."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
        if info.type not in (Path, os.PathLike):
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda words: _not_empty(words[0], refusal),
            is_instance=lambda value: isinstance(value, os.PathLike),
            str_from_instance=lambda path: [str(path)],
        )

    return registry


def _not_empty(word: str, refusal: type[Exception]) -> Path:
    if word.strip():
        return Path(word)
    named = [before for before, after in pairwise(sys.argv) if after == word and before.startswith("--")]
    named += [
        argument.partition("=")[0] for argument in sys.argv if argument.startswith("--") and argument.endswith("=")
    ]
    raise refusal(f"{named[0] if named else 'a path'} is empty: is a variable unset? name a file or a folder")
