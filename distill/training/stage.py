"""One stage of a run: the student's first weights, the steps over the latent cache, a whole pipeline folder at its end."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from distill.checkpoints.sampling import sampling_of
from distill.checkpoints.sources import load_component, prediction_type_of
from distill.common.ahead import Awaited, ahead
from distill.common.errors import UserError
from distill.common.files import seed_of
from distill.common.progress import say, track
from distill.data.cache import LatentCache
from distill.models.module_map import ModuleMap
from distill.training.accelerator import COMPUTE_DTYPE, decided_by_first, trained_parameters
from distill.training.guard import DivergenceGuard
from distill.training.options import TrainOptions
from distill.training.output.samples import draw_samples
from distill.training.output.state import Progress, TrainingState, gather_student, resume, save_state
from distill.training.output.student_folder import save_student, stage_folder, stage_title, student_dtype
from distill.training.recipes import PREVIOUS, Recipe
from distill.training.sigterm import noting_sigterm
from distill.training.step import Pair, Terms, alphas_cumprod_of
from distill.training.text import TextEncoders


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """Stage `number`, from 0, of a recipe trained into `out`: made ready, gone on with, and left as a pipeline folder.
    `teacher` is the folder of the teacher, `pipeline` that of the VAE and text encoders that `latents` was made with, which
    the student is drawn and shipped with; `modules` says what the student is made from; `start` is the student that the
    recipe's first stage begins with (None: its teacher)."""

    accelerator: Accelerator
    recipe: Recipe
    number: int
    teacher: Path
    pipeline: Path
    modules: ModuleMap
    latents: LatentCache
    out: Path
    options: TrainOptions
    start: Path | None = None

    def run(self, previous: Path | None) -> Path:
        """Returns the finished student's folder; `previous` is the student to start from (None: the teacher)."""
        pair = self._make_pair(self._begin(previous))
        trained = trained_parameters(pair.student)
        ema = EMAModel(trained, decay=self.recipe.ema_decay) if self.recipe.ema_decay else None
        with pair.taught_by(self.recipe.stages[self.number].objective) as take_step:
            state = TrainingState(pair.student, pair.optimizer.optimizer, ema, self.accelerator.scaler, pair.target)
            self._train(pair, take_step, state, previous)
        self._check_weights(state, previous)
        student = gather_student(state)
        sampling = self.recipe.stages[self.number].objective.sampling(sampling_of(self.teacher))
        folder = stage_folder(self.recipe, self.number, self.out)
        if student is not None and self.accelerator.is_main_process:
            save_student(student, self.pipeline, folder, self.modules, self.recipe, self.number, sampling)
            for old in [self.out / "state", *folder.parent.iterdir()]:
                if old != folder:
                    shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()
        return folder

    def _begin(self, previous: Path | None) -> Path:
        """The folder of the student's first weights, made from the previous student or from the teacher."""
        folder = self.out / "stages" / f"{self.number + 1:02d}-initial"
        held = ModuleMap.of_student(previous) if previous else None
        stage, source = self.recipe.stages[self.number], previous or self.teacher
        config = stage.objective.student_config
        return decided_by_first(
            lambda: stage.student.begin(source, self.modules, held, folder, config=config, seed=self._seed)
        )

    @property
    def _seed(self) -> int:
        """Of first weights that are random."""
        return seed_of(self.recipe.seed, "from scratch")

    def _make_pair(self, initial: Path) -> Pair:
        """A student that begins on its teacher, and leaves its weights as they are, is that teacher too."""
        stage, modules, half = (
            self.recipe.stages[self.number],
            self.modules,
            COMPUTE_DTYPE[self.options.mixed_precision],
        )
        if stage.teacher == PREVIOUS:
            modules = modules.relative_to(ModuleMap.of_student(self.teacher))
        student = load_component(initial, "unet", stage.student.dtype(half)).train()
        stage.student.prepare(student, seed=self._seed)
        teacher, device = None, self.accelerator.device
        if stage.objective.needs_teacher:
            teacher = student if initial == self.teacher else load_component(self.teacher, "unet", half)
        return Pair(
            self.accelerator,
            teacher,
            student,
            modules,
            alphas_cumprod_of(self.teacher),
            self.latents.unconditional,
            self.recipe,
            self.options,
            prediction_type=prediction_type_of(self.teacher),
            text_encoders=None if self.latents.holds_text else TextEncoders.load(self.pipeline, half, device),
        )

    def _batches(self, pair: Pair, steps: range) -> Iterator[dict[str, torch.Tensor]]:
        """What each step takes; on a GPU made in a thread, one step ahead. Without one the host has no time to spare: a
        second team of threads would take the first one's cores. (torch's DataLoader would need a process of its own,
        which dies of the SIGTERM that the run obeys at the end of a step, and wraps errors in tracebacks.)"""
        objective = self.recipe.stages[self.number].objective
        before = sum(stage.steps for stage in self.recipe.stages[: self.number])

        def noised(step: int) -> dict[str, torch.Tensor]:
            cached = self.latents.batch(before + step, pair.rows)
            return pair.noised(objective, cached, (self.recipe.seed, self.number, step))

        return ahead(noised, steps) if self.accelerator.device.type == "cuda" else map(noised, steps)

    def _train(self, pair: Pair, take_step: Callable[..., Terms], state: TrainingState, previous: Path | None) -> None:
        accelerator, options, stage = self.accelerator, self.options, self.recipe.stages[self.number]
        states = self.out / "state"
        progress = resume(accelerator, state, states, self.number, self.out / "losses.jsonl")
        guard = DivergenceGuard(progress.good_losses)
        title = f"{self.recipe.name} {self.number + 1}/{len(self.recipe.stages)} {stage.name}"
        steps = range(progress.step, stage.steps)
        batches = Awaited(self._batches(pair, steps), str(self.latents.place))
        waiting = batches.describe
        shown = track(steps, title, done=progress.step, note=waiting) if accelerator.is_main_process else steps
        started = saved = time.monotonic()
        due = False
        with noting_sigterm() as sigterm_came:
            for step, batch in zip(shown, batches, strict=True):
                rate = stage.learning_rate_at(step)
                terms = take_step(batch, step, learning_rate=rate)
                if state.ema:
                    state.ema.step(trained_parameters(state.student))
                steady, scaled = step >= stage.objective.steady_from, accelerator.scaler is not None
                if fault := guard.fault(step, terms, steady=steady, scaled=scaled):
                    raise UserError(f"{title}: {fault}; {self._advice(previous)}")
                done = step + 1
                if accelerator.is_main_process and (done % options.log_every == 0 or done == stage.steps):
                    self._log(done, terms, rate, time.monotonic() - started, batches.seconds)
                late = time.monotonic() - saved > 60 * options.checkpoint_minutes
                stop, late = self._any_process(sigterm_came(), late)
                due = done < stage.steps and (due or late or done % options.checkpoint_every == 0)
                if (due or stop) and not guard.bad_steps:
                    self._check_weights(state, previous)
                    progress = Progress(step=done, good_losses=tuple(guard.good))
                    save_state(accelerator, state, states, self.number, progress, keep=options.keep_checkpoints)
                    due, saved = False, time.monotonic()
                if stop:
                    if accelerator.is_main_process:
                        reached = f"stage {self.number + 1}, step {progress.step}"
                        say(f"stopped by SIGTERM; the same command goes on from {reached}")
                    accelerator.end_training()
                    raise SystemExit(128 + signal.SIGTERM)
                if options.validate_every and done % options.validate_every == 0 and done < stage.steps:
                    self._draw(state, done)

    def draw_finished(self, folder: Path, about: Path | None = None) -> None:
        """What the student that this stage left in `folder` draws, unless that picture is there: a run that goes on makes up
        for a kill. It stays in OUT/samples when later stages end. Its slimxl.json lies in `about`, if not in `folder`."""
        path = self.out / "samples" / f"{stage_title(self.recipe, self.number)}.png"
        if self.recipe.validation_prompts and not path.exists():
            student = self.recipe.stages[self.number].student
            unet = student.load(folder, self.start or self.teacher, student_dtype(self.pipeline))
            sampling = sampling_of(about or folder)
            draw_samples(unet, self.pipeline, self.recipe.validation_prompts, path, sampling=sampling)

    def _draw(self, state: TrainingState, done: int) -> None:
        student = gather_student(state)
        if student is not None and self.accelerator.is_main_process:
            path = self.out / "samples" / f"{stage_title(self.recipe, self.number)}-{done:07d}.png"
            sampling = self.recipe.stages[self.number].objective.sampling(sampling_of(self.teacher))
            draw_samples(student, self.pipeline, self.recipe.validation_prompts, path, sampling=sampling)
        del student
        torch.cuda.empty_cache()  # of the picture's own nets
        self.accelerator.wait_for_everyone()

    def _any_process(self, *flags: bool) -> list[bool]:
        """Each flag true in all processes where it is in one: what follows from it is done by all or by none."""
        told = torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device)
        return self.accelerator.reduce(told, reduction="sum").bool().tolist()

    def _check_weights(self, state: TrainingState, previous: Path | None) -> None:
        """Raises UserError for weights that are not finite: the last update may overflow, and no loss comes after it."""
        kept = [*trained_parameters(state.student), *(state.ema.shadow_params if state.ema else ())]
        [broken] = self._any_process(not all(bool(weights.isfinite().all()) for weights in kept))
        if broken:
            stage = self.recipe.stages[self.number]
            raise UserError(
                f"stage {stage.name}: the student's weights are not finite any more; {self._advice(previous)}"
            )

    def _advice(self, previous: Path | None) -> str:
        """What to do where this recipe leads nowhere: train by another, from the last whole student."""
        bf16 = " or take --mixed-precision bf16" if self.options.mixed_precision == "fp16" else ""
        done = f", take out its first {self.number} stages" if self.number else ""
        begin = f" --start {previous}" if previous else ""
        return (
            f"the last good state is in {self.out / 'state'}, but the same command would meet the same again: `python -m "
            f"distill recipe {self.out / 'run.json'} > mine.json`, lower learning_rate there{bf16}{done}, and train with "
            f"--recipe mine.json{begin} and another --out"
        )

    def _log(self, done: int, terms: Terms, rate: float, seconds: float, data_seconds: float) -> None:
        """One line: `seconds` since the run began or went on, `data_seconds` of them spent waiting for data."""
        total, norm = terms.pop("total"), terms.pop("gradient_norm")
        curves = {"lr": rate, "loss": total, "gradient_norm": norm if math.isfinite(norm) else None}
        stage = self.recipe.stages[self.number]
        line = {"stage": f"{self.number + 1}-{stage.name}", "step": done, "seconds": round(seconds, 3)}
        line["data_seconds"] = round(data_seconds, 3)
        with (self.out / "losses.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line | curves | {"terms": terms}) + "\n")
        if self.options.report_to:
            before = sum(stage.steps for stage in self.recipe.stages[: self.number])
            self.accelerator.log(curves | terms, step=before + done)
