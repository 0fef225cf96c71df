"""What a stage needs of one GPU's memory, told before it starts.

Nothing is guessed: a step itself, teacher, student, loss and backward, runs on meta tensors, which have shapes but no
memory, while every tensor that would exist is counted from its birth to its death. What a kernel takes for itself (cuDNN's
and cuBLAS's workspaces), CUDA's context and the allocator's gaps are not tensors; for them `RESERVED_BYTES` stays free.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import asdict, dataclass
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

from distill.common.files import size_text
from distill.data.samples import Text
from distill.models.architectures import Architecture
from distill.models.catalogue import count_parameters, meta_text_encoders, meta_unet, text_tflop, unet_tflop
from distill.models.module_map import make_module_map
from distill.models.resolution import Resolution
from distill.training.accelerator import OPTIMIZER_BYTES, SHARDED_TOGETHER, trained_parameters
from distill.training.objectives import Objective
from distill.training.objectives.interface import Nets
from distill.training.recipes import PREVIOUS, Recipe, Stage
from distill.training.step import predict
from distill.training.student import Student
from distill.training.student.lora import adapters_off

RESERVED_BYTES = 2_000_000_000


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
class MemoryUse:
    """Bytes on one GPU when most are in use. `frozen` is the teacher, or the base of a LoRA; `student` is what is trained.
    `text` are the text encoders, where captions are cached as tokens; `work` is activations, features and whatever else a
    step holds for a while; under FSDP also the weights gathered from the other GPUs."""

    frozen: int
    student: int
    ema: int
    optimizer: int
    gradients: int
    work: int
    text: int = 0

    @property
    def total(self) -> int:
        return self.frozen + self.student + self.ema + self.optimizer + self.gradients + self.work + self.text


def count_memory(
    teacher: Architecture,
    student: Student,
    objective: Objective,
    *,
    resolution: Resolution,
    micro_batch: int,
    half: torch.dtype = torch.float32,
    taught_by_base: bool = True,
    gradient_checkpointing: bool = False,
    gradients_stay: bool = False,
    ema: bool = False,
    optimizer: str = "adamw",
    shards: int = 1,
    text: Text = "cached",
) -> MemoryUse:
    """Counts one step of `micro_batch` samples. `taught_by_base` says that a LoRA's teacher is its own base, not a net
    beside it. `gradients_stay` says that gradients are held through the whole step (accumulation, or DDP's buckets), else
    each appears as backward reaches it. `shards` is the number of FSDP's processes: weights, average, moments and gradients
    are divided by it, and the transformer blocks and ResNets at work, with everything outside of them, gathered."""
    architecture = student.architecture_of(teacher)
    family = architecture.family
    drawn = objective.draw(micro_batch, 1000, torch.Generator())
    with torch.device("meta"):
        config = {**architecture.unet_config, **objective.student_config}
        student_net = UNet2DConditionModel(**config).to(student.dtype(half))
        student.prepare(student_net)
        teacher_net, itself = student_net, student.adapter and taught_by_base
        if not itself:
            teacher_net = UNet2DConditionModel(**teacher.unet_config).to(half).requires_grad_(False)
        if gradient_checkpointing:
            again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), AsOnGpu(half)))
            student_net.train().enable_gradient_checkpointing(again)
        nets = Nets(
            student=student_net,
            teacher=teacher_net if objective.needs_teacher else None,
            modules=make_module_map("first", teacher.depth, architecture.depth),
            alphas_cumprod=torch.empty(1000),
            unconditional={name: torch.empty(shape) for name, shape in family.text_shapes.items()},
            target=torch.no_grad()(partial(predict, student_net)),
        )
        specs = family.unet_inputs(resolution, micro_batch)
        with LiveBytes(teacher_net, student_net) as count, AsOnGpu(half), objective.prepare(nets) as terms_of:
            batch = {spec.name: torch.empty(spec.shape) for spec in specs}
            batch |= {name: torch.empty_like(value, device="meta") for name, value in drawn.items()}
            batch["noise"] = torch.empty(specs[0].shape)
            if gradients_stay:
                for parameter in trained_parameters(student_net):
                    parameter.grad = torch.empty_like(parameter)
            teaching = torch.no_grad()(partial(predict, teacher_net, dtype=half))
            if itself:
                teaching = adapters_off(student_net)(teaching)
            terms = terms_of(partial(predict, student_net), teaching, batch, 0)
            loss = torch.stack(list(terms.values())).sum()
            torch.autograd.backward(loss)  # the tensor's own method would leave the modes
    parameters = sum(parameter.numel() for parameter in trained_parameters(student_net))
    frozen = count_parameters(student_net) - parameters
    if objective.needs_teacher and not itself:
        frozen += count_parameters(teacher_net)
    gradients, work = count.at_peak
    if gradients_stay:
        gradients, work = 4 * parameters, work + gradients - 4 * parameters
    if 4 * parameters > gradients + work:  # the optimiser's step, when all gradients are there and nothing else
        gradients, work = 4 * parameters, 0
    gathered = _gathered_bytes(student_net) if shards > 1 else 0
    encoders = meta_text_encoders(family) if text == "online" else {}
    return MemoryUse(
        frozen=half.itemsize * frozen,
        student=4 * parameters // shards,
        ema=(ema + (objective.target_decay is not None)) * 4 * parameters // shards,
        optimizer=int(OPTIMIZER_BYTES[optimizer] * parameters) // shards,
        gradients=gradients // shards,
        work=work + gathered,
        text=half.itemsize * sum(map(count_parameters, encoders.values())),
    )


def _gathered_bytes(unet: UNet2DConditionModel) -> int:
    """Whole weights that FSDP has on every GPU at once: all outside the sharded blocks, and the two largest blocks
    (one at work, one fetched ahead) with the gradient of one."""
    blocks = [count_parameters(module) for module in unet.modules() if isinstance(module, SHARDED_TOGETHER)]
    return 4 * (count_parameters(unet) - sum(blocks) + 3 * max(blocks))


def count_recipe_memory(
    recipe: Recipe,
    teacher: Architecture,
    *,
    half: torch.dtype,
    optimizer: str,
    processes: int,
    accumulation: int,
    fsdp: bool,
    text: Text = "cached",
    started: bool = False,
) -> tuple[str, dict[str, MemoryUse]]:
    """What the recipe needs of each GPU, without and with gradient checkpointing, each at the stage that needs most, under a
    title that names the stages; `started` says that its first student begins on another than its teacher.

    Raises UserError where the batch cannot be shared so.
    """
    micro_batch = recipe.micro_batch(processes, accumulation)
    resolution = teacher.family.resolutions[0]
    candidates, uses, costliest = _deepest_stages(recipe, teacher), {}, {}
    for name, checkpointing in (("plain", False), ("gradient checkpointing", True)):
        needs = [
            count_memory(
                taught_by,
                stage.student,
                stage.objective,
                resolution=resolution,
                micro_batch=micro_batch,
                half=half,
                taught_by_base=not started,
                gradient_checkpointing=checkpointing,
                gradients_stay=accumulation > 1 or (processes > 1 and not fsdp),
                ema=recipe.ema_decay is not None,
                optimizer=optimizer,
                shards=processes if fsdp else 1,
                text=text,
            )
            for stage, taught_by in candidates
        ]
        uses[name], costliest[name] = max(zip(needs, candidates, strict=True), key=lambda pair: pair[0].total)
    stages = [stage for stage, _ in costliest.values()]
    named = dict.fromkeys(stage.name for stage in stages)
    gpus = "one GPU" if processes == 1 else f"each of {processes} GPUs"
    title = (
        f"memory needed of {gpus} at its peak, {recipe.name}, stage {' and '.join(named)}: {micro_batch} pictures of "
        f"{resolution} at once, {str(half).removeprefix('torch.')}"
    )
    if text == "online":
        stage, taught_by = costliest["plain"]
        share = _text_share(taught_by, stage.student.architecture_of(teacher), stage.objective)
        title += f", captions encoded in each step ({share:.1%} of its arithmetic)"
    return title, uses


def _deepest_stages(recipe: Recipe, teacher: Architecture) -> list[tuple[Stage, Architecture]]:
    """For each objective of the recipe, whatever its `steps`, the stage with the deepest student, and what teaches there."""
    made = [stage.student.architecture_of(teacher) for stage in recipe.stages]
    taught_by = [made[i - 1] if stage.teacher == PREVIOUS else teacher for i, stage in enumerate(recipe.stages)]
    deepest: dict[str, int] = {}
    for i in sorted(range(len(made)), key=lambda i: -made[i].depth.transformer_blocks):
        objective = {name: value for name, value in asdict(recipe.stages[i].objective).items() if name != "steps"}
        deepest.setdefault(repr(objective), i)
    return [(recipe.stages[i], taught_by[i]) for i in deepest.values()]


def _text_share(teacher: Architecture, student: Architecture, objective: Objective) -> float:
    """What encoding captions is of a step's arithmetic: of that, the teacher's pass, and three times the student's."""
    size = teacher.family.resolutions[0]
    of_teacher, of_student = (unet_tflop(meta_unet(one), one, size, batch=1) for one in (teacher, student))
    text = text_tflop(teacher.family)
    return text / (text + objective.needs_teacher * of_teacher + 3 * of_student)


def device_memory() -> tuple[str, int]:
    """Name and bytes of the device at hand: the GPU, or the machine's memory."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return properties.name, properties.total_memory
    return "this machine (no GPU)", psutil.virtual_memory().total


def describe_memory(uses: dict[str, MemoryUse], title: str, device: str, device_bytes: int) -> list[str]:
    """An aligned table of them side by side by name, and whether each fits the device."""
    rows = {
        "frozen weights": "frozen",
        "trained weights": "student",
        "averaged weights (EMA)": "ema",
        "optimiser moments": "optimizer",
        "gradients": "gradients",
        "activations and work": "work",
        "text encoders": "text",
        "peak": "total",
    }
    lines = [title, " " * 24 + "".join(f"{name:>28}" for name in uses)]
    if not any(use.text for use in uses.values()):
        del rows["text encoders"]
    for name, field in rows.items():
        lines.append(f"{name:24}" + "".join(f"{size_text(getattr(use, field)):>28}" for use in uses.values()))
    usable = device_bytes - RESERVED_BYTES
    lines += [
        f"{name}: {'fits' if use.total <= usable else 'does NOT fit'} {device}, {size_text(device_bytes)} of which "
        f"{size_text(RESERVED_BYTES)} are left to the driver and the kernels"
        for name, use in uses.items()
    ]
    return lines
