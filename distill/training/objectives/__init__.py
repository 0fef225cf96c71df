"""What a stage teaches. Each objective is one file of equations, and a member of the union `Objective`.

With a second one this reads `Annotated[Distill | Other, Field(discriminator="kind")]`: `kind` says in a recipe's file which
it is.
"""

from distill.training.objectives.distill import Distill

Objective = Distill

__all__ = ["Distill", "Objective"]
