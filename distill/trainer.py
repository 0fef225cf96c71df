"""The one training loop: every stage of every recipe, on one process or on many (accelerate)."""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from distill.ahead import ahead
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
from distill.errors import UserError, explaining_full_memory
from distill.files import read_json, replacing, require_free_disk, sha256_json, write_json
from distill.layer_map import LayerMap, inherit_layer_map, relative_map
from distill.options import HALF, TrainOptions, make_accelerator
from distill.pair import Pair, Terms, load_nets
from distill.plan import MemoryPlan, describe_plan, device_memory, plan_recipe
from distill.progress import say, track
from distill.recipes import Recipe
from distill.sharding import check_fsdp
from distill.sources import check_successor, checkpoint_hash, find_architecture_of, read_config, resolve
from distill.step import DivergenceGuard, learning_rate
from distill.surgery import make_student_unet


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
    that are not nested, a teacher that cannot succeed the one before, a disk or GPU too small (the last checkpoint
    stays), and a loss that is no longer finite or has diverged.
    """
    options = options or TrainOptions()
    accelerator = make_accelerator(options, out)
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
    plans: dict[str, MemoryPlan] = {}
    if accelerator.is_main_process:
        plans = _look_ahead(recipe, find_architecture_of(teachers[recipe.stages[0].teacher]), out, options, accelerator)
        write_json(out / "run.json", run)
    if options.tensorboard:
        accelerator.init_trackers("tensorboard")
    accelerator.wait_for_everyone()
    previous = start
    with explaining_full_memory(_memory_advice(options, accelerator.num_processes, per_process, plans, out)):
        for number in range(len(recipe.stages)):
            folder = teachers[recipe.stages[number].teacher]
            previous = _StageRun(accelerator, recipe, number, folder, latents, out, options).run(previous)
            gc.collect()  # accelerate's wrappers hold the student in a cycle
            torch.cuda.empty_cache()
    if accelerator.is_main_process:
        _finish(out, previous or teachers[recipe.stages[0].teacher], run)
    accelerator.end_training()


def _look_ahead(
    recipe: Recipe, teacher: Architecture, out: Path, options: TrainOptions, accelerator: Accelerator
) -> dict[str, MemoryPlan]:
    """Tells the memory plan before anything is loaded, and returns it.

    Raises UserError where the disk cannot hold the checkpoints.
    """
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
    return plans


def _memory_advice(
    options: TrainOptions, processes: int, micro_batch: int, plans: dict[str, MemoryPlan], out: Path
) -> str:
    """What was planned, and what of all that saves memory is left to try."""
    planned = ", ".join(f"{plan.total / 1e9:.1f} GB {name}" for name, plan in plans.items())
    left = []
    if not options.gradient_checkpointing:
        left.append("--gradient-checkpointing")
    if micro_batch > 1:
        left.append(f"--accumulation above {options.accumulation}")
    if not options.fsdp:
        left.append("--fsdp" if processes > 1 else "--fsdp on several GPUs")
    anew = "" if options.fsdp or options.optimizer != "adamw" else "; or start anew with --optimizer adamw-8bit"
    return (
        f"{f'planned were {planned}; ' if planned else ''}go on from the last checkpoint in {out / 'state'} with the same "
        f"command and {' or '.join(left) or 'more GPUs'}{anew}"
    )


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
        pair = self._make_pair(initial)
        ema = EMAModel(pair.student.parameters(), decay=self.recipe.ema_decay) if self.recipe.ema_decay else None
        state = TrainingState(pair.student, pair.optimizer.optimizer, ema, self.accelerator.scaler)
        with pair.taught_by(self.stage.losses) as step:
            self._train(state, pair, step)
        student = gather_student(state)
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
        student = find_architecture(self.stage.student, family)
        teacher_depth = Depth.from_config(read_config(self.teacher_folder, "unet"))
        held = _layer_map_of(previous) if previous else None
        self.layer_map = inherit_layer_map(self.stage.layer_map, teacher_depth, student.depth, held)
        initial = self.out / "stages" / f"{self.number + 1:02d}-initial"
        if self.accelerator.is_main_process and not initial.exists():
            if self.stage.from_scratch:
                torch.manual_seed(seed_of(self.recipe.seed, "from scratch"))
                with replacing(initial) as temporary:
                    UNet2DConditionModel(**student.unet_config).save_pretrained(temporary)
            else:
                source = previous or self.teacher_folder
                make_student_unet(source, student, relative_map(self.layer_map, held), initial)
        self.accelerator.wait_for_everyone()
        return initial

    def _make_pair(self, initial: Path) -> Pair:
        teacher = self.teacher_folder if self.stage.losses.needs_teacher else None
        return Pair(
            self.accelerator,
            *load_nets(teacher, initial, HALF[self.options.mixed_precision]),
            self.layer_map,
            alphas_cumprod_of(self.teacher_folder),
            self.recipe,
            self.options,
        )

    def _train(self, state: TrainingState, pair: Pair, take_step: Callable[..., Terms]) -> None:
        accelerator, options, stage, states = self.accelerator, self.options, self.stage, self.out / "state"
        first_step = resume(accelerator, state, states, self.number, self.out / "losses.jsonl")
        started = time.monotonic()
        guard = DivergenceGuard()
        title = f"{self.recipe.name} {self.number + 1}/{len(self.recipe.stages)} {stage.name}"

        def noised(step: int) -> dict[str, torch.Tensor]:
            batch = self.latents.batch(_global_step(self.recipe, self.number, step), pair.rows)
            return pair.noised(batch, (self.recipe.seed, self.number, step))

        steps = range(first_step, stage.steps)
        shown = track(steps, title, done=first_step) if accelerator.is_main_process else steps
        # without a GPU the host has no time to spare: a second team of threads takes the first one's cores
        batches = ahead(noised, steps) if accelerator.device.type == "cuda" else map(noised, steps)
        for step, batch in zip(shown, batches, strict=True):
            terms = take_step(
                batch,
                learning_rate=learning_rate(stage, step),
                warm=min(1.0, (step + 1) / max(1, stage.losses.warmup_steps)),
            )
            if state.ema:
                state.ema.step(state.student.parameters())
            self._check(title, step, terms, guard, states)
            done = step + 1
            if accelerator.is_main_process and (done % options.log_every == 0 or done == stage.steps):
                self._log(done, terms, learning_rate(stage, step), time.monotonic() - started)
            if done % options.checkpoint_every == 0 and done < stage.steps and not guard.bad_steps:
                save_state(accelerator, state, states, self.number, done, keep=options.keep_checkpoints)
            if options.validate_every and done % options.validate_every == 0 and done < stage.steps:
                student = gather_student(state)
                if student is not None and accelerator.is_main_process:
                    path = self.out / "samples" / f"{self.name}-{done:07d}.png"
                    draw_validation(student, self.teacher_folder, self.recipe.validation_prompts, path)
                accelerator.wait_for_everyone()

    def _check(self, title: str, step: int, terms: Terms, guard: DivergenceGuard, states: Path) -> None:
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

    def _log(self, done: int, terms: Terms, rate: float, seconds: float) -> None:
        total = terms.pop("total")
        line = {"stage": f"{self.number + 1}-{self.stage.name}", "step": done, "seconds": round(seconds, 3), "lr": rate}
        with (self.out / "losses.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line | {"loss": total, "terms": terms}) + "\n")
        if self.options.tensorboard:
            self.accelerator.log(
                {"loss": total, "lr": rate, **terms}, step=_global_step(self.recipe, self.number, done)
            )


def _global_step(recipe: Recipe, number: int, step: int) -> int:
    return sum(stage.steps for stage in recipe.stages[:number]) + step
