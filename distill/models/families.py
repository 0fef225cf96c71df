"""Families: everything about a model but its depth, as data.

A family has one kind of conditioning, a config for each of its networks, and the sizes it draws. `sdxl`, `sd-1`,
`sd-2`, `sd-2-768` and the narrow twins `mini` and `mini-sd` of the first two are entries of `FAMILIES`. A checkpoint
of other widths is a family of its own, made from its configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from distill.common.errors import UserError
from distill.models.conditioning import (
    REFINER,
    SD,
    SDXL,
    TEXT_INPUTS,
    Conditioning,
    TensorSpec,
    conditioning_of,
    context_width,
    unet_inputs,
    unet_multiple,
)
from distill.models.resolution import NINE, Resolution, parse_resolutions, scaled_resolutions
from distill.models.unet_config import MOST, MOST_LAYERS, is_count

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """`networks` maps a checkpoint's folder to the config of the network in it, the UNet's at the full depth;
    `vocabulary` are the words of its tokenizers, None for CLIP's own; `dtype` is how its weights are stored,
    `prediction_type` what its scheduler says that its whole model predicts."""

    name: str
    conditioning: Conditioning
    networks: Mapping[str, dict[str, Any]]
    resolutions: tuple[Resolution, ...]
    vocabulary: tuple[str, ...] | None = None
    dtype: str = "float16"
    prediction_type: str = "epsilon"

    def fits(self, unet: Config) -> bool:
        """Whether a UNet of any depth is of this family: the same conditioning, the same width of its text, and the same
        widths of its levels, of which the last may be missing."""
        widths = tuple(unet["block_out_channels"])
        return (
            self.conditioning is conditioning_of(unet)
            and context_width(self.unet) == context_width(unet)
            and tuple(self.unet["block_out_channels"])[: len(widths)] == widths
        )

    @property
    def unet(self) -> dict[str, Any]:
        return self.networks["unet"]

    @property
    def vae(self) -> dict[str, Any]:
        return self.networks["vae"]

    @property
    def tokens(self) -> int:
        """Tokens of a prompt."""
        return self.networks[self.conditioning.encoders[0]]["max_position_embeddings"]

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent pixel, per side."""
        return vae_scale_factor(self.vae)

    @property
    def size_multiple(self) -> int:
        """Image sides must be a multiple of this many pixels, so that skip connections meet without padding."""
        return self.vae_scale_factor * unet_multiple(self.unet)

    def unet_inputs(self, resolution: Resolution, batch: int, dtype: str = "float32") -> list[TensorSpec]:
        """The inputs of its UNet; `batch` is twice the number of images under guidance. Raises UserError for a
        resolution that it cannot take."""
        sizes = {"tokens": self.tokens, "vae_scale_factor": self.vae_scale_factor}
        return unet_inputs(self.unet, resolution, batch, dtype, **sizes)

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each text input of its UNet for one prompt."""
        specs = self.unet_inputs(self.resolutions[0], 1)
        return {spec.name: spec.shape[1:] for spec in specs if spec.name in TEXT_INPUTS}


def vae_scale_factor(config: Config) -> int:
    """Image pixels per latent pixel, per side; of an AutoencoderKL and an AutoencoderTiny alike."""
    return 2 ** (len(config.get("block_out_channels") or config["decoder_block_out_channels"]) - 1)


def _clip(hidden_act: str, width: int, inner: int, layers: int, heads: int, words: Config) -> dict[str, Any]:
    return dict(words) | {
        "hidden_act": hidden_act,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": width,
    }


_SDXL_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
}
_CLIP_WORDS = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}
_MINI_WORDS = {
    "vocab_size": 1024,
    "max_position_embeddings": 32,
    "bos_token_id": 1022,
    "eos_token_id": 1023,
    "pad_token_id": 1023,
}
SHAPES_WORDS = (
    "a", "small", "large", "red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink", "circle", "square",
    "triangle", "star", "cross", "ring", "at", "the", "top", "left", "right", "center", "bottom", "and", "on", "white",
    "black", "gray", "brown", "background",
)  # fmt: skip
"""All words of the shapes world's captions, in the order of their tokens."""

SDXL_FAMILY = Family(
    name="sdxl",
    conditioning=SDXL,
    networks={
        "unet": _SDXL_UNET
        | {
            "block_out_channels": (320, 640, 1280),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
        },
        "vae": _VAE
        | {
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "sample_size": 1024,
            "scaling_factor": 0.13025,
            "force_upcast": True,
        },
        "text_encoder": _clip("quick_gelu", 768, 3072, 12, 12, _CLIP_WORDS),
        "text_encoder_2": _clip("gelu", 1280, 5120, 32, 20, _CLIP_WORDS),
    },
    resolutions=NINE,
)

# Narrow, not shallow: the same blocks in the same order. Few groups keep several channels in each normalised one.
MINI_FAMILY = Family(
    name="mini",
    conditioning=SDXL,
    networks={
        "unet": _SDXL_UNET
        | {
            "block_out_channels": (32, 64, 64),
            "attention_head_dim": (1, 2, 2),
            "cross_attention_dim": 128,
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 6 * 32 + 64,
            "norm_num_groups": 4,
            "sample_size": 16,
        },
        "vae": _VAE
        | {
            "block_out_channels": (16, 32, 64, 64),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "sample_size": 128,
            "force_upcast": False,
        },
        "text_encoder": _clip("quick_gelu", 64, 128, 3, 2, _MINI_WORDS),
        "text_encoder_2": _clip("gelu", 64, 128, 3, 2, _MINI_WORDS),
    },
    resolutions=parse_resolutions("128x128 160x128 128x160 160x96 96x160 192x96 96x192 224x96 96x224"),
    vocabulary=SHAPES_WORDS,
    dtype="float32",
)

SDXL_REFINER_FAMILY = Family(
    name="sdxl-refiner",
    conditioning=REFINER,
    networks={
        "unet": SDXL_FAMILY.unet
        | {
            "block_out_channels": (384, 768, 1536, 1536),
            "attention_head_dim": (6, 12, 24, 24),
            "cross_attention_dim": 1280,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2560,
        },
        "vae": SDXL_FAMILY.vae,
        "text_encoder_2": SDXL_FAMILY.networks["text_encoder_2"],
    },
    resolutions=NINE,
)
MINI_REFINER_FAMILY = Family(
    name="mini-refiner",
    conditioning=REFINER,
    networks={
        "unet": MINI_FAMILY.unet
        | {
            "block_out_channels": (32, 64, 64, 64),
            "attention_head_dim": (1, 2, 2, 2),
            "cross_attention_dim": 64,
            "projection_class_embeddings_input_dim": 5 * 32 + 64,
        },
        "vae": MINI_FAMILY.vae,
        "text_encoder_2": MINI_FAMILY.networks["text_encoder_2"],
    },
    resolutions=parse_resolutions("128x128 192x128 128x192"),
    vocabulary=SHAPES_WORDS,
    dtype="float32",
)

SD_1_FAMILY = Family(
    name="sd-1",
    conditioning=SD,
    networks={
        "unet": {
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (320, 640, 1280, 1280),
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            "sample_size": 64,
        },
        "vae": _VAE
        | {
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "sample_size": 512,
            "scaling_factor": 0.18215,
        },
        "text_encoder": _clip("quick_gelu", 768, 3072, 12, 12, _CLIP_WORDS),
    },
    resolutions=parse_resolutions("512x512 576x448 448x576 576x384 384x576 640x384 384x640 768x320 320x768"),
)

# At 512 pixels, predicting the noise, as BK-SDM's teachers are. Its config states a text encoder of 23 layers: the last
# of OpenCLIP's 24 is not read.
SD_2_FAMILY = Family(
    name="sd-2",
    conditioning=SD,
    networks={
        "unet": SD_1_FAMILY.unet
        | {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True},
        "vae": SD_1_FAMILY.vae,
        "text_encoder": _clip("gelu", 1024, 4096, 23, 16, _CLIP_WORDS),
    },
    resolutions=SD_1_FAMILY.resolutions,
)

# The same networks taught on at 768 pixels, to predict v (arXiv 2202.00512, section 4), with attention in fp32.
SD_2_768_FAMILY = replace(
    SD_2_FAMILY,
    name="sd-2-768",
    networks={**SD_2_FAMILY.networks, "unet": SD_2_FAMILY.unet | {"sample_size": 96, "upcast_attention": True}},
    resolutions=scaled_resolutions(768, 64),
    prediction_type="v_prediction",
)

MINI_SD_FAMILY = Family(
    name="mini-sd",
    conditioning=SD,
    networks={
        "unet": {
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (32, 64, 64, 64),
            "attention_head_dim": 2,
            "cross_attention_dim": 64,
            "norm_num_groups": 4,
            "sample_size": 16,
        },
        "vae": MINI_FAMILY.vae,
        "text_encoder": MINI_FAMILY.networks["text_encoder"],
    },
    resolutions=parse_resolutions("128x128 192x128 128x192"),
    vocabulary=SHAPES_WORDS,
    dtype="float32",
)

FAMILIES = {
    family.name: family
    for family in (
        SDXL_FAMILY,
        SDXL_REFINER_FAMILY,
        MINI_FAMILY,
        MINI_REFINER_FAMILY,
        SD_1_FAMILY,
        SD_2_FAMILY,
        SD_2_768_FAMILY,
        MINI_SD_FAMILY,
    )
}


def check_fit(networks: Mapping[str, Config], model: object = "the model") -> None:
    """Raises UserError, which names the keys, where the networks of a checkpoint do not fit one another."""
    unet, vae = networks["unet"], networks["vae"]
    conditioning = conditioning_of(unet, model)
    encoders = {name: networks[name] for name in conditioning.encoders}
    sizes = ("hidden_size", "projection_dim", "num_hidden_layers", "max_position_embeddings")
    for name, key in [("vae", "latent_channels"), *product(encoders, sizes)]:
        value: Any = networks[name].get(key)
        most = MOST_LAYERS if key == "num_hidden_layers" else MOST
        if not is_count(value) or value > most:
            raise UserError(f"{model}: {key} of its {name} is {value!r}; a number from 1 to {most} is needed")
    if not is_count(layers := vae.get("layers_per_block", 1)) or layers > MOST_LAYERS:
        raise UserError(
            f"{model}: layers_per_block of its vae is {layers!r}; a number from 1 to {MOST_LAYERS} is needed"
        )
    scale = vae.get("scaling_factor", 1.0)
    if type(scale) not in (int, float) or not 0 < scale <= MOST:
        raise UserError(f"{model}: scaling_factor of its vae is {scale!r}; a number above 0 is needed")
    widths = vae.get("block_out_channels", vae.get("decoder_block_out_channels"))
    if not isinstance(widths, list | tuple) or not widths:
        raise UserError(f"{model}: block_out_channels of its vae is {widths!r}; a list of numbers is needed")
    facts = [
        ("in_channels", unet["in_channels"], "the vae's latent_channels", vae["latent_channels"]),
        (
            "cross_attention_dim",
            context_width(unet),
            f"the hidden_size of {' and '.join(encoders)} together",
            sum(encoder["hidden_size"] for encoder in encoders.values()),
        ),
    ]
    if conditioning.pooled_from:
        numbers = conditioning.size_numbers
        pooled = (unet["projection_class_embeddings_input_dim"] or 0) - numbers * (unet["addition_time_embed_dim"] or 0)
        what = f"projection_class_embeddings_input_dim less {numbers} times its addition_time_embed_dim"
        encoder = conditioning.pooled_from
        facts.append((what, pooled, f"the projection_dim of {encoder}", encoders[encoder]["projection_dim"]))
    for key, value, other, its in facts:
        if value != its:
            raise UserError(f"{model}: its UNet's {key} is {value}, {other} is {its}: they do not belong together")


def family_of(networks: Mapping[str, dict[str, Any]], model: object = "the model") -> Family:
    """The family of a checkpoint by its networks' configs: the entry that its UNet `fits`, of two the one of its
    `sample_size`; else one of its own, whose sizes are SDXL's at its `sample_size`.

    Raises UserError for a UNet that is conditioned otherwise than any family's.
    """
    unet = networks["unet"]
    conditioning = conditioning_of(unet, model)
    if fitting := [family for family in FAMILIES.values() if family.fits(unet)]:
        return next((one for one in fitting if one.unet["sample_size"] == unet.get("sample_size")), fitting[0])
    widths = unet["block_out_channels"]
    scale = vae_scale_factor(networks["vae"])
    size = unet.get("sample_size") or 128
    base = scale * (size if isinstance(size, int) else max(size))
    name = f"{conditioning.pipeline.removesuffix('Pipeline')}-{'-'.join(map(str, widths))}"
    resolutions = scaled_resolutions(base, scale * unet_multiple(unet))
    dtype = "float16" if widths[0] >= SDXL_FAMILY.unet["block_out_channels"][0] else "float32"
    return Family(name=name, conditioning=conditioning, networks=networks, resolutions=resolutions, dtype=dtype)
