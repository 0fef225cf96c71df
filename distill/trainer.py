"""The one training loop: every stage of every recipe, on one process or on many (accelerate)."""

from __future__ import annotations

import gc
import json
import math
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from distill.ahead import ahead
from distill.architectures import Depth, find_architecture
from distill.cache import LatentCache, seed_of
from distill.checkpoints import (
    STATE_FORMAT,
    Progress,
    TrainingState,
    alphas_cumprod_of,
    draw_validation,
    gather_student,
    resume,
    save_state,
    save_student,
    student_dtype,
)
from distill.errors import UserError, explaining_full_memory
from distill.files import (
    exclusive,
    read_json,
    remove_leftovers,
    replacing,
    require_free_disk,
    sha256_json,
    write_json,
)
from distill.layer_map import LayerMap, inherit_layer_map, relative_map
from distill.options import HALF, TrainOptions, make_accelerator
from distill.pair import Pair, Terms, load_nets
from distill.plan import MemoryPlan, describe_plan, device_memory, plan_recipe
from distill.progress import say, track
from distill.recipes import Recipe
from distill.sharding import check_fsdp
from distill.sigterm import noting_sigterm
from distill.sources import (
    check_successor,
    checkpoint_hash,
    find_architecture_of,
    load_component,
    read_config,
    resolve,
)
from distill.step import DivergenceGuard, learning_rate
from distill.surgery import files_but_unet, make_student_unet


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
    is; an unfinished one goes on from its last checkpoint. Raises UserError for an `out` of another recipe or that
    another process is training into, layer maps that are not nested, a teacher that cannot succeed the one before, a
    disk or GPU too small (the last checkpoint stays), and a loss that is no longer finite or has diverged.
    """
    options = options or TrainOptions()
    accelerator = make_accelerator(options, out)
    if options.fsdp:
        check_fsdp(accelerator.num_processes, options.mixed_precision, options.optimizer)
    recipe.micro_batch(accelerator.num_processes, options.accumulation)  # refuses what cannot be shared
    if options.validate_every and not recipe.validation_prompts:
        raise UserError(
            "--validate-every draws the recipe's validation_prompts, and it has none: add some, or leave it out"
        )
    latents = LatentCache(cache, batch_size=recipe.batch_size, seed=recipe.seed)
    teachers = {stage.teacher: resolve(stage.teacher, workdir) for stage in recipe.stages}
    for teacher in teachers.values():  # the first too: what it predicts is checked
        check_successor(next(iter(teachers.values())), teacher)
        if (told := latents.check_teacher(teacher)) and accelerator.is_main_process:
            say(told)
    run = {
        "recipe": recipe.as_dict(),
        "teachers": {name: checkpoint_hash(folder) for name, folder in teachers.items()},
        "start": checkpoint_hash(start) if start else None,
        "cache": latents.key,
        "mixed_precision": options.mixed_precision,
        "optimizer": options.optimizer,
    }
    run["key"] = sha256_json(run)

    def refuse(_waiting: str) -> None:
        raise UserError(f"another process is training into {out}; wait for its end or choose another --out")

    # the first process alone says: a shared disk may go on hiding from another what that one has missed once
    [finished] = broadcast_object_list([_is_finished(out, run["key"])])
    if not finished:
        with exclusive(out, refuse, out / ".lock") if accelerator.is_main_process else nullcontext():
            _train_stages(accelerator, recipe, latents, teachers, start, out, run, options)
    accelerator.end_training()


def _is_finished(out: Path, key: str) -> bool:
    """Raises UserError where `out` belongs to something else, or was begun by a version whose state is not read."""
    stated = [out / name for name in ("run.json", "slimxl.json", "model_index.json") if (out / name).exists()]
    if not stated:
        return False
    about = read_json(stated[0])
    if about.get("key") != key:
        raise UserError(f"{out} belongs to another recipe, teacher or cache; choose another --out or remove it")
    finished = (out / "slimxl.json").exists()
    if not finished and about.get("format") != STATE_FORMAT:
        raise UserError(f"{out} was begun by another version of slimxl: finish it with that one, or remove it")
    return finished


def _train_stages(
    accelerator: Accelerator,
    recipe: Recipe,
    latents: LatentCache,
    teachers: dict[str, Path],
    start: Path | None,
    out: Path,
    run: dict[str, Any],
    options: TrainOptions,
) -> None:
    """The stages that `out` does not hold yet; `run` is what it belongs to."""
    [done] = broadcast_object_list([_stages_done(recipe, out) if accelerator.is_main_process else None])
    if done is None:
        return
    plans: dict[str, MemoryPlan] = {}
    if accelerator.is_main_process and done < len(recipe.stages):
        remove_leftovers(out / "stages")
        remove_leftovers(out / "state")
        plans = _look_ahead(recipe, teachers[recipe.stages[0].teacher], out, options, accelerator)
        write_json(out / "run.json", run | {"format": STATE_FORMAT})
    if options.tensorboard:
        accelerator.init_trackers("tensorboard")
    accelerator.wait_for_everyone()
    previous = _stage_folder(recipe, done - 1, out) if done else start
    micro_batch = recipe.micro_batch(accelerator.num_processes, options.accumulation)
    with explaining_full_memory(_memory_advice(options, accelerator.num_processes, micro_batch, plans, out)):
        for number in range(done, len(recipe.stages)):
            if number and accelerator.is_main_process:
                _draw_samples(_stage_folder(recipe, number - 1, out), recipe)
            folder = teachers[recipe.stages[number].teacher]
            previous = _StageRun(accelerator, recipe, number, folder, latents, out, options).run(previous)
            gc.collect()  # accelerate's wrappers hold the student in a cycle
            torch.cuda.empty_cache()
    if accelerator.is_main_process:
        _finish(out, recipe, run)


def _stage_folder(recipe: Recipe, number: int, out: Path) -> Path:
    return out / "stages" / f"{number + 1:02d}-{recipe.stages[number].name}"


def _stages_done(recipe: Recipe, out: Path) -> int | None:
    """The last one done says that all before it were: each takes the place of the one before. None where another run
    has finished `out` since it was looked at."""
    if (out / "slimxl.json").exists():
        return None
    numbers = range(len(recipe.stages), 0, -1)
    return next((n for n in numbers if (_stage_folder(recipe, n - 1, out) / "slimxl.json").exists()), 0)


def _look_ahead(
    recipe: Recipe, teacher: Path, out: Path, options: TrainOptions, accelerator: Accelerator
) -> dict[str, MemoryPlan]:
    """Tells the memory plan before anything is loaded, and returns it.

    Raises UserError where the disk cannot hold the run: its checkpoints and one more while that is written, the student
    that a stage begins with, and whole pipelines of the stage before and of this.
    """
    title, plans = plan_recipe(
        recipe,
        find_architecture_of(teacher),
        half=HALF[options.mixed_precision],
        optimizer=options.optimizer,
        processes=accelerator.num_processes,
        accumulation=options.accumulation,
        fsdp=options.fsdp,
    )
    for line in describe_plan(plans, title, *device_memory()):
        say(line)
    plan = next(iter(plans.values()))
    shards = accelerator.num_processes if options.fsdp else 1
    state_bytes = (plan.student + plan.ema + plan.optimizer) * shards
    initial_bytes = plan.student * shards
    unet_bytes = initial_bytes * student_dtype(teacher).itemsize // 4
    pipeline_bytes = unet_bytes + sum(path.stat().st_size for path in files_but_unet(teacher).values())
    needed = (options.keep_checkpoints + 1) * state_bytes + initial_bytes + 2 * pipeline_bytes
    held = sum(
        path.stat().st_size for kept in ("state", "stages") for path in (out / kept).rglob("*") if path.is_file()
    )
    require_free_disk(out, needed - held, "what this run has yet to keep")
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


def _draw_samples(folder: Path, recipe: Recipe) -> None:
    """What the stored student of `folder` draws, unless that is there: a run that goes on makes up for a kill."""
    path = folder / "samples.png"
    if recipe.validation_prompts and not path.exists():
        student = load_component(folder, "unet", student_dtype(folder))
        draw_validation(student, folder, recipe.validation_prompts, path)


def _finish(out: Path, recipe: Recipe, run: dict[str, Any]) -> None:
    """Moves the last stage's pipeline up to `out`; slimxl.json comes last and says that all is there."""
    last = _stage_folder(recipe, len(recipe.stages) - 1, out)
    about = read_json(last / "slimxl.json")
    for item in last.iterdir():
        if item.name != "slimxl.json":
            item.rename(out / item.name)
    _draw_samples(out, recipe)
    write_json(out / "slimxl.json", about | run)
    for left in ("stages", "state"):
        shutil.rmtree(out / left, ignore_errors=True)


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
        self.folder, self.states = _stage_folder(recipe, number, out), out / "state"

    def run(self, previous: Path | None) -> Path:
        """Returns the finished student's folder; `previous` is the student to start from (None: the teacher)."""
        initial = self._operate(previous)
        pair = self._make_pair(initial)
        ema = EMAModel(pair.student.parameters(), decay=self.recipe.ema_decay) if self.recipe.ema_decay else None
        state = TrainingState(pair.student, pair.optimizer.optimizer, ema, self.accelerator.scaler)
        with pair.taught_by(self.stage.losses) as step:
            self._train(state, pair, step, previous)
        student = gather_student(state)
        if student is not None and self.accelerator.is_main_process:
            save_student(student, self.teacher_folder, self.folder, self.layer_map, self.recipe, self.number)
            for old in [self.states, *self.folder.parent.iterdir()]:
                if old != self.folder:
                    shutil.rmtree(old, ignore_errors=True)
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

    def _train(self, state: TrainingState, pair: Pair, take_step: Callable[..., Terms], previous: Path | None) -> None:
        accelerator, options, stage = self.accelerator, self.options, self.stage
        progress = resume(accelerator, state, self.states, self.number, self.out / "losses.jsonl")
        started = saved = time.monotonic()
        guard = DivergenceGuard()
        guard.good.extend(progress.good_losses)
        title = f"{self.recipe.name} {self.number + 1}/{len(self.recipe.stages)} {stage.name}"

        def noised(step: int) -> dict[str, torch.Tensor]:
            batch = self.latents.batch(_global_step(self.recipe, self.number, step), pair.rows)
            return pair.noised(batch, (self.recipe.seed, self.number, step))

        steps = range(progress.step, stage.steps)
        shown = track(steps, title, done=progress.step) if accelerator.is_main_process else steps
        # without a GPU the host has no time to spare: a second team of threads takes the first one's cores
        batches = ahead(noised, steps) if accelerator.device.type == "cuda" else map(noised, steps)
        due = False
        with noting_sigterm() as sigterm_came:
            for step, batch in zip(shown, batches, strict=True):
                terms = take_step(
                    batch,
                    learning_rate=learning_rate(stage, step),
                    warm=min(1.0, (step + 1) / max(1, stage.losses.warmup_steps)),
                )
                if state.ema:
                    state.ema.step(state.student.parameters())
                self._check(title, step, terms, guard, previous)
                done = step + 1
                if accelerator.is_main_process and (done % options.log_every == 0 or done == stage.steps):
                    self._log(done, terms, learning_rate(stage, step), time.monotonic() - started)
                late = time.monotonic() - saved > 60 * options.checkpoint_minutes
                stop, late = self._any_process(sigterm_came(), late)
                due = done < stage.steps and (due or late or done % options.checkpoint_every == 0)
                if (due or stop) and not guard.bad_steps:
                    progress = Progress(step=done, good_losses=tuple(guard.good))
                    save_state(accelerator, state, self.states, self.number, progress, keep=options.keep_checkpoints)
                    due, saved = False, time.monotonic()
                if stop:
                    if accelerator.is_main_process:
                        reached = f"stage {self.number + 1}, step {progress.step}"
                        say(f"stopped by SIGTERM; the same command goes on from {reached}")
                    accelerator.end_training()
                    raise SystemExit(128 + signal.SIGTERM)
                if options.validate_every and done % options.validate_every == 0 and done < stage.steps:
                    self._draw(state, done)
                    torch.cuda.empty_cache()  # of the picture's own nets
                    accelerator.wait_for_everyone()

    def _draw(self, state: TrainingState, done: int) -> None:
        student = gather_student(state)
        if student is not None and self.accelerator.is_main_process:
            path = self.out / "samples" / f"{self.folder.name}-{done:07d}.png"
            draw_validation(student, self.teacher_folder, self.recipe.validation_prompts, path)

    def _any_process(self, *flags: bool) -> list[bool]:
        """Each flag true in all processes where it is in one: what follows from it is done by all or by none."""
        told = torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device)
        return self.accelerator.reduce(told, reduction="sum").bool().tolist()

    def _check(self, title: str, step: int, terms: Terms, guard: DivergenceGuard, previous: Path | None) -> None:
        """Raises UserError for a loss or a gradient that is not finite, or a loss that has stayed far above its median."""
        broken = [name for name, value in terms.items() if not math.isfinite(value)]
        if self.accelerator.scaler and broken == ["gradient_norm"]:
            broken = []  # a loss scale too large for fp16: the scaler leaves the step out and lowers it
        if broken:
            fault = f"step {step} is not finite ({', '.join(broken[:4])})"
        elif step >= self.stage.losses.warmup_steps and guard.diverged(terms["total"]):
            fault = (
                f"the loss has diverged: over {guard.factor:g} times its median {guard.median:.4g} for {guard.patience} "
                f"steps, now {terms['total']:.4g} at step {step}"
            )
        else:
            return
        raise UserError(f"{title}: {fault}; {self._advice(previous)}")

    def _advice(self, previous: Path | None) -> str:
        """What is left to do where this recipe leads nowhere: another, from the last whole student."""
        bf16 = " or take --mixed-precision bf16" if self.options.mixed_precision == "fp16" else ""
        done = f", take out its first {self.number} stages" if self.number else ""
        begin = f" --start {previous}" if previous else ""
        return (
            f"the last good state is in {self.states}, but the same command would meet the same again: `python -m distill "
            f"recipe {self.out / 'run.json'} > mine.json`, lower learning_rate there{bf16}{done}, and train with --recipe "
            f"mine.json{begin} and another --out"
        )

    def _log(self, done: int, terms: Terms, rate: float, seconds: float) -> None:
        total, norm = terms.pop("total"), terms.pop("gradient_norm")
        curves = {"lr": rate, "loss": total, "gradient_norm": norm if math.isfinite(norm) else None}
        line = {"stage": f"{self.number + 1}-{self.stage.name}", "step": done, "seconds": round(seconds, 3)}
        with (self.out / "losses.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line | curves | {"terms": terms}) + "\n")
        if self.options.tensorboard:
            self.accelerator.log(curves | terms, step=_global_step(self.recipe, self.number, done))


def _global_step(recipe: Recipe, number: int, step: int) -> int:
    return sum(stage.steps for stage in recipe.stages[:number]) + step
