"""The networks as plain functions of tensors in the order of `components.py`: what is traced and compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.models.conditioning import SIZES, Config, TensorSpec, call_network, call_unet, unet_input_names
from distill.models.controls import CONTROL_PICTURE, gathered, residual_names
from distill.models.networks import CONTROLNETS
from export.components import FLOAT_DTYPES, TEXT_ENCODERS

TORCH_DTYPES = {name: getattr(torch, dtype) for name, dtype in FLOAT_DTYPES.items()}


class _UNet(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet, self.names = unet, (*unet_input_names(unet.config), *residual_names(unet.config))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """With or without the residuals of a ControlNet, which come last."""
        inputs = dict(zip(self.names, tensors, strict=False))
        return (call_unet(self.unet, inputs, **gathered(inputs)),)


class _ControlNet(nn.Module):
    """Its residuals in full: what they are scaled by is the pipeline's."""

    def __init__(self, controlnet: Any) -> None:
        super().__init__()
        self.controlnet, self.names = controlnet, unet_input_names(controlnet.config)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        *inputs, picture = tensors
        named = dict(zip(self.names, inputs, strict=True))
        down, middle = call_network(self.controlnet, named, controlnet_cond=picture)
        return (*down, middle)


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
    **dict.fromkeys(CONTROLNETS, _ControlNet),
    "vae_decoder": _VaeDecoder,
    "vae_encoder": _VaeEncoder,
    **dict.fromkeys(TEXT_ENCODERS, _TextEncoder),
}


def wrap(component: str, network: nn.Module) -> nn.Module:
    """`network` as a module that takes and returns the component's tensors, in evaluation mode, without gradients.

    A VAE's wrapper holds all of it; the half that is not used never gets into the graph.
    """
    return _WRAPPERS[component](network).eval().requires_grad_(False)


def weight_name(component: str, name: str) -> str:
    """What a weight of the UNet or of a text encoder is called in its graph."""
    return f"{'unet' if component == 'unet' else 'encoder'}.{name}"


def example(spec: TensorSpec, config: Config, generator: torch.Generator) -> Tensor:
    """A random input as a sampler may give it: any timestep, picture sizes up to 2048, an end of text in every row, and
    normal numbers for the rest."""
    dtype = getattr(torch, spec.dtype)
    if spec.name == "timestep":
        return torch.rand(spec.shape, generator=generator, dtype=dtype) * 999
    if spec.name == CONTROL_PICTURE:
        return torch.rand(spec.shape, generator=generator).to(dtype)
    if spec.name == SIZES:
        return torch.randint(0, 2049, spec.shape, generator=generator).to(dtype)
    if spec.name == "input_ids":
        vocabulary, end = config.get("vocab_size", 49408), config.get("eos_token_id", 49407)
        ids = torch.randint(0, vocabulary, spec.shape, generator=generator)
        places = torch.randint(0, spec.shape[1], (spec.shape[0], 1), generator=generator)
        return ids.scatter(
            1, places, vocabulary - 1 if end == 2 else end
        )  # 2: OpenAI's config; CLIP takes the highest id
    return torch.randn(spec.shape, generator=generator).to(dtype)
