"""Teacher and student side by side on the device, and the optimiser step that teaches the one by the other.

The trainer takes this step over a recipe's stages; the benchmarks take the same one to time it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch.distributed.tensor import DTensor

from distill.common.errors import UserError, unknown
from distill.models.module_map import ModuleMap
from distill.models.sources import load_component
from distill.training.memory_plan import OPTIMIZER_BYTES
from distill.training.options import TrainOptions
from distill.training.recipes import LossWeights, Recipe
from distill.training.sharding import shard
from distill.training.step import add_noise, loss_terms
from distill.training.taps import FeatureRecorder, Tap, make_taps

Terms = dict[str, float]
"""Every loss term by name, their `total`, and the `gradient_norm` before clipping."""


def make_optimizer(name: str, student: torch.nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW, its moments in 32 or in 8 bits (arXiv 2110.02861). Raises UserError for another name, or without the
    package that has the 8-bit one."""
    if name == "adamw":
        return torch.optim.AdamW(student.parameters(), weight_decay=weight_decay, fused=True)
    if name != "adamw-8bit":
        raise unknown("optimizer", name, OPTIMIZER_BYTES)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("--optimizer adamw-8bit needs the package bitsandbytes: pip install bitsandbytes") from None
    return AdamW8bit(student.parameters(), weight_decay=weight_decay)


def load_nets(
    teacher: Path | None, student: Path, half: torch.dtype
) -> tuple[UNet2DConditionModel | None, UNet2DConditionModel]:
    """The UNet of the pipeline folder `teacher` in `half`, and the one whose own folder is `student` in fp32, to train."""
    trained = UNet2DConditionModel.from_pretrained(student, torch_dtype=torch.float32).train()
    return teacher and load_component(teacher, "unet", half), trained


class Pair:
    """A frozen teacher (or None, where no loss needs one) and its student, ready to take steps.

    Public are the `student` itself, the `model` that runs it (under DDP a wrapper), the `teacher` and the `optimizer`.
    The teacher is never given to accelerate's `prepare`: its save hooks receive every prepared model, and so a teacher
    was once saved over its student.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        teacher: UNet2DConditionModel | None,
        student: UNet2DConditionModel,
        modules: ModuleMap,
        alphas_cumprod: torch.Tensor,
        unconditional: Mapping[str, torch.Tensor],
        recipe: Recipe,
        options: TrainOptions,
    ) -> None:
        """Moves both nets to the device; the student is checkpointed, compiled and wrapped as the options say."""
        self.accelerator, self.modules, self.recipe, self.options = accelerator, modules, recipe, options
        self.alphas_cumprod, self.unconditional = alphas_cumprod, unconditional
        self.student = student.to(accelerator.device)
        self.teacher: Any = teacher and teacher.to(accelerator.device).requires_grad_(False)
        if options.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        if options.compile:
            self.compile_blocks()
        if options.fsdp:
            shard(student)
        self.model: Any = student if options.fsdp else accelerator.prepare(student)
        self.optimizer: Any = accelerator.prepare(make_optimizer(options.optimizer, student, recipe.weight_decay))

    def compile_blocks(self) -> None:
        """torch.compile for each transformer block of both nets."""
        torch._dynamo.config.skip_nnmodule_hook_guards = False  # a block that is tapped inside has a graph of its own
        for unet in filter(None, (self.student, self.teacher)):
            unet.compile_repeated_blocks()

    @property
    def rows(self) -> slice:
        """This process's share of the global batch."""
        share = self.recipe.batch_size // self.accelerator.num_processes
        return slice(self.accelerator.process_index * share, (self.accelerator.process_index + 1) * share)

    def noised(self, batch: Mapping[str, torch.Tensor], seed: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """What a step takes, from this process's `rows` of a batch of `LatentCache`. All of it is the host's work, so
        it can be done ahead; for a GPU it ends in page-locked memory."""
        noised = add_noise(
            batch,
            self.alphas_cumprod,
            self.unconditional,
            seed=seed,
            caption_dropout=self.recipe.caption_dropout,
            rows=self.rows,
            batch_size=self.recipe.batch_size,
        )
        on_gpu = self.accelerator.device.type == "cuda"
        return {name: value.pin_memory() for name, value in noised.items()} if on_gpu else noised

    @contextmanager
    def taught_by(self, losses: LossWeights) -> Iterator[Callable[..., Terms]]:
        """Taps what `losses` compares; yields `step(noised, learning_rate=…, warm=1.0)`, which takes one optimiser step
        over what `noised` made ready in each process, and returns its terms, averaged over all processes."""
        taps: tuple[Tap, ...] = ()
        if losses.feature and self.teacher is not None:
            taps = make_taps(losses.level, self.modules)
        recorders = (
            FeatureRecorder(self.student, [tap.student for tap in taps]),
            FeatureRecorder(self.teacher or self.student, sorted({tap.teacher for tap in taps})),
        )
        terms_of = partial(
            loss_terms,
            self.model,
            self.teacher,
            losses=losses,
            alphas_cumprod=self.alphas_cumprod.to(self.accelerator.device),
            taps=taps,
            recorders=recorders,
            autocast=self.accelerator.autocast,
        )

        def step(noised: Mapping[str, torch.Tensor], *, learning_rate: float, warm: float = 1.0) -> Terms:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            return self._step(noised, partial(terms_of, warm=warm))

        try:
            yield step
        finally:
            for recorder in recorders:
                recorder.remove()

    def _step(self, noised: Mapping[str, torch.Tensor], terms_of: Callable[..., dict[str, torch.Tensor]]) -> Terms:
        accelerator, parts = self.accelerator, self.options.accumulation
        size = len(noised["sample"]) // parts
        totals: dict[str, torch.Tensor] = {}
        for begin in range(0, parts * size, size):
            part = {
                name: value[begin : begin + size].to(accelerator.device, non_blocking=True)
                for name, value in noised.items()
            }
            with accelerator.accumulate(self.model):
                terms = terms_of(batch=part)
                total = torch.stack(list(terms.values())).sum()
                accelerator.backward(total)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, value in {**terms, "total": total}.items():
                totals[name] = totals.get(name, 0) + value.detach() / parts
        totals["gradient_norm"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        values = accelerator.reduce(torch.stack(list(totals.values())), reduction="mean").tolist()
        return dict(zip(totals, values, strict=True))
