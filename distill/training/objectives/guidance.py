"""Guidance distillation (arXiv 2210.03142, stage one): one pass of the student is the teacher's two.

x̂^w = (1 + w) x̂(z_t, c) − w x̂(z_t)                                          eq. 2
L = max(α_t² / σ_t², 1) · ‖x̂^w − x̂_θ(z_t, c, w)‖²                            eq. 3, at all timesteps and all w of a range
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from distill.checkpoints.sampling import Sampling
from distill.common.validation import STRICT
from distill.training.objectives.diffusion import Levels
from distill.training.objectives.distill import prediction_loss
from distill.training.objectives.guidance_range import GuidanceRange, guided
from distill.training.objectives.interface import Batch, Defaults, LossTerms, Nets, Predict


@dataclass(frozen=True, kw_only=True)
class Guidance(Defaults):
    """`guidance` is the range of w; a student that is not told w learns one."""

    __pydantic_config__ = STRICT
    kind: Literal["guidance"] = "guidance"
    predictions = ("epsilon", "v_prediction")
    guidance: GuidanceRange = field(default_factory=lambda: GuidanceRange(low=0.0, high=14.0))

    def __post_init__(self) -> None:
        """Raises ValueError, which pydantic tells with its place, for a range that the student could not tell apart."""
        if self.guidance.embedding is None and self.guidance.low != self.guidance.high:
            raise ValueError(
                "a student that is not told w (embedding null) learns one w: low and high must be the same"
            )

    @property
    def student_config(self) -> Mapping[str, Any]:
        return self.guidance.student_config

    def sampling(self, teacher: Sampling | None) -> Sampling:
        """In one pass a step, else as its teacher is."""
        own = self.guidance.sampling()
        return replace(teacher or own, guidance_scale=own.guidance_scale, one_pass=True)

    def draw(self, size: int, timesteps: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """A timestep and a w (size,) for each sample."""
        return super().draw(size, timesteps, generator) | self.guidance.draw(size, generator)

    @contextmanager
    def prepare(self, nets: Nets) -> Iterator[LossTerms]:
        levels = Levels(nets)

        def terms(student: Predict, teacher: Predict, batch: Batch, _step: int) -> dict[str, torch.Tensor]:
            noised = levels.at(batch["sample"], batch["timestep"])
            wanted = noised.clean(guided(nets, teacher, batch))
            reached = noised.clean(student(self.guidance.told(batch)))
            return {"guidance": prediction_loss(reached, wanted, noised.truncated_snr)}

        yield terms
