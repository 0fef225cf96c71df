"""One training step: teacher and student side by side on the device, noised samples, the loss terms, the optimiser.

Nothing here depends on history: the batch, the noise, the timesteps and the dropped captions of a step are functions
of (seed, stage, step, sample). So a run that was killed ends in the same bytes as one that was not, and N processes
see what one would. The trainer takes this step over a recipe's stages; the benchmarks take the same one to time it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch.distributed.tensor import DTensor

from distill.common.files import seed_of
from distill.models.conditioning import call_unet
from distill.models.module_map import ModuleMap
from distill.training.accelerator import make_optimizer, shard
from distill.training.objectives import Objective
from distill.training.objectives.interface import Batch, LossTerms, Nets
from distill.training.options import TrainOptions
from distill.training.recipes import Recipe
from distill.training.student.lora import adapters_off
from distill.training.text import TextEncoders, with_text

Terms = dict[str, float]
"""Every loss term by name, their `total`, and the `gradient_norm` before clipping."""


def add_noise(
    objective: Objective,
    cached: Batch,
    alphas_cumprod: torch.Tensor,
    *,
    seed: Sequence[object],
    caption_dropout: float,
    first_row: int = 0,
) -> dict[str, torch.Tensor]:
    """A batch of `LatentCache` as the UNet takes it, by the names of its inputs, with the `noise` (n, 4, h, w) that was
    added, which captions are `dropped` (n,), and whatever else the objective draws.

    All that is drawn of a row depends on `seed` and its number in the global batch, of which `cached` may be the rows from
    `first_row` on: so it is the same however the batch is shared out, and the work is that of the rows at hand.
    """
    batch = dict(cached)
    latents = batch.pop("latents")
    rows = []
    for number in range(first_row, first_row + len(latents)):
        generator = torch.Generator().manual_seed(seed_of(*seed, number))  # type: ignore[arg-type]
        dropped = torch.rand(1, generator=generator) < caption_dropout
        noise = torch.randn((1, *latents.shape[1:]), generator=generator)
        rows.append({"dropped": dropped, "noise": noise, **objective.draw(1, len(alphas_cumprod), generator)})
    drawn = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    signal = alphas_cumprod[drawn["timestep"]].view(-1, 1, 1, 1)
    sample = signal.sqrt() * latents + (1 - signal).sqrt() * drawn["noise"]
    return batch | drawn | {"sample": sample}


def predict(unet: Any, batch: Batch, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The UNet's noise_pred (batch, 4, height / 8, width / 8) for a noised batch."""
    cast = {
        name: batch[name].to(dtype) for name in ("sample", "encoder_hidden_states", "timestep_cond") if name in batch
    }
    return call_unet(unet, {**batch, **cast})


class Pair:
    """A frozen teacher (or None, where no loss needs one) and its student, ready to take steps. Where both are one and the
    same net, the teacher is that with its adapters off.

    Public are the `student` itself, the `model` that runs it (under DDP a wrapper), the `teacher`, the `target` (a running
    average of the student, while an objective is taught that has a `target_decay`) and the `optimizer`.
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
        *,
        prediction_type: str = "epsilon",
        text_encoders: TextEncoders | None = None,
    ) -> None:
        """Moves both nets to the device; the student is checkpointed, compiled and wrapped as the options say."""
        self.accelerator, self.modules, self.recipe, self.options = accelerator, modules, recipe, options
        self.alphas_cumprod, self.text_encoders = alphas_cumprod, text_encoders
        self.unconditional = {name: value.to(accelerator.device) for name, value in unconditional.items()}
        self.prediction_type = prediction_type
        self.target: Any = None
        self.student = student.to(accelerator.device)
        self.teacher: Any = teacher and teacher.to(accelerator.device)
        if teacher is not None and teacher is not student:
            teacher.requires_grad_(False)
        if options.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        if options.compile:
            self._compile_blocks()
        if options.fsdp:
            shard(student)
        if accelerator.scaler:  # fp16's loss scale begins anew with each student
            accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())
        self.model: Any = student if options.fsdp else accelerator.prepare(student)
        self.optimizer: Any = accelerator.prepare(make_optimizer(options.optimizer, student, recipe.weight_decay))

    def _compile_blocks(self) -> None:
        """torch.compile for each transformer block of both nets."""
        torch._dynamo.config.skip_nnmodule_hook_guards = False  # a block that is tapped inside has a graph of its own
        for unet in {self.student, self.teacher} - {None}:
            unet.compile_repeated_blocks()

    @property
    def rows(self) -> slice:
        """This process's share of the global batch."""
        share = self.recipe.batch_size // self.accelerator.num_processes
        return slice(self.accelerator.process_index * share, (self.accelerator.process_index + 1) * share)

    def noised(self, objective: Objective, cached: Batch, seed: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """What a step takes, from this process's `rows` of a batch of `LatentCache`. All of it is the host's work, so
        it can be done ahead; for a GPU it ends in page-locked memory."""
        noised = add_noise(
            objective,
            cached,
            self.alphas_cumprod,
            seed=seed,
            caption_dropout=self.recipe.caption_dropout,
            first_row=self.rows.start,
        )
        on_gpu = self.accelerator.device.type == "cuda"
        return {name: value.pin_memory() for name, value in noised.items()} if on_gpu else noised

    @contextmanager
    def taught_by(self, objective: Objective) -> Iterator[Callable[..., Terms]]:
        """Makes the nets ready for an objective; yields `take_step(noised, step, learning_rate=…)`, which takes one
        optimiser step over what `noised` made in each process, and returns its terms, averaged over all processes."""
        device, decay = self.accelerator.device, objective.target_decay
        if decay is not None:
            self.target = self._copy_student()
        nets = Nets(
            student=self.student,
            teacher=self.teacher if objective.needs_teacher else None,
            modules=self.modules,
            alphas_cumprod=self.alphas_cumprod.to(device),
            unconditional=self.unconditional,
            prediction_type=self.prediction_type,
            target=self._predict_target,
        )
        with objective.prepare(nets) as terms:

            def take_step(noised: Batch, step: int, *, learning_rate: float) -> Terms:
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate
                taken = self._step(terms, noised, step)
                if decay is not None:
                    self._move_target(decay)
                return taken

            yield take_step

    def _predict_student(self, batch: Batch) -> torch.Tensor:
        with self.accelerator.autocast():
            return predict(self.model, batch)

    @torch.no_grad()
    def _predict_target(self, batch: Batch) -> torch.Tensor:
        with self.accelerator.autocast():
            return predict(self.student if self.target is None else self.target, batch)

    @torch.no_grad()
    def _predict_teacher(self, batch: Batch) -> torch.Tensor:
        with adapters_off(self.teacher) if self.teacher is self.student else nullcontext():
            return predict(self.teacher, batch, self.teacher.dtype)

    def _copy_student(self) -> UNet2DConditionModel:
        """A second net with the student's weights, shared out as the student is."""
        with torch.device("meta"):
            copy = UNet2DConditionModel.from_config(self.student.config)
        copy.to_empty(device=self.accelerator.device).requires_grad_(False)
        if self.options.compile:
            copy.compile_repeated_blocks()
        if self.options.fsdp:
            shard(copy)
        for copied, own in zip(copy.parameters(), self.student.parameters(), strict=True):
            copied.data.copy_(own.data)
        return copy

    @torch.no_grad()
    def _move_target(self, decay: float) -> None:
        """θ⁻ ← μ θ⁻ + (1 − μ) θ, as the last optimiser step left θ (arXiv 2310.04378, algorithm 1)."""
        if self.options.fsdp:
            self.target.reshard()  # what lies outside the blocks stays gathered after a forward pass
        for average, own in zip(self.target.parameters(), self.student.parameters(), strict=True):
            average.lerp_(own, 1 - decay)

    def _step(self, terms_of: LossTerms, noised: Batch, step: int) -> Terms:
        accelerator, parts = self.accelerator, self.options.accumulation
        size = len(noised["sample"]) // parts
        totals: dict[str, torch.Tensor] = {}
        for begin in range(0, parts * size, size):
            part = {
                name: value[begin : begin + size].to(accelerator.device, non_blocking=True)
                for name, value in noised.items()
            }
            part = with_text(part, self.text_encoders, self.unconditional)
            with accelerator.accumulate(self.model):
                terms = terms_of(self._predict_student, self._predict_teacher, part, step)
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
