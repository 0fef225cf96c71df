"""What a stage needs of one GPU's memory, told before it starts.

Nothing is guessed: the step of `step.py` itself, teacher, student, loss and backward, runs on meta tensors, which have
shapes but no memory, while every tensor that would exist is counted from its birth to its death. What a kernel
takes for itself (cuDNN's and cuBLAS's workspaces), CUDA's context and the allocator's gaps are not tensors; for them
`RESERVED_BYTES` stays free.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from distill.models.architectures import Architecture, find_architecture
from distill.models.catalogue import count_parameters
from distill.models.module_map import make_module_map
from distill.models.resolution import Resolution
from distill.training.recipes import LossWeights, Recipe
from distill.training.sharding import SHARDED_TOGETHER
from distill.training.step import loss_terms
from distill.training.taps import FeatureRecorder, make_taps

RESERVED_BYTES = 2_000_000_000
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw-8bit": 2.0 + 8 / 256}
"""Per parameter: two moments; in 8 bits with one float32 scale for each 256 of them (bitsandbytes' block)."""


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made inside and still alive, beside the weights of `models`, and `at_peak`: (gradients, all
    the rest) when most were."""

    def __init__(self, *models: torch.nn.Module) -> None:
        super().__init__()
        self.live = self.gradients = 0
        self.at_peak = (0, 0)
        self._bytes: dict[int, int] = {}
        for parameter in (parameter for model in models for parameter in model.parameters()):
            self._bytes[parameter.untyped_storage()._cdata] = 0  # a view of a weight takes nothing
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._add_gradient)

    def _add_gradient(self, parameter: torch.Tensor) -> None:
        self.gradients += parameter.nbytes

    def _drop(self, key: int) -> None:
        self.live -= self._bytes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._bytes:
                    self._bytes[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._drop, storage._cdata)
        if self.live > sum(self.at_peak):
            self.at_peak = (self.gradients, self.live - self.gradients)
        return out


class AsOnGpu(TorchFunctionMode):
    """Autocast's casts to `half` (https://docs.pytorch.org/docs/stable/amp.html, the operators a UNet has), and fused
    attention, which keeps no attention matrix: a meta tensor gets neither by itself."""

    def __init__(self, half: torch.dtype) -> None:
        super().__init__()
        self.half = half

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dtype = None
        if self.half != torch.float32:
            if func in (functional.linear, torch.conv2d, functional.scaled_dot_product_attention):
                dtype = self.half
            elif func in (torch.group_norm, torch.layer_norm):
                dtype = torch.float32
        if dtype is not None:
            floating = [isinstance(x, torch.Tensor) and x.is_floating_point() for x in args]
            args = [x.to(dtype) if is_float else x for x, is_float in zip(args, floating, strict=True)]
            kwargs = {key: x.to(dtype) if isinstance(x, torch.Tensor) else x for key, x in kwargs.items()}
        if func is functional.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])[0]
        return func(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one GPU when most are in use. `work` is activations, features and whatever else a step holds for a
    while; under FSDP also the weights gathered from the other GPUs."""

    teacher: int
    student: int
    ema: int
    optimizer: int
    gradients: int
    work: int

    @property
    def total(self) -> int:
        return self.teacher + self.student + self.ema + self.optimizer + self.gradients + self.work


def plan_memory(
    teacher: Architecture,
    student: Architecture,
    losses: LossWeights,
    *,
    resolution: Resolution,
    micro_batch: int,
    half: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    gradients_stay: bool = False,
    ema: bool = False,
    optimizer: str = "adamw",
    shards: int = 1,
) -> MemoryPlan:
    """Counts one step of `micro_batch` samples. `gradients_stay` says that gradients are held through the whole step
    (accumulation, or DDP's buckets), else each appears as backward reaches it. `shards` is the number of FSDP's
    processes: weights, average, moments and gradients are divided by it, and the transformer blocks and ResNets at
    work, with everything outside of them, gathered."""
    family = student.family
    with torch.device("meta"):
        nets = [UNet2DConditionModel(**a.unet_config).to(d) for a, d in ((teacher, half), (student, torch.float32))]
        nets[0].requires_grad_(False)
        if gradient_checkpointing:
            again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), AsOnGpu(half)))
            nets[1].train().enable_gradient_checkpointing(again)
        modules = make_module_map("first", teacher.depth, student.depth)
        taps = make_taps(losses.level, modules) if losses.feature else ()
        recorders = (
            FeatureRecorder(nets[1], [tap.student for tap in taps]),
            FeatureRecorder(nets[0], sorted({tap.teacher for tap in taps})),
        )
        specs = family.unet_inputs(resolution, micro_batch)
        with LiveBytes(*nets) as count, AsOnGpu(half):
            batch = {spec.name: torch.empty(spec.shape) for spec in specs}
            batch |= {"timestep": torch.zeros(micro_batch, dtype=torch.int64), "noise": torch.empty(specs[0].shape)}
            if gradients_stay:
                for parameter in nets[1].parameters():
                    parameter.grad = torch.empty_like(parameter)
            terms = loss_terms(
                nets[1],
                nets[0],
                batch,
                losses,
                alphas_cumprod=torch.empty(1000),
                warm=1.0,
                taps=taps,
                recorders=recorders,
                autocast=nullcontext,
            )
            loss = torch.stack(list(terms.values())).sum()
            torch.autograd.backward(loss)  # the tensor's own method would leave the modes
    parameters = count_parameters(nets[1])
    gradients, work = count.at_peak
    if gradients_stay:
        gradients, work = 4 * parameters, work + gradients - 4 * parameters
    if 4 * parameters > gradients + work:  # the optimiser's step, when all gradients are there and nothing else
        gradients, work = 4 * parameters, 0
    gathered = _gathered_bytes(nets[1]) if shards > 1 else 0
    return MemoryPlan(
        teacher=half.itemsize * count_parameters(nets[0]) if losses.needs_teacher else 0,
        student=4 * parameters // shards,
        ema=4 * parameters // shards if ema else 0,
        optimizer=int(OPTIMIZER_BYTES[optimizer] * parameters) // shards,
        gradients=gradients // shards,
        work=work + gathered,
    )


def _gathered_bytes(unet: UNet2DConditionModel) -> int:
    """Whole weights that FSDP has on every GPU at once: all outside the sharded blocks, and the two largest blocks
    (one at work, one fetched ahead) with the gradient of one."""
    blocks = [count_parameters(module) for module in unet.modules() if isinstance(module, SHARDED_TOGETHER)]
    return 4 * (count_parameters(unet) - sum(blocks) + 3 * max(blocks))


def plan_recipe(
    recipe: Recipe,
    teacher: Architecture,
    *,
    half: torch.dtype,
    optimizer: str,
    processes: int,
    accumulation: int,
    fsdp: bool,
) -> tuple[str, dict[str, MemoryPlan]]:
    """What the recipe's deepest stage needs of each GPU, without and with gradient checkpointing, under a title.

    Raises UserError where the batch cannot be shared so.
    """
    family = teacher.family
    pairs = [(stage, find_architecture(stage.student, family)) for stage in recipe.stages]
    stage, student = max(pairs, key=lambda pair: pair[1].depth.transformer_blocks)
    micro_batch = recipe.micro_batch(processes, accumulation)
    resolution = family.resolutions[0]
    plans = {
        name: plan_memory(
            teacher,
            student,
            stage.losses,
            resolution=resolution,
            micro_batch=micro_batch,
            half=half,
            gradient_checkpointing=checkpointing,
            gradients_stay=accumulation > 1 or (processes > 1 and not fsdp),
            ema=recipe.ema_decay is not None,
            optimizer=optimizer,
            shards=processes if fsdp else 1,
        )
        for name, checkpointing in (("plain", False), ("gradient checkpointing", True))
    }
    gpus = "one GPU" if processes == 1 else f"each of {processes} GPUs"
    title = (
        f"memory plan for {gpus} at its peak, {recipe.name}, stage {stage.name}: {micro_batch} pictures of "
        f"{resolution} at once, {str(half).removeprefix('torch.')}"
    )
    return title, plans


def device_memory() -> tuple[str, int]:
    """Name and bytes of the device at hand: the GPU, or the machine's memory."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return properties.name, properties.total_memory
    return "this machine (no GPU)", psutil.virtual_memory().total


def describe_plan(plans: dict[str, MemoryPlan], title: str, device: str, device_bytes: int) -> list[str]:
    """An aligned table of plans side by side by name, and whether each fits the device."""
    rows = {
        "teacher weights": "teacher",
        "student weights": "student",
        "averaged weights (EMA)": "ema",
        "optimiser moments": "optimizer",
        "gradients": "gradients",
        "activations and work": "work",
        "peak": "total",
    }
    lines = [title, " " * 24 + "".join(f"{name:>28}" for name in plans)]
    for name, field in rows.items():
        lines.append(f"{name:24}" + "".join(f"{getattr(plan, field) / 1e9:25.3f} GB" for plan in plans.values()))
    usable = device_bytes - RESERVED_BYTES
    lines += [
        f"{name}: {'fits' if plan.total <= usable else 'does NOT fit'} {device}, {device_bytes / 1e9:.1f} GB of which "
        f"{RESERVED_BYTES / 1e9:.0f} are left to the driver and the kernels"
        for name, plan in plans.items()
    ]
    return lines
