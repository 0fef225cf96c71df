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

from distill.checkpoints.folder import alphas_cumprod_of, prediction_type_of
from distill.checkpoints.load import load_component
from distill.checkpoints.sampling import Sampling, sampling_of
from distill.common.ahead import Awaited, ahead
from distill.common.errors import UserError
from distill.common.files import seed_of
from distill.common.progress import say, track
from distill.models.module_map import ModuleMap
from distill.training.accelerator import COMPUTE_DTYPE, decided_by_first, trained_parameters
from distill.training.guard import DivergenceGuard
from distill.training.options import TrainOptions
from distill.training.output.samples import draw_samples
from distill.training.output.state import Progress, TrainingState, gather_student, resume, save_state
from distill.training.output.student_folder import save_student, student_dtype
from distill.training.prepare import PreparedStage
from distill.training.recipes import PREVIOUS, Recipe
from distill.training.sigterm import noting_sigterm
from distill.training.step import Pair, Terms
from distill.training.text import TextEncoders


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One stage of `recipe`: begun or gone on with, and left as a pipeline folder; `out` is the whole run's folder."""

    accelerator: Accelerator
    recipe: Recipe
    prepared: PreparedStage
    out: Path
    options: TrainOptions

    def run(self) -> None:
        """Leaves the finished student in the stage's folder, and nothing of the stages before."""
        prepared = self.prepared
        pair = self._make_pair(self._begin())
        trained = trained_parameters(pair.student)
        ema = EMAModel(trained, decay=self.recipe.ema_decay) if self.recipe.ema_decay else None
        with pair.taught_by(prepared.stage.objective) as take_step:
            state = TrainingState(pair.student, pair.optimizer.optimizer, ema, self.accelerator.scaler, pair.target)
            self._train(pair, take_step, state)
        self._check_weights(state)
        student = gather_student(state)
        if student is not None and self.accelerator.is_main_process:
            save_student(student, prepared, self.recipe, self._sampling())
            for old in [self.out / "state", *prepared.folder.parent.iterdir()]:
                if old != prepared.folder:
                    shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()

    def _sampling(self) -> Sampling | None:
        """How the student is to be drawn."""
        return self.prepared.stage.objective.sampling(sampling_of(self.prepared.teacher))

    def _begin(self) -> Path:
        """The folder of the student's first weights, made from the previous student or from the teacher."""
        prepared = self.prepared
        folder = self.out / "stages" / f"{prepared.number + 1:02d}-initial"
        held = ModuleMap.of_student(prepared.previous) if prepared.previous else None
        source, config = prepared.previous or prepared.teacher, prepared.stage.objective.student_config
        return decided_by_first(
            lambda: prepared.stage.student.begin(source, prepared.modules, held, folder, config=config, seed=self._seed)
        )

    @property
    def _seed(self) -> int:
        """The seed of first weights that are random."""
        return seed_of(self.recipe.seed, "from scratch")

    def _make_pair(self, initial: Path) -> Pair:
        """Loads student and teacher. Adapters on the teacher itself need no second net: both are the same one."""
        prepared, half = self.prepared, COMPUTE_DTYPE[self.options.mixed_precision]
        stage, modules = prepared.stage, prepared.modules
        if stage.teacher == PREVIOUS:
            modules = modules.relative_to(ModuleMap.of_student(prepared.teacher))
        student = load_component(initial, "unet", stage.student.dtype(half)).train()
        stage.student.prepare(student, seed=self._seed)
        teacher, device = None, self.accelerator.device
        if stage.objective.needs_teacher:
            teacher = student if initial == prepared.teacher else load_component(prepared.teacher, "unet", half)
        return Pair(
            self.accelerator,
            teacher,
            student,
            modules,
            alphas_cumprod_of(prepared.teacher),
            prepared.latents.unconditional,
            self.recipe,
            self.options,
            prediction_type=prediction_type_of(prepared.teacher),
            text_encoders=None if prepared.latents.holds_text else TextEncoders.load(prepared.pipeline, half, device),
        )

    def _batches(self, pair: Pair, steps: range) -> Iterator[dict[str, torch.Tensor]]:
        """What each step takes; on a GPU made in a thread, one step ahead. Without one the host has no time to spare: a
        second team of threads would take the first one's cores. (torch's DataLoader would need a process of its own,
        which dies of the SIGTERM that the run obeys at the end of a step, and wraps errors in tracebacks.)"""
        prepared = self.prepared

        def noised(step: int) -> dict[str, torch.Tensor]:
            cached = prepared.latents.batch(prepared.first_step + step, pair.rows)
            return pair.noised(prepared.stage.objective, cached, (self.recipe.seed, prepared.number, step))

        return ahead(noised, steps) if self.accelerator.device.type == "cuda" else map(noised, steps)

    def _train(self, pair: Pair, take_step: Callable[..., Terms], state: TrainingState) -> None:
        accelerator, options = self.accelerator, self.options
        number, stage = self.prepared.number, self.prepared.stage
        states = self.out / "state"
        progress = resume(accelerator, state, states, number, self.out / "losses.jsonl")
        guard = DivergenceGuard(progress.good_losses)
        title = f"{self.recipe.name} {number + 1}/{len(self.recipe.stages)} {stage.name}"
        steps = range(progress.step, stage.steps)
        batches = Awaited(self._batches(pair, steps), str(self.prepared.latents.place))
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
                    raise UserError(f"{title}: {fault}; {self._advice()}")
                done = step + 1
                if accelerator.is_main_process and (done % options.log_every == 0 or done == stage.steps):
                    self._log(done, terms, rate, time.monotonic() - started, batches.seconds)
                late = time.monotonic() - saved > 60 * options.checkpoint_minutes
                stop, late = self._any_process(sigterm_came(), late)
                due = done < stage.steps and (due or late or done % options.checkpoint_every == 0)
                if (due or stop) and not guard.bad_steps:
                    self._check_weights(state)
                    progress = Progress(step=done, good_losses=tuple(guard.good))
                    save_state(accelerator, state, states, number, progress, keep=options.keep_checkpoints)
                    due, saved = False, time.monotonic()
                if stop:
                    if accelerator.is_main_process:
                        reached = f"stage {number + 1}, step {progress.step}"
                        say(f"stopped by SIGTERM; the same command goes on from {reached}")
                    accelerator.end_training()
                    raise SystemExit(128 + signal.SIGTERM)
                if options.validate_every and done % options.validate_every == 0 and done < stage.steps:
                    self._draw(state, done)

    def draw_finished(self, moved_to: Path | None = None) -> None:
        """What the student that this stage left draws, unless that picture is there: a run that goes on makes up for a kill.
        It stays in OUT/samples when later stages end. The student lies in the stage's folder, or all of it but its
        slimxl.json in `moved_to`."""
        prepared, prompts = self.prepared, self.recipe.validation_prompts
        path = self.out / "samples" / f"{prepared.title}.png"
        if prompts and not path.exists():
            base, folder = prepared.previous or prepared.teacher, moved_to or prepared.folder
            unet = prepared.stage.student.load(folder, base, student_dtype(prepared.pipeline))
            draw_samples(unet, prepared.pipeline, prompts, path, sampling=sampling_of(prepared.folder))

    def _draw(self, state: TrainingState, done: int) -> None:
        student = gather_student(state)
        if student is not None and self.accelerator.is_main_process:
            path = self.out / "samples" / f"{self.prepared.title}-{done:07d}.png"
            prompts = self.recipe.validation_prompts
            draw_samples(student, self.prepared.pipeline, prompts, path, sampling=self._sampling())
        del student
        torch.cuda.empty_cache()  # of the picture's own nets
        self.accelerator.wait_for_everyone()

    def _any_process(self, *flags: bool) -> list[bool]:
        """The flags as all processes see them: true where one process says so. Then all of them act on it, or none."""
        told = torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device)
        return self.accelerator.reduce(told, reduction="sum").bool().tolist()

    def _check_weights(self, state: TrainingState) -> None:
        """Raises UserError for weights that are not finite: the last update may overflow, and no loss comes after it."""
        kept = [*trained_parameters(state.student), *(state.ema.shadow_params if state.ema else ())]
        [broken] = self._any_process(not all(bool(weights.isfinite().all()) for weights in kept))
        if broken:
            raise UserError(
                f"stage {self.prepared.stage.name}: the student's weights are not finite any more; {self._advice()}"
            )

    def _advice(self) -> str:
        """What to do when this recipe cannot go on: change it, and start from the last whole student."""
        bf16 = " or take --mixed-precision bf16" if self.options.mixed_precision == "fp16" else ""
        number, previous = self.prepared.number, self.prepared.previous
        done = f", take out its first {number} stages" if number else ""
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
        name = f"{self.prepared.number + 1}-{self.prepared.stage.name}"
        line = {"stage": name, "step": done, "seconds": round(seconds, 3)}
        line["data_seconds"] = round(data_seconds, 3)
        with (self.out / "losses.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line | curves | {"terms": terms}) + "\n")
        if self.options.report_to:
            self.accelerator.log(curves | terms, step=self.prepared.first_step + done)
