"""Guidance as part of what is taught: the scale w of each sample, and the teacher under it.

Under classifier-free guidance a UNet predicts cond + w (cond − uncond) = (1 + w) cond − w uncond (arXiv 2207.12598, eq. 6);
diffusers' `guidance_scale` is 1 + w. A student that is told w takes it as an embedding beside the timestep's, in the input
`timestep_cond`, from which diffusers' pipelines know that it needs one pass a step (arXiv 2210.03142, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat

from distill.checkpoints.sampling import Sampling
from distill.common.validation import STRICT
from distill.training.objectives.interface import Batch, Nets, Predict


@dataclass(frozen=True, kw_only=True)
class GuidanceRange:
    """w of each sample, all between `low` and `high` equally likely; `embedding` is the width of the input that tells it to
    the student, None where the student is not told."""

    __pydantic_config__ = STRICT
    low: NonNegativeFloat
    high: NonNegativeFloat
    embedding: Annotated[int, Field(ge=4, multiple_of=2)] | None = 256

    def __post_init__(self) -> None:
        """Raises ValueError, which pydantic tells with its place, for a range whose `low` is above its `high`."""
        if self.low > self.high:
            raise ValueError(f"the range of w is reversed: low {self.low:g} is above high {self.high:g}")

    @property
    def student_config(self) -> Mapping[str, Any]:
        return {"time_cond_proj_dim": self.embedding} if self.embedding else {}

    def sampling(self) -> Sampling:
        """One pass a step; at the middle of the range, where the student is told, and else at the scale that means none."""
        scale = 1 + (self.low + self.high) / 2 if self.embedding else 1.0
        return Sampling(guidance_scale=scale, one_pass=True)

    def draw(self, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """`guidance` (size,)."""
        return {"guidance": self.low + (self.high - self.low) * torch.rand(size, generator=generator)}

    def told(self, batch: Batch) -> Batch:
        """The batch with w as the student takes it."""
        return _told(batch, self.embedding) if self.embedding else batch


def guided(nets: Nets, teacher: Predict, batch: Batch) -> torch.Tensor:
    """The teacher's prediction (n, 4, h, w) under each sample's w, where the batch has one. A teacher that takes w itself
    is called once."""
    if "guidance" not in batch:
        return teacher(batch)
    if width := nets.teacher.config.time_cond_proj_dim:
        return teacher(_told(batch, width))
    cond, uncond = teacher(batch).float(), teacher(nets.unprompted(batch)).float()
    return cond + batch["guidance"].view(-1, 1, 1, 1) * (cond - uncond)


def _told(batch: Batch, width: int) -> Batch:
    return {**batch, "timestep_cond": guidance_embedding(batch["guidance"], width)}


def guidance_embedding(w: torch.Tensor, width: int) -> torch.Tensor:
    """sin and cos of 1000 w (n,) at width / 2 frequencies from 1 to 1e-4, as (n, width) (arXiv 2310.04378, section 4.3)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * (-math.log(10_000) / (half - 1)))
    angles = 1000 * w.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
