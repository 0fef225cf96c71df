"""Progressive distillation (arXiv 2202.00512, algorithm 2): one DDIM step of the student is two of its teacher.

    z_s = DDIM(DDIM(z_t, t → m), m → s)                                          the teacher's two half-steps
    x̃ = (z_s − (σ_s / σ_t) z_t) / (α_s − (σ_s / σ_t) α_t)                        what one step needs to land on z_s
    L = max(α_t² / σ_t², 1) · ‖x̃ − x̂_θ(z_t)‖²                                    eq. 9, section 4

The student of a round is the teacher of the next, with half the steps. After guidance distillation (arXiv 2210.03142, stage
two) teacher and student are told the same w.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import PositiveInt

from distill.checkpoints.sampling import Sampling
from distill.common.errors import UserError
from distill.common.validation import STRICT
from distill.training.objectives.diffusion import CLEAN, Levels, Noised, trailing_timesteps
from distill.training.objectives.distill import prediction_loss
from distill.training.objectives.guidance_range import GuidanceRange, guided
from distill.training.objectives.interface import Batch, Defaults, LossTerms, Nets, Predict


@dataclass(frozen=True, kw_only=True)
class Halving(Defaults):
    """`steps` are those of the student; its teacher takes twice as many, under guidance where `guidance` is given."""

    __pydantic_config__ = STRICT
    kind: Literal["halving"] = "halving"
    predictions = ("epsilon", "v_prediction")
    steps: PositiveInt
    guidance: GuidanceRange | None = None

    @property
    def student_config(self) -> Mapping[str, Any]:
        return self.guidance.student_config if self.guidance else {}

    def sampling(self, teacher: Sampling | None) -> Sampling:
        """By diffusers' DDIM in exactly these steps; as its teacher is under guidance where it was taught none."""
        return replace(
            self.guidance.sampling() if self.guidance else teacher or Sampling(),
            scheduler="DDIMScheduler",
            settings={
                "timestep_spacing": "trailing",
                "set_alpha_to_one": True,
                "clip_sample": False,
                "steps_offset": 0,
            },
            steps=self.steps,
            most_steps=self.steps,
        )

    def check(self, prediction_type: str, timesteps: int) -> None:
        super().check(prediction_type, timesteps)
        if 2 * self.steps > timesteps:
            raise UserError(
                f"{self.steps} steps are {2 * self.steps} of the teacher, more than its schedule has ({timesteps})"
            )

    def draw(self, size: int, timesteps: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Where a step of the student begins (`timestep`, (size,)), where it is halved and where it ends, and a w for each
        sample."""
        grid = torch.cat([trailing_timesteps(timesteps, 2 * self.steps), torch.tensor([CLEAN])])
        begin = 2 * torch.randint(0, self.steps, (size,), generator=generator)
        drawn = {"timestep": grid[begin], "halfway": grid[begin + 1], "end": grid[begin + 2]}
        return drawn | (self.guidance.draw(size, generator) if self.guidance else {})

    @contextmanager
    def prepare(self, nets: Nets) -> Iterator[LossTerms]:
        levels = Levels(nets)

        def terms(student: Predict, teacher: Predict, batch: Batch, _step: int) -> dict[str, torch.Tensor]:
            begin = levels.at(batch["sample"], batch["timestep"])
            halfway = levels.ddim_step(begin, guided(nets, teacher, batch), batch["halfway"])
            there = {**batch, "sample": halfway.sample, "timestep": halfway.timestep}
            end = levels.ddim_step(halfway, guided(nets, teacher, there), batch["end"])
            told = self.guidance.told(batch) if self.guidance else batch
            reached = begin.clean(student(told))
            return {"halving": prediction_loss(reached, one_step_target(begin, end), begin.truncated_snr)}

        yield terms


def one_step_target(begin: Noised, end: Noised) -> torch.Tensor:
    """x̃, from which one DDIM step leads from `begin` to `end`."""
    ratio = end.sigma / begin.sigma
    return (end.sample - ratio * begin.sample) / (end.alpha - ratio * begin.alpha)
