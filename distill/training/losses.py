"""The distillation losses, each as its equation, each reduced in fp32 (an fp16 difference of 300 squares to inf).

    L = w · MSE(noise, noise_pred) + λ_out · w · MSE(teacher_pred, noise_pred) + λ_feat · Σ_t f(teacher_t, student_t)

(arXiv 2401.02677, eq. 1-3; BK-SDM, arXiv 2305.15798, eq. 2-4.) w is 1, or the min-SNR weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from distill.training.taps import Tap


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
    """One named term per tap; their sum is the feature loss as published."""
    return {tap.student: feature_loss(student[tap.student], teacher[tap.teacher], normalize=normalize) for tap in taps}


def min_snr_weight(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weight (batch,) of an ε-prediction error at each timestep: min(SNR, γ) / SNR (arXiv 2303.09556, eq. 5)."""
    signal = alphas_cumprod[timesteps]
    snr = signal / (1 - signal)
    return snr.clamp_max(gamma) / snr
