"""A pipeline of true size with random weights, made on the device that will run it: no download, no disk.

Latency does not depend on the weights. They are drawn in fp32 with torch's own initial scale and then rounded, so that
the same name and seed on the same device give one model in every precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill.architectures import find_architecture

if TYPE_CHECKING:
    import torch

SEED = 0


def random_pipeline(name: str, device: str, dtype: torch.dtype) -> Any:
    """A diffusers StableDiffusionXLPipeline of an architecture of the catalogue. Raises UserError for an unknown name.

    The VAE says that it is safe in fp16, as the fixed one of the published figures does: weights of this scale are.
    """
    import torch
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from distill.assemble import tokenizers_and_scheduler

    architecture = find_architecture(name)
    family = architecture.family
    torch.manual_seed(SEED)
    makers: dict[str, Any] = {
        "unet": lambda: UNet2DConditionModel(**architecture.unet_config),
        "vae": lambda: AutoencoderKL(**family.vae | {"force_upcast": False}),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**family.text_encoder)),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**family.text_encoder_2)),
    }
    with torch.device(device):
        networks = {component: make().to(dtype).eval() for component, make in makers.items()}
    return StableDiffusionXLPipeline(**networks, **tokenizers_and_scheduler(family), add_watermarker=False)
