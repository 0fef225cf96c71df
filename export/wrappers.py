"""The networks as plain functions of tensors in the order of `components.py`: what is traced and compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _UNet(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        timestep_cond: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        return self.unet(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
        )


class _VaeDecoder(nn.Module):
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> tuple[Tensor, ...]:
        return (self.vae.decode(latent_sample, return_dict=False)[0],)  # type: ignore[operator]


class _VaeEncoder(nn.Module):
    """The moments before sampling: drawing from them is the pipeline's."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> tuple[Tensor, ...]:
        encoded = self.vae.encode(sample, return_dict=False)[0]  # type: ignore[operator]
        return (getattr(encoded, "parameters", encoded),)


class _TextEncoder(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        output: Any = self.encoder(input_ids, output_hidden_states=True)
        *hidden, _ = output.hidden_states
        if "text_embeds" in output:
            return (output.text_embeds, output.last_hidden_state, *hidden)
        return (output.last_hidden_state, output.pooler_output, *hidden)


_WRAPPERS: dict[str, type[nn.Module]] = {
    "unet": _UNet,
    "vae_decoder": _VaeDecoder,
    "vae_encoder": _VaeEncoder,
    "text_encoder": _TextEncoder,
    "text_encoder_2": _TextEncoder,
}


def wrap(component: str, network: nn.Module) -> nn.Module:
    """`network` as a module that takes and returns the component's tensors, in evaluation mode, without gradients.

    Decoding keeps only the half of the VAE that the graph needs.
    """
    return _WRAPPERS[component](network).eval().requires_grad_(False)


def example(dtype: str, shape: tuple[int, ...], generator: torch.Generator | None = None, top: int = 2) -> Tensor:
    """A random tensor: normal for floats, ids below `top` for integers."""
    if dtype.startswith("int"):
        return torch.randint(0, top, shape, dtype=getattr(torch, dtype), generator=generator)
    return torch.randn(shape, generator=generator).to(getattr(torch, dtype))
