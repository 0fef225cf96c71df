"""The VAE engines, called like diffusers' AutoencoderKL and AutoencoderTiny."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from distill.models.families import vae_scale_factor
from engines.bundle import Engine
from engines.component import EngineComponent
from engines.flavors import LoadedEngine
from engines.modules.base import EngineModule, run
from engines.selection import missing_encoder


class EngineVAE(EngineModule):
    """It encodes where the bundle has an encoder, which is built only if named."""

    def __init__(
        self, decoder: EngineComponent, config: dict[str, Any], encoder: EngineComponent | None = None
    ) -> None:
        # the engine has its own precision, so the pipeline must not try to upcast it
        super().__init__(decoder, config | {"force_upcast": False}, decoder.dtype("latent_sample"))
        self.image_scale = vae_scale_factor(config)
        self.encoder_component = encoder

    @property
    def engines(self) -> list[tuple[Engine, LoadedEngine]]:
        return [pair for part in (self.component, self.encoder_component) if part for pair in part.engines]

    @torch.compiler.disable
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """`x` (rows, 3, height, width) in [-1, 1] -> the distribution of latents (rows, 4, height / 8, width / 8), not yet
        multiplied by the scaling factor; of a tiny VAE the latents themselves. Raises UserError where the bundle has no
        encoder."""
        if self.encoder_component is None:
            raise missing_encoder(self.component.engines[0][0].flavor)
        outputs = run(self.encoder_component, {"sample": x}, f"{x.shape[-1]}x{x.shape[-2]}")
        if (latents := outputs.get("latent_sample")) is not None:
            return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)
        distribution = DiagonalGaussianDistribution(outputs["latent_parameters"])
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    @torch.compiler.disable
    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """`z` (rows, 4, height / 8, width / 8), already divided by the scaling factor -> images in [-1, 1],
        (rows, 3, height, width)."""
        size = f"{z.shape[-1] * self.image_scale}x{z.shape[-2] * self.image_scale}"
        images = run(self.component, {"latent_sample": z}, size)["sample"]
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Encodes and decodes images."""
        [encoded] = self.encode(sample, return_dict=False)
        if isinstance(encoded, DiagonalGaussianDistribution):
            encoded = encoded.sample(generator=generator) if sample_posterior else encoded.mode()
        return self.decode(encoded, return_dict)

    def enable_slicing(self) -> None:
        """Nothing to do: a batch larger than the engine's is run in pieces anyway."""

    def disable_slicing(self) -> None: ...

    def disable_tiling(self) -> None: ...
