"""A pipeline of true size with random weights, made on the device that will run it: no download, no disk.

Latency does not depend on the weights. They are drawn in fp32 with torch's own initial scale and then rounded, so that
the same name and seed on the same device give one model in every precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill.architectures import SDXL_FAMILY, find_architecture

if TYPE_CHECKING:
    import torch

SEED = 0


def random_pipeline(name: str, device: str, dtype: torch.dtype) -> Any:
    """A diffusers StableDiffusionXLPipeline of an architecture of the catalogue. Raises UserError for an unknown name.

    The VAE says that it is safe in fp16, as the fixed one of the published figures does: weights of this scale are.
    """
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from distill.shapes import WORDS
    from distill.tokenizer import make_clip_tokenizer

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
    special = {key: family.text_encoder[key] for key in ("bos_token_id", "eos_token_id")}
    words = () if family is SDXL_FAMILY else WORDS
    length = family.text_encoder["max_position_embeddings"]
    return StableDiffusionXLPipeline(
        **networks,
        tokenizer=make_clip_tokenizer(words, max_length=length, **special),
        tokenizer_2=make_clip_tokenizer(words, max_length=length, pad_token="!", **special),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )
