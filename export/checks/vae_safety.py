"""Does a decoder survive the latents it will meet? SDXL's stock VAE, run in fp16, overflows and draws black pictures.

What reaches the decoder is latents / scaling_factor: standard deviation 7.7 for SDXL. A sampler's latents stray to
several standard deviations, so decoding is tried at up to `LARGEST` of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distill.common.errors import UserError
from distill.models.resolution import Resolution
from export.checks.parity import cpu_session
from export.components import COMPONENTS, Config

LARGEST = 6.0


def overflowing_share(model: Path, config: Config, resolution: Resolution, precision: str) -> float:
    """The share of non-finite values in pictures decoded from latents of 1 to `LARGEST` standard deviations."""
    session = cpu_session(model)
    [spec] = COMPONENTS["vae_decoder"].inputs(config, resolution, 2, precision)
    rng = np.random.default_rng(0)
    shares = []
    for deviations in (1.0, LARGEST):
        latents = rng.standard_normal(spec.shape) * deviations / config.get("scaling_factor", 1.0)
        [picture] = session.run(None, {spec.name: latents.astype(spec.dtype)})
        shares.append(float(1 - np.isfinite(picture).mean()))
    return max(shares)


def require_finite(model: Path, config: Config, resolution: Resolution, precision: str) -> None:
    """Raises UserError where decoding overflows."""
    if share := overflowing_share(model, config, resolution, precision):
        raise UserError(
            f"this VAE overflows in {precision}: {share:.0%} of a picture is NaN or infinite; export it with "
            "--vae-precision fp32, or take an fp16-safe one with --vae fp16-fix or --vae tiny"
        )
