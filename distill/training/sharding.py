"""FSDP: weights, average, moments and gradients shared out over the processes (torch's fully_shard, FSDP2).

accelerate's own FSDP plugin is for GPUs only: on a CPU it is set aside without a word (`AcceleratorState` asks for
MULTI_GPU and its like, never MULTI_CPU), so what it does could not be tested without one. fully_shard is the same on both.
"""

from __future__ import annotations

import os

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch.distributed.fsdp import fully_shard

from distill.common.errors import UserError

SHARDED_TOGETHER = (BasicTransformerBlock, ResnetBlock2D)
"""Modules gathered and let go as one; what lies outside of them stays gathered from forward to backward."""


def check_fsdp(processes: int, mixed_precision: str, optimizer: str) -> None:
    """Raises UserError for what FSDP cannot do here."""
    if processes < 2:
        raise UserError(
            "--fsdp shares a model over processes, and there is one; start it with torchrun (plan: --processes)"
        )
    if mixed_precision == "fp16":
        raise UserError(
            "--fsdp with fp16 is not supported (its loss scaling is not shared); use --mixed-precision bf16"
        )
    if optimizer != "adamw":
        raise UserError(f"--fsdp shards adamw only, got {optimizer!r}; its moments are shared out already")


def check_no_other_fsdp() -> None:
    """Raises UserError where accelerate's launcher was told to shard, which would go past this file."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UserError("FSDP is asked of accelerate's launcher; start with torchrun (or without it) and give --fsdp")


def shard(unet: UNet2DConditionModel) -> None:
    """Shards `unet`, already on its device, over all processes, in place; its module names stay as they are."""
    for module in unet.modules():
        if isinstance(module, SHARDED_TOGETHER):
            fully_shard(module)
    fully_shard(unet)
