"""Distillation: the student learns the noise, the teacher's prediction and the teacher's features.

    L = w · MSE(noise, noise_pred) + λ_out · w · MSE(teacher_pred, noise_pred) + λ_feat · Σ_t f(teacher_t, student_t)

(arXiv 2401.02677, eq. 1-3; BK-SDM, arXiv 2305.15798, eq. 2-4.) A teacher that predicts the velocity has a student that does:
then that is learned in the noise's place. w is 1, or the min-SNR weight. Every term is reduced in
fp32: an fp16 difference of 300 squares to inf.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat

from distill.common.errors import UserError
from distill.common.validation import STRICT
from distill.training.objectives.interface import Batch, Defaults, LossTerms, Nets, Predict
from distill.training.objectives.taps import FeatureRecorder, Level, Tap, make_taps


@dataclass(frozen=True, kw_only=True)
class Distill(Defaults):
    """`task`, `output` and `feature` are the λ of the terms; `level` and `normalize` say what the feature terms are. `taps`
    stand in the level's place: module path in the student -> module path in the teacher. Over the first `ramp_steps` λ_out
    and λ_feat rise from 0 in a straight line."""

    __pydantic_config__ = STRICT
    predictions = ("epsilon", "v_prediction")
    kind: Literal["distill"] = "distill"
    task: NonNegativeFloat = 1.0
    output: NonNegativeFloat = 0.5
    feature: NonNegativeFloat = 0.5
    level: Level = "sub-block"
    taps: Mapping[str, str] | None = None
    normalize: bool = False
    ramp_steps: NonNegativeInt = 0
    min_snr_gamma: PositiveFloat | None = None

    def __post_init__(self) -> None:
        """Raises ValueError, which pydantic tells with its place, where nothing teaches the student's last layers."""
        if not (self.task or self.output):
            raise ValueError("task or output must be above 0; features alone teach nothing after the last of them")

    @property
    def needs_teacher(self) -> bool:
        return bool(self.output or self.feature)

    @property
    def steady_from(self) -> int:
        return self.ramp_steps

    @contextmanager
    def prepare(self, nets: Nets) -> Iterator[LossTerms]:
        """Hooks on what is compared. A term whose λ is 0 is left out, and the teacher is not called where no term needs
        it."""
        given = [Tap(*pair) for pair in (self.taps or {}).items()]
        taps = (given or make_taps(self.level, nets.modules)) if self.feature else ()
        of_student = FeatureRecorder(nets.student, [tap.student for tap in taps])
        of_teacher = FeatureRecorder(nets.teacher, sorted({tap.teacher for tap in taps}))

        def terms(student: Predict, teacher: Predict, batch: Batch, step: int) -> dict[str, torch.Tensor]:
            ramp = min(1.0, (step + 1) / max(1, self.ramp_steps))
            weight = None
            if self.min_snr_gamma:
                gamma = self.min_snr_gamma
                weight = min_snr_weight(nets.alphas_cumprod, batch["timestep"], gamma, nets.prediction_type)
            if self.needs_teacher:
                with of_teacher.recording():
                    teacher_pred = teacher(batch)
            with of_student.recording():
                noise_pred = student(batch)
            terms = {}
            if self.task:
                target = task_target(batch, nets.alphas_cumprod, nets.prediction_type)
                terms["task"] = self.task * prediction_loss(noise_pred, target, weight)
            if self.output:
                terms["output"] = self.output * ramp * prediction_loss(noise_pred, teacher_pred, weight)
            if self.feature:
                features = feature_losses(taps, of_student.features, of_teacher.features, normalize=self.normalize)
                terms |= {f"feature/{name}": self.feature * ramp * value for name, value in features.items()}
            of_student.features.clear()  # the graph holds what backward needs of them
            of_teacher.features.clear()
            return terms

        try:
            yield terms
        finally:
            of_student.remove()
            of_teacher.remove()


def prediction_loss(noise_pred: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean square error of (batch, channels, height, width) predictions, each sample scaled by `weight` (batch,)."""
    error = (noise_pred.float() - target.float()).square().flatten(1).mean(1)
    return (error if weight is None else error * weight).mean()


def feature_loss(student: torch.Tensor, teacher: torch.Tensor, *, normalize: bool) -> torch.Tensor:
    """Mean square error of two features (batch, ...); normalised, each sample's is divided by the mean square of its
    teacher feature, so that no level outweighs another by its scale (LAPTOP-Diff, arXiv 2404.11098, eq. 9). By sample
    and not by batch, so that processes sharing a batch compute what one would."""
    teacher = teacher.detach().float().flatten(1)
    error = (student.float().flatten(1) - teacher).square().mean(1)
    return (error / teacher.square().mean(1).clamp_min(1e-12) if normalize else error).mean()


def feature_losses(
    taps: Sequence[Tap], student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], *, normalize: bool
) -> dict[str, torch.Tensor]:
    """One named term per tap; their sum is the feature loss as published. Raises UserError for features of two shapes."""
    for tap in taps:
        shapes = [tuple(feature.shape[1:]) for feature in (student[tap.student], teacher[tap.teacher])]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"taps: the student's {tap.student} gives features {shapes[0]}, the teacher's {tap.teacher} {shapes[1]}; "
                "only features of one shape can be compared"
            )
    return {tap.student: feature_loss(student[tap.student], teacher[tap.teacher], normalize=normalize) for tap in taps}


def task_target(batch: Batch, alphas_cumprod: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """What a UNet predicts of a batch if it is right (n, 4, h, w): the noise ε, or the velocity v = α ε − σ x (arXiv
    2202.00512, appendix D), which is (ε − σ z) / α of z = α x + σ ε."""
    if prediction_type == "epsilon":
        return batch["noise"]
    signal = alphas_cumprod[batch["timestep"]].view(-1, 1, 1, 1)
    return (batch["noise"] - (1 - signal).sqrt() * batch["sample"]) / signal.sqrt()


def min_snr_weight(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, gamma: float, prediction_type: str = "epsilon"
) -> torch.Tensor:
    """Weight (batch,) of a prediction's error at each timestep: min(SNR, γ) / SNR, of a velocity min(SNR, γ) / (SNR + 1)
    (arXiv 2303.09556, section 3.4 and eq. 5)."""
    signal = alphas_cumprod[timesteps]
    snr = signal / (1 - signal)
    return snr.clamp_max(gamma) / (snr if prediction_type == "epsilon" else snr + 1)
