"""The learning rate over a stage, as data of the recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from distill.common.validation import STRICT


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A straight rise over `warmup_steps`, then down to `floor` times the highest rate at the end, in the stated `shape`:
    along half a cosine, along a straight line, or not at all."""

    __pydantic_config__ = STRICT
    shape: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: NonNegativeInt = 500
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1

    def rate(self, peak: float, step: int, steps: int) -> float:
        """The learning rate of `step`, from 0, of `steps`; `peak` is the highest."""
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return peak
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        falling = 0.5 + 0.5 * math.cos(math.pi * progress) if self.shape == "cosine" else 1 - progress
        return peak * (self.floor + (1 - self.floor) * falling)
