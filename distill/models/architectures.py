"""The catalogue: what SDXL, SSD-1B and Segmind-Vega are, and the narrow `mini` family of the same topology.

An `Architecture` is a `Family` (widths, text encoders, VAE, resolutions) plus a `Depth` (how many transformer
blocks stand in each Transformer2DModel). A student is always built from its config, never by deleting modules,
so config.json cannot disagree with the weights. Published: arXiv 2401.02677 and the models' own config.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distill.common.errors import UserError, unknown


@dataclass(frozen=True, order=True)
class Resolution:
    """An image size in pixels; text form `WIDTHxHEIGHT`."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, text: str) -> Resolution:
        """Raises UserError for anything but WIDTHxHEIGHT."""
        width, cross, height = text.lower().partition("x")
        if not (cross and width.isdigit() and height.isdigit()):
            raise UserError(f"resolution {text!r} is not of the form WIDTHxHEIGHT, e.g. 1024x1024")
        return cls(int(width), int(height))


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Transformer blocks per Transformer2DModel. `mid` 0 means a middle block with one ResNet and no attention."""

    down: tuple[tuple[int, ...], ...]
    mid: int
    up: tuple[tuple[int, ...], ...]

    @property
    def transformer_blocks(self) -> int:
        return sum(map(sum, self.down)) + self.mid + sum(map(sum, self.up))

    def __str__(self) -> str:
        def side(blocks: tuple[tuple[int, ...], ...]) -> str:
            return "/".join(",".join(map(str, block)) or "-" for block in blocks)

        return f"{side(self.down)}:{self.mid}:{side(self.up)}"

    @classmethod
    def parse(cls, text: str) -> Depth:
        """The inverse of `str`: `-/2,2/4,4:0:4,4,10/2,1,1/-` is SSD-1B. Raises UserError."""
        try:
            down, mid, up = text.split(":")
            sides = [
                tuple(tuple(int(n) for n in block.split(",")) if block != "-" else () for block in side.split("/"))
                for side in (down, up)
            ]
            depth = cls(down=sides[0], mid=int(mid), up=sides[1])
        except ValueError:
            raise UserError(f"depth {text!r} is not of the form DOWN:MID:UP, e.g. {SSD_1B_DEPTH} for SSD-1B") from None
        depth.check()
        return depth

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Depth:
        """The depth that a UNet's config.json states, in any of the forms diffusers accepts."""
        per_block = config["layers_per_block"]
        stated = config["transformer_layers_per_block"]
        stated = [stated] * len(config["down_block_types"]) if isinstance(stated, int) else stated
        reverse = config.get("reverse_transformer_layers_per_block") or stated[::-1]

        def side(types: list[str], layers: list, count: int) -> tuple[tuple[int, ...], ...]:
            return tuple(
                () if "CrossAttn" not in kind else (n,) * count if isinstance(n, int) else tuple(n)
                for kind, n in zip(types, layers, strict=True)
            )

        last = stated[-1] if isinstance(stated[-1], int) else stated[-1][0]
        return cls(
            down=side(config["down_block_types"], stated, per_block),
            mid=last if config["mid_block_type"] == "UNetMidBlock2DCrossAttn" else 0,
            up=side(config["up_block_types"], reverse, per_block + 1),
        )

    def check(self) -> None:
        """Raises UserError where diffusers' UNet2DConditionModel cannot express the pattern or SDXL has no such block."""
        if tuple(map(len, self.down)) != (0, 2, 2) or tuple(map(len, self.up)) != (3, 3, 0):
            raise UserError(
                f"depth {self}: the SDXL topology has transformers in 2+2 down and 3+3 up positions, e.g. {SSD_1B_DEPTH}"
            )
        if self.mid not in (0, self.down[-1][0]):
            raise UserError(
                f"depth {self}: the middle block's {self.mid} transformer blocks must be 0 or equal to the "
                f"{self.down[-1][0]} of the last down block (a limit of diffusers' UNet config)"
            )
        if any(n < 1 for block in self.down + self.up for n in block):
            raise UserError(f"depth {self}: every transformer keeps at least 1 block")


SDXL_DEPTH = Depth(down=((), (2, 2), (10, 10)), mid=10, up=((10, 10, 10), (2, 2, 2), ()))
SSD_1B_DEPTH = Depth(down=((), (2, 2), (4, 4)), mid=0, up=((4, 4, 10), (2, 1, 1), ()))
VEGA_DEPTH = Depth(down=((), (1, 1), (2, 2)), mid=0, up=((2, 2, 2), (1, 1, 1), ()))


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything but the depth: the configs of each component, and the resolutions the models are trained on."""

    name: str
    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    text_encoder_2: dict[str, Any]
    resolutions: tuple[Resolution, ...]

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent pixel, per side."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def size_multiple(self) -> int:
        """Image sides must be a multiple of this many pixels, so that skip connections meet without padding."""
        return self.vae_scale_factor * 2 ** (len(self.unet["block_out_channels"]) - 1)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family at a depth. `parameters` is the UNet's (total, down, mid, up) as published; None for a custom depth."""

    name: str
    family: Family
    depth: Depth
    parameters: tuple[int, int, int, int] | None = None

    @property
    def unet_config(self) -> dict[str, Any]:
        """Keyword arguments of diffusers' UNet2DConditionModel."""
        depth = self.depth
        return self.family.unet | {
            "mid_block_type": "UNetMidBlock2DCrossAttn" if depth.mid else "UNetMidBlock2D",
            "transformer_layers_per_block": [list(block) or 1 for block in depth.down],
            "reverse_transformer_layers_per_block": [list(block) or 1 for block in depth.up],
        }

    @property
    def configs(self) -> dict[str, dict[str, Any]]:
        """The config of each network, under the name of its folder in a checkpoint."""
        family = self.family
        return {
            "unet": self.unet_config,
            "vae": family.vae,
            "text_encoder": family.text_encoder,
            "text_encoder_2": family.text_encoder_2,
        }


def _resolutions(sizes: str) -> tuple[Resolution, ...]:
    return tuple(map(Resolution.parse, sizes.split()))


def _clip(hidden_act: str, width: int, inner: int, layers: int, heads: int, words: dict[str, int]) -> dict[str, Any]:
    return words | {
        "hidden_act": hidden_act,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": width,
    }


_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
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

SDXL_FAMILY = Family(
    name="sdxl",
    unet=_UNET
    | {
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
    },
    vae=_VAE
    | {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    },
    text_encoder=_clip("quick_gelu", 768, 3072, 12, 12, _CLIP_WORDS),
    text_encoder_2=_clip("gelu", 1280, 5120, 32, 20, _CLIP_WORDS),
    resolutions=_resolutions("1024x1024 1152x896 896x1152 1216x832 832x1216 1344x768 768x1344 1536x640 640x1536"),
)

# Narrow, not shallow: the same blocks in the same order. Few groups keep several channels in each normalised one.
MINI_FAMILY = Family(
    name="mini",
    unet=_UNET
    | {
        "block_out_channels": (32, 64, 64),
        "attention_head_dim": (1, 2, 2),
        "cross_attention_dim": 128,
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 6 * 32 + 64,
        "norm_num_groups": 4,
        "sample_size": 16,
    },
    vae=_VAE
    | {
        "block_out_channels": (16, 32, 64, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 128,
        "force_upcast": False,
    },
    text_encoder=_clip("quick_gelu", 64, 128, 3, 2, _MINI_WORDS),
    text_encoder_2=_clip("gelu", 64, 128, 3, 2, _MINI_WORDS),
    resolutions=_resolutions("128x128 160x128 128x160 160x96 96x160 192x96 96x192 224x96 96x224"),
)

FAMILIES = {family.name: family for family in (SDXL_FAMILY, MINI_FAMILY)}


def family_of(widths: Sequence[int]) -> Family | None:
    """The family whose UNet has these `block_out_channels`."""
    return next((f for f in FAMILIES.values() if f.unet["block_out_channels"] == tuple(widths)), None)


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            name="sdxl",
            family=SDXL_FAMILY,
            depth=SDXL_DEPTH,
            parameters=(2_567_463_684, 822_941_760, 413_117_440, 1_324_084_480),
        ),
        Architecture(
            name="ssd-1b",
            family=SDXL_FAMILY,
            depth=SSD_1B_DEPTH,
            parameters=(1_331_334_404, 405_871_680, 31_138_560, 887_004_160),
        ),
        Architecture(
            name="vega",
            family=SDXL_FAMILY,
            depth=VEGA_DEPTH,
            parameters=(745_225_604, 246_838_080, 31_138_560, 459_928_960),
        ),
        Architecture(name="mini-sdxl", family=MINI_FAMILY, depth=SDXL_DEPTH),
        Architecture(name="mini-ssd-1b", family=MINI_FAMILY, depth=SSD_1B_DEPTH),
        Architecture(name="mini-vega", family=MINI_FAMILY, depth=VEGA_DEPTH),
    )
}


def architecture_at(family: Family, depth: Depth) -> Architecture:
    """The catalogue's architecture of a family at a depth; a custom one where it has none."""
    known = (a for a in ARCHITECTURES.values() if a.family is family and a.depth == depth)
    return next(known, None) or Architecture(name=str(depth), family=family, depth=depth)


def find_architecture(name: str, family: Family = SDXL_FAMILY) -> Architecture:
    """The architecture called `name`, or, where `name` is a depth pattern, a custom one of `family`.

    Raises UserError for a name that is neither.
    """
    if ":" in name:
        return Architecture(name=name, family=family, depth=Depth.parse(name))
    if name not in ARCHITECTURES:
        raise unknown("architecture", name, ARCHITECTURES)
    return ARCHITECTURES[name]
