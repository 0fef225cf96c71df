"""The catalogue as a table: parameters by part, depth and compute of every architecture, counted, not quoted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distill.models.architectures import Architecture
from distill.models.conditioning import TOKENS, call_unet
from distill.models.families import Family
from distill.models.networks import make_network
from distill.models.resolution import Resolution


@dataclass(frozen=True, kw_only=True)
class CatalogueRow:
    """`tflop_per_call` is one UNet call at the family's base resolution with batch 2 (one image under guidance)."""

    name: str
    family: str
    parameters: int
    down: int
    mid: int
    up: int
    transformer_blocks: int
    tflop_per_call: float
    depth: str


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def meta_unet(architecture: Architecture) -> UNet2DConditionModel:
    """The UNet without memory for its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(**architecture.unet_config).eval()


def unet_tflop(unet: UNet2DConditionModel, architecture: Architecture, resolution: Resolution, batch: int) -> float:
    """Compute of one call, in units of 1e12 floating-point operations (a multiply and an add count as two)."""
    with torch.device("meta"):
        specs = architecture.family.unet_inputs(resolution, batch)
        inputs = {spec.name: torch.empty(spec.shape) for spec in specs}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call_unet(unet, inputs)
    return counter.get_total_flops() / 1e12


def meta_text_encoders(family: Family) -> dict[str, nn.Module]:
    """A family's text encoders by name, without memory for their weights."""
    with torch.device("meta"):
        return {name: make_network(name, family.networks[name]).eval() for name in family.conditioning.encoders}


def text_tflop(family: Family) -> float:
    """Compute of encoding one caption, in the same units."""
    networks = meta_text_encoders(family)
    tokens = {TOKENS[name]: torch.empty(1, family.tokens, dtype=torch.int64, device="meta") for name in networks}
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        family.conditioning.encode_tokens(networks, tokens)
    return counter.get_total_flops() / 1e12


def catalogue_row(architecture: Architecture) -> CatalogueRow:
    unet = meta_unet(architecture)
    return CatalogueRow(
        name=architecture.name,
        family=architecture.family.name,
        parameters=count_parameters(unet),
        down=count_parameters(unet.down_blocks),
        mid=count_parameters(unet.mid_block) if unet.mid_block is not None else 0,
        up=count_parameters(unet.up_blocks),
        transformer_blocks=architecture.depth.transformer_blocks,
        tflop_per_call=unet_tflop(unet, architecture, architecture.family.resolutions[0], batch=2),
        depth=str(architecture.depth),
    )
