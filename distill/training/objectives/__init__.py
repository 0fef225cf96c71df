"""What a stage teaches. Each objective is one file of equations, and a member of the union `Objective`: `kind` says in a
recipe's file which it is."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from distill.training.objectives.consistency import Consistency
from distill.training.objectives.distill import Distill
from distill.training.objectives.guidance import Guidance
from distill.training.objectives.guidance_range import GuidanceRange
from distill.training.objectives.halving import Halving

Objective = Annotated[Distill | Consistency | Halving | Guidance, Field(discriminator="kind")]

__all__ = ["Consistency", "Distill", "Guidance", "GuidanceRange", "Halving", "Objective"]
