"""One training step as mathematics: the noise, the teacher's and the student's passes, the named loss terms.

Nothing here depends on history: the batch, the noise, the timesteps and the dropped captions of a step are functions
of (seed, stage, step, sample). So a run that was killed ends in the same bytes as one that was not, and N processes
see what one would.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from statistics import median
from typing import Any

import torch

from distill.data.cache import seed_of
from distill.models.conditioning import call_unet
from distill.training.losses import feature_losses, min_snr_weight, prediction_loss
from distill.training.recipes import LossWeights, Stage
from distill.training.taps import FeatureRecorder, Tap


def add_noise(
    batch: Mapping[str, torch.Tensor],
    alphas_cumprod: torch.Tensor,
    unconditional: Mapping[str, torch.Tensor],
    *,
    seed: Sequence[object],
    caption_dropout: float,
    rows: slice = slice(None),
    batch_size: int | None = None,
) -> dict[str, torch.Tensor]:
    """A batch of `LatentCache` as the UNet takes it, by the names of its inputs, with the `noise` (n, 4, h, w) that was
    added; a dropped caption's text becomes `unconditional`.

    Where `batch` is but the `rows` of a global batch, `batch_size` is the size of that: noise is drawn for all of it,
    so that a sample's own does not depend on how the batch is shared out.
    """
    batch = dict(batch)
    latents = batch.pop("latents")
    size = batch_size or len(latents)
    generator = torch.Generator().manual_seed(seed_of(*seed))  # type: ignore[arg-type]
    noise = torch.randn((size, *latents.shape[1:]), generator=generator)[rows]
    timesteps = torch.randint(0, len(alphas_cumprod), (size,), generator=generator)[rows]
    dropped = torch.rand(size, generator=generator)[rows] < caption_dropout
    for name, nothing in unconditional.items():
        batch[name] = torch.where(dropped.view(-1, *[1] * nothing.dim()), nothing, batch[name])
    signal = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    sample = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    return batch | {"sample": sample, "timestep": timesteps, "noise": noise}


def predict(unet: Any, batch: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The UNet's noise_pred (batch, 4, height / 8, width / 8) for a noised batch."""
    cast = {name: batch[name].to(dtype) for name in ("sample", "encoder_hidden_states")}
    return call_unet(unet, {**batch, **cast})


def loss_terms(
    student: Any,
    teacher: Any,
    batch: Mapping[str, torch.Tensor],
    losses: LossWeights,
    *,
    alphas_cumprod: torch.Tensor,
    warm: float,
    taps: Sequence[Tap],
    recorders: tuple[FeatureRecorder, FeatureRecorder],
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, torch.Tensor]:
    """Every term of the loss by name, each already times its λ; their sum is the loss.

    `recorders` are the student's and the teacher's; `warm` in [0, 1] scales the distillation terms. A term whose λ is
    0 is left out, and the teacher is not called where no term needs it.
    """
    of_student, of_teacher = recorders
    weight = None
    if losses.min_snr_gamma:
        weight = min_snr_weight(alphas_cumprod, batch["timestep"], losses.min_snr_gamma)
    if losses.needs_teacher:
        with torch.no_grad(), of_teacher.recording():
            teacher_pred = predict(teacher, batch, teacher.dtype)
    with autocast(), of_student.recording():
        noise_pred = predict(student, batch)
    terms = {}
    if losses.task:
        terms["task"] = losses.task * prediction_loss(noise_pred, batch["noise"], weight)
    if losses.output:
        terms["output"] = losses.output * warm * prediction_loss(noise_pred, teacher_pred, weight)
    if losses.feature:
        features = feature_losses(taps, of_student.features, of_teacher.features, normalize=losses.normalize)
        terms |= {f"feature/{name}": losses.feature * warm * value for name, value in features.items()}
    for recorder in recorders:
        recorder.features.clear()  # the graph holds what backward needs of them
    return terms


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, then a half cosine to a tenth."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    progress = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    return stage.learning_rate * (0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * progress)))


class DivergenceGuard:
    """Says when a loss has stayed far above its own running median.

    Single steps are noisy, each at its own timesteps, so one bad step is nothing; `patience` of them in a row, each
    over `factor` times the median of the last `window` good ones, is a run that has left the road. Those good ones are
    all it knows: a run that goes on from a checkpoint takes them from there.
    """

    def __init__(self, *, factor: float = 5.0, patience: int = 50, window: int = 500) -> None:
        self.factor, self.patience, self.bad_steps = factor, patience, 0
        self.good: deque[float] = deque(maxlen=window)

    @property
    def median(self) -> float:
        """Of the good losses; infinite while there are too few of them to judge by."""
        return median(self.good) if len(self.good) >= self.patience else math.inf

    def diverged(self, loss: float) -> bool:
        """Takes in the loss of one more step."""
        if loss > self.factor * self.median:
            self.bad_steps += 1
        else:
            self.bad_steps = 0
            self.good.append(loss)
        return self.bad_steps >= self.patience
