"""Image sizes: the nine of SDXL, and how a family of another size gets its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from distill.common.errors import UserError


@dataclass(frozen=True, order=True)
class Resolution:
    """An image size in pixels; text form `WIDTHxHEIGHT`."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, text: str) -> Resolution:
        """Raises UserError for anything but WIDTHxHEIGHT."""
        sides = re.fullmatch(r"([0-9]{1,5})[xX]([0-9]{1,5})", text)
        if sides is None:
            shown = text if len(text) < 40 else f"{text[:37]}..."
            raise UserError(f"resolution {shown!r} is not of the form WIDTHxHEIGHT, e.g. 1024x1024")
        return cls(int(sides[1]), int(sides[2]))


def parse_resolutions(text: str, family: Sequence[Resolution] = ()) -> tuple[Resolution, ...]:
    """Sizes between commas or spaces, each once; `all` are the family's, `first` is the first of them. Raises UserError
    for anything else."""
    words = {"all": family, "first": family[:1]}
    sizes = words[text] if family and text in words else map(Resolution.parse, re.split(r"[,\s]+", text.strip(", ")))
    return tuple(dict.fromkeys(sizes))


NINE = parse_resolutions("1024x1024 1152x896 896x1152 1216x832 832x1216 1344x768 768x1344 1536x640 640x1536")
"""SDXL's (arXiv 2307.01952, appendix I, the ones that SSD-1B lists): the base size first."""


def scaled_resolutions(base: int, multiple: int) -> tuple[Resolution, ...]:
    """The aspect ratios of NINE at another base size in pixels, each side a multiple of `multiple`."""
    sides = [
        tuple(max(multiple, round(side * base / 1024 / multiple) * multiple) for side in (r.width, r.height))
        for r in NINE
    ]
    return tuple(dict.fromkeys(Resolution(*side) for side in sides))
