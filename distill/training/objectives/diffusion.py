"""A noised latent, what is predicted of it, and one DDIM step: what the few-step objectives share.

z_t = α_t x + σ_t ε with α_t² = alphas_cumprod[t], σ_t² = 1 − α_t². A UNet predicts ε, or v = α_t ε − σ_t x (arXiv
2202.00512, appendix D). Everything is computed in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distill.training.objectives.interface import Nets

CLEAN = -1
"""As a timestep: no noise is left, α is 1 and σ 0."""


@dataclass(frozen=True)
class Noised:
    """Latents `sample` (n, 4, h, w) at `timestep` (n,), with their `alpha` and `sigma` (n, 1, 1, 1)."""

    sample: torch.Tensor
    timestep: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor
    prediction_type: str

    def clean(self, prediction: torch.Tensor) -> torch.Tensor:
        """x̂: (z − σ ε̂) / α, or α z − σ v̂."""
        if self.prediction_type == "v_prediction":
            return self.alpha * self.sample - self.sigma * prediction.float()
        return (self.sample - self.sigma * prediction.float()) / self.alpha

    def noise(self, prediction: torch.Tensor) -> torch.Tensor:
        """ε̂: as predicted, or σ z + α v̂."""
        if self.prediction_type == "v_prediction":
            return self.sigma * self.sample + self.alpha * prediction.float()
        return prediction.float()

    @property
    def truncated_snr(self) -> torch.Tensor:
        """max(α² / σ², 1) (n,): the weight of an error of x̂ (arXiv 2202.00512, section 4)."""
        return (self.alpha / self.sigma).square().clamp_min(1).flatten()


@dataclass(frozen=True)
class Levels:
    """The noise levels of `nets`, and what its UNets predict there."""

    nets: Nets

    def at(self, sample: torch.Tensor, timestep: torch.Tensor) -> Noised:
        """`timestep` (n,) counts the schedule's, or is `CLEAN`."""
        signal = torch.where(timestep < 0, 1.0, self.nets.alphas_cumprod[timestep]).view(-1, 1, 1, 1)
        return Noised(sample.float(), timestep, signal.sqrt(), (1 - signal).sqrt(), self.nets.prediction_type)

    def ddim_step(self, noised: Noised, prediction: torch.Tensor, timestep: torch.Tensor) -> Noised:
        """z_s = α_s x̂ + σ_s ε̂ at an earlier `timestep` s (n,) (arXiv 2010.02502, eq. 12 with η = 0)."""
        earlier = self.at(noised.sample, timestep)
        sample = earlier.alpha * noised.clean(prediction) + earlier.sigma * noised.noise(prediction)
        return self.at(sample, timestep)


def trailing_timesteps(timesteps: int, steps: int) -> torch.Tensor:
    """The timesteps (steps,) of a sampler that begins at the last one, in falling order, as diffusers' `trailing` spacing
    has them (arXiv 2305.08891, table 2)."""
    return (timesteps - torch.arange(steps, dtype=torch.float64) * timesteps / steps).round().long() - 1
