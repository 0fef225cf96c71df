"""accelerate, FSDP and the optimiser, set up for the machine at hand.

FSDP shares weights, average, moments and gradients out over the processes (torch's fully_shard, FSDP2). accelerate's own
FSDP plugin is for GPUs only: on a CPU it is silently disabled (`AcceleratorState` asks for MULTI_GPU and its like,
never MULTI_CPU), so what it does could not be tested without one. fully_shard is the same on both.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch.distributed.fsdp import fully_shard

from distill.common.errors import UserError, unknown
from distill.training.options import TrainOptions

Decided = TypeVar("Decided")
PATIENCE = timedelta(hours=2)
"""How long processes wait for one that downloads a teacher, saves a student or draws; NCCL's own ten minutes are few."""
COMPUTE_DTYPE = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw-8bit": 2.0 + 8 / 256}
"""Per parameter: two moments; in 8 bits with one float32 scale for each 256 of them (bitsandbytes' block)."""
SHARDED_TOGETHER = (BasicTransformerBlock, ResnetBlock2D)
"""Modules gathered and freed together; what lies outside of them stays gathered from forward to backward."""


def make_accelerator(options: TrainOptions, out: Path) -> Accelerator:
    """Raises UserError for fp16 without a GPU, for a missing package, and for FSDP asked of accelerate's launcher."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":  # it would shard past this file
        raise UserError("FSDP is asked of accelerate's launcher; start with torchrun (or without it) and give --fsdp")
    if options.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed-precision fp16 needs a GPU, and there is none here; use bf16 or no")
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # else each process of a GPU-less torchrun thinks it is alone
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.accumulation,
        step_scheduler_with_optimizer=False,
        log_with=_trackers(options.report_to),
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "trackers")),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # no second copy of them
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )


def _trackers(report_to: str) -> list[str] | None:
    """Raises UserError for a tracker that accelerate does not know, and for one whose package is not installed."""
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    for name in names:
        if name not in {"all", *LOGGER_TYPE_TO_CLASS}:
            raise unknown("tracker", name, ["all", *LOGGER_TYPE_TO_CLASS])
        if name != "all" and not _is_installed(name):
            raise UserError(f"--report-to {name} needs the package {name}: pip install {name}")
    return names or None


def _is_installed(tracker: str) -> bool:
    try:
        return importlib.util.find_spec(tracker) is not None
    except ValueError:  # imported, but not from a file
        return False


def decided_by_first(compute: Callable[[], Decided]) -> Decided:
    """What `compute` gives in the first process, in every process; a UserError there is raised in all of them."""
    told: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            told = [compute(), None]
        except UserError as error:
            told = [None, str(error)]
    value, fault = broadcast_object_list(told)
    if fault is not None:
        raise UserError(fault)
    return value


def require_alike(facts: Mapping[str, str]) -> None:
    """Raises UserError in every process where one of them has other facts than the first (a version, a cache)."""
    told = gather_object([dict(facts)])
    for number, theirs in enumerate(told):
        for name, value in theirs.items():
            if value != told[0].get(name):
                raise UserError(
                    f"process {number} has {name} {value}, the first one has {told[0].get(name)}: all nodes must have "
                    "the same; install or copy it there, and run the same command again"
                )


def check_fsdp(processes: int, mixed_precision: str, optimizer: str, *, adapters: bool = False) -> None:
    """Raises UserError for what FSDP cannot do here."""
    if adapters:
        raise UserError(
            "--fsdp shares out weights of one type, and a LoRA's are fp32 beside a base in half precision; leave --fsdp "
            "out: the adapters alone have gradients and moments"
        )
    if processes < 2:
        raise UserError(
            "--fsdp shares a model over processes, and there is one; start it with torchrun (memory: --processes)"
        )
    if mixed_precision == "fp16":
        raise UserError(
            "--fsdp with fp16 is not supported (its loss scaling is not shared); use --mixed-precision bf16"
        )
    if optimizer != "adamw":
        raise UserError(f"--fsdp shards adamw only, got {optimizer!r}; its moments are shared out already")


def shard(unet: UNet2DConditionModel) -> None:
    """Shards `unet`, already on its device, over all processes, in place; its module names stay as they are."""
    for module in unet.modules():
        if isinstance(module, SHARDED_TOGETHER):
            fully_shard(module)
    fully_shard(unet)


def trained_parameters(student: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in student.parameters() if parameter.requires_grad]


def make_optimizer(name: str, student: torch.nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW over what has gradients, its moments in 32 or in 8 bits (arXiv 2110.02861). Raises UserError for another
    name, or without the package that has the 8-bit one."""
    trained = trained_parameters(student)
    if name == "adamw":
        return torch.optim.AdamW(trained, weight_decay=weight_decay, fused=True)
    if name != "adamw-8bit":
        raise unknown("optimizer", name, OPTIMIZER_BYTES)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("--optimizer adamw-8bit needs the package bitsandbytes: pip install bitsandbytes") from None
    return AdamW8bit(trained, weight_decay=weight_decay)
