"""Paths on a command line: an empty one, as an unset variable gives, is refused and not taken for the current folder."""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo


def refusing_empty_paths(refusal: type[Exception]) -> ConstructorRegistry:
    """How tyro reads a path while the registry is entered: an empty one raises `refusal`, which names the option."""
    registry = ConstructorRegistry()

    def read(words: list[str]) -> Path:
        if not words[0].strip():
            raise refusal(f"{_option_of(words[0])} is empty: is a variable unset? name a file or a folder")
        return Path(words[0])

    @registry.primitive_rule
    def path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
        if info.type not in (Path, os.PathLike):
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=read,
            is_instance=lambda value: isinstance(value, os.PathLike),
            str_from_instance=lambda path: [str(path)],
        )

    return registry


def _option_of(word: str) -> str:
    """The option on the command line that was given the empty `word`."""
    before = [option for option, value in pairwise(sys.argv) if value == word and option.startswith("--")]
    joined = [option.removesuffix("=") for option in sys.argv if option.startswith("--") and option.endswith("=")]
    return next(iter([*before, *joined]), "a path")
