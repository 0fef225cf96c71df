"""What the training step asks of an objective, and what it gives to it.

An objective is a frozen dataclass, a part of a recipe, and a subclass of `Defaults`, which answers for those that need
nothing special. The step asks it for:

    kind                               its name in a recipe's file
    needs_teacher                      whether the teacher is loaded at all
    steady_from                        the step from which on one loss can be compared with the next (the terms' weights
                                       no longer change): from there a diverged loss is told
    target_decay                       of the running average (EMA) of the student that `nets.target` is; None: the
                                       student itself
    student_config                     entries that the student's UNet config has beside its own; the weights that come
                                       with them begin at zero, so that the UNet predicts as before
    sampling(teacher)                  how the student is drawn with (scheduler, steps, guidance), given how its teacher is
    check(prediction_type, timesteps)  raises UserError for a teacher that it cannot learn from
    draw(size, timesteps, generator)   what is drawn for each sample beside its noise: the timestep, a guidance scale …
    prepare(nets)                      a context manager: all that is done once, before the first step (hooks, tables); it
                                       gives `terms(student, teacher, batch, step)`, the named loss terms

`terms` calls student and teacher as functions of a batch, as often as the equations say and with the batch changed as
they say: `student({**batch, "timestep": earlier})`, `teacher(nets.unprompted(batch))`. The student is called once, last:
FSDP fetches ahead for the backward pass what the last forward pass left. The average is a state of the training as the
student's weights are: the step moves it after each optimiser step, checkpoints hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from distill.checkpoints.sampling import Sampling
from distill.common.errors import UserError
from distill.models.module_map import ModuleMap

Batch = Mapping[str, torch.Tensor]
"""The UNet's inputs by name, the `noise` (n, 4, h, w) that `sample` holds, and what else the objective drew."""
Predict = Callable[[Batch], torch.Tensor]
"""What a UNet predicts (n, 4, h, w) of a batch."""
LossTerms = Callable[[Predict, Predict, Batch, int], dict[str, torch.Tensor]]
"""terms(student, teacher, batch, step): each term of the loss by name, already times its λ; their sum is the loss."""


@dataclass(frozen=True, kw_only=True)
class Nets:
    """Both UNets on their device, never wrapped, so that the names of modules hold under DDP; `teacher` is None where
    the objective needs none. `alphas_cumprod` (timesteps,) is the signal's variance and `prediction_type` what both
    UNets predict (`epsilon` or `v_prediction`); `unconditional` are the text inputs of no prompt, without a batch.
    `target` predicts without gradient by the student's weights, or by their average of the objective's `target_decay`."""

    student: Any
    teacher: Any
    modules: ModuleMap
    alphas_cumprod: torch.Tensor
    unconditional: Mapping[str, torch.Tensor]
    prediction_type: str = "epsilon"
    target: Any = None

    def unprompted(self, batch: Batch) -> Batch:
        """The batch with its text inputs replaced by those of no prompt."""
        size = len(batch["sample"])
        return {**batch, **{name: value.expand(size, *value.shape) for name, value in self.unconditional.items()}}


class Defaults:
    """What an objective answers if it does not say otherwise: it learns from a teacher that predicts the noise."""

    kind: str
    predictions: tuple[str, ...] = ("epsilon",)

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def steady_from(self) -> int:
        return 0

    @property
    def target_decay(self) -> float | None:
        return None

    @property
    def student_config(self) -> Mapping[str, Any]:
        return {}

    def sampling(self, teacher: Sampling | None) -> Sampling | None:
        """How the student is to be drawn: as its teacher is. None: by any checkpoint's own settings."""
        return teacher

    def check(self, prediction_type: str, timesteps: int) -> None:
        """Raises UserError for a teacher that predicts something else than what the equations stand for."""
        if prediction_type not in self.predictions:
            raise UserError(
                f"the teacher predicts {prediction_type!r}; the objective {self.kind!r} needs one that predicts "
                f"{' or '.join(map(repr, self.predictions))}"
            )

    def draw(self, size: int, timesteps: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """A timestep (size,) for each sample, all equally likely."""
        return {"timestep": torch.randint(0, timesteps, (size,), generator=generator)}

    def prepare(self, nets: Nets) -> AbstractContextManager[LossTerms]:
        raise NotImplementedError
