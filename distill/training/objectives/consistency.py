"""Latent consistency distillation (LCM, arXiv 2310.04378): every point of the teacher's path leads to the same picture.

    f(z, t) = c_skip(t) z + c_out(t) x̂(z, t)                                    eq. 9
    ẑ_s = one DDIM step of the guided teacher from z_t, s = t − k                eq. 13, 14, 17
    L = d(f_θ(z_t, w, t), f_θ⁻(ẑ_s, w, s))                                      eq. 18, algorithm 1

θ⁻ is a running average of the student, or, as LCM-LoRA has it (arXiv 2311.05556), the student itself without gradient. The
published scripts are diffusers' examples/consistency_distillation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from distill.checkpoints.sampling import Sampling
from distill.common.errors import UserError
from distill.common.validation import STRICT
from distill.training.objectives.diffusion import Levels, Noised
from distill.training.objectives.guidance_range import GuidanceRange, guided
from distill.training.objectives.interface import Batch, Defaults, LossTerms, Nets, Predict

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0
"""Of the boundary condition; diffusers' LCMScheduler has the same as its defaults."""


@dataclass(frozen=True, kw_only=True)
class Consistency(Defaults):
    """`solver_steps` are the DDIM steps of the teacher's whole path; `guidance` is the teacher's w, None for none;
    `target_decay` makes θ⁻, None for the student itself. The distance is l2, or Huber's with `huber_c`."""

    __pydantic_config__ = STRICT
    kind: Literal["consistency"] = "consistency"
    solver_steps: PositiveInt = 50
    guidance: GuidanceRange | None = field(default_factory=lambda: GuidanceRange(low=3.0, high=15.0))
    target_decay: Annotated[float, Field(ge=0, lt=1)] | None = 0.95
    distance: Literal["l2", "huber"] = "huber"
    huber_c: PositiveFloat = 0.001

    @property
    def student_config(self) -> Mapping[str, Any]:
        return self.guidance.student_config if self.guidance else {}

    def sampling(self, teacher: Sampling | None) -> Sampling:
        """By diffusers' LCM scheduler, in four steps as published, at most in the solver's; as its teacher is under guidance
        where it was taught none."""
        return replace(
            self.guidance.sampling() if self.guidance else teacher or Sampling(),
            scheduler="LCMScheduler",
            settings={"original_inference_steps": self.solver_steps, "timestep_scaling": TIMESTEP_SCALING},
            steps=min(4, self.solver_steps),
            most_steps=self.solver_steps,
        )

    def check(self, prediction_type: str, timesteps: int) -> None:
        super().check(prediction_type, timesteps)
        if self.solver_steps > timesteps:
            raise UserError(f"solver_steps is {self.solver_steps}, more than the teacher's schedule has ({timesteps})")

    def draw(self, size: int, timesteps: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """One of the solver's `timestep`s k − 1, 2 k − 1, … (size,) and a w for each sample."""
        step = timesteps // self.solver_steps
        drawn = {"timestep": step * torch.randint(1, self.solver_steps + 1, (size,), generator=generator) - 1}
        return drawn | (self.guidance.draw(size, generator) if self.guidance else {})

    @contextmanager
    def prepare(self, nets: Nets) -> Iterator[LossTerms]:
        levels = Levels(nets)
        step = len(nets.alphas_cumprod) // self.solver_steps

        def terms(student: Predict, teacher: Predict, batch: Batch, _step: int) -> dict[str, torch.Tensor]:
            later = levels.at(batch["sample"], batch["timestep"])
            s = (later.timestep - step).clamp_min(0)
            earlier = levels.ddim_step(later, guided(nets, teacher, batch), s)
            told = self.guidance.told(batch) if self.guidance else batch
            wanted = consistency(earlier, nets.target({**told, "sample": earlier.sample, "timestep": s}))
            reached = consistency(later, student(told))
            return {"consistency": self._distance(reached, wanted)}

        yield terms

    def _distance(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        square = (one - other).square()
        if self.distance == "l2":
            return square.mean()
        return ((square + self.huber_c**2).sqrt() - self.huber_c).mean()


def consistency(noised: Noised, prediction: torch.Tensor) -> torch.Tensor:
    """f(z, t), which at t = 0 is z itself."""
    c_skip, c_out = boundary_scalings(noised.timestep)
    return c_skip * noised.sample + c_out * noised.clean(prediction)


def boundary_scalings(timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """c_skip = σ² / ((10 t)² + σ²) and c_out = 10 t / √((10 t)² + σ²) with σ = 0.5, each (n, 1, 1, 1)."""
    scaled = TIMESTEP_SCALING * timestep.float().view(-1, 1, 1, 1)
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    return c_skip, scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
