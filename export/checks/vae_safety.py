"""Does a VAE survive what it will meet? SDXL's stock VAE, run in fp16, overflows and draws black pictures.

What reaches the decoder is latents / scaling_factor: standard deviation 7.7 for SDXL. A sampler's latents stray to
several standard deviations, so decoding is tried at up to `LARGEST` of them. What reaches the encoder are pixels in
[-1, 1]: encoding is tried on noise over that range, and on the strongest contrasts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distill.common.errors import UserError
from distill.models.resolution import Resolution
from export.checks.parity import cpu_session
from export.components import COMPONENTS, Config

LARGEST = 6.0


def overflowing_share(name: str, model: Path, config: Config, resolution: Resolution, precision: str) -> float:
    """The share of non-finite values that `vae_decoder` or `vae_encoder` makes of the hardest inputs it may get."""
    session = cpu_session(model)
    [spec] = COMPONENTS[name].inputs(config, resolution, 2, precision)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(spec.shape)
    deviation = 1 / config.get("scaling_factor", 1.0)
    hardest = (noise * deviation, noise * LARGEST * deviation)
    if name == "vae_encoder":
        hardest = (noise.clip(-3, 3) / 3, np.sign(noise))
    shares = []
    for values in hardest:
        [result] = session.run(None, {spec.name: values.astype(spec.dtype)})
        shares.append(float(1 - np.isfinite(result).mean()))
    return max(shares)


def require_finite(name: str, model: Path, config: Config, resolution: Resolution, precision: str) -> None:
    """Raises UserError where decoding or encoding overflows."""
    if share := overflowing_share(name, model, config, resolution, precision):
        what = "a picture" if name == "vae_decoder" else "a picture's latents"
        raise UserError(
            f"this VAE overflows in {precision}: {share:.0%} of {what} is NaN or infinite; export it with "
            "--vae-precision fp32, or take an fp16-safe one with --vae fp16-fix or --vae tiny"
        )
