"""What a contestant gives back, and what is visibly wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Pictures:
    """`images` uint8 (batch, height, width, 3); `latents`, an array or a tensor on any device, (batch, 4, height / 8,
    width / 8), or None; `noise_preds` what the sampler was given at each step, guidance applied, float32 (steps, batch, 4,
    height / 8, width / 8), or None where nobody watched."""

    images: np.ndarray
    latents: Any = None
    noise_preds: np.ndarray | None = None

    def latents_array(self) -> np.ndarray | None:
        """The latents in float32 on the host; they are copied now, not in the time of the call that drew them."""
        if self.latents is None or isinstance(self.latents, np.ndarray):
            return self.latents
        return np.asarray(self.latents.detach().float().cpu())

    def faults(self) -> list[str]:
        """What is wrong without any reference: latents that are not finite, black or flat pictures."""
        faults = []
        latents = self.latents_array()
        if latents is not None and not np.isfinite(latents).all():
            faults.append("the final latents hold NaN or infinity")
        for index, image in enumerate(self.images):
            if image.max() < 8:
                faults.append(f"picture {index} is black")
            elif image.std() < 1:
                faults.append(f"picture {index} is one flat colour")
        return faults
