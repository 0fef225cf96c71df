"""The learning rate over a stage, as data of the recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from distill.common.validation import STRICT


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A straight rise over `warmup_steps`, then down from 1 to `floor` at the last step in the stated `shape`: along a
    half cosine or a straight line, or not at all."""

    __pydantic_config__ = STRICT
    shape: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: NonNegativeInt = 500
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1

    def factor(self, step: int, steps: int) -> float:
        """What the stage's learning rate is multiplied by in `step`, from 0, of `steps`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        falling = 0.5 + 0.5 * math.cos(math.pi * progress) if self.shape == "cosine" else 1 - progress
        return self.floor + (1 - self.floor) * falling
