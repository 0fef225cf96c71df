"""One stage of a run: surgery, the steps over the latent cache, and a whole pipeline folder at its end."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from distill.common.ahead import ahead
from distill.common.errors import UserError
from distill.common.files import replacing
from distill.common.progress import say, track
from distill.data.cache import LatentCache, seed_of
from distill.models.architectures import find_architecture
from distill.models.module_map import ModuleMap
from distill.models.sources import find_family
from distill.models.surgery import make_student_unet
from distill.training.accelerator import COMPUTE_DTYPE
from distill.training.checkpoints import (
    Progress,
    TrainingState,
    alphas_cumprod_of,
    draw_validation,
    gather_student,
    resume,
    save_state,
    save_student,
    stage_folder,
)
from distill.training.options import TrainOptions
from distill.training.pair import Pair, Terms, load_nets
from distill.training.recipes import Recipe
from distill.training.sigterm import noting_sigterm
from distill.training.step import DivergenceGuard, learning_rate


class StageRun:
    """One stage of a run: made ready, trained from where it was, and left as a whole pipeline folder."""

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: Recipe,
        number: int,
        teacher_folder: Path,
        modules: ModuleMap,
        latents: LatentCache,
        out: Path,
        options: TrainOptions,
    ) -> None:
        self.accelerator, self.recipe, self.number, self.options = accelerator, recipe, number, options
        self.stage, self.teacher_folder, self.latents, self.out = recipe.stages[number], teacher_folder, latents, out
        self.modules = modules
        self.folder, self.states = stage_folder(recipe, number, out), out / "state"

    def run(self, previous: Path | None) -> Path:
        """Returns the finished student's folder; `previous` is the student to start from (None: the teacher)."""
        initial = self._make_initial_student(previous)
        pair = self._make_pair(initial)
        ema = EMAModel(pair.student.parameters(), decay=self.recipe.ema_decay) if self.recipe.ema_decay else None
        state = TrainingState(pair.student, pair.optimizer.optimizer, ema, self.accelerator.scaler)
        with pair.taught_by(self.stage.losses) as step:
            self._train(state, pair, step, previous)
        student = gather_student(state)
        if student is not None and self.accelerator.is_main_process:
            save_student(student, self.teacher_folder, self.folder, self.modules, self.recipe, self.number)
            for old in [self.states, *self.folder.parent.iterdir()]:
                if old != self.folder:
                    shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()
        return self.folder

    def _make_initial_student(self, previous: Path | None) -> Path:
        """The folder of the student's first weights, copied from the previous student or from the teacher."""
        source = previous or self.teacher_folder
        student = find_architecture(self.stage.student, find_family(source))
        initial = self.out / "stages" / f"{self.number + 1:02d}-initial"
        if self.accelerator.is_main_process and not initial.exists():
            if self.stage.from_scratch:
                torch.manual_seed(seed_of(self.recipe.seed, "from scratch"))
                with replacing(initial) as temporary:
                    UNet2DConditionModel(**student.unet_config).save_pretrained(temporary)
            else:
                held = ModuleMap.of_student(source) if previous else None
                make_student_unet(source, student, self.modules.relative_to(held), initial)
        self.accelerator.wait_for_everyone()
        return initial

    def _make_pair(self, initial: Path) -> Pair:
        teacher = self.teacher_folder if self.stage.losses.needs_teacher else None
        return Pair(
            self.accelerator,
            *load_nets(teacher, initial, COMPUTE_DTYPE[self.options.mixed_precision]),
            self.modules,
            alphas_cumprod_of(self.teacher_folder),
            self.latents.unconditional,
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
