"""The one training loop: every stage of every recipe, on one process or on many (accelerate).

The teacher is never given to accelerate's `prepare`: its save hooks receive every prepared model, and so a teacher
was once saved over its student.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from distill.architectures import Architecture, Depth, find_architecture
from distill.cache import LatentCache, seed_of
from distill.checkpoints import (
    TrainingState,
    alphas_cumprod_of,
    draw_validation,
    gather_student,
    resume,
    save_state,
    save_student,
)
from distill.errors import UserError, unknown
from distill.files import read_json, replacing, require_free_disk, sha256_json, write_json
from distill.plan import OPTIMIZER_BYTES, describe_plan, device_memory, plan_recipe
from distill.progress import say, track
from distill.recipes import Recipe, Stage
from distill.sharding import check_fsdp, check_no_other_fsdp, shard
from distill.sources import checkpoint_hash, find_architecture_of, load_component, read_config, resolve
from distill.step import DivergenceGuard, add_noise, learning_rate, loss_terms
from distill.surgery import LayerMap, make_layer_map, make_student_unet
from distill.taps import FeatureRecorder, make_taps

HALF = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to run a recipe on this machine. Only `mixed_precision` and `optimizer` change what is learned."""

    mixed_precision: str = "no"
    optimizer: str = "adamw"
    accumulation: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    fsdp: bool = False
    tensorboard: bool = False
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    validate_every: int = 0
    log_every: int = 10


def relative_map(layer_map: LayerMap, held: LayerMap | None) -> LayerMap:
    """The layer map from what an earlier student holds: both maps name blocks of the original teacher.

    `held` None is the teacher itself. Raises UserError where the new student wants a block the earlier one dropped.
    """
    if held is None:
        return layer_map
    relative = {}
    for path, wanted in layer_map.items():
        missing = sorted(set(wanted) - set(held.get(path, ())))
        if missing:
            raise UserError(
                f"{path}: the stage keeps teacher blocks {list(wanted)}, but the student it starts from has only "
                f"{list(held.get(path, ()))}; use nested layer maps"
            )
        relative[path] = tuple(held[path].index(block) for block in wanted)
    return relative


def check_successor(first: Path, teacher: Path) -> None:
    """Raises UserError where a later teacher differs from the first in architecture or prediction type."""
    ignored = ("_class_name", "_diffusers_version", "_name_or_path", "sample_size")
    before, now = (read_config(folder, "unet") for folder in (first, teacher))
    for key in sorted((before.keys() | now.keys()) - set(ignored)):
        if before.get(key) != now.get(key):
            raise UserError(
                f"teacher {teacher} cannot succeed {first}: UNet {key} is {now.get(key)!r}, was {before.get(key)!r}"
            )
    for folder in (first, teacher):
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        if scheduler.get("prediction_type", "epsilon") != "epsilon":
            raise UserError(
                f"teacher {folder} predicts {scheduler['prediction_type']!r}; SDXL's distillation needs 'epsilon'"
            )


def stage_layer_map(stage: Stage, teacher: Depth, student: Depth, held: LayerMap | None) -> LayerMap:
    """The stage's layer map; a transformer that is as deep as in the student it starts from (`held` is that one's
    map) keeps that one's blocks, unless indices for it are given."""
    layer_map = dict(make_layer_map(stage.layer_map, teacher, student))
    explicit = () if isinstance(stage.layer_map, str) else stage.layer_map
    for path, blocks in (held or {}).items():
        if path in layer_map and path not in explicit and len(blocks) == len(layer_map[path]):
            layer_map[path] = blocks
    return layer_map


def _make_accelerator(options: TrainOptions, out: Path) -> Accelerator:
    check_no_other_fsdp()
    if options.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed-precision fp16 needs a GPU, and there is none here; use bf16 or no")
    if options.tensorboard:
        try:
            import tensorboard  # noqa: F401
        except ImportError:
            raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # else each process of a GPU-less torchrun thinks it is alone
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.accumulation,
        step_scheduler_with_optimizer=False,
        log_with="tensorboard" if options.tensorboard else None,
        project_dir=out,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # no second copy of them
    )


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


def train(
    recipe: Recipe,
    *,
    cache: Path,
    out: Path,
    workdir: Path,
    start: Path | None = None,
    options: TrainOptions | None = None,
) -> None:
    """Runs all stages of `recipe` on the latent cache; `out` becomes a diffusers pipeline folder of the last student.

    `start` is an earlier student to begin from (default: the first stage's teacher). A finished `out` is left as it
    is; an unfinished one goes on from its last checkpoint. Raises UserError for an `out` of another recipe, layer maps
    that are not nested, a teacher that cannot succeed the one before, a disk or GPU too small, and a loss that is no
    longer finite or has diverged.
    """
    options = options or TrainOptions()
    accelerator = _make_accelerator(options, out)
    if options.fsdp:
        check_fsdp(accelerator.num_processes, options.mixed_precision, options.optimizer)
    per_process, rest = divmod(recipe.batch_size, accelerator.num_processes * options.accumulation)
    if rest or not per_process:
        raise UserError(
            f"batch size {recipe.batch_size} cannot be shared by {accelerator.num_processes} processes x "
            f"{options.accumulation} accumulation steps"
        )
    latents = LatentCache(cache, batch_size=recipe.batch_size, seed=recipe.seed)
    teachers = {stage.teacher: resolve(stage.teacher, workdir) for stage in recipe.stages}
    for teacher in teachers.values():  # the first too: what it predicts is checked
        check_successor(next(iter(teachers.values())), teacher)
    run = {
        "recipe": recipe.as_dict(),
        "teachers": {name: checkpoint_hash(folder) for name, folder in teachers.items()},
        "start": checkpoint_hash(start) if start else None,
        "cache": latents.key,
        "mixed_precision": options.mixed_precision,
        "optimizer": options.optimizer,
    }
    run["key"] = sha256_json(run)
    if (out / "slimxl.json").exists() and read_json(out / "slimxl.json")["key"] == run["key"]:
        return
    if (out / "run.json").exists() and read_json(out / "run.json")["key"] != run["key"]:
        raise UserError(f"{out} belongs to another recipe, teacher or cache; choose another --out or remove it")
    if accelerator.is_main_process:
        _look_ahead(recipe, find_architecture_of(teachers[recipe.stages[0].teacher]), out, options, accelerator)
    if accelerator.is_main_process:
        write_json(out / "run.json", run)
    if options.tensorboard:
        accelerator.init_trackers("tensorboard")
    accelerator.wait_for_everyone()
    previous = start
    for number in range(len(recipe.stages)):
        folder = teachers[recipe.stages[number].teacher]
        previous = _StageRun(accelerator, recipe, number, folder, latents, out, options).run(previous)
    if accelerator.is_main_process:
        _finish(out, previous or teachers[recipe.stages[0].teacher], run)
    accelerator.end_training()


def _look_ahead(
    recipe: Recipe, teacher: Architecture, out: Path, options: TrainOptions, accelerator: Accelerator
) -> None:
    """Tells the memory plan before anything is loaded. Raises UserError where the disk cannot hold the checkpoints."""
    title, plans = plan_recipe(
        recipe,
        teacher,
        half=HALF[options.mixed_precision],
        optimizer=options.optimizer,
        processes=accelerator.num_processes,
        accumulation=options.accumulation,
        fsdp=options.fsdp,
    )
    for line in describe_plan(plans, title, *device_memory()):
        say(line)
    plan = next(iter(plans.values()))
    state_bytes = (plan.student + plan.ema + plan.optimizer) * (accelerator.num_processes if options.fsdp else 1)
    require_free_disk(out, (options.keep_checkpoints + 1) * state_bytes, "the checkpoints of this run")


def _finish(out: Path, last: Path, run: dict[str, Any]) -> None:
    """Moves the last stage's pipeline up to `out`; slimxl.json comes last and says that all is there."""
    about = read_json(last / "slimxl.json")
    for item in last.iterdir():
        target = out / item.name
        if item.name != "slimxl.json":
            with replacing(target) as temporary:
                shutil.copytree(item, temporary) if item.is_dir() else shutil.copy2(item, temporary)
    write_json(out / "slimxl.json", about | run)
    shutil.rmtree(out / "stages")


def _layer_map_of(folder: Path) -> LayerMap:
    return {path: tuple(blocks) for path, blocks in read_json(folder / "slimxl.json")["layer_map"].items()}


class _StageRun:
    """One stage of a run: made ready, trained from where it was, and left as a whole pipeline folder."""

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: Recipe,
        number: int,
        teacher_folder: Path,
        latents: LatentCache,
        out: Path,
        options: TrainOptions,
    ) -> None:
        self.accelerator, self.recipe, self.number, self.options = accelerator, recipe, number, options
        self.stage, self.teacher_folder, self.latents, self.out = recipe.stages[number], teacher_folder, latents, out
        self.name = f"{number + 1:02d}-{self.stage.name}"
        self.folder = out / "stages" / self.name

    def run(self, previous: Path | None) -> Path:
        """Returns the finished student's folder; `previous` is the student to start from (None: the teacher)."""
        if (self.folder / "slimxl.json").exists():
            return self.folder
        initial = self._operate(previous)
        state = self._make_ready(initial)
        self._train(state)
        student = gather_student(state)
        for recorder in self.recorders:
            recorder.remove()
        if student is not None and self.accelerator.is_main_process:
            save_student(student, self.teacher_folder, self.folder, self.layer_map, self.recipe, self.number)
            shutil.rmtree(initial)
            shutil.rmtree(self.out / "state", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()
        return self.folder

    def _operate(self, previous: Path | None) -> Path:
        """Surgery: the folder of the student's first weights."""
        family = find_architecture_of(self.teacher_folder).family
        self.student_spec = find_architecture(self.stage.student, family)
        self.teacher_depth = Depth.from_config(read_config(self.teacher_folder, "unet"))
        held = _layer_map_of(previous) if previous else None
        self.layer_map = stage_layer_map(self.stage, self.teacher_depth, self.student_spec.depth, held)
        initial = self.out / "stages" / f"{self.number + 1:02d}-initial"
        if self.accelerator.is_main_process and not initial.exists():
            if self.stage.from_scratch:
                torch.manual_seed(seed_of(self.recipe.seed, "from scratch"))
                with replacing(initial) as temporary:
                    UNet2DConditionModel(**self.student_spec.unet_config).save_pretrained(temporary)
            else:
                source = previous or self.teacher_folder
                make_student_unet(source, self.student_spec, relative_map(self.layer_map, held), initial)
        self.accelerator.wait_for_everyone()
        return initial

    def _make_ready(self, initial: Path) -> TrainingState:
        """Both nets on the device, tapped; the student checkpointed, compiled and wrapped as the options say."""
        stage, options, device = self.stage, self.options, self.accelerator.device
        losses = stage.losses
        self.teacher = None
        student = UNet2DConditionModel.from_pretrained(initial, torch_dtype=torch.float32).train().to(device)
        if losses.output or losses.feature:
            self.teacher = load_component(self.teacher_folder, "unet", HALF[options.mixed_precision])
            self.teacher.to(device).requires_grad_(False)
        depth = self.student_spec.depth
        self.taps = make_taps(losses.level, self.teacher_depth, depth, self.layer_map) if losses.feature else ()
        self.recorders = (
            FeatureRecorder(student, [tap.student for tap in self.taps]),
            FeatureRecorder(self.teacher or student, sorted({tap.teacher for tap in self.taps})),
        )
        if options.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        if options.compile:
            for unet in filter(None, (student, self.teacher)):
                unet.compile_repeated_blocks()
        if options.fsdp:
            shard(student)
        self.model = student if options.fsdp else self.accelerator.prepare(student)
        optimizer = make_optimizer(options.optimizer, student, self.recipe.weight_decay)
        self.optimizer = self.accelerator.prepare(optimizer)
        ema = EMAModel(student.parameters(), decay=self.recipe.ema_decay) if self.recipe.ema_decay else None
        self.alphas_cumprod = alphas_cumprod_of(self.teacher_folder)
        return TrainingState(student, optimizer, ema, self.accelerator.scaler)

    def _train(self, state: TrainingState) -> None:
        accelerator, options, stage, states = self.accelerator, self.options, self.stage, self.out / "state"
        first_step = resume(accelerator, state, states, self.number, self.out / "losses.jsonl")
        started = time.monotonic()
        guard = DivergenceGuard()
        title = f"{self.recipe.name} {self.number + 1}/{len(self.recipe.stages)} {stage.name}"
        steps = range(first_step, stage.steps)
        for step in track(steps, title, done=first_step) if accelerator.is_main_process else steps:
            terms = self._step(step)
            if state.ema:
                state.ema.step(state.student.parameters())
            self._check(title, step, terms, guard, states)
            done = step + 1
            if accelerator.is_main_process and (done % options.log_every == 0 or done == stage.steps):
                self._log(done, terms, time.monotonic() - started)
            if done % options.checkpoint_every == 0 and done < stage.steps and not guard.bad_steps:
                save_state(accelerator, state, states, self.number, done, keep=options.keep_checkpoints)
            if options.validate_every and done % options.validate_every == 0 and done < stage.steps:
                student = gather_student(state)
                if student is not None and accelerator.is_main_process:
                    path = self.out / "samples" / f"{self.name}-{done:07d}.png"
                    draw_validation(student, self.teacher_folder, self.recipe.validation_prompts, path)
                accelerator.wait_for_everyone()

    def _check(self, title: str, step: int, terms: dict[str, float], guard: DivergenceGuard, states: Path) -> None:
        """Raises UserError for a loss that is not finite, or has stayed far above its median."""
        advice = f"the last good state is in {states}; lower the learning rate, or use bf16 instead of fp16"
        if not math.isfinite(terms["total"]):
            broken = [name for name, value in terms.items() if not math.isfinite(value)]
            raise UserError(f"{title}: step {step} is not finite ({', '.join(broken[:4])}); {advice}")
        if step >= self.stage.losses.warmup_steps and guard.diverged(terms["total"]):
            raise UserError(
                f"{title}: the loss has diverged: over {guard.factor:g} times its median {guard.median:.4g} for "
                f"{guard.patience} steps, now {terms['total']:.4g} at step {step}; {advice}"
            )

    def _log(self, done: int, terms: dict[str, float], seconds: float) -> None:
        total = terms.pop("total")
        rate = self.optimizer.param_groups[0]["lr"]
        line = {"stage": f"{self.number + 1}-{self.stage.name}", "step": done, "seconds": round(seconds, 3), "lr": rate}
        with (self.out / "losses.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line | {"loss": total, "terms": terms}) + "\n")
        if self.options.tensorboard:
            self.accelerator.log(
                {"loss": total, "lr": rate, **terms}, step=_global_step(self.recipe, self.number, done)
            )

    def _step(self, step: int) -> dict[str, float]:
        """One optimiser step over the global batch; returns every loss term, averaged over it, and their `total`."""
        accelerator, recipe, stage = self.accelerator, self.recipe, self.stage
        warm = min(1.0, (step + 1) / max(1, stage.losses.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        batch = add_noise(
            self.latents.batch(_global_step(recipe, self.number, step)),
            self.alphas_cumprod,
            seed=(recipe.seed, self.number, step),
            caption_dropout=recipe.caption_dropout,
        )
        parts = self.options.accumulation
        size = recipe.batch_size // (accelerator.num_processes * parts)
        totals: dict[str, torch.Tensor] = {}
        for micro in range(parts):
            begin = (accelerator.process_index * parts + micro) * size
            part = {name: value[begin : begin + size].to(accelerator.device) for name, value in batch.items()}
            with accelerator.accumulate(self.model):
                terms = loss_terms(
                    self.model,
                    self.teacher,
                    part,
                    stage.losses,
                    alphas_cumprod=self.alphas_cumprod.to(accelerator.device),
                    warm=warm,
                    taps=self.taps,
                    recorders=self.recorders,
                    autocast=accelerator.autocast,
                )
                total = torch.stack(list(terms.values())).sum()
                accelerator.backward(total)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, value in {**terms, "total": total}.items():
                totals[name] = totals.get(name, 0) + value.detach() / parts
        values = accelerator.reduce(torch.stack(list(totals.values())), reduction="mean").tolist()
        return dict(zip(totals, values, strict=True))


def _global_step(recipe: Recipe, number: int, step: int) -> int:
    return sum(stage.steps for stage in recipe.stages[:number]) + step
